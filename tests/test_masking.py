"""Masks, gather and merge on whole pytrees: what a partition means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jaxtyping import TypeCheckError
from reference import plainly

from ist_jax import deals, masking, partition
from ist_jax.partition import Assignment, Blocks, Each

RULES = {
    "in/kernel": (None, "h1"),
    "norm/.*": ("h1",),
    "mid/kernel": ("h1", None, "h2"),
    "square": ("h2", "h2"),
    "out/kernel": (Blocks("h2", outer=2, inner=3), None),
    "gates/kernel": (None, Blocks("h1", outer=4)),
    "gates/recurrent": (Blocks("h1", inner=2), Blocks("h1", outer=4)),
}

STACK = {  # of 3 layers
    "in": (None, None, Each("h1")),
    "bias": (None, Each("h1")),
    "mid": (None, Each("h1"), Each(Blocks("h2", outer=2))),
    "late": (Each("h1", axis=2), "wide", None),
    "out": (Each(Blocks("h2", inner=2), axis=1), None),
    "last": ("wide", None),
}


def make_params(h1, h2, seed=0, rules=RULES):
    rng = np.random.default_rng(seed)
    shapes = {
        "in": (3, 5, h1), "bias": (3, h1), "mid": (3, h1, 2 * h2), "late": (h1, h2, 3), "out": (2 * h2, 3),
        "last": (h2, 2), "shared": (3, 2),
    } if rules is STACK else {
        "in/kernel": (3, h1), "norm/scale": (h1,), "mid/kernel": (h1, 2, h2), "square": (h2, h2),
        "out/kernel": (6 * h2, 4), "out/bias": (4,), "temperature": (), "gates/kernel": (3, 4 * h1),
        "gates/recurrent": (2 * h1, 4 * h1),
    }  # fmt: skip
    flat = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def make_case(h1, h2, num_workers, *, seed=0, min_units=0, shares=(), rules=RULES):
    params = make_params(h1, h2, seed, rules)
    axes = partition.resolve_axes(params, rules)
    groups = partition.make_groups(params, axes, num_workers, min_units=min_units, shares=shares)
    return params, axes, groups, partition.draw(seed, 0, groups, deals.random)


def leaves(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def cut_out(params, axes, assignment):
    """(masks, subnet) of every worker, by one program."""

    @plainly
    def of_all(params, assignment):
        given, workers = (params, axes, assignment), range(len(next(iter(assignment.values())).indices))
        return [(masking.masks(*given, worker), masking.gather(*given, worker)) for worker in workers]

    return of_all(params, assignment)


def put_back(params, axes, assignment, subnets, healthy):
    """The merge, by one program."""
    merge = plainly(lambda *args: masking.merge(args[0], axes, *args[1:]))
    return merge(params, assignment, subnets, np.array(healthy))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 6, 8])
@pytest.mark.parametrize("min_units", [0, 4])
def test_masking_gather_then_merge_is_the_identity_bit_for_bit(num_workers, min_units):
    params, axes, _, assignment = make_case(7, 6, num_workers, min_units=min_units)
    subnets = [masking.gather(params, axes, assignment, w) for w in range(num_workers)]
    merged = masking.merge(params, axes, assignment, subnets)
    for path, leaf in leaves(merged).items():
        assert np.array_equal(leaf, leaves(params)[path]), path


def test_masking_masks_say_what_gather_cuts_out():
    params, axes, _, assignment = make_case(7, 6, 3)
    for own in cut_out(params, axes, assignment):
        mask, subnet = map(leaves, own)
        for path, leaf in leaves(params).items():
            assert mask[path].shape == leaf.shape
            held = np.sort(np.asarray(leaf)[np.asarray(mask[path])].ravel())
            cut = np.sort(np.asarray(subnet[path]).ravel())
            assert np.array_equal(held, cut[cut != 0]), path  # empty slots are zero


def test_masking_blocks_are_what_a_reshaped_view_is():
    rng, groups = np.random.default_rng(0), {"u": partition.Group("u", 5, 2)}
    assignment = partition.draw(0, 0, groups, deals.random)  # 3 and 2 units
    view = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    flat, flat_axes = {"x": view.reshape(2, 60)}, {"x": (None, Blocks("u", outer=4, inner=3))}
    axes = {"x": (None, None, "u", None)}
    for worker in range(2):
        subnet = masking.gather(flat, flat_axes, assignment, worker)["x"]
        meant = masking.gather({"x": view}, axes, assignment, worker)["x"]
        assert meant.shape == (2, 4, 3, 3) and np.array_equal(subnet, meant.reshape(2, 36))
        mask = masking.masks(flat, flat_axes, assignment, worker)["x"]
        meant = masking.masks({"x": view}, axes, assignment, worker)["x"]
        assert np.array_equal(mask, meant.reshape(2, 60))


def test_masking_blocks_by_hand():
    # 3 units, twice 2 neighbours each: unit 1 is entries 2, 3 and 8, 9
    params, axes = {"x": np.arange(12, dtype=np.float32)}, {"x": (Blocks("u", outer=2, inner=2),)}
    assignment = {
        "u": Assignment(np.array([[1, 3], [0, 2]], np.int32), np.array([[True, False], [True, True]]))
    }
    subnets = [masking.gather(params, axes, assignment, worker) for worker in range(2)]
    assert subnets[0]["x"].tolist() == [2, 3, 0, 0, 8, 9, 0, 0]  # an empty slot is behind each run
    assert subnets[1]["x"].tolist() == [0, 1, 4, 5, 6, 7, 10, 11]
    merged = masking.merge(params, axes, assignment, [{"x": -subnets[0]["x"]}, subnets[1]])
    assert merged["x"].tolist() == [0, 1, -2, -3, 4, 5, 6, 7, -8, -9, 10, 11]


def test_masking_each_layer_of_a_stack_is_what_it_is_alone():
    params, axes, groups, assignment = make_case(7, 5, 3, min_units=2, shares=(3, 1, 1), rules=STACK)
    assert (groups["h1"].shape, groups["wide"].shape) == ((3, 3, 4), (3, 3))
    assert (groups["h1"].counts, groups["wide"].counts) == ((4, 2, 2), (3, 2, 2))  # uneven, with overlap
    assert len({assignment["h1"].indices[:, layer].tobytes() for layer in range(3)}) == 3
    cut, healthy = cut_out(params, axes, assignment), [True, False, True]
    trained = [jax.tree.map(np.negative, subnet) for _, subnet in cut]
    merged = put_back(params, axes, assignment, trained, healthy)
    stacked = {path: partition.layer_axis_of(names) for path, names in axes.items() if "last" not in path}
    stacked = {path: axis for path, axis in stacked.items() if axis is not None}
    assert stacked.keys() == {"in", "bias", "mid", "late", "out"}
    for layer in range(3):
        own = {
            name: Assignment(*(x[:, layer] if groups[name].layers else x for x in both))
            for name, both in assignment.items()
        }
        of_layer = lambda tree: {p: np.take(np.asarray(tree[p]), layer, axis) for p, axis in stacked.items()}  # noqa: B023, E731
        names = {
            path: tuple(
                x.along if isinstance(x, Each) else x for a, x in enumerate(axes[path]) if a != stacked[path]
            )
            for path in stacked
        }
        one, subnets = of_layer(params), [of_layer(subnet) for subnet in trained]
        for worker, (masks, subnet) in enumerate(cut_out(one, names, own)):
            for path, mask in masks.items():
                assert np.array_equal(of_layer(cut[worker][0])[path], mask), path
            for path, x in subnet.items():
                assert np.array_equal(subnets[worker][path], -x), path
        for path, x in put_back(one, names, own, subnets, healthy).items():
            assert np.array_equal(of_layer(merged)[path], x), path


def test_masking_each_by_hand():
    # 2 layers of 3 units: worker 0 holds unit 1 of the first and units 0 and 2 of the second
    params, axes = {"x": np.arange(1, 7, dtype=np.float32).reshape(2, 3)}, {"x": (None, Each("u"))}
    indices = np.array([[[1, 3], [0, 2]], [[0, 2], [1, 3]]], np.int32)
    assignment = {"u": Assignment(indices, indices < 3)}
    subnets = [masking.gather(params, axes, assignment, worker) for worker in range(2)]
    assert subnets[0]["x"].tolist() == [[2, 0], [4, 6]]  # the empty slot is at the end of its layer
    assert subnets[1]["x"].tolist() == [[1, 3], [5, 0]]
    merged = masking.merge(params, axes, assignment, [{"x": -subnets[0]["x"]}, subnets[1]])
    assert merged["x"].tolist() == [[1, -2, 3], [-4, 5, -6]]


def fused_gates(params, x, keep=1.0):
    """A cell with three fused gates; `keep`: which hidden units there are."""
    first, second, third = jnp.split(x @ params["gates"], 3, axis=-1)
    hidden = keep * jax.nn.sigmoid(first) * jnp.tanh(second) + keep * third
    return jnp.tanh(hidden @ params["recurrent"]) @ params["out"]


def test_masking_blocks_keep_the_gates_of_a_unit_together():
    rng = np.random.default_rng(0)
    shapes = {"gates": (4, 18), "recurrent": (6, 18), "out": (18, 2)}
    params = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    fused = Blocks("hidden", outer=3)
    axes = partition.resolve_axes(
        params, {"gates": (None, fused), "recurrent": ("hidden", fused), "out": (fused, None)}
    )
    groups = partition.make_groups(params, axes, 2)
    assert groups["hidden"].size == 6
    assignment, x = partition.draw(0, 0, groups, deals.random), rng.normal(size=(5, 4)).astype(np.float32)
    for worker in range(2):
        mine = masking.gather(params, axes, assignment, worker)
        assert [x.shape for x in jax.tree.leaves(mine)] == [(4, 9), (9, 2), (3, 9)]
        keep = np.isin(np.arange(6), assignment["hidden"].indices[worker])
        whole = params | {"out": params["out"] * np.tile(keep, 3)[:, None]}
        assert np.allclose(fused_gates(mine, x), fused_gates(whole, x, keep), atol=1e-5)


def test_masking_masks_cover_every_entry_of_rows_once_and_all_of_pairs_never():
    params, axes, _, assignment = make_case(8, 6, 2)
    count = [leaves(mask) for mask, _ in cut_out(params, axes, assignment)]
    total = {path: sum(np.asarray(c[path], int) for c in count) for path in count[0]}
    assert (total["in/kernel"] == 1).all()
    assert (total["out/bias"] == 2).all()  # shared
    assert total["mid/kernel"].mean() == 0.5  # 1 / S^2 per worker, 1 / S of the matrix per round


def test_masking_merge_copies_averages_and_keeps():
    # derived by hand: unit 0 held by both, 1 and 2 by one each, 3 by nobody
    params = {"rows": jnp.array([10.0, 20.0, 30.0, 40.0]), "shared": jnp.array(1.0)}
    axes = {"rows": ("u",), "shared": ()}
    indices = np.array([[0, 1], [0, 2]], np.int32)
    assignment = {"u": Assignment(indices, np.ones((2, 2), bool))}
    subnets = [
        {"rows": jnp.array([11.0, 21.0]), "shared": jnp.array(2.0)},
        {"rows": jnp.array([14.0, 33.0]), "shared": jnp.array(4.0)},
    ]
    merged = masking.merge(params, axes, assignment, subnets)
    assert merged["rows"].tolist() == [12.5, 21.0, 33.0, 40.0]
    assert merged["shared"] == 3.0


def test_masking_merge_leaves_sick_workers_out():
    params, axes, _, assignment = make_case(6, 6, 3)
    cut = cut_out(params, axes, assignment)
    subnets = [jax.tree.map(lambda x: np.asarray(x) + 1, subnet) for _, subnet in cut]
    subnets[1] = jax.tree.map(lambda x: x * np.float32(np.nan), subnets[1])
    merged = leaves(put_back(params, axes, assignment, subnets, [True, False, True]))
    sick = leaves(cut[1][0])
    for path, leaf in leaves(params).items():
        assert np.isfinite(merged[path]).all()
        if len(set(axes[path]) - {None}) == 1 and path != "square":
            held = np.asarray(sick[path])
            assert np.array_equal(np.asarray(merged[path])[held], np.asarray(leaf)[held])
            assert not np.array_equal(merged[path], leaf)
    assert np.allclose(merged["temperature"], params["temperature"] + 1)


def test_masking_merge_of_nobody_changes_nothing():
    params, axes, _, assignment = make_case(6, 6, 2)
    cut = cut_out(params, axes, assignment)
    subnets = [jax.tree.map(lambda x: np.asarray(x) * np.float32(np.nan), subnet) for _, subnet in cut]
    merged = put_back(params, axes, assignment, subnets, [False, False])
    for path, leaf in leaves(merged).items():
        assert np.array_equal(leaf, leaves(params)[path])


@pytest.mark.parametrize("num_workers", [2, 3, 5, 6, 7, 8])
def test_masking_mean_of_equal_values_keeps_their_bits(num_workers):
    value = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
    new = jnp.broadcast_to(value, (num_workers, 1000))
    mean = masking.ordered_mean(value, new, jnp.ones((num_workers, 1), bool))
    assert np.array_equal(mean, value)


def test_masking_mean_is_the_sum_in_worker_order():
    new = np.random.default_rng(0).normal(size=(5, 1000)).astype(np.float32)
    held = np.random.default_rng(1).random((5, 1000)) < 0.7
    total, count = np.zeros(1000, np.float32), held.sum(0)
    for worker in range(5):
        total = np.where(held[worker], total + new[worker], total)
    want = total * (np.float32(1) / np.maximum(count, 1).astype(np.float32))
    old = np.full(1000, 7, np.float32)
    for mean in (masking.ordered_mean, jax.jit(masking.ordered_mean)):
        got = np.asarray(mean(jnp.asarray(old), jnp.asarray(new), jnp.asarray(held)))
        assert np.array_equal(got[count > 1], want[count > 1])
        assert (got[count == 0] == 7).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {}, "no assignment for unit group 'h1'"),
        (
            lambda a: a | {"h1": Assignment(a["h1"].indices[0], a["h1"].gates[0])},
            r"must both be \[workers, slots\]",
        ),
        (lambda a: a | {"h1": Assignment(a["h1"].indices, a["h1"].gates[:, :1])}, "must both be"),
        (
            lambda a: a | {"h2": Assignment(a["h2"].indices[:1], a["h2"].gates[:1])},
            "worker 1 is not one of the 1",
        ),
    ],
)
def test_masking_refuses_assignments_of_the_wrong_shape(change, message):
    params, axes, _, assignment = make_case(6, 6, 2)
    for function in (masking.masks, masking.gather):
        with pytest.raises(ValueError, match=message):
            function(params, axes, change(assignment), 1)


def test_masking_refuses_numbers_of_workers_that_differ():
    params, axes, _, assignment = make_case(6, 6, 2)
    subnets = [masking.gather(params, axes, assignment, w) for w in (0, 1)]
    with pytest.raises(ValueError, match="2 subnets, but 'healthy' is for 1 workers"):
        masking.merge(params, axes, assignment, subnets, [True])
    with pytest.raises(ValueError, match="1 subnets, but 'h1' is for 2 workers"):
        masking.merge(params, axes, assignment, subnets[:1])
    del subnets[1]["out"]
    with pytest.raises(ValueError, match="subnet 1 lacks or adds"):
        masking.merge(params, axes, assignment, subnets)


def test_masking_refuses_subnets_of_the_wrong_shape():
    params, axes, _, assignment = make_case(6, 6, 2)
    subnets = [masking.gather(params, axes, assignment, w) for w in (0, 1)]
    subnets[1]["norm"]["scale"] = jnp.zeros(5)
    with pytest.raises(ValueError, match=r"norm/scale has shape \(5,\), expected \(3,\)"):
        masking.merge(params, axes, assignment, subnets)


@pytest.mark.parametrize(
    "call",
    [
        lambda p, a, d: masking.gather(p | {"count": jnp.arange(3)}, a, d, 0),  # integers
        lambda p, a, d: masking.merge(p, a, d, [p, p], np.ones((2, 1), bool)),
        lambda p, a, d: masking.merge(p, a, d, [p, p], np.ones(2)),
        lambda *_: masking.ordered_mean(jnp.zeros(3), jnp.zeros((2, 4)), jnp.ones((2, 1), bool)),
        lambda *_: masking.ordered_mean(jnp.zeros(3), jnp.zeros((2, 3)), jnp.ones((3, 1), bool)),
        lambda *_: partition.assign(np.ones((2, 4)), partition.Group("unit", 4, 2)),
        lambda *_: partition.Group("unit", 4.0, 2),
        lambda *_: deals.random(0, partition.Group("unit", 4, 2), 0),
    ],
)
def test_masking_and_partition_have_their_shapes_and_dtypes_checked(call):
    params, axes, _, assignment = make_case(6, 6, 2)
    with pytest.raises(TypeCheckError):
        call(params, axes, assignment)
