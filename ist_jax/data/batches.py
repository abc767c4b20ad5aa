"""Which examples make up which batch: index arrays, on the host, functions of seed and position."""

import functools
from typing import NamedTuple

import numpy as np


def train_indices(
    seed: int, round_index: int, *, num_examples: int, num_workers: int, local_steps: int, batch_size: int
) -> np.ndarray:
    """The training examples of a round, the same whatever the method and the devices.

    Every worker draws from the whole training set with its own seed, without replacement within each
    of its epochs, as in both papers. Nothing is dropped: a batch may span two epochs.

    Args:
      seed: of the run.
      round_index: counted from 0.
      num_examples: N, the size of the training set.
      num_workers: S.
      local_steps: l.
      batch_size: B, per worker.

    Returns:
      int32 [S, l, B].
    """
    start = round_index * local_steps * batch_size
    stop = start + local_steps * batch_size
    rows = []
    for worker in range(num_workers):
        epochs = range(start // num_examples, -(-stop // num_examples))
        stream = np.concatenate([_epoch_order(seed, worker, epoch, num_examples) for epoch in epochs])
        first = start - epochs[0] * num_examples
        rows.append(stream[first : first + stop - start])
    return np.stack(rows).reshape(num_workers, local_steps, batch_size)


@functools.lru_cache(maxsize=64)
def _epoch_order(seed: int, worker: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng((seed, worker, epoch)).permutation(num_examples).astype(np.int32)


class EvalBatches(NamedTuple):
    """Fixed batches in which every example has weight 1 exactly once.

    `indices` int32 and `weights` float32 are [D, batches per device, batch size].
    """

    indices: np.ndarray
    weights: np.ndarray


def eval_batches(num_examples: int, batch_size: int, num_devices: int) -> EvalBatches:
    """Deals a test set into batches, mixed by a fixed permutation, each whole on one device.

    Batch statistics depend on all examples of a batch, so what is missing at the end is filled up with
    other real examples, of weight 0.

    Args:
      num_examples: N.
      batch_size: examples per batch; at most N are used.
      num_devices: D.
    """
    batch_size = min(batch_size, num_examples)
    per_device = -(-num_examples // (batch_size * num_devices))
    total = per_device * num_devices * batch_size
    order = np.random.default_rng(0).permutation(num_examples).astype(np.int32)
    weights = (np.arange(total) < num_examples).astype(np.float32)
    # batch k is on device k % D, so that the batches themselves do not depend on the devices
    shape = (per_device, num_devices, batch_size)
    indices = np.resize(order, total).reshape(shape).swapaxes(0, 1)
    return EvalBatches(indices, weights.reshape(shape).swapaxes(0, 1))
