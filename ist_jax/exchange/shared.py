"""Leaves without units: the whole leaf on every device, the mean of all workers after a round.

A merge sends slices of them, raveled together: each device averages its slice over the workers, and all
gather the result, which are the bytes of a ring all-reduce. Nothing is gathered before a round: every worker
of a device starts from the ones that it keeps.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from ist_jax.exchange.layout import AXIS, A, Draw, Layout, Leaf, Shards, cut
from ist_jax.exchange.wire import all_gather
from ist_jax.masking import ordered_mean
from ist_jax.models.sparse import Sparse

SLICES = "shared leaves"  # the one part that travels


def split(x: Shaped[A, "*shape"], leaf: Leaf, num_devices: int) -> Shaped[A, " D *shape"]:
    """What each device keeps of a whole leaf (NumPy or JAX), stacked: [D, ...]."""
    del leaf
    wide = np.broadcast_to if isinstance(x, np.ndarray) else jnp.broadcast_to
    return wide(x, (num_devices, *x.shape))


def join(x: Shaped[A, " D *shape"], leaf: Leaf) -> Shaped[A | np.generic, "*shape"]:
    """The inverse of `split`."""
    del leaf
    return x[0]


def stored_piece(leaf: Leaf, device: int, num_devices: int) -> tuple[int, int, int]:
    """(axis, start, stop) of the stored form that a device writes: device 0 all of it."""
    del num_devices
    return 0, 0, (leaf.shape or (1,))[0] if device == 0 else 0


def to_stored(
    shard: Shaped[np.ndarray | np.generic, "*shape"], leaf: Leaf, device: int, num_devices: int
) -> Shaped[np.ndarray | np.generic, "*shape"]:
    """That part, from what the device keeps."""
    del leaf, device, num_devices
    return shard


def cut_out(layout: Layout, shards: Shards, draw: Draw) -> PyTree[Float[Array, "D W ..."]]:
    """Nothing is sent before a round."""
    del layout, shards, draw
    return {}


def assemble(
    layout: Layout, parts: PyTree[Float[Array, "D W ..."]], draw: Draw
) -> PyTree[Float[Array, "W ..."]]:
    """Nothing has come."""
    del layout, draw
    return parts


def take_apart(
    layout: Layout, subnets: PyTree[Float[Array, "W ..."]], draw: Draw
) -> PyTree[Float[Array, "D W q"]]:
    """What a merge sends, by part: [D, W, q]."""
    del draw
    if not subnets:
        return {}
    return {SLICES: cut(_ravel(subnets, layout.workers_per_device), layout.num_devices).swapaxes(0, 1)}


def put_back(
    layout: Layout,
    old: Shards,
    parts: PyTree[Float[Array, "D W ..."]],
    draw: Draw,
    flags: Bool[Array, " S"],
) -> Shards:
    """The leaves after a round, from what has come; `flags`, bool [S]: whose."""
    del draw
    if not old:
        return {}
    flat = cut(_ravel(old, 1)[0], layout.num_devices)  # [D, q]
    own = lax.dynamic_index_in_dim(flat, lax.axis_index(AXIS), keepdims=False)
    mean = ordered_mean(own, parts[SLICES].reshape(layout.num_workers, -1), flags[:, None])
    whole = jnp.where(flags.any(), all_gather(layout, mean), flat.reshape(-1))  # a codec may round the old
    pieces = jnp.split(whole, np.cumsum([x.size for x in old.values()]))[:-1]
    return {path: piece.reshape(x.shape) for (path, x), piece in zip(old.items(), pieces, strict=True)}


def assigned(leaf: Leaf, num_workers: int) -> int | float:
    """Numbers of the leaf that all workers' subnets hold together."""
    return num_workers * leaf.row_size


def whole(layout: Layout, leaf: Leaf, shard: Float[Array, "..."]) -> Float[Array, "..."]:
    """The whole leaf from what all devices keep."""
    del layout, leaf
    return shard


def product(
    layout: Layout, leaf: Leaf, x: Float[Array, "B I"] | Sparse, shard: Float[Array, "..."]
) -> Float[Array, "B O"]:
    """x @ kernel, [B, O], of a leaf [I, O]."""
    del layout, leaf
    return x @ shard


def _ravel(leaves: Shards, workers: int) -> Float[Array, "W p"]:
    """All leaves as one vector per worker, [W, sizes]."""
    return jnp.concatenate([x.reshape(workers, -1) for x in leaves.values()], axis=1)
