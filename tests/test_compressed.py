"""The exchange in few bits: its rounding, its bytes, and the same bits on any number of devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from rounds import assert_same_bits
from test_masking import leaves
from test_store import random_update

from ist_jax import deals, partition
from ist_jax.costs import compiled
from ist_jax.costs.traced import collectives_of, operands
from ist_jax.exchange import compressed, largest, quantize, store, wire
from ist_jax.exchange.codec import Bits
from ist_jax.exchange.kinds import from_params, to_params
from ist_jax.exchange.layout import AXIS, make_layout, with_bits

FEW = [bits for bits in quantize.BITS if bits < 32]


def rows(count=64, size=50):
    """Rows of all magnitudes, one of them zeros and one too small to matter."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, size)) * 10.0 ** rng.uniform(-6, 6, size=(count, 1))
    x[3], x[4] = 0, 1e-35
    return x.astype(np.float32), rng.integers(2**32, size=x.shape, dtype=np.uint32)


@partial(jax.jit, static_argnums=2)
def as_sent(x, random, bits):
    scale = quantize.scale_of(jnp.abs(x).max(1, keepdims=True), bits)
    return quantize.decode(quantize.encode(x, scale, random, bits), scale, bits), scale


@pytest.mark.parametrize("bits", FEW)
def test_rounding_is_that_of_the_reference_and_near(bits):
    x, random = rows()
    got, scale = map(np.asarray, as_sent(x, random, bits))
    assert np.array_equal(got, reference.few_bits(x, random, bits))
    if bits < 16:
        assert np.array_equal(scale, scale.astype(jnp.bfloat16).astype(np.float32))
        most = 2 ** (bits - 1) - 1
        assert (np.abs(x).max(1) <= scale[:, 0] * most * (1 + 1e-6))[5:].all()
        assert (scale[5:, 0] * most <= np.abs(x).max(1)[5:] * (1 + 2**-7)).all()
        assert (np.abs(got - x) < np.maximum(scale, 1e-30)).all() and not got[3:5].any()
    else:
        assert (np.abs(got - x) <= np.abs(x) * 2**-7).all()


@pytest.mark.parametrize("bits", FEW)
def test_rounding_has_the_number_for_its_mean(bits):
    # 20,000 times: the mean's deviation is at most scale / 2 / sqrt(20,000), 0.0036 scale
    x = np.tile(np.float32([[1.0, 0.3, -0.123, 0.0077]]), (20_000, 1))
    key = quantize.key_of(3, 1)
    random = quantize.noise(key, jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape))
    got, scale = map(np.asarray, as_sent(x, random, bits))
    step = scale if bits < 16 else 2.0**-8
    assert np.abs((got - x).mean(0, dtype=np.float64) / step).max() < 0.016


