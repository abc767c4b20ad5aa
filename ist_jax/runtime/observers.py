"""What looks on while a run goes round by round: TensorBoard event files, and a trace of the profiler.

A watcher is a function that is called with every round's record, as in metrics.jsonl, after the round.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)

Watcher = Callable[[Mapping[str, Any]], None]


@contextmanager
def opened(workdir: Path, *, tensorboard: bool, profile: int) -> Iterator[list[Watcher]]:
    """The watchers that are asked for, writing to folders of their names in `workdir`.

    Args:
      workdir: of the run.
      tensorboard: write event files.
      profile: rounds to trace, 0: none.
    """
    with ExitStack() as stack:
        watchers = []
        if tensorboard:
            watchers.append(stack.enter_context(write_events(workdir / "tensorboard")))
        if profile:
            watchers.append(stack.enter_context(trace_rounds(workdir / "profile", profile)))
        yield watchers


@contextmanager
def write_events(folder: Path) -> Iterator[Watcher]:
    """Writes the numbers of every record as scalars of its round: `tensorboard --logdir=FOLDER`.

    Of a run that goes on, what an earlier session wrote of the same rounds is hidden.
    """
    from tensorboardX import SummaryWriter  # seldom needed

    writers: list[Any] = []

    def write(record: Mapping[str, Any]) -> None:
        step = record["round"]
        if not writers:
            writers.append(SummaryWriter(str(folder), purge_step=step))
        for name, value in record.items():
            if isinstance(value, int | float):
                writers[0].add_scalar(name, value, step)

    try:
        yield write
    finally:
        for writer in writers:
            writer.close()


@contextmanager
def trace_rounds(folder: Path, rounds: int) -> Iterator[Watcher]:
    """Traces so many rounds with `jax.profiler`, from the second of the session on; for Perfetto or XProf."""
    seen = 0

    def trace(record: Mapping[str, Any]) -> None:
        nonlocal seen
        del record
        seen += 1
        if seen == 1:
            jax.profiler.start_trace(folder)
        elif seen == rounds + 1:
            jax.profiler.stop_trace()

    try:
        yield trace
    finally:
        if 0 < seen <= rounds:
            jax.profiler.stop_trace()
            log.warning("profile: %d rounds after the first were traced, not %d", seen - 1, rounds)
