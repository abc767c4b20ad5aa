"""Image classification sets of tensorflow-datasets, read without TensorFlow.

They must be prepared as array_record files, which `tfds.data_source` reads by index.
"""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from tqdm import tqdm

from ist_jax.data import DataSet, Source, idx

# The package dataset-fashion-mnist.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class _Split:
    """A split whose records are decoded when they are asked for."""

    def __init__(self, records: Any):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        return {"image": record["image"], "label": record["label"]}


class _EncodedSplit:
    """A split whose images stay as they are in the records: bytes of JPEG files."""

    def __init__(self, records: Any):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        return {"image": record["image"], "label": int(record["label"])}

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]; reads all records, which takes minutes where they are many."""
        indices = tqdm(range(len(self)), desc="reading labels", unit="image", leave=False, disable=None)
        return np.array([self._records[i]["label"] for i in indices], np.int32)

    def name(self, index: int) -> str:
        return self._records[index]["file_name"].decode()


def load_encoded(name: str, directory: str) -> DataSet:
    """Opens a set of JPEGs too large to be decoded beforehand, preparing it first where that is possible.

    Args:
      name: of a set in TFDS with splits 'train' and 'validation', and file names.
      directory: TFDS's data_dir; '' for its default.

    Raises:
      ValueError: as `load`.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=directory or None, file_format="array_record")
    if not builder.info.splits:
        _prepare(builder, name)
    decoders = {"image": tfds.decode.SkipDecoding()}
    splits = {
        key: _EncodedSplit(builder.as_data_source(key, decoders=decoders)) for key in ("train", "validation")
    }
    return DataSet(
        description=f"{name}: tensorflow-datasets {builder.info.version} in {builder.data_dir}",
        train=splits["train"],
        test=splits["validation"],
        classes=tuple(builder.info.features["label"].names),
        encoded=True,
    )


def load(name: str, directory: str) -> DataSet:
    """Opens a set, preparing it first where that is possible.

    Fashion-MNIST that is not prepared is read where Debian's package puts it, if that is installed.

    Args:
      name: of an image classification set in TFDS with splits 'train' and 'test'.
      directory: TFDS's data_dir; '' for its default.

    Raises:
      ValueError: it is not there and cannot be prepared; the message says what to run.
    """
    import tensorflow_datasets as tfds  # slow to import, and only these sets need it

    builder = tfds.builder(name, data_dir=directory or None, file_format="array_record")
    if not builder.info.splits:
        if name == "fashion_mnist" and DEBIAN_FASHION_MNIST.is_dir():
            return _open_debian(tuple(builder.info.features["label"].names))
        _prepare(builder, name)
    splits: dict[str, Source] = {key: _Split(builder.as_data_source(key)) for key in ("train", "test")}
    return DataSet(
        description=f"{name}: tensorflow-datasets {builder.info.version} in {builder.data_dir}",
        train=splits["train"],
        test=splits["test"],
        classes=tuple(builder.info.features["label"].names),
    )


def _open_debian(classes: tuple[str, ...]) -> DataSet:
    splits = {
        split: idx.load(
            DEBIAN_FASHION_MNIST / f"{prefix}-images-idx3-ubyte.gz",
            DEBIAN_FASHION_MNIST / f"{prefix}-labels-idx1-ubyte.gz",
        )
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }
    return DataSet(
        description=f"fashion_mnist: Debian's package dataset-fashion-mnist in {DEBIAN_FASHION_MNIST}",
        train=splits["train"],
        test=splits["test"],
        classes=classes,
    )


@contextlib.contextmanager
def _without_tensorflow(builder: Any) -> Iterator[None]:
    """Stands in for what TFDS takes from TensorFlow to prepare these sets: opening files and writing PNG."""
    from tensorflow_datasets.core.features import image_feature

    readers = {c.__module__ for c in type(builder).__mro__ if "tensorflow_datasets.core" not in c.__module__}
    tensorflow = SimpleNamespace(io=SimpleNamespace(gfile=SimpleNamespace(GFile=open)))
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("tensorflow") is None:
            for module in (sys.modules[name] for name in readers if hasattr(sys.modules[name], "tf")):
                stack.enter_context(mock.patch.object(module, "tf", tensorflow))
            stack.enter_context(mock.patch.object(image_feature._ImageEncoder, "_encode_image", _encode_png))
        yield


def _encode_png(encoder: Any, image: np.ndarray) -> bytes:
    del encoder
    content = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(content, "PNG")
    return content.getvalue()


def _prepare(builder: Any, name: str) -> None:
    """Downloads and prepares, with TFDS's own progress bars."""
    try:
        with _without_tensorflow(builder):
            builder.download_and_prepare()
    except Exception as error:  # whatever a download can fail by: no network, a mirror's error, a full disk
        package = " (or install Debian's dataset-fashion-mnist)" if name == "fashion_mnist" else ""
        raise ValueError(
            f"data.name={name!r} is not prepared in {builder.data_dir} and cannot be downloaded here "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); on a machine "
            f"with a network run: python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
            "data_dir='DIR', file_format='array_record').download_and_prepare()\", copy DIR here and set "
            f"config.data.dir to it{package}"
        ) from error
