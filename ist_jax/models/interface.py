"""What the models share: their line in the table, and access to parameters that are elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
from flax import traverse_util

from ist_jax.key import Key


class Entry(NamedTuple):
    """A model in the table `models.MODELS`.

    Attributes:
      build: (values of its options, number of classes, dtype or None) -> the global model.
      options: its keys of the config, by whole names such as 'model.width'.
    """

    build: Callable[[Mapping[str, Any], int, Any], nn.Module]
    options: dict[str, Key]


class Fetch(Protocol):
    """Access to parameters of which every device keeps a part."""

    def __call__(self, path: str, shard: jax.Array) -> jax.Array:
        """The whole leaf, from what each device keeps of it."""

    def product(self, path: str, x: Any, shard: jax.Array) -> jax.Array:
        """x @ kernel for a leaf [I, O], by which the inputs travel and not the kernel.

        Args: path of the leaf; x [B, I], or `sparse.Sparse`; what this device keeps of it. Returns: [B, O].
        """


def streamed(module: Any, path: str, fetch: Fetch | None, kept: Sequence[str] = ()) -> Any:
    """The module class with its parameters fetched when it is called.

    Args:
      module: a `flax.linen.Module` class.
      path: where its instance stands in the model, such as `section3/blocks`.
      fetch: None: `module` as it is.
      kept: leaves of the module that it takes as this device keeps them, such as `dense/kernel`.
    """
    if fetch is None:
        return module

    def fetch_all(variables: Any) -> Any:
        flat = traverse_util.flatten_dict(variables["params"], sep="/")
        whole = {name: x if name in kept else fetch(f"{path}/{name}", x) for name, x in flat.items()}
        return {"params": traverse_util.unflatten_dict(whole, sep="/")}

    return nn.map_variables(module, "params", trans_in_fn=fetch_all, init=False)
