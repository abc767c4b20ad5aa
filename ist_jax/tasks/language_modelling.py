"""The next token of a sequence: cross-entropy, in bits, and perplexity."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from ist_jax.data import Split
from ist_jax.streams import Use, rng
from ist_jax.tasks.task import Batch, Metric, PerExample, Task, mean_probability

Labels = Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, " B"]]  # with the bytes that they stand for


def make(split: Split, num_classes: int = 0, *, pad: int = 0, flip: bool = False) -> Task:
    """The task of splits of 'tokens', int [N, L]: a model is shown the first L - 1, and is to tell the last.

    Its outputs are logits [B, L - 1, V] of each next token. Where tokens are uint8, they are taken for bytes.
    Where 'bytes', int [N], says how many the last L - 1 of a sequence stand for, there are bits per byte too.

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
    counted = "bytes" in split

    def figures(means: Mapping[str, float]) -> dict[str, float]:
        bits = means["loss"] / math.log(2)
        perplexity = math.exp(means["loss"]) if means["loss"] < _LARGE else math.inf
        found = {f"bits_per_{unit}": bits, "perplexity": perplexity}
        if not counted:
            return found
        each = means[_BYTES]
        return {"bits_per_byte": bits / each if each else math.inf} | found | {_BYTES: each}

    return Task(
        name="language_modelling",
        loss=next_token_loss,
        batch=batch,
        scores={_BYTES: bytes_per_token} if counted else {},
        figures=figures,
        metric=Metric("bits_per_byte" if counted else f"bits_per_{unit}"),
        check=lambda split: _check_tokens(split["tokens"], vocabulary),
        check_outputs=_output_check(tokens.shape[1] - 1, vocabulary),
        combine=mean_probability,
    )


_BYTES = "bytes_per_token"
_LARGE = 700.0  # nats, of which a float64 still holds the exponential


def batch(split: Split, numbers: Int[Array, " B"], key: Key[Array, ""] | None) -> Batch:
    """Inputs and labels int32 [B, L - 1]: the tokens but the last, and but the first.

    Where bytes are counted, the labels are a pair: these, and the bytes that they stand for, int [B].
    """
    tokens = jnp.asarray(split["tokens"])[numbers].astype(jnp.int32)
    shown, following = tokens[:, :-1], tokens[:, 1:]
    return shown, (following, jnp.asarray(split["bytes"])[numbers]) if "bytes" in split else following


def next_token_loss(logits: Float[Array, "B T V"], labels: Labels, key: object = None) -> PerExample:
    """Softmax cross-entropy in nats, the mean over a sequence."""
    following = labels[0] if isinstance(labels, tuple) else labels
    return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean(-1)


def bytes_per_token(logits: Float[Array, "B T V"], labels: tuple[Array, Array]) -> PerExample:
    """Of the labels of a sequence, the mean."""
    following, count = labels
    return count.astype(logits.dtype) / following.shape[-1]


def sample(
    logits_of: Callable[[Int[np.ndarray, "1 T"]], Float[np.ndarray, "1 T V"]],
    tokens: Sequence[int],
    count: int,
    *,
    length: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """Continues a sequence, token by token, by a causal model.

    Args:
      logits_of: the model. It is shown the last `length` tokens, with zeros behind them where they are fewer.
      tokens: what there is, at least one.
      count: how many tokens to add.
      length: T.
      temperature: 0: always the likeliest; else drawn from softmax(logits / temperature).
      seed: of the draws.

    Returns:
      The tokens that were added.
    """
    source, found = rng(seed, Use.CONTINUATION), [*tokens]
    for _ in range(count):
        last = found[-length:]
        shown = np.zeros((1, length), np.int32)
        shown[0, : len(last)] = last
        logits = np.asarray(logits_of(shown))[0, len(last) - 1]
        if temperature:
            logits = logits / temperature + source.gumbel(size=logits.shape)
        found.append(int(logits.argmax()))
    return found[len(tokens) :]


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
