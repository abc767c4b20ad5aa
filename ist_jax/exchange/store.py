"""The sharded global model and its exchange with the subnets.

No device holds the global model: `layout` says what each keeps. The functions here are per device, with
named-axis collectives: they run the same under `pmap` and under `vmap`. They equal `masking` bit for
bit, on any number of devices. Shapes are static, so any draw, with overlap and uneven counts, runs in the
same program. Empty slots are gathered as zeros and scattered nowhere.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ist_jax.exchange.layout import AXIS, Layout, Shards, canonical, join, restore
from ist_jax.masking import Tally, ordered_mean
from ist_jax.partition import Assignment, Group

Assignments = Mapping[str, Assignment]


def fetch(layout: Layout, path: str, shard: jax.Array) -> jax.Array:
    """A whole leaf, or one unit of it, from the shards of all devices: what streaming uses.

    Args:
      layout: from `make_layout`.
      path: the leaf.
      shard: what this device keeps of it; of a 'rows' leaf also one row's slice, when a scan over
        the units runs around.

    Returns:
      The leaf, [shape], or one unit of it without its unit axis.
    """
    leaf = layout.leaves[path]
    if leaf.kind == "shared":
        return shard
    whole = lax.all_gather(shard, AXIS)
    if leaf.kind == "rows" and shard.ndim == 1:
        return whole.reshape(-1)[: leaf.row_size].reshape(leaf.rest)
    return join(whole, leaf)


# --- exchange -------------------------------------------------------------------------------------
#
# One all-to-all per direction: the parts of all leaves travel in one buffer. Per leaf, a function makes
# what is sent, [D, ...] by destination, and another takes what was received, [D, ...] by source.


def gather(layout: Layout, shards: Shards, assignment: Assignments) -> Shards:
    """The unit leaves of this device's W subnets: flat dict of [W, ...], groups' axes n slots long.

    Shared leaves are not copied: every worker of a device starts from the ones in `shards`.
    """
    units = [path for path, leaf in layout.leaves.items() if leaf.kind != "shared"]
    send = {path: _cut_out(layout, path, shards[path], assignment) for path in units}
    return {path: _assemble(layout, path, got, assignment) for path, got in _all_to_all(send).items()}


def shared(layout: Layout, shards: Shards) -> Shards:
    """The shared leaves."""
    return {p: shards[p] for p, leaf in layout.leaves.items() if leaf.kind == "shared"}


def merge(
    layout: Layout, shards: Shards, subnets: Shards, assignment: Assignments, healthy: jax.Array
) -> Shards:
    """This device's shards after the round, from the trained subnets of all workers.

    Args:
      layout: from `make_layout`.
      shards: before the round.
      subnets: flat dict of [W, ...], this device's workers.
      assignment: the one that the subnets were gathered by.
      healthy: bool [W], this device's workers; the others' subnets change nothing.

    Returns:
      Shards as `shards`.
    """
    devices, workers = layout.num_devices, layout.workers_per_device
    send = {
        path: _take_apart(layout, path, subnets[path], assignment)
        for path, leaf in layout.leaves.items()
        if leaf.kind != "shared"
    }
    old_shared, new_shared = shared(layout, shards), shared(layout, subnets)
    if old_shared:
        send[_SHARED] = _slices(_ravel(new_shared, workers), devices).swapaxes(0, 1)  # [D, W, q]
    send[_HEALTHY] = jnp.broadcast_to(healthy.astype(layout.dtype), (devices, workers))
    got = _all_to_all(send)
    flags = got.pop(_HEALTHY).reshape(-1) > 0  # [S]
    mean = _merge_shared(layout, old_shared, got.pop(_SHARED), flags) if old_shared else {}
    return mean | {
        path: _put_back(layout, path, shards[path], x, assignment, flags) for path, x in got.items()
    }


_SHARED, _HEALTHY = "shared leaves", "health flags"  # parts of the buffer that are no unit leaf


def _all_to_all(parts: Shards) -> Shards:
    """Exchanges arrays [D, ...], first axis: destination, then source."""
    if not parts or len(next(iter(parts.values()))) == 1:
        return parts
    devices = len(next(iter(parts.values())))
    flat = [x.reshape(devices, -1) for x in parts.values()]
    got = lax.all_to_all(jnp.concatenate(flat, axis=1), AXIS, 0, 0)
    pieces = jnp.split(got, np.cumsum([x.shape[1] for x in flat])[:-1], axis=1)
    return {path: y.reshape(x.shape) for (path, x), y in zip(parts.items(), pieces, strict=True)}


def _cut_out(layout: Layout, path: str, shard: jax.Array, assignment: Assignments) -> jax.Array:
    """What the gather sends: [D, W, n, q], or [D, W, strips here, m, n_out, R]."""
    leaf, devices, workers = layout.leaves[path], layout.num_devices, layout.workers_per_device
    indices = jnp.asarray(assignment[leaf.groups[-1].name].indices)  # [S, n]
    if leaf.kind == "rows":
        send = shard.at[indices].get(mode="fill", fill_value=0)
    else:
        _, local = _strip_tables(layout, leaf.groups[0], assignment)
        strip = jnp.arange(workers)[None, :, None, None]
        at = (strip, local[..., None], indices[:, None, None, :])
        send = shard.at[at].get(mode="fill", fill_value=0)
    return send.reshape(devices, workers, *send.shape[1:])


def _assemble(layout: Layout, path: str, got: jax.Array, assignment: Assignments) -> jax.Array:
    """This device's W subnets' leaf from what the gather received."""
    leaf, workers = layout.leaves[path], layout.workers_per_device
    if leaf.kind == "rows":
        rows = got.transpose(1, 2, 0, 3).reshape(workers, got.shape[2], -1)
        return restore(rows[..., : leaf.row_size], leaf)
    got = got.swapaxes(0, 1).reshape(workers, -1, *got.shape[4:])  # [W, S m, n_out, R]
    if not _is_dense(leaf.groups[0]):
        slots_of, _ = _strip_tables(layout, leaf.groups[0], assignment)
        place = _invert(_own(layout, slots_of).reshape(workers, -1), leaf.groups[0].slots)  # [W, n_in]
        got = jax.vmap(lambda g, p: g.at[p].get(mode="fill", fill_value=0))(got, place)
    return restore(got, leaf)


def _take_apart(layout: Layout, path: str, new: jax.Array, assignment: Assignments) -> jax.Array:
    """What the merge sends, of the form that the gather received."""
    leaf, devices, workers = layout.leaves[path], layout.num_devices, layout.workers_per_device
    block = canonical(new, leaf)  # [W, n, p] or [W, n_in, n_out, R]
    if leaf.kind == "rows":
        return _slices(block, devices).transpose(2, 0, 1, 3)
    if not _is_dense(leaf.groups[0]):
        slots_of, _ = _strip_tables(layout, leaf.groups[0], assignment)
        place = _own(layout, slots_of).reshape(workers, -1)  # [W, S m]
        block = jax.vmap(lambda b, p: b.at[p].get(mode="fill", fill_value=0))(block, place)
    strip_slots = leaf.groups[0].strip_slots
    return block.reshape(workers, devices, workers, strip_slots, *block.shape[2:]).swapaxes(0, 1)


def _put_back(
    layout: Layout, path: str, shard: jax.Array, got: jax.Array, assignment: Assignments, flags: jax.Array
) -> jax.Array:
    """This device's shard of a unit leaf from what the merge received; unhealthy workers dropped."""
    leaf, workers = layout.leaves[path], layout.workers_per_device
    got = got.reshape(layout.num_workers, *got.shape[2:])
    indices = jnp.asarray(assignment[leaf.groups[-1].name].indices)
    indices = jnp.where(flags[:, None], indices, leaf.groups[-1].size)
    where: tuple[jax.Array, ...] = (indices,)
    if leaf.kind == "pairs":
        _, local = _strip_tables(layout, leaf.groups[0], assignment)
        strip = jnp.broadcast_to(jnp.arange(workers)[None, :, None, None], (len(local), workers, 1, 1))
        where = (strip, local[..., None], indices[:, None, None, :])
    return _scatter(shard, where, got, disjoint=all(group.disjoint for group in leaf.groups))


