"""FedRolex's deal: neighbouring units, a window that moves on by one in every round.

Alam et al., FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction,
arXiv:2212.01548, 2022. Here the workers' windows stand side by side, so that every unit has a worker.
"""

import numpy as np

from ist_jax.partition import Assignment, Group, assign


def rolling(rng: np.random.Generator, group: Group, round_index: int) -> Assignment:
    """Deals windows, in each strip where the group is stratified; nothing is random.

    Workers below `min_units` get further units: the next ones of a ring that moves on, too.
    """
    held = np.zeros((group.num_workers, group.size), bool)
    for start in range(0, group.size, group.strip_size):
        strip = np.arange(start, min(start + group.strip_size, group.size))
        held[np.roll(np.sort(group.deck[strip]), round_index), strip] = True
    for worker in held:
        others = np.flatnonzero(~worker)
        worker[np.roll(others, -round_index)[: max(0, group.min_units - worker.sum())]] = True
    return assign(held, group)
