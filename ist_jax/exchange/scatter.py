"""Putting what all workers trained where it belongs in a shard; the mean where units overlap."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ist_jax.masking import Tally

Shard = Float[Array, "*shape R"]
Where = tuple[Int[Array, "S ..."], ...]


def scatter(shard: Shard, where: Where, new: Float[Array, "S ... R"], *, disjoint: bool) -> Shard:
    """Scatters all workers' values.

    Args:
      shard: [..., R].
      where: index arrays with a leading worker axis, out of range where nothing is to be put.
      new: what the workers trained, [S, ..., R].
      disjoint: no entry is ever held by two workers.

    Returns:
      The shard with the mean over the holders of each entry, as `masking.ordered_mean` has it.
    """
    if disjoint:
        return shard.at[where].set(new, mode="drop")

    def add(tally: Tally, worker: tuple[tuple[Array, ...], Array]) -> tuple[Tally, None]:
        at, value = worker
        before = jax.tree.map(lambda x: x.at[at].get(mode="fill", fill_value=0), tally)

        def put(x: jax.Array, y: jax.Array) -> jax.Array:
            return x.at[at].set(jnp.broadcast_to(y, (*value.shape[:-1], x.shape[-1])), mode="drop")

        return jax.tree.map(put, tally, before.add(value)), None

    count = jnp.zeros((*shard.shape[: len(where)], 1), jnp.int32)
    tally = Tally(jnp.zeros_like(shard), shard, jnp.zeros(shard.shape, bool), count)
    tally, _ = lax.scan(add, tally, (where, new))
    return tally.mean()
