"""Leaves with two unit axes, kept as [W, U_in / S, U_out, R].

The first unit axis is cut into S contiguous strips, W per device. The draw is stratified
(`partition.Group.strips`): a worker holds at most m units of each strip, so it pulls exactly m x n_out
entries of each; 1 / S^2 of the matrix where S^2 divides U_in.
"""

import math

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
    for_each_device,
    indices_of,
    invert,
    pad,
    restore,
)
from ist_jax.exchange.wire import Inputs, inputs_of_all, multiply_slice
from ist_jax.masking import mean_of_parts
from ist_jax.partition import Draw, Group

Shard = Shaped[Array, "W _ U_out R"]
Parts = Shaped[Array, "D W strips m n_out R"]  # first axis: destination, then source


def split(x: Shaped[A, "*shape"], leaf: Leaf, num_devices: int) -> Shaped[A, "D W _ U_out R"]:
    """What each device keeps of a whole leaf (NumPy or JAX), stacked: [D, W, U_in / S, U_out, R]."""
    x, group = canonical(x, leaf), leaf.groups[0]
    x = pad(x, (0, group.strips * group.strip_size - len(x)))
    return x.reshape(num_devices, -1, group.strip_size, *x.shape[1:])


def join(x: Shaped[A, "D W _ U_out R"], leaf: Leaf) -> Shaped[A, "..."]:
    """The inverse of `split`."""
    return restore(x.reshape(-1, *x.shape[3:])[: leaf.groups[0].size], leaf)


def stored_piece(leaf: Leaf, device: int, num_devices: int) -> tuple[int, int, int]:
    """(axis, start, stop) of the stored form that a device keeps."""
    group = leaf.groups[0]
    step = group.strip_size * group.strips // num_devices
    return 0, min(device * step, group.size), min((device + 1) * step, group.size)


def to_stored(
    leaf: Leaf, shard: Shaped[np.ndarray, "W _ U_out R"], length: int
) -> Shaped[np.ndarray, "U U_out R"]:
    """That part, so many units of the first axis, from what the device keeps."""
    return shard.reshape(-1, *shard.shape[2:])[:length]


def cut_out(layout: Layout, leaf: Leaf, shard: Shard, draw: Draw) -> Parts:
    """What a gather sends: [D, W, strips here, m, n_out, R]."""
    inputs, outputs = _entries(layout, leaf.groups[0], draw), indices_of(leaf.groups[1], draw)

    def cut(inputs: Int[Array, "strips m"], outputs: Int[Array, " n"]) -> Shaped[Array, "strips m n R"]:
        rows = _take(shard, inputs, 0)  # by rows first: one index per row, not per number
        return rows.at[:, :, outputs].get(mode="fill", fill_value=0)

    shape = layout.num_devices, layout.workers_per_device
    own = (x.reshape(*shape, *x.shape[1:]) for x in (inputs, outputs))
    return for_each_device(layout, jax.vmap(cut), *own)


def assemble(layout: Layout, leaf: Leaf, got: Parts, draw: Draw) -> Shaped[Array, "W ..."]:
    """The leaf of this device's W subnets, [W, ...], from what has come."""
    got = got.swapaxes(0, 1).reshape(layout.workers_per_device, -1, *got.shape[4:])  # [W, S m, n_out, R]
    if not _is_dense(leaf.groups[0]):
        places = _places(layout, leaf.groups[0], draw)
        place = jax.vmap(lambda p: invert(p, leaf.groups[0].slots))(places)  # [W, n_in]
        got = _take(got, place, 0)
    return restore(got, leaf)


def take_apart(layout: Layout, leaf: Leaf, x: Shaped[Array, "W ..."], draw: Draw) -> Parts:
    """What a merge sends, of the form that a gather receives."""
    devices, workers, group = layout.num_devices, layout.workers_per_device, leaf.groups[0]
    block = canonical(x, leaf)  # [W, n_in, n_out, R]
    if not _is_dense(group):
        block = _take(block, _places(layout, group, draw), 0)
    return block.reshape(workers, devices, workers, group.strip_slots, *block.shape[2:]).swapaxes(0, 1)


