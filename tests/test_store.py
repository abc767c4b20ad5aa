"""The sharded store and its exchange: equal to masking, the same on any number of devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import nested, plainly
from test_masking import leaves, make_case

from ist_jax import masking, partition
from ist_jax.exchange import store
from ist_jax.exchange.codec import Codec
from ist_jax.exchange.kinds import from_params, subnet_shapes, to_params
from ist_jax.exchange.layout import AXIS, make_layout

BFLOAT16 = Codec(encode=lambda x: x.astype(jnp.bfloat16), decode=lambda x: x.astype(jnp.float32))


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
        shared = store.shared_leaves(layout, shards)
        subnets |= {p: jnp.broadcast_to(x, (workers, *x.shape)) for p, x in shared.items()}
        changed = {path: x + change[path] for path, x in subnets.items()}
        return subnets, store.merge(layout, shards, changed, assignment, healthy)

    grid = (layout.num_devices, layout.workers_per_device)
    change = {path: x.reshape(*grid, *x.shape[1:]) for path, x in update.items()}
    subnets, merged = mapped(run)(shards, change, healthy.reshape(grid), assignment)
    flat = {path: np.asarray(x).reshape(-1, *x.shape[2:]) for path, x in subnets.items()}
    return flat, to_params(layout, merged)


def vmapped(run):
    return jax.jit(jax.vmap(run, in_axes=(0, 0, 0, None), axis_name=AXIS))


def pmapped(run):
    return jax.pmap(run, in_axes=(0, 0, 0, None), axis_name=AXIS)


def random_update(layout, rng):
    """What training changes of every worker's subnet, [S, ...]."""
    return {
        path: rng.normal(size=(layout.num_workers, *x.shape)).astype(x.dtype)
        for path, x in subnet_shapes(layout).items()
    }


def check_equal_to_masking(case, mapped):
    workers, num_devices, h1, h2, least, shares, seed = case
    params, axes, groups, assignment = make_case(h1, h2, workers, seed=seed, min_units=least, shares=shares)
    layout = make_layout(params, axes, groups, workers, num_devices)
    shards = from_params(layout, params)
    for path, leaf in leaves(to_params(layout, shards)).items():
        assert np.array_equal(leaf, leaves(params)[path])

    rng = np.random.default_rng(seed)
    healthy = rng.random(workers) < 0.8
    update = {
        path: np.where(healthy.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan)
        for path, x in random_update(layout, rng).items()
    }

    @plainly
    def meant(params, assignment, update, healthy):
        subnets = [masking.gather(params, axes, assignment, w) for w in range(workers)]
        trained = [nested({p: x + update[p][w] for p, x in leaves(s).items()}) for w, s in enumerate(subnets)]
        return subnets, masking.merge(params, axes, assignment, trained, healthy)

    got, merged = exchange(layout, shards, assignment, update, healthy, mapped)
    subnets, wanted = meant(params, assignment, update, healthy)
    for worker, subnet in enumerate(subnets):
        for path, leaf in leaves(subnet).items():
            assert np.array_equal(got[path][worker], leaf), (path, worker)
    for path, leaf in leaves(wanted).items():
        assert np.array_equal(leaves(merged)[path], leaf), path


# workers, devices, units of two groups, least units, shares, seed
@pytest.mark.parametrize(
    "case",
    [
        (1, 1, 1, 1, 0, (), 0),
        (2, 1, 5, 4, 2, (), 1),
        (6, 2, 16, 9, 0, (1.0, 2.0, 3.0, 1.0, 2.0, 3.0), 2),
        (8, 2, 5, 1, 1, (), 3),  # more workers than units, everybody holds the only one
    ],
)
def test_exchange_equals_masking(case):
    check_equal_to_masking(case, vmapped)


@pytest.mark.slow
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_exchange_of_random_cases_equals_masking(case):
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
        update = random_update(layout, np.random.default_rng(5))
        shards, healthy = from_params(layout, params), np.ones(6, bool)
        results.append(exchange(layout, shards, assignment, update, healthy, pmapped)[1])
    for other in results[1:]:
        for path, leaf in leaves(results[0]).items():
            assert np.array_equal(leaves(other)[path], leaf), path


def arguments(layout):
    """Shapes on one device, of a gather and of a merge."""
    workers = layout.workers_per_device
    shapes = jax.eval_shape(partial(from_params, layout), zeros(layout))
    shards = {path: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for path, x in shapes.items()}
    subnets = {
        path: jax.ShapeDtypeStruct((workers, *x.shape), x.dtype) for path, x in subnet_shapes(layout).items()
    }
    draw = {
        name: partition.Assignment(
            jax.ShapeDtypeStruct((layout.num_workers, group.slots), np.int32),
            jax.ShapeDtypeStruct((layout.num_workers, group.slots), bool),
        )
        for name, group in layout.groups.items()
    }
    healthy = jax.ShapeDtypeStruct((workers,), bool)
    return {"gather": (shards, draw), "merge": (shards, subnets, draw, healthy)}
