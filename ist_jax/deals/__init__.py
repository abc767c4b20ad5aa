"""The deals: by which rule the units of a group are given to the workers.

A deal is a `partition.Deal`: one file, and one line here.
"""

from ist_jax.deals.fixed import fixed
from ist_jax.deals.independent import independent
from ist_jax.deals.random import random
from ist_jax.deals.rolling import rolling
from ist_jax.partition import Deal

DEALS: dict[str, Deal] = {
    "random": random,
    "rolling": rolling,
    "fixed": fixed,
    "independent": independent,
}
