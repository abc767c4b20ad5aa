"""Images that do not fit in memory: read and decoded by grain, a round at a time."""

import contextlib
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from ist_jax.data.encoded import Batch, EvalBatches, TrainBatches
from ist_jax.data.feed import Chunk
from ist_jax.data.source import EncodedSource, Split

log = logging.getLogger(__name__)

Spec = dict[str, jax.ShapeDtypeStruct]
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


class StreamingFeed:
    """Rounds of a training set on disk; while one is trained, the next is read.

    Host and devices hold the chunk in use and the next one, and the processes two or three batches each.

    Args:
      make: the training batches that are read here.
      num_devices: D.
      num_rounds: of the run; nothing is read beyond it.
      processes: that read and decode; 0: a thread of this one does.
      put: places arrays [D, ...] on the devices; what other processes read is left unset in them.
    """

    def __init__(
        self,
        make: TrainBatches,
        num_devices: int,
        num_rounds: int,
        *,
        processes: int,
        put: Callable[[Batch], Split],
    ):
        self._make, self._num_devices, self._num_rounds = make, num_devices, num_rounds
        self._processes, self._put = processes, put
        self._unreadable = _Unreadable(make.source)
        self._ahead: _ReadAhead | None = None
        self._expected = 0
        here = (len(make.shards) // num_devices, make.local_steps, make.batch_size)
        indices = np.arange(np.prod(here), dtype=np.int32).reshape(here)
        self._indices = np.broadcast_to(indices, (num_devices, *here))

    @property
    def shards(self) -> Sequence[np.ndarray]:
        """The examples of each worker."""
        return self._make.shards

    @property
    def spec(self) -> Spec:
        shape, side = (self._num_devices, self._indices[0].size), self._make.transform.size
        return {
            "image": jax.ShapeDtypeStruct((*shape, side, side, 3), np.uint8),
            "label": jax.ShapeDtypeStruct(shape, np.int32),
        }

    def __call__(self, round_index: int) -> Chunk:
        if self._ahead is None or round_index != self._expected:
            self.close()
            self._ahead = _ReadAhead(lambda stop: self._chunks(round_index, stop))
        data = next(self._ahead)
        self._expected = round_index + 1
        return Chunk(data, self._indices)

    def close(self) -> None:
        """Ends the reading; a later call begins anew."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _chunks(self, first: int, stop: threading.Event) -> Generator[Split]:
        make, numbers = (
            self._make,
            range(first * self._make.per_round, self._num_rounds * self._make.per_round),
        )
        with contextlib.closing(read(make, numbers, self._processes)) as stream:
            for start in numbers[:: make.per_round]:
                chunk = {name: np.empty(x.shape, x.dtype) for name, x in self.spec.items()}
                for number in range(start, start + make.per_round):
                    if stop.is_set():
                        return
                    self._fill_in(chunk, number, next(stream))
                yield self._put(chunk)

    def _fill_in(self, chunk: Batch, number: int, batch: Batch) -> None:
        _, worker, step = self._make.place(number)
        for name, x in chunk.items():
            rows = x.reshape(len(self._make.shards), self._make.local_steps, -1, *x.shape[2:])
            rows[worker, step] = batch[name]
        if batch["skipped"].any():
            self._unreadable.report(*self._make.examples(number), batch["skipped"])


class StreamingEvaluation:
    """A test set on disk, a batch per device at a time; every pass reads it anew.

    An image that cannot be read is not counted: the one in its place has weight 0.

    Args:
      make: the evaluation batches that are read here.
      processes: that read and decode; 0: this one does.
      put: places arrays [D, ...] on the devices.
    """

    def __init__(self, make: EvalBatches, *, processes: int, put: Callable[[Batch], Split]):
        self._make, self._processes, self._put = make, processes, put
        self._unreadable = _Unreadable(make.source)

    @property
    def spec(self) -> Spec:
        """What a chunk looks like: 'image', 'label' and 'weight', each [D, 1, B, ...]."""
        devices, _, size = self._make.plan.indices.shape
        side = self._make.transform.size
        return {
            "image": jax.ShapeDtypeStruct((devices, 1, size, side, side, 3), np.uint8),
            "label": jax.ShapeDtypeStruct((devices, 1, size), np.int32),
            "weight": jax.ShapeDtypeStruct((devices, 1, size), np.float32),
        }

    def __len__(self) -> int:
        """Chunks."""
        return self._make.plan.indices.shape[1]

    def __iter__(self) -> Iterator[Split]:
        make, each = self._make, len(self._make.devices)
        numbers = range(len(self) * each)
        with contextlib.closing(read(make, numbers, self._processes)) as stream:
            for start in numbers[::each]:
                chunk = {name: np.empty(x.shape, x.dtype) for name, x in self.spec.items()}
                for number in range(start, start + each):
                    self._fill_in(chunk, number, next(stream))
                yield self._put(chunk)

    def _fill_in(self, chunk: Batch, number: int, batch: Batch) -> None:
        row, device = self._make.place(number)
        weight = self._make.plan.weights[device, row] * (batch["skipped"] == 0)
        for name, x in {"image": batch["image"], "label": batch["label"], "weight": weight}.items():
            chunk[name][device, 0] = x
        if batch["skipped"].any():
            self._unreadable.report(*self._make.examples(number), batch["skipped"])


class _Unreadable:
    """Says once of every image that it cannot be read, and counts them."""

    def __init__(self, source: EncodedSource):
        self._source = source
        self._known: set[int] = set()

    def report(self, shard: np.ndarray, indices: np.ndarray, skipped: np.ndarray) -> None:
        for index, count in zip(indices[skipped > 0], skipped[skipped > 0], strict=True):
            place = int(np.searchsorted(shard, index)) + np.arange(count)
            for bad in shard[place % len(shard)].tolist():
                if bad not in self._known:
                    self._known.add(bad)
                    log.warning("cannot read image %s (%d so far)", self._source.name(bad), len(self._known))


class _ReadAhead:
    """An iterator whose next item is made by a thread while the last one is in use."""

    def __init__(self, items: Callable[[threading.Event], Generator[Split]]):
        self._stop = threading.Event()
        self._items = items(self._stop)
        self._error: BaseException | None = None
        self._fetch()

    def _fetch(self) -> None:
        def run() -> None:
            try:
                self._item = next(self._items)
            except BaseException as error:  # raised where the item is asked for
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def __next__(self) -> Split:
        self._thread.join()
        if self._error is not None:
            raise self._error
        item, self._item = self._item, None  # type: ignore[assignment]  # let go of
        self._fetch()
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._items.close()


def read(make: Callable[[int], Batch], numbers: range, processes: int) -> Generator[Batch]:
    """The batches of some numbers, in order; to be closed.

    Args:
      make: a batch by its number; picklable where there are processes.
      numbers: of the batches.
      processes: that read and decode; 0: this one does, when a batch is asked for.
    """
    import grain  # slow to import, and only sets on disk need it

    if not flags.FLAGS.is_parsed():  # grain looks up flags of its own, which nobody has to set
        flags.FLAGS.mark_as_parsed()
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
