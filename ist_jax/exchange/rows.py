"""Leaves with one unit axis, kept as [U, ceil(p / D)].

A unit's p numbers are a row, and a device keeps a slice of *every* row: whatever units a worker draws, it
pulls exactly n slices from each device.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from ist_jax.exchange.layout import AXIS, A, Draw, Layout, Leaf, Shards, canonical, cut, pad, restore
from ist_jax.exchange.scatter import scatter
from ist_jax.exchange.wire import inputs_of_all, multiply_slice
from ist_jax.models.sparse import Sparse


def split(x: Shaped[A, "*shape"], leaf: Leaf, num_devices: int) -> Shaped[A, "D U q"]:
    """What each device keeps of a whole leaf (NumPy or JAX), stacked: [D, U, ceil(p / D)]."""
    x = canonical(x, leaf)
    x = pad(x, (0, 0), (0, -x.shape[1] % num_devices))
    return x.reshape(len(x), num_devices, -1).swapaxes(0, 1)


def join(x: Shaped[A, "D U q"], leaf: Leaf) -> Shaped[A, "..."]:
    """The inverse of `split`."""
    x = x.swapaxes(0, 1)
    return restore(x.reshape(len(x), -1)[:, : leaf.row_size], leaf)


def stored_piece(leaf: Leaf, device: int, num_devices: int) -> tuple[int, int, int]:
    """(axis, start, stop) of the stored form that a device keeps."""
    size, step = leaf.row_size, -(-leaf.row_size // num_devices)
    return 1, min(device * step, size), min((device + 1) * step, size)


def to_stored(
    shard: Shaped[np.ndarray, "U q"], leaf: Leaf, device: int, num_devices: int
) -> Shaped[np.ndarray, "U _"]:
    """That part, from what the device keeps."""
    _, start, stop = stored_piece(leaf, device, num_devices)
    return shard[:, : stop - start]


def cut_out(layout: Layout, shards: Shards, draw: Draw) -> PyTree[Float[Array, "D W _ _"]]:
    """What a gather sends, by path: [D, W, n, q], first axis: destination."""

    def own(path: str, shard: jax.Array) -> jax.Array:
        send = shard.at[_indices(layout.leaves[path], draw)].get(mode="fill", fill_value=0)
        return send.reshape(layout.num_devices, layout.workers_per_device, *send.shape[1:])

    return {path: own(path, shard) for path, shard in shards.items()}


def assemble(
    layout: Layout, parts: PyTree[Float[Array, "D W ..."]], draw: Draw
) -> PyTree[Float[Array, "W ..."]]:
    """This device's W subnets' leaves, [W, ...], from what has come."""
    del draw

    def own(leaf: Leaf, got: jax.Array) -> jax.Array:  # [D, W, n, q]
        rows = got.transpose(1, 2, 0, 3).reshape(layout.workers_per_device, got.shape[2], -1)
        return restore(rows[..., : leaf.row_size], leaf)

    return {path: own(layout.leaves[path], got) for path, got in parts.items()}


def take_apart(
    layout: Layout, subnets: PyTree[Float[Array, "W ..."]], draw: Draw
) -> PyTree[Float[Array, "D W _ _"]]:
    """What a merge sends, by path: [D, W, n, q]."""
    del draw
    return {
        path: cut(canonical(x, layout.leaves[path]), layout.num_devices).transpose(2, 0, 1, 3)
        for path, x in subnets.items()
    }


def put_back(
    layout: Layout,
    old: Shards,
    parts: PyTree[Float[Array, "D W ..."]],
    draw: Draw,
    flags: Bool[Array, " S"],
) -> Shards:
    """This device's shards after a round, from what has come; `flags`, bool [S]: whose."""

    def own(path: str, shard: jax.Array) -> jax.Array:
        (group,) = layout.leaves[path].groups
        got = parts[path].reshape(layout.num_workers, *parts[path].shape[2:])
        indices = jnp.where(flags[:, None], _indices(layout.leaves[path], draw), group.size)
        return scatter(shard, (indices,), got, disjoint=group.disjoint)

    return {path: own(path, shard) for path, shard in old.items()}


def assigned(leaf: Leaf, num_workers: int) -> int | float:
    """Numbers of the leaf that all workers' subnets hold together, assigned slots only."""
    del num_workers
    return sum(leaf.groups[0].counts) * leaf.row_size


def whole(layout: Layout, leaf: Leaf, shard: Float[Array, "..."]) -> Float[Array, "..."]:
    """The whole leaf from what all devices keep; from a row's slice, one unit without its unit axis."""
    del layout
    got = lax.all_gather(shard, AXIS)
    if shard.ndim == 1:  # a scan over the units runs around
        return got.reshape(-1)[: leaf.row_size].reshape(leaf.rest)
    return join(got, leaf)


def product(
    layout: Layout, leaf: Leaf, x: Float[Array, "B I"] | Sparse, shard: Float[Array, "..."]
) -> Float[Array, "B O"]:
    """x @ kernel, [B, O], of a leaf [I, O]: inputs and results travel, the kernel stays where it is."""
    x = inputs_of_all(x)
    if leaf.unit_axes == (1,):
        return multiply_slice(layout, x, shard.T)
    y = (x @ shard).reshape(layout.num_devices, -1, shard.shape[1])  # a slice of the outputs
    y = lax.all_to_all(y, AXIS, 0, 0)  # [D, B, slice]
    return y.swapaxes(0, 1).reshape(y.shape[1], -1)[:, : leaf.row_size]


def _indices(leaf: Leaf, draw: Draw) -> Int[Array, "S n"]:
    return jnp.asarray(draw[leaf.groups[0].name].indices)  # [S, n]
