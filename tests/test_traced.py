"""Costs by tracing: bytes of collectives beside those of the optimised HLO, arguments by their place."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import get_config
from flax import traverse_util
from jax import lax

from ist_jax import partition
from ist_jax.costs import compiled as hlo
from ist_jax.costs import formula, traced
from ist_jax.exchange import store
from ist_jax.exchange.layout import from_params, make_layout, split
from ist_jax.methods import local_sgd
from ist_jax.models.mlp import MLP
from ist_jax.models.resnet import ResNet
from ist_jax.runtime import devices, inputs, scoring, settings, setup

AXIS = store.AXIS


def trace(fn, *args, num_devices=2):
    return traced.collectives(fn, *args, axis_name=AXIS, num_devices=num_devices)


def with_lead(tree, *lead):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), tree)


def own(args, in_axes):
    """What one device is given."""

    def per_device(arg, axis):
        if axis is None:
            return arg
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), arg)

    return [per_device(*pair) for pair in zip(args, in_axes, strict=True)]


def both(fn, args, in_axes, num_devices):
    """Operands of a function's collectives, traced and in its optimised HLO."""
    program = devices.compile_program(fn, args, jax.devices()[:num_devices], in_axes=in_axes)
    found = traced.operands(trace(fn, *own(args, in_axes), num_devices=num_devices))
    return found, hlo.read(program.as_text()).operands


# --- the phases of a round ---------------------------------------------------------------------------


def make_recipe(config):
    opened = inputs.open_inputs(config)
    model = settings.build_model(config, len(opened.dataset.classes))
    params = jax.eval_shape(model.init, jax.random.key(0), opened.task.example)["params"]
    recipe = setup.make_recipe(config, model, opened.task, config.num_devices or config.num_workers)
    return recipe, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params), opened


def exchange(recipe, params):
    """(function, arguments, axes) of the gather and the merge."""
    layout = recipe.layout
    lead = (layout.num_devices, layout.workers_per_device)
    state = jax.vmap(partial(local_sgd.init_state, recipe))(from_params(layout, params))
    draw = partition.sample(partition.round_rng(0, 0), layout.groups)
    trees = (with_lead(formula.subnet_shapes(layout), *lead),) * len(state.trees)
    rest = with_lead(jax.tree.map(lambda x: x[0], state.rest), *lead)
    args = (state, local_sgd.State(trees, rest), draw, np.ones(lead, bool))
    return {
        "gather": (partial(local_sgd.gather, recipe), (state, draw), (0, None)),
        "merge": (partial(local_sgd.merge, recipe), args, (0, 0, None, 0)),
    }


@pytest.mark.parametrize(
    ("name", "num_workers", "overrides"),
    [
        ("resnet", 3, {"model.sections": (1, 7), "partition.min_units": 4, "optimizer_state": "carry"}),
        ("mlp", 1, {"optimizer_state": "carry"}),
        ("mlp", 3, {}),
        ("mlp", 4, {"partition.shares": (3.0, 1.0, 1.0, 1.0), "num_devices": 2}),
        ("mlp", 4, {"method": "local_sgd"}),
    ],
)
def test_traced_bytes_of_an_exchange_are_the_compiled_ones(name, num_workers, overrides):
    recipe, params, _ = make_recipe(get_config(name, num_workers=num_workers, **overrides))
    num_devices = recipe.layout.num_devices
    for phase, (fn, args, in_axes) in exchange(recipe, params).items():
        found, by_hlo = both(fn, args, in_axes, num_devices)
        assert found == by_hlo
        assert (found == {}) == (num_devices == 1 or (phase == "gather" and not recipe.layout.groups))


