"""One round on one device: local steps without communication, between a gather and a merge.

    assignment = partition.sample(...)                      data, never a shape
    units      = gather(state, assignment)                  all-to-all of the workers' units
    subnets    = local_steps(state, units, batches)         lax.scan, no collectives
    state      = merge(state, subnets, assignment)          means in worker order, sick workers left out

Local SGD is the same without unit groups; data-parallel SGD replaces the three phases by steps whose
gradients are averaged (`data_parallel_steps`). All functions are per device, plain JAX with collectives
over `store.AXIS`; `devices.compile_program` turns them into programs.

References:
  arXiv:1910.02120 (IST), arXiv:2107.00961 (ResIST), Stich, Local SGD Converges Fast and Communicates
  Little, arXiv:1805.09767, 2018.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ist_jax.exchange import store
from ist_jax.exchange.layout import Layout
from ist_jax.exchange.store import Assignments, Shards

Data = Mapping[str, jax.Array]
Gates = Mapping[str, jax.Array]


class Recipe(NamedTuple):
    """What every worker does.

    Attributes:
      layout: how the model is sharded.
      tx: gradient transformation before the learning rate; it must not depend on it.
      loss_fn: (flat params, inputs, labels, gates or None) -> (mean loss, mean of the first score).
      batch_fn: (data, indices [B], key) -> (inputs, labels).
      seed: of the augmentation.
      carry: keep the optimizer's state over rounds, exchanged with its parameters (else: reset).
      vmapped: a device's workers train together by `vmap` instead of one after another.
      unroll: local steps per iteration of the compiled loop.
    """

    layout: Layout
    tx: optax.GradientTransformation
    loss_fn: Callable[..., tuple[jax.Array, jax.Array]]
    batch_fn: Callable[..., tuple[jax.Array, jax.Array]]
    seed: int
    carry: bool
    vmapped: bool
    unroll: int = 1


class State(NamedTuple):
    """What is kept between rounds: parameter-shaped trees and other optimizer leaves, per device.

    `trees[0]` are the parameters; the others, where state is carried, moments such as momentum.
    """

    trees: tuple[Shards, ...]
    rest: tuple[jax.Array, ...]


class Metrics(NamedTuple):
    """Per worker of a device, [W]: mean over the local steps; and whether all of it was finite."""

    loss: Any
    accuracy: Any
    healthy: Any


def init_state(recipe: Recipe, params: Shards) -> State:
    """The state before the first round, from this device's shards of the parameters."""
    return _pack(recipe, params, recipe.tx.init(params) if recipe.carry else None)


def gather(recipe: Recipe, state: State, assignment: Assignments) -> tuple[Shards, ...]:
    """The unit leaves of this device's W subnets, for every tree of the state: [W, ...] each."""
    return tuple(store.gather(recipe.layout, tree, assignment) for tree in state.trees)


def local_steps(
    recipe: Recipe,
    state: State,
    units: tuple[Shards, ...],
    gates: Gates,
    data: Data,
    indices: jax.Array,
    learning_rates: jax.Array,
    round_index: jax.Array,
) -> tuple[State, Metrics]:
    """Trains this device's workers for l steps each, without communication.

    Args:
      recipe: what a worker does.
      state: of this device; its shared leaves are every worker's start.
      units: from `gather`.
      gates: bool [W, n] by group, only of groups in which a worker may have empty slots.
      data: the training set on this device.
      indices: int32 [W, l, B], the examples of each batch.
      learning_rates: float [l].
      round_index: int scalar, counted from 0; seeds the augmentation together with the worker.

    Returns:
      The subnets, as a State with leaves [W, ...], and metrics.
    """
    shared = tuple(store.shared(recipe.layout, tree) for tree in state.trees)

    def train(args: tuple) -> tuple[State, Metrics]:
        worker, own_units, own_gates, own_indices = args
        trees = tuple(s | u for s, u in zip(shared, own_units, strict=True))
        params, opt_state = _unpack(recipe, State(trees, state.rest))
        key = _worker_key(recipe, round_index, worker)

        def step(carry: tuple, xs: tuple) -> tuple[tuple, tuple]:
            params, opt_state = carry
            number, batch, learning_rate = xs
            inputs, labels = recipe.batch_fn(data, batch, jax.random.fold_in(key, number))
            (loss, accuracy), grads = jax.value_and_grad(recipe.loss_fn, has_aux=True)(
                params, inputs, labels, own_gates or None
            )
            grads = _clear_empty_slots(recipe.layout, grads, own_gates)
            params, opt_state = _update(recipe, params, opt_state, grads, learning_rate)
            return (params, opt_state), (loss, accuracy)

        xs = (jnp.arange(len(learning_rates)), own_indices, learning_rates)
        (params, opt_state), (losses, accuracies) = lax.scan(
            step, (params, opt_state), xs, unroll=recipe.unroll
        )
        subnet = _pack(recipe, params, opt_state)
        healthy = jnp.isfinite(losses).all() & _all_finite(subnet.trees)
        return subnet, Metrics(losses.mean(), accuracies.mean(), healthy)

    return _each_worker(recipe, train, (_worker_numbers(recipe.layout), units, dict(gates), indices))


def merge(recipe: Recipe, state: State, subnets: State, assignment: Assignments, healthy: jax.Array) -> State:
    """Puts the subnets of all healthy workers back; moments like the parameters they belong to."""
    trees = tuple(
        store.merge(recipe.layout, old, new, assignment, healthy)
        for old, new in zip(state.trees, subnets.trees, strict=True)
    )
    return State(trees, tuple(x[0] for x in subnets.rest))


