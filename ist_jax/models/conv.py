"""A convolution that is fast on CPU, with gradients that are fast inside loops too.

XLA:CPU canonicalises convolutions in the entry computation alone (JAX issue 12868): the gradient of
an ordinary convolution inside `lax.scan` ran 35 to 100 times slower than outside. Here the backward pass is
written as ordinary convolutions and matrix products, without dilation, which keep their speed in a loop; a
convolution of an image that its kernel covers is one matrix product; a 3x3 one of many channels is 16
products in place of 36 (`_winograd`), and one of few takes two pixels for one (`_by_pairs`). Other backends
use the native one.
`benchmarks/convolutions.py` would notice when XLA is mended, `benchmarks/peers.py` measures whole steps.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ist_jax.models.norm import at_least_float32

Pair = tuple[int, int]
Pads = tuple[Pair, ...]  # before and after, per spatial axis
_PIXELS = 512  # of the images whose kernel gradients are taken at a time
_LARGE = 2**16  # numbers in an array from which on that is faster than one convolution
_CHANNELS, _CHANNELS_OF_GRADIENT = 64, 128  # at least, in and out, where tiles are faster
_FEW = 16  # channels at most, in and out, where pairs are faster
_DIMS = ("NHWC", "HWIO", "NHWC")
_plain_conv = partial(lax.conv_general_dilated, dimension_numbers=_DIMS)


def convolution(
    width: int, size: int, strides: int = 1, *, of: type[nn.Conv] = nn.Conv, **options: Any
) -> nn.Conv:
    """A size x size convolution without bias that pads size // 2 pixels on each side, as PyTorch's nets do.

    'SAME' is the same only where the stride is 1: of an even number of pixels at stride 2 it pads 0 and 1.

    Args:
      width: channels that come out.
      size: of the kernel.
      strides: along both axes.
      of: the class of the layer.
      **options: its other fields.
    """
    options |= {"use_bias": False, "conv_general_dilated": conv_general_dilated}
    return of(width, (size, size), strides, size // 2, **options)


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
    if all(map(_sees_all, x.shape[1:3], w.shape[:2], window_strides, pads)):
        return _dense(x, w, window_strides, pads)
    return _conv(x, w, tuple(window_strides), pads)


def _outputs(size: int, kernel: int, stride: int, pad: Pair) -> int:
    return (size + sum(pad) - kernel) // stride + 1


def _sees_all(size: int, kernel: int, stride: int, pad: Pair) -> bool:
    """Every output is reached from every input along an axis, as of 2 pixels and 3 taps."""
    return pad[0] - stride * (_outputs(size, kernel, stride, pad) - 1) >= 0 and pad[0] + size <= kernel


def _dense(x: jax.Array, w: jax.Array, strides: Sequence[int], pads: Pads) -> jax.Array:
    """Where every output sees every input, a convolution is one matrix product, of slices of the kernel."""
    (n, height, width, _), (s, t), ((top, _), (left, _)) = x.shape, strides, pads
    outputs = [_outputs(*axis) for axis in zip(x.shape[1:3], w.shape[:2], strides, pads, strict=True)]
    kernels = [
        w[top - s * a : top - s * a + height, left - t * b : left - t * b + width]
        for a, b in product(*map(range, outputs))
    ]
    matrix = jnp.stack(kernels, 3).reshape(x[0].size, -1)
    return (x.reshape(n, -1) @ matrix).reshape(n, *outputs, -1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: jax.Array, w: jax.Array, strides: tuple[int, ...], pads: Pads) -> jax.Array:
    if _in_tiles(x, w, strides, pads, _CHANNELS):
        return _winograd(x, w)
    if _in_pairs(x, w, strides, pads):
        return _by_pairs(x, w)
    return _plain_conv(x, w, strides, pads)


def _conv_bwd(strides: tuple[int, ...], pads: Pads, residuals: tuple, dy: jax.Array) -> tuple:
    """From dy [N, H', W', O]: dx [N, H, W, I] and dw [h, w, I, O]."""
    x, w = residuals
    if _in_tiles(x, w, strides, pads, _CHANNELS):
        dx = _winograd(dy, w, of_input=True)
    elif _in_pairs(x, w, strides, pads):
        dx = _by_pairs(dy, w[::-1, ::-1].swapaxes(2, 3))
    else:
        dx = _input_gradient(dy, w, x.shape, strides, pads)
    if _in_tiles(x, w, strides, pads, _CHANNELS_OF_GRADIENT):
        return dx, _winograd_dw(x, dy)
    if strides != (1, 1) or x.size > _LARGE:
        return dx, _dw_by_products(x, dy, w.shape, strides, pads)
    sizes = zip(x.shape[1:3], dy.shape[1:3], w.shape[:2], pads, strict=True)
    dw_pads = [(lo, k + d - 1 - i - lo) for i, d, k, (lo, _) in sizes]
    dw = _plain_conv(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), dw_pads)
    return dx, dw.transpose(1, 2, 0, 3)


# F(2x2, 3x3) of Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308, 2015:
# a tile of 2x2 outputs is A [(G w G') * (B x B')] A', of 4x4 inputs and 3x3 taps
_A = ((1, 1, 1, 0), (0, 1, -1, -1))
_B = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
Matrix = Sequence[Sequence[float]]
Grid = Sequence[Sequence[jax.Array]]  # arrays of one shape


_rewritten = contextvars.ContextVar("rewritten", default=True)


@contextlib.contextmanager
def by_definition() -> Iterator[None]:
    """Inside, nothing is traced in tiles or pairs: what is counted there is the same on every backend.

    JAX remembers the trace of a function: one that was traced outside before is to be wrapped anew.
    """
    token = _rewritten.set(False)
    try:
        yield
    finally:
        _rewritten.reset(token)


def _in_tiles(x: jax.Array, w: jax.Array, strides: tuple[int, ...], pads: Pads, channels: int) -> bool:
    """Whether a convolution by tiles is possible, and faster with at least so many channels."""
    large = x.size > _LARGE and min(w.shape[2:]) >= channels
    return large and not x.shape[1] % 2 and _is_usual(x, w, strides, pads)


def _in_pairs(x: jax.Array, w: jax.Array, strides: tuple[int, ...], pads: Pads) -> bool:
    """Whether a convolution by pairs of pixels is possible, and faster."""
    return max(w.shape[2:]) <= _FEW and _is_usual(x, w, strides, pads)


def _is_usual(x: jax.Array, w: jax.Array, strides: tuple[int, ...], pads: Pads) -> bool:
    """3x3 taps, as many pixels out as in, an even width, and numbers that may be added in another order."""
    same = w.shape[:2] == (3, 3) and strides == (1, 1) and pads == ((1, 1), (1, 1))
    return _rewritten.get() and same and not x.shape[2] % 2 and x.dtype.itemsize >= 4


def _by_pairs(x: jax.Array, w: jax.Array) -> jax.Array:
    """[N, H, W, O] of x [N, H, W, I] and w [3, 3, I, O]; W is even.

    Two pixels of a row are one with twice the channels, in and out: 2 of them in place of 3 taps, a quarter
    of whose weights is zero. XLA's convolution of few channels loses more than that.
    """
    shifted = [jnp.pad(w, ((0, 0), (a, 1 - a), (0, 0), (0, 0))) for a in range(2)]
    kernel = jnp.stack(shifted, 3)  # [3, 4, I, 2, O]
    n, height, width, channels = x.shape
    pairs = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0))).reshape(n, height, -1, 2 * channels)
    y = _plain_conv(pairs, kernel.reshape(3, 2, 2 * channels, -1), (1, 1), ((1, 1), (0, 0)))
    return y.reshape(n, height, width, -1)


def _winograd(x: jax.Array, w: jax.Array, of_input: bool = False) -> jax.Array:
    """[N, H, W, O] of x [N, H, W, I] and w [3, 3, I, O]; H and W are even.

    With `of_input`, its transpose by x: from O to I and by the taps in reverse, which exchanges the first and
    the last of what G makes of them.
    """
    kernels = _both_sides(_G, [[w[i, j] for j in range(3)] for i in range(3)])
    order = (3, 1, 2, 0) if of_input else range(4)
    products = [
        [t @ (kernels[i][j].T if of_input else kernels[i][j]) for j, t in zip(order, row, strict=True)]
        for i, row in zip(order, _tiles(x), strict=True)
    ]
    y = jnp.stack([jnp.stack(row, 1) for row in _both_sides(_A, products)], 1)  # [tiles, 2, 2, O]
    n, height, width, _ = x.shape
    return y.reshape(n, height // 2, width // 2, 2, 2, -1).swapaxes(2, 3).reshape(n, height, width, -1)


def _winograd_dw(x: jax.Array, dy: jax.Array) -> jax.Array:
    """[3, 3, I, O], the transpose of `_winograd` by w."""
    errors = _both_sides(_transposed(_A), _every_second(dy, 2))
    products = [[t.T @ e for t, e in zip(*rows, strict=True)] for rows in zip(_tiles(x), errors, strict=True)]
    return jnp.stack([jnp.stack(row) for row in _both_sides(_transposed(_G), products)])


def _tiles(x: jax.Array) -> Grid:
    """4x4 of the transformed pixels [tiles, I] at a place of the tiles, which overlap by 2."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return _both_sides(_B, _every_second(padded, 4))


