"""Parameters, the papers' count of local SGD, memory and FLOPs: what shapes alone tell."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from ist_jax.costs import traced
from ist_jax.data import Split
from ist_jax.exchange.kinds import kind_of, subnet_shapes
from ist_jax.exchange.layout import Layout
from ist_jax.methods.method import Recipe, Told, TracedPhase


def model_parameters(layout: Layout) -> int:
    """Parameters of the global model."""
    return sum(math.prod(leaf.shape) for leaf in layout.leaves.values())


def subnet_parameters(layout: Layout) -> float:
    """Parameters of all workers' subnets together, assigned slots only (a mean where draws differ)."""
    return sum(kind_of(leaf).assigned(leaf, layout.num_workers) for leaf in layout.leaves.values())


def slot_parameters(layout: Layout) -> int:
    """Parameters of a subnet with all of its slots filled."""
    return sum(math.prod(leaf.subnet_shape) for leaf in layout.leaves.values())


def largest_subnet(layout: Layout) -> int:
    """Parameters of the largest subnet that a worker can be dealt."""
    if all(group.fair for group in layout.groups.values()):  # who gets a remainder is drawn for each group
        return slot_parameters(layout)

    def parameters(worker: int) -> int:
        leaves = layout.leaves.values()
        return sum(math.prod(g.counts[worker] for g in leaf.groups) * leaf.row_size for leaf in leaves)

    return max(parameters(worker) for worker in range(layout.num_workers))


def local_sgd_bytes(layout: Layout, travels: PyTree = ()) -> int:
    """The papers' count of what a worker would exchange in a round of local SGD: the whole model both ways.

    Args:
      layout: of the model.
      travels: moments that go with it, one tree of the model's size each.
    """
    trees = 1 + sum(map(layout.is_tree, jax.tree.leaves(travels, is_leaf=layout.is_tree)))
    return 2 * trees * layout.dtype.itemsize * model_parameters(layout)


class Memory(NamedTuple):
    """Bytes that a device keeps while its workers train; not gradients, activations, buffers and data."""

    store: int  # its part of the state: global model and moments, padding included
    subnets: int  # its workers' subnets and their moments that outlast the round, empty slots included
    optimizer: int  # state that is made anew in every round, of the workers that train at the same time


def memory(recipe: Recipe, phases: Mapping[str, TracedPhase]) -> Memory:
    """What a device keeps.

    Args:
      recipe: what the method is made from.
      phases: of its round, from `methods.method.trace`.
    """
    every = list(phases.values())
    subnets = max((_bytes(phase.result) for phase in every[:-1]), default=0)
    tx = recipe.policy.transform(recipe.layout, recipe.tx)
    moments = jax.eval_shape(tx.init, subnet_shapes(recipe.layout))
    fresh = _bytes(moments) - _bytes(recipe.policy.end(moments))
    at_once = recipe.layout.workers_per_device if recipe.vmapped else 1
    return Memory(_bytes(every[0].inputs[0]), subnets, at_once * fresh)


def step_flops(recipe: Recipe, data: Split, batch_size: int) -> float:
    """FLOPs of a local step of a subnet with all of its slots filled, as `traced` counts.

    Args:
      recipe: what a worker does.
      data: shapes of the training examples on a device.
      batch_size: examples per step.
    """
    numbers, key = jax.ShapeDtypeStruct((batch_size,), np.int32), jax.eval_shape(jax.random.key, 0)
    inputs, labels = jax.eval_shape(recipe.batch_fn, dict(data), numbers, key)
    groups = recipe.layout.groups.values()
    gates = {g.name: jax.ShapeDtypeStruct(g.shape[1:], bool) for g in groups if not g.even}
    return traced.step_flops(recipe.loss_fn, subnet_shapes(recipe.layout), inputs, labels, gates or None, key)


def _bytes(shapes: PyTree) -> int:
    """Of all arrays but those that a worker is heard by."""
    leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, Told))
    return sum(x.size * x.dtype.itemsize for x in leaves if not isinstance(x, Told))
