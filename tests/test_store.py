"""The sharded store and its exchange: equal to masking, the same on any number of devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import nested, plainly
from test_masking import RULES, STACK, leaves, make_case, make_params

from ist_jax import deals, masking, partition
from ist_jax.costs import compiled, formula
from ist_jax.costs.traced import collectives_of, operands, sent
from ist_jax.exchange import store, wire
from ist_jax.exchange.codec import NONE, Codec
from ist_jax.exchange.kinds import from_params, kind_of, shard_shapes, subnet_shapes, to_params
from ist_jax.exchange.layout import AXIS, from_stored, make_layout
from ist_jax.exchange.streaming import Streamed
from ist_jax.runtime import devices
from ist_jax.workdir import checkpoint

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


def check_equal_to_masking(case, mapped, rules=RULES):
    workers, num_devices, h1, h2, least, shares, seed = case
    params, axes, groups, assignment = make_case(
        h1, h2, workers, seed=seed, min_units=least, shares=shares, rules=rules
    )
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
        pytest.param((6, 2, 16, 9, 0, (1.0, 2.0, 3.0, 1.0, 2.0, 3.0), 2), marks=pytest.mark.slow),
        # more workers than units, everybody holds the only one
        pytest.param((8, 2, 5, 1, 1, (), 3), marks=pytest.mark.slow),
    ],
)
def test_exchange_equals_masking(case):
    check_equal_to_masking(case, vmapped)


@pytest.mark.parametrize(
    "case",
    [
        (2, 1, 5, 4, 2, (), 1),
        pytest.param((3, 3, 7, 5, 0, (), 2), marks=pytest.mark.slow),  # uneven counts
        (4, 2, 9, 8, 3, (1.0, 2.0, 1.0, 2.0), 3),  # overlap
    ],
)
def test_exchange_of_a_stack_equals_masking(case):
    check_equal_to_masking(case, vmapped, STACK)


@pytest.mark.slow
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_exchange_of_random_cases_equals_masking(case):
    check_equal_to_masking(case, vmapped)


@pytest.mark.parametrize(
    "case",
    [
        (4, 4, 16, 6, 0, (), 1),  # 4 squared divides 16: dense strips
        pytest.param((8, 4, 23, 9, 0, (), 2), marks=pytest.mark.slow),  # uneven, two workers per device
        (6, 3, 5, 9, 3, (), 3),  # more workers than units, overlap
        pytest.param((3, 3, 16, 4, 0, (3.0, 2.0, 1.0), 4), marks=pytest.mark.slow),
    ],
)
def test_exchange_on_devices_equals_masking(case):
    check_equal_to_masking(case, pmapped)


@pytest.mark.parametrize(
    ("least", "counts"), [(0, (1, 2, 6)), pytest.param(9, (1, 2, 3, 6), marks=pytest.mark.slow)]
)
def test_exchange_is_bit_identical_on_any_number_of_devices(least, counts):
    results = []
    for num_devices in counts:
        params, axes, groups, assignment = make_case(36, 9, 6, min_units=least)
        layout = make_layout(params, axes, groups, 6, num_devices)
        update = random_update(layout, np.random.default_rng(5))
        shards, healthy = from_params(layout, params), np.ones(6, bool)
        results.append(exchange(layout, shards, assignment, update, healthy, pmapped)[1])
    for other in results[1:]:
        for path, leaf in leaves(results[0]).items():
            assert np.array_equal(leaves(other)[path], leaf), path


@pytest.mark.parametrize("path", ["in/kernel", "gates/kernel", "gates/recurrent", "out/kernel", "square"])
def test_products_by_a_kernel_that_is_sharded(path):
    params, axes, groups, _ = make_case(6, 4, 2)
    layout = make_layout(params, axes, groups, 2, 2)
    kernel = leaves(params)[path]
    x = np.random.default_rng(0).normal(size=(2, 3, len(kernel))).astype(np.float32)
    product = jax.vmap(partial(Streamed(layout).product, path), axis_name=AXIS)
    assert np.allclose(product(x, from_params(layout, params)[path]), x @ kernel, atol=1e-5)


@pytest.mark.parametrize("path", ["in", "bias", "mid", "late", "out"])
def test_a_layer_of_a_stack_is_read_alone(path):
    params, axes, groups, _ = make_case(6, 4, 2, rules=STACK)
    layout = make_layout(params, axes, groups, 2, 2)
    layers = np.moveaxis(params[path], layout.leaves[path].layer_axis, 0)
    shards, read = from_params(layout, params)[path], Streamed(layout)

    def scan(shard):
        return jax.lax.scan(lambda _, layer: (None, read(path, layer)), None, shard)[1]

    assert np.array_equal(jax.vmap(scan, axis_name=AXIS)(shards)[0], layers)
    if layers.ndim == 3 and path != "mid":
        x = np.random.default_rng(0).normal(size=(2, 3, layers.shape[1])).astype(np.float32)
        product = jax.vmap(partial(read.product, path), axis_name=AXIS)
        assert np.allclose(product(x, shards[:, 1]), x @ layers[1], atol=1e-5)


def test_what_the_devices_store_of_a_stack_is_the_whole_of_it():
    params, axes, groups, _ = make_case(7, 5, 4, rules=STACK)
    layout = make_layout(params, axes, groups, 4, 2)
    shards = from_params(layout, jax.tree.map(np.asarray, params))
    for path, leaf in layout.leaves.items():
        if leaf.unit_axes:
            stored, kind = np.full(leaf.stored_shape, np.nan, np.float32), kind_of(leaf)
            for device in range(2):
                axis, start, stop = kind.stored_piece(leaf, device, 2)
                part = kind.to_stored(leaf, np.asarray(shards[path][device]), stop - start)
                stored[checkpoint.region(stored.ndim, axis, start, stop)] = part
            assert np.array_equal(from_stored(stored, leaf), params[path]), path


def arguments(layout):
    """Of a gather and of a merge, on all devices: {name: (arguments, their axes)}."""
    grid = (layout.num_devices, layout.workers_per_device)
    shards = {
        path: np.zeros((layout.num_devices, *x.shape), x.dtype) for path, x in shard_shapes(layout).items()
    }
    subnets = {path: np.zeros((*grid, *x.shape), x.dtype) for path, x in subnet_shapes(layout).items()}
    draw = partition.draw(0, 0, layout.groups, deals.random)
    merged = (shards, subnets, draw, np.ones(grid, bool))
    return {"gather": ((shards, draw), (0, None)), "merge": (merged, (0, 0, None, 0))}


def trace(layout):
    """Of a gather and of a merge: {name: (operands of its collectives, the parts of what is sent)}."""
    found = {}
    for name, (args, in_axes) in arguments(layout).items():
        own = [
            jax.tree.map(lambda x: x[0], x) if axis == 0 else x for x, axis in zip(args, in_axes, strict=True)
        ]
        make = jax.make_jaxpr(partial(getattr(store, name), layout), axis_env=[(AXIS, layout.num_devices)])
        with wire.noting() as parts:
            jaxpr = make(*own)
        found[name] = operands(collectives_of(jaxpr, layout.num_devices)), parts
    return found


@pytest.mark.parametrize(
    ("workers", "num_devices", "least", "shares"),
    [(2, 2, 0, ()), (4, 4, 0, ()), (8, 4, 0, ()), (8, 8, 3, ()), (3, 3, 0, (2.0, 1.0, 1.0)), (4, 1, 0, ())],
)
def test_compiled_collectives_move_what_is_traced(workers, num_devices, least, shares):
    params, axes, groups, _ = make_case(64, 64, workers, min_units=least, shares=shares)
    layout = make_layout(params, axes, groups, workers, num_devices)
    traced, chosen = trace(layout), jax.devices()[:num_devices]
    for name, (args, in_axes) in arguments(layout).items():
        program = devices.compile_program(
            partial(getattr(store, name), layout), args, chosen, in_axes=in_axes
        )
        found, parts = traced[name]
        assert compiled.read(program.as_text()).operands == found, name
        assert sum(found.values()) == (sum(part.operand for part in parts) if num_devices > 1 else 0)
    if num_devices > 1 and not least and not shares:
        # 4 x the subnets' own entries: nothing but the subnets is moved, with the padding of rows
        leaves, slots = layout.leaves.values(), subnet_shapes(layout)
        units = sum(np.prod(slots[path].shape) for path in layout.leaves if any(axes[path]))
        rows = [leaf for leaf in leaves if len(leaf.unit_axes) == 1]
        padding = sum(-leaf.row_size % num_devices * leaf.groups[0].slots for leaf in rows)
        assert traced["gather"][0] == {
            ("all-to-all", num_devices): 4 * (units + padding) * workers // num_devices
        }


@pytest.mark.parametrize(("codec", "size"), [(NONE, 4), (BFLOAT16, 2)])
def test_bytes_of_an_exchange_by_hand(codec, size):
    # one row leaf [4 units, 6] and a shared [4] at S = D = 2: a worker pulls 2 units x 3 numbers from each
    # device: operand 2 x 2 x 3 numbers (48 bytes of float32), half of it leaves. The merge returns them, with
    # a slice of 2 shared numbers to each device, 2 x (6 + 2), and a flag of 4 bytes (72); 2 are gathered.
    params = {"rows": np.zeros((4, 6), np.float32), "shared": np.zeros(4, np.float32)}
    axes = {"rows": ("u", None), "shared": (None,)}
    layout = make_layout(params, axes, partition.make_groups(params, axes, 2), 2, 2, codec)
    traced = trace(layout)
    gather, merge = 12 * size, 16 * size + 2 * 4
    assert traced["gather"][0] == {("all-to-all", 2): gather}
    assert traced["merge"][0] == {("all-to-all", 2): merge, ("all-gather", 2): 2 * size}
    leaving = sum(sent(kind, x, n) for found, _ in traced.values() for (kind, n), x in found.items())
    assert leaving == gather / 2 + merge / 2 + 2 * size
    paper = sum(part.paper for _, parts in traced.values() for part in parts)
    assert paper == 2 * size * (2 * 2 * 6 + 2 * 4)
    assert formula.local_sgd_bytes(layout) == 2 * 4 * 28


def test_a_deal_that_ignores_the_strips_would_gather_zeros_and_is_refused():
    # 16 units, 4 workers: of a strip one unit each fits the exchange; a worker with all 4 gets one of them
    def whole_strips(rng, group, round_index):
        return partition.assign(np.eye(4, dtype=bool).repeat(4, axis=1), group)

    params = {"square": 1 + np.arange(256, dtype=np.float32).reshape(16, 16)}
    axes = {"square": ("unit", "unit")}
    groups = partition.make_groups(params, axes, 4)
    layout = make_layout(params, axes, groups, 4, 4)
    unchecked = {"unit": whole_strips(None, groups["unit"], 0)}
    gather = jax.vmap(partial(store.gather, layout), (0, None), axis_name=AXIS)
    got = np.asarray(gather(from_params(layout, params), unchecked)["square"])[:, 0]
    for worker in range(4):
        meant = masking.gather(params, axes, unchecked, worker)["square"]
        assert (meant != 0).all()
        assert (got[worker] == 0).mean() == 0.75
    with pytest.raises(ValueError, match=r"deal 'whole_strips' .*'unit': worker 0 holds 4 .* slots for 1$"):
        partition.draw(0, 0, groups, whole_strips)


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
