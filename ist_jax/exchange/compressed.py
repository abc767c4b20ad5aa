"""The exchange in few bits: what `store` does, with the parameters sent as `quantize` has them.

    gather        an owner sends the values of its units          gather_bits
    merge         a worker sends what it has changed              merge_bits
                  the owner of shared leaves sends their change   gather_bits

The owner of a unit keeps float32 and adds to it what comes back, so that rounding does not add up. Of
shared leaves every device has a copy; what the copies lack (`init`) stays with the owner of a slice, of
which every worker has one, and goes with its next change. Scales are per leaf and unit (of the first group,
in a leaf with two; of a shared leaf, one): in a gather and of shared leaves by the largest number that any
owner has, in a merge by the worker's, who sends them along. Leaves with fewer than `LEAST` numbers per
scale are sent as they are.

No result depends on the number of devices. Moments that travel are not compressed.
"""

from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree, Shaped, UInt16, UInt32

from ist_jax.exchange import quantize, wire
from ist_jax.exchange.kinds import kind_of, unit_leaves
from ist_jax.exchange.layout import AXIS, Flags, Layout, Leaf, Shards, cut, indices_of
from ist_jax.exchange.store import Own, Subnets
from ist_jax.masking import ordered_mean
from ist_jax.partition import Draw

LEAST = 16
_GATHER, _MERGE, _RETURN = range(3)  # directions, in the key of the noise
_HEALTHY, _SCALES = "health flags", "scales of "
Residual: TypeAlias = PyTree[Float[Array, "W _"]]  # by path
Round: TypeAlias = Int[Array, ""]


class _Sent(NamedTuple):
    """An array [D, ...] that is sent, its bits per number, and its bytes as the papers count them."""

    x: Shaped[Array, "D ..."]
    bits: int  # 32: as it is
    cause: str
    paper: float


