"""Evaluation of the global model: a split's scores."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax
from jaxtyping import PyTree

from ist_jax.data import Split
from ist_jax.exchange.layout import Layout, Shards
from ist_jax.exchange.streaming import Streamed
from ist_jax.methods.method import Gates
from ist_jax.models.sparse import Sparse
from ist_jax.task import Task

Scale: TypeAlias = Mapping[str, float]  # by group, of its units' branches; {} or None: as they are
Inputs: TypeAlias = jax.Array | Sparse
Judge: TypeAlias = Callable[..., tuple[jax.Array, jax.Array]]


class Score(NamedTuple):
    """Means over all examples, each counted once; `scores` by the task's names, accuracy their first."""

    loss: float
    scores: dict[str, float]
    examples: int

    @property
    def accuracy(self) -> float:
        return next(iter(self.scores.values()))

    def figures(self, split: str) -> dict[str, float]:
        """For a record: 'test_loss', 'test_accuracy', 'test_examples' and, by their names, the scores."""
        named = {"loss": self.loss, "accuracy": self.accuracy, "examples": self.examples} | self.scores
        return {f"{split}_{name}": value for name, value in named.items()}

    def __str__(self) -> str:
        more = ", ".join(f"{name} {value:.2%}" for name, value in self.scores.items() if name != "accuracy")
        return f"accuracy {self.accuracy:.2%}" + (f" ({more})" if more else "")


def is_streamable(model: nn.Module) -> bool:
    """Whether the model can be evaluated with one block or layer in memory at a time."""
    return hasattr(model, "fetch")


def make_loss_fn(model: nn.Module, score_fn: Judge, scale: Scale | None = None) -> Judge:
    """(flat params, inputs, labels, gates) -> (mean loss, mean of the first score) of a subnet.

    Args:
      model: the subnet.
      score_fn: of the task.
      scale: of its units' branches; None: as they are.
    """

    def loss_fn(params: Shards, inputs: Inputs, labels: jax.Array, gates: Gates | None) -> tuple:
        variables = {"params": traverse_util.unflatten_dict(params, sep="/")}
        logits = cast(jax.Array, model.apply(variables, inputs, gates=gates, scale=scale))
        losses, scores = score_fn(logits, labels)
        return losses.mean(), scores[:, 0].mean()

    return loss_fn


def score_shards(
    layout: Layout, model: nn.Module, task: Task, scale: Scale, shards: Shards, batches: Split
) -> jax.Array:
    """Sums over this device's evaluation batches; a program for `devices.compile_program`.

    Args:
      layout: of the store.
      model: the global model; its blocks or layers are gathered one at a time where it can be streamed.
      task: makes inputs and labels of the batches, and scores the logits.
      scale: of the units of each group, from `setup.unit_scale`; {}: none.
      shards: this device's share of the parameters.
      batches: this device's part of `inputs.deal_batches`, [n, B, ...].

    Returns:
      float32 [n, 2 + M]: per batch the weighted sums of the loss and of M scores, and the weights'.
    """
    fetch, streamed = Streamed(layout), is_streamable(model)
    params = shards if streamed else {path: fetch(path, shard) for path, shard in shards.items()}
    model = model.clone(fetch=fetch) if streamed else model
    variables = {"params": traverse_util.unflatten_dict(params, sep="/")}

    return lax.map(partial(score_batch, model, task, scale, variables), dict(batches))


def score_batch(model: nn.Module, task: Task, scale: Scale, variables: PyTree, batch: Split) -> jax.Array:
    """Weighted sums over a batch, float32 [2 + M]: the loss, the scores, and the weights'."""
    inputs, labels = task.eval_fn(batch)
    logits = cast(jax.Array, model.apply(variables, inputs, scale=scale))
    losses, scores = task.score_fn(logits, labels)
    weight = batch["weight"]
    return jnp.concatenate([(weight[:, None] * jnp.c_[losses, scores]).sum(0), weight.sum()[None]])


def total_score(task: Task, sums: np.ndarray) -> Score:
    """The score from the sums [..., 2 + M] of all devices and batches, added up in float64."""
    sums = np.asarray(sums, np.float64)
    loss, *scores, weight = sums.reshape(-1, sums.shape[-1]).sum(0).tolist()
    means = {name: score / weight for name, score in zip(task.scores, scores, strict=True)}
    return Score(loss / weight, means, round(weight))
