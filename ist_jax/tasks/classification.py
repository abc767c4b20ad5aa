"""Images or dense features of one class each: softmax cross-entropy and accuracy."""

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from ist_jax.data import Split, augment
from ist_jax.data.augment import Statistics
from ist_jax.tasks.task import ACCURACY, Batch, PerExample, Task, mean_probability


def make(split: Split, num_classes: int, *, pad: int, flip: bool) -> Task:
    """The task of a data set in memory: normalised by the statistics of its channels.

    Args:
      split: the training examples: 'image' [N, ..., channels] and 'label' int [N].
      num_classes: C.
      pad: as for `augment.make_batch_fn`.
      flip: the same.
    """
    image = split["image"]
    if (pad or flip) and image.ndim == 2:
        raise ValueError("the examples are no images; set config.data.pad to 0, config.data.flip to False")
    return classification(augment.channel_statistics(image), pad=pad, flip=flip, num_classes=num_classes)


def classification(statistics: Statistics, *, pad: int, flip: bool, num_classes: int) -> Task:
    """The task of examples with an 'image', or dense features under that name, and a 'label'.

    Args:
      statistics: mean and deviation by which these are normalised, from `augment.channel_statistics`.
      pad: as for `augment.make_batch_fn`.
      flip: the same.
      num_classes: C.
    """
    normalize = augment.make_normalize(*statistics)
    augmented = augment.make_batch_fn(normalize, pad=pad, flip=flip)
    plain = augment.make_batch_fn(normalize, pad=0, flip=False)

    def batch(split: Split, numbers: Int[Array, " B"], key: Key[Array, ""] | None) -> Batch:
        return plain(split, numbers, key) if key is None else augmented(split, numbers, key)

    def check(split: Split) -> None:
        check_labels(split["label"], num_classes)

    return Task(
        name="classification",
        loss=cross_entropy,
        batch=batch,
        scores={"accuracy": is_right},
        metric=ACCURACY,
        check=check,
        check_outputs=lambda outputs: check_classes(outputs, num_classes),
        normalization=statistics,
        combine=mean_probability,
    )


def cross_entropy(logits: Float[Array, "B C"], labels: Int[Array, " B"], key: object = None) -> PerExample:
    """Softmax cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def is_right(logits: Float[Array, "B C"], labels: Int[Array, " B"]) -> PerExample:
    """1 where the best class is the right one, else 0."""
    return (logits.argmax(-1) == labels).astype(logits.dtype)


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError for labels that are no whole numbers from 0 to C - 1."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        shape = ", ".join(["N", *map(str, labels.shape[1:])])
        raise ValueError(f"the labels are {labels.dtype} [{shape}]; classes are whole numbers, int [N]")
    least, most = labels.min(), labels.max()
    if least < 0 or most >= num_classes:
        raise ValueError(
            f"there is a label {least if least < 0 else most}; the data set has {num_classes:,} classes, so "
            f"that labels must be 0 to {num_classes - 1:,}"
        )


def check_classes(outputs: PyTree, num_classes: int) -> None:
    """Raises ValueError for a model whose outputs are not logits [B, C]."""
    shapes = [x.shape for x in jax.tree.leaves(outputs)]
    if shapes != [(1, num_classes)]:
        found = ", ".join(f"[{', '.join(['B', *map(str, shape[1:])])}]" for shape in shapes)
        raise ValueError(
            f"the model returns {found}, and the data set has {num_classes:,} classes; logits "
            f"[B, {num_classes}] are needed"
        )
