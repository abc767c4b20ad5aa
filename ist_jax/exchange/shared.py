"""Leaves without units: the whole leaf on every device, the mean of all workers after a round.

A merge sends slices of them, raveled together: each device averages its slice over the workers, and all
gather the result, which are the bytes of a ring all-reduce. Nothing is gathered before a round: every worker
of a device starts from the ones that it keeps.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Float32, Int, PyTree, Shaped

from ist_jax.exchange.layout import AXIS, A, Flags, Layout, Leaf, Shards, cut
from ist_jax.exchange.wire import Inputs, all_gather
from ist_jax.masking import ordered_mean
from ist_jax.partition import Draw

SLICES = "shared leaves"  # the one part that travels
Stored = Shaped[np.ndarray | np.generic, "*shape"]


def split(x: Shaped[A, "*shape"], leaf: Leaf, num_devices: int) -> Shaped[A, " D *shape"]:
    """What each device keeps of a whole leaf (NumPy or JAX), stacked: [D, ...]."""
    wide = np.broadcast_to if isinstance(x, np.ndarray) else jnp.broadcast_to
    return wide(x, (num_devices, *x.shape))


def join(x: Shaped[A, " D *shape"], leaf: Leaf) -> Shaped[A | np.generic, "*shape"]:
    """The inverse of `split`."""
    return x[0]


def stored_piece(leaf: Leaf, device: int, num_devices: int) -> tuple[int, int, int]:
    """(axis, start, stop) of the stored form that a device writes: device 0 all of it."""
    return 0, 0, (leaf.shape or (1,))[0] if device == 0 else 0


def to_stored(leaf: Leaf, shard: Stored, length: int) -> Stored:
    """That part, from what the device keeps."""
    return shard


def take_apart(layout: Layout, subnets: PyTree[Float[Array, "W ..."]]) -> PyTree[Float[Array, "D W q"]]:
    """What a merge sends of these leaves together, [D, W, q], by the name of the part."""
    if not subnets:
        return {}
    flat = jax.vmap(lambda leaves: ravel_pytree(leaves)[0])(subnets)  # [W, p]
    return {SLICES: cut(flat, layout.num_devices).swapaxes(0, 1)}


def put_back(layout: Layout, old: Shards, parts: Shards, flags: Flags) -> Shards:
    """The leaves after a round, from what has come; `flags`, bool [S]: whose."""
    if not old:
        return {}
    raveled, unravel = ravel_pytree(old)
    flat = cut(raveled, layout.num_devices)  # [D, q]
    own = lax.dynamic_index_in_dim(flat, lax.axis_index(AXIS), keepdims=False)
    mean = ordered_mean(own, parts[SLICES].reshape(layout.num_workers, -1), flags[:, None])
    whole = jnp.where(flags.any(), all_gather(layout, mean), flat.reshape(-1))  # a codec may round the old
    return unravel(whole[: raveled.size])


def holders(layout: Layout, leaf: Leaf, draw: Draw, flags: Flags) -> Int[Array, ""]:
    """How many of the workers flagged hold the leaf."""
    return flags.sum(dtype=jnp.int32)


def scales_of_parts(
    layout: Layout, leaf: Leaf, per_worker: Float32[Array, "S 1"], draw: Draw
) -> Float32[Array, "D W 1 1"]:
    """Numbers by worker, in a form that is broadcast to the slices of such a leaf in a compressed merge."""
    return per_worker.reshape(layout.num_devices, -1, 1, 1)


def assigned(leaf: Leaf, num_workers: int) -> int | float:
    """Numbers of the leaf that all workers' subnets hold together."""
    return num_workers * leaf.row_size


def whole(leaf: Leaf, shard: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The whole leaf from what all devices keep."""
    return shard


def product(layout: Layout, leaf: Leaf, x: Inputs, shard: Float[Array, "I O"]) -> Float[Array, "B O"]:
    """x @ kernel, [B, O], of a leaf [I, O]."""
    return x @ shard
