"""Partitions: every unit has a worker, nobody has one twice, draws are uniform; deals keep their contract."""

import dataclasses
import json
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ist_jax import deals, partition
from ist_jax.partition import Assignment, Group


def make(size, num_workers, *, stratified=False, **options):
    params = {"kernel": np.zeros((size, 3))}
    rules = {"kernel": ("unit", None)}
    if stratified:
        params["square"], rules["square"] = np.zeros((size, size)), ("unit", "unit")
    axes = partition.resolve_axes(params, rules)
    return partition.make_groups(params, axes, num_workers, **options)["unit"]


def draw(group, seed=0, deal=deals.random, round_index=0):
    return partition.draw(seed, round_index, {group.name: group}, deal)[group.name]


@st.composite
def groups(draw):
    size, workers = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    least = draw(st.integers(0, size))
    shares = draw(st.one_of(st.just(()), st.tuples(*[st.floats(0.1, 5)] * workers)))
    return make(size, workers, stratified=draw(st.booleans()), min_units=least, shares=shares)


@pytest.mark.parametrize("deal", deals.DEALS.values(), ids=deals.DEALS)
@given(group=groups(), seed=st.integers(0, 1000), round_index=st.integers(0, 50))
def test_every_draw_is_a_partition(deal, group, seed, round_index):
    group = dataclasses.replace(group, independent=partition.rule_of(deal).independent)
    indices, gates = draw(group, seed, deal, round_index)
    assert indices.shape == gates.shape == (group.num_workers, group.slots)
    assert indices.dtype == np.int32
    held = [set(row[gate].tolist()) for row, gate in zip(indices, gates, strict=True)]
    for row, gate, units in zip(indices, gates, held, strict=True):
        assert len(units) == gate.sum() >= group.min_units  # never twice to one worker
        assert (np.diff(row[gate]) > 0).all()  # the order of depth
        assert (row[~gate] == group.size).all()
        strips = np.bincount(np.array(sorted(units), int) // group.strip_size, minlength=1)
        assert strips.max(initial=0) <= group.strip_slots
    if not group.independent:
        assert set().union(*held) == set(range(group.size))
    counts = list(map(len, held))
    assert (sorted(counts) == sorted(group.counts)) if group.fair else (counts == list(group.counts))
    if group.disjoint:
        assert sum(map(len, held)) == group.size


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 6, 8])
def test_equal_shares_differ_by_at_most_one(num_workers):
    for size in (1, 7, 22, 64):
        for stratified in (False, True):
            counts = make(size, num_workers, stratified=stratified).counts
            assert sum(counts) == size
            assert max(counts) - min(counts) <= 1


def test_minimum_depth_of_the_paper():
    # ResIST, 22 blocks: 11, 6 and 4 per worker at S = 2, 4, 8 (arXiv:2107.00961, Table 1)
    assert make(22, 2, min_units=11).counts == (11,) * 2
    assert make(22, 4, min_units=6).counts == (6,) * 4
    assert make(22, 8, min_units=4).counts == (4,) * 8


def test_overlap_is_spread_evenly():
    indices, gates = draw(make(22, 8, min_units=4))
    holders = np.bincount(indices[gates], minlength=22)
    assert holders.min() == 1
    assert holders.max() == 2  # 32 slots for 22 units


def test_shares_follow_speed():
    assert make(12, 3, shares=(2.0, 1.0, 1.0)).counts == (6, 3, 3)
    _, gates = draw(make(12, 3, shares=(2.0, 1.0, 1.0)))
    assert gates.sum(1).tolist() == [6, 3, 3]


def test_more_workers_than_units():
    _, gates = draw(make(3, 8))
    assert sorted(gates.sum(1)) == [0] * 5 + [1] * 3
    _, gates = draw(make(3, 8, min_units=1))
    assert gates.sum(1).tolist() == [1] * 8


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("shares", [(), (2.0, 5.0, 5.0, 6.0)])
def test_draws_are_uniform(stratified, shares):
    group = make(9, 4, stratified=stratified, shares=shares)
    owner = np.zeros((9, 4))
    rounds = 4000
    for seed in range(rounds):
        indices, gates = draw(group, seed)
        for worker in range(4):
            owner[indices[worker][gates[worker]], worker] += 1
    # each unit is with each worker as often as any other unit is; 5 standard deviations
    wanted = np.array(group.counts) / 9 if shares else 0.25
    assert np.abs(owner / rounds - wanted).max() < 5 * np.sqrt(0.25 / rounds)


