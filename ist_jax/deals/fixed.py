"""Never dealt again: the partition of the first round, by the papers' deal, in all rounds. An ablation."""

from ist_jax.deals.random import random
from ist_jax.partition import Rule

fixed = Rule("fixed", random, once=True)
