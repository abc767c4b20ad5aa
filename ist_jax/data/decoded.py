"""Compressed images that fit in memory: each is decoded once, as it is or cut to one size."""

import io
import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from ist_jax.data.images import UNREADABLE
from ist_jax.data.source import ArraySource, EncodedSource
from ist_jax.key import Key, Options

log = logging.getLogger(__name__)

_NAMED = 10  # of the images that cannot be read
Shape = tuple[int, int, int]  # [H, W, C]
OPTIONS = {
    "data.in_memory": Key(
        1_000, "MB of decoded images up to which a set of files is held in memory, by every device", least=0
    ),
}


class Unlike(ValueError):
    """Images cannot be held in memory as they are."""


class TooLarge(ValueError):
    """Images take more memory than `data.in_memory` allows."""


def decode_as_is(splits: Sequence[EncodedSource], options: Options) -> list[ArraySource]:
    """The splits in memory: uint8 [N, H, W, 1] where all images are grey, else [N, H, W, 3].

    Images that cannot be read are named in a warning and left out, as by `decode`.

    Args:
      splits: of a data set.
      options: 'data.in_memory', and 'data.size' for the longest side of an image that stays as it is.

    Raises:
      Unlike: images are of different sizes, or larger than 'data.size'.
      TooLarge: they take too much memory.
      ValueError: as of `decode`.
    """
    shape = _common_shape(splits, options)
    mode = "L" if shape[-1] == 1 else "RGB"
    return decode(splits, options, shape, lambda image: np.asarray(image.convert(mode)).reshape(shape))


def decode(
    splits: Sequence[EncodedSource], options: Options, shape: Shape, read: Callable[[Image.Image], np.ndarray]
) -> list[ArraySource]:
    """The splits in memory, uint8 [N, H, W, C].

    Args:
      splits: of a data set.
      options: 'data.in_memory'.
      shape: of what `read` makes of an image.
      read: such as `Transform.centre`.

    Raises:
      TooLarge: they take too much memory.
      ValueError: no image of a split can be read, or an image's channels have more than 8 bits.
    """
    _check_room(sum(map(len, splits)), shape, options)
    return [_decode(source, shape, read) for source in splits]


def _decode(source: EncodedSource, shape: Shape, read: Callable[[Image.Image], np.ndarray]) -> ArraySource:
    images = np.empty((len(source), *shape), np.uint8)
    kept: list[int] = []
    unreadable: list[str] = []
    for i in tqdm(range(len(source)), desc="decoding", unit="image", leave=False, disable=None):
        try:
            with Image.open(io.BytesIO(source[i]["image"])) as image:
                if image.mode[0] in "IF":
                    raise ValueError(
                        f"{source.name(i)} has pixels of {image.mode!r}; 8 bits a channel are needed"
                    )
                images[len(kept)] = read(image)
        except UNREADABLE:
            unreadable.append(source.name(i))
        else:
            kept.append(i)
    if unreadable:
        named = ", ".join(unreadable[:_NAMED]) + ", ..." * (len(unreadable) > _NAMED)
        log.warning("%d of %d images cannot be read: %s", len(unreadable), len(source), named)
    if not kept:
        raise ValueError(f"none of {len(source)} images can be read, such as {source.name(0)}")
    return ArraySource(images[: len(kept)], source.labels[kept])


def _common_shape(splits: Sequence[EncodedSource], options: Options) -> Shape:
    """Of all images of all splits; looks at no more of them than it must."""
    count, first, shape = sum(map(len, splits)), "", (0, 0, 1)
    for source, i in ((split, number) for split in splits for number in range(len(split))):
        try:
            with Image.open(io.BytesIO(source[i]["image"])) as image:
                (width, height), mode = image.size, image.mode
        except UNREADABLE:
            continue  # named when it is decoded
        channels = max(shape[-1], 1 if mode in ("1", "L") else 3)
        found = f"{source.name(i)} has {width} x {height} pixels"
        if not first:
            if max(width, height) > options["data.size"]:
                raise Unlike(f"{found}, more than data.size={options['data.size']}")
            first, shape = found, (height, width, channels)
            _check_room(count, shape, options)
        elif (height, width) != shape[:2]:
            raise Unlike(f"{first}, and {found}")
        shape = (height, width, channels)
    return shape


def _check_room(count: int, shape: Shape, options: Options) -> None:
    needed, most = count * math.prod(shape) / 1e6, options["data.in_memory"]
    if needed > most:
        sizes = f"{count:,} images of {shape[1]} x {shape[0]} pixels"
        raise TooLarge(f"{sizes} take {needed:,.1f} MB, more than data.in_memory={most}")
