"""Data sets: a random-access source per split, opened by name."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from ist_jax.data.sparse import Rows, take

Split = Mapping[str, Any]  # all examples of a split: 'image' or 'feature', and 'label'; arrays or `Rows`


class Source(Protocol):
    """One split of a data set, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Example `index`: 'image' [H, W, C] (uint8, or float32 for features) and 'label' int.

        Of sparse, multi-label examples: 'feature' int32 [k], 'value' float32 [k] and 'label' int32 [l].
        """


class EncodedSource(Protocol):
    """One split of a set of compressed images that is too large to be decoded beforehand."""

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]; may have to read the whole split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Example `index`: 'image', the bytes of an image file, and 'label' int."""

    def name(self, index: int) -> str:
        """What to call example `index` in a message."""


class DataSet(NamedTuple):
    """A data set for classification.

    Attributes:
      description: a line for the log: what it is and where it came from.
      train: source of the training split.
      test: source of the test split.
      classes: names, in the order of the labels.
      encoded: the sources are `EncodedSource`s, to be streamed.
    """

    description: str
    train: Any
    test: Any
    classes: tuple[str, ...]
    encoded: bool = False


class Facts(NamedTuple):
    """What is known of a data set before it is opened; None: that depends on the folder or the config.

    Attributes:
      example: shape of an example, [H, W, C].
      num_classes: how many.
      num_train: examples in the training split.
      sparse: sparse vectors with several labels each; the example's shape is their length.
    """

    example: tuple[int, ...] | None = None
    num_classes: int | None = None
    num_train: int | None = None
    sparse: bool = False


class ArraySource:
    """A source over arrays in memory.

    Args:
      image: uint8 [N, H, W, C], or float32 for features.
      label: int [N].
    """

    def __init__(self, image: np.ndarray, label: np.ndarray):
        self.image = image
        self.label = label

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.image[index], "label": self.label[index]}


class SparseSource:
    """A source of sparse, multi-label examples in memory.

    Args:
      feature: N rows, with values.
      label: N rows; none is empty.
    """

    def __init__(self, feature: Rows, label: Rows):
        self.feature = feature
        self.label = label

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, Any]:
        feature, label = (take(rows, np.array([index])) for rows in (self.feature, self.label))
        size = int(feature.start[1])
        return {"feature": feature.index[:size], "value": feature.value[:size], "label": label.index}


def _open_digits(directory: str) -> DataSet:
    del directory  # embedded in scikit-learn
    from ist_jax.data import digits

    return digits.load()


def _open_speech_commands(directory: str, *, words: tuple[str, ...], clip_length: str) -> DataSet:
    from ist_jax.data import speech_commands

    return speech_commands.load(directory, words=words, clip_length=clip_length)


def _open_extreme_classification(directory: str) -> DataSet:
    from ist_jax.data import extreme_classification

    return extreme_classification.load(directory)


def _open_tfds(directory: str, *, name: str) -> DataSet:
    from ist_jax.data import tfds_images

    return tfds_images.load(name, directory)


def _open_image_folder(directory: str) -> DataSet:
    from ist_jax.data import image_folder

    return image_folder.load(directory)


def _open_imagenet(directory: str) -> DataSet:
    from ist_jax.data import tfds_images

    return tfds_images.load_encoded("imagenet2012", directory)


_TFDS_NAMES = ("cifar10", "cifar100", "svhn_cropped", "mnist", "fashion_mnist")
OPENERS: dict[str, Callable[..., DataSet]] = {
    "digits": _open_digits,
    "extreme_classification": _open_extreme_classification,
    "amazon670k": _open_extreme_classification,
    "delicious": _open_extreme_classification,
    "image_folder": _open_image_folder,
    "imagenet2012": _open_imagenet,
    "speech_commands": _open_speech_commands,
    **{name: functools.partial(_open_tfds, name=name) for name in _TFDS_NAMES},
}
# What opening a set takes beside its folder, as keyword arguments.
OPTIONS: dict[str, tuple[str, ...]] = {"speech_commands": ("words", "clip_length")}
FACTS: dict[str, Facts] = {
    "amazon670k": Facts((135_909,), 670_091, 490_449, sparse=True),
    "delicious": Facts((500,), 983, 12_920, sparse=True),
    "extreme_classification": Facts(sparse=True),
    "digits": Facts((8, 8, 1), 10, 1_437),
    "image_folder": Facts(),
    "imagenet2012": Facts(None, 1_000, 1_281_167),
    "speech_commands": Facts((128, 32, 1), 35, 84_663),  # about four fifths of the archive's 105,829 clips
    "cifar10": Facts((32, 32, 3), 10, 50_000),
    "cifar100": Facts((32, 32, 3), 100, 50_000),
    "svhn_cropped": Facts((32, 32, 3), 10, 73_257),
    "mnist": Facts((28, 28, 1), 10, 60_000),
    "fashion_mnist": Facts((28, 28, 1), 10, 60_000),
}


def open_data_set(name: str, directory: str, **options: Any) -> DataSet:
    """Opens a data set.

    Args:
      name: one of `OPENERS`.
      directory: where its files are; unused by embedded sets.
      **options: those in `OPTIONS[name]`; the set's own module says what they mean.

    Raises:
      ValueError: there is no such data set, or not there, or an option cannot be met.
    """
    if name not in OPENERS:
        raise ValueError(
            f"data.name={name!r} does not exist; set config.data.name to one of {sorted(OPENERS)}"
        )
    return OPENERS[name](directory, **options)


def load(source: Source) -> dict[str, Any]:
    """All examples of a source, decoded once: 'image' [N, H, W, C], 'label' int32 [N].

    Of a `SparseSource`: 'feature' and 'label', `Rows`.
    """
    if isinstance(source, ArraySource):
        return {"image": source.image, "label": source.label.astype(np.int32)}
    if isinstance(source, SparseSource):
        return {"feature": source.feature, "label": source.label}
    first = source[0]["image"]
    images = np.empty((len(source), *first.shape), first.dtype)  # filled in place: a list would double it
    labels = np.empty(len(source), np.int32)
    for i in tqdm(range(len(source)), desc="decoding", unit="image", leave=False, disable=None):
        example = source[i]
        images[i], labels[i] = example["image"], example["label"]
    return {"image": images, "label": labels}


def select(split: Split, numbers: np.ndarray) -> dict[str, Any]:
    """The examples with the given numbers [...], on the host; `Rows` as by `sparse.take`."""
    return {name: take(x, numbers) if isinstance(x, Rows) else x[numbers] for name, x in split.items()}
