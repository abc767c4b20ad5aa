"""Seconds of what a run waits for, and bytes that arrive from other processes meanwhile."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

from ist_jax.costs import sockets


class Clock:
    """Adds up laps by name.

    Args:
      num_processes: of the run; what they send each other is measured where there are several.

    Attributes:
      meters: of bytes, by stage; none where there is nothing to measure, or no way to.
    """

    def __init__(self, num_processes: int) -> None:
        self.meters: dict[str, sockets.Meter] = {}
        self._num_processes = num_processes
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def lap(self, name: str, stage: str = "") -> Iterator[None]:
        """Takes the time of what is done and waited for inside, and the bytes of a stage."""
        if stage and stage not in self.meters and (meter := sockets.open_meter(self._num_processes)):
            self.meters[stage] = meter
        started = time.perf_counter()
        with sockets.metered(self.meters.get(stage), name):
            yield
        self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        taken, self._seconds = self._seconds, defaultdict(float)
        return taken
