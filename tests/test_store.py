"""The sharded store and its exchange: equal to masking, the same on any number of devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import nested
from test_masking import leaves, make_case, make_params

from ist_jax import masking, partition
from ist_jax.costs import compiled as hlo
from ist_jax.costs import formula as ledger
from ist_jax.exchange import store
from ist_jax.exchange.layout import from_params, make_layout, to_params
from ist_jax.runtime import devices


@st.composite
def cases(draw):
    workers = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8]))
    num_devices = draw(st.sampled_from([d for d in range(1, workers + 1) if workers % d == 0]))
    h1, h2 = draw(st.sampled_from([1, 5, 6, 16, 23])), draw(st.sampled_from([1, 4, 9]))
    least = draw(st.sampled_from([0, 0, min(h1, h2) // 2, min(h1, h2)]))
    shares = draw(st.sampled_from([(), tuple(float(1 + w % 3) for w in range(workers))]))
    return workers, num_devices, h1, h2, least, shares, draw(st.integers(0, 99))


def exchange(layout, shards, assignment, update, healthy, mapped):
    """Gathers, changes the subnets and merges; returns (subnets [S, ...], merged params)."""

    def run(shards, change, healthy, assignment):
        subnets = store.gather(layout, shards, assignment)
        workers = layout.workers_per_device
        shared = store.shared(layout, shards)
        subnets |= {p: jnp.broadcast_to(x, (workers, *x.shape)) for p, x in shared.items()}
        changed = {path: x + change[path] for path, x in subnets.items()}
        return subnets, store.merge(layout, shards, changed, assignment, healthy)

    grid = (layout.num_devices, layout.workers_per_device)
    change = {path: x.reshape(*grid, *x.shape[1:]) for path, x in update.items()}
    subnets, merged = mapped(run)(shards, change, healthy.reshape(grid), assignment)
    flat = {path: np.asarray(x).reshape(-1, *x.shape[2:]) for path, x in subnets.items()}
    return flat, to_params(layout, merged)


def vmapped(run):
    return jax.jit(jax.vmap(run, in_axes=(0, 0, 0, None), axis_name=store.AXIS))


def pmapped(run):
    return jax.pmap(run, in_axes=(0, 0, 0, None), axis_name=store.AXIS)


def check_equal_to_masking(case, mapped):
    workers, num_devices, h1, h2, least, shares, seed = case
    params, axes, groups, assignment = make_case(h1, h2, workers, seed=seed, min_units=least, shares=shares)
    layout = make_layout(params, axes, groups, workers, num_devices)
    shards = from_params(layout, params)
    for path, leaf in leaves(to_params(layout, shards)).items():
        assert np.array_equal(leaf, leaves(params)[path])

    rng = np.random.default_rng(seed)
    healthy = rng.random(workers) < 0.8
    gather = jax.jit(lambda p, a: [masking.gather(p, axes, a, w) for w in range(workers)])
    expected = gather(params, assignment)
    update = {
        path: np.stack([rng.normal(size=x.shape) for x in [leaf] * workers]).astype(np.float32)
        for path, leaf in leaves(expected[0]).items()
    }
    update = {
        path: np.where(healthy.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan) for path, x in update.items()
    }
    got, merged = exchange(layout, shards, assignment, update, healthy, mapped)
    for worker in range(workers):
        for path, leaf in leaves(expected[worker]).items():
            assert np.array_equal(got[path][worker], leaf), (path, worker)
    trained = [nested({p: x + update[p][w] for p, x in leaves(expected[w]).items()}) for w in range(workers)]
    merge = jax.jit(lambda p, a, s, h: masking.merge(p, axes, a, s, h))
    wanted = merge(params, assignment, trained, healthy)
    for path, leaf in leaves(wanted).items():
        assert np.array_equal(leaves(merged)[path], leaf), path


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_exchange_equals_masking(case):
    check_equal_to_masking(case, vmapped)


@pytest.mark.parametrize(
    "case",
    [
        (4, 4, 16, 6, 0, (), 1),  # 4 squared divides 16: dense strips
        (8, 4, 23, 9, 0, (), 2),  # uneven, two workers per device
        (6, 3, 5, 9, 3, (), 3),  # more workers than units, overlap
        (3, 3, 16, 4, 0, (3.0, 2.0, 1.0), 4),
    ],
)
def test_exchange_on_devices_equals_masking(case):
    check_equal_to_masking(case, pmapped)


@pytest.mark.parametrize("least", [0, 9])
def test_exchange_is_bit_identical_on_any_number_of_devices(least):
    results = []
    for num_devices in (1, 2, 3, 6):
        params, axes, groups, assignment = make_case(36, 9, 6, min_units=least)
        layout = make_layout(params, axes, groups, 6, num_devices)
        rng = np.random.default_rng(5)
        sizes = {n: g.slots for n, g in groups.items()}
        update = {
            path: rng.normal(
                size=(6, *[sizes.get(n, s) for s, n in zip(leaf.shape, axes[path], strict=True)])
            )
            for path, leaf in leaves(params).items()
        }
        update = {path: x.astype(np.float32) for path, x in update.items()}
        shards, healthy = from_params(layout, params), np.ones(6, bool)
        results.append(exchange(layout, shards, assignment, update, healthy, pmapped)[1])
    for other in results[1:]:
        for path, leaf in leaves(results[0]).items():
            assert np.array_equal(leaves(other)[path], leaf), path


@pytest.mark.parametrize(
    ("workers", "num_devices", "least", "shares"),
    [(2, 2, 0, ()), (4, 4, 0, ()), (8, 4, 0, ()), (8, 8, 3, ()), (3, 3, 0, (2.0, 1.0, 1.0)), (4, 1, 0, ())],
)
def test_compiled_collectives_move_what_the_formula_says(workers, num_devices, least, shares):
    params, axes, groups, assignment = make_case(64, 64, workers, min_units=least, shares=shares)
    layout = make_layout(params, axes, groups, workers, num_devices)
    shards = from_params(layout, params)
    chosen = jax.devices()[:num_devices]
    gather = devices.compile_program(
        partial(store.gather, layout), (shards, assignment), chosen, in_axes=[0, None]
    )
    sizes = {n: g.slots for n, g in groups.items()}
    subnets = {
        path: np.zeros(
            (
                num_devices,
                workers // num_devices,
                *[sizes.get(n, s) for s, n in zip(leaf.shape, axes[path], strict=True)],
            ),
            np.float32,
        )
        for path, leaf in leaves(params).items()
    }
    merge = devices.compile_program(
        partial(store.merge, layout),
        (shards, subnets, assignment, np.ones((num_devices, workers // num_devices), bool)),
        chosen,
        in_axes=[0, 0, None, 0],
    )
    expected = ledger.collective_operands(layout)
    wanted = [("gather", {"all-to-all": expected.gather})]
    wanted.append(("merge", {"all-to-all": expected.merge, "all-gather": expected.merge_shared}))
    for (name, operands), program in zip(wanted, (gather, merge), strict=True):
        found = hlo.read(program.as_text()).operands
        assert found == {(k, num_devices): x for k, x in operands.items() if x}, name
    if num_devices > 1 and not least and not shares:
        # 2 x 4 x the subnets' own entries: nothing but the subnets is moved
        units = sum(
            np.prod([sizes.get(n, s) for s, n in zip(leaf.shape, axes[path], strict=True)])
            for path, leaf in leaves(params).items() if any(axes[path])
        )  # fmt: skip
        padding = sum(
            -layout.leaves[path].row_size % num_devices * layout.leaves[path].groups[0].slots
            for path in layout.leaves if layout.leaves[path].kind == "rows"
        )  # fmt: skip
        assert expected.gather == 4 * (units + padding) * (workers // num_devices)


def test_a_deal_that_ignores_the_strips_would_gather_zeros_and_is_refused():
    # 16 units, 4 workers: of a strip one unit each fits the exchange; a worker with all 4 gets one of them
    def whole_strips(rng, group, round_index):
        return partition.assign(np.eye(4, dtype=bool).repeat(4, axis=1), group)

    params = {"square": 1 + np.arange(256, dtype=np.float32).reshape(16, 16)}
    axes = {"square": ("unit", "unit")}
    groups = partition.make_groups(params, axes, 4)
    layout = make_layout(params, axes, groups, 4, 4)
    unchecked = {"unit": whole_strips(None, groups["unit"], 0)}
    gather = jax.vmap(partial(store.gather, layout), (0, None), axis_name=store.AXIS)
    got = np.asarray(gather(from_params(layout, params), unchecked)["square"])[:, 0]
    for worker in range(4):
        meant = masking.gather(params, axes, unchecked, worker)["square"]
        assert (meant != 0).all()
        assert (got[worker] == 0).mean() == 0.75
    with pytest.raises(ValueError, match=r"deal 'whole_strips' .*'unit': worker 0 holds 4 .* slots for 1$"):
        partition.draw(0, 0, groups, whole_strips)


def test_wire_bytes_by_hand():
    # one row leaf [4 units, 6] and a shared [4] at S = D = 2: a worker pulls 2 units x 3 numbers from each
    # device: operand 2 x 2 x 3 x 4 B = 48, half of it leaves. The merge returns them, with a slice of 2
    # shared numbers and a flag to each device: 2 x (6 + 2 + 1) x 4 B = 72 + ... and gathers 2 numbers.
    params = {"rows": np.zeros((4, 6), np.float32), "shared": np.zeros(4, np.float32)}
    axes = {"rows": ("u", None), "shared": (None,)}
    groups = partition.make_groups(params, axes, 2)
    layout = make_layout(params, axes, groups, 2, 2)
    assert ledger.collective_operands(layout) == ledger.Operands(48, 72, 8)
    assert ledger.wire_bytes(layout) == 48 / 2 + 72 / 2 + 8
    assert ledger.paper_bytes_per_round(layout) == 2 * 4 * (2 * 2 * 6 + 2 * 4)
    assert ledger.full_model_bytes(layout) == 2 * 4 * 2 * 28


def test_layout_refuses_what_cannot_work():
    params, axes, groups, _ = make_case(6, 6, 4)
    with pytest.raises(ValueError, match=r"num_devices=3 does not divide num_workers=4.*\[1, 2, 4\]"):
        make_layout(params, axes, groups, 4, 3)
    mixed = params | {"temperature": jnp.zeros((), jnp.bfloat16)}
    with pytest.raises(ValueError, match="one floating dtype, these have bfloat16, float32"):
        make_layout(mixed, axes, groups, 4, 2)
    layout = make_layout(params, axes, groups, 4, 2)
    with pytest.raises(ValueError, match="not those of the model"):
        from_params(layout, make_params(7, 6))
