"""How long a run is, what is due when, and its learning rates: by the examples that all workers have seen.

A base round is `config.local_steps` steps of every worker. A round is one of them or, by the Quadratic
Synchronization Rule, 2, 4, ... in a row, with one exchange.

References:
  Gu et al., A Quadratic Synchronization Rule for Distributed Deep Learning, arXiv:2310.14423, 2023.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST = 32  # base rounds of a round: of 6 sizes


class Part(NamedTuple):
    """What is trained by one method, of a run.

    Attributes:
      method: its name.
      until: passes over the training set, of all workers together from the run's start; inf: to its end.
      whole: every worker has all units, as in a warm-up.
    """

    method: str
    until: float = math.inf
    whole: bool = False

    @property
    def name(self) -> str:
        return "warm-up" if self.whole else self.method


class Segment(NamedTuple):
    """Rounds one after another of one part, and of one length.

    Attributes:
      part: its number.
      local_steps: of a worker in each.
      until: the rounds of the run after which it ends.
    """

    part: int
    local_steps: int
    until: int


class Schedule(NamedTuple):
    """How long a run is, and what is due when; rounds are counted from 0.

    Attributes:
      first: the round to begin with: those before were done by earlier sessions.
      rounds: of the whole run.
      segments: of the rounds from `first` on.
      starts: int [rounds + 1], the base rounds before each round, and all; 0 before `first`.
      examples_before: seen in earlier sessions.
      examples_per_base: of all workers in a base round.
      learning_rates: float32 [base rounds, steps of one]; the rows before `first` are not used.
      eval_every: rounds; 0: after the last only.
      patience: evaluations without a better metric on the validation split until the run stops; 0: never.
      checkpoint_every: rounds; 0: at the end alone.
      checkpoint_keep: the latest ones that are kept.
      max_left_out: rounds in a row that a worker may be left out; 0: any number.
    """

    first: int
    rounds: int
    segments: tuple[Segment, ...]
    starts: np.ndarray
    examples_before: int
    examples_per_base: int
    learning_rates: np.ndarray
    eval_every: int
    patience: int
    checkpoint_every: int
    checkpoint_keep: int
    max_left_out: int

    def rates(self, index: int) -> np.ndarray:
        """The learning rates of a round, float32 [l]."""
        return self.learning_rates[self.starts[index] : self.starts[index + 1]].reshape(-1)

    def steps_before(self, index: int) -> int:
        """Local steps of a worker before a round."""
        return int(self.starts[index]) * self.learning_rates.shape[1]

    def examples_in(self, index: int) -> int:
        """Seen by all workers in a round."""
        return int(self.starts[index + 1] - self.starts[index]) * self.examples_per_base

    def examples_after(self, index: int) -> int:
        """Seen by all workers when a round is done."""
        done = int(self.starts[index + 1] - self.starts[self.first])
        return self.examples_before + done * self.examples_per_base

    def is_last(self, index: int) -> bool:
        return index + 1 == self.rounds

    def evaluates(self, index: int) -> bool:
        return self.is_last(index) or _is_due(index, self.eval_every)

    def saves(self, index: int) -> bool:
        return _is_due(index, self.checkpoint_every)


def _is_due(index: int, every: int) -> bool:
    return every > 0 and (index + 1) % every == 0


class Progress(NamedTuple):
    """What earlier sessions of a run did, perhaps with another number of workers.

    Attributes:
      rounds: that are done.
      examples: that all workers have seen.
      base_rounds: that are done; None: as many as rounds.
    """

    rounds: int = 0
    examples: int = 0
    base_rounds: int | None = None


NOTHING_DONE = Progress()


def count_left(epochs: float, num_examples: int, per_base: int, done: Progress) -> int:
    """Base rounds that remain until all workers have made so many passes.

    Args:
      epochs: passes over the training set, of all workers together.
      num_examples: in the training set.
      per_base: examples of a base round, of all workers.
      done: in earlier sessions.
    """
    return max(0, math.ceil((epochs * num_examples - done.examples) / per_base - 1e-9))


def quadratic(alpha: float, rate: float, local_steps: int, left: int) -> int:
    """Base rounds of a round by the Quadratic Synchronization Rule: max(l, (alpha / rate)^2) steps.

    Rounded down to 1, 2, 4, ... base rounds, so that few programs are compiled; at most `MOST`.

    Args:
      alpha: of the rule.
      rate: the learning rate at the round's start.
      local_steps: l, of a base round.
      left: base rounds that remain.
    """
    ratio = min(alpha / rate, 1e9) if rate > 0 else 1e9
    size = 1
    while 2 * size <= min(left, MOST) and 2 * size * local_steps <= ratio**2:
        size *= 2
    return size


def lay_out(
    ends: Sequence[int], sizes: Sequence[int], local_steps: int, done: Progress
) -> tuple[tuple[Segment, ...], np.ndarray]:
    """(segments, starts) of a schedule.

    Args:
      ends: by part, how many of the base rounds that remain are before its end.
      sizes: base rounds of each of the rounds that remain.
      local_steps: of a base round.
      done: in earlier sessions.
    """
    before = np.concatenate([[0], np.cumsum(sizes, dtype=int)])
    parts = np.searchsorted(ends, before[:-1], side="right").tolist()
    segments: list[Segment] = []
    for index, (part, size) in enumerate(zip(parts, sizes, strict=True), done.rounds + 1):
        found = Segment(part, size * local_steps, index)
        if segments and segments[-1][:2] == found[:2]:
            segments.pop()
        segments.append(found)
    unknown = np.zeros(done.rounds, int)
    base = done.rounds if done.base_rounds is None else done.base_rounds
    return tuple(segments), np.concatenate([unknown, base + before])
