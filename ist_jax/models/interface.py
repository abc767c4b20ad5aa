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
from ist_jax.partition import Group

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


def streamed(
    module: type[M],
    path: str,
    fetch: Fetch | None,
    kept: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> type[M]:
    """The module class with its parameters fetched when it is called.

    Args:
      module: a `flax.linen.Module` class.
      path: where its instance stands in the model, such as `section3/blocks`.
      fetch: None: `module` as it is.
      kept: leaves of the module that it takes as this device keeps them, such as `dense/kernel`.
      only: the leaves that are fetched; None: all that are not `kept`.
    """
    if fetch is None:
        return module

    def fetch_all(variables: PyTree) -> PyTree:
        flat = traverse_util.flatten_dict(variables["params"], sep="/")
        chosen = (flat.keys() if only is None else set(only)) - set(kept)
        whole = {name: fetch(f"{path}/{name}", x) if name in chosen else x for name, x in flat.items()}
        return {"params": traverse_util.unflatten_dict(whole, sep="/")}

    return nn.map_variables(module, "params", trans_in_fn=fetch_all, init=False)


def check_none_empty(groups: Mapping[str, Group], unit: str) -> None:
    """Raises ValueError where a worker would have a layer without units.

    Args:
      groups: by name.
      unit: what they are of, for people.
    """
    for group in groups.values():
        if min(group.counts) < 1:
            raise ValueError(
                f"num_workers={group.num_workers} leaves a worker without a {unit} of the {group.size} "
                f"of {group.name}; lower config.num_workers, even out config.partition.shares, or set "
                "config.partition.min_units to at least 1"
            )


def check_image(shape: tuple[int, ...], model: str) -> None:
    """Raises ValueError for examples that are no images [H, W, C]; model: for whom, such as 'a ResNet'."""
    if len(shape) != 3:
        found = f"an example of shape {','.join(map(str, shape))}" if shape else "a sparse example"
        raise ValueError(f"{found} is no image for {model}")