@pytest.mark.parametrize("bits", [1, 4, 5, 6, 8, 11, 16, 17, 31])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_codes_come_out_of_the_bytes_as_they_went_in(bits, count):
    codes = np.random.default_rng(1).integers(2**bits, size=(3, count), dtype=np.uint32)
    packed = quantize.pack(jnp.asarray(codes), bits)
    assert packed.nbytes == 3 * (count * bits // 8 if bits in (8, 16) else bits * -(-count // 8))
    assert np.array_equal(quantize.unpack(packed, count, bits), codes)


def exchange(layout, params, draw, change, healthy):
    """Two rounds: (subnets [S, ...] of the second, merged parameters, residual [S, ...])."""

    def run(shards, residual, change, healthy, draw, index):
        subnets = compressed.gather(layout, shards, draw, index)
        return subnets, *compressed.merge(layout, shards, residual, change, draw, healthy, index)

    grid = (layout.num_devices, layout.workers_per_device)
    change = {path: x.reshape(*grid, *x.shape[1:]) for path, x in change.items()}
    run = jax.pmap(run, in_axes=(0, 0, 0, 0, None, None), axis_name=AXIS)
    shards, residual = from_params(layout, params), compressed.init(layout)
    residual = jax.tree.map(lambda x: np.zeros((layout.num_devices, *x.shape), x.dtype), residual)
    for index in range(2):
        told = shards, residual, change, healthy.reshape(grid), draw, np.int32(index)
        subnets, shards, residual, _ = run(*told)
    flat = partial(jax.tree.map, lambda x: np.asarray(x).reshape(-1, *x.shape[2:]))
    return flat(subnets), leaves(to_params(layout, shards)), flat(residual)


def make_leaves(workers, least=0, *, layers=False):
    """(params, axes, groups, draw) of leaves of each kind and form; `few`, `short` and `low` go as they are.

    `wide`, `deep`, `long` and `stack` have numbers enough to choose from, and no multiple of the workers.
    layers: with leaves that have a draw for each.
    """
    shapes = {"pairs": (12, 9, 2), "first": (12, 17), "last": (5, 4, 12), "bias": (5, 7), "few": (3,)}
    axes = {"pairs": ("u", "v", None), "first": ("u", None), "last": (None, None, "u"), "bias": (None, None)}
    shapes, axes = shapes | {"short": (9, 2)}, axes | {"few": (None,), "short": ("v", None)}
    shapes |= {"wide": (12, 99), "deep": (5, 21, 12), "long": (7, 15)}
    axes |= {"wide": ("u", None), "deep": (None, None, "u"), "long": (None, None)}
    each = partition.Each("w", axis=1)
    if layers:
        shapes |= {"stack": (12, 2, 99), "cross": (9, 2, 12, 3), "low": (12, 2)}
        axes |= {"stack": (each, None, None), "cross": ("v", None, each, None), "low": (each, None)}
    rng = np.random.default_rng(2)
    params = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    groups = partition.make_groups(params, axes, workers, min_units=least)
    return params, axes, groups, partition.draw(0, 0, groups, deals.random)


@pytest.mark.parametrize(
    ("bits", "own", "devices"),
    [
        ((8, 4, 4, 0.2, True), {}, (2, 6)),
        *(
            pytest.param(bits, {"least": least, "layers": True}, (1, 2, 6), marks=pytest.mark.slow)
            for bits, least in (
                ((16, 8), 7),
                ((5, 6, 4), 0),
                ((8, 32, 4, 0.02), 7),
                ((32, 16, 4, 0.5, True), 0),
            )
        ),
    ],
)
def test_no_bit_depends_on_the_number_of_devices(bits, own, devices):
    results = []
    for num_devices in devices:
        params, axes, groups, draw = make_leaves(6, **own)
        layout = with_bits(make_layout(params, axes, groups, 6, num_devices), Bits(*bits))
        change = random_update(layout, np.random.default_rng(5))
        change["pairs"][1] = np.nan  # of one who is not heard
        healthy = np.arange(6) != 1
        results.append(exchange(layout, params, draw, change, healthy))
    copies, changes = results[0][2]  # `few` is too small
    assert copies.keys() == ({"bias", "long"} if bits[0] < 32 else set())
    assert changes.keys() == ({"bias", "long"} if bits[-1] is True else set())
    assert all(x[0].any() and not x[1].any() for x in changes.values())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results[0]))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def by_hand(bits, num_devices, rows=18, shared=17):
    """(operands, parts) of a gather and of a merge of four leaves by two workers."""
    sizes = {"pairs": (8, 4, 5), "rows": (4, rows), "shared": (shared,), "few": (3,)}
    params = {path: np.zeros(shape, np.float32) for path, shape in sizes.items()}
    axes = {"pairs": ("v", "u", None), "rows": ("u", None), "shared": (None,), "few": (None,)}
    groups = partition.make_groups(params, axes, 2)
    layout = with_bits(make_layout(params, axes, groups, 2, num_devices), Bits(*bits))
    shards = {path: x[0] for path, x in from_params(layout, params).items()}
    draw, one = partition.draw(0, 0, groups, lambda *args: _dealt(*args)), jnp.int32(0)
    workers = layout.workers_per_device
    change = {p: jnp.zeros((workers, *x.subnet_shape)) for p, x in layout.leaves.items()}
    healthy, found = jnp.ones(workers, bool), {}

    def merge(shards, change):
        residual = compressed.init(layout)
        return compressed.merge(layout, shards, residual, change, draw, healthy, one)

    gather = partial(compressed.gather, layout, draw=draw, index=one)
    for name, fn, args in (("gather", gather, (shards,)), ("merge", merge, (shards, change))):
        with wire.noting() as parts:
            jaxpr = jax.make_jaxpr(fn, axis_env=[(AXIS, num_devices)])(*args)
        given = jax.tree.map(lambda x: np.broadcast_to(x, (num_devices, *x.shape)), args)
        program = jax.pmap(fn, axis_name=AXIS).lower(*given).compile()
        traced = operands(collectives_of(jaxpr, num_devices))
        assert compiled.read(program.as_text()).operands == traced, name
        found[name] = traced, parts
    return found


def _dealt(rng, group, round_index):
    held = np.zeros((2, group.size), bool)
    held[np.arange(group.size) % 2, np.arange(group.size)] = True
    return partition.assign(held, group)