def test_traced_bytes_of_data_parallel_steps_are_the_compiled_ones():
    config = get_config("mlp", method="data_parallel", num_workers=4, num_devices=2)
    recipe, params, opened = make_recipe(config)
    state = jax.vmap(partial(local_sgd.init_state, recipe))(from_params(recipe.layout, params))
    data = inputs.feed_rounds(config, opened, jax.devices()[:2], 1).spec
    indices = np.zeros((2, 2, config.local_steps, config.batch_size), np.int32)
    rates = np.zeros(config.local_steps, np.float32)
    args = (state, np.ones((2, 2), bool), data, indices, rates, np.int32(0))
    in_axes = (0, 0, 0, 0, None, None)
    fn = partial(local_sgd.data_parallel_steps, recipe)
    found, by_hlo = both(fn, args, in_axes, 2)
    # 3,520 gradients of 4 B in each of 2 steps, and an int32 count
    assert found == by_hlo == {("all-reduce", 2): 2 * (4 * 3520 + 4)}
    assert sum(c.floats for c in trace(fn, *own(args, in_axes))) == 2 * 4 * 3520


class Whole:
    """A model that cannot be streamed."""

    def __init__(self, model):
        self.init, self.apply, self.subnet = model.init, model.apply, model.subnet
        self.unit_axes = model.unit_axes


@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize(
    ("model", "compiled_alike"),
    [
        (MLP((24, 18), 10), False),  # streamed, by products; gathers of norms leave the loop
        (ResNet((1, 4), 4, 10, partitioned=(2,)), False),  # a block at a time
        (Whole(MLP((24, 18), 10)), True),
    ],
)
def test_traced_bytes_of_an_evaluation_are_at_least_the_compiled_ones(model, compiled_alike, num_workers):
    name = "resnet" if isinstance(model, ResNet) else "mlp"
    run = setup.set_up(get_config(name, num_workers=num_workers), model, evaluation_only=True)
    fn = partial(scoring.evaluate_shards, run.layout, model, run.task, run.scale)
    found = trace(fn, *own((run.state.trees[0], run.test_batches.spec), (0, 0)), num_devices=len(run.devices))
    by_kind, by_hlo = traced.operands(found), hlo.read(run.programs.evaluate.as_text()).operands
    assert by_kind.keys() == by_hlo.keys()
    assert all(by_kind[kind] >= by_hlo[kind] > 0 for kind in by_hlo)
    assert (by_kind == by_hlo) or not compiled_alike


def test_bytes_of_an_exchange_by_hand():
    # the three leaves of test_ledger: S = D = 2, groups u (4 units) and v (8), float32
    params = {"shared": np.zeros(5), "rows": np.zeros((4, 3)), "pairs": np.zeros((8, 4))}
    params = {path: x.astype(np.float32) for path, x in params.items()}
    axes = {"shared": (None,), "rows": ("u", None), "pairs": ("v", "u")}
    layout = make_layout(params, axes, partition.make_groups(params, axes, 2), 2, 2)
    shards = {path: x[0] for path, x in from_params(layout, params).items()}
    draw = partition.sample(partition.round_rng(0, 0), layout.groups)
    subnets = with_lead(formula.subnet_shapes(layout), 1)
    # to each device 2 rows' slices of 2 and 2 x 2 pairs: 8 numbers, 64 B to both, half of which leave
    (units,) = trace(partial(store.gather, layout), shards, draw)
    assert (units.kind, units.devices, units.operand, units.sent) == ("all-to-all", 2, 64, 32)
    # back with 3 of the 6 shared numbers (5, padded) and a flag, 12 numbers; then the mean of 3 to the other
    found = trace(partial(store.merge, layout), shards, subnets, draw, np.ones(1, bool))
    assert [(c.kind, c.operand, c.sent) for c in found] == [("all-to-all", 96, 48), ("all-gather", 12, 12)]


