"""What a streamed model reads its parameters by while every device keeps a part of them.

Per device, with named-axis collectives: one block or layer is in memory at a time, or no kernel at all.
"""

import dataclasses

from jaxtyping import Array, Float

from ist_jax.exchange.kinds import kind_of
from ist_jax.exchange.layout import Layout
from ist_jax.exchange.wire import Inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed:
    """A `models.Fetch`: leaves are gathered, or multiplied by where they are."""

    layout: Layout

    def __call__(self, path: str, shard: Float[Array, "..."]) -> Float[Array, "..."]:
        leaf = self.layout.leaves[path]
        return kind_of(leaf).whole(leaf, shard)

    def product(self, path: str, x: Inputs, shard: Float[Array, "..."]) -> Float[Array, "B O"]:
        leaf = self.layout.leaves[path]
        if any(blocks != (1, 1) for blocks in leaf.blocks):  # its slices are none of the kernel's axes
            return x @ self(path, shard)
        return kind_of(leaf).product(self.layout, leaf, x, shard)
