"""What a round costs, by formula: parameters, bytes and memory; `audit` puts compiled programs beside it.

Two counts of bytes, which must not be mixed up:

  paper  as the papers count: 4 bytes (the dtype's) x 2 directions x the parameters of all subnets; the
         slots that are assigned, whoever's memory they already are in.
  wire   bytes that leave a device in the compiled collectives: n slots per worker, empty ones
         included, rows padded to the devices; a worker's own part does not move, one device sends
         nothing. A device receives as many. `collective_operands` are the same programs' operands, own
         parts included.

Method 'local_sgd' sends every worker's whole model both ways once a round, 'data_parallel' once a step.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from ist_jax.costs import traced as flops
from ist_jax.costs.traced import sent
from ist_jax.exchange.layout import Layout, Leaf
from ist_jax.methods import local_sgd
from ist_jax.methods.local_sgd import Recipe
from ist_jax.models.sparse import Sparse
from ist_jax.task import Task

_COUNT_BYTES = 4  # int32: how many workers were healthy, summed beside the gradients


class Operands(NamedTuple):
    """Bytes of the collectives' operands per device, in one exchange of one parameter-shaped tree."""

    gather: int  # all-to-all of the units
    merge: int  # all-to-all of the units, of slices of the shared leaves, and of a flag per worker
    merge_shared: int  # all-gather of the merged slices


