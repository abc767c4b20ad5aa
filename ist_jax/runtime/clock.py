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
      meter: of bytes; None where there is nothing to measure, or no way to.
    """

    def __init__(self, num_processes: int) -> None:
        self.meter = sockets.open_meter(num_processes)
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def lap(self, name: str, *, metered: bool = True) -> Iterator[None]:
        """Takes the time of what is done and waited for inside."""
        started = time.perf_counter()
        with sockets.metered(self.meter if metered else None, name):
            yield
        self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        taken, self._seconds = self._seconds, defaultdict(float)
        return taken
