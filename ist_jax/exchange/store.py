"""The sharded global model and its exchange with the subnets.

No device holds the global model: the kinds of leaf say what each keeps. The functions here are per device,
with named-axis collectives: they run the same under `pmap` and under `vmap`. They equal `masking` bit for
bit, on any number of devices. Shapes are static, so any draw, with overlap and uneven counts, runs in the
same program. Empty slots are gathered as zeros and scattered nowhere.
"""

from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ist_jax.exchange import shared, wire
from ist_jax.exchange.kinds import KINDS, kind_of, only
from ist_jax.exchange.layout import Draw, Layout, Shards

_HEALTHY = "health flags"
T = TypeVar("T")


def gather(layout: Layout, shards: PyTree[Float[Array, "..."]], draw: Draw) -> PyTree[Float[Array, "W ..."]]:
    """The unit leaves of this device's W subnets: flat dict of [W, ...], groups' axes n slots long.

    Shared leaves are not copied: every worker of a device starts from the ones in `shards`.
    """
    send: Shards = {}
    for kind in KINDS:
        send |= kind.cut_out(layout, only(kind, layout, shards), draw)
    _note(layout, "gather", send)
    got = wire.all_to_all(layout, send, exact={})
    units: Shards = {}
    for kind in KINDS:
        units |= kind.assemble(layout, only(kind, layout, got), draw)
    return units


def shared_leaves(layout: Layout, shards: Mapping[str, T]) -> dict[str, T]:
    """The leaves without units."""
    return only(shared, layout, shards)


def merge(
    layout: Layout,
    old: PyTree[Float[Array, "..."]],
    subnets: PyTree[Float[Array, "W ..."]],
    draw: Draw,
    healthy: Bool[Array, " W"],
) -> PyTree[Float[Array, "..."]]:
    """This device's shards after the round, from the trained subnets of all workers.

    Args:
      layout: from `make_layout`.
      old: the shards before the round.
      subnets: flat dict of [W, ...], this device's workers.
      draw: the one that the subnets were gathered by.
      healthy: bool [W], this device's workers; the others' subnets change nothing.

    Returns:
      Shards as `old`.
    """
    devices, workers = layout.num_devices, layout.workers_per_device
    send: Shards = {}
    for kind in KINDS:
        send |= kind.take_apart(layout, only(kind, layout, subnets), draw)
    flags = {_HEALTHY: jnp.broadcast_to(healthy.astype(layout.dtype), (devices, workers))}
    _note(layout, "merge", send, flags)
    got = wire.all_to_all(layout, send, exact=flags)
    heard = got[_HEALTHY].reshape(-1) > 0  # [S]
    new: Shards = {}
    for kind in KINDS:
        new |= kind.put_back(layout, only(kind, layout, old), got, draw, heard)
    return new


def _note(layout: Layout, direction: str, send: Shards, flags: Shards | None = None) -> None:
    """Tells the parts of an exchange of one tree, for the count of its bytes."""
    for name, part in send.items():
        size = wire.encoded_bytes(layout, part)
        of_slices = name == shared.SLICES
        paths = shared_leaves(layout, dict.fromkeys(layout.leaves)) if of_slices else [name]
        numbers = sum(kind_of(layout.leaves[p]).assigned(layout.leaves[p], layout.num_workers) for p in paths)
        paper = numbers * layout.dtype.itemsize * size / (part.size * part.dtype.itemsize)
        cause = "merge_shared" if of_slices else "gather" if direction == "gather" else "merge_units"
        wire.note(wire.Part(cause, "all-to-all", size, paper))
        if of_slices:  # the means come back
            mean = jax.ShapeDtypeStruct((1, part.shape[-1]), part.dtype)
            wire.note(wire.Part(cause, "all-gather", wire.encoded_bytes(layout, mean), paper))
    for part in (flags or {}).values():
        wire.note(wire.Part("merge_shared", "all-to-all", part.size * part.dtype.itemsize, 0.0))
