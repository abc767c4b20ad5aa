"""Evaluation of a model of which every device keeps a part: what a streamed model reads its parameters by.

Per device, with named-axis collectives, like `store`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ist_jax.exchange.layout import Layout
from ist_jax.exchange.store import AXIS, fetch
from ist_jax.models.sparse import Sparse


@dataclasses.dataclass(frozen=True, eq=False)
class Fetch:
    """A `models.Fetch`: leaves are gathered, or multiplied by where they are."""

    layout: Layout

    def __call__(self, path: str, shard: jax.Array) -> jax.Array:
        return fetch(self.layout, path, shard)

    def product(self, path: str, x: Any, shard: jax.Array) -> jax.Array:
        return product(self.layout, path, x, shard)


def product(layout: Layout, path: str, x: Any, shard: jax.Array) -> jax.Array:
    """x @ kernel on all devices together: inputs and results travel, the kernel stays where it is.

    Args:
      layout: from `make_layout`.
      path: of a leaf [I, O].
      x: this device's inputs, [B, I] or `Sparse`; B is the same on all devices.
      shard: what this device keeps of the leaf.

    Returns:
      [B, O], this device's results.
    """
    leaf, devices = layout.leaves[path], layout.num_devices
    if leaf.kind == "shared":
        return x @ shard
    x = jax.tree.map(lambda a: lax.all_gather(a, AXIS, tiled=True), x)  # the inputs of all devices, [D B, I]
    if leaf.unit_axes == (0,):  # a slice of the outputs
        y = (x @ shard).reshape(devices, -1, shard.shape[1])
        y = lax.all_to_all(y, AXIS, 0, 0)  # [D, B, slice]
        return y.swapaxes(0, 1).reshape(y.shape[1], -1)[:, : leaf.row_size]
    kernel = shard.T if leaf.kind == "rows" else shard.reshape(-1, leaf.shape[1])  # a slice of the inputs
    parts = (_slice(x, len(kernel), devices) @ kernel).reshape(devices, -1, kernel.shape[1])
    return lax.all_to_all(parts, AXIS, 0, 0).sum(0)


def operands(layout: Layout, path: str, x: Any) -> tuple[int, int]:
    """Bytes of the operands of a `product`'s collectives: of the all-gathers and of the all-to-all.

    Args:
      layout: from `make_layout`.
      path: of the leaf.
      x: the inputs, or their shapes.
    """
    leaf = layout.leaves[path]
    if leaf.kind == "shared":
        return 0, 0
    leaves = jax.tree.leaves(x)
    width = layout.slice_size(path) if leaf.unit_axes == (0,) else leaf.shape[1]
    dtype = layout.dtype if isinstance(x, Sparse) else x.dtype
    inputs = sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)
    return inputs, layout.num_devices * len(leaves[0]) * width * dtype.itemsize


def _slice(x: Any, size: int, devices: int) -> Any:
    """This device's part of the input features, `size` of them."""
    first = lax.axis_index(AXIS) * size
    if isinstance(x, Sparse):  # what lies outside counts for nothing
        return Sparse(x.index - first, x.value, x.count, size)
    x = jnp.pad(x, ((0, 0), (0, devices * size - x.shape[1])))
    return lax.dynamic_slice_in_dim(x, first, size, 1)
