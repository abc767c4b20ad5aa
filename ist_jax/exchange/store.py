"""The sharded global model and its exchange with the subnets.

No device holds the global model: the kinds of leaf say what each keeps. The functions here are per device,
with named-axis collectives: they run the same under `pmap` and under `vmap`. They equal `masking` bit for
bit, on any number of devices. Shapes are static, so any draw, with overlap and uneven counts, runs in the
same program. Empty slots are gathered as zeros and put nowhere.
"""

from collections.abc import Mapping
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ist_jax.exchange import shared, wire
from ist_jax.exchange.kinds import kind_of, unit_leaves
from ist_jax.exchange.layout import Flags, Layout, Shards
from ist_jax.partition import Draw

_HEALTHY = "health flags"
T = TypeVar("T")
Own: TypeAlias = PyTree[Float[Array, "..."]]  # the shards of this device
Subnets: TypeAlias = PyTree[Float[Array, "W ..."]]


def gather(layout: Layout, shards: Own, draw: Draw) -> Subnets:
    """The unit leaves of this device's W subnets: flat dict of [W, ...], groups' axes n slots long.

    Shared leaves are not copied: every worker of a device starts from the ones in `shards`.
    """
    units = unit_leaves(layout)
    send = {path: kind.cut_out(layout, leaf, shards[path], draw) for path, leaf, kind in units}
    _note(layout, "gather", send)
    got = wire.all_to_all(layout, send, exact={})
    return {path: kind.assemble(layout, leaf, got[path], draw) for path, leaf, kind in units}


def shared_leaves(layout: Layout, shards: Mapping[str, T]) -> dict[str, T]:
    """The leaves without units."""
    return {path: x for path, x in shards.items() if not layout.leaves[path].unit_axes}


def merge(layout: Layout, old: Own, subnets: Subnets, draw: Draw, healthy: Bool[Array, " W"]) -> Own:
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
    return merge_heard(layout, old, subnets, draw, healthy)[0]


def merge_heard(
    layout: Layout, old: Own, subnets: Subnets, draw: Draw, healthy: Bool[Array, " W"]
) -> tuple[Own, Flags]:
    """The same, and who of all workers was heard, bool [S]."""
    units = unit_leaves(layout)
    send = shared.take_apart(layout, shared_leaves(layout, subnets))
    send |= {path: kind.take_apart(layout, leaf, subnets[path], draw) for path, leaf, kind in units}
    _note(layout, "merge_units", send)
    flags = jnp.broadcast_to(healthy.astype(layout.dtype), (layout.num_devices, len(healthy)))
    wire.note(wire.Part("merge_shared", "all-to-all", flags.nbytes, 0.0))
    got = wire.all_to_all(layout, send, exact={_HEALTHY: flags})
    heard = got[_HEALTHY].reshape(-1) > 0  # [S]
    new = shared.put_back(layout, shared_leaves(layout, old), got, heard)
    new |= {p: kind.put_back(layout, leaf, old[p], got[p], draw, heard) for p, leaf, kind in units}
    return new, heard


def holders(layout: Layout, draw: Draw, heard: Flags) -> Shards:
    """How many of the workers that were heard held the entries of this device's shards.

    Returns:
      Flat dict of int32 arrays that broadcast against the shards.
    """
    leaves = layout.leaves.items()
    return {path: kind_of(leaf).holders(layout, leaf, draw, heard) for path, leaf in leaves}


def _note(layout: Layout, cause: str, send: Shards) -> None:
    """Tells the parts of an exchange of one tree, for the count of its bytes."""
    for name, part in send.items():
        common = name == shared.SLICES
        leaves = shared_leaves(layout, layout.leaves) if common else {name: layout.leaves[name]}
        numbers = sum(kind_of(leaf).assigned(leaf, layout.num_workers) for leaf in leaves.values())
        size = wire.encoded_bytes(layout, part)
        paper = numbers * layout.dtype.itemsize * size / part.nbytes
        wire.note(wire.Part("merge_shared" if common else cause, "all-to-all", size, paper))
        if common:  # the means come back
            mean = jax.ShapeDtypeStruct((1, part.shape[-1]), part.dtype)
            wire.note(wire.Part("merge_shared", "all-gather", wire.encoded_bytes(layout, mean), paper))
