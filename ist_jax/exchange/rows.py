"""Leaves with one unit axis, kept as [U, ceil(p / D)], or as [ceil(p / D), U] where that axis is the last.

A unit's p numbers are a row, and a device keeps a slice of *every* row: whatever units a worker draws, it
pulls exactly n slices from each device. What travels has its axes in the order of the leaf, so that a subnet
is put together without transposing it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Shaped, UInt32

from ist_jax.exchange.layout import (
    AXIS,
    A,
    Flags,
    Layout,
    Leaf,
    canonical,
    cut,
    for_each_device,
    indices_of,
    invert,
    restore,
    viewed,
)
from ist_jax.exchange.wire import Inputs, inputs_of_all, multiply_slice
from ist_jax.masking import mean_of_parts
from ist_jax.partition import Draw

Shard = Shaped[Array, "_ _"]  # U and q, as above
Parts = Shaped[Array, "D W _ _"]  # n and q; first axis: destination, then source


def split(x: Shaped[A, "..."], leaf: Leaf, num_devices: int) -> Shaped[A, "D ..."]:
    """What each device keeps of a whole leaf (NumPy or JAX), stacked: [D, U, q] or [D, q, U].

    Leading axes of x, such as of workers, follow the first one.
    """
    if leaf.unit_last:
        x = viewed(x, leaf)
        x = x.reshape(*x.shape[: x.ndim - len(leaf.view)], -1, x.shape[-1])
        x = cut(x, num_devices, -2, leaf.slices)
    else:
        x = cut(canonical(x, leaf), num_devices, -1, leaf.slices)
    return _move(x, x.ndim - _from_end(leaf), 0)


def join(x: Shaped[A, "D ..."], leaf: Leaf) -> Shaped[A, "..."]:
    """The inverse of `split`, for any number of units."""
    x = _move(x, 0, x.ndim - _from_end(leaf))
    if leaf.unit_last:
        x = x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., : leaf.row_size, :]
        return x.reshape(*x.shape[:-2], *leaf.shape_of(x.shape[-1:]))
    return restore(x.reshape(*x.shape[:-2], -1)[..., : leaf.row_size], leaf)


def stored_piece(leaf: Leaf, device: int, num_devices: int) -> tuple[int, int, int]:
    """(axis, start, stop) of the stored form, [U, p], that a device keeps."""
    size, step = leaf.row_size, leaf.slice_size(num_devices)
    return 1, min(device * step, size), min((device + 1) * step, size)


def to_stored(leaf: Leaf, shard: Shaped[np.ndarray, "_ _"], length: int) -> Shaped[np.ndarray, "U _"]:
    """That part, so many numbers of every row, from what the device keeps."""
    return (shard.T if leaf.unit_last else shard)[:, :length]


def cut_out(layout: Layout, leaf: Leaf, shard: Shard, draw: Draw) -> Parts:
    """What a gather sends, n units for each worker."""
    at = (slice(None),) * _axis(leaf)
    indices = indices_of(leaf.groups[0], draw).reshape(layout.num_devices, layout.workers_per_device, -1)
    take = jax.vmap(lambda units: shard.at[*at, units].get(mode="fill", fill_value=0))
    return for_each_device(layout, take, indices)


def assemble(layout: Layout, leaf: Leaf, got: Parts, draw: Draw) -> Shaped[Array, "W ..."]:
    """The leaf of this device's W subnets, [W, ...], from what has come."""
    return join(got, leaf)


def take_apart(layout: Layout, leaf: Leaf, x: Shaped[Array, "W ..."], draw: Draw) -> Parts:
    """What a merge sends, of the form that a gather receives."""
    return split(x, leaf, layout.num_devices)


def put_back(layout: Layout, leaf: Leaf, old: Shard, got: Parts, draw: Draw, flags: Flags) -> Shard:
    """This device's shard after a round, from what has come; `flags`, bool [S]: whose."""
    (group,), axis = leaf.groups, _axis(leaf)
    indices = jnp.where(flags[:, None], indices_of(group, draw), group.size)
    new = got.reshape(-1, *got.shape[2:])  # [S, n, q] or [S, q, n]
    if group.disjoint:
        place = invert(indices.reshape(-1), group.size)
        worker, slot = jnp.divmod(place, group.slots)
        take = jax.vmap(lambda x: x.at[worker, slot].get(mode="clip"), 2 - axis, 1 - axis)
        return jnp.where(jnp.expand_dims(place < indices.size, 1 - axis), take(new), old)

    def read(part: tuple[Array, Array]) -> tuple[Array, Array]:
        own, place = part[0], invert(part[1], group.size)
        return jnp.take(own, place, axis, mode="clip"), jnp.expand_dims(place < group.slots, 1 - axis)

    return mean_of_parts(old, (new, indices), read)


