"""IST, ResIST and local SGD: every worker trains a part of the model, and the parts are put back.

    units  = gather(state)             all-to-all of the workers' units
    subnet = local(units)              l steps, no collectives
    state  = merge(subnet)             means in worker order, sick and absent workers left out

Without unit groups every worker trains the whole model, which is local SGD: there is nothing to gather.

References:
  Yuan et al., arXiv:1910.02120 (IST). Dun et al., arXiv:2107.00961 (ResIST).
  Stich, Local SGD Converges Fast and Communicates Little, arXiv:1805.09767, 2018.
"""

from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from ist_jax.data import Split
from ist_jax.exchange import store
from ist_jax.exchange.layout import Shards, map_trees
from ist_jax.methods.method import Method, Recipe, State, Told, Turn
from ist_jax.methods.steps import each_worker, train_worker, worker_numbers


def make(recipe: Recipe) -> Method:
    """The method; the groups of the recipe's layout say what is dealt out."""
    layout, policy = recipe.layout, recipe.policy

    def init(params: Shards) -> State:
        return State(params, travels=policy.init(recipe.tx, params))

    def gather(state: State, _: None, turn: Turn) -> PyTree[Float[Array, "W ..."]]:
        """The unit leaves [W, ...] of every tree that goes out."""
        return map_trees(
            layout,
            lambda tree: store.gather(layout, tree, turn.draw),
            (state.params, state.travels),
            scalar=lambda x: None,
        )

    def local(
        state: State, units: PyTree[Float[Array, "W ..."]], turn: Turn
    ) -> tuple[PyTree[Shaped[Array, "W ..."]], Told]:
        """This device's trained subnets, (parameters, moments) [W, ...], and what is told of them."""
        kept = (state.params, state.travels)
        if units is None:
            units = map_trees(layout, lambda tree: {}, kept, scalar=lambda x: None)
        shared = map_trees(layout, lambda tree: store.shared_leaves(layout, tree), kept)

        def train(
            args: tuple[Int[Array, ""], PyTree, dict[str, Bool[Array, " n"]], Int[Array, "l B"]],
        ) -> tuple[tuple[Shards, PyTree], Told]:
            worker, own_units, own_gates, own_indices = args
            params, travels = map_trees(layout, lambda _, s, u: s | u, kept, shared, own_units)
            own = turn._replace(gates=own_gates, indices=own_indices)
            opt_state = policy.start(recipe.tx, params, travels)
            params, opt_state, told = train_worker(recipe, params, opt_state, own, worker)
            return (params, policy.end(opt_state)), told

        return each_worker(recipe, train, (worker_numbers(layout), units, dict(turn.gates), turn.indices))

    def merge(
        state: State, trained: tuple[PyTree[Shaped[Array, "W ..."]], Told], turn: Turn
    ) -> tuple[State, Told]:
        """The state after the round."""
        subnets, told = trained
        heard = told.healthy & turn.present
        params, travels = map_trees(
            layout,
            lambda old, new: store.merge(layout, old, new, turn.draw, heard),
            (state.params, state.travels),
            subnets,
            scalar=lambda old, new: new[0],
        )
        return state._replace(params=params, travels=travels), told

    def score(state: State, batches: Split) -> Float[Array, "n k"]:
        return recipe.score_fn(state.params, batches)

    phases = {"gather": gather} if layout.groups else {}
    return Method(init, phases | {"local": local, "merge": merge}, score)
