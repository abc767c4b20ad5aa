"""How a model is cut up over the devices: the static description, and one leaf's split and join.

Per device k of D, hosting W = S / D workers, a leaf is kept as

  shared  [...]                     the whole leaf, on every device; no unit axis.
  rows    [U, ceil(p / D)]          one unit axis. A unit's p numbers are a row, and a device keeps a
                                    slice of *every* row, so that whatever units a worker draws, it
                                    pulls exactly n slices from each device.
  pairs   [W, U_in / S, U_out, R]   two unit axes. The first is cut into S contiguous strips, W per
                                    device. The draw is stratified (`partition.Group.strips`): a worker
                                    holds at most m units of each strip, so it pulls exactly m x n_out
                                    entries of each; 1 / S^2 of the matrix where S^2 divides U_in.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ist_jax.partition import Axes, Group

AXIS = "devices"  # the name that collectives go by
Shards = dict[str, jax.Array]  # what a device keeps of every leaf, by path
_INIT_PARTS = 2


class Leaf(NamedTuple):
    """Where the units of a leaf are: global shape, axes with units, and their groups."""

    shape: tuple[int, ...]
    unit_axes: tuple[int, ...]
    groups: tuple[Group, ...]

    @property
    def kind(self) -> str:
        return ("shared", "rows", "pairs")[len(self.unit_axes)]

    @property
    def rest(self) -> tuple[int, ...]:
        """Sizes of the axes without units."""
        return tuple(s for a, s in enumerate(self.shape) if a not in self.unit_axes)

    @property
    def row_size(self) -> int:
        """p: the numbers per unit (rows) or per pair of units (pairs)."""
        return int(np.prod(self.rest, dtype=int))


class Layout(NamedTuple):
    """The static description of a sharded model: what `gather` and `merge` are compiled for."""

    leaves: dict[str, Leaf]
    groups: dict[str, Group]
    dtype: np.dtype
    num_workers: int
    num_devices: int

    @property
    def workers_per_device(self) -> int:
        return self.num_workers // self.num_devices

    def slice_size(self, path: str) -> int:
        """Numbers of a row that one device keeps, padding included."""
        return -(-self.leaves[path].row_size // self.num_devices)


def make_layout(
    params: Any, axes: Axes, groups: Mapping[str, Group], num_workers: int, num_devices: int
) -> Layout:
    """Describes how a model is sharded.

    Args:
      params: nested dict of arrays or shapes, all of one floating dtype.
      axes: from `partition.resolve_axes`; a leaf's axes of groups not in `groups` are shared.
      groups: from `partition.make_groups`; empty for local SGD and data-parallel SGD.
      num_workers: S.
      num_devices: D, a divisor of S.

    Raises:
      ValueError: D does not divide S, or the leaves differ in dtype.
    """
    if num_workers % num_devices:
        raise ValueError(
            f"num_devices={num_devices} does not divide num_workers={num_workers}; set "
            f"config.num_devices to one of {[d for d in range(1, num_workers + 1) if num_workers % d == 0]}"
        )
    flat = traverse_util.flatten_dict(params, sep="/")
    dtypes = sorted({str(x.dtype) for x in flat.values()})
    if len(dtypes) != 1 or not jnp.issubdtype(dtypes[0], jnp.floating):
        raise ValueError(f"parameters must share one floating dtype, these have {', '.join(dtypes)}")
    leaves = {}
    for path, x in sorted(flat.items()):
        where = tuple(a for a, name in enumerate(axes[path]) if name in groups)
        leaves[path] = Leaf(tuple(x.shape), where, tuple(groups[axes[path][a]] for a in where))  # type: ignore[index]
    return Layout(leaves, dict(groups), np.dtype(dtypes[0]), num_workers, num_devices)


def regroup(layout: Layout, groups: Mapping[str, Group]) -> Layout:
    """The same shards on the same devices for other draws: `groups` of the same names, sizes and strips."""
    leaves = {
        path: leaf._replace(groups=tuple(groups[group.name] for group in leaf.groups))
        for path, leaf in layout.leaves.items()
    }
    return layout._replace(leaves=leaves, groups=dict(groups))


# --- one leaf: its canonical form, and the form split over the devices ---------------------------


def canonical(x: Any, leaf: Leaf) -> Any:
    """[..., units..., p] from [..., shape]: unit axes first, the rest raveled; leading axes kept."""
    lead = x.ndim - len(leaf.shape)
    where = tuple(lead + a for a in leaf.unit_axes)
    order = (*range(lead), *where, *(a for a in range(lead, x.ndim) if a not in where))
    x = x.transpose(order)
    return x.reshape(*x.shape[: lead + len(where)], -1)


def restore(x: Any, leaf: Leaf) -> Any:
    """The inverse of `canonical`, for any number of units."""
    lead = x.ndim - 1 - len(leaf.unit_axes)
    x = x.reshape(*x.shape[:-1], *leaf.rest)
    rest = iter(range(lead + len(leaf.unit_axes), x.ndim))
    unit = {a: lead + i for i, a in enumerate(leaf.unit_axes)}
    return x.transpose(
        (*range(lead), *(unit[a] if a in unit else next(rest) for a in range(len(leaf.shape))))
    )


def split(x: Any, leaf: Leaf, num_devices: int) -> Any:
    """What each device keeps of a whole leaf (NumPy or JAX), stacked: [D, ...]."""
    pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
    if leaf.kind == "shared":
        wide = np.broadcast_to if isinstance(x, np.ndarray) else jnp.broadcast_to
        return wide(x, (num_devices, *x.shape))
    x = canonical(x, leaf)
    if leaf.kind == "rows":
        x = pad(x, ((0, 0), (0, -x.shape[1] % num_devices)))
        return x.reshape(len(x), num_devices, -1).swapaxes(0, 1)
    group = leaf.groups[0]
    x = pad(x, ((0, group.strips * group.strip_size - len(x)), (0, 0), (0, 0)))
    return x.reshape(num_devices, -1, group.strip_size, *x.shape[1:])


def join(x: Any, leaf: Leaf) -> Any:
    """The inverse of `split`: the whole leaf from [D, ...]."""
    if leaf.kind == "shared":
        return x[0]
    if leaf.kind == "rows":
        x = x.swapaxes(0, 1)
        return restore(x.reshape(len(x), -1)[:, : leaf.row_size], leaf)
    return restore(x.reshape(-1, *x.shape[3:])[: leaf.groups[0].size], leaf)


# --- one leaf on disk: its canonical form without padding, whatever the devices ---------------------


def stored_shape(leaf: Leaf) -> tuple[int, ...]:
    """The shape of `canonical` (that of the leaf itself, where it is shared)."""
    if leaf.kind == "shared":
        return leaf.shape
    return (*(leaf.shape[a] for a in leaf.unit_axes), leaf.row_size)


def stored_piece(leaf: Leaf, device: int, num_devices: int) -> tuple[int, int, int]:
    """(axis, start, stop): the part of the stored form that a device keeps; shared leaves are device 0's."""
    if leaf.kind == "shared":
        return 0, 0, (leaf.shape or (1,))[0] if device == 0 else 0
    if leaf.kind == "rows":
        axis, size, step = 1, leaf.row_size, -(-leaf.row_size // num_devices)
    else:
        axis, size = 0, leaf.groups[0].size
        step = leaf.groups[0].strip_size * leaf.groups[0].strips // num_devices
    return axis, min(device * step, size), min((device + 1) * step, size)


def to_stored(shard: np.ndarray, leaf: Leaf, device: int, num_devices: int) -> np.ndarray:
    """That part, from what the device keeps."""
    if leaf.kind == "shared":
        return shard
    _, start, stop = stored_piece(leaf, device, num_devices)
    if leaf.kind == "rows":
        return shard[:, : stop - start]
    return shard.reshape(-1, *shard.shape[2:])[: stop - start]


# --- the whole model ------------------------------------------------------------------------------


def init_parts(layout: Layout) -> list[list[str]]:
    """Leaves to initialise together, so that the whole model is never made at once.

    Every part holds at most half of the parameters, or one leaf.
    """
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in layout.leaves.items()}
    limit = sum(sizes.values()) / _INIT_PARTS
    parts: list[list[str]] = []
    for path in sorted(sizes, key=lambda path: -sizes[path]):
        fits = [part for part in parts if sum(sizes[p] for p in part) + sizes[path] <= limit]
        if fits:
            fits[0].append(path)
        else:
            parts.append([path])
    return parts


def from_params(layout: Layout, params: Any) -> dict[str, np.ndarray]:
    """Shards of given parameters (host arrays) on all devices, stacked: [D, ...] by path.

    Raises:
      ValueError: `params` are not those of the layout.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    shapes = {path: tuple(x.shape) for path, x in flat.items()}
    if shapes != {path: leaf.shape for path, leaf in layout.leaves.items()}:
        raise ValueError("the parameters' names or shapes are not those of the model")
    return {p: split(np.asarray(flat[p]), leaf, layout.num_devices) for p, leaf in layout.leaves.items()}


def iter_leaves(layout: Layout, shards: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(path, whole leaf) on the host, one leaf at a time, in the order of the paths."""
    for path, leaf in layout.leaves.items():
        yield path, join(np.asarray(shards[path]), leaf)


def to_params(layout: Layout, shards: Mapping[str, Any]) -> Any:
    """The global parameters as a nested dict of host arrays, from shards stacked on axis 0."""
    return traverse_util.unflatten_dict(dict(iter_leaves(layout, shards)), sep="/")
