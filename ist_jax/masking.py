"""What a partition means: masks, gather and merge on whole parameter pytrees.

This is the semantics of everything else, on one device, with no collectives; `store` does the same
on a sharded model and must agree bit for bit. A worker *holds* an entry of a leaf when it holds the
unit on each of the leaf's unit axes; leaves without unit axes are shared and held by all. On an axis of
`Blocks`, a unit is several entries, and a subnet's axis has the same form with fewer units. On an axis of
`Each`, the units are held layer by layer, so that a stack of layers is what each of them is alone.

  gather  cuts a worker's subnet out of the global parameters: real, small arrays (arXiv:1910.02120).
  merge   puts the trained subnets back. An entry held by one worker is copied; one held by several
          becomes the mean over them (arXiv:2107.00961, section 3), summed in the order of the
          workers; one that no healthy worker holds keeps its value.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from ist_jax.partition import Axes, Draw, Each, Names, as_blocks, layer_axis_of

Numbers: TypeAlias = Float[Array | np.ndarray, "..."]
Params: TypeAlias = PyTree[Numbers]
Index: TypeAlias = Int[Array | np.ndarray, "..."]
A = TypeVar("A", np.ndarray, Array)  # on the host or on a device
Leaf = Array | np.ndarray | jax.ShapeDtypeStruct
Flags: TypeAlias = Bool[Array | np.ndarray, " S"] | Sequence[bool]


def masks(params: PyTree[Leaf], axes: Axes, assignment: Draw, worker: int) -> PyTree[Bool[Array, "..."]]:
    """Which entries of every leaf a worker holds.

    Args:
      params: nested dict of arrays (or shapes).
      axes: unit axes by path, from `partition.resolve_axes`.
      assignment: by group name, from `partition.draw`.
      worker: 0 to S - 1.

    Returns:
      A pytree of the params' shape with bool arrays of the leaves' shapes.

    Raises:
      ValueError: an assignment is missing, has the wrong shape, or there is no such worker.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    check_assignment(flat, axes, assignment, worker)
    return _unflatten({p: _mask(x.shape, axes[p], assignment, worker) for p, x in flat.items()})


def gather(params: Params, axes: Axes, assignment: Draw, worker: int) -> Params:
    """Cuts the subnet of one worker out of the global parameters.

    Args:
      params: nested dict of arrays, the global model.
      axes: unit axes by path, from `partition.resolve_axes`.
      assignment: by group name, from `partition.draw`.
      worker: 0 to S - 1.

    Returns:
      A nested dict of the same structure; every axis of a group has the n slots of the assignment
      in place of the U units, of `Blocks` outer x n x inner entries. Empty slots are zero.

    Raises:
      ValueError: as for `masks`.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    check_assignment(flat, axes, assignment, worker)

    def cut(path: str, x: Numbers) -> Array:
        grid = _grid(x.shape, axes[path], assignment, worker)
        return jnp.asarray(x).at[grid].get(mode="fill", fill_value=0)

    return _unflatten({path: cut(path, x) for path, x in flat.items()})


def merge(
    params: Params, axes: Axes, assignment: Draw, subnets: Sequence[Params], healthy: Flags | None = None
) -> Params:
    """Puts the subnets of all workers back into the global parameters.

    Args:
      params: nested dict of arrays, the global model before the round.
      axes: unit axes by path, from `partition.resolve_axes`.
      assignment: the one that the subnets were gathered by.
      subnets: S nested dicts, as `gather` returned them, trained since.
      healthy: S flags; a worker that is not healthy is left out. None: all are.

    Returns:
      The global parameters after the round.

    Raises:
      ValueError: as for `masks`, or a subnet's leaf does not have the shape that was gathered.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    num_workers = len(subnets)
    for worker in range(num_workers):
        check_assignment(flat, axes, assignment, worker)
    flags = jnp.ones(num_workers, bool) if healthy is None else jnp.asarray(healthy)
    counts = {"healthy": len(flags)} | {name: len(a.indices) for name, a in assignment.items()}
    for name, count in counts.items():
        if count != num_workers:
            raise ValueError(f"{num_workers} subnets, but {name!r} is for {count} workers")
    pieces = [traverse_util.flatten_dict(subnet, sep="/") for subnet in subnets]
    for worker, piece in enumerate(pieces):
        if piece.keys() != flat.keys():
            raise ValueError(f"subnet {worker} lacks or adds {sorted(piece.keys() ^ flat.keys())}")

    def put_back(path: str, old: Numbers) -> Array:
        new = [_scatter(path, old, piece[path], axes[path], assignment, w) for w, piece in enumerate(pieces)]
        held = [_mask(old.shape, axes[path], assignment, w) & flags[w] for w in range(num_workers)]
        return ordered_mean(jnp.asarray(old), jnp.stack(new), jnp.stack(held))

    return _unflatten({path: put_back(path, old) for path, old in flat.items()})


def ordered_mean(
    old: Float[Array, "*shape"], new: Float[Array, " S *shape"], held: Bool[Array, " S *#shape"]
) -> Float[Array, "*shape"]:
    """Mean of `new` over the holders of each entry; `old` where there is none.

    Summed in the order of the workers, so that the result does not depend on the devices. A single
    holder's value, or one that all holders agree on, keeps its bits (a sum of equal values divided by
    their number would not, for 3, 5, 6, 7, ...). A worker that does not hold may be NaN.

    Args:
      old: before the round.
      new: of each worker.
      held: who counts, for each entry, or for all of them alike.

    Returns:
      The mean, of the dtype of `old`.
    """
    return mean_of_parts(old, (new, held), lambda part: part)