def _every_second(x: jax.Array, size: int) -> Grid:
    """The pixels at each place of tiles of size x size that begin at every second pixel, [tiles, C]."""
    rows, columns = (n - size + 1 for n in x.shape[1:3])
    return [
        [x[:, i : i + rows : 2, j : j + columns : 2].reshape(-1, x.shape[3]) for j in range(size)]
        for i in range(size)
    ]


def _both_sides(matrix: Matrix, grid: Grid) -> Grid:
    """matrix @ grid @ matrix', whose entries are arrays."""
    columns = [_combine(matrix, column) for column in zip(*grid, strict=True)]
    return [_combine(matrix, row) for row in zip(*columns, strict=True)]


def _combine(matrix: Matrix, parts: Sequence[jax.Array]) -> list[jax.Array]:
    return [sum(f * part for f, part in zip(row, parts, strict=True) if f) for row in matrix]  # type: ignore[misc]


def _transposed(matrix: Matrix) -> Matrix:
    return [*zip(*matrix, strict=True)]


def _input_gradient(
    dy: jax.Array, w: jax.Array, shape: Sequence[int], strides: Sequence[int], pads: Pads
) -> jax.Array:
    """Of the pixels (p + s a, q + t b), for each phase (p, q), a convolution of dy by some of the taps."""
    s, t = strides
    pixels = -(-shape[1] // s), -(-shape[2] // t)  # of a phase

    def taps(axis: int, phase: int) -> tuple[slice, Pair]:
        """Which ones reach a phase, in the order of dy's pixels, and the padding of dy."""
        stride, (lo, _) = strides[axis], pads[axis]
        last = max((k for k in range(w.shape[axis]) if (phase + lo - k) % stride == 0), default=-1)
        count, before = last // stride + 1, (last - phase - lo) // stride
        after = pixels[axis] - dy.shape[axis + 1] - before + count - 1
        return slice(last, None, -stride) if count else slice(0), (before, after)

    def gradient(p: int, q: int) -> jax.Array:
        (rows, above), (columns, left) = taps(0, p), taps(1, q)
        kernel = w[rows, columns].transpose(0, 1, 3, 2)
        if not kernel.size:
            return jnp.zeros((len(dy), *pixels, shape[3]), dy.dtype)
        return _plain_conv(dy, kernel, (1, 1), (above, left))

    phases = jnp.stack([gradient(p, q) for p, q in product(range(s), range(t))], 3)  # [N, h, w, s t, I]
    dx = phases.reshape(len(dy), *pixels, s, t, -1).swapaxes(2, 3)
    return dx.reshape(len(dy), s * pixels[0], t * pixels[1], -1)[:, : shape[1], : shape[2]]


def _dw_by_products(
    x: jax.Array, dy: jax.Array, shape: Sequence[int], strides: Sequence[int], pads: Pads
) -> jax.Array:
    """Matrix products of some images at a time, which stay in the cache, by the taps of a row of the kernel.

    The products contract adjacent numbers: of the transposed pixels, side by side in memory.
    """
    (s, t), (n, height, width, _) = strides, dy.shape
    together = math.gcd(n, max(1, _PIXELS // (height * width)))
    rows, columns = slice(0, s * (height - 1) + 1, s), slice(0, t * (width - 1) + 1, t)

    def add(total: jax.Array, images: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x, dy = images[0].transpose(3, 0, 1, 2), images[1].reshape(-1, shape[3])
        x = lax.pad(x, x.dtype.type(0), [(0, 0, 0), (0, 0, 0), *((lo, hi, 0) for lo, hi in pads)])

        def gradient(row: int) -> jax.Array:
            taps = [x[:, :, row:, column:][:, :, rows, columns] for column in range(shape[1])]
            return jnp.dot(jnp.concatenate(taps).reshape(-1, len(dy)), dy, preferred_element_type=total.dtype)

        return total + jnp.stack([gradient(row) for row in range(shape[0])]), None

    images = tuple(a.reshape(-1, together, *a.shape[1:]) for a in (x, dy))
    total = at_least_float32(jnp.zeros((shape[0], shape[1] * shape[2], shape[3]), dy.dtype))
    return lax.scan(add, total, images)[0].reshape(shape).astype(dy.dtype)


_conv.defvjp(lambda x, w, strides, pads: (_conv(x, w, strides, pads), (x, w)), _conv_bwd)
