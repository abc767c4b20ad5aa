"""Bytes that a process's TCP connections have carried: what collectives between processes really cost.

The kernel counts them per connection, without headers and whatever else the machine does (Linux). XLA's
collectives on CPU between processes (gloo) connect every pair of devices by TCP, those of one process too.
"""

import os
import socket
import struct
import sys
from collections import Counter

_INFO_SIZE = 256
_BYTES_RECEIVED = 128  # offset of tcpi_bytes_received, uint64, in struct tcp_info of <linux/tcp.h>


def received_bytes() -> int:
    """Bytes that have arrived over the connections that this process has open.

    Raises:
      OSError: the system does not count them; only Linux does.
    """
    if sys.platform != "linux":
        raise OSError("bytes on the wire are counted on Linux only")
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
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
    return struct.unpack_from("Q", info, _BYTES_RECEIVED)[0]


class Meter:
    """Adds up what arrives, by cause.

    Attributes:
      bytes: by cause, since the meter was made.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self._before = received_bytes()

    def lap(self, *causes: str) -> None:
        """What has arrived since the last call was for these causes; none: it does not count."""
        now = received_bytes()
        for cause in causes:
            self.bytes[cause] += now - self._before
        self._before = now
