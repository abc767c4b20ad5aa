"""Bytes that a process's TCP connections have carried: what collectives between processes really cost.

The kernel counts them per connection, without headers and whatever else the machine does (Linux). XLA's
collectives on CPU between processes (gloo) connect every pair of devices by TCP, those of one process too.
"""

import contextlib
import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterator

_INFO_SIZE = 256
_BYTES_RECEIVED = 128  # offset of tcpi_bytes_received, uint64, in struct tcp_info of <linux/tcp.h>


def received_bytes() -> int:
    """Bytes that have arrived over the connections that this process has open.

    Raises:
      OSError: the system does not list them; only Linux does.
    """
    return sum(map(_received, os.listdir("/proc/self/fd")))


def _received(descriptor: str) -> int:
    """Of one connection; 0 for a descriptor that is none, or that has been closed meanwhile."""
    try:
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
            return 0
        copy = os.dup(int(descriptor))
    except OSError:
        return 0
    with socket.socket(fileno=copy) as connection:
        if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
            return 0
        try:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
            return struct.unpack_from("Q", info, _BYTES_RECEIVED)[0]
        except (OSError, struct.error):  # a stream of another protocol, such as MPTCP or vsock
            return 0


class Meter:
    """Adds up what arrives, by cause.

    Attributes:
      bytes: by cause.
      times: by cause, how often it was measured.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.times: Counter[str] = Counter()

    def add(self, cause: str, received: int) -> None:
        self.bytes[cause] += received
        self.times[cause] += 1


def open_meter(num_processes: int) -> Meter | None:
    """A meter, where there is something to measure and the system can."""
    return Meter() if num_processes > 1 and sys.platform == "linux" else None


@contextlib.contextmanager
def metered(meter: Meter | None, *causes: str) -> Iterator[None]:
    """Counts what arrives meanwhile for these causes; without a meter, nothing."""
    before = received_bytes() if meter is not None else 0
    yield
    if meter is not None:
        received = received_bytes() - before
        for cause in causes:
            meter.add(cause, received)
