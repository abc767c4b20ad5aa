"""How a model is called, whatever it is: the package's, any Flax model, an NNX one through Flax's bridge.

A model is given those of `train`, `deterministic`, `gates` and `scale` that its `__call__` accepts, and in
training a key for Dropout. Its parameters are plain arrays. What cannot be trained is refused from shapes.
"""

import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
from flax import traverse_util
from jax.interpreters import partial_eval
from jaxtyping import Array, Key, PyTree

_ALL = ("train", "deterministic", "gates", "scale")
# Of the package's own norm, which never has to be given them.
_PRECISE_STATISTICS = {"mean", "mean_square"}
_DROPOUT = 2**31 + 1  # folded into a step's key; far from what splitting the same key would give


def offers(model: nn.Module, method: str) -> bool:
    """Whether a model itself has a method or field; NNX's bridge has those of the class inside as well."""
    return hasattr(type(model), method) or method in vars(model)


def describe(model: nn.Module | None) -> str | None:
    """A model of the user's own as text, with its fields; None for the config's."""
    return None if model is None else re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(model).split()))


def accepted(model: nn.Module) -> Collection[str]:
    """Which of the keyword arguments that a model may be given its `__call__` takes."""
    inside = getattr(model, "nnx_class", type(model))  # the bridge's own signature says **kwargs
    parameters = inspect.signature(inside.__call__).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return _ALL
    return [name for name in _ALL if name in parameters]


def init(model: nn.Module, key: Key[Array, ""], inputs: PyTree) -> PyTree:
    """Fresh parameters, nested; boxes of partitioned ones are taken off.

    Args:
      model: the model.
      key: of the parameters; Dropout's is made of it.
      inputs: of one example.
    """
    return _init(model, key, inputs)["params"]


def apply(
    model: nn.Module,
    variables: Mapping[str, PyTree],
    inputs: PyTree,
    *,
    key: Key[Array, ""] | None = None,
    gates: Mapping[str, Array] | None = None,
    scale: Mapping[str, Any] | None = None,
    mutable: Collection[str] = (),
) -> PyTree:
    """What a model returns: as in training where there is a key, else as at evaluation.

    Args:
      model: the model.
      variables: 'params', and 'batch_stats' where they were estimated.
      inputs: of a batch.
      key: of the training step; None: at evaluation.
      gates: by group bool [n] or [L, n], False in empty slots.
      scale: by group, of what the units add.
      mutable: collections that it may write to; then the result is a pair with these.
    """
    train = key is not None
    given: dict[str, Any] = {"train": train, "deterministic": not train, "gates": gates, "scale": scale}
    rngs = {} if key is None else {"dropout": jax.random.fold_in(key, _DROPOUT)}
    chosen = {name: given[name] for name in accepted(model)}
    return model.apply(variables, inputs, rngs=rngs, mutable=list(mutable) or False, **chosen)


def check(model: nn.Module, inputs: PyTree) -> PyTree:
    """Refuses what cannot be trained; shapes alone are looked at.

    Args:
      model: the model.
      inputs: of one example.

    Returns:
      The shapes of the outputs at evaluation.

    Raises:
      ValueError: it has no parameters, variables beside them, or an evaluation that depends on a key.
    """
    key = jax.eval_shape(jax.random.key, 0)
    variables = jax.eval_shape(lambda key: _init(model, key, inputs), key)
    if "params" not in variables:
        raise ValueError(f"the model {type(model).__name__} has no parameters")
    others = [name for name in variables if name != "params"]

    def evaluate(key: Key[Array, ""], params: PyTree) -> PyTree:
        # a key at evaluation: what does not look at it is not random
        return model.apply({"params": params}, inputs, rngs={"dropout": key}, **_at_evaluation(model))

    try:
        traced, outputs = jax.make_jaxpr(evaluate, return_shape=True)(key, variables["params"])
    except flax.errors.FlaxError as error:
        if others:
            raise _beside_the_parameters(others) from error
        raise
    if others and (hasattr(model, "nnx_class") or not _are_the_norms(variables.get("batch_stats", {}))):
        raise _beside_the_parameters(others)
    _, needed = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.out_avals))
    if needed[0]:  # the key
        raise ValueError(
            f"the model {type(model).__name__} is random at evaluation: its outputs depend on Dropout's key; "
            "give its __call__ an argument `train`, or `deterministic`, that switches Dropout off"
        )
    return outputs


def _init(model: nn.Module, key: Key[Array, ""], inputs: PyTree) -> PyTree:
    rngs = {"params": key, "dropout": jax.random.fold_in(key, _DROPOUT)}
    return nn.unbox(model.init(rngs, inputs, **_at_evaluation(model)))


def _at_evaluation(model: nn.Module) -> dict[str, Any]:
    given = {"train": False, "deterministic": True}
    return {name: given[name] for name in accepted(model) if name in given}


def _are_the_norms(statistics: PyTree) -> bool:
    names = {path[-1] for path in traverse_util.flatten_dict(statistics)}
    return names <= _PRECISE_STATISTICS


def _beside_the_parameters(collections: Collection[str]) -> ValueError:
    if "batch_stats" in collections:
        return ValueError(
            "the model keeps running averages, in the collection 'batch_stats': those of subnets would not "
            "describe the merged model; use ist_jax.models.norm.BatchNorm, which goes by the batch at hand"
        )
    return ValueError(
        "the model has variables beside its parameters, in the collection "
        f"{', '.join(map(repr, collections))}: they would be neither trained nor exchanged; make them "
        "parameters, or compute them in __call__"
    )
