"""A folder of image files per class: `train/<class>/*.JPEG` and, beside it, `test/` or `val/`.

Small images, all of one size, are held in memory as they are; others are streamed.
"""

import logging
import os
from pathlib import Path

import numpy as np

from ist_jax.data import decoded, images
from ist_jax.data.source import DataSet, Entry, Example, Facts
from ist_jax.key import Options

log = logging.getLogger(__name__)

_ENDINGS = (".jpeg", ".jpg", ".png")  # in any case


class FolderSource:
    """One split; its images are read when they are asked for, and not decoded.

    A million names are kept as one array, so that a copy in another process is cheap.

    Args:
      root: the split's folder.
      classes: names of the folders in it, in the order of the labels; one may be missing.
    """

    def __init__(self, root: Path, classes: tuple[str, ...]):
        self._root, self._classes = root, classes
        files = [sorted(_files(root / name)) for name in classes]
        self.labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(f) for f in files])
        self._names = np.array([name for own in files for name in own], dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The file's path."""
        label = self._classes[self.labels[index]]
        return os.path.join(self._root, label, os.fsdecode(self._names[index]))

    def __getitem__(self, index: int) -> Example:
        return {"image": Path(self.name(index)).read_bytes(), "label": int(self.labels[index])}


def load(directory: str, options: Options) -> DataSet:
    """Opens a folder; the classes are those of its training split.

    Args:
      directory: holds `train` and `test`, or else `val`, both with a folder of files per class (.jpeg, .jpg
        or .png).
      options: 'data.in_memory'; how streamed images are cut, which is done when they are read.

    Raises:
      ValueError: a split or its files are missing, or it has a class that training has not.
    """
    root = Path(directory)
    other = "test" if directory and (root / "test").is_dir() else "val"
    classes = {split: _folders(root / split) if directory else () for split in ("train", other)}
    for split, names in classes.items():
        if not names:
            wanted = "train/" if split == "train" else "test/ or val/"
            raise ValueError(
                f"data.dir={directory!r} has no folder {wanted} with a folder of images per class; set "
                "config.data.dir to a folder of train/<class>/*.JPEG and test/<class>/*.JPEG"
            )
    if unknown := sorted(set(classes[other]) - set(classes["train"])):
        raise ValueError(
            f"data.dir={directory!r} has {other}/{unknown[0]}, a class without a folder in train/; "
            f"{len(unknown)} such classes"
        )
    splits = [FolderSource(root / split, classes["train"]) for split in ("train", other)]
    if not all(map(len, splits)):
        counts = f"{len(splits[0])} images in train/ and {len(splits[1])} in {other}/"
        raise ValueError(f"data.dir={directory!r} has {counts}")
    count, own = sum(map(len, splits)), len(classes["train"])
    description = f"image_folder: {count:,} images of {own:,} classes in {directory}, tested on {other}/"
    if options["data.in_memory"]:
        try:
            train, test = decoded.decode_as_is(splits, options)
            return DataSet(description, train, test, classes["train"])
        except (decoded.Unlike, decoded.TooLarge) as why:
            log.info("data: images are streamed, and cropped at random: %s", why)
    return DataSet(description, splits[0], splits[1], classes["train"], encoded=True)


def facts(options: Options) -> Facts:
    """What is known before a folder is opened: whether its images are streamed, if memory is not allowed."""
    return Facts() if options["data.in_memory"] else images.facts(options)


def _folders(root: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in root.iterdir() if p.is_dir())) if root.is_dir() else ()


def _files(folder: Path) -> list[bytes]:
    names = os.listdir(folder) if folder.is_dir() else []  # a class may be missing where it is tested
    return [os.fsencode(name) for name in names if name.lower().endswith(_ENDINGS)]


IMAGE_FOLDER = Entry(load, facts, images.OPTIONS | decoded.OPTIONS)