def test_bytes_of_few_bits_by_hand():
    # S = D = 2, 8 bits out, 4 back. A worker has 2 of 4 units u (18 numbers each, slices of 9) and 4 of 8
    # units v (2 in each of 2 strips): of pairs 4 x 2 x 5 numbers, in rows of 20.
    found = by_hand((8, 4), 2)
    rows, pairs = 2 * 9, 2 * 2 * 5  # numbers from a device to a worker
    operand, parts = found["gather"]
    assert operand == {("all-to-all", 2): 2 * (rows + pairs), ("all-reduce", 2): 4 * (4 + 8)}
    assert {part.cause for part in parts} == {"gather"}
    assert sum(part.paper for part in parts) == 2 * (2 * 18 + 4 * 2 * 5) + 4 * (4 + 8)
    # back: 4 bits, eight codes in 4 bytes; scales of 2 bytes, of 2 and 4 slots and of a shared leaf, to each;
    # slices of 9 of the shared 17, of 2 of the few 3 in float32; a flag of a byte
    back = 4 * 3 + 4 * 3 + 2 * (2 + 4 + 1) + 4 * 2 + 4 * 2 + 1
    operand, parts = found["merge"]
    # the owner's change: 8 bits of 9 numbers and 2 in float32; its largest
    assert operand == {("all-to-all", 2): 2 * back, ("all-gather", 2): 9 + 8, ("all-reduce", 2): 4}
    paper = {"merge_units": 2 * (36 + 40) / 2 + 2 * 2 * (2 + 4)}
    paper["merge_shared"] = 2 * (17 / 2 + 2 + 4 * 3) + 2 * (17 + 4 * 3) + 4 * 2
    for cause, size in paper.items():
        assert sum(part.paper for part in parts if part.cause == cause) == size


@pytest.mark.parametrize("keep", [0.25, 0.04])
def test_bytes_of_the_largest_by_hand(keep):
    # As above, 32 bits out and 6 back; rows of 37 in slices of 19, so that an owner has 38 numbers, and a
    # shared leaf of 63 in slices of 32. A quarter: 5 of 20 numbers of pairs, 10 of 38, 8 of 32; which, a bit
    # for each. A twenty-fifth: 1 of pairs, 2 and 2, at places of 5, 6 and 5 bits.
    counts, places = {0.25: ((5, 10, 8), (3, 5, 4)), 0.04: ((1, 2, 2), (5, 6, 5))}[keep]
    operand, parts = by_hand((32, 6, 0, keep), 2, rows=37, shared=63)["merge"]
    codes = [6 * -(-count // 8) for count in counts]
    back = sum(codes) + sum(places) + 2 * (2 + 4 + 1) + 4 * 2 + 1
    assert operand == {("all-to-all", 2): 2 * back, ("all-gather", 2): 4 * (32 + 2)}
    code = {0.25: (20, 38, 32), 0.04: (5, 12, 10)}[keep]  # bits of the places
    numbers = [4 * 2 * 5 / 20, 2 * 37 / 38, 63 / 32]  # parts of a worker, without padding
    sizes = [n * (6 * count + c) / 8 for n, count, c in zip(numbers, counts, code, strict=True)]
    paper = {"merge_units": 2 * sum(sizes[:2]) + 2 * 2 * (2 + 4)}
    paper["merge_shared"] = 2 * (sizes[2] + 2 + 4 * 3) + 2 * 4 * (63 + 3)
    for cause, size in paper.items():
        assert sum(part.paper for part in parts if part.cause == cause) == pytest.approx(size, rel=1e-12)


@pytest.mark.parametrize("count", [1, 5, 40, 200])
def test_the_largest_numbers_come_out_where_they_were(count):
    x = np.random.default_rng(6).normal(size=(3, 2, 200)).astype(np.float32)
    x[0, 0, 7:90] = 0.0
    places = largest.places_of(jnp.asarray(x), count)
    codes = largest.encode(places, 200)
    number, bits = largest.code_form(200, count)
    assert codes.shape == (3, 2, number) and bits == (1 if count * 8 >= 200 else 8)
    packed = quantize.pack(codes.reshape(3, -1), bits)
    assert packed.nbytes == 3 * 2 * number * bits // 8
    sent = largest.decode(quantize.unpack(packed, 2 * number, bits).reshape(codes.shape), 200, count)
    found = np.asarray(largest.fill(jnp.take_along_axis(jnp.asarray(x), places, -1), sent))
    least = np.sort(np.abs(x), -1)[..., -count:].min(-1, keepdims=True)
    assert np.array_equal(found, np.where(np.abs(x) >= least, x, 0))


def test_on_one_device_nothing_is_sent():
    assert all(traced == {} for traced, _ in by_hand((5, 6, 0, 0.1), 1, 40).values())


def test_plain_numbers_are_sent_where_few_share_a_scale():
    params, axes, groups, draw = make_leaves(6)
    layout = with_bits(make_layout(params, axes, groups, 6, 1), Bits(4, 4))

    @partial(jax.pmap, axis_name=AXIS)
    def both(shards):
        return compressed.gather(layout, shards, draw, jnp.int32(0)), store.gather(layout, shards, draw)

    got, plain = both(from_params(layout, params))
    assert [path for path in plain if np.array_equal(got[path], plain[path])] == ["short"]
    assert compressed.init(layout).copies.keys() == {"bias", "long"}
