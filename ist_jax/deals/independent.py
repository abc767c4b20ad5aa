"""Federated Dropout's deal: every worker draws its units by itself, so that one may be several's or nobody's.

Caldas et al., Expanding the Reach of Federated Learning by Reducing Client Resource Requirements,
arXiv:1812.07210, 2018.
"""

import numpy as np

from ist_jax.deals.random import random
from ist_jax.partition import Assignment, Group, Rule, assign


def _draw(rng: np.random.Generator, group: Group, round_index: int) -> Assignment:
    """As many units of each strip to each worker as `random` deals it, but any of the strip."""
    indices, gates = random(rng, group, round_index)
    held = np.zeros((group.num_workers, group.size), bool)
    for worker, units in enumerate(indices):
        strips = np.bincount(units[gates[worker]] // group.strip_size, minlength=group.strips)
        for start, count in zip(range(0, group.size, group.strip_size), strips, strict=False):
            stop = min(start + group.strip_size, group.size)
            held[worker, start + rng.permutation(stop - start)[:count]] = True
    return assign(held, group)


independent = Rule("independent", _draw, independent=True)