def test_pairs_of_units_meet():
    group = make(8, 4)
    together = sum({0, 1} <= set(row) for seed in range(3000) for row in draw(group, seed).indices)
    assert abs(together / 3000 - 1 / 7) < 5 * np.sqrt(1 / 7 * 6 / 7 / 3000)


def test_a_draw_depends_on_seed_and_round_alone():
    group = {"unit": make(20, 4)}
    first = partition.draw(3, 7, group, deals.random)["unit"].indices
    again = partition.draw(3, 7, group, deals.random)["unit"].indices
    other = partition.draw(3, 8, group, deals.random)["unit"].indices
    assert (first == again).all()
    assert (first != other).any()


def test_axes_by_path_rules_and_by_pytree_agree():
    params = {"a": {"kernel": np.zeros((4, 6)), "bias": np.zeros(6)}, "b": {"kernel": np.zeros((6, 2, 2))}}
    by_rules = partition.resolve_axes(params, {"a/kernel": (None, "h"), "a/bias": ("h",), "b/.*": ("h", ...)})
    by_tree = partition.resolve_axes(
        params, {"a": {"kernel": (None, "h"), "bias": ("h",)}, "b": {"kernel": ("h", None, None)}}
    )
    assert by_rules == by_tree


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"nowhere": ("h",)}, "matches no parameter"),
        ({"kernel": ("h",)}, "names 1 axes for kernel, which has 2"),
        ({"cube": ("a", "b", "c")}, "three unit axes"),
        ({"kernel": ("h", None), "cube": (None, "h", None)}, "4 units on one leaf and 5 on cube"),
    ],
)
def test_wrong_axes_are_refused(rules, message):
    params = {"kernel": np.zeros((4, 6)), "cube": np.zeros((3, 5, 6))}
    if "nowhere" not in rules and "cube" not in rules:
        params.pop("cube")
    with pytest.raises(ValueError, match=message):
        axes = partition.resolve_axes(params, dict(rules))
        partition.make_groups(params, axes, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "num_workers=0"),
        ({"num_workers": 2, "min_units": 11}, "partition.min_units=11"),
        ({"num_workers": 2, "shares": (1.0,)}, "partition.shares"),
        ({"num_workers": 2, "shares": (1.0, -1.0)}, "partition.shares"),
    ],
)
def test_impossible_groups_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(10, **options)


def test_a_minimum_beyond_a_smaller_group_is_all_of_it():
    params = {"wide": np.zeros((8, 2)), "narrow": np.zeros((3, 2))}
    axes = {"wide": ("a", None), "narrow": ("b", None)}
    groups = partition.make_groups(params, axes, 4, min_units=5)
    assert groups["a"].counts == (5,) * 4
    assert groups["b"].counts == (3,) * 4
    with pytest.raises(ValueError, match="min_units=9 must lie between 0 and the 8 units of a"):
        partition.make_groups(params, axes, 4, min_units=9)


def test_a_window_rolls_on_by_a_unit_per_round():
    # by hand: 7 units, 3 workers with 3, 2 and 2 of them; a round later everything is one further
    windows = [draw(make(7, 3), deal=deals.rolling, round_index=r).indices.tolist() for r in (0, 1, 7)]
    assert windows[0] == [[0, 1, 2], [3, 4, 7], [5, 6, 7]]
    assert windows[1] == [[1, 2, 3], [4, 5, 7], [0, 6, 7]]
    assert windows[2] == windows[0]


def test_what_is_never_dealt_again_is_the_first_round_of_the_papers_deal():
    first, other = (draw(make(20, 4), seed=3, round_index=r).indices for r in (0, 7))
    fixed = [draw(make(20, 4), 3, deals.fixed, r).indices for r in (0, 7)]
    assert (fixed[0] == first).all() and (fixed[1] == first).all()
    assert (first != other).any()


@pytest.mark.parametrize("stratified", [False, True])
def test_workers_that_draw_by_themselves_leave_units_to_nobody(stratified):
    group = make(16, 4, stratified=stratified, independent=True)  # 4 units each
    assert not group.disjoint
    holders = np.zeros((1000, 16), int)
    for seed in range(1000):
        indices, gates = draw(group, seed, deals.independent)
        np.add.at(holders[seed], indices[gates], 1)
    # each unit with each worker by a chance of 1/4: nobody's by (3/4)^4; 5 standard deviations
    covered = 1 - 0.75**4
    assert group.coverage == pytest.approx(covered)
    assert np.abs((holders > 0).mean(0) - covered).max() < 5 * np.sqrt(covered * (1 - covered) / 1000)
    assert holders.max() == 4
    assert np.abs(holders.mean(0) - 1).max() < 5 * np.sqrt(4 * 0.25 * 0.75 / 1000)


