"""The tasks: what is learned from a kind of data, each a file with a factory, and their table.

A task is a value of plain functions, a `task.Task`. One of the user's own is given as `train(..., task=TASK)`
or named as `--config.task=FILE.py:NAME`: a `Task`, or a function of the training examples that returns one.
"""

from collections.abc import Callable
from typing import Protocol

from ist_jax.data import Split
from ist_jax.tasks import classification, language_modelling, multi_label
from ist_jax.tasks.task import Metric, Task

__all__ = ["TASKS", "Metric", "Own", "Task", "make"]

Own = Task | Callable[[Split], Task]  # of the user's; a function of the training examples


class Factory(Protocol):
    """Makes a task."""

    def __call__(self, split: Split, num_classes: int, *, pad: int, flip: bool) -> Task:
        """From the training examples, the number of classes, and what a config says of augmentation."""


TASKS: dict[str, Factory] = {
    "classification": classification.make,
    "multi_label": multi_label.make,
    "language_modelling": language_modelling.make,
}
_NAMES = {
    "classification": {"image", "label"},
    "multi_label": {"feature", "label"},
    "language_modelling": {"tokens"},
}
_MORE = {"language_modelling": {"bytes"}}  # that examples may have


def make(name: str, split: Split, num_classes: int, *, pad: int, flip: bool) -> Task:
    """A task of the table.

    Args:
      name: of it; 'auto': the one for examples with such names.
      split: the training examples.
      num_classes: C.
      pad: pixels of padding before a random crop of a training image.
      flip: mirror half of the training images.

    Raises:
      ValueError: it is not for such examples, or there is none that is.
    """
    known = ", ".join(map(repr, TASKS))
    if name == "auto":
        name = next(
            (task for task, names in _NAMES.items() if names == split.keys() - _MORE.get(task, set())), name
        )
    if not _NAMES.get(name, {""}) <= split.keys():
        raise ValueError(
            f"task={name!r} is not for examples with {', '.join(map(repr, split))}; set config.task to one "
            f"that is, of {known}, or to FILE.py:NAME, or give train a task="
        )
    return TASKS[name](split, num_classes, pad=pad, flip=flip)
