"""What the models share: their line in the table, and access to parameters that are elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import flax.linen as nn
import jax
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ist_jax.key import Key, Options
from ist_jax.models.sparse import Sparse

M = TypeVar("M", bound=nn.Module)
Gates = Mapping[str, jax.Array] | None  # by group: bool [units]
Scale = Mapping[str, float] | None  # by group


class Entry(NamedTuple):
    """A model in the table `models.MODELS`.

    Attributes:
      build: (values of its options, number of classes, dtype or None) -> the global model.
      options: its keys of the config, by whole names such as 'model.width'.
    """

    build: Callable[[Options, int, DTypeLike | None], nn.Module]
    options: dict[str, Key]


class Fetch(Protocol):
    """Access to parameters of which every device keeps a part."""

    def __call__(self, path: str, shard: jax.Array) -> jax.Array:
        """The whole leaf, from what each device keeps of it."""

    def product(self, path: str, x: jax.Array | Sparse, shard: jax.Array) -> jax.Array:
        """x @ kernel for a leaf [I, O], by which the inputs travel and not the kernel.

        Args: path of the leaf; x [B, I], or `sparse.Sparse`; what this device keeps of it. Returns: [B, O].
        """


def streamed(module: type[M], path: str, fetch: Fetch | None, kept: Sequence[str] = ()) -> type[M]:
    """The module class with its parameters fetched when it is called.

    Args:
      module: a `flax.linen.Module` class.
      path: where its instance stands in the model, such as `section3/blocks`.
      fetch: None: `module` as it is.
      kept: leaves of the module that it takes as this device keeps them, such as `dense/kernel`.
    """
    if fetch is None:
        return module

    def fetch_all(variables: PyTree) -> PyTree:
        flat = traverse_util.flatten_dict(variables["params"], sep="/")
        whole = {name: x if name in kept else fetch(f"{path}/{name}", x) for name, x in flat.items()}
        return {"params": traverse_util.unflatten_dict(whole, sep="/")}

    return nn.map_variables(module, "params", trans_in_fn=fetch_all, init=False)