def test_a_deal_that_draws_for_each_worker_says_so():
    group = make(16, 4)
    with pytest.raises(partition.BrokenDeal, match=r"deal 'independent' in round 1, .* is held by workers"):
        draw(group, 0, partition.Rule("independent", deals.independent.deal))
    assert partition.rule_of(deals.independent).independent
    assert partition.rule_of(deals.random) == partition.Rule("random", deals.random)


def broken(change):
    """The random deal of 9 units among 4 workers, 3 slots each, after a change of its arrays in place."""

    def crooked(rng, group, round_index):
        indices, gates = deals.random(rng, group, round_index)
        change(indices, gates)
        return Assignment(indices, gates)

    return crooked


def hold(*held, dtype=np.int32):
    """A deal of the same lists of units in every round."""

    def crooked(rng, group, round_index):
        rows = [[*units, *[group.size] * (group.slots - len(units))] for units in held]
        return Assignment(np.array(rows, dtype), np.array(rows) < group.size)

    return crooked


def put(array, place, value):
    array[place] = value


@pytest.mark.parametrize(
    ("group", "deal", "fault"),
    [
        (make(4, 2), lambda *_: {"a": 1}, "it returned a dict instead of an Assignment"),
        (make(4, 2), hold([0, 1]), "indices (1, 2) and gates (1, 2) must both be [workers, slots], (2, 2)"),
        (make(4, 2), hold([0, 1], [2, 3], dtype=np.float32), "indices are float32 and gates bool"),
        (make(4, 2), hold([0, 1], [2, -3]), "worker 1 has unit -3 in slot 1; units are 0 to 3, and 4"),
        (make(4, 2), hold([0, 1], [2, 5]), "worker 1 has unit 5 in slot 1; units are 0 to 3, and 4"),
        (make(4, 2), hold([0, 1], [3, 2]), "worker 1 has unit 2 in slot 1; units must ascend, empty slots"),
        (make(4, 2), hold([1, 1], [2, 3]), "worker 0 has unit 1 in slot 1; no worker may hold a unit twice"),
        (make(5, 2), hold([0, 1, 2], [5, 3, 4]), "worker 1 has unit 3 in slot 1; units must ascend, empty"),
        (
            make(4, 2),
            broken(lambda indices, gates: put(gates, (1, 0), False)),
            "in slot 0; a gate is False exactly where the unit is 4, an empty slot",
        ),
        (make(4, 2), hold([0, 1], [2]), "worker 1 holds 1 units; the workers must be 2 of 2 units each"),
        (make(5, 2), hold([0, 1], [2]), "worker 1 holds 1 units; the workers must be 1 of 2 and 1 of 3"),
        (make(5, 2), hold([0, 1, 2], [1, 3, 4]), "the workers must be 1 of 2 and 1 of 3 units each"),
        (
            make(3, 2, shares=(1.0, 2.0)),
            hold([0, 1], [2]),
            "worker 0 holds 2 units; by its share it must be 1",
        ),
        (make(4, 2), hold([0, 1], [1, 2]), "unit 1 is held by workers 0 and 1; the workers' units are as"),
        (
            make(8, 2, stratified=True),
            hold([0, 1, 2, 3], [4, 5, 6, 7]),
            "worker 0 holds 4 units of strip 0, 4 units from 0 on, of which the exchange has slots for 2",
        ),
    ],
)  # fmt: skip
def test_a_deal_that_breaks_its_contract_is_refused_by_name(group, deal, fault):
    deal.__name__ = "crooked"
    wanted = f"deal 'crooked' in round 4, group 'unit': .*{re.escape(fault)}"
    with pytest.raises(ValueError, match=wanted) as refused:
        draw(group, deal=deal, round_index=3)
    assert "\n" not in str(refused.value)


def test_a_unit_may_be_several_workers_where_the_group_says_so_and_nobodys():
    indices, gates = draw(make(4, 2, min_units=3), deal=hold([0, 1, 2], [0, 1, 2], dtype=np.int64))
    assert indices.tolist() == [[0, 1, 2]] * 2
    assert indices.dtype == np.int32  # what the programs are compiled for
    assert gates.all()


def test_the_check_of_a_wide_layer_takes_less_than_2_ms():
    group = Group("hidden", 8192, 8, strips=8)
    assignment = draw(group)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        assert not partition._find_fault(assignment, group)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2e-3


@given(groups(), st.integers(0, 9))
def test_a_group_that_was_recorded_draws_the_same(group, seed):
    again = Group.from_dict(json.loads(json.dumps(group.to_dict())))
    assert again == group
    assert partition.fingerprint((again,), "random") == partition.fingerprint((group,), "random")
    for old, new in zip(draw(group, seed), draw(again, seed), strict=True):
        assert np.array_equal(old, new)


