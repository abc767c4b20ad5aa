"""The idx format of MNIST's files: a magic number (8 for uint8, and the rank), the sizes, and the bytes.

Reference: LeCun, Cortes and Burges, The MNIST Database of Handwritten Digits, 1998.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np

from ist_jax.data.source import ArraySource


def load(images: Path, labels: Path) -> ArraySource:
    """A split from its two gzipped files: images uint8 [N, H, W, 1] and labels [N].

    Raises:
      ValueError: a file cannot be read, or they do not belong together; the message names it.
    """
    pixels, numbers = read(images, 3), read(labels, 1)
    if len(pixels) != len(numbers):
        raise ValueError(f"{images} holds {len(pixels)} images, but {labels} {len(numbers)} labels")
    return ArraySource(pixels[..., None], numbers.astype(np.int32))


def read(path: Path, rank: int) -> np.ndarray:
    """The uint8 array of so many axes in a gzipped idx file.

    Raises:
      ValueError: it cannot be read, or holds something else; the message names it.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    start = 4 + 4 * rank
    if content[:4] != bytes((0, 0, 8, rank)) or len(content) < start:
        raise ValueError(f"{path} is no idx file of bytes with {rank} axes")
    shape = np.frombuffer(content[4:start], ">u4").astype(np.int64)
    if len(content) - start != shape.prod():
        raise ValueError(f"{path} is cut off or too long: {len(content) - start:,} of {shape.prod():,} bytes")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
