"""What a state becomes where a stage of one method ends and one of another begins.

The parameters go on. So do moments that travel with them, and what stays with their owners, where both
methods are made by the same factory and keep the same: of whole models, and not of parts. Whatever else a
stage keeps begins as at a run's start.
"""

from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import PyTree

from ist_jax.exchange.kinds import recut
from ist_jax.exchange.layout import Layout, Shards, map_trees
from ist_jax.methods.method import State, describe


def enter(
    before: Layout, after: Layout, init: Callable[[Shards], State], *, alike: bool
) -> Callable[[State], State]:
    """The function, per device, from the last state of a stage to the first of the next.

    Args:
      before: layout of the stage that ends.
      after: of the one that begins, over the same devices.
      init: of its method.
      alike: both methods are made by the same factory.
    """

    def begin(state: State) -> State:
        fresh, move = init(recut(before, after, state.params)), partial(recut, before, after)
        goes_on = {"own": state.own} if alike and describe(state.own) == describe(fresh.own) else {}
        for field in ("travels", "stays") if alike else ():
            kept = getattr(state, field)
            if _of_whole(before, kept) == _of_whole(after, getattr(fresh, field)):
                goes_on[field] = map_trees(before, move, kept)
        return fresh._replace(**goes_on)

    return begin


def _of_whole(layout: Layout, kept: PyTree) -> tuple[object, ...]:
    """The structure, shapes and dtypes of what belongs to the parameters, however they are cut."""

    def whole(tree: Shards) -> PyTree:
        leaves = layout.leaves.items()
        return {path: jax.ShapeDtypeStruct(leaf.shape, tree[path].dtype) for path, leaf in leaves}

    return describe(map_trees(layout, whole, kept))
