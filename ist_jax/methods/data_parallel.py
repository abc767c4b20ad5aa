"""Data-parallel SGD: the gradients are averaged over the workers in every step.

All workers have the same whole model; the optimizer's state is the same everywhere and never sent.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ist_jax.exchange.layout import AXIS, Shards
from ist_jax.methods import steps
from ist_jax.methods.method import Method, Recipe, State, Told, Turn

Step = tuple[Int[Array, ""], Int[Array, "W B"], Float[Array, ""]]  # its number, examples and learning rate


def make(recipe: Recipe) -> Method:
    """The method; the layout has no groups."""

    def init(params: Shards) -> State:
        return State(params, stays=recipe.tx.init(params))

    def local(state: State, _: None, turn: Turn) -> tuple[State, Told]:
        """l steps on the same batches as local SGD's.

        A worker whose loss or gradient is not finite is left out of that step's mean; a step whose update is
        not finite is not taken.
        """

        def step(carry: steps.Carry, xs: Step) -> tuple[steps.Carry, Told]:
            number, batches, rate = xs
            grads, told, counts = mean_gradient(carry[0], number, batches)
            stepped = steps.update(recipe, *carry, grads, rate)
            sound = steps.is_sound(*stepped)
            taken = sound & (counts > 0)
            kept = jax.tree.map(lambda new, old: jnp.where(taken, new, old), stepped, carry)
            return kept, told._replace(healthy=told.healthy & sound)

        def mean_gradient(params: Shards, number: Array, batches: Array) -> tuple[Shards, Told, Array]:
            def own(args: tuple[Array, Array, Array]) -> tuple[Shards, Told, Array]:
                worker, here, batch = args
                key = jax.random.fold_in(steps.worker_key(recipe, turn, worker), number)
                (loss, score), grads = steps.gradient(recipe, params, turn, batch, key)
                healthy = jnp.isfinite(loss) & steps.all_finite(grads)
                counts = healthy & here
                grads = jax.tree.map(lambda g: jnp.where(counts, g, 0), grads)
                return grads, Told(loss, score, healthy), counts

            workers = steps.worker_numbers(recipe.layout)
            grads, told, counts = steps.sum_over_workers(recipe, own, (workers, turn.present, batches))
            count = lax.psum(counts.sum(), AXIS)
            return jax.tree.map(lambda g: lax.psum(g, AXIS) / jnp.maximum(count, 1), grads), told, count

        xs = (jnp.arange(len(turn.rates)), turn.indices.swapaxes(0, 1), turn.rates)
        (params, opt_state), told = lax.scan(step, (state.params, state.stays), xs)
        told = Told(told.loss.mean(0), told.score.mean(0), told.healthy.all(0))
        return state._replace(params=params, stays=opt_state), told

    return Method(init, {"local": local}, lambda state, batches: recipe.score_fn(state.params, batches))
