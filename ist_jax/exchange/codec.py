"""What an exchange sends in place of the numbers.

A codec is a pair of functions, named in `CODECS` or given as `--config.exchange.codec=FILE.py:NAME`. It is
applied to every part of what is sent, a worker's own part included, so that the result does not depend on the
devices as long as it works number by number.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Shaped


class Codec(NamedTuple):
    """How numbers travel; both None: as they are.

    Attributes:
      encode: float [n, k] -> an array [n, ...] of any dtype of whole bytes.
      decode: that array -> float [n, k].
    """

    encode: Callable[[Float[Array, "n k"]], Shaped[Array, "n ..."]] | None = None
    decode: Callable[[Shaped[Array, "n ..."]], Float[Array, "n k"]] | None = None


class Bits(NamedTuple):
    """What an exchange sends of each number of the parameters, in bits: one of `quantize.BITS`.

    Attributes:
      gather: of what an owner sends.
      merge: of what a worker sends.
      seed: of the rounding.
      keep: the fraction that a worker sends of what it has changed, by magnitude.
      error_feedback: what it did not send of shared leaves stays with it and goes with its next change.
    """

    gather: int = 32
    merge: int = 32
    seed: int = 0
    keep: float = 1.0
    error_feedback: bool = False

    @property
    def compress(self) -> bool:
        return min(self.gather, self.merge) < 32 or self.keep < 1


LEAST = 16  # numbers that share a scale, or of which some are chosen; fewer are sent as they are
NONE = Codec()
PLAIN = Bits()
CODECS: dict[str, Codec] = {"none": NONE}
