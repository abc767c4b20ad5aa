"""The kinds of leaf, by how many of a leaf's axes run over units and by which draw; and the whole model leaf
by leaf."""

import types
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import traverse_util
from jax import lax
from jaxtyping import Array, Float, PyTree, Shaped

from ist_jax.exchange import layers, pairs, rows, shared
from ist_jax.exchange.layout import AXIS, A, Layout, Leaf, Shapes, Shards
from ist_jax.masking import Params

_INIT_PARTS = 2
Stacked = Mapping[str, Shaped[Array | np.ndarray, "D ..."]]
# Files of functions of the same names, of one leaf each; shared leaves alone are exchanged all together.
KINDS = (shared, rows, pairs)


def kind_of(leaf: Leaf) -> types.ModuleType:
    """How a leaf is kept and exchanged."""
    return KINDS[len(leaf.unit_axes)] if leaf.layer_axis is None else layers


def unit_leaves(layout: Layout) -> list[tuple[str, Leaf, types.ModuleType]]:
    """(path, leaf, its kind) of the leaves that a worker has a part of, rows before pairs."""
    found = [(path, leaf, kind_of(leaf)) for path, leaf in layout.leaves.items() if leaf.unit_axes]
    return sorted(found, key=lambda item: len(item[1].unit_axes))


# --- the whole model ----------------------------------------------------------------------------------------


def shard_shapes(layout: Layout) -> Shapes:
    """What a device keeps of every leaf, padding included."""

    def first(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {path: split_leaf(layout, path, x)[0] for path, x in flat.items()}

    whole = {path: jax.ShapeDtypeStruct(leaf.shape, layout.dtype) for path, leaf in layout.leaves.items()}
    return jax.eval_shape(first, whole)


def subnet_shapes(layout: Layout) -> Shapes:
    """A subnet's arrays by path: every worker's have room for the n slots of the largest."""
    return {path: jax.ShapeDtypeStruct(x.subnet_shape, layout.dtype) for path, x in layout.leaves.items()}


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


def iter_leaves(layout: Layout, shards: Stacked) -> Iterator[tuple[str, np.ndarray | np.generic]]:
    """(path, whole leaf) on the host, one leaf at a time, in the order of the paths."""
    for path, leaf in layout.leaves.items():
        yield path, kind_of(leaf).join(np.asarray(shards[path]), leaf)


def recut(before: Layout, after: Layout, shards: Shards) -> Shards:
    """This device's shards in another layout of the same model on the same devices, with collectives.

    One leaf after another is whole for a moment, if its cut is another one.
    """
    found = {}
    for path, leaf in after.leaves.items():
        old, found[path] = before.leaves[path], shards[path]
        if old.unit_axes != leaf.unit_axes:
            parts = split_leaf(after, path, kind_of(old).whole(old, shards[path]))
            found[path] = lax.dynamic_index_in_dim(parts, lax.axis_index(AXIS), keepdims=False)
    return found


def to_params(layout: Layout, shards: Stacked) -> PyTree[Float[np.ndarray | np.generic, "..."]]:
    """The global parameters as a nested dict of host arrays, from shards stacked on axis 0."""
    return traverse_util.unflatten_dict(dict(iter_leaves(layout, shards)), sep="/")
