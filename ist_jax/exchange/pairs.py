"""Leaves with two unit axes, kept as [W, U_in / S, U_out, R].

The first unit axis is cut into S contiguous strips, W per device. The draw is stratified
(`partition.Group.strips`): a worker holds at most m units of each strip, so it pulls exactly m x n_out
entries of each; 1 / S^2 of the matrix where S^2 divides U_in.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from ist_jax.exchange.layout import AXIS, A, Flags, Layout, Leaf, canonical, indices_of, pad, restore
from ist_jax.exchange.scatter import scatter
from ist_jax.exchange.wire import Inputs, inputs_of_all, multiply_slice
from ist_jax.partition import Draw, Group

Shard = Float[Array, "W _ U_out R"]
Parts = Float[Array, "D W strips m n_out R"]  # first axis: destination, then source
Where = tuple[Int[Array, "S W 1 1"], Int[Array, "S W m 1"], Int[Array, "S 1 1 n"]]


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


def to_stored(shard: Shaped[np.ndarray, "W _ U_out R"], length: int) -> Shaped[np.ndarray, "U U_out R"]:
    """That part, so many units of the first axis, from what the device keeps."""
    return shard.reshape(-1, *shard.shape[2:])[:length]


def cut_out(layout: Layout, leaf: Leaf, shard: Shard, draw: Draw) -> Parts:
    """What a gather sends: [D, W, strips here, m, n_out, R]."""
    outputs = indices_of(leaf.groups[1], draw)
    send = shard.at[_entries(layout, leaf, draw, outputs)].get(mode="fill", fill_value=0)
    return send.reshape(layout.num_devices, layout.workers_per_device, *send.shape[1:])


def assemble(layout: Layout, leaf: Leaf, got: Parts, draw: Draw) -> Float[Array, "W ..."]:
    """The leaf of this device's W subnets, [W, ...], from what has come."""
    got = got.swapaxes(0, 1).reshape(layout.workers_per_device, -1, *got.shape[4:])  # [W, S m, n_out, R]
    if not _is_dense(leaf.groups[0]):
        place = _invert(_places(layout, leaf.groups[0], draw), leaf.groups[0].slots)  # [W, n_in]
        got = _take(got, place, 0)
    return restore(got, leaf)


def take_apart(layout: Layout, leaf: Leaf, x: Float[Array, "W ..."], draw: Draw) -> Parts:
    """What a merge sends, of the form that a gather receives."""
    devices, workers, group = layout.num_devices, layout.workers_per_device, leaf.groups[0]
    block = canonical(x, leaf)  # [W, n_in, n_out, R]
    if not _is_dense(group):
        block = _take(block, _places(layout, group, draw), 0)
    return block.reshape(workers, devices, workers, group.strip_slots, *block.shape[2:]).swapaxes(0, 1)


def put_back(layout: Layout, leaf: Leaf, old: Shard, got: Parts, draw: Draw, flags: Flags) -> Shard:
    """This device's shard after a round, from what has come; `flags`, bool [S]: whose."""
    outputs = jnp.where(flags[:, None], indices_of(leaf.groups[1], draw), leaf.groups[1].size)
    where = _entries(layout, leaf, draw, outputs)
    disjoint = any(group.disjoint for group in leaf.groups)
    return scatter(old, where, got.reshape(-1, *got.shape[2:]), disjoint=disjoint)


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


def assigned(leaf: Leaf, num_workers: int) -> int | float:
    """Numbers of the leaf that all workers' subnets hold together, assigned slots only; a mean over draws."""
    first, second = leaf.groups
    if first.fair and first.name != second.name:  # independent draws
        return sum(first.counts) * sum(second.counts) / num_workers * leaf.row_size
    return sum(a * b for a, b in zip(first.counts, second.counts, strict=True)) * leaf.row_size


def whole(leaf: Leaf, shard: Shard) -> Float[Array, "..."]:
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


def _entries(layout: Layout, leaf: Leaf, draw: Draw, outputs: Int[Array, "S n"]) -> Where:
    """Where in a shard, by strip, unit and `outputs` of the second axis, the workers' entries are."""
    group = leaf.groups[0]
    indices, slots_of = indices_of(group, draw), _strip_slots(group, draw)
    units = _take(indices, slots_of, group.size) - jnp.arange(group.strips)[:, None] * group.strip_size
    local = _own(layout, jnp.where(slots_of < indices.shape[1], units, group.strip_size), 1)  # [S, W, m]
    strip = jnp.broadcast_to(jnp.arange(local.shape[1])[:, None, None], (*local.shape[:2], 1, 1))
    return strip, local[..., None], outputs[:, None, None, :]


def _own(layout: Layout, per_worker: Int[Array, "..."], axis: int) -> Int[Array, "..."]:
    """This device's W of S entries along an axis."""
    workers = layout.workers_per_device
    return lax.dynamic_slice_in_dim(per_worker, lax.axis_index(AXIS) * workers, workers, axis)


def _take(x: Shaped[Array, "W ..."], at: Int[Array, "W ..."], fill: int) -> Shaped[Array, "W ..."]:
    """The entries of each worker, `fill` where there is none."""
    return jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=fill))(x, at)


def _invert(places: Int[Array, "W k"], slots: int) -> Int[Array, "W n"]:
    """[W, n]: where each slot stands in `places` [W, k]; k for slots that do not occur."""
    size = places.shape[1]
    empty = jnp.full((len(places), slots), size, jnp.int32)
    return jax.vmap(lambda e, p: e.at[p].set(jnp.arange(size, dtype=jnp.int32), mode="drop"))(empty, places)
