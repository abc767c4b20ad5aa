"""The optimizers by name, and what may be given in their place: any optax transformation.

Each has optax's own sign and convention: what it returns, times the learning rate, is added to the
parameters. Those of the table are made at a rate of 1. They see the parameters as a flat dict, by path.

References:
  Loshchilov, Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101, 2017 (AdamW).
  Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675, 2023 (Lion).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, Real

from ist_jax.exchange.layout import Layout
from ist_jax.extension import fingerprint
from ist_jax.key import Options

Schedule = Callable[[Real[Array, ""]], Float[Array, ""] | float]  # examples seen by all -> rate
Transformation: TypeAlias = optax.GradientTransformation


def _kernels(params: PyTree) -> PyTree:
    """Which leaves are kernels, by Flax's name for them."""
    return {path: path.rpartition("/")[2] == "kernel" for path in params}


Mask = Callable[[PyTree], PyTree]  # parameters -> for which of them
DECAYED: dict[str, Mask | None] = {"all": None, "kernels": _kernels}  # what weight decay is for


class Entry(NamedTuple):
    """A line of the table: a factory, and the keys of `config.optimizer` that it takes.

    It is also given `mask`, of the parameters that decay; None: all do.
    """

    make: Callable[..., Transformation]
    keys: tuple[str, ...]


def sgd(*, weight_decay: float, momentum: float, nesterov: bool, mask: Mask | None = None) -> Transformation:
    """SGD with weight decay as part of the gradient, as in the papers."""
    parts = [optax.add_decayed_weights(weight_decay, mask)] if weight_decay else []
    parts += [optax.trace(momentum, nesterov=nesterov)] if momentum else []
    return optax.chain(*parts, optax.scale(-1.0))


OPTIMIZERS: dict[str, Entry] = {
    "sgd": Entry(sgd, ("weight_decay", "momentum", "nesterov")),
    "adamw": Entry(partial(optax.adamw, 1.0), ("weight_decay", "b1", "b2", "eps")),
    "lion": Entry(partial(optax.lion, 1.0), ("weight_decay", "b1", "b2")),
}


def make(options: Options) -> Transformation:
    """The optimizer that `config.optimizer` names; keys that are unset have optax's own default."""
    entry = OPTIMIZERS[options["name"]]
    own = {key: options[key] for key in entry.keys if options[key] is not None}
    return entry.make(**own, mask=DECAYED[options["decayed"]])


class Given(NamedTuple):
    """What is given from Python in place of the config's; None: the config's.

    Attributes:
      optimizer: an optax transformation; what it returns is added to the parameters.
      learning_rate: examples that all workers have seen -> factor of what the optimizer returns.
    """

    optimizer: Transformation | None = None
    learning_rate: Schedule | None = None

    @property
    def schedule(self) -> Schedule | None:
        """The learning rate: an optimizer that is given has its own, so that the config's is none of it."""
        own = self.optimizer and optax.constant_schedule(1.0)
        return self.learning_rate or own

    def recorded(self) -> dict[str, dict[str, str]]:
        """What a run's settings say of it, by which another one is refused.

        Raises:
          ValueError: it is neither a transformation nor a schedule.
        """
        if not isinstance(self.optimizer, Transformation | None):
            raise ValueError(
                f"optimizer={self.optimizer!r} is no optax transformation; give one, such as "
                "optax.adamw(1e-3), or set config.optimizer.name"
            )
        if self.learning_rate is not None and not callable(self.learning_rate):
            raise ValueError(
                f"learning_rate={self.learning_rate!r} is no function of the examples seen; set "
                "config.optimizer.learning_rate, or give a schedule, such as optax.constant_schedule(0.1)"
            )
        found = {key: fingerprint(value) for key, value in self._asdict().items() if value is not None}
        return {"given": found} if found else {}


NOTHING_GIVEN = Given()


def check(tx: Transformation, layout: Layout, policy: str) -> None:
    """Raises ValueError for an optimizer whose state cannot be kept, or must not start anew.

    Args:
      tx: the optimizer.
      layout: of the model.
      policy: what becomes of the state, a name of `steps.POLICIES`.
    """
    params = {path: jax.ShapeDtypeStruct(leaf.shape, layout.dtype) for path, leaf in layout.leaves.items()}
    state = jax.eval_shape(tx.init, params)
    if (policy == "reset" or (policy == "keep" and layout.groups)) and any(map(_is_schedule, _nodes(state))):
        raise ValueError(
            f"the optimizer has a schedule in it, which optimizer_state={policy!r} restarts in every round; "
            "give it a constant rate, and the schedule, over examples, as learning_rate="
        )
    if policy == "reset":
        return
    remedy = f"optimizer_state={policy!r} needs numbers for every parameter, or single ones"
    for where, x in jax.tree_util.tree_leaves_with_path(state, is_leaf=layout.is_tree):
        name = f"{jax.tree_util.keystr(where)} of the optimizer's state"
        if layout.is_tree(x):
            for path, leaf in layout.leaves.items():
                if getattr(x[path], "shape", None) != leaf.shape:
                    found = getattr(x[path], "shape", "left out, as optax.masked and muon do")
                    raise ValueError(f"{name}: {path!r} {leaf.shape} is {found} there; {remedy}")
        elif x.ndim or not jnp.issubdtype(x.dtype, jnp.number):
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}; {remedy}")


def _nodes(state: PyTree) -> list[Any]:
    """The nodes of a state that stand for a schedule, and its other leaves."""
    return jax.tree.leaves(state, is_leaf=_is_schedule)


def _is_schedule(x: object) -> bool:
    injected = isinstance(x, optax.InjectStatefulHyperparamsState) and bool(x.hyperparams_states)
    return injected or isinstance(x, optax.ScaleByScheduleState)
