"""SIGINT and SIGTERM: a run that is asked to stop finishes its round and writes a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; the message says what there is.

    Attributes:
      exit_code: 130 for SIGINT, 143 for SIGTERM.
      agreed: whether all processes of the run end here; else this one does alone.
    """

    def __init__(self, signum: int, message: str = "interrupted", *, agreed: bool = False):
        super().__init__(message)
        self.exit_code, self.agreed = 128 + signum, agreed


class Request:
    """What was asked for so far: the signal's number, or 0."""

    signum = 0


@contextlib.contextmanager
def handled(*, deferred: bool) -> Iterator[Request]:
    """Handles both signals; outside the main thread, where Python allows no handlers, nothing changes.

    Args:
      deferred: note the first signal in the `Request` that is yielded, and raise `Interrupted` at the second;
        else raise at the first.
    """
    request = Request()

    def handle(signum: int, _: FrameType | None) -> None:
        if request.signum or not deferred:
            raise Interrupted(signum)
        request.signum = signum

    ours = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {signum: signal.signal(signum, handle) for signum in ours}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
