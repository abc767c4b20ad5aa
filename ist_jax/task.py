"""What is learned from a kind of data: its batches, its loss and its scores."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ist_jax.data import Split, augment
from ist_jax.data.sparse import draw
from ist_jax.models.sparse import Sparse

_PRECISIONS = (1, 3, 5)


class Task(NamedTuple):
    """What a model is shown, and how its logits are judged.

    Attributes:
      example: one example of zeros, for `model.init`.
      batch_fn: (split, numbers [B], key) -> (inputs, labels): a training batch, augmented.
      eval_fn: split -> (inputs, labels): all its examples, as they are.
      score_fn: (logits, labels) -> (losses [B], scores [B, M]).
      scores: their M names; the first is what 'accuracy' means.
    """

    example: jax.Array | Sparse
    batch_fn: Callable[[Split, jax.Array, jax.Array], tuple[jax.Array | Sparse, jax.Array]]
    eval_fn: Callable[[Split], tuple[jax.Array | Sparse, jax.Array]]
    score_fn: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    scores: tuple[str, ...]


def classification(
    normalize: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], *, pad: int, flip: bool
) -> Task:
    """Images or dense features of one class each.

    Args:
      normalize: these as they are -> inputs of a model.
      shape: of one.
      pad: as for `augment.make_batch_fn`.
      flip: the same.
    """
    return Task(
        example=jnp.zeros((1, *shape)),
        batch_fn=augment.make_batch_fn(normalize, pad=pad, flip=flip),
        eval_fn=lambda split: (normalize(jnp.asarray(split["image"])), jnp.asarray(split["label"])),
        score_fn=classification_scores,
        scores=("accuracy",),
    )


def multi_label(num_features: int) -> Task:
    """Sparse features with several labels each: splits of 'feature' and 'label', both `Rows`."""

    def batch(split: Split, numbers: jax.Array) -> tuple[Sparse, jax.Array]:
        return draw(split["feature"], numbers), draw(split["label"], numbers).index

    empty = Sparse(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1)), jnp.zeros(1, jnp.int32), num_features)
    return Task(
        example=empty,
        batch_fn=lambda split, numbers, _: batch(split, numbers),
        eval_fn=lambda split: batch(split, jnp.arange(len(split["label"]))),
        score_fn=multi_label_scores,
        scores=tuple(f"p{k}" for k in _PRECISIONS),
    )


def classification_scores(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax cross-entropy [B], and whether the best class is the right one [B, 1].

    Args:
      logits: [B, C].
      labels: int [B].
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, (logits.argmax(-1) == labels).astype(losses.dtype)[:, None]


def multi_label_scores(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax loss [B], its mean over an example's labels, and precision at 1, 3 and 5 [B, 3].

    Precision at k is the number of an example's labels among the k largest logits, divided by k.

    Args:
      logits: [B, C].
      labels: int [B, L], C where an example has no more labels; every one has at least one.
    """
    given = labels < logits.shape[-1]
    own = jnp.take_along_axis(logits, jnp.where(given, labels, 0), axis=-1)
    mean = jnp.where(given, own, 0).sum(-1) / given.sum(-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - mean
    best = logits.argmax(-1)[:, None]  # not the first of `top`: training needs no more, and drops the rest
    top = lax.top_k(logits, min(max(_PRECISIONS), logits.shape[-1]))[1]
    right, hits = ((x[:, :, None] == labels[:, None, :]).any(-1) for x in (best, top))
    precisions = [right[:, 0], *(hits[:, :k].sum(-1) / k for k in _PRECISIONS[1:])]
    return losses, jnp.stack(precisions, axis=-1).astype(losses.dtype)
