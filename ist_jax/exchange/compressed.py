"""The exchange in few bits: what `store` does, with the parameters sent as `quantize` has them.

    gather        an owner sends the values of its units          gather_bits
    merge         a worker sends what it has changed              merge_bits, the largest of it alone (keep)
                  the owner of shared leaves sends their change   gather_bits

The owner of a unit keeps float32 and adds to it what comes back, so that rounding does not add up. Of
shared leaves every device has a copy; what the copies lack (`init`) stays with the owner of a slice, of
which every worker has one, and goes with its next change. Scales are per leaf and unit (of the first group,
in a leaf with two; of a shared leaf, one): in a gather and of shared leaves by the largest number that any
owner has, in a merge by the worker's, who sends them along. Leaves with fewer than `LEAST` numbers per
scale are sent as they are.

Where the largest changes alone are sent, so many of each leaf go from a worker to every owner, as `largest`
has them; few numbers per owner all go. With error feedback a worker keeps what was not sent of its changes
of shared leaves, by rounding or for its size, and adds it to its next one; what it lacks of units that it is
dealt is nobody's.

No result depends on the number of devices. Moments that travel are not compressed.

References:
  Seide et al., 1-Bit Stochastic Gradient Descent, Interspeech 2014 (error feedback).
  Stich et al., Sparsified SGD with Memory, arXiv:1809.07599, 2018.
"""

import math
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree, Shaped, UInt16, UInt32

from ist_jax.exchange import largest, quantize, wire
from ist_jax.exchange.codec import LEAST
from ist_jax.exchange.kinds import kind_of, unit_leaves
from ist_jax.exchange.layout import AXIS, Flags, Layout, Leaf, Shards, cut, indices_of, is_long
from ist_jax.exchange.store import Own, Subnets
from ist_jax.masking import ordered_mean
from ist_jax.partition import Draw

_GATHER, _MERGE, _RETURN = range(3)  # directions, in the key of the noise
_HEALTHY, _SCALES, _PLACES = "health flags", "scales of ", "places of "
Round: TypeAlias = Int[Array, ""]


class Residual(NamedTuple):
    """What is still to be sent of shared leaves.

    Attributes:
      copies: by path [W, ceil(p / S)], what the devices' copies lack, by the owners of the slices.
      changes: by path [W, ...], what was not sent of a worker's changes; {} without error feedback.
    """

    copies: PyTree[Float[Array, "W _"]]
    changes: PyTree[Float[Array, "W ..."]]


class _Sent(NamedTuple):
    """An array [D, ...] that is sent, its bits per number, and its bytes as the papers count them."""

    x: Shaped[Array, "D ..."]
    bits: int  # 32: as it is
    cause: str
    paper: float