def data_parallel_steps(
    recipe: Recipe,
    state: State,
    present: jax.Array,
    data: Data,
    indices: jax.Array,
    learning_rates: jax.Array,
    round_index: jax.Array,
) -> tuple[State, Metrics]:
    """l steps of data-parallel SGD on the same batches: gradients averaged over all workers each step.

    A worker whose loss or gradient is not finite is left out of that step's mean; a step whose update is not
    finite is not taken.

    Args and returns: as `local_steps`, and `present`, bool [W], whose gradients count; the state instead of
    subnets.
    """
    workers = _worker_numbers(recipe.layout)

    def step(carry: tuple, xs: tuple) -> tuple[tuple, tuple]:
        params, opt_state = carry
        number, batches, learning_rate = xs

        def gradient(args: tuple) -> tuple:
            worker, here, batch = args
            key = jax.random.fold_in(_worker_key(recipe, round_index, worker), number)
            inputs, labels = recipe.batch_fn(data, batch, key)
            (loss, accuracy), grads = jax.value_and_grad(recipe.loss_fn, has_aux=True)(
                params, inputs, labels, None
            )
            healthy = jnp.isfinite(loss) & _all_finite(grads)
            counts = healthy & here
            grads = jax.tree.map(lambda g: jnp.where(counts, g, 0), grads)
            return grads, loss, accuracy, healthy, counts

        grads, losses, accuracies, healthy, counts = _sum_over_workers(
            recipe, gradient, (workers, present, batches)
        )
        count = lax.psum(counts.sum(), store.AXIS)
        grads = jax.tree.map(lambda g: lax.psum(g, store.AXIS) / jnp.maximum(count, 1), grads)
        stepped = _update(recipe, params, opt_state, grads, learning_rate)
        sound = _all_finite(stepped[0])
        taken = sound & (count > 0)
        kept = jax.tree.map(lambda new, old: jnp.where(taken, new, old), stepped, carry)
        return kept, (losses, accuracies, healthy & sound)

    xs = (jnp.arange(len(learning_rates)), indices.swapaxes(0, 1), learning_rates)
    (params, opt_state), (losses, accuracies, healthy) = lax.scan(step, _unpack(recipe, state), xs)
    return _pack(recipe, params, opt_state), Metrics(losses.mean(0), accuracies.mean(0), healthy.all(0))


def _pack(recipe: Recipe, params: Shards, opt_state: Any) -> State:
    kept = (params, opt_state if recipe.carry else None)
    leaves = jax.tree.leaves(kept, is_leaf=lambda x: _is_tree(recipe.layout, x))
    trees = tuple(x for x in leaves if _is_tree(recipe.layout, x))
    return State(trees, tuple(x for x in leaves if not _is_tree(recipe.layout, x)))


def _unpack(recipe: Recipe, state: State) -> tuple[Shards, Any]:
    """(params, optimizer state), the latter fresh unless it is carried."""
    params = state.trees[0]
    if not recipe.carry:
        return params, recipe.tx.init(params)
    like = (params, jax.eval_shape(recipe.tx.init, params))
    leaves, treedef = jax.tree.flatten(like, is_leaf=lambda x: _is_tree(recipe.layout, x))
    trees, rest = iter(state.trees), iter(state.rest)
    return jax.tree.unflatten(treedef, [next(trees if _is_tree(recipe.layout, x) else rest) for x in leaves])


def _is_tree(layout: Layout, x: Any) -> bool:
    return isinstance(x, dict) and x.keys() == layout.leaves.keys()


def _update(recipe: Recipe, params: Shards, opt_state: Any, grads: Shards, lr: jax.Array) -> tuple:
    updates, opt_state = recipe.tx.update(grads, opt_state, params)
    return jax.tree.map(lambda p, u: p - (lr * u).astype(p.dtype), params, updates), opt_state


def _clear_empty_slots(layout: Layout, grads: Shards, gates: Gates) -> Shards:
    """Keeps the parameters of empty slots at the zeros that they were gathered as."""
    cleared = dict(grads)
    for path, leaf in layout.leaves.items():
        for axis, group in zip(leaf.unit_axes, leaf.groups, strict=True):
            if group.name in gates:
                others = [a for a in range(len(leaf.shape)) if a != axis]
                gate = jnp.expand_dims(gates[group.name], others)
                cleared[path] = jnp.where(gate, cleared[path], 0)
    return cleared


def _worker_numbers(layout: Layout) -> jax.Array:
    workers = layout.workers_per_device
    return lax.axis_index(store.AXIS) * workers + jnp.arange(workers)


def _worker_key(recipe: Recipe, round_index: jax.Array, worker: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(recipe.seed), round_index)
    return jax.random.fold_in(key, worker)


def _each_worker(recipe: Recipe, fn: Callable[[Any], Any], args: Any) -> Any:
    """`fn` for each of this device's workers, along the leading axis of `args`."""
    if recipe.layout.workers_per_device == 1:
        return jax.tree.map(lambda x: x[None], fn(jax.tree.map(lambda x: x[0], args)))
    return jax.vmap(fn)(args) if recipe.vmapped else lax.map(fn, args)


def _sum_over_workers(recipe: Recipe, fn: Callable[[Any], tuple], args: Any) -> tuple:
    """(sum of fn's first result, its other results stacked); one gradient in memory unless vmapped."""
    if recipe.layout.workers_per_device == 1 or recipe.vmapped:
        grads, *others = _each_worker(recipe, fn, args)
        return (jax.tree.map(lambda g: g.sum(0), grads), *others)

    def add(total: Any, own: Any) -> tuple[Any, tuple]:
        grads, *others = fn(own)
        return jax.tree.map(jnp.add, total, grads), tuple(others)

    shapes = jax.eval_shape(lambda a: fn(jax.tree.map(lambda x: x[0], a))[0], args)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, others = lax.scan(add, zeros, args)
    return (total, *others)


def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
