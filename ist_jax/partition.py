"""Who trains what: the units of a model, and what a deal of them among the workers must be.

A *unit* is what is dealt out (a residual block, a hidden neuron); a *group* is a set of
interchangeable units of one shape. A model names the array axes that run over the units of a group
(`unit_axes`), a `Group` fixes the shapes of every draw, a `Deal` (one of `ist_jax.deals`, or a user's
own) says who gets which units, and `draw` makes the partition of a round.

Everything here is NumPy on the host: an assignment is data, never a shape, so that one compiled
program serves every draw, and the same seed gives the same draw on any number of devices.

References:
  Yuan et al., Distributed Learning of Deep Neural Networks using Independent Subnet Training,
  arXiv:1910.02120, 2019 (neurons).
  Dun et al., ResIST: Layer-Wise Decomposition of ResNets for Distributed Training,
  arXiv:2107.00961, 2021 (residual blocks, minimum depth).
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Bool, Int, PyTree

from ist_jax.streams import Use, rng

_DRAWS = 2  # counted up when equal groups, rules and seeds come to give other draws


@dataclasses.dataclass(frozen=True)
class Blocks:
    """An axis on which a unit is `inner` neighbouring entries, `outer` times; outer x units x inner long.

    Fused gates [d, 4 h], four gates of h units each, are `(None, Blocks("hidden", outer=4))`. The inputs of a
    dense layer are `Blocks("channel", outer=49)` behind a flattened [7, 7, channels] and
    `Blocks("channel", inner=49)` behind a flattened [channels, 7, 7]. A name alone is `Blocks(name)`.

    Attributes:
      name: of the group.
      outer: how often the units are run through.
      inner: neighbouring entries of one unit.
    """

    name: str
    outer: int = 1
    inner: int = 1

    def __post_init__(self) -> None:
        if min(self.outer, self.inner) < 1:
            raise ValueError(f"{self}: outer and inner must be at least 1")

    def count(self, size: int) -> int:
        """Units, or slots, on an axis of so many entries."""
        return size // (self.outer * self.inner)


@dataclasses.dataclass(frozen=True)
class Each:
    """An axis whose units are dealt anew for each entry of another axis, as for each layer of a stack.

    Under `nn.scan` the kernels of L layers are one leaf [L, d, f], which `(None, None, "hidden")` deals out
    once: a worker holds the same of the f neurons in all layers. By `(None, None, Each("hidden"))` every
    layer has a draw of its own, and a unit is a neuron of a layer. All leaves of such a group are named so.

    Attributes:
      along: the group's name, or its `Blocks`.
      axis: of the layers, counted from 0; it is not dealt out itself.
    """

    along: str | Blocks
    axis: int = 0


Names = tuple[str | Blocks | Each | None, ...]  # of one leaf: the group along each of its axes
Axes = Mapping[str, Names]
Rules = Mapping[str, PyTree]


class Assignment(NamedTuple):
    """Which unit sits in which slot of which worker, for one group.

    `indices` is int32 [S, n]: every worker's units in ascending order (the order of depth is kept),
    then, in its empty slots, the number of units U. `gates` is bool [S, n], False in empty slots. Both are
    [S, L, n] for a group that is dealt layer by layer (`Each`), U being the units of one layer.
    """

    indices: Int[np.ndarray | jax.Array, "S *L n"]
    gates: Bool[np.ndarray | jax.Array, "S *L n"]


@dataclasses.dataclass(frozen=True)
class Group:
    """The static description of a unit group under S workers: the shapes of every draw.

    Attributes:
      name: the name that the model's `unit_axes` gives it.
      size: U, the number of units, of one layer where there are several.
      num_workers: S.
      strips: 1, or S when the draw is stratified: the units fall into S contiguous strips of
        `strip_size`, and every strip is dealt out evenly. This makes the exchange of leaves with two
        unit axes exact (see `store`).
      min_units: every worker holds at least so many units, at most U; reached by overlap.
      shares: relative speed of each worker, S numbers; (): equal shares.
      layers: L, each of which has a draw of its own, with the counts and slots that are said here (`Each`);
        0: there is one draw.
      independent: by a deal in which every worker draws by itself: a unit may be several's or nobody's.
    """

    name: str
    size: int
    num_workers: int
    strips: int = 1
    min_units: int = 0
    shares: tuple[float, ...] = ()
    layers: int = dataclasses.field(default=0, repr=False)  # see `fingerprint`
    independent: bool = dataclasses.field(default=False, repr=False)  # fingerprints have the rule itself

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a draw's arrays: (S, n), or (S, L, n)."""
        return (self.num_workers, *(self.layers,) * (self.layers > 0), self.slots)

    @property
    def total(self) -> int:
        """Units of all layers."""
        return self.size * max(1, self.layers)

    @property
    def strip_size(self) -> int:
        """Units of a full strip; the last ones may hold fewer."""
        return -(-self.size // self.strips)

    @property
    def fair(self) -> bool:
        """The workers have equal shares, so who gets the remainder may differ from round to round."""
        return not self.shares

    @functools.cached_property
    def deck(self) -> Int[np.ndarray, " U"]:
        """The worker that gets the i-th dealt unit; each as many as its share, spread evenly."""
        shares = np.asarray(self.shares or (1.0,) * self.num_workers, float)
        ideal = self.size * shares / shares.sum()
        counts = np.floor(ideal + 1e-9).astype(int)
        short = self.size - counts.sum()
        counts[np.argsort(counts - ideal, kind="stable")[:short]] += 1
        workers = np.repeat(np.arange(len(counts)), counts)
        place = np.concatenate([(np.arange(c) + 0.5) / c for c in counts if c] or [np.zeros(0)])
        return workers[np.lexsort((workers, place))]

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """Units held by the worker in each place of the deck, the overlap included."""
        return tuple(np.maximum(self._dealt, self.min_units).tolist())

    @property
    def slots(self) -> int:
        """n, the units of the worker with the most."""
        return max(self.counts)

    @functools.cached_property
    def strip_slots(self) -> int:
        """m, the most units of one strip that any worker can hold."""
        if self.strips == 1 or (self._dealt < self.min_units).any():
            return min(self.strip_size, self.slots)
        # unequal shares: any window of the deck
        cuts = range(0, self.size, self.strip_size) if self.fair else range(self.size)
        endless = np.concatenate([self.deck, self.deck[: 0 if self.fair else self.strip_size]])
        return int(max(np.bincount(endless[i : i + self.strip_size]).max() for i in cuts))

    @property
    def disjoint(self) -> bool:
        """No unit is ever held by two workers."""
        return not self.independent and sum(self.counts) == self.size

    @property
    def even(self) -> bool:
        """No worker ever has an empty slot."""
        return min(self.counts) == self.slots

    @property
    def share(self) -> float:
        """The mean fraction of the workers that hold a unit: ResIST's scale at evaluation."""
        return sum(self.counts) / (self.num_workers * self.size)

    @property
    def coverage(self) -> float:
        """The fraction of the units that somebody holds in a round; where they are drawn, about its mean."""
        return 1 - math.prod(1 - count / self.size for count in self.counts) if self.independent else 1.0

    @property
    def _dealt(self) -> Int[np.ndarray, " S"]:
        return np.bincount(self.deck, minlength=self.num_workers)

    def to_dict(self) -> dict[str, object]:
        """What a run records of it, for JSON: all that a draw depends on."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, recorded: Mapping[str, Any]) -> "Group":
        """The group that `to_dict` recorded, perhaps by way of JSON."""
        return cls(**{**recorded, "shares": tuple(recorded["shares"])})


Groups = Mapping[str, Group]  # by name
Draw = Mapping[str, Assignment]  # who holds which unit, by group

Deal = Callable[[np.random.Generator, Group, int], Assignment]
"""Who gets which units of a group: (generator of the round, group, round counted from 0) -> assignment.

The exchange, its counts of bytes and the scale at evaluation rely on what the group says, so that `draw`
refuses, with the deal's name, an assignment that breaks it:
  - `indices`, integers [S, n = group.slots]: a worker's units 0 to U - 1 in ascending order, none twice,
    then U in its empty slots; `gates`, bool [S, n]: False exactly there. `assign` makes both.
  - The workers hold `group.counts` units: where `group.fair`, in any order of the workers, else worker k
    holds counts[k]. So an `even` group has no empty slot.
  - Of each strip of `group.strip_size` units a worker holds at most `group.strip_slots`.
  - Where `group.disjoint`, no two workers hold the same unit. A unit that nobody holds keeps its value.
Where `group.layers`, it is called once for each layer, of which all of this is said, from the same generator.
A deal is a function of its arguments alone: the report and a resumed run draw again. Groups are dealt in
alphabetical order, from the same generator. One that needs more says so as a `Rule`.
"""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A deal that the engine must know more of.

    Attributes:
      name: for people.
      deal: who gets which units.
      once: it is dealt in the first round alone, from that round's generator, and holds for all rounds.
      independent: every worker draws by itself; its groups are never `disjoint`.
    """

    name: str
    deal: Callable[[np.random.Generator, Group, int], Assignment]
    once: bool = False
    independent: bool = False

    def __call__(self, rng: np.random.Generator, group: Group, round_index: int) -> Assignment:
        return self.deal(rng, group, round_index)


def rule_of(deal: Deal) -> Rule:
    """What the engine must know of a deal."""
    return deal if isinstance(deal, Rule) else Rule(getattr(deal, "__name__", str(deal)), deal)


def resolve_axes(params: PyTree, rules: Rules) -> dict[str, Names]:
    """The unit axes of every leaf of `params`, by path.

    Args:
      params: nested dict of arrays (or shapes).
      rules: either a pytree of the params' shape or a flat dict of regular expressions that must
        match a whole path such as `section3/blocks/conv1/kernel`; the values are tuples with a
        group name, `Blocks`, `Each` or None per array axis. A trailing `...` is None on all further axes.
        The first rule that matches counts; a leaf that none matches is shared by all workers.

    Returns:
      A flat dict from path to a tuple of group name, `Blocks`, `Each` or None, one per array axis.

    Raises:
      ValueError: a rule matches nothing, or does not fit the leaf; a leaf has three unit axes; an axis
        is no whole number of blocks; a group has two different sizes, or layers on some leaves alone.
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
    stacks: dict[str, int] = {}
    for path, blocks, size, layers in _unit_axes(flat, axes):
        name, units = blocks.name, blocks.count(size)
        if size != units * blocks.outer * blocks.inner:
            raise ValueError(f"{path} has an axis of {size} entries, no whole number of {blocks}")
        if sizes.setdefault(name, units) != units:
            raise ValueError(
                f"unit group {name!r} has {sizes[name]} units on one leaf and {units} on {path}; an axis "
                "on which a unit has several entries is named by Blocks, one that joins units and other "
                "entries must be a parameter for each"
            )
        if stacks.setdefault(name, layers) != layers:
            raise ValueError(
                f"unit group {name!r} has {stacks[name]} layers with a draw of their own on one leaf and "
                f"{layers} on {path}; Each must name it on all of its leaves, with equally many layers"
            )
    return axes


def as_blocks(along: str | Blocks | Each | None) -> Blocks | None:
    """What runs along an axis, a group's name alone as `Blocks`; of `Each` in one layer."""
    along = along.along if isinstance(along, Each) else along
    return Blocks(along) if isinstance(along, str) else along


def names_of(names: Names) -> list[str]:
    """The groups of a leaf's unit axes."""
    return [blocks.name for blocks in map(as_blocks, names) if blocks is not None]


def layer_axis_of(names: Sequence[str | Blocks | Each | None]) -> int | None:
    """The axis of a leaf's layers that have a draw of their own, if there is one."""
    return next((along.axis for along in names if isinstance(along, Each)), None)


def _unit_axes(flat: Mapping[str, Any], axes: Axes) -> Iterator[tuple[str, Blocks, int, int]]:
    """(path, what runs along the axis, its entries, layers with a draw of their own or 0), axis by axis."""
    for path, names in axes.items():
        shape = flat[path].shape
        for size, along in zip(shape, names, strict=True):
            if (blocks := as_blocks(along)) is not None:
                yield path, blocks, size, shape[along.axis] if isinstance(along, Each) else 0


def _fit_rule(path: str, ndim: int, rule: Sequence[Any]) -> Names:
    names = tuple(rule)
    if names and names[-1] is ...:
        names = names[:-1] + (None,) * (ndim - len(names) + 1)
    if len(names) != ndim:
        raise ValueError(f"unit_axes names {len(names)} axes for {path}, which has {ndim}")
    if len(names_of(names)) > 2:
        raise ValueError(f"unit_axes names three unit axes on {path}; at most two are supported")
    stacks = sorted({along.axis for along in names if isinstance(along, Each)})
    if len(stacks) > 1:
        raise ValueError(f"unit_axes names the axes {stacks} of {path} as layers; Each must name one")
    if stacks and not 0 <= stacks[0] < ndim:
        raise ValueError(f"unit_axes of {path}: axis={stacks[0]} of Each must lie between 0 and {ndim - 1}")
    if stacks and names[stacks[0]] is not None:
        raise ValueError(
            f"unit_axes deals out axis {stacks[0]} of {path}, along which Each has a draw per layer: a round "
            "would train one in num_workers of its units; deal out the layers or the units in them"
        )
    return names


def make_groups(
    params: PyTree,
    axes: Axes,
    num_workers: int,
    *,
    min_units: int = 0,
    shares: Sequence[float | int] = (),
    independent: bool = False,
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
      independent: of the deal, as of `Rule`.

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
    sizes, layers = {}, {}
    for _, blocks, size, stack in _unit_axes(flat, axes):
        sizes[blocks.name], layers[blocks.name] = blocks.count(size), stack
    stratified = {names_of(names)[0] for names in axes.values() if len(names_of(names)) == 2}
    most = max(sizes, key=lambda name: sizes[name], default="")
    if min_units < 0 or (most and min_units > sizes[most]):
        raise ValueError(
            f"partition.min_units={min_units} must lie between 0 and the {sizes[most]} units of {most}"
        )
    strips, relative = dict.fromkeys(stratified, num_workers), tuple(map(float, shares))
    return {
        name: Group(
            name,
            size,
            num_workers,
            strips=strips.get(name, 1),
            min_units=min(min_units, size),
            shares=relative,
            layers=layers[name],
            independent=independent,
        )
        for name, size in sorted(sizes.items())
    }


def with_everyone(groups: Groups) -> dict[str, Group]:
    """The groups when every worker holds all units: rounds of local SGD, exchanged like any others."""
    return {name: dataclasses.replace(group, min_units=group.size) for name, group in groups.items()}


# --- a round's partition --------------------------------------------------------------------------


class BrokenDeal(ValueError):
    """A deal has broken its contract."""


def draw(seed: int, round_index: int, groups: Groups, deal: Deal) -> dict[str, Assignment]:
    """The partition of a round: a function of its arguments alone, so that resume is exact.

    Args:
      seed: of the run.
      round_index: counted from 0.
      groups: from `make_groups`.
      deal: who gets which units.

    Returns:
      Assignments by group name, indices int32 and gates bool, `Group.shape`.

    Raises:
      BrokenDeal: it breaks its contract (`Deal`); names the deal, round, group and worker.
    """
    rule, drawn = rule_of(deal), {}
    number = 0 if rule.once else round_index
    source = rng(seed, Use.PARTITION, number)
    for name, group in sorted(groups.items()):
        where = f"deal {rule.name!r} in round {round_index + 1}, group {name!r}"
        once = functools.partial(_draw_once, lambda group: rule.deal(source, group, number), group)
        if group.layers:
            each = [once(f"{where}, layer {layer}") for layer in range(group.layers)]
            drawn[name] = Assignment(*(np.stack(arrays, 1) for arrays in zip(*each, strict=True)))
        else:
            drawn[name] = once(where)
    return drawn


def _draw_once(deal: Callable[[Group], Any], group: Group, where: str) -> Assignment:
    """A deal of a group, or of one of its layers, that keeps the contract."""
    if group.min_units == group.size:  # as in a warm-up: there is nothing to choose
        return assign(np.ones((group.num_workers, group.size), bool), group)
    try:
        assignment = deal(group)
    except Exception as error:  # a user's own code
        raise BrokenDeal(f"{where}: {type(error).__name__}: {error}") from error
    if fault := _find_fault(assignment, group):
        raise BrokenDeal(f"{where}: {fault}")
    return Assignment(np.asarray(assignment.indices, np.int32), np.asarray(assignment.gates))


def draw_present(seed: int, round_index: int, workers: int, participation: float) -> Bool[np.ndarray, " S"]:
    """Which workers take part in a round: each with the given probability, independently."""
    return rng(seed, Use.PRESENCE, round_index).random(workers) < participation


def assign(held: Bool[np.ndarray, "S U"], group: Group) -> Assignment:
    """The assignment in which worker w holds the units where `held[w]`."""
    slots = max(group.slots, held.sum(1).max())  # too many are not cut off, but for `draw` to refuse
    indices = np.sort(np.where(held, np.arange(group.size), group.size), axis=1)[:, :slots]
    return Assignment(indices.astype(np.int32), indices < group.size)


@functools.cache
def fingerprint(groups: tuple[Group, ...], rule: str) -> str:
    """Twelve hexadecimal digits that tell draws from one another: equal ones and seeds, equal draws.

    Args:
      groups: of the rounds.
      rule: which deal: its name, or whatever else tells it from others, such as the hash of its file.
    """
    # a group that is dealt once is written as before there were layers, so that its runs go on
    recorded = sorted(repr(group) + f" x {group.layers}" * (group.layers > 0) for group in groups)
    return hashlib.sha256(repr((_DRAWS, rule, recorded)).encode()).hexdigest()[:12]


def _find_fault(assignment: object, group: Group) -> str:
    """How an assignment breaks the contract of a `Deal`, for people; empty where it does not."""
    if not isinstance(assignment, Assignment):
        return f"it returned a {type(assignment).__name__} instead of an Assignment"
    indices, gates = map(np.asarray, assignment)
    shape, size = (group.num_workers, group.slots), group.size
    if indices.shape != shape or gates.shape != shape:
        return f"indices {indices.shape} and gates {gates.shape} must both be [workers, slots], {shape}"
    if not np.issubdtype(indices.dtype, np.integer) or gates.dtype != bool:
        return f"indices are {indices.dtype} and gates {gates.dtype}; they must be integers and bool"
    before = np.pad(indices[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    for rule, wrong in (
        (f"units are 0 to {size - 1}, and {size} stands for an empty slot", (indices < 0) | (indices > size)),
        (f"a gate is False exactly where the unit is {size}, an empty slot", gates != (indices < size)),
        ("units must ascend, empty slots last", indices < before),
        ("no worker may hold a unit twice", (indices == before) & gates),
    ):
        if wrong.any():
            worker, slot = np.argwhere(wrong)[0]
            return f"worker {worker} has unit {indices[worker, slot]} in slot {slot}; {rule}"
    return _find_wrong_count(indices, gates, group)


def _find_wrong_count(indices: Int[np.ndarray, "S n"], gates: Bool[np.ndarray, "S n"], group: Group) -> str:
    """The same of an assignment whose arrays are in order: who holds how many, and together with whom."""
    held, wanted = gates.sum(1), np.array(group.counts)
    if not group.fair and (held != wanted).any():
        worker = int(np.argmax(held != wanted))
        return f"worker {worker} holds {held[worker]} units; by its share it must be {wanted[worker]}"
    if odd := Counter(held.tolist()) - Counter(group.counts):
        worker = int(np.argmax(held == next(iter(odd))))
        shown = " and ".join(f"{n} of {units}" for units, n in sorted(Counter(group.counts).items()))
        return f"worker {worker} holds {held[worker]} units; the workers must be {shown} units each"
    workers, units = np.nonzero(gates)[0], indices[gates]
    of_strips = np.bincount(
        workers * group.strips + units // group.strip_size, minlength=group.num_workers * group.strips
    )
    if of_strips.max() > group.strip_slots:
        worker, strip = divmod(int(np.argmax(of_strips)), group.strips)
        return (
            f"worker {worker} holds {of_strips.max()} units of strip {strip}, {group.strip_size} units from "
            f"{strip * group.strip_size} on, of which the exchange has slots for {group.strip_slots}"
        )
    holders = np.bincount(units, minlength=group.size)
    if group.disjoint and holders.max() > 1:
        unit = int(np.argmax(holders))
        both = workers[units == unit]
        return (
            f"unit {unit} is held by workers {both[0]} and {both[1]}; the workers' units are as many as the "
            f"{group.size} of the group, so none may be held twice"
        )
    return ""