def init(layout: Layout) -> Residual:
    """Before the first round: zeros."""
    copies, changes, workers = {}, {}, layout.workers_per_device
    for path, leaf in _shared(layout):
        if _bits(layout, leaf, layout.bits.gather) < 32:
            size = -(-leaf.row_size // layout.num_workers)
            copies[path] = jnp.zeros((workers, size), layout.dtype)
        lossy = _bits(layout, leaf, layout.bits.merge) < 32 or _kept(layout, leaf) < _part_size(layout, leaf)
        if layout.bits.error_feedback and lossy:
            changes[path] = jnp.zeros((workers, *leaf.shape), layout.dtype)
    return Residual(copies, changes)


def gather(layout: Layout, shards: Own, draw: Draw, index: Round) -> Subnets:
    """As `store.gather`; `index`: of the round."""
    units, most, send = unit_leaves(layout), {}, {}
    bits = {path: _bits(layout, leaf, layout.bits.gather) for path, leaf, _ in units}
    scaled = [path for path in bits if bits[path] < 16]
    for path, leaf, kind in units:
        if path in scaled:
            most[path] = kind.largest(layout, leaf, jnp.abs(shards[path].astype(jnp.float32)))
    held = sum(4.0 * _held(layout.leaves[path]) for path in scaled)
    most = _largest_of_all(layout, most, "gather", float(held))
    scales = {path: quantize.scale_of(x, bits[path]) for path, x in most.items()}
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
                scale = _along(leaf, _of_slots(layout, leaf, scales[path], draw))
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
    send, lacking = {_HEALTHY: _Sent(flags, 32, "merge_shared", 0.0)}, {}
    for path, leaf in layout.leaves.items():
        x, before = changes[path], residual.changes.get(path)
        x = x if before is None else x + before
        own = _sent_changes(layout, path, x, draw, index)
        send |= own
        if before is not None:
            sent = _change(layout, path, {name: part.x for name, part in own.items()}, draw)
            lacking[path] = jax.vmap(jnp.where)(healthy, x - _whole_of(leaf, sent), before)
    got = _exchange(layout, send)
    heard = got[_HEALTHY].reshape(-1) > 0

    new = {}
    for path, leaf, kind in unit_leaves(layout):
        trained = kind.cut_out(layout, leaf, old[path], draw) + _change(layout, path, got, draw)
        new[path] = kind.put_back(layout, leaf, old[path], trained, draw, heard)
    shared = {path: _change(layout, path, got, draw) for path, _ in _shared(layout)}
    returned, copies = _return(layout, old, residual.copies, shared, heard, index)
    return {path: (new | returned)[path] for path in layout.leaves}, Residual(copies, lacking), heard


def _sent_changes(
    layout: Layout, path: str, x: Float[Array, "W ..."], draw: Draw, index: Round
) -> dict[str, _Sent]:
    """What a merge sends of a leaf: codes and their scales, or numbers; all, or some and their places."""
    leaf, sent = layout.leaves[path], {}
    bits, size, count = _bits(layout, leaf, layout.bits.merge), _part_size(layout, leaf), _kept(layout, leaf)
    cause = "merge_units" if leaf.unit_axes else "merge_shared"

    def parts(x: Shaped[Array, "W ..."]) -> Shaped[Array, "D ..."]:
        return kind_of(leaf).take_apart(layout, leaf, x, draw) if leaf.unit_axes else _slices(layout, x)

    changed = x
    if bits < 32:
        values, scale = x.astype(jnp.float32), jnp.float32(1)
        if bits < 16:
            scales = quantize.scale_of(_largest_of_slots(leaf, jnp.abs(values)), bits)
            scale, along = _along(leaf, scales), jnp.broadcast_to(scales, (layout.num_devices, *scales.shape))
            held = _held(leaf) if leaf.unit_axes else layout.num_workers
            sent[_SCALES + path] = _Sent(_from_scales(along), 32, cause, 2.0 * held)
        workers = lax.axis_index(AXIS) * layout.workers_per_device + jnp.arange(layout.workers_per_device)
        places = jnp.arange(values[0].size, dtype=jnp.uint32).reshape(values.shape[1:])
        keys = _key(layout, path, _MERGE, index, workers).reshape(-1, *[1] * places.ndim)
        x = quantize.encode(values, scale, quantize.noise(keys, places), bits)
    x, share = parts(x), 1.0
    if count < size:
        chosen = largest.places_of(_by_owner(layout, leaf, parts(changed)), count)
        x = jnp.take_along_axis(_by_owner(layout, leaf, x), chosen, -1)
        codes, width = largest.code_form(size, count)
        paper = _numbers(layout, leaf) * codes / size * width / 8
        sent[_PLACES + path] = _Sent(largest.encode(chosen, size), width, cause, paper)
        share = count / size
    return sent | {path: _Sent(x, bits, cause, share * _paper(layout, leaf, bits))}


def _change(layout: Layout, path: str, told: Shards, draw: Draw) -> Float[Array, "D W ..."]:
    """A leaf's changes, in the form of `take_apart`, from what `_sent_changes` says of it, by name.

    Of a shared leaf they may be this device's own, before they are sent.
    """
    leaf, x, size = layout.leaves[path], told[path], _part_size(layout, layout.leaves[path])
    bits, count = _bits(layout, leaf, layout.bits.merge), _kept(layout, leaf)
    if count < size:
        x = _of_owners(layout, leaf, largest.fill(x, largest.decode(told[_PLACES + path], size, count)))
    if bits == 32:
        return x
    scale = jnp.float32(1)
    if bits < 16:
        scales = _as_scales(told[_SCALES + path])  # [D, W, n]
        scales = scales.reshape(layout.num_workers, *scales.shape[2:])
        scale = kind_of(leaf).scales_of_parts(layout, leaf, scales, draw)
    return quantize.decode(x, scale, bits).astype(layout.dtype)


def _return(
    layout: Layout, old: Own, copies: Shards, changes: Shards, heard: Flags, index: Round
) -> tuple[Shards, Shards]:
    """The shared leaves after the round, from all workers' changes [D, W, W, q] of this device's slices.

    Returns:
      The leaves, and what their copies lack.
    """
    means, send = {}, {}
    for path, x in changes.items():
        x = x.reshape(layout.num_workers, *x.shape[2:])
        own = copies.get(path)
        if own is None:
            own = _own(layout, cut(old[path].reshape(-1), layout.num_workers))
        means[path] = ordered_mean(own, own + x, heard[:, None, None])
    bits = {path: _bits(layout, layout.leaves[path], layout.bits.gather) for path in means}
    scaled = {p: jnp.abs(x.astype(jnp.float32)).max()[None] for p, x in means.items() if bits[p] < 16}
    counted = 4.0 * layout.num_workers * len(scaled)
    most = _largest_of_all(layout, scaled, "merge_shared", counted)
    scales = {path: quantize.scale_of(x, bits[path]) for path, x in most.items()}
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
            left[path] = jnp.where(heard.any(), lacking, copies[path])
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
    layout: Layout, found: dict[str, Float32[Array, "..."]], cause: str, paper: float
) -> dict[str, Float32[Array, "..."]]:
    """The largest of what each device has found, in one collective."""
    if not found:
        return {}
    together = jnp.concatenate([x.reshape(-1) for x in found.values()])
    wire.note(wire.Part(cause, "all-reduce", together.nbytes, paper))
    if layout.num_devices > 1:
        together = lax.pmax(together, AXIS)
    pieces = jnp.split(together, np.cumsum([x.size for x in found.values()])[:-1])
    return {path: piece.reshape(found[path].shape) for path, piece in zip(found, pieces, strict=True)}


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
    return wanted if others * _one(leaf).row_size >= LEAST else 32


