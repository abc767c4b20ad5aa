"""IST, ResIST and local SGD: every worker trains a part of the model, and the parts are put back.

    units  = gather(state)             all-to-all of the workers' units
    subnet = local(units)              l steps, no collectives
    state  = merge(subnet)             means in worker order, sick and absent workers left out

Without unit groups every worker trains the whole model, which is local SGD: there is nothing to gather.

References:
  Yuan et al., arXiv:1910.02120 (IST). Dun et al., arXiv:2107.00961 (ResIST).
  Stich, Local SGD Converges Fast and Communicates Little, arXiv:1805.09767, 2018.
"""

from jaxtyping import Array, Int, PyTree

from ist_jax.exchange import store
from ist_jax.exchange.layout import Shards, map_trees
from ist_jax.exchange.store import Subnets
from ist_jax.methods.method import Gates, Method, Phase, Recipe, State, Told, Turn
from ist_jax.methods.steps import Carry, PerWorker, each_worker, train_worker, worker_numbers


def make(recipe: Recipe) -> Method:
    """The method; the groups of the recipe's layout say what is dealt out."""
    layout, policy = recipe.layout, recipe.policy

    def init(params: Shards) -> State:
        return State(params, travels=policy.init(recipe.tx, params))

    def gather(state: State, _: None, turn: Turn) -> Subnets:
        """The unit leaves [W, ...] of every tree that goes out."""

        def own(tree: Shards) -> Subnets:
            return store.gather(layout, tree, turn.draw)

        return map_trees(layout, own, (state.params, state.travels), scalar=lambda x: None)

    def local(state: State, units: Subnets, turn: Turn) -> tuple[PerWorker, Told]:
        """This device's trained subnets, (parameters, moments) [W, ...], and what is told of them."""
        kept = (state.params, state.travels)
        if units is None:
            units = map_trees(layout, lambda tree: {}, kept, scalar=lambda x: None)
        shared = map_trees(layout, lambda tree: store.shared_leaves(layout, tree), kept)

        def train(args: tuple[Array, PyTree, Gates, Int[Array, "l B"]]) -> tuple[Carry, Told]:
            worker, own_units, own_gates, own_indices = args
            params, travels = map_trees(layout, lambda _, s, u: s | u, kept, shared, own_units)
            own = turn._replace(gates=own_gates, indices=own_indices)
            opt_state = policy.start(recipe.tx, params, travels)
            params, opt_state, told = train_worker(recipe, params, opt_state, own, worker)
            return (params, policy.end(opt_state)), told

        return each_worker(recipe, train, (worker_numbers(layout), units, dict(turn.gates), turn.indices))

    def merge(state: State, trained: tuple[PerWorker, Told], turn: Turn) -> tuple[State, Told]:
        """The state after the round."""
        subnets, told = trained
        heard, kept = told.healthy & turn.present, (state.params, state.travels)

        def own(old: Shards, new: Subnets) -> Shards:
            return store.merge(layout, old, new, turn.draw, heard)

        params, travels = map_trees(layout, own, kept, subnets, scalar=lambda old, new: new[0])
        return state._replace(params=params, travels=travels), told

    phases: dict[str, Phase] = {"gather": gather} if layout.groups else {}
    phases |= {"local": local, "merge": merge}
    return Method(init, phases, lambda state, batches: recipe.score_fn(state.params, batches))
