"""Image classification sets of tensorflow-datasets, read without TensorFlow.

They must be prepared as array_record files, which are read by index: `data.prepare` does that.
"""

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ist_jax import errors
from ist_jax.data import idx, images
from ist_jax.data.source import ArraySource, DataSet, Entry, Example, Facts, Source
from ist_jax.key import Options

# The package dataset-fashion-mnist.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
Builder = Any  # tfds.core.DatasetBuilder, which is slow to import


class RecordSource:
    """A split whose records are read when they are asked for; images are decoded then, or stay as they are.

    Args:
      records: TFDS's own source, by index.
    """

    def __init__(self, records: Sequence[Example]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        return {"image": record["image"], "label": int(record["label"])}

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]; reads all records, which takes minutes where they are many."""
        indices = tqdm(range(len(self)), desc="reading labels", unit="image", leave=False, disable=None)
        return np.array([self._records[i]["label"] for i in indices], np.int32)

    def name(self, index: int) -> str:
        return self._records[index]["file_name"].decode()


def load(name: str, directory: str, options: Options, *, encoded: bool = False) -> DataSet:
    """Opens a set that is prepared.

    Fashion-MNIST that is not prepared is read where Debian's package puts it, if that is installed.

    Args:
      name: of an image classification set in TFDS with splits 'train' and 'test'.
      directory: TFDS's data_dir; '' for its default.
      options: none, or how the images are cut, which is done when they are read.
      encoded: its JPEGs are too large to be decoded beforehand; they have file names, and the set has splits
        'train' and 'validation'.

    Raises:
      ValueError: it is not there; the message says what to run.
    """
    import tensorflow_datasets as tfds  # slow to import, and only these sets need it

    builder = make_builder(name, directory)
    description = f"{name}: tensorflow-datasets {builder.info.version} in {builder.data_dir}"
    if builder.info.splits:
        decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
        keys = ("train", "validation" if encoded else "test")
        splits: list[Source] = [RecordSource(builder.as_data_source(key, decoders=decoders)) for key in keys]
    elif name == "fashion_mnist" and DEBIAN_FASHION_MNIST.is_dir():
        description = f"{name}: Debian's package dataset-fashion-mnist in {DEBIAN_FASHION_MNIST}"
        splits = [_open_debian(prefix) for prefix in ("train", "t10k")]
    else:
        raise _unprepared(builder, name, directory)
    train, test = splits
    return DataSet(description, train, test, tuple(builder.info.features["label"].names), encoded)


def _open_debian(prefix: str) -> ArraySource:
    files = [DEBIAN_FASHION_MNIST / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    return idx.load(*files)


def make_builder(name: str, directory: str) -> Builder:
    """TFDS's builder of a set, for array_record files in its data_dir `directory`; '': in its default."""
    import tensorflow_datasets as tfds

    return tfds.builder(name, data_dir=directory or None, file_format="array_record")


def hide_progress() -> None:
    """No bars of TFDS from here on."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()


def _unprepared(builder: Builder, name: str, directory: str) -> ValueError:
    folder = directory or str(Path(builder.data_dir).parents[1])
    there = errors.contents(Path(folder), (name, "downloads"))
    holds = f", which holds {there}" if there else ""
    command = f"python -m ist_jax.data.prepare {name}" + f" --dir={shlex.quote(directory)}" * bool(directory)
    package = ", or install Debian's dataset-fashion-mnist" if name == "fashion_mnist" else ""
    return ValueError(
        f"no {name} in {folder}{holds}; {command} fetches it, here or on a machine with a network, from "
        f"which the folder is copied{package}; config.data.dir says where it is"
    )


def _decoded(name: str, shape: tuple[int, ...], num_classes: int, num_train: int) -> Entry:
    return Entry(partial(load, name), lambda _: Facts(shape, num_classes, num_train))


SETS: dict[str, Entry] = {
    "cifar10": _decoded("cifar10", (32, 32, 3), 10, 50_000),
    "cifar100": _decoded("cifar100", (32, 32, 3), 100, 50_000),
    "fashion_mnist": _decoded("fashion_mnist", (28, 28, 1), 10, 60_000),
    "imagenet2012": Entry(
        partial(load, "imagenet2012", encoded=True),
        lambda options: images.facts(options)._replace(num_classes=1_000, num_train=1_281_167),
        images.OPTIONS,
    ),
    "mnist": _decoded("mnist", (28, 28, 1), 10, 60_000),
    "svhn_cropped": _decoded("svhn_cropped", (32, 32, 3), 10, 73_257),
}
