"""Local steps: what a worker does with its own parameters, without communication.

Everything here is per device. A method puts these together with an exchange.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from ist_jax.exchange.layout import AXIS, Layout, Shards
from ist_jax.masking import spread
from ist_jax.methods import keep
from ist_jax.methods.method import Gates, Losses, Policy, Recipe, Told, Turn

Rate = Float[Array, ""]
Carry = tuple[Shards, PyTree]  # parameters and the optimizer's state
Step = tuple[Int[Array, ""], Int[Array, " B"], Rate]  # its number, examples and learning rate
PerWorker: TypeAlias = PyTree[Shaped[Array, "W ..."]]

POLICIES: dict[str, Policy] = {
    # anew in every round, as in the papers
    "reset": Policy(
        init=lambda *_: ((), ()), start=lambda layout, tx, params, *_: tx.init(params), end=lambda _: ((), ())
    ),
    # of the shared leaves kept by each worker, never sent
    "keep": Policy(keep.init, keep.start, keep.end, keep.transform),
    # exchanged with the parameters, and merged like them
    "carry": Policy(
        init=lambda layout, tx, params: (tx.init(params), ()),
        start=lambda layout, tx, params, travels, own: travels,
        end=lambda state: (state, ()),
    ),
}


def train_worker(
    recipe: Recipe, params: PyTree[Float[Array, "..."]], opt_state: PyTree, turn: Turn, worker: Int[Array, ""]
) -> tuple[PyTree[Float[Array, "..."]], PyTree, Told]:
    """Trains one worker for l steps.

    Args:
      recipe: what a worker does.
      params: of its subnet, by path.
      opt_state: of `recipe.tx`.
      turn: of this worker alone: gates [n] or [L, n], indices [l, B].
      worker: its number, int scalar.

    Returns:
      The parameters and the optimizer's state after the steps, and what is told of them.
    """
    key = worker_key(recipe, turn, worker)

    def step(carry: Carry, xs: Step) -> tuple[Carry, Losses]:
        number, batch, rate = xs
        losses, grads = gradient(recipe, carry[0], turn, batch, jax.random.fold_in(key, number))
        return update(recipe, *carry, clear_empty_slots(recipe.layout, grads, turn.gates), rate), losses

    xs = (jnp.arange(len(turn.rates)), turn.indices, turn.rates)
    (params, opt_state), (losses, scores) = lax.scan(step, (params, opt_state), xs)
    healthy = jnp.isfinite(losses).all() & is_sound(params, recipe.policy.end(opt_state))
    return params, opt_state, Told(losses.mean(), scores.mean(), healthy)


def gradient(
    recipe: Recipe, params: Shards, turn: Turn, batch: Int[Array, " B"], key: Key[Array, ""]
) -> tuple[Losses, Shards]:
    """((mean loss, mean of the first score), gradient) of a batch of a worker; `key`: of its step."""
    inputs, labels = recipe.batch_fn(turn.data, batch, key)
    return jax.value_and_grad(recipe.loss_fn, has_aux=True)(params, inputs, labels, turn.gates or None, key)


def update(recipe: Recipe, params: Shards, opt_state: PyTree, grads: Shards, rate: Rate) -> Carry:
    """(parameters, optimizer state) after one step."""
    updates, opt_state = recipe.tx.update(grads, opt_state, params)
    return jax.tree.map(lambda p, u: p + (rate * u).astype(p.dtype), params, updates), opt_state


def clear_empty_slots(layout: Layout, grads: Shards, gates: Gates) -> Shards:
    """Keeps the parameters of empty slots at the zeros that they were gathered as."""
    cleared = dict(grads)
    for path, leaf in layout.leaves.items():
        for axis, group, (outer, inner) in zip(leaf.unit_axes, leaf.groups, leaf.blocks, strict=True):
            if group.name in gates:
                gate = jnp.repeat(gates[group.name], inner, axis=-1)
                gate = jnp.concatenate([gate] * outer, axis=-1)  # of every entry
                gate = spread(gate, axis, leaf.layer_axis, len(leaf.shape))
                cleared[path] = jnp.where(gate, cleared[path], 0)
    return cleared


def worker_numbers(layout: Layout) -> Int[Array, " W"]:
    """Of this device's workers, int32 [W]."""
    workers = layout.workers_per_device
    return lax.axis_index(AXIS) * workers + jnp.arange(workers)


def worker_key(recipe: Recipe, turn: Turn, worker: Int[Array, ""]) -> Key[Array, ""]:
    """A worker's key of a round: a function of the seed, the round and the worker alone."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(recipe.seed), turn.index), worker)


def each_worker(recipe: Recipe, fn: Callable[[PyTree], PyTree], args: PerWorker) -> PerWorker:
    """`fn` for each of this device's workers, along the leading axis of `args`."""
    if recipe.layout.workers_per_device == 1:
        return jax.tree.map(lambda x: x[None], fn(jax.tree.map(lambda x: x[0], args)))
    return jax.vmap(fn)(args) if recipe.vmapped else lax.map(fn, args)


def sum_over_workers(recipe: Recipe, fn: Callable[[PyTree], tuple], args: PerWorker) -> tuple:
    """(sum of fn's first result, its other results stacked); one gradient in memory unless vmapped."""
    if recipe.layout.workers_per_device == 1 or recipe.vmapped:
        grads, *others = each_worker(recipe, fn, args)
        return (jax.tree.map(lambda g: g.sum(0), grads), *others)

    def add(total: PyTree, own: PyTree) -> tuple[PyTree, tuple]:
        grads, *others = fn(own)
        return jax.tree.map(jnp.add, total, grads), tuple(others)

    shapes = jax.eval_shape(lambda a: fn(jax.tree.map(lambda x: x[0], a))[0], args)
    total, others = lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), args)
    return (total, *others)


def all_finite(tree: PyTree[Shaped[Array, "..."]]) -> Bool[Array, ""]:
    """Whether every number of every leaf is finite, a bool scalar."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def is_sound(params: Shards, opt_state: PyTree) -> Bool[Array, ""]:
    """Whether parameters and moments are finite; scalars of the state, such as counts, are not looked at."""
    return all_finite((params, [x for x in jax.tree.leaves(opt_state) if x.ndim]))
