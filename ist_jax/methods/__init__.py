"""The methods: what a round does, each a file with a factory, and their table.

Beside a method, chosen by name as well, stands what becomes of the optimizer's state (`steps.POLICIES`).
"""

from collections.abc import Callable
from typing import NamedTuple

from ist_jax.methods import data_parallel, subnets
from ist_jax.methods.method import Method, Recipe


class Entry(NamedTuple):
    """A line of the table.

    Attributes:
      make: the factory.
      deals_units: whether the model's units are dealt out; else the layout has no groups.
      optimizer_state: the one policy that the method has; '': the config's.
      exchanges: parameters go out and come back, so that a codec has something to encode.
    """

    make: Callable[[Recipe], Method]
    deals_units: bool = False
    optimizer_state: str = ""
    exchanges: bool = True


METHODS: dict[str, Entry] = {
    "ist": Entry(subnets.make, deals_units=True),
    "local_sgd": Entry(subnets.make),
    "data_parallel": Entry(data_parallel.make, optimizer_state="carry", exchanges=False),
}
