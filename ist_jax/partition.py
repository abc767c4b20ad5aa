"""Who trains what: random partitions of a model's units among the workers.

A *unit* is what is dealt out (a residual block, a hidden neuron); a *group* is a set of
interchangeable units of one shape. A model names the array axes that run over the units of a group
(`unit_axes`), a `Group` fixes the shapes of every draw, and `sample` draws one.

Everything here is NumPy on the host: an assignment is data, never a shape, so that one compiled
program serves every draw, and the same seed gives the same draw on any number of devices.

References:
  Yuan et al., Distributed Learning of Deep Neural Networks using Independent Subnet Training,
  arXiv:1910.02120, 2019 (neurons).
  Dun et al., ResIST: Layer-Wise Decomposition of ResNets for Distributed Training,
  arXiv:2107.00961, 2021 (residual blocks, minimum depth).
"""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

Axes = Mapping[str, tuple[str | None, ...]]
Rules = Mapping[str, Any]


class Assignment(NamedTuple):
    """Which unit sits in which slot of which worker, for one group.

    `indices` is int32 [S, n]: every worker's units in ascending order (the order of depth is kept),
    then, in its empty slots, the number of units U. `gates` is bool [S, n], False in empty slots.
    """

    indices: np.ndarray | jax.Array
    gates: np.ndarray | jax.Array


class Group(NamedTuple):
    """The static description of a unit group under S workers: the shapes of every draw.

    Attributes:
      name: the name that the model's `unit_axes` gives it.
      size: U, the number of units.
      num_workers: S.
      deck: the worker that gets the i-th dealt unit, U entries.
      strips: 1, or S when the draw is stratified: the units fall into S contiguous strips of
        `strip_size`, and every strip is dealt out evenly. This makes the exchange of leaves with two
        unit axes exact (see `store`).
      min_units: every worker holds at least so many units; reached by overlap.
      slots: n, the units of the worker with the most.
      strip_slots: m, the most units of one strip that any worker can hold.
      fair: the workers have equal shares, so who gets the remainder is drawn as well.
    """

    name: str
    size: int
    num_workers: int
    deck: tuple[int, ...]
    strips: int
    min_units: int
    slots: int
    strip_slots: int
    fair: bool

    @property
    def strip_size(self) -> int:
        """Units of a full strip; the last ones may hold fewer."""
        return -(-self.size // self.strips)

    @property
    def counts(self) -> tuple[int, ...]:
        """Units held by the worker in each place of the deck, the overlap included."""
        dealt = np.bincount(np.asarray(self.deck, int), minlength=self.num_workers)
        return tuple(int(c) for c in np.maximum(dealt, self.min_units))

    @property
    def disjoint(self) -> bool:
        """No unit is ever held by two workers."""
        return sum(self.counts) == self.size

    @property
    def even(self) -> bool:
        """No worker ever has an empty slot."""
        return min(self.counts) == self.slots

    @property
    def share(self) -> float:
        """The mean fraction of the workers that hold a unit: ResIST's scale at evaluation."""
        return sum(self.counts) / (self.num_workers * self.size)


def resolve_axes(params: Any, rules: Rules) -> dict[str, tuple[str | None, ...]]:
    """The unit axes of every leaf of `params`, by path.

    Args:
      params: nested dict of arrays (or shapes).
      rules: either a pytree of the params' shape or a flat dict of regular expressions that must
        match a whole path such as `section3/blocks/conv1/kernel`; the values are tuples with a
        group name or None per array axis. A trailing `...` stands for None on all further axes. The
        first rule that matches counts; a leaf that none matches is shared by all workers.

    Returns:
      A flat dict from path to a tuple of group name or None, one per array axis.

    Raises:
      ValueError: a rule matches nothing, or does not fit the leaf; a leaf has three unit axes; a
        group has two different sizes.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    patterns = traverse_util.flatten_dict(dict(rules), sep="/")
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in flat):
            raise ValueError(f"unit_axes rule {pattern!r} matches no parameter; paths are {', '.join(flat)}")
    axes = {}
    for path, leaf in flat.items():
        rule = next((r for p, r in patterns.items() if re.fullmatch(p, path)), (...,))
        axes[path] = _fit_rule(path, leaf.ndim, rule)
    sizes: dict[str, int] = {}
    for path, names in axes.items():
        for size, name in zip(flat[path].shape, names, strict=True):
            if name is not None and sizes.setdefault(name, size) != size:
                raise ValueError(
                    f"unit group {name!r} has {sizes[name]} units on one leaf and {size} on {path}"
                )
    return axes


def _fit_rule(path: str, ndim: int, rule: Sequence[Any]) -> tuple[str | None, ...]:
    names = tuple(rule)
    if names and names[-1] is ...:
        names = names[:-1] + (None,) * (ndim - len(names) + 1)
    if len(names) != ndim:
        raise ValueError(f"unit_axes names {len(names)} axes for {path}, which has {ndim}")
    if sum(name is not None for name in names) > 2:
        raise ValueError(f"unit_axes names three unit axes on {path}; at most two are supported")
    return names


def make_groups(
    params: Any,
    axes: Axes,
    num_workers: int,
    *,
    min_units: int = 0,
    shares: Sequence[float] = (),
) -> dict[str, Group]:
    """The groups of a model, for a number of workers.

    Args:
      params: nested dict of arrays (or shapes).
      axes: what `resolve_axes` returned.
      num_workers: S, at least 1.
      min_units: the least units per worker and group (0: none), or all of a smaller group; met by giving
        units to several workers, never twice to one.
      shares: relative speed of each worker, S positive numbers; a worker of share 2 is dealt twice
        the units of a worker of share 1. Empty: equal shares.

    Returns:
      Groups by name, in alphabetical order.

    Raises:
      ValueError: a number of workers, minimum or share that cannot work.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers} must be at least 1")
    if shares and (len(shares) != num_workers or not all(0 < share < np.inf for share in shares)):
        raise ValueError(
            f"partition.shares={tuple(shares)} must hold {num_workers} positive numbers, "
            "one per worker, or be empty"
        )
    flat = traverse_util.flatten_dict(params, sep="/")
    sizes = {n: s for p, ns in axes.items() for s, n in zip(flat[p].shape, ns, strict=True) if n}
    stratified = {next(n for n in ns if n) for ns in axes.values() if sum(n is not None for n in ns) == 2}
    most = max(sizes, key=lambda name: sizes[name], default="")
    if min_units < 0 or (most and min_units > sizes[most]):
        raise ValueError(
            f"partition.min_units={min_units} must lie between 0 and the {sizes[most]} units of {most}"
        )
    groups = {}
    for name, size in sorted(sizes.items()):
        strips = num_workers if name in stratified else 1
        groups[name] = make_group(name, size, num_workers, strips, min(min_units, size), shares)
    return groups


