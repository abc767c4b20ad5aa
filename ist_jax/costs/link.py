"""The modelled time of a round: what it would take over the network, on workers with machines of their own.

  modelled seconds = seconds of the local steps + latency x messages + 8 x bytes sent / bits per second

of a worker, all of whose messages and bytes go one after another through its link. How many messages there
are, `traced.messages` says.
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    import numpy as np

_PAIR = re.compile(r"([^@]+)(?:@([^@]+?)(s|ms|us))?")
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
T = TypeVar("T", float, "np.ndarray")


class Link(NamedTuple):
    """What connects a worker with the others."""

    bits_per_second: float  # each way
    latency: float = 0.0  # seconds per message

    @property
    def bandwidth_text(self) -> str:
        """For people, as '1 Gb/s'."""
        return f"{self.bits_per_second / 1e9:g} Gb/s"

    @property
    def latency_text(self) -> str:
        """For people, as '0.1 ms'."""
        return f"{1e3 * self.latency:g} ms"


LINKS = (Link(1e8, 1e-2), Link(1e9, 1e-3), Link(1e10, 1e-4))  # from far apart to one room


class Modelled(NamedTuple):
    """The modelled time of a round, or of a run.

    Attributes:
      seconds: of steps and exchange, one after the other.
      utilisation: the share of them in which a worker computes.
      overlap_saves: seconds by which it would be shorter if the exchange overlapped the steps as far as
        the shorter of both goes. No method here does that; it costs steps on older parameters.
    """

    seconds: float
    utilisation: float
    overlap_saves: float


def modelled_seconds(computing: T, sent: T, messages: T, link: Link) -> T:
    """Modelled seconds, entry by entry; of rounds, or of sums over rounds since it is linear.

    The same function in the report's script is `modelledSeconds`.

    Args:
      computing: seconds of the local steps, measured or reckoned.
      sent: bytes sent by a worker.
      messages: the same.
      link: of the worker.
    """
    return computing + link.latency * messages + 8 * sent / link.bits_per_second


def modelled(computing: float, sent: float, messages: float, link: Link) -> Modelled:
    """All that is modelled; arguments as for `modelled_seconds`."""
    seconds = modelled_seconds(computing, sent, messages, link)
    return Modelled(seconds, computing / seconds if seconds else 1.0, min(computing, seconds - computing))


def parse(texts: Sequence[str]) -> list[Link]:
    """Links as on a command line: '1e9@1ms', or '1e9' without latency.

    Raises:
      ValueError: there is none, or one is no such pair.
    """
    links = []
    for text in texts or [""]:
        found = _PAIR.fullmatch(text)
        try:
            bandwidth = float(found[1]) if found else math.nan
            latency = float(found[2]) * _UNITS[found[3]] if found and found[2] else 0.0
        except ValueError:
            bandwidth = latency = math.nan
        if not (0 < bandwidth < math.inf and 0 <= latency < math.inf):
            raise ValueError(
                f"--bandwidth={','.join(texts)}: give bits per second above 0 and, after an @, a latency of "
                "0 or more in s, ms or us: 1e8@10ms,1e9"
            )
        links.append(Link(bandwidth, latency))
    return links
