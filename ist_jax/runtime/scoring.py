"""Evaluation of the global model: a split's scores."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval
from jaxtyping import PyTree

from ist_jax.data import Split
from ist_jax.exchange.layout import AXIS, Layout, Shards
from ist_jax.exchange.streaming import Streamed
from ist_jax.methods.method import Gates, Losses, State
from ist_jax.models import adapter
from ist_jax.tasks.task import Metric, Task

Scale: TypeAlias = Mapping[str, float]  # by group, of its units' branches; {} or None: as they are
_LOSS = 2**31 + 2  # folded into a step's key


class Score(NamedTuple):
    """What all examples come to, each counted once: the mean loss, and the task's figures by their names.

    `members`: the same, by name, of each net of an ensemble by itself; () for one model.
    """

    loss: float
    scores: dict[str, float]
    examples: int
    metric: Metric
    members: tuple[dict[str, float], ...] = ()

    @property
    def value(self) -> float:
        """The figure that counts."""
        return ({"loss": self.loss} | self.scores)[self.metric.name]

    def figures(self, split: str) -> dict[str, float]:
        """For a record: 'test_loss', 'test_examples' and the others by their names, as 'test_accuracy'.

        Of an ensemble also 'test_member_accuracy' and so on, means over its nets by themselves.
        """
        named = {"loss": self.loss, "examples": self.examples} | self.scores
        for name in ("loss", *self.scores) if self.members else ():
            named[f"member_{name}"] = float(np.mean([own[name] for own in self.members]))
        return {f"{split}_{name}": value for name, value in named.items()}

    def __str__(self) -> str:
        others = [f"{n} {self.metric.text(x)}" for n, x in self.scores.items() if n != self.metric.name]
        more = f" ({', '.join(others)})" if others else ""
        return f"{self.metric.name} {self.metric.text(self.value)}{more}"


def is_streamable(model: nn.Module) -> bool:
    """Whether the model can be evaluated with one block or layer in memory at a time."""
    return adapter.offers(model, "fetch")


def reads_params_alone(score: ClosedJaxpr, state: State) -> bool:
    """Whether a method's score, of (state, batches), depends on no other field of the state."""
    _, read = partial_eval.dce_jaxpr(score.jaxpr, [True] * len(score.jaxpr.outvars))
    return not any(read[len(jax.tree.leaves(state.params)) : len(jax.tree.leaves(state))])


def make_loss_fn(model: nn.Module, task: Task, scale: Scale | None = None) -> Callable[..., Losses]:
    """(flat params, inputs, labels, gates, key) -> (mean loss, mean of the first score) of a subnet.

    Args:
      model: the subnet.
      task: judges its outputs.
      scale: of its units' branches; None: as they are.
    """

    first = next(iter(task.scores.values()), lambda outputs, labels: jnp.zeros(1))

    def loss_fn(
        params: Shards, inputs: PyTree, labels: PyTree, gates: Gates | None, key: jax.Array
    ) -> Losses:
        variables = {"params": traverse_util.unflatten_dict(params, sep="/")}
        outputs = adapter.apply(model, variables, inputs, key=key, gates=gates, scale=scale)
        losses = task.loss(outputs, labels, jax.random.fold_in(key, _LOSS))
        return losses.mean(), first(outputs, labels).mean()

    return loss_fn


def score_shards(
    layout: Layout, model: nn.Module, task: Task, scale: Scale, shards: Shards, batches: Split
) -> jax.Array:
    """Sums over this device's evaluation batches; a program for `devices.compile_program`.

    Args:
      layout: of the store.
      model: the global model; its blocks or layers are gathered one at a time where it can be streamed.
      task: makes inputs and labels of the batches, and judges the outputs.
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
    inputs, labels = task.show(batch)
    outputs = adapter.apply(model, variables, inputs, scale=scale)
    return jnp.concatenate([_judge(task, outputs, labels, batch["weight"]), batch["weight"].sum()[None]])


def _judge(task: Task, outputs: PyTree, labels: PyTree, weight: jax.Array) -> jax.Array:
    """Weighted sums of the loss and the scores, float32 [1 + M]."""
    scores = (score(outputs, labels) for score in task.scores.values())
    judged = jnp.stack([task.loss(outputs, labels, None), *scores], axis=-1)
    return (weight[:, None] * judged).sum(0)


def score_members(model: nn.Module, task: Task, members: Shards, batches: Split) -> jax.Array:
    """The same of nets of the workers' own: of all of them together, as the task combines them, and of each.

    The examples go to all devices, and the outputs of their nets come back.

    Args:
      model: of one net.
      task: as for `score_shards`.
      members: flat parameters of this device's nets, [W, ...].
      batches: as for `score_shards`.

    Returns:
      float32 [n, (1 + S) (1 + M) + 1]: the sums of all together, of each, and the weights'.
    """

    def score_one(batch: Split) -> jax.Array:
        everybody = jax.tree.map(lambda x: lax.all_gather(x, AXIS), dict(batch))  # [D, B, ...]

        def outputs_of(params: Shards) -> PyTree:
            variables = {"params": traverse_util.unflatten_dict(params, sep="/")}
            return lax.map(lambda own: adapter.apply(model, variables, task.show(own)[0]), everybody)

        outputs = jax.tree.map(lambda x: lax.all_to_all(x, AXIS, 1, 0), lax.map(outputs_of, members))
        outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)  # [S, B, ...]
        labels, weight = task.show(batch)[1], batch["weight"]
        together = _judge(task, task.combine(outputs), labels, weight)
        singly = lax.map(lambda own: _judge(task, own, labels, weight), outputs)
        return jnp.concatenate([together, singly.ravel(), weight.sum()[None]])

    return lax.map(score_one, dict(batches))


def total_score(task: Task, sums: np.ndarray) -> Score:
    """The score from the sums of all devices and batches, added up in float64.

    Args:
      task: whose figures it has.
      sums: [..., 2 + M] of one model, or what `score_members` returns.
    """
    sums = np.asarray(sums, np.float64)
    *added, weight = sums.reshape(-1, sums.shape[-1]).sum(0).tolist()
    names, found = ("loss", *task.scores), []
    for start in range(0, len(added), len(names)):
        own = added[start : start + len(names)]
        means = {name: x / weight for name, x in zip(names, own, strict=True)}
        found.append((means["loss"], dict(task.figures(means))))
    (loss, figures), *others = found
    members = tuple({"loss": own} | scores for own, scores in others)
    return Score(loss, figures, round(weight), task.metric, members)
