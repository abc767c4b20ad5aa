"""How long a run is, what is due when, and its learning rates: by the examples that all workers have seen."""

import math
from typing import NamedTuple

import numpy as np


class Schedule(NamedTuple):
    """How long a run is, and what is due when; rounds are counted from 0.

    Attributes:
      first: the round to begin with: those before were done by earlier sessions.
      rounds: of the whole run.
      examples_before: seen in earlier sessions.
      examples_per_round: of all workers.
      learning_rates: float32 [rounds, l]; the rows before `first` are not used.
      eval_every: rounds; 0: after the last only.
      patience: evaluations without a better metric on the validation split until the run stops; 0: never.
      checkpoint_every: rounds; 0: at the end alone.
      checkpoint_keep: the latest ones that are kept.
      max_left_out: rounds in a row that a worker may be left out; 0: any number.
    """

    first: int
    rounds: int
    examples_before: int
    examples_per_round: int
    learning_rates: np.ndarray
    eval_every: int
    patience: int
    checkpoint_every: int
    checkpoint_keep: int
    max_left_out: int

    def examples_after(self, index: int) -> int:
        """Seen by all workers when a round is done."""
        return self.examples_before + (index + 1 - self.first) * self.examples_per_round

    def is_last(self, index: int) -> bool:
        return index + 1 == self.rounds

    def evaluates(self, index: int) -> bool:
        return self.is_last(index) or _is_due(index, self.eval_every)

    def saves(self, index: int) -> bool:
        return _is_due(index, self.checkpoint_every)


def _is_due(index: int, every: int) -> bool:
    return every > 0 and (index + 1) % every == 0


class Progress(NamedTuple):
    """What earlier sessions of a run did, perhaps with another number of workers."""

    rounds: int = 0
    examples: int = 0


NOTHING_DONE = Progress()


def count_rounds(epochs: float, num_examples: int, per_round: int, done: Progress) -> int:
    """Rounds of the whole run that so many passes of all workers take.

    Args:
      epochs: passes over the training set, of all workers together.
      num_examples: in the training set.
      per_round: examples of a round, of all workers.
      done: in earlier sessions.
    """
    left = (epochs * num_examples - done.examples) / per_round
    return done.rounds + max(0, math.ceil(left - 1e-9))
