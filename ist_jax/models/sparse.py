"""Sparse inputs: a weighted sum of a kernel's rows, never a dense input."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

_CHUNK = 1024  # entries read at once: so many rows of the kernel are copied at a time


@struct.dataclass
class Sparse:
    """A batch of sparse vectors, padded to K entries.

    Attributes:
      index: int32 [B, K], the features of each vector; those outside of 0 to width - 1 count for nothing.
      value: float [B, K], their values; data, so that no gradient flows to them.
      count: int32 [B], how many entries of each vector are there; the rest is never read.
      width: F, the length of the vectors.
    """

    index: jax.Array
    value: jax.Array
    count: jax.Array
    width: int = struct.field(pytree_node=False)

    def __matmul__(self, kernel: jax.Array) -> jax.Array:
        """[B, H] from a kernel [F, H]."""
        return _dot(kernel, self)


@jax.custom_vjp
def _dot(kernel: jax.Array, x: Sparse) -> jax.Array:
    """Reads the rows of the kernel that are needed; the gradient adds to just these.

    Time and memory follow the entries that are there, not K: they are read in chunks, until none is left.
    """

    def add(out: jax.Array, row: jax.Array, feature: jax.Array, value: jax.Array) -> jax.Array:
        rows = kernel.at[feature].get(mode="fill", fill_value=0)
        return out.at[row].add(value * rows, mode="drop")

    return _for_entries(x, add, jnp.zeros((len(x.index), kernel.shape[1]), kernel.dtype))


def _backward(residuals: tuple, dy: jax.Array) -> tuple[jax.Array, None]:
    kernel, x = residuals

    def add(out: jax.Array, row: jax.Array, feature: jax.Array, value: jax.Array) -> jax.Array:
        return out.at[feature].add(value * dy.at[row].get(mode="fill", fill_value=0), mode="drop")

    return _for_entries(x, add, jnp.zeros_like(kernel)), None


_dot.defvjp(lambda kernel, x: (_dot(kernel, x), (kernel, x)), _backward)


def _for_entries(x: Sparse, add: Callable[..., jax.Array], start: jax.Array) -> jax.Array:
    """`add(out, row [P], feature [P], value [P, 1])` of all entries; row B and feature F stand for none."""
    ends = jnp.cumsum(x.count)

    def step(state: tuple) -> tuple:
        done, out = state
        place = done + jnp.arange(_CHUNK)
        row = jnp.searchsorted(ends, place, side="right")  # B past the last entry
        at = (row, place - (ends - x.count).at[row].get(mode="clip"))
        feature = x.index.at[at].get(mode="fill", fill_value=x.width)
        feature = jnp.where(feature < 0, x.width, feature)  # or they would be counted from the end
        value = x.value.at[at].get(mode="fill", fill_value=0).astype(start.dtype)
        return done + _CHUNK, add(out, row, feature, value[:, None])

    return lax.while_loop(lambda state: state[0] < ends[-1], step, (jnp.zeros((), ends.dtype), start))[1]
