"""Leaves with a draw for every layer (`partition.Each`): each layer is exchanged as rows or as pairs.

What a device keeps, and what is sent for a worker, is that of the L layers stacked. A group that is dealt
once, on the other axis of such a leaf, has the same draw in all layers.
"""

import math
import types
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Shaped, UInt32

from ist_jax.exchange import pairs, rows
from ist_jax.exchange.layout import AXIS, A, Flags, Layout, Leaf
from ist_jax.exchange.wire import Inputs
from ist_jax.partition import Draw

Shard = Shaped[Array, "L ..."]  # a layer's behind it
Parts = Shaped[Array, "D W L ..."]  # the rest of a layer's behind it; first axis: destination, then source


def split(x: Shaped[A, "*shape"], leaf: Leaf, num_devices: int) -> Shaped[A, "D L ..."]:
    """What each device keeps of a whole leaf (NumPy or JAX), stacked."""
    return _each(lambda x: _kind(leaf).split(x, leaf.layer, num_devices), x, _axis(leaf), 1)


def join(x: Shaped[A, "D L ..."], leaf: Leaf) -> Shaped[A, "..."]:
    """The inverse of `split`, for any number of units."""
    return _each(lambda x: _kind(leaf).join(x, leaf.layer), x, 1, _axis(leaf))


def stored_piece(leaf: Leaf, device: int, num_devices: int) -> tuple[int, int, int]:
    """(axis, start, stop) of the stored form, [L, that of a layer], that a device keeps."""
    axis, start, stop = _kind(leaf).stored_piece(leaf.layer, device, num_devices)
    return 1 + axis, start, stop


def to_stored(leaf: Leaf, shard: Shaped[np.ndarray, "L ..."], length: int) -> Shaped[np.ndarray, "L ..."]:
    """That part, so many entries of its axis, from what the device keeps."""
    return np.stack([_kind(leaf).to_stored(leaf.layer, layer, length) for layer in shard])


def cut_out(layout: Layout, leaf: Leaf, shard: Shard, draw: Draw) -> Parts:
    """What a gather sends."""
    cut = partial(_kind(leaf).cut_out, layout, leaf.layer)
    return jax.vmap(cut, (0, _draw_axes(leaf)), 2)(shard, _own(leaf, draw))


def assemble(layout: Layout, leaf: Leaf, got: Parts, draw: Draw) -> Shaped[Array, "W ..."]:
    """The leaf of this device's W subnets, [W, ...], from what has come."""
    put = partial(_kind(leaf).assemble, layout, leaf.layer)
    return jax.vmap(put, (2, _draw_axes(leaf)), 1 + _axis(leaf))(got, _own(leaf, draw))


def take_apart(layout: Layout, leaf: Leaf, x: Shaped[Array, "W ..."], draw: Draw) -> Parts:
    """What a merge sends, of the form that a gather receives."""
    take = partial(_kind(leaf).take_apart, layout, leaf.layer)
    return jax.vmap(take, (1 + _axis(leaf), _draw_axes(leaf)), 2)(x, _own(leaf, draw))


def put_back(layout: Layout, leaf: Leaf, old: Shard, got: Parts, draw: Draw, flags: Flags) -> Shard:
    """This device's shard after a round, from what has come; `flags`, bool [S]: whose."""
    put = partial(_kind(leaf).put_back, layout, leaf.layer)
    return jax.vmap(put, (0, 2, _draw_axes(leaf), None))(old, got, _own(leaf, draw), flags)


def holders(layout: Layout, leaf: Leaf, draw: Draw, flags: Flags) -> Int[Array, "L ..."]:
    """How many of the workers flagged hold each number of this device's shard, or each pair of units."""
    count = partial(_kind(leaf).holders, layout, leaf.layer)
    return jax.vmap(count, (_draw_axes(leaf), None))(_own(leaf, draw), flags)


def largest(layout: Layout, leaf: Leaf, shard: Shard) -> Shaped[Array, "L U"]:
    """The largest number of each unit in what this device keeps."""
    return jax.vmap(partial(_kind(leaf).largest, layout, leaf.layer))(shard)


def spread(layout: Layout, leaf: Leaf, per_unit: Shaped[Array, "L U"]) -> Shaped[Array, "L ..."]:
    """Numbers by unit, in a form that is broadcast to this device's shard."""
    return jax.vmap(partial(_kind(leaf).spread, layout, leaf.layer))(per_unit)


def places(layout: Layout, leaf: Leaf) -> UInt32[Array, "L ..."]:
    """Where each number of this device's shard stands in the leaf, layers first, then units."""
    own = _kind(leaf).places(layout, leaf.layer)
    starts = jnp.arange(leaf.shape[_axis(leaf)], dtype=jnp.uint32) * math.prod(leaf.layer.shape)
    return starts.reshape(-1, *[1] * own.ndim) + own


def scales_of_parts(
    layout: Layout, leaf: Leaf, per_slot: Float32[Array, "S L n"], draw: Draw
) -> Float32[Array, "D W L ..."]:
    """Numbers by worker and slot, in a form that is broadcast to what a merge brings."""
    spread_out = partial(_kind(leaf).scales_of_parts, layout, leaf.layer)
    return jax.vmap(spread_out, (1, _draw_axes(leaf)), 2)(per_slot, _own(leaf, draw))


def assigned(leaf: Leaf, num_workers: int) -> int | float:
    """Numbers of the leaf that all workers' subnets hold together, assigned slots only; a mean over draws."""
    return _kind(leaf).assigned(leaf, num_workers)  # a row of the whole leaf runs through the layers


def whole(leaf: Leaf, shard: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The whole leaf from what all devices keep; from a layer's part of it, the layer."""
    if shard.ndim == 2 * len(leaf.unit_axes):  # of rows and of pairs; a scan over the layers runs around
        return _kind(leaf).whole(leaf.layer, shard)
    return join(lax.all_gather(shard, AXIS), leaf)


def product(layout: Layout, leaf: Leaf, x: Inputs, shard: Float[Array, "..."]) -> Float[Array, "B O"]:
    """x @ kernel, [B, O], of a layer [I, O]: inputs and results travel, the kernel stays where it is."""
    return _kind(leaf).product(layout, leaf.layer, x, shard)


def _kind(leaf: Leaf) -> types.ModuleType:
    """How a layer is kept and exchanged."""
    return (rows, pairs)[len(leaf.unit_axes) - 1]


def _axis(leaf: Leaf) -> int:
    """Of the layers in the leaf."""
    assert leaf.layer_axis is not None
    return leaf.layer_axis


def _own(leaf: Leaf, draw: Draw) -> Draw:
    return {group.name: draw[group.name] for group in leaf.groups}


def _draw_axes(leaf: Leaf) -> dict[str, int | None]:
    """Where the layers are in the draw of each of the leaf's groups."""
    return {group.name: 1 if group.layers else None for group in leaf.groups}


def _each(fn: Callable[[A], A], x: A, source: int, destination: int) -> A:
    """`fn` of the layers of x, of NumPy or JAX."""
    if isinstance(x, np.ndarray):
        return np.stack([fn(layer) for layer in np.moveaxis(x, source, 0)], destination)
    return jax.vmap(fn, source, destination)(x)