def test_a_fingerprint_tells_rules_and_groups_apart():
    group = make(10, 2)
    others = [
        make(10, 3),
        make(10, 2, min_units=6),
        make(10, 2, shares=(1.0, 1.0)),
        make(10, 2, stratified=True),
        Group("unit", 10, 2, layers=2),
    ]
    prints = {partition.fingerprint((g,), rule) for g in (group, *others) for rule in ("random", "rolling")}
    assert len(prints) == 12
    assert partition.fingerprint((group, others[0]), "") == partition.fingerprint((others[0], group), "")


def test_the_fingerprint_of_runs_from_before_there_were_layers():
    assert partition.fingerprint((Group("hidden", 8, 2, min_units=5),), "random") == "cf9851012a2b"
    assert partition.fingerprint((Group("hidden", 8, 2, min_units=5, layers=1),), "random") != "cf9851012a2b"


@pytest.mark.parametrize("stratified", [False, True])
def test_every_layer_has_a_draw_of_its_own(stratified):
    options = {"size": 7, "num_workers": 3, "strips": 3 if stratified else 1, "min_units": 2}
    both, alone = Group("unit", **options, layers=4), Group("unit", **options)
    indices, gates = draw(both)
    assert indices.shape == gates.shape == both.shape == (3, 4, 3)
    assert (both.total, alone.total, alone.shape) == (28, 7, (3, 3))
    for layer in range(4):
        assert not partition._find_fault(Assignment(indices[:, layer], gates[:, layer]), alone)
    assert len({indices[:, layer].tobytes() for layer in range(4)}) > 1
    assert (draw(alone).indices == indices[:, 0]).all()  # layers follow each other in the round's stream
    counts = gates.sum(2)  # who gets the remainder is drawn for each layer
    assert len({tuple(own) for own in counts.T}) > 1
    everyone = draw(partition.with_everyone({"unit": both})["unit"]).indices
    assert (everyone == np.arange(7)).all() and everyone.shape == (3, 4, 7)


def test_a_deal_that_breaks_its_contract_in_a_layer_is_refused_by_name():
    seen = []

    def crooked(rng, group, round_index):
        seen.append(group.layers)
        return hold([0, 1], [2, 3] if len(seen) < 3 else [1, 2])(rng, group, round_index)

    with pytest.raises(ValueError, match="'crooked' in round 1, group 'unit', layer 2: unit 1 is held by"):
        draw(Group("unit", 4, 2, layers=5), deal=crooked)
    assert seen == [5, 5, 5]


EACH = partition.Each("u")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"x": (None, EACH, None), "y": ("u", None)},
            "3 layers with .* and 0 on y; Each must name it on",
        ),
        ({"x": (None, EACH, None), "y": (None, EACH)}, "3 layers .* on one leaf and 4 on y; .* equally many"),
        (
            {"x": ("block", EACH, None)},
            "out axis 0 of x, along which Each .*: a round would train",
        ),
        ({"x": (EACH, None, None)}, "deals out axis 0 of x, along which Each"),
        ({"x": (None, partition.Each("u", 3), None)}, r"axis=3 of Each must lie between 0 and 2$"),
        (
            {"x": (None, EACH, partition.Each("v", 1))},
            r"the axes \[0, 1\] of x as layers; Each must name",
        ),
    ],
)
def test_layers_that_fit_no_leaf_or_each_other_are_refused(rules, message):
    params = {"x": np.zeros((3, 4, 2)), "y": np.zeros((4, 4))}
    with pytest.raises(ValueError, match=message):
        partition.resolve_axes(params, rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"x": (partition.Blocks("u", outer=4), None)},
            r"x has an axis of 6 entries, no whole number of Blocks\(name='u', outer=4, inner=1\)$",
        ),
        (
            {"x": ("u", None), "joined": ("u", None)},
            r"'u' has 6 units on one leaf and 10 on joined; .* must be a parameter for each$",
        ),
    ],
)
def test_axes_that_are_no_blocks_of_units_are_refused(rules, message):
    params = {"x": np.zeros((6, 2)), "joined": np.zeros((10, 2))}  # [x; h]: 4 inputs and 6 units
    with pytest.raises(ValueError, match=message):
        partition.resolve_axes(params, rules)


def test_blocks_of_nothing_are_refused():
    with pytest.raises(ValueError, match="outer and inner must be at least 1"):
        partition.Blocks("u", outer=0)
