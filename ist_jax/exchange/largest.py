"""The largest numbers of a row and where they stand: what of a change is sent where few are kept.

How many are sent is known beforehand, so that shapes are static. Their places go as whole numbers of
ceil(log2 m) bits, m being the numbers of the row, or as one bit of each of the m, whichever takes less.

Reference:
  Aji, Heafield, Sparse Communication for Distributed Gradient Descent, arXiv:1704.05021, 2017.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped


def places_of(x: Shaped[Array, "... m"], count: int) -> Int[Array, "... k"]:
    """Where the so many largest magnitudes stand, ascending; of equal ones, the first."""
    return jnp.sort(lax.top_k(jnp.abs(x), count)[1], axis=-1)


def code_form(size: int, count: int) -> tuple[int, int]:
    """(codes, bits of each) that tell which `count` of `size` numbers are sent."""
    bits = (size - 1).bit_length()
    return (size, 1) if size <= count * bits else (count, bits)


def encode(places: Int[Array, "... k"], size: int) -> Shaped[Array, "... _"]:
    """The codes of places, of the form that `code_form` says."""
    _, bits = code_form(size, places.shape[-1])
    return _mask(places, size).astype(jnp.uint8) if bits == 1 else places.astype(jnp.uint32)


def decode(codes: Shaped[Array, "... _"], size: int, count: int) -> Bool[Array, "... m"]:
    """Which numbers were sent."""
    _, bits = code_form(size, count)
    return codes > 0 if bits == 1 else _mask(codes.astype(jnp.int32), size)


def fill(values: Shaped[Array, "... k"], sent: Bool[Array, "... m"]) -> Shaped[Array, "... m"]:
    """The row, with zeros in place of what was not sent."""
    order = jnp.cumsum(sent, -1, dtype=jnp.int32) - 1
    return jnp.where(sent, jnp.take_along_axis(values, jnp.maximum(order, 0), -1, mode="clip"), 0)


def _mask(places: Int[Array, "... k"], size: int) -> Bool[Array, "... m"]:
    return jnp.put_along_axis(jnp.zeros((*places.shape[:-1], size), bool), places, True, -1, inplace=False)
