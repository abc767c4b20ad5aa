"""Batches of compressed images: which examples, how cropped, and what stands in for broken files.

All of it is a function of the seed and the position, as for sets in memory: whoever reads a batch, and in
whatever order, reads the same. Instead of an image that cannot be read comes the next one, in the order of
the indices, of the same worker's examples (behind the last one, the first); it is cropped as the other would
have been.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ist_jax.data import batches
from ist_jax.data.images import UNREADABLE, Transform
from ist_jax.data.source import EncodedSource
from ist_jax.streams import Use, rng

_MOST_IN_A_ROW = 100  # unreadable images, after which something else must be wrong
Batch = dict[str, np.ndarray]
Crop = Callable[[bytes], np.ndarray]


def read_batch(source: EncodedSource, shard: np.ndarray, indices: np.ndarray, crops: Sequence[Crop]) -> Batch:
    """Reads and decodes a batch.

    Args:
      source: of the images.
      shard: sorted int32, the examples that may stand in for unreadable ones; `indices` are among them.
      indices: int32 [B].
      crops: B functions from an image's bytes to uint8 [H, W, 3].

    Returns:
      'image' uint8 [B, H, W, 3], 'label' int32 [B] and 'skipped' int32 [B]: after how many unreadable
      examples of the shard the one was found.

    Raises:
      OSError: too many unreadable examples in a row.
    """
    found = []
    for index, crop in zip(indices, crops, strict=True):
        place = int(np.searchsorted(shard, index))
        for tries in range(min(len(shard), _MOST_IN_A_ROW)):
            try:
                record = source[int(shard[(place + tries) % len(shard)])]
                found.append((crop(record["image"]), record["label"], tries))
                break
            except UNREADABLE:
                continue
        else:
            raise OSError(f"{tries + 1} images in a row cannot be read, from {source.name(int(index))} on")
    images, *numbers = zip(*found, strict=True)
    labels, skipped = np.array(numbers, np.int32)
    return {"image": np.stack(images), "label": labels, "skipped": skipped}


class _Batches:
    """Batches by number: chunk after chunk, of each worker after worker, of each step after step."""

    workers: Sequence[int]  # those whose batches are read here
    local_steps: int

    @property
    def per_chunk(self) -> int:
        """How many are read here."""
        return len(self.workers) * self.local_steps

    def place(self, number: int) -> tuple[int, int, int]:
        """(chunk, worker, step) of a batch."""
        chunk, rest = divmod(number, self.per_chunk)
        worker, step = divmod(rest, self.local_steps)
        return chunk, self.workers[worker], step


@dataclasses.dataclass(frozen=True)
class TrainBatches(_Batches):
    """The training batches by number; a chunk is a base round.

    Attributes:
      source: of the images.
      shards: the examples of each of the S workers, from `batches.share_examples`.
      workers: those whose batches are read here, of S.
      transform: what becomes of the images.
      seed: of the run.
      local_steps: of a base round.
      batch_size: B.
    """

    source: EncodedSource
    shards: Sequence[np.ndarray]
    workers: Sequence[int]
    transform: Transform
    seed: int
    local_steps: int
    batch_size: int

    def examples(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(the worker's shard, the examples of the batch, int32 [B])."""
        round_index, worker, step = self.place(number)
        shard, sizes = self.shards[worker], (self.local_steps, self.batch_size)
        return shard, batches.worker_indices(self.seed, round_index, worker, shard, *sizes)[step]

    def __call__(self, number: int) -> Batch:
        round_index, worker, step = self.place(number)
        position = round_index * self.local_steps + step
        crops = self.transform.training(rng(self.seed, Use.CROPS, worker, position), self.batch_size)
        return read_batch(self.source, *self.examples(number), crops)


@dataclasses.dataclass(frozen=True)
class EvalBatches(_Batches):
    """The batches of an evaluation by number; a chunk is one of every device, which takes a worker's place.

    Attributes:
      source: of the images.
      plan: the examples of each batch.
      workers: the devices whose batches are read here, of the D in the plan.
      transform: what becomes of the images.
    """

    source: EncodedSource
    plan: batches.EvalPlan
    workers: Sequence[int]
    transform: Transform
    local_steps = 1

    def examples(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(all examples, those of the batch, int32 [B])."""
        row, device, _ = self.place(number)
        return np.arange(len(self.source), dtype=np.int32), self.plan.indices[device, row]

    def __call__(self, number: int) -> Batch:
        """With a 'weight', 0 where another image stands in for one that cannot be read."""
        row, device, _ = self.place(number)
        everything, indices = self.examples(number)
        batch = read_batch(self.source, everything, indices, [self.transform.evaluation] * len(indices))
        return batch | {"weight": self.plan.weights[device, row] * (batch["skipped"] == 0)}
