"""The papers' deal: uniformly at random, dealt again in every round."""

import numpy as np

from ist_jax.partition import Assignment, Group, assign


def random(rng: np.random.Generator, group: Group, round_index: int) -> Assignment:
    """Deals without replacement, uniformly at random, so that every unit has a worker.

    Units are permuted (within each strip, where stratified) and dealt out. Workers below `min_units`
    then get further units at random, those held by the fewest first (ResIST's minimum depth).
    """
    workers = rng.permutation(group.num_workers) if group.fair else np.arange(group.num_workers)
    cut = 0 if group.fair else rng.integers(group.size)  # where the deck begins, so that no unit is favoured
    owners = workers[np.roll(group.deck, cut)]
    held = np.zeros((group.num_workers, group.size), bool)
    for start in range(0, group.size, group.strip_size):
        stop = min(start + group.strip_size, group.size)
        held[owners[start:stop], start + rng.permutation(stop - start)] = True
    for worker in rng.permutation(group.num_workers):
        missing = group.min_units - held[worker].sum()
        if missing > 0:
            load = np.where(held[worker], group.num_workers + 1, held.sum(0))
            held[worker, np.lexsort((rng.random(group.size), load))[:missing]] = True
    return assign(held, group)