def collective_operands(layout: Layout) -> Operands:
    """The operands that the compiled gather and merge must have; all 0 on one device."""
    devices, workers, item = layout.num_devices, layout.workers_per_device, layout.dtype.itemsize
    if devices == 1:
        return Operands(0, 0, 0)
    units = sum(_unit_operand(layout, path, leaf) for path, leaf in layout.leaves.items())
    shared = sum(leaf.row_size for leaf in layout.leaves.values() if leaf.kind == "shared")
    shared += -shared % devices
    flags = layout.num_workers
    return Operands(units * item, (units + workers * shared + flags) * item, shared // devices * item)


# --- bytes that a device sends ---------------------------------------------------------------------


def round_bytes(layout: Layout, *, trees: int = 1, averaged_steps: int = 0) -> dict[str, float]:
    """Bytes that one device sends in a round, by cause.

    Args:
      layout: of the store.
      trees: parameter-shaped trees that are exchanged: 1, and 1 more per carried moment.
      averaged_steps: l of data-parallel SGD, 0 for the other methods.

    Returns:
      'gather' of the units, 'merge_units', and 'merge_shared': the shared leaves and a flag per worker
      (healthy or not); or 'gradients': a ring all-reduce of them and of a count in each step.
    """
    devices = layout.num_devices
    if averaged_steps:
        operand = layout.dtype.itemsize * model_parameters(layout) + _COUNT_BYTES
        return {"gradients": sent("all-reduce", averaged_steps * operand, devices)}
    operands = collective_operands(layout)
    units = sent("all-to-all", operands.gather, devices)
    shared = sent("all-to-all", operands.merge - operands.gather, devices)
    shared += sent("all-gather", operands.merge_shared, devices)
    return {"gather": trees * units, "merge_units": trees * units, "merge_shared": trees * shared}


def evaluation_bytes(
    layout: Layout, batches: int, *, streamed: bool, products: Mapping[str, tuple[int, int]]
) -> float:
    """Bytes that one device sends in an evaluation: all-gathers of every unit, or of what multiplies it.

    Args:
      layout: of the store.
      batches: evaluation batches per device.
      streamed: the model is gathered a block or layer at a time, for every batch (the compiler may do with
        less where they are few); else whole, once.
      products: of the leaves that stay where they are, `fetch.operands` in a batch.
    """
    units = sum(
        _shard_size(layout, path)
        for path, leaf in layout.leaves.items()
        if leaf.kind != "shared" and path not in products
    )
    gathered = units * layout.dtype.itemsize * (batches if streamed else 1)
    inputs, results = (batches * sum(operands) for operands in zip((0, 0), *products.values(), strict=True))
    devices = layout.num_devices
    return sent("all-gather", gathered + inputs, devices) + sent("all-to-all", results, devices)


def wire_bytes(layout: Layout, *, trees: int = 1) -> float:
    """Bytes that one device sends in a round of gather and merge; arguments as of `round_bytes`."""
    return sum(round_bytes(layout, trees=trees).values())


# --- parameters, and the papers' count ------------------------------------------------------------


def subnet_parameters(layout: Layout) -> float:
    """Parameters of all workers' subnets together, assigned slots only (a mean where draws differ)."""
    return sum(_assigned(layout, leaf) for leaf in layout.leaves.values())


def largest_subnet(layout: Layout) -> int:
    """Parameters of the largest subnet that a worker can be dealt."""
    if all(group.fair for group in layout.groups.values()):  # who gets a remainder is drawn for each group
        return slot_parameters(layout)

    def parameters(worker: int) -> int:
        counts = {name: group.counts[worker] for name, group in layout.groups.items()}
        return sum(
            math.prod(counts[group.name] for group in leaf.groups) * leaf.row_size
            for leaf in layout.leaves.values()
        )

    return max(parameters(worker) for worker in range(layout.num_workers))


def subnet_shapes(layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """A subnet's arrays by path: every worker's have room for the n slots of the largest."""
    return {
        path: jax.ShapeDtypeStruct(_subnet_shape(leaf), layout.dtype) for path, leaf in layout.leaves.items()
    }


def _subnet_shape(leaf: Leaf) -> tuple[int, ...]:
    slots = {axis: group.slots for axis, group in zip(leaf.unit_axes, leaf.groups, strict=True)}
    return tuple(slots.get(axis, size) for axis, size in enumerate(leaf.shape))


def slot_parameters(layout: Layout) -> int:
    """Parameters of a subnet with all of its slots filled."""
    return sum(math.prod(_subnet_shape(leaf)) for leaf in layout.leaves.values())


def model_parameters(layout: Layout) -> int:
    """Parameters of the global model."""
    return sum(math.prod(leaf.shape) for leaf in layout.leaves.values())


def paper_bytes_per_round(layout: Layout, *, trees: int = 1) -> float:
    """Bytes of a round by the papers' count, of all workers together, both directions."""
    return sum(paper_bytes(layout, trees=trees).values())


def paper_bytes(layout: Layout, *, trees: int = 1, averaged_steps: int = 0) -> dict[str, float]:
    """The papers' count of a round, of all workers together; arguments and causes as of `round_bytes`."""
    if averaged_steps:
        return {"gradients": averaged_steps * full_model_bytes(layout)}
    item = layout.dtype.itemsize * trees
    shared = item * sum(_assigned(layout, leaf) for leaf in layout.leaves.values() if leaf.kind == "shared")
    units = item * subnet_parameters(layout) - shared
    return {"gather": units, "merge_units": units, "merge_shared": 2 * shared}


def full_model_bytes(layout: Layout) -> int:
    """The papers' count of one exchange of the whole model by all workers: a round of local SGD."""
    return 2 * layout.dtype.itemsize * model_parameters(layout) * layout.num_workers


# --- memory and FLOPs ------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes that a device keeps while its workers train; not gradients, activations, buffers and data."""

    store: int  # its part of the global model and of carried moments, padding included
    subnets: int  # its workers' subnets and their carried moments, empty slots included
    optimizer: int  # state that is made anew in every round, of the workers that train at the same time


def memory(recipe: Recipe, *, in_place: bool) -> Memory:
    """What a device keeps.

    Args:
      recipe: what a worker does.
      in_place: data-parallel SGD, which trains the store itself.
    """
    layout, shapes = recipe.layout, subnet_shapes(recipe.layout)
    trees = exchanged_trees(recipe)
    store = layout.dtype.itemsize * sum(_shard_size(layout, path) for path in layout.leaves)
    if in_place:
        return Memory(trees * store, 0, 0)
    fresh = () if recipe.carry else jax.eval_shape(recipe.tx.init, shapes)
    at_once = layout.workers_per_device if recipe.vmapped else 1
    subnets = trees * layout.workers_per_device * _bytes(shapes)
    return Memory(trees * store, subnets, at_once * _bytes(fresh))


def exchanged_trees(recipe: Recipe) -> int:
    """Parameter-shaped trees of the state: the parameters, and what moments are carried."""
    state = jax.eval_shape(partial(local_sgd.init_state, recipe), subnet_shapes(recipe.layout))
    return len(state.trees)


def step_flops(recipe: Recipe, task: Task, batch_size: int) -> float:
    """FLOPs of a local step of a subnet with all of its slots filled, as `flops` counts.

    Args:
      recipe: what a worker does.
      task: what it is shown.
      batch_size: examples per step.
    """
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), task.example)
    labels = (batch_size, 1) if isinstance(task.example, Sparse) else (batch_size,)  # as good as any number
    groups = recipe.layout.groups.values()
    gates = {g.name: jax.ShapeDtypeStruct((g.slots,), bool) for g in groups if not g.even}
    return flops.step_flops(
        recipe.loss_fn,
        subnet_shapes(recipe.layout),
        inputs,
        jax.ShapeDtypeStruct(labels, np.int32),
        gates or None,
    )


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _shard_size(layout: Layout, path: str) -> int:
    """Numbers of a leaf that one device keeps."""
    leaf, workers = layout.leaves[path], layout.workers_per_device
    if leaf.kind == "shared":
        return leaf.row_size
    if leaf.kind == "rows":
        return leaf.groups[0].size * layout.slice_size(path)
    return workers * leaf.groups[0].strip_size * leaf.groups[1].size * leaf.row_size


def _unit_operand(layout: Layout, path: str, leaf: Leaf) -> int:
    if leaf.kind == "rows":
        return layout.num_workers * leaf.groups[0].slots * layout.slice_size(path)
    if leaf.kind == "pairs":
        block = leaf.groups[0].strip_slots * leaf.groups[1].slots * leaf.row_size
        return layout.num_workers * layout.workers_per_device * block
    return 0


def _assigned(layout: Layout, leaf: Leaf) -> float:
    counts = [group.counts for group in leaf.groups]
    if leaf.kind == "shared":
        return layout.num_workers * leaf.row_size
    if leaf.kind == "rows":
        return sum(counts[0]) * leaf.row_size
    if leaf.groups[0].fair and leaf.groups[0].name != leaf.groups[1].name:  # independent draws
        return sum(counts[0]) * sum(counts[1]) / layout.num_workers * leaf.row_size
    return sum(a * b for a, b in zip(*counts, strict=True)) * leaf.row_size
