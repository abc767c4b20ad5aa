"""The kinds of leaf, by how many of a leaf's axes run over units; and the whole model leaf by leaf."""

from collections.abc import Iterator, Mapping
from typing import Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from ist_jax.exchange import pairs, rows, shared
from ist_jax.exchange.layout import A, Draw, Layout, Leaf, Shapes, Shards
from ist_jax.masking import Params
from ist_jax.models.sparse import Sparse

_INIT_PARTS = 2
T = TypeVar("T")


@runtime_checkable  # for the checks under pytest
class Kind(Protocol):
    """What a kind of leaf does; its file says what the arrays look like."""

    def split(self, x: Shaped[A, "..."], leaf: Leaf, num_devices: int) -> Shaped[A, "D ..."]: ...
    def join(self, x: Shaped[A, "D ..."], leaf: Leaf) -> Shaped[A | np.generic, "..."]: ...
    def stored_piece(self, leaf: Leaf, device: int, num_devices: int) -> tuple[int, int, int]: ...
    def to_stored(
        self, shard: Shaped[np.ndarray, "..."], leaf: Leaf, device: int, num_devices: int
    ) -> Shaped[np.ndarray | np.generic, "..."]: ...
    def cut_out(self, layout: Layout, shards: Shards, draw: Draw) -> Shards: ...
    def assemble(self, layout: Layout, parts: Shards, draw: Draw) -> Shards: ...
    def take_apart(self, layout: Layout, subnets: Shards, draw: Draw) -> Shards: ...
    def put_back(
        self, layout: Layout, old: Shards, parts: Shards, draw: Draw, flags: Bool[Array, " S"]
    ) -> Shards: ...
    def assigned(self, leaf: Leaf, num_workers: int) -> int | float: ...
    def whole(self, layout: Layout, leaf: Leaf, shard: Float[Array, "..."]) -> Float[Array, "..."]: ...
    def product(
        self, layout: Layout, leaf: Leaf, x: Float[Array, "B I"] | Sparse, shard: Float[Array, "..."]
    ) -> Float[Array, "B O"]: ...


KINDS: tuple[Kind, ...] = (shared, rows, pairs)


def kind_of(leaf: Leaf) -> Kind:
    """How a leaf is kept and exchanged."""
    return KINDS[len(leaf.unit_axes)]


def only(kind: Kind, layout: Layout, leaves: Mapping[str, T]) -> dict[str, T]:
    """Those of the leaves that are of a kind."""
    return {path: x for path, x in leaves.items() if kind_of(layout.leaves[path]) is kind}


# --- the whole model ----------------------------------------------------------------------------------------


def shard_shapes(layout: Layout) -> Shapes:
    """What a device keeps of every leaf, padding included."""
    return {
        path: jax.eval_shape(
            lambda x, leaf=leaf: kind_of(leaf).split(x, leaf, layout.num_devices)[0],
            jax.ShapeDtypeStruct(leaf.shape, layout.dtype),
        )
        for path, leaf in layout.leaves.items()
    }


def subnet_shapes(layout: Layout) -> Shapes:
    """A subnet's arrays by path: every worker's have room for the n slots of the largest."""
    return {
        path: jax.ShapeDtypeStruct(leaf.subnet_shape, layout.dtype) for path, leaf in layout.leaves.items()
    }


def init_parts(layout: Layout) -> list[list[str]]:
    """Leaves to initialise together, so that the whole model is never made at once.

    Every part holds at most half of the parameters, or one leaf.
    """
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in layout.leaves.items()}
    limit = sum(sizes.values()) / _INIT_PARTS
    parts: list[list[str]] = []
    for path in sorted(sizes, key=lambda path: -sizes[path]):
        fits = [part for part in parts if sum(sizes[p] for p in part) + sizes[path] <= limit]
        if fits:
            fits[0].append(path)
        else:
            parts.append([path])
    return parts


def split_leaf(layout: Layout, path: str, x: Shaped[A, "..."]) -> Shaped[A, "D ..."]:
    """What each device keeps of a whole leaf, stacked: [D, ...]."""
    leaf = layout.leaves[path]
    return kind_of(leaf).split(x, leaf, layout.num_devices)


def from_params(layout: Layout, params: Params) -> dict[str, Float[np.ndarray, "D ..."]]:
    """Shards of given parameters (host arrays) on all devices, stacked: [D, ...] by path.

    Raises:
      ValueError: `params` are not those of the layout.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    shapes = {path: tuple(x.shape) for path, x in flat.items()}
    if shapes != {path: leaf.shape for path, leaf in layout.leaves.items()}:
        raise ValueError("the parameters' names or shapes are not those of the model")
    return {path: split_leaf(layout, path, np.asarray(flat[path])) for path in layout.leaves}


def iter_leaves(
    layout: Layout, shards: Mapping[str, Float[Array | np.ndarray, "D ..."]]
) -> Iterator[tuple[str, np.ndarray | np.generic]]:
    """(path, whole leaf) on the host, one leaf at a time, in the order of the paths."""
    for path, leaf in layout.leaves.items():
        yield path, kind_of(leaf).join(np.asarray(shards[path]), leaf)


def to_params(
    layout: Layout, shards: Mapping[str, Float[Array | np.ndarray, "D ..."]]
) -> PyTree[Float[np.ndarray | np.generic, "..."]]:
    """The global parameters as a nested dict of host arrays, from shards stacked on axis 0."""
    return traverse_util.unflatten_dict(dict(iter_leaves(layout, shards)), sep="/")
