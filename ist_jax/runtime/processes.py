"""Several processes, on one machine or many: how they find each other, agree, and notice that one is lost.

JAX's own distributed runtime connects them; on CPU its collectives run over gloo. Every process trains its
own workers and writes its own shards to a folder that all of them see. `devices` spans programs over them.
"""

import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import jax
from jax._src import distributed as runtime  # the key-value store has no public name

from ist_jax import errors

log = logging.getLogger(__name__)

T = TypeVar("T")

LOST = 75  # exit code: try again later (EX_TEMPFAIL)
_BEAT_SECONDS = 1.0
_PREFIX = "ist_jax"
_watches: list["Watch"] = []  # at most one, like JAX's own state


def start(meeting: list, *, lost_after: float, stuck_after: float) -> None:
    """Connects this process with the others, before JAX looks for devices, and watches them from then on.

    Args:
      meeting: host:port of process 0, how many processes there are, and the number of this one, counted from
        0; None for all three: from SLURM, Open MPI, Kubernetes or a TPU pod.
      lost_after: seconds without a sign of life until a process counts as lost.
      stuck_after: seconds without progress, though all are alive; 0: for ever.

    Raises:
      ValueError: they cannot be found.
    """
    coordinator, num_processes, process_id = meeting
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is handled in `signals`
    patience = round(lost_after) * 2 + 60  # JAX's own, cruder watch comes later than ours
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=patience,
            heartbeat_timeout_seconds=patience, shutdown_timeout_seconds=round(lost_after),
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        asked = f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}"
        found = asked if coordinator else "--distributed found no other processes"
        raise ValueError(f"{found}: {errors.one_line(error)}") from error
    _watches.append(Watch(lost_after, stuck_after))
    _watches[0].start()


def is_started() -> bool:
    """Whether there may be more than this process."""
    return runtime.global_state.client is not None


def number() -> int:
    """This process, counted from 0; 0 where it is the only one."""
    return runtime.global_state.process_id or 0


def count() -> int:
    """How many processes there are."""
    return runtime.global_state.num_processes or 1


def progress(what: str) -> None:
    """Tells the watch that training goes on; `what` is named if it was the last sign of it."""
    for watch in _watches:
        watch.progress = (what, time.monotonic())


def meet(what: str) -> None:
    """Waits for the other processes; the watch ends the wait if one is lost.

    Args:
      what: names this meeting; used once.
    """
    if is_started():
        try:
            runtime.global_state.client.wait_at_barrier(f"{_PREFIX}/{what}", 24 * 3600 * 1000)  # type: ignore[union-attr]
        except RuntimeError:
            explain()
            raise


def first_alone(fn: Callable[[], T], what: str) -> T | None:
    """`fn` in process 0 and, when that is done, in the others: for what process 0 tidies up on disk."""
    result = fn() if number() == 0 else None
    meet(what)
    return result if number() == 0 else fn()


def is_of_jax(error: Exception) -> bool:
    """Whether an error is one of JAX's runtime, as a collective with a lost process ends in.

    Some are plain ValueErrors with the name of a status first: "UNKNOWN: Gloo AllGather failed".
    """
    named = isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", str(error)) is not None
    return named or isinstance(error, jax.errors.JaxRuntimeError)


def explain() -> None:
    """After an error of a collective: gives the watch the time to find out who is lost."""
    for watch in _watches:
        watch.join(watch.lost_after + 5 * _BEAT_SECONDS)


def stop() -> None:
    """Parts from the others, once all are done."""
    if is_started():
        meet("the end")
        for watch in _watches:
            watch.stopped.set()
            watch.join()
        _watches.clear()
        jax.distributed.shutdown()


def leave(code: int) -> None:
    """Ends this process alone, after something that did not happen to the others: they notice."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk must not keep it
            stream.flush()
    os._exit(code)


class Watch(threading.Thread):
    """Gives signs of life, and looks for those of the others and for progress.

    A process whose signs stay away, or a collective that never ends, ends this process with code 75 and a
    line that says which; the last checkpoint is untouched. Only process 0, which keeps the signs, is missed
    by JAX itself: it aborts the others at once, with a message about the leader task.

    Args:
      lost_after: as for `start`.
      stuck_after: as for `start`.
    """

    def __init__(self, lost_after: float, stuck_after: float):
        super().__init__(daemon=True, name="watch")
        self.lost_after, self.stuck_after = lost_after, stuck_after
        self.stopped = threading.Event()
        now = time.monotonic()
        self.progress = ("the start", now)
        self._seen = {other: ("", now) for other in range(count()) if other != number()}

    def run(self) -> None:
        while not self.stopped.wait(_BEAT_SECONDS):
            self._look()
            now = time.monotonic()
            for other, (_, since) in self._seen.items():
                if now - since > self.lost_after:
                    end(f"process {other} of {count()} has given no sign of life for {self.lost_after:.0f} s")
            what, since = self.progress
            if self.stuck_after and now - since > self.stuck_after:
                end(f"nothing has happened for {self.stuck_after:.0f} s after {what}")

    def _look(self) -> None:
        client, now = runtime.global_state.client, time.monotonic()
        try:
            client.key_value_set(f"{_PREFIX}/alive/{number()}", str(now), allow_overwrite=True)  # type: ignore[union-attr]
            signs = dict(client.key_value_dir_get(f"{_PREFIX}/alive/"))  # type: ignore[union-attr]
        except RuntimeError:  # process 0, which keeps the signs, does not answer: its own sign stays away
            return
        for other, (before, _) in self._seen.items():
            sign = signs.get(f"{_PREFIX}/alive/{other}", "")
            if sign != before:
                self._seen[other] = (sign, now)


def end(message: str) -> None:
    """Ends the process at once: collectives that wait for a lost process cannot be interrupted."""
    advice = "The same command on all processes goes on from the last checkpoint"
    print(f"error: {message}; stopped. {advice}", file=sys.stderr, flush=True)
    os._exit(LOST)
