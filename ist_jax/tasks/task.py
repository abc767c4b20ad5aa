"""What a task is: what is learned from a kind of data, as a value of plain functions.

An example, a label and a model's outputs are pytrees of arrays [B, ...], of whatever names and shapes. In the
functions below `split` holds all examples of a split by the names that the data set gives them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from ist_jax.data import Split, num_examples
from ist_jax.data.augment import Statistics
from ist_jax.errors import last_line

T = TypeVar("T")
Batch = tuple[PyTree, PyTree]  # inputs of a model, and their labels
PerExample = Float[Array, " B"]


class Metric(NamedTuple):
    """The figure by which rounds and runs are compared: for the best checkpoint, patience and reports.

    Attributes:
      name: 'loss', or one of the task's figures.
      higher_is_better: of two, which is the better one.
      percent: the task's figures are fractions, shown as such.
    """

    name: str = "loss"
    higher_is_better: bool = False
    percent: bool = False

    def better(self, value: T) -> T:
        """The value, or an array of such, turned so that more is better."""
        return value if self.higher_is_better else -value  # type: ignore[operator]

    def text(self, value: float) -> str:
        """A figure for people: '98.80%', or four digits."""
        return f"{value:.2%}" if self.percent else f"{value:.4g}"


ACCURACY = Metric("accuracy", higher_is_better=True, percent=True)


def metric_of(recorded: Mapping[str, Any]) -> Metric:
    """The metric of a summary or of what a checkpoint says; earlier versions had no other than accuracy."""
    return Metric(**recorded["metric"]) if "metric" in recorded else ACCURACY


def x_and_y(split: Split, numbers: Int[Array, " B"], key: Key[Array, ""] | None) -> Batch:
    """The examples with these numbers as they are: 'x' is shown to the model, and 'y' are the labels."""
    return jax.tree.map(lambda x: x[numbers], (split["x"], split["y"]))


def but_the_loss(means: Mapping[str, float]) -> dict[str, float]:
    """The scores' means as they are."""
    return {name: mean for name, mean in means.items() if name != "loss"}


def mean_outputs(outputs: PyTree[Float[Array, "S B ..."]]) -> PyTree[Float[Array, "B ..."]]:
    """Of several nets."""
    return jax.tree.map(lambda x: x.mean(0), outputs)


def mean_probability(logits: Float[Array, "S ... C"]) -> Float[Array, "... C"]:
    """The logarithm of the mean of what several nets give each class: logits of it."""
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(len(logits))


class Task(NamedTuple):
    """What a model is shown, and how its outputs are judged.

    All but `check` and `figures` runs on the devices, inside compiled programs.

    Attributes:
      name: for records; a run does not go on with a task of another name.
      loss: (outputs, labels, key) -> losses [B]; the key is None at evaluation.
      batch: (split, numbers int32 [B], key) -> (inputs, labels) of these examples; in training there is a
        key, to augment by, and at evaluation it is None.
      scores: by name (outputs, labels) -> [B]. The mean of the first is had in training, too.
      figures: means over all examples, each counted once, of 'loss' and the scores -> the figures that an
        evaluation records beside the loss. A ratio of sums is one of means.
      metric: the figure that counts.
      check: raises ValueError, with what is allowed, for a split that cannot be learned from.
      check_outputs: the same for the shapes of a model's outputs of one example.
      example: (inputs, labels) of one example, zeros [1, ...]; None: as `batch` makes them.
      normalization: mean and deviation, per channel or feature, of what a model is shown, for records; None:
        examples are shown as they are.
      combine: outputs of several nets, [S, B, ...] -> the outputs of an ensemble of them.
    """

    name: str
    loss: Callable[[PyTree, PyTree, Key[Array, ""] | None], PerExample]
    batch: Callable[[Split, Int[Array, " B"], Key[Array, ""] | None], Batch] = x_and_y
    scores: Mapping[str, Callable[[PyTree, PyTree], PerExample]] = {}
    figures: Callable[[Mapping[str, float]], Mapping[str, float]] = but_the_loss
    metric: Metric = Metric()
    check: Callable[[Split], None] = lambda split: None
    check_outputs: Callable[[PyTree], None] = lambda outputs: None
    example: Batch | None = None
    normalization: Statistics | None = None
    combine: Callable[[PyTree], PyTree] = mean_outputs

    def show(self, split: Split) -> Batch:
        """All examples of a split, as they are evaluated."""
        return self.batch(jax.tree.map(jnp.asarray, dict(split)), jnp.arange(num_examples(split)), None)


def with_example(task: Task, split: Split) -> Task:
    """The task with an example of zeros, as its `batch` makes one of the split's.

    Raises:
      ValueError: it cannot make any.
    """
    if task.example is not None:
        return task
    try:
        shapes = jax.eval_shape(lambda s: task.batch(s, jnp.zeros(1, np.int32), None), dict(split))
    except KeyError as error:
        raise ValueError(
            f"task {task.name!r} asks for {error}, and an example has {', '.join(map(repr, split))}"
        ) from error
    return task._replace(example=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))


def check_fit(task: Task, outputs: PyTree) -> None:
    """Raises ValueError where a task cannot judge what a model returns.

    Args:
      task: with its example.
      outputs: shapes of the model's outputs for that example.
    """
    assert task.example is not None
    labels = task.example[1]
    task.check_outputs(outputs)
    both = f"outputs {_shapes(outputs)} and labels {_shapes(labels)}"
    for name, judge in {"loss": lambda y, label: task.loss(y, label, None), **task.scores}.items():
        try:
            found = jax.eval_shape(judge, outputs, labels)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"task {task.name!r} cannot judge {both}: {last_line(error)}") from error
        if getattr(found, "shape", None) != (1,):
            raise ValueError(
                f"task {task.name!r}: of {both} its {name} is {_shapes(found)}; a number per example, [B], "
                "is needed"
            )
    figures = task.figures(dict.fromkeys(["loss", *task.scores], 1.0))
    if task.metric.name not in ("loss", *figures):
        known = ", ".join(map(repr, ["loss", *figures]))
        raise ValueError(f"task {task.name!r} has the metric {task.metric.name!r}; give one of {known}")


def _shapes(tree: PyTree) -> str:
    """Of a batch, for people: 'float32 [B, 10]'."""
    sizes = [["B", *map(str, x.shape[1:])] if x.ndim else [] for x in jax.tree.leaves(tree)]
    texts = (f"{x.dtype} [{', '.join(own)}]" for x, own in zip(jax.tree.leaves(tree), sizes, strict=True))
    return ", ".join(texts) or "none"
