"""Arrays in a NumPy file: x_train, y_train, x_test and y_test, as `numpy.savez` writes them."""

import zipfile
from pathlib import Path

import numpy as np

from ist_jax.data.source import ArraySource, DataSet, Entry
from ist_jax.key import Options

_NAMES = ("x_train", "y_train", "x_test", "y_test")


def load(directory: str, options: Options) -> DataSet:
    """Opens a file.

    Args:
      directory: the file. x: uint8 images [N, H, W, C] or [N, H, W], or features [N, F] of any numbers, which
        become float32; y: the classes, counted from 0, whole numbers [N] or [N, 1].

    Raises:
      ValueError: there is no such file, or it lacks an array, or one is not as it should be.
    """
    arrays = _read(Path(directory))
    try:
        train, test = (_split(arrays, split) for split in ("train", "test"))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    shapes = [list(arrays[f"x_{split}"].shape) for split in ("train", "test")]
    if shapes[0][1:] != shapes[1][1:]:
        raise ValueError(
            f"{directory}: x_train is {shapes[0]} and x_test {shapes[1]}; examples must be alike"
        )
    classes = tuple(map(str, range(1 + max(train.label.max(), test.label.max()))))
    description = f"npz: {len(train) + len(test):,} examples of {len(classes):,} classes in {directory}"
    return DataSet(description, train, test, classes)


def _read(path: Path) -> dict[str, np.ndarray]:
    needed = f"a .npz file of {', '.join(_NAMES)}"
    if not zipfile.is_zipfile(path):
        what = "is no .npz file" if path.is_file() else "is no file"
        raise ValueError(f"data.dir={str(path)!r} {what}; set config.data.dir to {needed}")
    with np.load(path) as file:
        if missing := [name for name in _NAMES if name not in file.files]:
            there = ", ".join(file.files) or "nothing"
            raise ValueError(f"{path} has no {', '.join(missing)}, but {there}; it must be {needed}")
        try:
            return {name: file[name] for name in _NAMES}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:  # damaged, or Python's objects
            raise ValueError(f"cannot read {path}: {error}") from error


def _split(arrays: dict[str, np.ndarray], split: str) -> ArraySource:
    x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if y.dtype.kind not in "iu" or y.shape not in ((y.size,), (y.size, 1)):
        raise ValueError(f"y_{split} is {y.dtype} {list(y.shape)}; whole numbers [N] or [N, 1] are needed")
    if x.shape[:1] != (y.size,) or not y.size:
        shapes = f"x_{split} is {list(x.shape)} and y_{split} {list(y.shape)}"
        raise ValueError(f"{shapes}; a label each is needed")
    if y.min() < 0:
        raise ValueError(f"y_{split} has the label {y.min()}; classes are counted from 0")
    if x.dtype.kind not in "iufb":
        raise ValueError(f"x_{split} is of {x.dtype}; numbers are needed")
    if x.dtype != np.uint8:
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise ValueError(f"x_{split} has values that are not finite")
    return ArraySource(x, y.reshape(-1).astype(np.int32))


NPZ = Entry(load)
