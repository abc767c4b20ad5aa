"""What looks on while a run goes round by round: the progress bar, TensorBoard's event files, the profiler.

An observer is a function that is called with every round's record, as in metrics.jsonl, after the round.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
from tqdm import tqdm

from ist_jax.tasks.task import ACCURACY, Metric
from ist_jax.workdir.files import Record

log = logging.getLogger(__name__)

Observer = Callable[[Record], None]


@contextmanager
def open_observers(workdir: Path, *, tensorboard: bool, profile: int) -> Iterator[list[Observer]]:
    """The observers that are asked for, writing to folders of their names in `workdir`.

    Args:
      workdir: of the run.
      tensorboard: write event files.
      profile: rounds to profile, 0: none.
    """
    asked = [write_events(workdir / "tensorboard")] if tensorboard else []
    asked += [profile_rounds(workdir / "profile", profile)] if profile else []
    with ExitStack() as stack:
        yield [stack.enter_context(observer) for observer in asked]


@contextmanager
def show_progress(total: int, desc: str, done: int = 0, metric: Metric = ACCURACY) -> Iterator[Observer]:
    """A bar in rounds on a terminal; elsewhere a plain line about twenty times a run.

    Args:
      total: rounds of the run.
      desc: what is being trained.
      done: rounds of earlier sessions.
      metric: of the task.
    """
    every, score = max(1, total // 20), ""
    key = metric.name
    plain = not sys.stderr.isatty()

    def show(record: Record) -> None:
        nonlocal score
        for split in ("validation", "test"):
            if f"{split}_{key}" in record:
                text = metric.text(record[f"{split}_{key}"])
                score = f", {split} {key} {text} (round {record['round']})"
        text = f"loss {record['train_loss']:.3f}{score}, {record['examples_per_second']:,.0f} examples/s"
        bar.set_postfix_str(text, refresh=False)
        bar.update()
        if plain and (record["round"] == total or record["round"] % every == 0):
            print(f"round {record['round']}/{total}: {text}", file=sys.stderr, flush=True)

    with tqdm(total=total, desc=desc, unit="round", initial=done, disable=plain) as bar:
        yield show


@contextmanager
def show_runs(total: int) -> Iterator[Callable[[float, float, str], None]]:
    """One bar over several runs on a terminal; elsewhere a plain line about twenty times.

    Args:
      total: how many.

    Yields:
      (done, skipped, text): the runs that are done, with the part of the one that is going on; how many of
      them were before; what is going on. The time left is that of those done since, each as long as the rest.
    """
    started, said, plain = time.monotonic(), -1.0, not sys.stderr.isatty()

    def show(done: float, skipped: float, text: str) -> None:
        nonlocal said
        elapsed, fresh = time.monotonic() - started, done - skipped
        if fresh > 0 and done < total:
            text += f", about {_duration((total - done) * elapsed / fresh)} left"
        bar.n = done
        bar.set_description_str(text)
        if plain and (done - said) * 20 >= total:
            said = done
            print(text, file=sys.stderr, flush=True)

    form = "{percentage:3.0f}%|{bar:20}| {desc}"
    with tqdm(total=total, bar_format=form, leave=False, disable=plain) as bar:
        yield show


def _duration(seconds: float) -> str:
    """For people: '40 s', '12 min' or '3.1 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


@contextmanager
def write_events(folder: Path) -> Iterator[Observer]:
    """Writes the numbers of every record as scalars of its round: `tensorboard --logdir=FOLDER`.

    Of a run that goes on, what an earlier session wrote of the same rounds is hidden.
    """
    from tensorboardX import SummaryWriter  # seldom needed

    writers: list[SummaryWriter] = []
    with ExitStack() as opened:

        def write(record: Record) -> None:
            step = record["round"]
            if not writers:
                writers.append(opened.enter_context(SummaryWriter(str(folder), purge_step=step)))
            for name, value in record.items():
                if isinstance(value, int | float):
                    writers[0].add_scalar(name, value, step)

        yield write


@contextmanager
def profile_rounds(folder: Path, rounds: int) -> Iterator[Observer]:
    """Profiles so many rounds with `jax.profiler`, from the session's second on; for Perfetto or XProf."""
    seen = 0

    def start_or_stop(_: Record) -> None:
        nonlocal seen
        seen += 1
        if seen == 1:
            jax.profiler.start_trace(folder)
        elif seen == rounds + 1:
            jax.profiler.stop_trace()

    try:
        yield start_or_stop
    finally:
        if 0 < seen <= rounds:
            jax.profiler.stop_trace()
            log.warning("profile: %d rounds after the first were traced, not %d", seen - 1, rounds)
