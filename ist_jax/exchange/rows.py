"""Leaves with one unit axis, kept as [U, ceil(p / D)].

A unit's p numbers are a row, and a device keeps a slice of *every* row: whatever units a worker draws, it
pulls exactly n slices from each device.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from ist_jax.exchange.layout import AXIS, A, Flags, Layout, Leaf, canonical, cut, indices_of, restore
from ist_jax.exchange.scatter import scatter
from ist_jax.exchange.wire import Inputs, inputs_of_all, multiply_slice
from ist_jax.partition import Draw

Shard = Float[Array, "U q"]
Parts = Float[Array, "D W n q"]  # first axis: destination, then source


def split(x: Shaped[A, "*shape"], leaf: Leaf, num_devices: int) -> Shaped[A, "D U q"]:
    """What each device keeps of a whole leaf (NumPy or JAX), stacked: [D, U, ceil(p / D)]."""
    return cut(canonical(x, leaf), num_devices).swapaxes(0, 1)


def join(x: Shaped[A, "D U q"], leaf: Leaf) -> Shaped[A, "..."]:
    """The inverse of `split`."""
    x = x.swapaxes(0, 1)
    return restore(x.reshape(len(x), -1)[:, : leaf.row_size], leaf)


def stored_piece(leaf: Leaf, device: int, num_devices: int) -> tuple[int, int, int]:
    """(axis, start, stop) of the stored form that a device keeps."""
    size, step = leaf.row_size, -(-leaf.row_size // num_devices)
    return 1, min(device * step, size), min((device + 1) * step, size)


def to_stored(shard: Shaped[np.ndarray, "U q"], length: int) -> Shaped[np.ndarray, "U _"]:
    """That part, so many numbers of every row, from what the device keeps."""
    return shard[:, :length]


def cut_out(layout: Layout, leaf: Leaf, shard: Shard, draw: Draw) -> Parts:
    """What a gather sends: [D, W, n, q]."""
    send = shard.at[indices_of(leaf.groups[0], draw)].get(mode="fill", fill_value=0)
    return send.reshape(layout.num_devices, layout.workers_per_device, *send.shape[1:])


def assemble(layout: Layout, leaf: Leaf, got: Parts, draw: Draw) -> Float[Array, "W ..."]:
    """The leaf of this device's W subnets, [W, ...], from what has come."""
    rows = got.transpose(1, 2, 0, 3).reshape(*got.shape[1:3], -1)
    return restore(rows[..., : leaf.row_size], leaf)


def take_apart(layout: Layout, leaf: Leaf, x: Float[Array, "W ..."], draw: Draw) -> Parts:
    """What a merge sends, of the form that a gather receives: [D, W, n, q]."""
    return cut(canonical(x, leaf), layout.num_devices).transpose(2, 0, 1, 3)


def put_back(layout: Layout, leaf: Leaf, old: Shard, got: Parts, draw: Draw, flags: Flags) -> Shard:
    """This device's shard after a round, from what has come; `flags`, bool [S]: whose."""
    (group,) = leaf.groups
    indices = jnp.where(flags[:, None], indices_of(group, draw), group.size)
    return scatter(old, (indices,), got.reshape(-1, *got.shape[2:]), disjoint=group.disjoint)


def holders(layout: Layout, leaf: Leaf, draw: Draw, flags: Flags) -> Int[Array, "U q"]:
    """How many of the workers flagged hold each number of this device's shard; nobody holds the padding."""
    (group,) = leaf.groups
    indices = indices_of(group, draw)
    counts = jnp.broadcast_to(flags[:, None].astype(jnp.int32), indices.shape)
    held = jnp.zeros(group.size, jnp.int32).at[indices].add(counts, mode="drop")
    step = -(-leaf.row_size // layout.num_devices)
    real = lax.axis_index(AXIS) * step + jnp.arange(step) < leaf.row_size
    return jnp.where(real, held[:, None], 0)


def assigned(leaf: Leaf, num_workers: int) -> int | float:
    """Numbers of the leaf that all workers' subnets hold together, assigned slots only."""
    return sum(leaf.groups[0].counts) * leaf.row_size


def whole(leaf: Leaf, shard: Float[Array, "..."]) -> Float[Array, "..."]:
    """The whole leaf from what all devices keep; from a row's slice, one unit without its unit axis."""
    got = lax.all_gather(shard, AXIS)
    if shard.ndim == 1:  # a scan over the units runs around
        return got.reshape(-1)[: leaf.row_size].reshape(leaf.rest)
    return join(got, leaf)


def product(layout: Layout, leaf: Leaf, x: Inputs, shard: Shard) -> Float[Array, "B O"]:
    """x @ kernel, [B, O], of a leaf [I, O]: inputs and results travel, the kernel stays where it is."""
    x = inputs_of_all(x)
    if leaf.unit_axes == (1,):
        return multiply_slice(layout, x, shard.T)
    y = (x @ shard).reshape(layout.num_devices, -1, shard.shape[1])  # a slice of the outputs
    y = lax.all_to_all(y, AXIS, 0, 0)  # [D, B, slice]
    return y.swapaxes(0, 1).reshape(y.shape[1], -1)[:, : leaf.row_size]
