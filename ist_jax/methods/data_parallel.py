"""Data-parallel SGD: the gradients are averaged over the workers in every step.

All workers have the same whole model; the optimizer's state is the same everywhere and never sent.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ist_jax.data import Split
from ist_jax.exchange.layout import AXIS, Shards
from ist_jax.methods.method import Method, Recipe, State, Told, Turn
from ist_jax.methods.steps import all_finite, is_sound, sum_over_workers, update, worker_key, worker_numbers


def make(recipe: Recipe) -> Method:
    """The method; the layout has no groups."""

    def init(params: Shards) -> State:
        return State(params, stays=recipe.tx.init(params))

    def local(state: State, _: None, turn: Turn) -> tuple[State, Told]:
        """l steps on the same batches as local SGD's.

        A worker whose loss or gradient is not finite is left out of that step's mean; a step whose update is
        not finite is not taken.
        """

        def step(
            carry: tuple[Shards, PyTree], xs: tuple[Int[Array, ""], Int[Array, "W B"], Float[Array, ""]]
        ) -> tuple[tuple[Shards, PyTree], Told]:
            number, batches, rate = xs
            params, opt_state = carry
            grads, told, counts = mean_gradient(params, number, batches)
            stepped = update(recipe, params, opt_state, grads, rate)
            sound = is_sound(*stepped)
            taken = sound & (counts > 0)
            kept = jax.tree.map(lambda new, old: jnp.where(taken, new, old), stepped, carry)
            return kept, told._replace(healthy=told.healthy & sound)

        def mean_gradient(
            params: Shards, number: Int[Array, ""], batches: Int[Array, "W B"]
        ) -> tuple[Shards, Told, Int[Array, ""]]:
            def gradient(
                args: tuple[Int[Array, ""], Bool[Array, ""], Int[Array, " B"]],
            ) -> tuple[Shards, Told, Bool[Array, ""]]:
                worker, here, batch = args
                key = jax.random.fold_in(worker_key(recipe, turn, worker), number)
                inputs, labels = recipe.batch_fn(turn.data, batch, key)
                both = jax.value_and_grad(recipe.loss_fn, has_aux=True)
                (loss, accuracy), grads = both(params, inputs, labels, None)
                healthy = jnp.isfinite(loss) & all_finite(grads)
                counts = healthy & here
                grads = jax.tree.map(lambda g: jnp.where(counts, g, 0), grads)
                return grads, Told(loss, accuracy, healthy), counts

            workers = worker_numbers(recipe.layout)
            grads, told, counts = sum_over_workers(recipe, gradient, (workers, turn.present, batches))
            count = lax.psum(counts.sum(), AXIS)
            return jax.tree.map(lambda g: lax.psum(g, AXIS) / jnp.maximum(count, 1), grads), told, count

        xs = (jnp.arange(len(turn.rates)), turn.indices.swapaxes(0, 1), turn.rates)
        (params, opt_state), told = lax.scan(step, (state.params, state.stays), xs)
        return (
            state._replace(params=params, stays=opt_state),
            Told(told.loss.mean(0), told.accuracy.mean(0), told.healthy.all(0)),
        )

    def score(state: State, batches: Split) -> Float[Array, "n k"]:
        return recipe.score_fn(state.params, batches)

    return Method(init, {"local": local}, score)