def mean_of_parts(
    old: Float[Array, "*shape"], parts: PyTree, read: Callable[[PyTree], tuple[Array, Array]]
) -> Float[Array, "*shape"]:
    """The same where a worker's values have yet to be put in their places.

    Args:
      old: before the round.
      parts: arrays [S, ...], what there is of each worker.
      read: a worker's part -> (its values, of the shape of `old`; bool, whether it holds them).
    """
    of_one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
    holders = jnp.zeros(jax.eval_shape(read, of_one)[1].shape, jnp.int32)
    tally = Tally(jnp.zeros_like(old), old, jnp.zeros(old.shape, bool), holders)

    def add(tally: Tally, part: PyTree) -> tuple[Tally, None]:
        value, holds = read(part)
        counted = tally.add(value)
        return jax.tree.map(lambda a, b: jnp.where(holds, a, b), counted, tally), None

    workers = len(jax.tree.leaves(parts)[0])
    tally, _ = lax.scan(add, tally, parts, unroll=min(workers, 8))
    return tally.mean()


class Tally(NamedTuple):
    """What is known of an entry while its holders are counted one after another."""

    total: Float[Array, "*shape"]
    first: Float[Array, "*shape"]  # the first holder's value; before there is one, the old value
    differs: Bool[Array, "*shape"]
    holders: Int[Array, "*#shape"]

    def add(self, value: Float[Array, "..."]) -> "Tally":
        """One more holder."""
        first = jnp.where(self.holders == 0, value, self.first)
        return Tally(self.total + value, first, self.differs | (value != first), self.holders + 1)

    def mean(self) -> Float[Array, "..."]:
        """The mean. As a product by a reciprocal, and without a sum after it, since XLA may write a
        division so and contract product and sum, in one program and not in another."""
        weight = 1 / jnp.maximum(self.holders, 1).astype(self.total.dtype)
        return jnp.where(self.differs, self.total * weight, self.first)


def check_assignment(flat: Mapping[str, Leaf], axes: Axes, assignment: Draw, worker: int) -> None:
    """Raises ValueError when an assignment does not fit the parameters."""
    for path, x in flat.items():
        if path not in axes or len(axes[path]) != x.ndim:
            raise ValueError(f"axes of {path} are {axes.get(path)}, but it has {x.ndim} axes")
        for along in axes[path]:
            if (blocks := as_blocks(along)) is None:
                continue
            if (name := blocks.name) not in assignment:
                raise ValueError(f"no assignment for unit group {name!r} of {path}")
            indices, gates = assignment[name]
            layers = (x.shape[along.axis],) if isinstance(along, Each) else ()
            if indices.shape != gates.shape or indices.ndim < 2 or indices.shape[1:-1] != layers:
                form = f"[workers, {layers[0]} layers, slots]" if layers else "[workers, slots]"
                raise ValueError(
                    f"assignment of {name!r}: indices {indices.shape} and gates {gates.shape} must both be "
                    f"{form} for {path}"
                )
            if not 0 <= worker < len(indices):
                raise ValueError(f"worker {worker} is not one of the {len(indices)} of {name!r}")


def _grid(shape: tuple[int, ...], names: Names, assignment: Draw, worker: int) -> tuple[Index, ...]:
    """Where the entries that a worker holds are in a leaf, by slots; outside of it for empty ones."""

    layer_axis = layer_axis_of(names)

    def along(axis: int) -> Index:
        size, blocks = shape[axis], as_blocks(names[axis])
        if blocks is None:
            return spread(np.arange(size), axis, layer_axis, len(shape))
        units, count = assignment[blocks.name].indices[worker], blocks.count(size)
        units, outer = units[..., None, :, None], np.arange(blocks.outer)[:, None, None]
        entries = (outer * count + units) * blocks.inner + np.arange(blocks.inner)
        entries += size * (units >= count)  # those of unit U are the next run's unit 0
        return spread(entries.reshape(*entries.shape[:-3], -1), axis, layer_axis, len(shape))

    return tuple(map(along, range(len(shape))))


def spread(x: Shaped[A, "..."], axis: int, layer_axis: int | None, ndim: int) -> Shaped[A, "..."]:
    """What is said of an axis of a leaf, [m], or of it in each layer, [L, m], to broadcast with the leaf."""
    if x.ndim == 1:
        return x.reshape([-1 if a == axis else 1 for a in range(ndim)])
    assert layer_axis is not None
    sizes = {layer_axis: x.shape[0], axis: x.shape[1]}
    return (x if layer_axis < axis else x.T).reshape([sizes.get(a, 1) for a in range(ndim)])


def _mask(shape: tuple[int, ...], names: Names, assignment: Draw, worker: int) -> Bool[Array, "..."]:
    return jnp.zeros(shape, bool).at[_grid(shape, names, assignment, worker)].set(True, mode="drop")


def _scatter(path: str, old: Numbers, piece: Numbers, names: Names, assignment: Draw, worker: int) -> Array:
    """A leaf of the global shape with the subnet's values where the worker holds, 0 elsewhere."""
    grid = _grid(old.shape, names, assignment, worker)
    if piece.shape != (expected := np.broadcast_shapes(*(along.shape for along in grid))):
        raise ValueError(f"subnet leaf {path} has shape {piece.shape}, expected {expected}")
    return jnp.zeros_like(old).at[grid].set(piece, mode="drop")


def _unflatten(flat: Mapping[str, Array | np.ndarray]) -> PyTree:
    return traverse_util.unflatten_dict(dict(flat), sep="/")
