"""A convolution whose gradients are fast on CPU, inside loops too.

XLA:CPU canonicalises convolutions in the entry computation alone (JAX issue 12868): the gradient of
an ordinary convolution inside `lax.scan` ran 35 to 100 times slower than outside. Written as ordinary
NHWC/HWIO convolutions, the backward pass keeps its speed in a loop; of a strided one it is written without
dilation, for which XLA:CPU has no fast form. Other backends use the native operation. `benchmarks/convs.py`
measures all of them.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]
Pads = tuple[Pair, ...]  # before and after, per spatial axis
_DIMS = ("NHWC", "HWIO", "NHWC")
_plain_conv = partial(lax.conv_general_dilated, dimension_numbers=_DIMS)


def conv_general_dilated(
    x: jax.Array, w: jax.Array, window_strides: Sequence[int], padding: str | Sequence[Pair], **options: Any
) -> jax.Array:
    """`lax.conv_general_dilated` for `flax.linen.Conv`'s field of that name.

    Args:
      x: images [N, H, W, C_in].
      w: kernel [h, w, C_in, C_out].
      window_strides: two strides.
      padding: 'SAME', 'VALID' or explicit pairs.
      **options: whatever else the caller passes; the fast path takes neither dilation nor groups.

    Returns:
      [N, H', W', C_out].
    """
    groups = options.get("feature_group_count", 1)
    dilations = (options.get("lhs_dilation"), options.get("rhs_dilation"))
    plain = x.ndim == 4 and groups == 1 and all(d in (None, 1, (1, 1)) for d in dilations)
    if jax.default_backend() != "cpu" or not plain:
        options = {"dimension_numbers": _DIMS, **options}
        return lax.conv_general_dilated(x, w, window_strides, padding, **options)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], w.shape[:2], window_strides, padding)
    pads = tuple((lo, hi) for lo, hi in padding)
    if w.shape[:2] == (1, 1) and pads == ((0, 0), (0, 0)):  # of the other pixels nothing is used
        x, window_strides = x[:, :: window_strides[0], :: window_strides[1]], (1, 1)
    return _conv(x, w, tuple(window_strides), pads)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: jax.Array, w: jax.Array, strides: tuple[int, ...], pads: Pads) -> jax.Array:
    return _plain_conv(x, w, strides, pads)


def _conv_bwd(strides: tuple[int, ...], pads: Pads, residuals: tuple, dy: jax.Array) -> tuple:
    """From dy [N, H', W', O]: dx [N, H, W, I] and dw [h, w, I, O]."""
    x, w = residuals
    if strides != (1, 1):
        return _strided_dx(dy, w, x.shape, strides, pads), _strided_dw(x, dy, w.shape, strides, pads)
    sizes = list(zip(x.shape[1:3], dy.shape[1:3], w.shape[:2], pads, strict=True))
    dx_pads = [(k - 1 - lo, i + lo - d) for i, d, k, (lo, _) in sizes]
    dx = _plain_conv(dy, w[::-1, ::-1].transpose(0, 1, 3, 2), (1, 1), dx_pads)
    dw_pads = [(lo, k + d - 1 - i - lo) for i, d, k, (lo, _) in sizes]
    dw = _plain_conv(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), dw_pads)
    return dx, dw.transpose(1, 2, 0, 3)


def _strided_dx(
    dy: jax.Array, w: jax.Array, shape: Sequence[int], strides: Sequence[int], pads: Pads
) -> jax.Array:
    """The gradient of the pixels (p + s a, q + t b), for each phase (p, q): a convolution of some taps."""
    s, t = strides
    height, width = -(-shape[1] // s), -(-shape[2] // t)
    axes = list(
        zip((height, width), dy.shape[1:3], w.shape[:2], strides, (lo for lo, _ in pads), strict=True)
    )

    def taps(axis: int, phase: int) -> tuple[slice, Pair]:
        """Which taps reach a phase, in the order of dy's pixels, and the padding of dy."""
        pixels, outputs, size, stride, lo = axes[axis]
        last = max((k for k in range(size) if (phase + lo - k) % stride == 0), default=-1)
        count, before = last // stride + 1, (last - phase - lo) // stride
        return slice(last, None, -stride) if count else slice(0), (
            before,
            pixels - outputs - before + count - 1,
        )

    def gradient(p: int, q: int) -> jax.Array:
        (rows, above), (columns, left) = taps(0, p), taps(1, q)
        kernel = w[rows, columns].transpose(0, 1, 3, 2)
        if not kernel.size:
            return jnp.zeros((len(dy), height, width, shape[3]), dy.dtype)
        return _plain_conv(dy, kernel, (1, 1), (above, left))

    phases = jnp.stack([gradient(p, q) for p, q in product(range(s), range(t))], 3)  # [N, h, w, s t, I]
    dx = phases.reshape(len(dy), height, width, s, t, -1).swapaxes(2, 3)
    return dx.reshape(len(dy), s * height, t * width, -1)[:, : shape[1], : shape[2]]


def _strided_dw(
    x: jax.Array, dy: jax.Array, shape: Sequence[int], strides: Sequence[int], pads: Pads
) -> jax.Array:
    """A matrix product per tap."""
    x = lax.pad(x, x.dtype.type(0), [(0, 0, 0), *((lo, hi, 0) for lo, hi in pads), (0, 0, 0)])
    (s, t), (height, width) = strides, dy.shape[1:3]

    def gradient(k: int, m: int) -> jax.Array:
        seen = x[:, k : k + s * (height - 1) + 1 : s, m : m + t * (width - 1) + 1 : t]
        return jnp.tensordot(seen, dy, ((0, 1, 2), (0, 1, 2)))

    return jnp.stack([gradient(k, m) for k, m in product(*map(range, shape[:2]))]).reshape(shape)


_conv.defvjp(lambda x, w, strides, pads: (_plain_conv(x, w, strides, pads), (x, w)), _conv_bwd)
