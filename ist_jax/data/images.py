"""From compressed images to arrays of one size: decoded and cropped on the host, with PIL.

References:
  Szegedy et al., Going Deeper with Convolutions, arXiv:1409.4842, 2014: the random crops of training.
"""

import functools
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ist_jax.data.source import Facts
from ist_jax.key import Key, Options, Value

_TRIES = 10  # random boxes per image, before a fixed one that always fits
Box = tuple[float, float, float, float]  # left, top, width, height, in pixels
Bounds = tuple[float, float]


def _key(default: Value, text: str, **allowed: Any) -> Key:
    return Key(default, f"of streamed images: {text}", **allowed)


OPTIONS = {
    "data.size": _key(224, "pixels of both sides of the square that the net sees", least=1),
    "data.resize": _key(256, "pixels of the shorter side before evaluation cuts out the centre", least=1),
    "data.crop_area": _key((0.08, 1.0), "area of a random crop, as a fraction of the image", kind=float),
    "data.crop_aspect": _key((3 / 4, 4 / 3), "width / height of a random crop", kind=float),
    "data.mean": _key((123.675, 116.28, 103.53), "mean per channel, 0 to 255", kind=float),
    "data.std": _key((58.395, 57.12, 57.375), "deviation per channel, 0 to 255", kind=float),
    "data.processes": _key(
        8, "processes that read and decode; 0: a thread of the program does", least=0, resume=True
    ),
}


def facts(options: Options) -> Facts:
    """What is known of a folder of images: how they are cut."""
    return Facts(example=(options["data.size"], options["data.size"], 3), encoded=True)


class Transform(NamedTuple):
    """How images become arrays [size, size, 3].

    Attributes:
      size: pixels of both sides.
      resize: in evaluation the shorter side is resized to this before the centre is cut out.
      area: in training, least and greatest area of the crop, as a fraction of the image's.
      aspect: least and greatest width / height of the crop.
      flip: mirror half of the training images.
    """

    size: int
    resize: int
    area: Bounds
    aspect: Bounds
    flip: bool

    def training(self, rng: np.random.Generator, count: int) -> list[Callable[[bytes], np.ndarray]]:
        """A random crop per position of a batch: functions of the bytes of whatever image is put there."""
        draws, mirrored = rng.random((count, _TRIES, 4)), rng.random(count) < 0.5
        return [functools.partial(self._augment, draws[i], bool(mirrored[i])) for i in range(count)]

    def evaluation(self, data: bytes) -> np.ndarray:
        """The centre of an image, as if its shorter side had been resized to `resize`."""
        with Image.open(io.BytesIO(data)) as image:
            return self.centre(image)

    def centre(self, image: Image.Image) -> np.ndarray:
        """The same, of an image that is open."""
        side = self.size / self.resize * min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        return cut_out(image, (left, top, side, side), self.size)

    def _augment(self, draws: np.ndarray, mirrored: bool, data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            box = random_box(*image.size, draws, self.area, self.aspect)
            pixels = cut_out(image, box, self.size)
        return pixels[:, ::-1] if self.flip and mirrored else pixels


def make_transform(options: Options, *, flip: bool) -> Transform:
    """How images become arrays of one size.

    Args:
      options: values of `OPTIONS`.
      flip: mirror half of the training images.

    Raises:
      ValueError: they cannot work together; the message names the keys.
    """
    area, aspect = options["data.crop_area"], options["data.crop_aspect"]
    for key, values, most in (("crop_area", area, 1.0), ("crop_aspect", aspect, math.inf)):
        if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
            upper = " and at most 1" if most == 1 else ""
            raise ValueError(f"data.{key}={values}; set it to two ascending numbers above 0{upper}")
    size, resize = options["data.size"], options["data.resize"]
    if size > resize:
        raise ValueError(f"data.size={size} and data.resize={resize}; the size must be 1 to data.resize")
    return Transform(size, resize, area, aspect, flip)


def channel_statistics(options: Options) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, 0 to 255.

    Raises:
      ValueError: they are not three numbers each, or a deviation is not above 0.
    """
    mean, std = options["data.mean"], options["data.std"]
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"data.mean={mean} and data.std={std}; set them to three numbers each, std above 0")
    return mean, std


def random_box(width: int, height: int, draws: np.ndarray, area: Bounds, aspect: Bounds) -> Box:
    """The first of some random boxes that lies in the image.

    Args:
      width: of the image, in pixels.
      height: of the image.
      draws: float [tries, 4], uniform in [0, 1): area, aspect, and the place across and down.
      area: bounds of the box's area, as a fraction of the image's; uniform between them.
      aspect: bounds of the box's width / height; its logarithm is uniform between theirs.

    Returns:
      The box, in whole pixels; where none fits, the largest one in the middle whose aspect is allowed.
    """
    areas = width * height * (area[0] + draws[:, 0] * (area[1] - area[0]))
    ratios = aspect[0] * (aspect[1] / aspect[0]) ** draws[:, 1]
    widths, heights = np.round(np.sqrt(areas * ratios)), np.round(np.sqrt(areas / ratios))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    if fits.any():
        i = int(fits.argmax())
        left, top = draws[i, 2] * (width - widths[i] + 1), draws[i, 3] * (height - heights[i] + 1)
        return math.floor(left), math.floor(top), widths[i], heights[i]
    ratio = min(max(width / height, aspect[0]), aspect[1])
    box = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (width - box[0]) // 2, (height - box[1]) // 2, *box


def cut_out(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Decodes an image, cuts out a box and resizes it, with antialiasing.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the box stays larger than the result.

    Args:
      image: open, not decoded yet; greyscale and CMYK images become RGB.
      box: in the image as it is in the file.
      size: pixels of both sides of the result.

    Returns:
      uint8 [size, size, 3].

    Raises:
      OSError, SyntaxError or Image.DecompressionBombError: it is no image, or a truncated one.
    """
    width, height = image.size
    left, top, across, down = box
    image.draft("RGB", (math.ceil(width * size / across), math.ceil(height * size / down)))
    x, y = image.width / width, image.height / height  # below 1 where it is decoded smaller
    right, bottom = min((left + across) * x, image.width), min((top + down) * y, image.height)
    scaled = (left * x, top * y, right, bottom)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=scaled))


UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # what `cut_out` raises
