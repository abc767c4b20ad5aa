"""A convolution whose gradients are fast inside loops on CPU.

XLA:CPU canonicalises convolutions in the entry computation alone (JAX issue 12868): the gradient of
an ordinary convolution inside `lax.scan` ran 35 to 100 times slower than outside. Written as
ordinary NHWC/HWIO convolutions, the backward pass keeps its speed in a loop. Other backends use the
native operation. `benchmarks/conv_in_scan.py` measures both, and would notice when XLA is mended.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
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
    return _conv(x, w, tuple(window_strides), tuple((lo, hi) for lo, hi in padding))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: jax.Array, w: jax.Array, strides: tuple[int, ...], pads: Pads) -> jax.Array:
    return _plain_conv(x, w, strides, pads)


def _conv_bwd(strides: tuple[int, ...], pads: Pads, residuals: tuple, dy: jax.Array) -> tuple:
    """From dy [N, H', W', O]: dx [N, H, W, I], a convolution of dy, and dw [h, w, I, O], one of x with dy."""
    x, w = residuals
    zero = dy.dtype.type(0)
    dy = lax.pad(dy, zero, [(0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)])
    sizes = list(zip(x.shape[1:3], dy.shape[1:3], w.shape[:2], pads, strict=True))
    dx_pads = [(k - 1 - lo, i + lo - d) for i, d, k, (lo, _) in sizes]
    dx = _plain_conv(dy, w[::-1, ::-1].transpose(0, 1, 3, 2), (1, 1), dx_pads)
    dw_pads = [(lo, k + d - 1 - i - lo) for i, d, k, (lo, _) in sizes]
    dw = _plain_conv(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), dw_pads)
    return dx, dw.transpose(1, 2, 0, 3)


_conv.defvjp(lambda x, w, strides, pads: (_plain_conv(x, w, strides, pads), (x, w)), _conv_bwd)
