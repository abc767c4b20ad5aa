"""Costs by tracing: bytes of collectives beside those of the optimised HLO, arguments by their place."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import get_config
from jax import lax
from rounds import image_task

from ist_jax.config import build_model
from ist_jax.costs import compiled as hlo
from ist_jax.costs import formula, traced
from ist_jax.exchange.layout import AXIS
from ist_jax.methods import METHODS
from ist_jax.methods.method import AXES
from ist_jax.methods.steps import POLICIES
from ist_jax.runtime import devices, programs, setup, stages


def trace(fn, *args, num_devices=2):
    jaxpr = jax.make_jaxpr(fn, axis_env=[(AXIS, num_devices)])(*args)
    return traced.collectives_of(jaxpr, num_devices)


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


def test_messages_are_those_of_all_runs_of_a_collective():
    def fn(x):
        x = lax.scan(lambda c, _: (lax.psum(c, AXIS), None), x, None, length=5)[0]
        x = lax.all_to_all(x, AXIS, 0, 0) + lax.ppermute(x, AXIS, [(i, (i + 1) % 4) for i in range(4)])
        return lax.all_gather(lax.psum_scatter(x, AXIS, tiled=True), AXIS)

    found = trace(fn, np.zeros((4, 4), np.float32), num_devices=4)
    assert [(c.kind, c.runs, c.messages) for c in found] == [
        ("all-reduce", 5, 5 * 2 * 3),  # a ring: to reduce and to gather
        ("all-to-all", 1, 3),  # one to each of the others
        ("collective-permute", 1, 1),
        ("reduce-scatter", 1, 3),
        ("all-gather", 1, 3),
    ]


@pytest.mark.parametrize(
    ("fn", "messages"),
    [
        (lambda x: [lax.psum(x + i, AXIS) * 2 for i in range(5)], 6),
        (lambda x: lax.psum(2 * lax.psum(x, AXIS), AXIS), 12),
        (lambda x: (lax.psum(x, AXIS), lax.pmax(x, AXIS), lax.psum(x, AXIS)), 18),
        (lambda x: (lax.psum(x, AXIS), jax.jit(lambda x: lax.psum(x, AXIS))(x), lax.psum(x, AXIS)), 18),
    ],
    ids=["independent", "one needs the other", "of two kinds", "in a call"],
)
def test_collectives_that_follow_one_another_and_need_not_are_joined(fn, messages):
    assert sum(c.messages for c in trace(fn, np.zeros(4, np.float32), num_devices=4)) == messages


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
    return devices._SpanningProgram(chosen, *devices._lower_spanning(fn, args, chosen, in_axes, ()))


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
    config = get_config("mlp", num_workers=4)
    task = image_task(8, 8, 1)
    recipe = setup.make_recipe(config, build_model(config, 10), task, 2)
    recipe = recipe._replace(tx=optax.scale_by_adam(), policy=POLICIES["carry"])
    entry, data = METHODS["ist"], {"image": np.zeros((1, 8, 8, 1), np.uint8), "label": np.zeros(1, np.int32)}
    phases = stages.trace_round(entry, recipe, data, 1, 1)
    args = programs.with_axes(phases["merge"].inputs, 2)
    merge = entry.make(recipe).phases["merge"]
    found = hlo.argument_bytes(build(merge, args, jax.devices()[:2], (0, 0, AXES)))

    def held(place):
        return sum(size or 0 for path, size in found.items() if path.startswith(place))

    assert found["[0].travels.count"] is None  # of 4 bytes, which a merge does not read
    memory = formula.memory(recipe, phases)
    assert (held("[0]") + 4, held("[1][0]")) == (memory.store, memory.subnets)
    assert held("[1][0][1].count") == 4 * 2  # of each worker
    assert (held("[1][2]"), held("[2].present")) == (2 * (4 + 4 + 1), 2)  # what 2 workers tell
