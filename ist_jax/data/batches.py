"""Which examples make up which batch: index arrays, on the host, functions of seed and position."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ist_jax.data.source import Split, num_examples, select
from ist_jax.data.sparse import Rows
from ist_jax.streams import Use, rng


def split_validation(seed: int, train: Split, fraction: float) -> tuple[Split, Split | None]:
    """Holds out a random fraction of the training examples.

    Args:
      seed: of the run.
      train: from `data.load`.
      fraction: of its examples, rounded up; 0: none.

    Returns:
      (the examples that remain, those held out or None); none is lost, and their order is kept.

    Raises:
      ValueError: nothing would remain.
    """
    total = num_examples(train)
    held_out = count_held_out(total, fraction)
    if held_out == 0:
        return train, None
    if held_out == total:
        raise ValueError(
            f"data.validation={fraction} leaves none of the {total} examples to train on; lower it"
        )
    order = rng(seed, Use.VALIDATION).permutation(total)
    return select(train, np.sort(order[held_out:])), select(train, np.sort(order[:held_out]))


def count_held_out(total: int, fraction: float) -> int:
    """How many of so many training examples `split_validation` holds out."""
    return math.ceil(fraction * total)


def share_examples(
    seed: int, labels: np.ndarray | Rows, num_workers: int, sharing: str, concentration: float
) -> list[np.ndarray]:
    """The training examples that each worker draws from.

    Args:
      seed: of the run.
      labels: int [N], or `Rows` of several each.
      num_workers: S.
      sharing: 'all': everybody has the whole set, as in both papers; 'disjoint': shards of equal size, drawn
        at random; 'skewed': disjoint shards in which the workers' shares of every class are drawn from a
        Dirichlet distribution (Hsu et al., arXiv:1909.06335, 2019).
      concentration: of that distribution; the smaller, the more a class belongs to few workers.

    Returns:
      S sorted int32 arrays; none is empty.

    Raises:
      ValueError: there are fewer examples than workers; examples with several labels cannot be skewed.
    """
    examples = np.arange(len(labels), dtype=np.int32)
    if sharing == "all":
        return [examples] * num_workers
    if len(labels) < num_workers:
        raise ValueError(f"num_workers={num_workers} is more than the {len(labels)} examples to share out")
    source = rng(seed, Use.SHARING)
    if sharing == "disjoint":
        return [np.sort(part) for part in np.array_split(source.permutation(examples), num_workers)]
    if isinstance(labels, Rows):
        raise ValueError(
            "data.sharing='skewed' is not for examples with several labels; set config.data.sharing to 'all' "
            "or 'disjoint'"
        )
    parts = []
    for label in np.unique(labels):
        own = source.permutation(examples[labels == label])
        shares = source.dirichlet(np.full(num_workers, concentration))
        parts.append(np.split(own, np.round(np.cumsum(shares)[:-1] * len(own)).astype(int)))
    shards = [np.concatenate(own) for own in zip(*parts, strict=True)]
    for poor in (worker for worker in range(num_workers) if not len(shards[worker])):
        rich = int(np.argmax(list(map(len, shards))))
        shards[poor], shards[rich] = shards[rich][:1], shards[rich][1:]
    return list(map(np.sort, shards))


def train_indices(
    seed: int, round_index: int, shards: Sequence[np.ndarray], local_steps: int, batch_size: int
) -> np.ndarray:
    """The training examples of a base round, the same whatever the method and the devices.

    Every worker draws from its examples with its own seed, without replacement within each of its epochs.
    Nothing is dropped: a batch may span two epochs.

    Args:
      seed: of the run.
      round_index: counted from 0.
      shards: the examples of each worker, from `share_examples`.
      local_steps: l.
      batch_size: B, per worker.

    Returns:
      int32 [S, l, B].
    """
    sizes = (local_steps, batch_size)
    return np.stack([worker_indices(seed, round_index, w, shard, *sizes) for w, shard in enumerate(shards)])


def worker_indices(
    seed: int, round_index: int, worker: int, shard: np.ndarray, local_steps: int, batch_size: int
) -> np.ndarray:
    """The row of `train_indices` of one worker, int32 [l, B]; `shard`: its examples."""
    count, size = local_steps * batch_size, len(shard)
    epoch, first = divmod(round_index * count, size)
    orders = [_epoch_order(seed, worker, epoch + i, size) for i in range(-(-(first + count) // size))]
    return shard[np.concatenate(orders)[first : first + count]].reshape(local_steps, batch_size)


@functools.lru_cache(maxsize=16)  # of a million examples 5 MB each, in every process that reads
def _epoch_order(seed: int, worker: int, epoch: int, num_examples: int) -> np.ndarray:
    return rng(seed, Use.EXAMPLES, worker, epoch).permutation(num_examples).astype(np.int32)


class EvalPlan(NamedTuple):
    """The examples of fixed batches, in which every example has weight 1 exactly once.

    `indices` int32 and `weights` float32 are [D, batches per device, batch size].
    """

    indices: np.ndarray
    weights: np.ndarray


def eval_batches(num_examples: int, batch_size: int, num_devices: int) -> EvalPlan:
    """Deals a test set into batches, mixed by a fixed permutation, each whole on one device.

    Batch statistics depend on all examples of a batch, so what is missing at the end is filled up with
    other real examples, of weight 0.

    Args:
      num_examples: N.
      batch_size: examples per batch; at most N are used.
      num_devices: D.
    """
    batch_size = min(batch_size, num_examples)
    # batch k is on device k % D, so that the batches themselves do not depend on the devices
    shape = (-(-num_examples // (batch_size * num_devices)), num_devices, batch_size)
    order = rng(0, Use.EVALUATION).permutation(num_examples).astype(np.int32)
    weights = (np.arange(math.prod(shape)) < num_examples).astype(np.float32).reshape(shape)
    return EvalPlan(np.resize(order, shape).swapaxes(0, 1), weights.swapaxes(0, 1))
