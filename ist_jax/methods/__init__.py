"""The methods: what a round does, each a file with a factory, and their table.

Beside a method, chosen by name as well, stands what becomes of the optimizer's state (`steps.POLICIES`).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from ist_jax.key import Key
from ist_jax.methods import data_parallel, ensemble, power_sgd, subnets
from ist_jax.methods.method import Method, Recipe


class Entry(NamedTuple):
    """A line of the table.

    Attributes:
      make: the factory.
      deals_units: whether the model's units are dealt out; else the layout has no groups.
      policies: of the optimizer's state that the method has, names of `steps.POLICIES`; its default first.
      exchanges: parameters go out and come back, so that a codec has something to encode.
      has_outer: what a merge brings goes through `recipe.outer`.
      members: every worker has a net of its own, of a subnet's size, and there is no model of all.
      options: its keys of the config, by whole names; `recipe.options` has their values.
    """

    make: Callable[[Recipe], Method]
    deals_units: bool = False
    policies: tuple[str, ...] = ("reset", "keep", "carry")
    exchanges: bool = True
    has_outer: bool = False
    members: bool = False
    options: Mapping[str, Key] = MappingProxyType({})


METHODS: dict[str, Entry] = {
    "ist": Entry(subnets.make, deals_units=True, has_outer=True),
    "local_sgd": Entry(subnets.make, policies=("keep", "reset", "carry"), has_outer=True),
    "data_parallel": Entry(data_parallel.make, policies=("carry",), exchanges=False),
    "ensemble": Entry(ensemble.make, policies=("carry",), exchanges=False, members=True),
    "power_sgd": Entry(power_sgd.make, policies=("carry",), exchanges=False, options=power_sgd.OPTIONS),
}


def policy_of(method: object, chosen: str) -> str:
    """The policy of a method's optimizer state: the chosen one or, where it has none such, its default.

    Args:
      method: an `Entry`, or a factory of the user's own.
      chosen: a name of `steps.POLICIES`; '': none.
    """
    policies = method.policies if isinstance(method, Entry) else Entry._field_defaults["policies"]
    return chosen if chosen in policies else policies[0]
