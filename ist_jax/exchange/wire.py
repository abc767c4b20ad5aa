"""The collectives of an exchange: all-to-alls of the leaves, and the all-gather of shared ones.

Per device, over `layout.AXIS`. A large part travels alone, which saves two copies of it; small ones in one
buffer. Evaluation has collectives of its own: inputs and results of products whose kernel stays where it is.
"""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree, Shaped, UInt8

from ist_jax.exchange.layout import AXIS, Layout, Shards
from ist_jax.models.sparse import Sparse

_ALONE = 2**20  # bytes of a part from which two copies take longer than one more collective
X = TypeVar("X", bound=jax.Array | Sparse)
Inputs: TypeAlias = Float[Array, "B I"] | Sparse
Parts: TypeAlias = PyTree[Shaped[Array, "D ..."]]


class Part(NamedTuple):
    """What is known of a part of an exchange while it is traced.

    Attributes:
      cause: 'gather', 'merge_units' or 'merge_shared'.
      kind: of the collective, 'all-to-all' or 'all-gather'.
      operand: bytes of it in a device's operand.
      paper: bytes as the papers count them, of all workers: the slots that are assigned, wherever they are.
    """

    cause: str
    kind: str
    operand: int
    paper: float


_noted: ContextVar[list[Part] | None] = ContextVar("noted", default=None)


@contextlib.contextmanager
def noting() -> Iterator[list[Part]]:
    """Collects the parts of all exchanges that are traced meanwhile: a jaxpr does not tell them apart."""
    parts: list[Part] = []
    token = _noted.set(parts)
    try:
        yield parts
    finally:
        _noted.reset(token)


def note(part: Part) -> None:
    """Tells whoever is `noting`."""
    if (parts := _noted.get()) is not None:
        parts.append(part)


def encoded_bytes(layout: Layout, part: Float[Array | jax.ShapeDtypeStruct, "D ..."]) -> int:
    """Bytes that a part [D, ...] takes on its way."""
    shape = jax.eval_shape(lambda x: _encode(layout, x), part)
    return shape.size * shape.dtype.itemsize


def all_to_all(layout: Layout, parts: PyTree[Float[Array, "D ..."]], exact: Parts) -> Parts:
    """Exchanges arrays [D, ...], first axis: destination, then source.

    Args:
      layout: its codec is applied.
      parts: by name.
      exact: more of them, which are sent as they are.
    """
    if layout.codec.encode is None:
        return _exchange(layout, parts | exact)
    sent = {name: _encode(layout, x) for name, x in parts.items()}
    got = _exchange(layout, sent | {name: _to_bytes(x) for name, x in exact.items()})
    plain = {name: _from_bytes(got[name], x.shape, x.dtype) for name, x in exact.items()}
    return {name: _decode(layout, got[name], x) for name, x in parts.items()} | plain


def all_gather(layout: Layout, x: Float[Array, " q"]) -> Float[Array, " p"]:
    """[D q] on every device, from the slices [q]."""
    sent = _encode(layout, x[None])
    got = lax.all_gather(sent, AXIS, tiled=True) if layout.num_devices > 1 else sent
    return _decode(layout, got, jax.ShapeDtypeStruct((layout.num_devices, *x.shape), x.dtype)).reshape(-1)


def all_to_all_bytes(layout: Layout, parts: Parts) -> Parts:
    """Exchanges arrays [D, ...] of any dtypes together, first axis: destination, then source."""
    got = _exchange(layout, {name: _to_bytes(x) for name, x in parts.items()})
    return {name: _from_bytes(got[name], x.shape, x.dtype) for name, x in parts.items()}


def all_gather_bytes(layout: Layout, parts: PyTree[Shaped[Array, "1 ..."]]) -> Parts:
    """[D, ...] of arrays [1, ...] of any dtypes, together."""
    if layout.num_devices == 1 or not parts:
        return parts
    sent = [_to_bytes(x) for x in parts.values()]
    got = lax.all_gather(jnp.concatenate(sent, axis=1), AXIS, tiled=True)
    pieces = zip(parts.items(), jnp.split(got, np.cumsum([x.size for x in sent])[:-1], axis=1), strict=True)
    return {name: _from_bytes(y, (len(y), *x.shape[1:]), x.dtype) for (name, x), y in pieces}


def _exchange(layout: Layout, parts: Shards) -> Shards:
    if layout.num_devices == 1:
        return parts
    alone = {path: lax.all_to_all(x, AXIS, 0, 0) for path, x in parts.items() if x.nbytes >= _ALONE}
    return alone | _exchange_together({path: x for path, x in parts.items() if path not in alone})


def _exchange_together(parts: Shards) -> Shards:
    if not parts:
        return {}
    flat = [x.reshape(len(x), -1) for x in parts.values()]
    got = lax.all_to_all(jnp.concatenate(flat, axis=1), AXIS, 0, 0)
    pieces = jnp.split(got, np.cumsum([x.shape[1] for x in flat])[:-1], axis=1)
    return {path: y.reshape(x.shape) for (path, x), y in zip(parts.items(), pieces, strict=True)}


def _encode(layout: Layout, x: Shaped[Array, "D ..."]) -> Shaped[Array, "D ..."]:
    """[D, ...] as bytes, uint8 [D, b]; where there is no codec, as it is."""
    encode = layout.codec.encode
    return x if encode is None else _to_bytes(encode(x.reshape(len(x), -1)))


def _decode(layout: Layout, got: Shaped[Array, "D b"], like: Array | jax.ShapeDtypeStruct) -> Array:
    encode, decode = layout.codec
    if encode is None or decode is None:
        return got
    sent = jax.eval_shape(encode, jax.ShapeDtypeStruct((len(got), math.prod(like.shape[1:])), like.dtype))
    return decode(_from_bytes(got, sent.shape, sent.dtype)).astype(like.dtype).reshape(like.shape)


def _to_bytes(x: Shaped[Array, "D ..."]) -> UInt8[Array, "D b"]:
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(len(x), -1)


def _from_bytes(x: UInt8[Array, "D b"], shape: tuple[int, ...], dtype: DTypeLike) -> Shaped[Array, "D ..."]:
    size = jnp.dtype(dtype).itemsize
    return lax.bitcast_convert_type(x.reshape(*shape, *((size,) if size > 1 else ())), dtype)


# --- products by a kernel of which every device keeps a part ------------------------------------------------


def inputs_of_all(x: X) -> X:
    """The inputs of all devices, [D B, I], from this device's: an array, or `Sparse`."""
    return jax.tree.map(lambda a: lax.all_gather(a, AXIS, tiled=True), x)


def multiply_slice(
    layout: Layout, x: Float[Array, "N I"] | Sparse, kernel: Float[Array, "rows O"]
) -> Float[Array, "B O"]:
    """x @ kernel, [B, O], where every device keeps so many rows of it: slices of the inputs, in order.

    Args:
      layout: of the model.
      x: the inputs of all devices, [D B, I].
      kernel: this device's rows.
    """
    size, first = len(kernel), lax.axis_index(AXIS) * len(kernel)
    if isinstance(x, Sparse):  # what lies outside counts for nothing
        own: jax.Array | Sparse = Sparse(x.index - first, x.value, x.count, size)
    else:
        x = jnp.pad(x, ((0, 0), (0, layout.num_devices * size - x.shape[1])))
        own = lax.dynamic_slice_in_dim(x, first, size, 1)
    parts = (own @ kernel).reshape(layout.num_devices, -1, kernel.shape[1])
    return lax.all_to_all(parts, AXIS, 0, 0).sum(0)