def holders(layout: Layout, leaf: Leaf, draw: Draw, flags: Flags) -> Int[Array, "_ _"]:
    """How many of the workers flagged hold each number of this device's shard; nobody holds the padding."""
    (group,) = leaf.groups
    indices = indices_of(group, draw)
    counts = jnp.broadcast_to(flags[:, None].astype(jnp.int32), indices.shape)
    held = jnp.zeros(group.size, jnp.int32).at[indices].add(counts, mode="drop")
    step = leaf.slice_size(layout.num_devices)
    real = lax.axis_index(AXIS) * step + jnp.arange(step) < leaf.row_size
    axis = _axis(leaf)
    return jnp.where(jnp.expand_dims(real, axis), jnp.expand_dims(held, 1 - axis), 0)


def largest(layout: Layout, leaf: Leaf, shard: Shard) -> Shaped[Array, " U"]:
    """The largest number of each unit in what this device keeps."""
    return shard.max(1 - _axis(leaf))


def spread(layout: Layout, leaf: Leaf, per_unit: Shaped[Array, " U"]) -> Shard:
    """Numbers by unit, in a form that is broadcast to this device's shard."""
    return jnp.expand_dims(per_unit, 1 - _axis(leaf))


def places(layout: Layout, leaf: Leaf) -> UInt32[Array, "_ _"]:
    """Where each number of this device's shard stands in the leaf, units first."""
    step = leaf.slice_size(layout.num_devices)
    inside = lax.axis_index(AXIS).astype(jnp.uint32) * step + jnp.arange(step, dtype=jnp.uint32)
    own = jnp.arange(leaf.groups[0].size, dtype=jnp.uint32)[:, None] * leaf.row_size + inside
    return own.T if leaf.unit_last else own


def scales_of_parts(
    layout: Layout, leaf: Leaf, per_slot: Float32[Array, "S n"], draw: Draw
) -> Float32[Array, "D W _ _"]:
    """Numbers by worker and slot, in a form that is broadcast to what a merge brings."""
    per_slot = per_slot.reshape(layout.num_devices, -1, per_slot.shape[1])
    return jnp.expand_dims(per_slot, 3 - _axis(leaf))


def assigned(leaf: Leaf, num_workers: int) -> int | float:
    """Numbers of the leaf that all workers' subnets hold together, assigned slots only."""
    return sum(leaf.groups[0].counts) * leaf.row_size


def whole(leaf: Leaf, shard: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The whole leaf from what all devices keep; from a row's slice, one unit without its unit axis."""
    got = lax.all_gather(shard, AXIS)
    if shard.ndim == 1:  # a scan over the units runs around
        return got.reshape(-1)[: leaf.row_size].reshape(leaf.shape[1:])
    return join(got, leaf)


def product(layout: Layout, leaf: Leaf, x: Inputs, shard: Shard) -> Float[Array, "B O"]:
    """x @ kernel, [B, O], of a leaf [I, O]: inputs and results travel, the kernel stays where it is."""
    x = inputs_of_all(x)
    if leaf.unit_last:
        return multiply_slice(layout, x, shard)
    y = (x @ shard).reshape(layout.num_devices, -1, shard.shape[1])  # a slice of the outputs
    y = lax.all_to_all(y, AXIS, 0, 0)  # [D, B, slice]
    return y.swapaxes(0, 1).reshape(y.shape[1], -1)[:, : leaf.row_size]


def _axis(leaf: Leaf) -> int:
    """Along which axis of what a device keeps the units are."""
    return int(leaf.unit_last)


def _from_end(leaf: Leaf) -> int:
    """Where the devices' axis is in front of the slices that they keep, counted from the end."""
    return 2 + _axis(leaf)


def _move(x: Shaped[A, "..."], source: int, destination: int) -> Shaped[A, "..."]:
    """x, of NumPy or JAX, with an axis at another place."""
    order = [axis for axis in range(x.ndim) if axis != source]
    order.insert(destination, source)
    return x.transpose(order)