def put_back(layout: Layout, leaf: Leaf, old: Shard, got: Parts, draw: Draw, flags: Flags) -> Shard:
    """This device's shard after a round, from what has come; `flags`, bool [S]: whose."""
    first, second = leaf.groups
    inputs = _entries(layout, first, draw)  # [S, W, m]
    outputs = jnp.where(flags[:, None], indices_of(second, draw), second.size)
    new = got.reshape(-1, *got.shape[2:])  # [S, W, m, n_out, R]
    invert_strips = jax.vmap(lambda p: invert(p, first.strip_size))

    def widen(new: Array, outputs: Int[Array, " n"]) -> tuple[Array, Array]:
        place = invert(outputs, second.size)  # which slot each entry of a row is from
        return jnp.take(new, place, 2, mode="clip"), (place < second.slots)[:, None]

    def read(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        new, inputs, outputs = part
        place = invert_strips(inputs)
        values, wide = widen(_take(new, place, 0), outputs)
        return values, (place < inputs.shape[1])[..., None, None] & wide

    if not first.disjoint:
        return mean_of_parts(old, (new, inputs, outputs), read)

    def fill(new: Array, inputs: Int[Array, "W m"], outputs: Int[Array, " n"]) -> Array:
        values, wide = widen(new, outputs)
        return jnp.where(wide, values, _take(old, inputs, 0))

    rows = jax.vmap(fill)(new, inputs, outputs).swapaxes(0, 1)
    rows = rows.reshape(len(old), -1, *old.shape[2:])  # [W, S m, U_out, R], those that somebody holds
    place = invert_strips(inputs.swapaxes(0, 1).reshape(len(old), -1))
    return jnp.where((place < rows.shape[1])[..., None, None], _take(rows, place, 0), old)


def holders(layout: Layout, leaf: Leaf, draw: Draw, flags: Flags) -> Int[Array, "W _ U_out 1"]:
    """How many of the workers flagged hold each pair of units."""
    first, second = leaf.groups
    size = first.strips * first.strip_size

    def held(group: Group, length: int) -> Int[Array, "S U"]:
        indices = indices_of(group, draw)
        of_size = jnp.zeros((len(flags), length), jnp.int32)
        workers = jnp.arange(len(flags))[:, None]
        return of_size.at[workers, jnp.where(indices < group.size, indices, length)].set(1, mode="drop")

    inputs = held(first, size).reshape(len(flags), first.strips, -1) * flags[:, None, None]
    inputs = _own(layout, inputs, 1)  # [S, W, U_in / S]
    return jnp.einsum("swi,so->wio", inputs, held(second, second.size))[..., None]


def largest(layout: Layout, leaf: Leaf, shard: Shard) -> Shaped[Array, " U"]:
    """The largest number of each unit of the first group in what this device keeps; 0 where it keeps none."""
    group, own = leaf.groups[0], shard.max((2, 3)).reshape(-1)
    everywhere = jnp.zeros(group.strips * group.strip_size, own.dtype)
    start = lax.axis_index(AXIS) * len(own)
    return lax.dynamic_update_slice_in_dim(everywhere, own, start, 0)[: group.size]


def spread(layout: Layout, leaf: Leaf, per_unit: Shaped[Array, " U"]) -> Shaped[Array, "W _ 1 1"]:
    """Numbers by unit of the first group, in a form that is broadcast to this device's shard."""
    group = leaf.groups[0]
    strips = pad(per_unit, (0, group.strips * group.strip_size - len(per_unit))).reshape(group.strips, -1)
    return _own(layout, strips, 0)[..., None, None]


def places(layout: Layout, leaf: Leaf) -> UInt32[Array, "W _ U_out R"]:
    """Where each number of this device's shard stands in the leaf, units first."""
    shape = (layout.workers_per_device, leaf.groups[0].strip_size, leaf.groups[1].size, leaf.row_size)
    size = math.prod(shape)
    first = lax.axis_index(AXIS).astype(jnp.uint32) * size
    return first + jnp.arange(size, dtype=jnp.uint32).reshape(shape)


def scales_of_parts(
    layout: Layout, leaf: Leaf, per_slot: Float32[Array, "S n"], draw: Draw
) -> Float32[Array, "D W strips m 1 1"]:
    """Numbers by worker and slot of the first group, in a form that is broadcast to what a merge brings."""
    slots_of = _own(layout, _strip_slots(leaf.groups[0], draw), 1)  # [S, strips here, m]
    taken = _take(per_slot, slots_of, 0)
    return taken.reshape(layout.num_devices, -1, *taken.shape[1:], 1, 1)


def assigned(leaf: Leaf, num_workers: int) -> int | float:
    """Numbers of the leaf that all workers' subnets hold together, assigned slots only; a mean over draws."""
    first, second = leaf.groups
    if first.fair and first.name != second.name:  # independent draws
        return sum(first.counts) * sum(second.counts) / num_workers * leaf.row_size
    return sum(a * b for a, b in zip(first.counts, second.counts, strict=True)) * leaf.row_size


def whole(leaf: Leaf, shard: Shard) -> Shaped[Array, "..."]:
    """The whole leaf from what all devices keep."""
    return join(lax.all_gather(shard, AXIS), leaf)


def product(layout: Layout, leaf: Leaf, x: Inputs, shard: Shard) -> Float[Array, "B O"]:
    """x @ kernel, [B, O], of a leaf [I, O]: inputs and results travel, the kernel stays where it is."""
    return multiply_slice(layout, inputs_of_all(x), shard.reshape(-1, leaf.shape[1]))


def _is_dense(group: Group) -> bool:
    """Every worker holds exactly m units of each strip: slots are in the order of the exchange."""
    return group.even and group.strips * group.strip_slots == group.slots


def _strip_slots(group: Group, draw: Draw) -> Int[Array, "S strips m"]:
    """int32 [S, strips, m]: which of a worker's slots lie in which strip, n where there is none."""
    indices = indices_of(group, draw)  # [S, n], ascending, U where empty
    starts, search = jnp.arange(group.strips) * group.strip_size, jax.vmap(jnp.searchsorted, (0, None))
    last = search(indices, jnp.minimum(starts + group.strip_size, group.size))  # [S, strips]
    place = search(indices, starts)[..., None] + jnp.arange(group.strip_slots)
    return jnp.where(place < last[..., None], place, indices.shape[1])


def _places(layout: Layout, group: Group, draw: Draw) -> Int[Array, "W k"]:
    """[W, S m]: which slot of each of this device's workers stands where in what is exchanged."""
    return _own(layout, _strip_slots(group, draw), 0).reshape(layout.workers_per_device, -1)


def _entries(layout: Layout, group: Group, draw: Draw) -> Int[Array, "S W m"]:
    """Where in each strip of this device the workers' units are; the strip's size where there is none."""
    indices, slots_of = indices_of(group, draw), _strip_slots(group, draw)
    units = _take(indices, slots_of, group.size) - jnp.arange(group.strips)[:, None] * group.strip_size
    return _own(layout, jnp.where(slots_of < indices.shape[1], units, group.strip_size), 1)


def _own(layout: Layout, per_worker: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """This device's W of S entries along an axis."""
    workers = layout.workers_per_device
    return lax.dynamic_slice_in_dim(per_worker, lax.axis_index(AXIS) * workers, workers, axis)


def _take(x: Shaped[Array, "W ..."], at: Int[Array, "W ..."], fill: int) -> Shaped[Array, "W ..."]:
    """The entries of each worker, `fill` where there is none."""
    return jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=fill))(x, at)
