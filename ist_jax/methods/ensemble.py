"""An ensemble: every worker trains a net of its own, of a subnet's size, and nothing is ever sent.

The nets differ in their initialisation and in the examples that they see. They are scored together, by the
mean of what they give each class, and singly. The optimizer's state goes on from round to round.
"""

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax
from jaxtyping import Array, Float, Int

from ist_jax.data import Split
from ist_jax.exchange.layout import Shards
from ist_jax.methods.method import Method, Recipe, State, Told, Turn
from ist_jax.methods.steps import Carry, each_worker, train_worker, worker_numbers


def make(recipe: Recipe) -> Method:
    """The method; the recipe's layout is that of one net, and has no groups.

    `State.params` is empty, as there is no model of all; `State.own` is (parameters, the optimizer's state),
    [W, ...].
    """

    def fresh(worker: Int[Array, ""]) -> Shards:
        key = jax.random.fold_in(jax.random.key(recipe.seed), worker)
        return traverse_util.flatten_dict(recipe.init_params(key), sep="/")

    def init(_: Shards) -> State:
        members = lax.map(fresh, worker_numbers(recipe.layout))
        return State({}, own=(members, jax.vmap(recipe.tx.init)(members)))

    def local(state: State, _: None, turn: Turn) -> tuple[State, Told]:
        """l steps of every net; a sick or absent worker's stays as it was."""

        def train(args: tuple[Array, Carry, Int[Array, "l B"]]) -> tuple[Carry, Told]:
            worker, (params, opt_state), indices = args
            own = turn._replace(indices=indices)
            params, opt_state, told = train_worker(recipe, params, opt_state, own, worker)
            return (params, opt_state), told

        args = (worker_numbers(recipe.layout), state.own, turn.indices)
        trained, told = each_worker(recipe, train, args)
        heard = told.healthy & turn.present
        own = jax.tree.map(lambda new, old: jax.vmap(jnp.where)(heard, new, old), trained, state.own)
        return state._replace(own=own), told

    def score(state: State, batches: Split) -> Float[Array, "n k"]:
        members, _ = state.own
        return recipe.score_members(members, batches)

    return Method(init, {"local": local}, score)
