"""Data-parallel SGD: the gradients are averaged over the workers in every step.

All workers have the same whole model; the optimizer's state is the same everywhere and never sent.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ist_jax.exchange.layout import AXIS, Shards
from ist_jax.methods import steps
from ist_jax.methods.method import Method, Recipe, State, Told, Turn

Step = tuple[Int[Array, ""], Int[Array, "W B"], Float[Array, ""]]  # its number, examples and learning rate
# of a worker, from (number, present, batch): its gradient, 0 where it does not count; whether it counts
Gradient: TypeAlias = Callable[[PyTree], tuple[Shards, Told, Bool[Array, ""]]]


class Averaged(NamedTuple):
    """A step's mean gradient.

    Attributes:
      grads: the same on all devices.
      own: what the workers keep until the next step, if this one is taken.
      told: of this device's workers.
      count: of all workers in the mean.
    """

    grads: Shards
    own: PyTree
    told: Told
    count: Int[Array, ""]  # type: ignore[assignment]  # a tuple has a method of the name


# (what the workers keep, `Gradient`, its arguments [W, ...]) -> the mean
Average: TypeAlias = Callable[[PyTree, Gradient, steps.PerWorker], Averaged]


def make(recipe: Recipe) -> Method:
    """The method; the layout has no groups."""

    def average(own: PyTree, gradient: Gradient, args: steps.PerWorker) -> Averaged:
        grads, told, counts = steps.sum_over_workers(recipe, gradient, args)
        count = lax.psum(counts.sum(), AXIS)
        mean = jax.tree.map(lambda g: lax.psum(g, AXIS) / jnp.maximum(count, 1), grads)
        return Averaged(mean, own, told, count)

    return averaging(recipe, average, lambda params: ())


def averaging(recipe: Recipe, average: Average, init_own: Callable[[Shards], PyTree]) -> Method:
    """SGD by a mean gradient of all workers.

    Args:
      recipe: what a worker does; its layout has no groups.
      average: makes the mean.
      init_own: parameters -> what the workers keep at first, [W, ...].
    """

    def init(params: Shards) -> State:
        return State(params, stays=recipe.tx.init(params), own=init_own(params))

    def local(state: State, _: None, turn: Turn) -> tuple[State, Told]:
        """l steps on the same batches as local SGD's.

        A worker whose loss or gradient is not finite is left out of that step's mean; a step whose update is
        not finite is not taken.
        """

        def step(carry: tuple[steps.Carry, PyTree], xs: Step) -> tuple[tuple[steps.Carry, PyTree], Told]:
            (params, opt_state), own = carry
            number, batches, rate = xs

            def gradient(args: tuple[Array, Array, Array]) -> tuple[Shards, Told, Array]:
                worker, here, batch = args
                key = jax.random.fold_in(steps.worker_key(recipe, turn, worker), number)
                (loss, score), grads = steps.gradient(recipe, params, turn, batch, key)
                healthy = jnp.isfinite(loss) & steps.all_finite(grads)
                counts = healthy & here
                grads = jax.tree.map(lambda g: jnp.where(counts, g, 0), grads)
                return grads, Told(loss, score, healthy), counts

            workers = steps.worker_numbers(recipe.layout)
            mean = average(own, gradient, (workers, turn.present, batches))
            stepped = steps.update(recipe, params, opt_state, mean.grads, rate)
            sound = steps.is_sound(*stepped)
            taken = sound & (mean.count > 0)
            kept = jax.tree.map(lambda new, old: jnp.where(taken, new, old), (stepped, mean.own), carry)
            return kept, mean.told._replace(healthy=mean.told.healthy & sound)

        xs = (jnp.arange(len(turn.rates)), turn.indices.swapaxes(0, 1), turn.rates)
        begun = (state.params, state.stays), state.own
        ((params, opt_state), own), told = lax.scan(step, begun, xs)
        told = Told(told.loss.mean(0), told.score.mean(0), told.healthy.all(0))
        return state._replace(params=params, stays=opt_state, own=own), told

    return Method(init, {"local": local}, lambda state, batches: recipe.score_fn(state.params, batches))
