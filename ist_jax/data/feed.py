"""What a round is fed: arrays on the devices, and the numbers of the examples of each batch.

A feed is called with the number of a round, counted from 0, and returns its chunk: a function of the seed and
the round alone, so that a run resumes at any round. `spec_of` is what a chunk's data looks like, to compile
for; `shards` are the examples of each worker, and `close` ends what goes on in the background. A round takes
the examples of one base round, `local_steps` steps, or of several in a row. An evaluation is so
many (`len`) chunks of batches [D, n, B, ...] with their 'weight', over which one can go again and again; its
`spec` is what one of them looks like.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ist_jax.data import batches
from ist_jax.data.source import Split


class Chunk(NamedTuple):
    """The examples of a round.

    Attributes:
      data: on the devices, [D, N, ...]: a `data.Split`.
      indices: int32 [D, W, l, B], into N.
    """

    data: Split
    indices: np.ndarray


class InMemoryFeed(NamedTuple):
    """Rounds of a training set that every device holds whole: no work but the drawing of indices.

    Attributes:
      data: the training set, replicated on the devices: [D, N, ...].
      shards: the examples of each worker, from `batches.share_examples`.
      starts: by round, the base rounds before it; behind them, all.
      num_devices: D.
      seed: of the run.
      local_steps: of a base round.
      batch_size: B, per worker.
    """

    data: Split
    shards: Sequence[np.ndarray]
    starts: Sequence[int] | np.ndarray
    num_devices: int
    seed: int
    local_steps: int
    batch_size: int

    def spec_of(self, local_steps: int) -> Split:
        """The data of a round of so many local steps: always all."""
        return self.data

    def __call__(self, round_index: int) -> Chunk:
        sizes, numbers = (self.local_steps, self.batch_size), self.starts[round_index : round_index + 2]
        drawn = [batches.train_indices(self.seed, base, self.shards, *sizes) for base in range(*numbers)]
        indices = np.concatenate(drawn, axis=1)
        return Chunk(self.data, indices.reshape(self.num_devices, -1, *indices.shape[1:]))

    def close(self) -> None:
        """Nothing is open."""


class InMemoryEvaluation(NamedTuple):
    """Evaluation batches that the devices hold whole: one chunk, which is what its `spec` looks like.

    Attributes:
      spec: on the devices, [D, batches, B, ...]: a `data.Split` and 'weight'.
    """

    spec: Split
