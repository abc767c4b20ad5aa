"""Images that do not fit in memory: read and decoded by grain, a round at a time."""

import contextlib
import gc
import itertools
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
from absl import flags

from ist_jax.data.encoded import Batch, EvalBatches, TrainBatches
from ist_jax.data.feed import Chunk, InMemoryEvaluation, InMemoryFeed
from ist_jax.data.source import Split

log = logging.getLogger(__name__)

Put = Callable[[Batch], Split]
_SHARED_MEMORY = Path("/dev/shm")
_BATCHES_EACH = 3  # that a process can have there: one is made, one waits, one is being copied out


def check_shared_memory(processes: int, batch_size: int, size: int) -> None:
    """Raises ValueError where batches have no room to travel through: a container's /dev/shm may be small."""
    needed = _BATCHES_EACH * processes * batch_size * 3 * size**2
    if _SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(_SHARED_MEMORY).free) < needed:
        raise ValueError(
            f"data.processes={processes} need {needed / 1e6:,.0f} MB of shared memory, and {_SHARED_MEMORY} "
            f"has {free / 1e6:,.0f} MB; lower config.data.processes, or enlarge it (docker run --shm-size)"
        )


class _Streaming:
    """Chunks of a set on disk: what cannot be read is said once of every image, and counted.

    Attributes:
      spec: what the data of a chunk look like, of a round those of a base round; 'image', 'label' and, of an
        evaluation, 'weight'.
    """

    def __init__(self, make: TrainBatches | EvalBatches, lead: tuple[int, ...], processes: int, put: Put):
        self._make, self._processes, self._put = make, processes, put
        image = jax.ShapeDtypeStruct((*lead, make.transform.size, make.transform.size, 3), np.uint8)
        self.spec = {"image": image, "label": jax.ShapeDtypeStruct(lead, np.int32)}
        self._stop = threading.Event()
        self._unreadable: set[int] = set()

    def spec_of(self, local_steps: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The data of a round of so many local steps."""
        times = local_steps // self._make.local_steps

        def longer(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((x.shape[0], times * x.shape[1], *x.shape[2:]), x.dtype)

        return {name: longer(x) for name, x in self.spec.items()}

    def _chunks(self, starts: Sequence[int]) -> Generator[Split]:
        """One from each start up to the next; no further batch is read once `_stop` is set."""
        each, steps = self._make.per_chunk, self._make.local_steps
        numbers = range(starts[0] * each, starts[-1] * each)
        with contextlib.closing(read(self._make, numbers, self._processes)) as stream:
            for first, last in itertools.pairwise(starts):
                spec = self.spec_of((last - first) * steps)
                chunk = {name: np.empty(x.shape, x.dtype) for name, x in spec.items()}
                for number in range(first * each, last * each):
                    if self._stop.is_set():
                        return
                    self._fill_in(chunk, number, first, next(stream))  # and lets go of the shared memory
                yield self._put(chunk)

    def _fill_in(self, chunk: Batch, number: int, first: int, batch: Batch) -> None:
        base, worker, step = self._make.place(number)
        for name, x in chunk.items():
            times = x.shape[1] // self.spec[name].shape[1]
            cells = x.reshape(len(x), times, -1, self._make.local_steps, *batch[name].shape)
            device, own = divmod(worker, cells.shape[2])
            cells[device, base - first, own, step] = batch[name]
        if batch["skipped"].any():
            self._report(*self._make.examples(number), batch["skipped"])

    def _report(self, shard: np.ndarray, indices: np.ndarray, skipped: np.ndarray) -> None:
        for index, count in zip(indices, skipped, strict=True):
            for bad in shard[(np.searchsorted(shard, index) + np.arange(count)) % len(shard)].tolist():
                if bad not in self._unreadable:
                    self._unreadable.add(bad)
                    name, so_far = self._make.source.name(bad), len(self._unreadable)
                    log.warning("cannot read image %s (%d so far)", name, so_far)


class StreamingFeed(_Streaming):
    """Rounds of a training set on disk; while one is trained, the next is read.

    Host and devices hold the chunk in use and the next one, and the processes two or three batches each.

    Args:
      make: the training batches that are read here.
      num_devices: D.
      starts: by round, the base rounds before it; behind them, all, beyond which nothing is read.
      processes: that read and decode; 0: a thread of this one does.
      put: places arrays [D, ...] on the devices; what other processes read is left unset in them.

    Attributes:
      shards: the examples of each worker.
    """

    def __init__(
        self, make: TrainBatches, num_devices: int, starts: Sequence[int], *, processes: int, put: Put
    ):
        self._here = (len(make.shards) // num_devices, make.local_steps, make.batch_size)
        super().__init__(make, (num_devices, math.prod(self._here)), processes, put)
        self.shards, self._starts = make.shards, starts
        self._ahead: Future[Split] | None = None
        self._expected = 0

    def __call__(self, round_index: int) -> Chunk:
        if self._ahead is None or round_index != self._expected:
            self.close()
            self._reading = self._chunks(self._starts[round_index:])
            self._ahead = _in_background(self._reading.__next__)
        data = self._ahead.result()
        self._ahead, self._expected = _in_background(self._reading.__next__), round_index + 1
        times = self._starts[round_index + 1] - self._starts[round_index]
        workers, steps, size = self._here
        numbers = np.arange(times * math.prod(self._here), dtype=np.int32).reshape(times, *self._here)
        indices = numbers.swapaxes(0, 1).reshape(workers, times * steps, size)
        return Chunk(data, np.broadcast_to(indices, (self.spec["label"].shape[0], *indices.shape)))

    def close(self) -> None:
        """Ends the reading; a later call begins anew."""
        if self._ahead is not None:
            self._stop.set()
            self._ahead.exception()  # waits
            self._reading.close()
            self._stop.clear()
            self._ahead = None


class StreamingEvaluation(_Streaming):
    """A test set on disk, a batch per device at a time; every pass reads it anew.

    An image that cannot be read is not counted: the one in its place has weight 0.

    Args:
      make: the evaluation batches that are read here.
      processes: that read and decode; 0: this one does.
      put: places arrays [D, ...] on the devices.
    """

    def __init__(self, make: EvalBatches, *, processes: int, put: Put):
        devices, self._rows, size = make.plan.indices.shape
        super().__init__(make, (devices, 1, size), processes, put)
        self.spec["weight"] = jax.ShapeDtypeStruct((devices, 1, size), np.float32)

    def __len__(self) -> int:
        """Chunks."""
        return self._rows

    def __iter__(self) -> Iterator[Split]:
        return self._chunks(range(self._rows + 1))


Feed = InMemoryFeed | StreamingFeed
Evaluation = InMemoryEvaluation | StreamingEvaluation


def _in_background(function: Callable[[], Split]) -> Future[Split]:
    """What a function returns or raises, from a thread that keeps no process alive."""
    future: Future[Split] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def read(make: Callable[[int], Batch], numbers: range, processes: int) -> Generator[Batch]:
    """The batches of some numbers, in order; to be closed.

    Args:
      make: a batch by its number; picklable where there are processes.
      numbers: of the batches.
      processes: that read and decode; 0: this one does, when a batch is asked for.
    """
    import grain  # slow to import, and only sets on disk need it

    flags.FLAGS.mark_as_parsed()  # grain looks up flags of its own, which nobody has to set
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(make).to_iter_dataset(options)
    if processes:
        workers = grain.MultiprocessingOptions(num_workers=min(processes, len(numbers)))
        dataset = dataset.mp_prefetch(workers, worker_init_fn=_leave_signals_to_the_parent)
    iterator = iter(dataset)
    try:
        for _ in numbers:
            yield next(iterator)
    finally:
        iterator.close()
        del iterator
        gc.collect()  # batches in shared memory hang on a cycle, and would be reported as leaked at exit


def _leave_signals_to_the_parent(*_: int) -> None:
    """In a process that reads: a signal to the whole group must not take the images from a round at hand."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """Grain's processes outlive a parent that was killed, or that left without cleaning up."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
