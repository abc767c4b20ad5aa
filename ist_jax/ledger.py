"""What a round costs in communication, by formula.

Two counts, which must not be mixed up:

  paper  as the papers count: 4 bytes (the dtype's) x 2 directions x the parameters of all subnets; the
         slots that are assigned, whoever's memory they already are in.
  wire   bytes that leave a device in the compiled collectives: n slots per worker, empty ones
         included, rows padded to the devices; a worker's own part does not move, one device sends
         nothing. `collective_operands` are the same programs' operands, own parts included.

Method 'local_sgd' sends every worker's whole model both ways once a round, 'data_parallel' once a step.
"""

from typing import NamedTuple

import numpy as np

from ist_jax.layout import Layout, Leaf


class Operands(NamedTuple):
    """Bytes of the collectives' operands per device, in one exchange of one parameter-shaped tree."""

    gather: int  # all-to-all of the units
    merge: int  # all-to-all of the units, of slices of the shared leaves, and of a flag per worker
    merge_shared: int  # all-gather of the merged slices


def collective_operands(layout: Layout) -> Operands:
    """The operands that the compiled gather and merge must have; all 0 on one device."""
    devices, workers, item = layout.num_devices, layout.workers_per_device, layout.dtype.itemsize
    if devices == 1:
        return Operands(0, 0, 0)
    units = sum(_unit_operand(layout, path, leaf) for path, leaf in layout.leaves.items())
    shared = sum(leaf.row_size for leaf in layout.leaves.values() if leaf.kind == "shared")
    shared += -shared % devices
    flags = layout.num_workers
    return Operands(units * item, (units + workers * shared + flags) * item, shared // devices * item)


def wire_bytes(layout: Layout, *, trees: int = 1) -> float:
    """Bytes that one device sends in a round of gather and merge.

    Args:
      layout: of the store.
      trees: parameter-shaped trees that are exchanged: 1, and 1 more per carried moment.
    """
    operands, devices = collective_operands(layout), layout.num_devices
    all_to_all = (operands.gather + operands.merge) * (devices - 1) / devices
    return trees * (all_to_all + operands.merge_shared * (devices - 1))


def subnet_parameters(layout: Layout) -> float:
    """Parameters of all workers' subnets together, assigned slots only (a mean where draws differ)."""
    return sum(_assigned(layout, leaf) for leaf in layout.leaves.values())


def paper_bytes_per_round(layout: Layout, *, trees: int = 1) -> float:
    """Bytes of a round by the papers' count, of all workers together, both directions."""
    return 2 * layout.dtype.itemsize * subnet_parameters(layout) * trees


def model_parameters(layout: Layout) -> int:
    """Parameters of the global model."""
    return sum(int(np.prod(leaf.shape, dtype=int)) for leaf in layout.leaves.values())


def full_model_bytes(layout: Layout) -> int:
    """The same for one exchange of the whole model by all workers: a round of local SGD."""
    return 2 * layout.dtype.itemsize * model_parameters(layout) * layout.num_workers


def _unit_operand(layout: Layout, path: str, leaf: Leaf) -> int:
    if leaf.kind == "rows":
        return layout.num_workers * leaf.groups[0].slots * layout.slice_size(path)
    if leaf.kind == "pairs":
        block = leaf.groups[0].strip_slots * leaf.groups[1].slots * leaf.row_size
        return layout.num_workers * layout.workers_per_device * block
    return 0


def _assigned(layout: Layout, leaf: Leaf) -> float:
    counts = [group.counts for group in leaf.groups]
    if leaf.kind == "shared":
        return layout.num_workers * leaf.row_size
    if leaf.kind == "rows":
        return sum(counts[0]) * leaf.row_size
    if leaf.groups[0].fair and leaf.groups[0].name != leaf.groups[1].name:  # independent draws
        return sum(counts[0]) * sum(counts[1]) / layout.num_workers * leaf.row_size
    return sum(a * b for a, b in zip(*counts, strict=True)) * leaf.row_size
