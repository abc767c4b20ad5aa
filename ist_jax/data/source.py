"""What a data set is: a random-access source per split, facts known beforehand, and arrays in memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from ist_jax.data.sparse import Rows, take
from ist_jax.key import Key, Options

Split = Mapping[str, PyTree]  # all examples of a split by names, such as 'image' and 'label'; or `Rows`
A = TypeVar("A", np.ndarray, jax.Array)
Example = Mapping[str, Any]  # one of them: arrays, numbers, or the bytes of an image file


class Source(Protocol):
    """One split of a data set, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Example `index`: 'image' [H, W, C] or, of features, [F] (uint8 or float32), and 'label' int.

        Of sparse, multi-label examples: 'feature' int32 [k], 'value' float32 [k] and 'label' int32 [l].
        """


class EncodedSource(Source, Protocol):
    """One split of a set of compressed images that is too large to be decoded beforehand.

    The 'image' of an example is the bytes of an image file.
    """

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]; may have to read the whole split."""

    def name(self, index: int) -> str:
        """What to call example `index` in a message."""


class Vocabulary(NamedTuple):
    """What the tokens of a data set of text stand for.

    Attributes:
      size: V; tokens are 0 to V - 1.
      encode: text -> (tokens int [n], bytes of UTF-8 up to the end of each int [n]).
      decode: tokens -> text.
    """

    size: int
    encode: Callable[[str], tuple[np.ndarray, np.ndarray]]
    decode: Callable[[Sequence[int]], str]


class DataSet(NamedTuple):
    """A data set.

    Attributes:
      description: a line for the log: what it is and where it came from.
      train: source of the training split; or its examples, arrays [N, ...] or pytrees of them by any names.
      test: the same of the test split.
      classes: names, in the order of the labels; (): as many as a 'label' of whole numbers has.
      encoded: the sources are `EncodedSource`s, to be streamed.
      vocabulary: of text; None: the examples are none.
    """

    description: str
    train: Source | Split
    test: Source | Split
    classes: tuple[str, ...] = ()
    encoded: bool = False
    vocabulary: Vocabulary | None = None


class Facts(NamedTuple):
    """What is known of a data set before it is opened; None: that depends on the folder or the config.

    Attributes:
      example: shape of an example, [H, W, C] or [F].
      num_classes: how many.
      num_train: examples in the training split.
      sparse: sparse vectors with several labels each; the example's shape is their length.
      encoded: the sources are `EncodedSource`s, to be streamed.
      split: a few examples in memory, where they tell more than a shape.
    """

    example: tuple[int, ...] | None = None
    num_classes: int | None = None
    num_train: int | None = None
    sparse: bool = False
    encoded: bool = False
    split: Split | None = None


class Entry(NamedTuple):
    """A data set in the table `data.SETS`.

    Attributes:
      load: (folder, options) -> the opened set.
      facts: options -> what is known of it before.
      options: its keys of the config, by whole names such as 'data.words'; the functions get their values.
    """

    load: Callable[[str, Options], DataSet]
    facts: Callable[[Options], Facts] = lambda _: Facts()
    options: Mapping[str, Key] = {}


class ArraySource:
    """A source over arrays in memory.

    Args:
      image: images [N, H, W, C], or [N, H, W] of one channel, or features [N, F]; uint8 or float32.
      label: int [N].

    Raises:
      ValueError: the examples have other axes.
    """

    def __init__(self, image: np.ndarray, label: np.ndarray):
        if image.ndim not in (2, 3, 4):
            raise ValueError(
                f"the examples are an array {list(image.shape)}; images [N, H, W, C] or [N, H, W], or "
                "features [N, F], are allowed"
            )
        self.image, self.label = with_channels(image), label

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.image[index], "label": self.label[index]}


class SparseSource:
    """A source of sparse, multi-label examples in memory.

    Args:
      feature: N rows, with values.
      label: N rows; none is empty.
    """

    def __init__(self, feature: Rows, label: Rows):
        self.feature, self.label = feature, label

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> Example:
        feature, label = (take(rows, np.array([index])) for rows in (self.feature, self.label))
        size = int(feature.start[1])
        return {"feature": feature.index[:size], "value": feature.value[:size], "label": label.index}  # type: ignore[index]


def with_channels(image: A) -> A:
    """Images [N, H, W] as [N, H, W, 1]; others, and features, as they are."""
    return image[..., None] if image.ndim == 3 else image


def load(source: Source | Split) -> dict[str, PyTree]:
    """All examples of a source, decoded once: 'image' [N, H, W, C] or [N, F], 'label' int32 [N].

    Of a `SparseSource`: 'feature' and 'label', `Rows`. Of examples by names: just these, as arrays.

    Raises:
      ValueError: labels of classes are no whole numbers, or arrays have different lengths.
    """
    if isinstance(source, Mapping):
        return _aligned(source)
    if isinstance(source, ArraySource):
        if source.label.dtype.kind not in "iu":
            raise ValueError(f"the labels are {source.label.dtype}; classes are whole numbers, int [N]")
        return _aligned({"image": source.image, "label": source.label.astype(np.int32)})
    if isinstance(source, SparseSource):
        return {"feature": source.feature, "label": source.label}
    first = source[0]["image"]
    images = np.empty((len(source), *first.shape), first.dtype)  # filled in place: a list would double it
    labels = np.empty(len(source), np.int32)
    for i in tqdm(range(len(source)), desc="decoding", unit="image", leave=False, disable=None):
        example = source[i]
        images[i], labels[i] = example["image"], example["label"]
    return {"image": images, "label": labels}


def _aligned(split: Split) -> dict[str, PyTree]:
    """Examples in memory, of as many bits as the devices keep; ValueError where lengths differ."""
    if "weight" in split:
        raise ValueError("no array can be called 'weight': evaluation batches have one of their own")
    arrays = {name: jax.tree.map(_narrow, x, is_leaf=_is_rows) for name, x in split.items()}
    flat, _ = jax.tree_util.tree_flatten_with_path(arrays, is_leaf=_is_rows)
    lengths = {jax.tree_util.keystr(path, simple=True, separator="/"): _length(x) for path, x in flat}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        found = ", ".join(f"{name} has {length:,}" for name, length in lengths.items()) or "there are none"
        raise ValueError(f"all arrays of a split need the same number of examples, at least one: {found}")
    return arrays


def _is_rows(x: object) -> bool:
    return isinstance(x, Rows)


def _length(x: Any) -> int:
    return len(x) if isinstance(x, Rows) or np.ndim(x) else 0


def _narrow(x: Any) -> Any:
    if isinstance(x, Rows):
        return x
    array = np.asarray(x)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def num_examples(split: Split) -> int:
    """How many there are in a split in memory."""
    return _length(jax.tree.leaves(dict(split), is_leaf=_is_rows)[0])


def select(split: Split, numbers: np.ndarray) -> dict[str, PyTree]:
    """The examples with the given numbers [...], on the host; `Rows` as by `sparse.take`."""

    def chosen(x: Any) -> Any:
        return take(x, numbers) if isinstance(x, Rows) else x[numbers]

    return jax.tree.map(chosen, dict(split), is_leaf=_is_rows)
