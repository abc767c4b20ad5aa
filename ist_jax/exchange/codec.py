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
    """

    gather: int = 32
    merge: int = 32
    seed: int = 0

    @property
    def compress(self) -> bool:
        return min(self.gather, self.merge) < 32


NONE = Codec()
PLAIN = Bits()
CODECS: dict[str, Codec] = {"none": NONE}
