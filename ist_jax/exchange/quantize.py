"""Numbers in a few bits: scales, stochastic rounding, and codes packed into bytes.

A number x goes as a whole number k of b bits, k times a scale near x, with one scale for the numbers of a
unit. A scale is a bfloat16, so that k times scale is exact in float32: whether XLA makes one operation of
that product and a sum does not matter to the bits. x / scale is rounded up with a chance of what is behind
the point, so that the mean is x. In 16 bits x is a bfloat16, rounded in the same way, without a scale.

The noise is a hash of whole numbers: of a key and of where a number stands, not of the device that asks.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Integer, Shaped, UInt32

BITS = (32, 16, 8, 6, 5, 4)  # 32: numbers as they are
_LEAST = 2.0**-100  # of a row whose numbers are not all taken for 0: a scale must be a normal float32
Codes = Shaped[Array, "..."]  # uint8, or uint16 of 16 bits; two's complement, so that 0 is 0
_WHOLE = {8: jnp.uint8, 16: jnp.uint16}  # bits that are not packed


def key_of(*numbers: Integer[Array, "..."] | int) -> UInt32[Array, "..."]:
    """The key of whole numbers, their order minded; arrays of them are broadcast."""
    key = jnp.uint32(0)
    for number in numbers:
        key = _mix(key ^ _mix(jnp.asarray(number).astype(jnp.uint32) + jnp.uint32(0x9E3779B9)))
    return key


def noise(key: UInt32[Array, "..."], places: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """32 random bits for each place; the two are broadcast."""
    return _mix(key ^ _mix(places))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A permutation of the whole numbers of 32 bits in which every bit depends on every one."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def scale_of(largest: Float32[Array, "..."], bits: int) -> Float32[Array, "..."]:
    """Scales, each a bfloat16 rounded up, by the largest magnitude among the numbers that share one."""
    wanted = lax.bitcast_convert_type(largest * jnp.float32(1 / _most(bits)), jnp.uint32)
    rounded = (wanted + jnp.uint32(0xFFFF)) & jnp.uint32(0xFFFF0000)
    return jnp.where(largest > _LEAST, lax.bitcast_convert_type(rounded, jnp.float32), 0)


def encode(
    x: Float32[Array, "..."], scale: Float32[Array, "..."], random: UInt32[Array, "..."], bits: int
) -> Codes:
    """Codes of numbers; `scale`, of each or broadcast to them, does not count for 16 bits."""
    if bits == 16:
        whole = lax.bitcast_convert_type(x, jnp.uint32) + (random & jnp.uint32(0xFFFF))
        return (whole >> 16).astype(jnp.uint16)
    inverse = jnp.where(scale > 0, 1 / scale, 0)
    steps = x * inverse
    steps = jnp.where(steps == steps, steps, 0)  # no one operation with the difference below
    below = jnp.floor(steps)
    up = steps - below > (random >> 8).astype(jnp.float32) * jnp.float32(2**-24)
    code = jnp.clip(below + up, -_most(bits), _most(bits)).astype(jnp.int32)
    return (code & (2**bits - 1)).astype(jnp.uint8)


def decode(codes: Codes, scale: Float32[Array, "..."], bits: int) -> Float32[Array, "..."]:
    """The numbers again."""
    if bits == 16:
        return lax.bitcast_convert_type(codes.astype(jnp.uint32) << 16, jnp.float32)
    sign = 2 ** (bits - 1)
    return ((codes.astype(jnp.int32) ^ sign) - sign).astype(jnp.float32) * scale


def pack(codes: Shaped[Array, "D k"], bits: int) -> Shaped[Array, "D b"]:
    """Codes of 1 to 31 bits in bytes: of every eighth of them and each of their bits, a byte holds eight."""
    if bits in _WHOLE:
        return codes.astype(_WHOLE[bits])
    eighths = jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % 8))).reshape(len(codes), 1, 8, -1)
    planes = (eighths >> _ramp(bits, codes.dtype)[:, None]) & codes.dtype.type(1)
    packed = (planes.astype(jnp.uint8) << _ramp(8, jnp.uint8)).sum(2, dtype=jnp.uint8)
    return packed.reshape(len(codes), -1)


def unpack(packed: Shaped[Array, "D b"], count: int, bits: int) -> Shaped[Array, "D k"]:
    """So many codes again, of the narrowest dtype that holds them."""
    if bits in _WHOLE:
        return packed
    dtype = jnp.uint8 if bits < 8 else jnp.uint16 if bits < 16 else jnp.uint32
    planes = (packed.reshape(len(packed), bits, 1, -1) >> _ramp(8, jnp.uint8)) & jnp.uint8(1)
    codes = (planes.astype(dtype) << _ramp(bits, dtype)[:, None]).sum(1, dtype=dtype)
    return codes.reshape(len(packed), -1)[:, :count]


def _ramp(count: int, dtype: DTypeLike) -> Shaped[Array, "_ 1"]:
    return jnp.arange(count, dtype=dtype)[:, None]


def _most(bits: int) -> int:
    """The largest code."""
    return 2 ** (bits - 1) - 1
