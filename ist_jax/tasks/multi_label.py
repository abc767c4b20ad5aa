"""Sparse features with several labels each: softmax loss and precision at 1, 3 and 5."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from ist_jax.data import Split
from ist_jax.data.sparse import draw
from ist_jax.tasks.classification import check_classes
from ist_jax.tasks.task import ACCURACY, Batch, PerExample, Task, mean_probability

_PRECISIONS = (3, 5)  # beside that at 1, which is the accuracy


def make(split: Split, num_classes: int, *, pad: int = 0, flip: bool = False) -> Task:
    """The task of splits of 'feature' and 'label', both `Rows`.

    Args:
      split: the training examples; of any, the same.
      num_classes: C.
      pad: there are no images to augment, so 0.
      flip: False, for the same reason.

    Raises:
      ValueError: they are to be augmented.
    """
    if pad or flip:
        raise ValueError("sparse examples are no images; set config.data.pad to 0, config.data.flip to False")

    return Task(
        name="multi_label",
        loss=softmax_loss,
        batch=batch,
        scores={"accuracy": precision_at_1} | {f"p{k}": functools.partial(precision, k) for k in _PRECISIONS},
        figures=figures,
        metric=ACCURACY,
        check_outputs=lambda outputs: check_classes(outputs, num_classes),
        combine=mean_probability,
    )


def batch(split: Split, numbers: Int[Array, " B"], key: Key[Array, ""] | None) -> Batch:
    """Inputs `Sparse` and labels int32 [B, L], C where an example has no more labels."""
    return draw(split["feature"], numbers), draw(split["label"], numbers).index


def figures(means: Mapping[str, float]) -> dict[str, float]:
    """The precisions; that at 1 is the accuracy as well."""
    return {"accuracy": means["accuracy"], "p1": means["accuracy"]} | {n: means[n] for n in ("p3", "p5")}


def softmax_loss(logits: Float[Array, "B C"], labels: Int[Array, "B L"], key: object = None) -> PerExample:
    """The mean over an example's labels; it has at least one, and C stands where it has no more."""
    given = labels < logits.shape[-1]
    own = jnp.take_along_axis(logits, jnp.where(given, labels, 0), axis=-1)
    mean = jnp.where(given, own, 0).sum(-1) / given.sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - mean


def precision_at_1(logits: Float[Array, "B C"], labels: Int[Array, "B L"]) -> PerExample:
    """Whether the largest logit is that of one of the labels; without a sort, for training."""
    return _hits(logits.argmax(-1)[:, None], labels)[:, 0].astype(logits.dtype)


def precision(k: int, logits: Float[Array, "B C"], labels: Int[Array, "B L"]) -> PerExample:
    """The number of an example's labels among the k largest logits, divided by k."""
    top = lax.top_k(logits, min(k, logits.shape[-1]))[1]
    return (_hits(top, labels).sum(-1) / k).astype(logits.dtype)


def _hits(chosen: Int[Array, "B k"], labels: Int[Array, "B L"]) -> jax.Array:
    return (chosen[:, :, None] == labels[:, None, :]).any(-1)
