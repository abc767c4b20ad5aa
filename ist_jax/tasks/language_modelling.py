"""The next token of a sequence: cross-entropy, in bits, and perplexity."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from ist_jax.data import Split
from ist_jax.tasks.task import Batch, Metric, PerExample, Task, mean_probability


def make(split: Split, num_classes: int = 0, *, pad: int = 0, flip: bool = False) -> Task:
    """The task of splits of 'tokens', int [N, L]: a model is shown the first L - 1, and is to tell the last.

    Its outputs are logits [B, L - 1, V] of each next token. Where tokens are uint8, they are taken for bytes.

    Args:
      split: the training examples.
      num_classes: the vocabulary that the data set names, 0: as large as its tokens tell.
      pad: there are no images to augment, so 0.
      flip: False, for the same reason.

    Raises:
      ValueError: they are to be augmented, or are no sequences of tokens.
    """
    tokens = split.get("tokens")
    if pad or flip:
        raise ValueError("tokens are no images; set config.data.pad to 0, config.data.flip to False")
    if tokens is None or tokens.ndim != 2 or tokens.shape[1] < 2 or tokens.dtype.kind not in "iu":
        found = "there are none" if tokens is None else f"they are {tokens.dtype} {list(tokens.shape)}"
        raise ValueError(f"language modelling needs 'tokens', whole numbers [N, L] with L > 1; {found}")
    vocabulary = max(num_classes, int(tokens.max()) + 1)
    unit = "byte" if tokens.dtype == np.uint8 else "token"

    def figures(means: Mapping[str, float]) -> dict[str, float]:
        perplexity = math.exp(means["loss"]) if means["loss"] < _LARGE else math.inf
        return {f"bits_per_{unit}": means["loss"] / math.log(2), "perplexity": perplexity}

    return Task(
        name="language_modelling",
        loss=next_token_loss,
        batch=batch,
        figures=figures,
        metric=Metric(f"bits_per_{unit}"),
        check=lambda split: _check_tokens(split["tokens"], vocabulary),
        check_outputs=_output_check(tokens.shape[1] - 1, vocabulary),
        combine=mean_probability,
    )


_LARGE = 700.0  # nats, of which a float64 still holds the exponential


def batch(split: Split, numbers: Int[Array, " B"], key: Key[Array, ""] | None) -> Batch:
    """Inputs and labels int32 [B, L - 1]: the tokens but the last, and but the first."""
    tokens = jnp.asarray(split["tokens"])[numbers].astype(jnp.int32)
    return tokens[:, :-1], tokens[:, 1:]


def next_token_loss(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], key: object = None
) -> PerExample:
    """Softmax cross-entropy in nats, the mean over a sequence."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(-1)


def _check_tokens(tokens: np.ndarray, vocabulary: int) -> None:
    least, most = tokens.min(), tokens.max()
    if least < 0 or most >= vocabulary:
        bad = least if least < 0 else most
        raise ValueError(f"there is a token {bad}; the training examples have 0 to {vocabulary - 1:,}")


def _output_check(length: int, vocabulary: int) -> Callable[[PyTree], None]:
    def check(outputs: PyTree) -> None:
        shapes = [x.shape for x in jax.tree.leaves(outputs)]
        if len(shapes) != 1 or shapes[0][:-1] != (1, length) or shapes[0][-1] < vocabulary:
            found = ", ".join(f"[{', '.join(['B', *map(str, shape[1:])])}]" for shape in shapes)
            raise ValueError(
                f"the model returns {found}; logits [B, {length}, V] are needed, V of at least the "
                f"{vocabulary:,} tokens that there are"
            )

    return check
