"""From uint8 images on the device to normalised, augmented inputs, inside the jitted round."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ist_jax.data.source import Split

_CHUNK = 256  # images counted at a time
Normalize = Callable[[jax.Array], jax.Array]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation, per channel or feature
Labelled = tuple[jax.Array, jax.Array]  # inputs of a model, and their labels


def channel_statistics(images: np.ndarray) -> Statistics:
    """Mean and standard deviation per channel of images [N, H, W, C], or per feature [N, F], in their units.

    What does not vary has a deviation of 1.
    """
    if images.dtype != np.uint8:
        axes = tuple(range(images.ndim - 1))
        mean, std = images.mean(axes, np.float64), images.std(axes, np.float64)
        varies = std > np.finfo(np.float32).eps * abs(mean)  # by more than float32 tells apart
        return tuple(mean.tolist()), tuple(np.where(varies, std, 1.0).tolist())
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), _CHUNK):  # bincount widens what it counts to eight bytes
        for channel, count in enumerate(counts):
            count += np.bincount(images[start : start + _CHUNK, ..., channel].ravel(), minlength=256)
    weights, levels = counts / counts.sum(1, keepdims=True), np.arange(256)
    mean = weights @ levels
    std = np.sqrt(np.maximum(weights @ levels**2 - mean**2, 1.0))
    return tuple(mean.tolist()), tuple(std.tolist())


def make_normalize(mean: tuple[float, ...], std: tuple[float, ...]) -> Normalize:
    """A function from images [..., C] to float32 of mean 0 and deviation 1 per channel."""
    return lambda images: (images.astype(jnp.float32) - jnp.array(mean)) / jnp.array(std)


def make_batch_fn(normalize: Normalize, *, pad: int, flip: bool) -> Callable[..., Labelled]:
    """The function that draws a training batch.

    Args:
      normalize: from `make_normalize`.
      pad: random crop after padding with zeros by so many pixels on each side (0: none).
      flip: mirror half of the images left to right.

    Returns:
      (data with 'image' uint8 [N, H, W, C] and 'label' [N], indices [B], key) ->
      (inputs float32 [B, H, W, C], labels [B]). Row and column numbers are drawn and the pixels are
      then read once, straight from the data set.
    """

    def batch_fn(data: Split, indices: jax.Array, key: jax.Array) -> Labelled:
        images = data["image"]
        if pad or flip:
            size = len(indices)
            shift_key, flip_key = jax.random.split(key)
            shift = jax.random.randint(shift_key, (2, size, 1), -pad, pad + 1)
            rows = jnp.arange(images.shape[1]) + shift[0]  # [B, H]
            columns = jnp.arange(images.shape[2]) + shift[1]  # [B, W]
            if flip:
                mirrored = jax.random.bernoulli(flip_key, 0.5, (size, 1))
                columns = jnp.where(mirrored, columns[:, ::-1], columns)
            inside = _inside(rows, images.shape[1])[:, :, None] & _inside(columns, images.shape[2])[:, None]
            pixels = images[indices[:, None, None], rows[:, :, None], columns[:, None]]
            images = jnp.where(inside[..., None], pixels, 0)
        else:
            images = images[indices]
        return normalize(images), data["label"][indices]

    return batch_fn


def _inside(positions: jax.Array, size: int) -> jax.Array:
    return (positions >= 0) & (positions < size)
