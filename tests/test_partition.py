"""Partitions: every unit has a worker, nobody has one twice, and the draws are uniform."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ist_jax import partition


def make(size, num_workers, *, stratified=False, **options):
    params = {"kernel": np.zeros((size, 3))}
    rules = {"kernel": ("unit", None)}
    if stratified:
        params["square"], rules["square"] = np.zeros((size, size)), ("unit", "unit")
    axes = partition.resolve_axes(params, rules)
    return partition.make_groups(params, axes, num_workers, **options)["unit"]


def draw(group, seed=0):
    return partition.sample(partition.round_rng(seed, 0), {group.name: group})[group.name]


@st.composite
def groups(draw):
    size, workers = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    least = draw(st.integers(0, size))
    shares = draw(st.one_of(st.just(()), st.tuples(*[st.floats(0.1, 5)] * workers)))
    return make(size, workers, stratified=draw(st.booleans()), min_units=least, shares=shares)


@given(groups(), st.integers(0, 1000))
def test_every_draw_is_a_partition(group, seed):
    indices, gates = draw(group, seed)
    assert indices.shape == gates.shape == (group.num_workers, group.slots)
    assert indices.dtype == np.int32
    held = [set(row[gate].tolist()) for row, gate in zip(indices, gates, strict=True)]
    for row, gate, units in zip(indices, gates, held, strict=True):
        assert len(units) == gate.sum() >= group.min_units  # never twice to one worker
        assert (np.diff(row[gate]) > 0).all()  # the order of depth
        assert (row[~gate] == group.size).all()
        strips = np.bincount(np.array(sorted(units), int) // group.strip_size, minlength=1)
        assert strips.max(initial=0) <= group.strip_slots
    assert set().union(*held) == set(range(group.size))
    assert sorted(map(len, held)) == sorted(group.counts)
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
    together = sum({0, 1} <= set(draw(make(8, 4), seed)[0][w]) for seed in range(3000) for w in range(4))
    assert abs(together / 3000 - 1 / 7) < 5 * np.sqrt(1 / 7 * 6 / 7 / 3000)


def test_a_draw_depends_on_seed_and_round_alone():
    group = {"unit": make(20, 4)}
    first = partition.sample(partition.round_rng(3, 7), group)["unit"].indices
    again = partition.sample(partition.round_rng(3, 7), group)["unit"].indices
    other = partition.sample(partition.round_rng(3, 8), group)["unit"].indices
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
