"""IST, ResIST and local SGD: every worker trains a part of the model, and the parts are put back.

    units  = gather(state)             all-to-all of the workers' units
    subnet = local(units)              l steps, no collectives
    state  = merge(subnet)             means in worker order, sick and absent workers left out;
                                       then the outer optimizer, if there is one

Without unit groups every worker trains the whole model, which is local SGD: there is nothing to gather.

References:
  Yuan et al., arXiv:1910.02120 (IST). Dun et al., arXiv:2107.00961 (ResIST).
  Stich, Local SGD Converges Fast and Communicates Little, arXiv:1805.09767, 2018.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ist_jax.data import Split
from ist_jax.exchange import compressed, store
from ist_jax.exchange.layout import Shards, map_trees
from ist_jax.exchange.store import Subnets
from ist_jax.methods.method import Gates, Method, Phase, Recipe, State, Told, Turn
from ist_jax.methods.steps import Carry, PerWorker, each_worker, train_worker, worker_numbers

Trained: TypeAlias = tuple[PerWorker, PerWorker, Told]


def make(recipe: Recipe) -> Method:
    """The method; the groups of the recipe's layout say what is dealt out."""
    layout, policy, tx, outer = recipe.layout, recipe.policy, recipe.tx, recipe.outer
    stepping, compress = recipe._replace(tx=policy.transform(layout, tx)), layout.bits.compress

    def init(params: Shards) -> State:
        travels, own = policy.init(layout, tx, params)
        own = (own, compressed.init(layout)) if compress else own
        return State(params, travels, outer.init(params) if outer is not None else (), own)

    def gather(state: State, _: None, turn: Turn) -> Subnets:
        """The unit leaves [W, ...] of every tree that goes out."""

        def own(tree: Shards) -> Subnets:
            return store.gather(layout, tree, turn.draw)

        if not compress:
            return map_trees(layout, own, (state.params, state.travels), scalar=lambda x: None)
        units = compressed.gather(layout, state.params, turn.draw, turn.index)
        return units, map_trees(layout, own, state.travels, scalar=lambda x: None)

    def local(state: State, units: Subnets, turn: Turn) -> Trained:
        """This device's trained subnets, (parameters, moments), what is kept and told of them; [W, ...]."""
        kept = (state.params, state.travels)
        if units is None:
            units = map_trees(layout, lambda tree: {}, kept, scalar=lambda x: None)
        shared = map_trees(layout, lambda tree: store.shared_leaves(layout, tree), kept)

        def train(args: tuple[Array, PyTree, PyTree, Gates, Int[Array, "l B"]]) -> tuple[Carry, PyTree, Told]:
            worker, own_units, own_moments, own_gates, own_indices = args
            params, travels = map_trees(layout, lambda _, s, u: s | u, kept, shared, own_units)
            own = turn._replace(gates=own_gates, indices=own_indices)
            opt_state = policy.start(layout, tx, params, travels, own_moments)
            start = params
            params, opt_state, told = train_worker(stepping, params, opt_state, own, worker)
            travels, own_moments = policy.end(opt_state)
            if compress:  # what was changed goes back
                params = jax.tree.map(jnp.subtract, params, start)
            return (params, travels), own_moments, told

        moments = state.own[0] if compress else state.own
        args = (worker_numbers(layout), units, moments, dict(turn.gates), turn.indices)
        return each_worker(recipe, train, args)

    def merge(state: State, trained: Trained, turn: Turn) -> tuple[State, Told]:
        """The state after the round."""
        subnets, moments, told = trained
        heard = told.healthy & turn.present

        def own(old: Shards, new: Subnets) -> Shards:
            return store.merge(layout, old, new, turn.draw, heard)

        trained_params, moved = subnets
        own_before = state.own
        if compress:
            own_before, residual = state.own
            params, residual, all_heard = compressed.merge(
                layout, state.params, residual, trained_params, turn.draw, heard, turn.index
            )
        else:
            params, all_heard = store.merge_heard(layout, state.params, trained_params, turn.draw, heard)
        travels = map_trees(layout, own, state.travels, moved, scalar=lambda old, new: new[0])
        stays = state.stays
        if outer is not None:
            holders = store.holders(layout, turn.draw, all_heard)
            params, stays = outer.step(state.params, params, stays, holders)
        moments = jax.tree.map(lambda new, old: jax.vmap(jnp.where)(heard, new, old), moments, own_before)
        return State(params, travels, stays, (moments, residual) if compress else moments), told

    phases: dict[str, Phase] = {"gather": gather} if layout.groups else {}
    phases |= {"local": local, "merge": merge}

    def score(state: State, batches: Split) -> Float[Array, "n k"]:
        return recipe.score_fn(state.params, batches)

    return Method(init, phases, score, own_restarts=True)