def _one(leaf: Leaf) -> Leaf:
    """A layer of it, where they have draws of their own; else the leaf."""
    return leaf if leaf.layer_axis is None else leaf.layer


def _layers(leaf: Leaf) -> int:
    return 1 if leaf.layer_axis is None else leaf.shape[leaf.layer_axis]


def _held(leaf: Leaf) -> int:
    """The slots with a scale of their own that all workers' subnets hold."""
    return _layers(leaf) * sum(leaf.groups[0].counts)


def _paper(layout: Layout, leaf: Leaf, bits: int) -> float:
    """Bytes of the numbers that all workers' subnets hold."""
    return float(_numbers(layout, leaf) * (layout.dtype.itemsize if bits == 32 else bits / 8))


def _numbers(layout: Layout, leaf: Leaf) -> int | float:
    """Those that all workers' subnets hold."""
    return kind_of(leaf).assigned(leaf, layout.num_workers)


def _part_size(layout: Layout, leaf: Leaf) -> int:
    """m: the numbers of a leaf, or of a layer, that a worker has for an owner, empty slots included."""
    row = _one(leaf).row_size
    if len(leaf.unit_axes) == 2:
        first, second = leaf.groups
        return first.strip_slots * second.slots * row
    slots = leaf.groups[0].slots if leaf.unit_axes else 1
    return slots * -(-row // layout.num_workers)


def _kept(layout: Layout, leaf: Leaf) -> int:
    """How many of them it sends: the largest, or all."""
    size = _part_size(layout, leaf)
    enough = size >= LEAST if len(leaf.unit_axes) == 2 else is_long(layout, leaf)
    return math.ceil(layout.bits.keep * size - 1e-6) if enough else size


def _key(layout: Layout, path: str, direction: int, *numbers: Int[Array, "..."]) -> UInt32[Array, "..."]:
    """Of the noise of a leaf."""
    return quantize.key_of(layout.bits.seed, direction, list(layout.leaves).index(path), *numbers)


def _own(layout: Layout, per_worker: Shaped[Array, "S ..."]) -> Shaped[Array, "W ..."]:
    """This device's workers' entries."""
    workers = layout.workers_per_device
    return lax.dynamic_slice_in_dim(per_worker, lax.axis_index(AXIS) * workers, workers)


def _of_slots(
    layout: Layout, leaf: Leaf, per_unit: Float32[Array, "..."], draw: Draw
) -> Float32[Array, "..."]:
    """Numbers by slot of this device's workers, [W, n] or [W, L, n], from those by unit, [U] or [L, U]."""
    own = _own(layout, indices_of(leaf.groups[0], draw))

    def take(per_unit: Float32[Array, " U"], own: Int[Array, "W n"]) -> Float32[Array, "W n"]:
        return per_unit.at[own].get(mode="fill", fill_value=0)

    if leaf.layer_axis is None:
        return take(per_unit, own)
    return jax.vmap(take, (0, 1 if leaf.groups[0].layers else None), 1)(per_unit, own)


def _by_owner(layout: Layout, leaf: Leaf, parts: Shaped[Array, "D W ..."]) -> Shaped[Array, "D W W *L m"]:
    """What a worker has for each owner; the second W are the owners of a device."""
    if leaf.layer_axis is not None:
        return jax.vmap(partial(_by_owner, layout, leaf.layer), 2, 3)(parts)
    devices, workers = parts.shape[0], layout.workers_per_device
    if _is_rows_first(leaf):
        parts = parts.reshape(devices, workers, parts.shape[2], workers, -1).swapaxes(2, 3)
    return parts.reshape(devices, workers, workers, -1)


def _of_owners(layout: Layout, leaf: Leaf, x: Shaped[Array, "D W W *L m"]) -> Shaped[Array, "D W ..."]:
    """The inverse of `_by_owner`."""
    if leaf.layer_axis is not None:
        return jax.vmap(partial(_of_owners, layout, leaf.layer), 3, 2)(x)
    devices, workers, slots = x.shape[0], layout.workers_per_device, [group.slots for group in leaf.groups]
    if _is_rows_first(leaf):
        x = x.reshape(devices, workers, workers, slots[0], -1).swapaxes(2, 3)
        return x.reshape(devices, workers, slots[0], -1)
    if len(slots) == 2:
        return x.reshape(devices, workers, workers, -1, slots[1], leaf.row_size)
    return x.reshape(devices, workers, -1, *slots) if slots else x


def _is_rows_first(leaf: Leaf) -> bool:
    return len(leaf.unit_axes) == 1 and not leaf.unit_last


def _whole_of(leaf: Leaf, slices: Shaped[Array, "D W W q"]) -> Shaped[Array, "W ..."]:
    """Of a shared leaf, the inverse of `_slices`."""
    flat = slices.swapaxes(0, 1).reshape(slices.shape[1], -1)
    return flat[:, : leaf.row_size].reshape(-1, *leaf.shape)


def _slices(layout: Layout, x: Shaped[Array, "W ..."]) -> Shaped[Array, "D W W q"]:
    """Of a shared leaf, a slice for every worker, which all owners' are."""
    slices = cut(x.reshape(len(x), -1), layout.num_workers)  # [W, S, q]
    return slices.reshape(len(x), layout.num_devices, len(x), -1).swapaxes(0, 1)


def _largest_of_slots(leaf: Leaf, x: Float32[Array, "W ..."]) -> Float32[Array, "W *L n"]:
    """By slot of a leaf's first group; of a shared leaf one number, [W, 1]."""
    if leaf.layer_axis is not None:
        return jax.vmap(partial(_largest_of_slots, leaf.layer), 1 + leaf.layer_axis, 1)(x)
    if not leaf.unit_axes:
        return x.reshape(len(x), -1).max(1, keepdims=True)
    (axis, *_), (outer, inner) = leaf.unit_axes, leaf.blocks[0]
    others = [a for a in range(1, x.ndim) if a != axis + 1]
    return x.max(others).reshape(len(x), outer, -1, inner).max((1, 3))


def _along(leaf: Leaf, per_slot: Float32[Array, "W *L n"]) -> Float32[Array, "W ..."]:
    """Numbers by slot, in a form that is broadcast to a subnet's leaf [W, ...]."""
    if leaf.layer_axis is not None:
        return jax.vmap(partial(_along, leaf.layer), 1, 1 + leaf.layer_axis)(per_slot)
    if not leaf.unit_axes:
        return per_slot.reshape(-1, *[1] * len(leaf.shape))
    (axis, *_), (outer, inner) = leaf.unit_axes, leaf.blocks[0]
    long = jnp.tile(jnp.repeat(per_slot, inner, axis=1), (1, outer))
    return jnp.expand_dims(long, [a + 1 for a in range(len(leaf.shape)) if a != axis])