def test_large_models_are_traced_in_seconds():
    image = jnp.zeros((1, 64, 64, 3))
    models = [
        (MLP((4096, 4096), 35), jnp.zeros((1, 4096)), 1024),
        (ResNet((3, 4, 23, 3), 64, 1000, block="bottleneck", stem="imagenet"), image, 8),
    ]
    started = time.process_time()
    for model, example, workers in models:
        params = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
        axes = partition.resolve_axes(params, model.unit_axes())
        layout = make_layout(params, axes, partition.make_groups(params, axes, workers), workers, workers)

        def shards(params, layout=layout):
            flat = traverse_util.flatten_dict(params, sep="/")
            return {
                path: split(flat[path], leaf, layout.num_devices)[0] for path, leaf in layout.leaves.items()
            }

        kept = jax.eval_shape(shards, params)
        draw = partition.sample(partition.round_rng(0, 0), layout.groups)
        subnets = with_lead(formula.subnet_shapes(layout), 1)
        gather, merge = partial(store.gather, layout), partial(store.merge, layout)
        assert trace(gather, kept, draw, num_devices=workers)
        assert trace(merge, kept, subnets, draw, np.ones(1, bool), num_devices=workers)
        assert traced.step_flops(lambda p, x, model=model: model.apply({"params": p}, x), params, example)
    assert time.process_time() - started < 10


# --- every form of a trace ---------------------------------------------------------------------------


def test_every_collective_is_counted_as_the_compiler_does():
    everywhere = {
        "sum": lambda x: lax.psum({"x": x, "n": x.astype(jnp.int8)}, AXIS),
        "mean": lambda x: lax.pmean(x, AXIS),
        "most": lambda x: (lax.pmax(x, AXIS), lax.pmin(2 * x, AXIS)),
        "part": lambda x: lax.psum_scatter(x, AXIS, tiled=True),
        "all": lambda x: lax.all_gather(x, AXIS),
        "exchange": lambda x: lax.all_to_all(x.reshape(4, -1), AXIS, 0, 0),
        "ring": lambda x: lax.ppermute(x, AXIS, [(i, (i + 1) % 4) for i in range(4)]),
        "pairs": lambda x: lax.psum(x, AXIS, axis_index_groups=[[0, 1], [2, 3]]),
        "silent": lambda x: x + lax.axis_index(AXIS) + lax.psum(1, AXIS),
    }

    def fn(x):
        results = {}
        for name, collective in everywhere.items():
            with jax.named_scope(name):
                results[name] = collective(x + len(results))
        return results

    x = np.zeros((4, 8), np.float32)
    found, by_hlo = both(fn, (x,), (0,), 4)
    assert found == by_hlo
    by_scope = {}
    for c in trace(fn, x[0], num_devices=4):
        by_scope.setdefault(c.scope, []).append((c.kind, c.devices, c.operand, c.floats, c.sent))
    assert by_scope == {  # of 32 B each: a ring's all-reduce sends 2 x 3/4, an all-gather 3 x
        "sum": [("all-reduce", 4, 8, 0, 12), ("all-reduce", 4, 32, 32, 48)],
        "mean": [("all-reduce", 4, 32, 32, 48)],
        "most": [("all-reduce", 4, 32, 32, 48)] * 2,
        "part": [("reduce-scatter", 4, 32, 32, 24)],
        "all": [("all-gather", 4, 32, 32, 96)],
        "exchange": [("all-to-all", 4, 32, 32, 24)],
        "ring": [("collective-permute", 4, 32, 32, 32)],
        "pairs": [("all-reduce", 2, 32, 32, 32)],
    }
    del everywhere["exchange"], everywhere["ring"], everywhere["pairs"]  # are of four devices
    assert trace(fn, x[0], num_devices=1) == []


def nested(x, branch):
    """A sum of 4 B under each of calls, loops, derivatives and a conditional, in scopes."""

    def send(x):
        with jax.named_scope("inner"):
            return lax.psum(x, AXIS)

    def inner(c, x):
        return c + send(x), lax.cond(branch, lambda: send(send(x)), lambda: x)

    def outer(c, x):
        with jax.named_scope("body"):
            c, ys = jax.checkpoint(lambda c: lax.scan(inner, c, x))(c)
        return c, ys

    with jax.named_scope("loop"):
        total, ys = jax.jit(partial(lax.scan, outer))(jnp.float32(0), x)
    return lax.fori_loop(0, 7, lambda _, c: send(c), total), ys


