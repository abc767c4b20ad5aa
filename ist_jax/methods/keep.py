"""A worker's moments of the shared leaves stay with it from round to round, and are never sent.

The units that it is dealt start at zero, in every round: another worker trained them in the last one. So does
whatever belongs to them, such as Adam's count, by which the means of moments are corrected: with the count of
the shared leaves, the first step of a dealt unit would be too large.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ist_jax.exchange.layout import Layout, Shards, map_trees


class Halves(NamedTuple):
    """An optimizer's state by leaves: its trees are parted, its scalars stand in both.

    Attributes:
      kept: of the shared leaves.
      fresh: of the leaves that are dealt out.
    """

    kept: PyTree
    fresh: PyTree


def transform(layout: Layout, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer with a state in halves, each with scalars of its own."""

    def init(params: Shards) -> Halves:
        return _part(layout, tx.init(params), tx.init(params))

    def update(grads: Shards, state: Halves, params: Shards | None = None) -> tuple[Shards, Halves]:
        like = jax.eval_shape(tx.init, params)

        def by(half: int) -> tuple[Shards, PyTree]:  # of the whole, as half of it has it; XLA drops the rest
            whole = map_trees(layout, lambda _, a, b: a | b, like, *state, scalar=lambda _, *x: x[half])
            return tx.update(grads, whole, params)

        (shared, kept), (dealt, fresh) = by(0), by(1)
        updates = {path: (dealt if leaf.unit_axes else shared)[path] for path, leaf in layout.leaves.items()}
        return updates, _part(layout, kept, fresh)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def init(layout: Layout, tx: optax.GradientTransformation, params: Shards) -> tuple[PyTree, PyTree]:
    """What a device's workers keep before the first round, [W, ...]; nothing travels."""
    kept, workers = transform(layout, tx).init(params).kept, layout.workers_per_device
    return (), jax.tree.map(lambda x: jnp.broadcast_to(x, (workers, *x.shape)), kept)


def start(
    layout: Layout, tx: optax.GradientTransformation, params: Shards, travels: PyTree, own: PyTree
) -> Halves:
    """A worker's state at the start of a round, from what it has kept."""
    return transform(layout, tx).init(params)._replace(kept=own)


def end(state: Halves) -> tuple[PyTree, PyTree]:
    """What it keeps after the round."""
    return (), state.kept


def _part(layout: Layout, kept: PyTree, fresh: PyTree) -> Halves:
    def of(state: PyTree, *, dealt: bool) -> PyTree:
        paths = [path for path, leaf in layout.leaves.items() if bool(leaf.unit_axes) == dealt]
        return map_trees(layout, lambda tree: {path: tree[path] for path in paths}, state)

    return Halves(of(kept, dealt=False), of(fresh, dealt=True))