def init(layout: Layout) -> Residual:
    """What the copies of shared leaves lack at first: zeros, of a slice per worker, [W, ceil(p / S)]."""
    found = {}
    for path, leaf in _shared(layout):
        if _bits(layout, leaf, layout.bits.gather) < 32:
            size = -(-leaf.row_size // layout.num_workers)
            found[path] = jnp.zeros((layout.workers_per_device, size), layout.dtype)
    return found


def gather(layout: Layout, shards: Own, draw: Draw, index: Round) -> Subnets:
    """As `store.gather`; `index`: of the round."""
    units, largest, send = unit_leaves(layout), {}, {}
    bits = {path: _bits(layout, leaf, layout.bits.gather) for path, leaf, _ in units}
    scaled = [path for path in bits if bits[path] < 16]
    for path, leaf, kind in units:
        if path in scaled:
            largest[path] = kind.largest(layout, leaf, jnp.abs(shards[path].astype(jnp.float32)))
    held = sum(4.0 * sum(layout.leaves[path].groups[0].counts) for path in scaled)
    largest = _largest_of_all(layout, largest, "gather", float(held))
    scales = {path: quantize.scale_of(x, bits[path]) for path, x in largest.items()}
    for path, leaf, kind in units:
        x = shards[path]
        if bits[path] < 32:
            random = quantize.noise(_key(layout, path, _GATHER, index), kind.places(layout, leaf))
            scale = kind.spread(layout, leaf, scales[path]) if path in scaled else jnp.float32(1)
            x = quantize.encode(x.astype(jnp.float32), scale, random, bits[path])
        paper = _paper(layout, leaf, bits[path])
        send[path] = _Sent(kind.cut_out(layout, leaf, x, draw), bits[path], "gather", paper)
    got, subnets = _exchange(layout, send), {}
    for path, leaf, kind in units:
        subnets[path] = kind.assemble(layout, leaf, got[path], draw)
        if bits[path] < 32:
            scale = jnp.float32(1)
            if path in scaled:
                own = _own(layout, indices_of(leaf.groups[0], draw))
                scale = _along(leaf, scales[path].at[own].get(mode="fill", fill_value=0))
            subnets[path] = quantize.decode(subnets[path], scale, bits[path]).astype(layout.dtype)
    return subnets


def merge(
    layout: Layout,
    old: Own,
    residual: Residual,
    changes: Subnets,
    draw: Draw,
    healthy: Bool[Array, " W"],
    index: Round,
) -> tuple[Own, Residual, Flags]:
    """This device's shards after the round, from what all workers have changed.

    Args:
      layout: from `make_layout`.
      old: the shards before the round.
      residual: from `init` or the round before.
      changes: flat dict of [W, ...], this device's workers: trained less what they started from.
      draw: the one that the subnets were gathered by.
      healthy: bool [W], this device's workers; the others change nothing.
      index: of the round.

    Returns:
      Shards as `old`, the residual, and who of all workers was heard, bool [S].
    """
    flags = jnp.broadcast_to(healthy.astype(jnp.uint8), (layout.num_devices, len(healthy)))
    send = {_HEALTHY: _Sent(flags, 32, "merge_shared", 0.0)}
    for path in layout.leaves:
        send |= _sent_changes(layout, path, changes[path], draw, index)
    got = _exchange(layout, send)
    heard = got[_HEALTHY].reshape(-1) > 0

    def change(path: str, leaf: Leaf) -> Array:
        bits, x = _bits(layout, leaf, layout.bits.merge), got[path]
        if bits == 32:
            return x
        scale = jnp.float32(1)
        if bits < 16:
            scales = _as_scales(got[_SCALES + path])  # [D, W, n]
            scales = scales.reshape(layout.num_workers, -1)
            scale = kind_of(leaf).scales_of_parts(layout, leaf, scales, draw)
        return quantize.decode(x, scale, bits).astype(layout.dtype)

    new = {}
    for path, leaf, kind in unit_leaves(layout):
        trained = kind.cut_out(layout, leaf, old[path], draw) + change(path, leaf)
        new[path] = kind.put_back(layout, leaf, old[path], trained, draw, heard)
    shared = {path: change(path, leaf) for path, leaf in _shared(layout)}
    returned, residual = _return(layout, old, residual, shared, heard, index)
    return {path: (new | returned)[path] for path in layout.leaves}, residual, heard


def _sent_changes(
    layout: Layout, path: str, x: Float[Array, "W ..."], draw: Draw, index: Round
) -> dict[str, _Sent]:
    """What a merge sends of a leaf: codes and their scales, or numbers."""
    leaf, sent = layout.leaves[path], {}
    bits = _bits(layout, leaf, layout.bits.merge)
    cause = "merge_units" if leaf.unit_axes else "merge_shared"
    if bits < 32:
        values, scale = x.astype(jnp.float32), jnp.float32(1)
        if bits < 16:
            scales = quantize.scale_of(_largest_of_slots(leaf, jnp.abs(values)), bits)  # [W, n]
            scale, along = _along(leaf, scales), jnp.broadcast_to(scales, (layout.num_devices, *scales.shape))
            count = sum(leaf.groups[0].counts) if leaf.unit_axes else layout.num_workers
            sent[_SCALES + path] = _Sent(_from_scales(along), 32, cause, 2.0 * count)
        workers = lax.axis_index(AXIS) * layout.workers_per_device + jnp.arange(layout.workers_per_device)
        places = jnp.arange(values[0].size, dtype=jnp.uint32).reshape(values.shape[1:])
        keys = _key(layout, path, _MERGE, index, workers).reshape(-1, *[1] * places.ndim)
        x = quantize.encode(values, scale, quantize.noise(keys, places), bits)
    parts = kind_of(leaf).take_apart(layout, leaf, x, draw) if leaf.unit_axes else _slices(layout, x)
    return sent | {path: _Sent(parts, bits, cause, _paper(layout, leaf, bits))}


def _return(
    layout: Layout, old: Own, residual: Residual, changes: Shards, heard: Flags, index: Round
) -> tuple[Shards, Residual]:
    """The shared leaves after the round, from all workers' changes [D, W, W, q] of this device's slices."""
    means, send = {}, {}
    for path, x in changes.items():
        x = x.reshape(layout.num_workers, *x.shape[2:])
        own = residual.get(path)
        if own is None:
            own = _own(layout, cut(old[path].reshape(-1), layout.num_workers))
        means[path] = ordered_mean(own, own + x, heard[:, None, None])
    bits = {path: _bits(layout, layout.leaves[path], layout.bits.gather) for path in means}
    scaled = {p: jnp.abs(x.astype(jnp.float32)).max()[None] for p, x in means.items() if bits[p] < 16}
    counted = 4.0 * layout.num_workers * len(scaled)
    largest = _largest_of_all(layout, scaled, "merge_shared", counted)
    scales = {path: quantize.scale_of(x, bits[path]) for path, x in largest.items()}
    for path, x in means.items():
        if bits[path] < 32:
            first = lax.axis_index(AXIS).astype(jnp.uint32) * x.size
            places = (first + jnp.arange(x.size, dtype=jnp.uint32)).reshape(x.shape)
            random = quantize.noise(_key(layout, path, _RETURN, index), places)
            x = quantize.encode(x.astype(jnp.float32), scales.get(path, jnp.float32(1)), random, bits[path])
        paper = _paper(layout, layout.leaves[path], bits[path])
        send[path] = _Sent(x[None], bits[path], "merge_shared", paper)
    got, new, left = _all_gather(layout, send), {}, {}
    for path, x in got.items():
        before = old[path]
        if bits[path] < 32:
            scale = scales.get(path, jnp.float32(1))
            decoded = quantize.decode(x, scale, bits[path]).astype(layout.dtype)
            lacking = means[path] - _own(layout, decoded.reshape(layout.num_workers, -1))
            left[path] = jnp.where(heard.any(), lacking, residual[path])
            after = before + decoded.reshape(-1)[: before.size].reshape(before.shape)
        else:
            after = x.reshape(-1)[: before.size].reshape(before.shape)
        new[path] = jnp.where(heard.any(), after, before)
    return new, left


# --- on the wire --------------------------------------------------------------------------------------------


def _exchange(layout: Layout, send: dict[str, _Sent]) -> Shards:
    packed = _pack(layout, send, "all-to-all")
    return _unpack(send, wire.all_to_all_bytes(layout, packed))


def _all_gather(layout: Layout, send: dict[str, _Sent]) -> Shards:
    """[D, ...] of arrays [1, ...]."""
    packed = _pack(layout, send, "all-gather")
    return _unpack(send, wire.all_gather_bytes(layout, packed))


def _pack(layout: Layout, send: dict[str, _Sent], kind: str) -> Shards:
    packed = {}
    for name, (x, bits, cause, paper) in send.items():
        packed[name] = x if bits == 32 else quantize.pack(x.reshape(len(x), -1), bits)
        wire.note(wire.Part(cause, kind, packed[name].nbytes, paper))
    return packed


def _unpack(send: dict[str, _Sent], got: Shards) -> Shards:
    found = {}
    for name, (x, bits, *_) in send.items():
        shape = (len(got[name]), *x.shape[1:])
        codes = got[name] if bits == 32 else quantize.unpack(got[name], x[0].size, bits)
        found[name] = codes.reshape(shape)
    return found


def _largest_of_all(
    layout: Layout, largest: dict[str, Float32[Array, " k"]], cause: str, paper: float
) -> dict[str, Float32[Array, " k"]]:
    """The largest of what each device has found, in one collective."""
    if not largest:
        return {}
    together = jnp.concatenate([*largest.values()])
    wire.note(wire.Part(cause, "all-reduce", together.nbytes, paper))
    if layout.num_devices > 1:
        together = lax.pmax(together, AXIS)
    pieces = jnp.split(together, np.cumsum([x.size for x in largest.values()])[:-1])
    return dict(zip(largest, pieces, strict=True))


def _from_scales(scales: Float32[Array, "..."]) -> UInt16[Array, "..."]:
    return (lax.bitcast_convert_type(scales, jnp.uint32) >> 16).astype(jnp.uint16)


def _as_scales(sent: UInt16[Array, "..."]) -> Float32[Array, "..."]:
    return lax.bitcast_convert_type(sent.astype(jnp.uint32) << 16, jnp.float32)


# --- of a leaf ----------------------------------------------------------------------------------------------


def _shared(layout: Layout) -> list[tuple[str, Leaf]]:
    return [(path, leaf) for path, leaf in layout.leaves.items() if not leaf.unit_axes]


def _bits(layout: Layout, leaf: Leaf, wanted: int) -> int:
    """Bits per number of a leaf: 32 where few share a scale."""
    others = leaf.groups[1].size if len(leaf.groups) > 1 else 1
    return wanted if others * leaf.row_size >= LEAST else 32


def _paper(layout: Layout, leaf: Leaf, bits: int) -> float:
    """Bytes of the numbers that all workers' subnets hold."""
    numbers = kind_of(leaf).assigned(leaf, layout.num_workers)
    return float(numbers * (layout.dtype.itemsize if bits == 32 else bits / 8))


def _key(layout: Layout, path: str, direction: int, *numbers: Int[Array, "..."]) -> UInt32[Array, "..."]:
    """Of the noise of a leaf."""
    return quantize.key_of(layout.bits.seed, direction, list(layout.leaves).index(path), *numbers)


def _own(layout: Layout, per_worker: Shaped[Array, "S ..."]) -> Shaped[Array, "W ..."]:
    """This device's workers' entries."""
    workers = layout.workers_per_device
    return lax.dynamic_slice_in_dim(per_worker, lax.axis_index(AXIS) * workers, workers)


def _slices(layout: Layout, x: Shaped[Array, "W ..."]) -> Shaped[Array, "D W W q"]:
    """Of a shared leaf, a slice for every worker, which all owners' are."""
    slices = cut(x.reshape(len(x), -1), layout.num_workers)  # [W, S, q]
    return slices.reshape(len(x), layout.num_devices, len(x), -1).swapaxes(0, 1)


def _largest_of_slots(leaf: Leaf, x: Float32[Array, "W ..."]) -> Float32[Array, "W n"]:
    """By slot of a leaf's first group; of a shared leaf one number, [W, 1]."""
    if not leaf.unit_axes:
        return x.reshape(len(x), -1).max(1, keepdims=True)
    (axis, *_), (outer, inner) = leaf.unit_axes, leaf.blocks[0]
    others = [a for a in range(1, x.ndim) if a != axis + 1]
    return x.max(others).reshape(len(x), outer, -1, inner).max((1, 3))


def _along(leaf: Leaf, per_slot: Float32[Array, "W n"]) -> Float32[Array, "W ..."]:
    """Numbers by slot, in a form that is broadcast to a subnet's leaf [W, ...]."""
    if not leaf.unit_axes:
        return per_slot.reshape(-1, *[1] * len(leaf.shape))
    (axis, *_), (outer, inner) = leaf.unit_axes, leaf.blocks[0]
    long = jnp.tile(jnp.repeat(per_slot, inner, axis=1), (1, outer))
    return jnp.expand_dims(long, [a + 1 for a in range(len(leaf.shape)) if a != axis])