def test_loops_multiply_and_the_dearest_branch_counts():
    x, branch = np.zeros((2, 5, 3), np.float32), np.zeros(2, bool)
    found = trace(nested, x[0], branch[0])
    # 5 x 3 steps of a sum and of the branch with two of them, and 7 afterwards
    in_loops, after = (sum(c.operand for c in found if ("loop" in c.scope) == yes) for yes in (True, False))
    assert (in_loops, after) == (4 * 5 * 3 * (1 + 2), 4 * 7)
    assert {c.scope for c in found} == {"loop/body/inner", "inner"}
    program = devices.compile_program(nested, (x, branch), jax.devices()[:2], in_axes=(0, 0))
    assert traced.operands(found) == hlo.read(program.as_text()).operands


@pytest.mark.parametrize("place", ["body", "condition", "branch"])
def test_a_collective_in_a_while_loop_is_refused(place):
    def send(x):
        with jax.named_scope("ours"):
            return lax.psum(x, AXIS)

    def loop(x):
        more = (lambda c: send(c) < 9) if place == "condition" else (lambda c: c < 9)
        return lax.while_loop(more, (lambda c: c + 1) if place == "condition" else send, x)

    def fn(x):
        if place == "branch":  # beside a dearer one whose bytes are known
            return lax.cond(x > 0, loop, lambda x: send(send(x)), x)
        return loop(x)

    with pytest.raises(ValueError, match=r"psum \(scope 'ours'\) runs in a while loop"):
        trace(fn, jnp.float32(1))
    assert trace(fn, jnp.float32(1), num_devices=1) == []


def test_a_collective_of_unknown_bytes_is_refused():
    with pytest.raises(ValueError, match="how much pbroadcast sends is not known"):
        trace(lambda x: lax.pbroadcast(x, (AXIS,), 0), jnp.float32(1))


# --- arguments of compiled programs ------------------------------------------------------------------


def spanning(fn, args, chosen, in_axes):
    return devices._SpanningProgram(fn, args, chosen, in_axes, ())


def mapped(fn, args, chosen, in_axes):
    return devices.compile_program(fn, args, chosen, in_axes=in_axes)


@pytest.mark.parametrize("build", [mapped, spanning])
def test_arguments_are_found_by_their_place_in_the_tree(build):
    state = {
        "moments": [np.zeros((2, 3), np.float32), np.zeros((2, 7), np.int8)],
        "count": np.zeros(2, np.int32),
    }
    args = (state, None, np.zeros((5, 2), np.int16), np.zeros((2, 4), bool))
    program = build(
        lambda state, _, both, mine: (state["moments"][1].sum() + both.sum(), mine[0]),
        args,
        jax.devices()[:2],
        (0, 0, None, 0),
    )
    found = hlo.argument_bytes(program)
    assert found == {
        "[0]['count']": None,
        "[0]['moments'][0]": None,
        "[0]['moments'][1]": 7,
        "[2]": 20,  # whole on every device
        "[3]": 4,
    }
    assert sum(size or 0 for size in found.values()) == program.memory_analysis().argument_size_in_bytes


@pytest.mark.parametrize("build", [mapped, spanning])
def test_what_a_device_keeps_of_a_carried_adam_is_exact(build):
    recipe, params, _ = make_recipe(get_config("mlp", num_workers=4, num_devices=2))
    recipe = recipe._replace(tx=optax.scale_by_adam(), carry=True)
    fn, args, in_axes = exchange(recipe, params)["merge"]
    found = hlo.argument_bytes(build(fn, args, jax.devices()[:2], in_axes))

    def held(place):
        return sum(size or 0 for path, size in found.items() if path.startswith(place))

    assert len(args[0].rest) == 1 and found["[0].rest[0]"] is None  # the count, which a merge does not read
    memory = formula.memory(recipe, in_place=False)
    assert (held("[0]"), held("[1].trees")) == (memory.store, memory.subnets)
    assert (held("[1].rest"), held("[3]")) == (4 * 2, 2)  # the workers' counts, and who is healthy