def _merge_shared(layout: Layout, old: Shards, got: jax.Array, flags: jax.Array) -> Shards:
    """The mean of the shared leaves, a slice per device: the bytes of a ring all-reduce."""
    flat = _slices(_ravel(old, 1)[0], layout.num_devices)  # [D, q]
    own = lax.dynamic_index_in_dim(flat, lax.axis_index(AXIS), keepdims=False)
    mean = ordered_mean(own, got.reshape(layout.num_workers, -1), flags[:, None])
    if layout.num_devices > 1:
        mean = lax.all_gather(mean, AXIS, tiled=True)
    pieces = jnp.split(mean, np.cumsum([x.size for x in old.values()]))[:-1]
    return {path: piece.reshape(x.shape) for (path, x), piece in zip(old.items(), pieces, strict=True)}


def _ravel(leaves: Shards, workers: int) -> jax.Array:
    """All leaves as one vector per worker, [W, sizes]."""
    return jnp.concatenate([x.reshape(workers, -1) for x in leaves.values()], axis=1)


def _slices(x: jax.Array, devices: int) -> jax.Array:
    """[..., D, q] from [..., p]: the last axis padded and cut into a slice per device."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % devices)])
    return x.reshape(*x.shape[:-1], devices, -1)


def _scatter(shard: jax.Array, where: tuple[jax.Array, ...], new: jax.Array, *, disjoint: bool) -> jax.Array:
    """Scatters all workers' values; the mean over the holders where units overlap.

    `where` are index arrays with a leading worker axis, out of range where nothing is to be put.
    """
    if disjoint:
        return shard.at[where].set(new, mode="drop")

    def add(tally: Tally, worker: tuple) -> tuple[Tally, None]:
        at, value = worker
        before = jax.tree.map(lambda x: x.at[at].get(mode="fill", fill_value=0), tally)

        def put(x: jax.Array, y: jax.Array) -> jax.Array:
            return x.at[at].set(jnp.broadcast_to(y, (*value.shape[:-1], x.shape[-1])), mode="drop")

        return jax.tree.map(put, tally, before.add(value)), None

    count = jnp.zeros((*shard.shape[: len(where)], 1), jnp.int32)
    tally = Tally(jnp.zeros_like(shard), shard, jnp.zeros(shard.shape, bool), count)
    tally, _ = lax.scan(add, tally, (where, new))
    return tally.mean()


def _is_dense(group: Group) -> bool:
    """Every worker holds exactly m units of each strip: slots are in the order of the exchange."""
    return group.even and group.strips * group.strip_slots == group.slots


def _strip_tables(layout: Layout, group: Group, assignment: Assignments) -> tuple[jax.Array, jax.Array]:
    """Per worker, which of its slots lie in which strip, and where in this device's strips.

    Returns:
      slots_of: int32 [S, strips, m], slot numbers, n where there is none.
      local: int32 [S, W, m], unit numbers within this device's W strips, the strip's size where none.
    """
    indices = jnp.asarray(assignment[group.name].indices)  # [S, n], ascending, U where empty
    slots = indices.shape[1]
    starts = jnp.arange(group.strips) * group.strip_size
    first = jax.vmap(jnp.searchsorted, (0, None))(indices, starts)  # [S, strips]
    ends = jnp.minimum(starts + group.strip_size, group.size)
    last = jax.vmap(jnp.searchsorted, (0, None))(indices, ends)
    place = first[..., None] + jnp.arange(group.strip_slots)  # [S, strips, m]
    slots_of = jnp.where(place < last[..., None], place, slots)
    units = jax.vmap(lambda i, s: i.at[s].get(mode="fill", fill_value=group.size))(indices, slots_of)
    local = jnp.where(slots_of < slots, units - starts[:, None], group.strip_size)
    workers = layout.workers_per_device
    return slots_of, lax.dynamic_slice_in_dim(local, lax.axis_index(AXIS) * workers, workers, 1)


def _own(layout: Layout, per_worker: jax.Array) -> jax.Array:
    """This device's W rows of an array [S, ...]."""
    workers = layout.workers_per_device
    return lax.dynamic_slice_in_dim(per_worker, lax.axis_index(AXIS) * workers, workers, 0)


def _invert(places: jax.Array, slots: int) -> jax.Array:
    """[W, n]: where each slot stands in `places` [W, k]; k for slots that do not occur."""
    size = places.shape[1]
    empty = jnp.full((len(places), slots), size, jnp.int32)
    return jax.vmap(lambda e, p: e.at[p].set(jnp.arange(size, dtype=jnp.int32), mode="drop"))(empty, places)