def make_group(
    name: str, size: int, num_workers: int, strips: int, min_units: int, shares: Sequence[float]
) -> Group:
    """One group, of checked values.

    Args:
      name: of the group.
      size: U, the number of units.
      num_workers: S.
      strips: 1, or S for a stratified draw.
      min_units: as for `make_groups`.
      shares: as for `make_groups`.
    """
    deck = _deal(size, tuple(shares) or (1.0,) * num_workers)
    dealt = np.bincount(deck, minlength=num_workers)
    slots = int(max(dealt.max(), min_units))
    strip_size = -(-size // strips)
    if strips == 1 or (dealt < min_units).any():
        strip_slots = min(strip_size, slots)
    else:
        cuts = range(size) if shares else range(0, size, strip_size)  # unequal shares: any window of the deck
        endless = np.concatenate([deck, deck[: strip_size if shares else 0]])
        strip_slots = int(max(np.bincount(endless[i : i + strip_size]).max() for i in cuts))
    return Group(
        name, size, num_workers, tuple(deck.tolist()), strips, min_units, slots, strip_slots,
        fair=not shares,
    )  # fmt: skip


def with_everyone(groups: Mapping[str, Group]) -> dict[str, Group]:
    """The groups when every worker holds all units: rounds of local SGD, exchanged like any others."""
    return {
        name: group._replace(min_units=group.size, slots=group.size, strip_slots=group.strip_size)
        for name, group in groups.items()
    }


def _deal(size: int, shares: Sequence[float]) -> np.ndarray:
    """Deck [U] of workers: as many cards each as its share, spread evenly."""
    ideal = size * np.asarray(shares, float) / np.sum(shares)
    counts = np.floor(ideal + 1e-9).astype(int)
    short = size - counts.sum()
    counts[np.argsort(counts - ideal, kind="stable")[:short]] += 1
    workers = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([(np.arange(c) + 0.5) / c for c in counts if c] or [np.zeros(0)])
    return workers[np.lexsort((workers, place))]


def sample(rng: np.random.Generator, groups: Mapping[str, Group]) -> dict[str, Assignment]:
    """Draws one partition of every group, uniformly at random.

    Units are permuted (within each strip, where stratified) and dealt out without replacement, so
    that every unit has a worker. Workers below `min_units` then get further units at random, those
    held by the fewest first (ResIST's minimum depth).

    Args:
      rng: the source of randomness. `round_rng` makes the one of a round.
      groups: from `make_groups`.

    Returns:
      Assignments by group name.
    """
    return {name: _sample_group(rng, groups[name]) for name in sorted(groups)}


def round_rng(seed: int, round_index: int) -> np.random.Generator:
    """The generator of a round's partition: a function of seed and round alone, so resume is exact."""
    return np.random.default_rng((seed, round_index))


@functools.cache
def fingerprint(groups: tuple[Group, ...]) -> str:
    """Twelve hexadecimal digits that tell draws from one another: equal groups and seeds, equal draws."""
    return hashlib.sha256(repr(sorted(map(tuple, groups))).encode()).hexdigest()[:12]


def sample_present(seed: int, round_index: int, num_workers: int, participation: float) -> np.ndarray:
    """Which workers take part in a round: bool [S], each with the given probability, independently."""
    return np.random.default_rng((seed, round_index, num_workers)).random(num_workers) < participation


def _sample_group(rng: np.random.Generator, group: Group) -> Assignment:
    workers = rng.permutation(group.num_workers) if group.fair else np.arange(group.num_workers)
    cut = 0 if group.fair else rng.integers(group.size)  # where the deck begins, so that no unit is favoured
    owners = workers[np.roll(np.asarray(group.deck, int), cut)]
    held = np.zeros((group.num_workers, group.size), bool)
    for start in range(0, group.size, group.strip_size):
        stop = min(start + group.strip_size, group.size)
        held[owners[start:stop], start + rng.permutation(stop - start)] = True
    for worker in rng.permutation(group.num_workers):
        missing = group.min_units - held[worker].sum()
        if missing > 0:
            load = np.where(held[worker], group.num_workers + 1, held.sum(0))
            held[worker, np.lexsort((rng.random(group.size), load))[:missing]] = True
    indices = np.sort(np.where(held, np.arange(group.size), group.size), axis=1)
    indices = indices[:, : group.slots].astype(np.int32)
    return Assignment(indices, indices < group.size)
