"""The round and the evaluation: what they are given, how they are compiled, and sparing with memory.

That a round does what it means, for every method, is asserted in test_sweep.py.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from conftest import get_config
from rounds import assert_same_bits, copied, describe, run_all, set_up, trace_round, whole

from ist_jax import deals, partition, train
from ist_jax.costs import formula
from ist_jax.data import batches
from ist_jax.exchange import kinds
from ist_jax.exchange.layout import AXIS, make_layout
from ist_jax.methods import METHODS
from ist_jax.methods.method import AXES, Recipe, Turn
from ist_jax.methods.steps import POLICIES
from ist_jax.runtime import programs, scoring, setup

ROUNDS = 2
# workers with different shares: of 5 blocks 2, 2 and 1; of each layer's 32 neurons 14, 9, 5 and 4
RESNET = {"model.sections": (6,), "partition.sections": (1,), "num_workers": 3}
MLP = {
    "num_workers": 4, "num_devices": 2, "partition.shares": (3.0, 2.0, 1.0, 1.0), "participation": 0.7,
    "optimizer_state": "carry",
}  # fmt: skip


@pytest.fixture(scope="module")
def resnet():
    return set_up("resnet", **RESNET)


@pytest.fixture(scope="module")
def mlp():
    return set_up("mlp", **MLP)


@pytest.fixture(params=["resnet", "mlp"])
def run(request):
    return request.getfixturevalue(request.param)


def round_indices(run, index):
    return batches.train_indices(0, index, run.feed.shards, local_steps=2, batch_size=8)


def test_what_a_round_is_given_is_what_is_drawn(run):
    (stage,), participation = run.stages, run.settings["participation"]
    workers = run.layout.num_workers
    for index in range(ROUNDS):
        turn = run.turn(stage, index)
        draw = partition.draw(0, index, run.layout.groups, deals.random)
        for name, dealt in draw.items():
            assert np.array_equal(turn.draw[name].indices, dealt.indices)
            assert np.array_equal(turn.gates[name].reshape(workers, -1), dealt.gates)
            assert not dealt.gates.all()
        given = reference.of_all_workers(turn)
        assert np.array_equal(given.present, partition.draw_present(0, index, workers, participation))
        assert np.array_equal(given.indices, round_indices(run, index))
        assert np.array_equal(turn.rates, run.schedule.learning_rates[index])
        assert turn.index == index
        for name, examples in run.inputs.train.items():
            assert np.array_equal(given.data[name], examples)


def test_pmap_equals_vmap(mlp):
    (stage,) = mlp.stages

    def one_round(state, turn):
        value = None
        for phase in stage.method.phases.values():
            value = phase(state, value, turn)
        return value

    state, step = mlp.state, jax.jit(jax.vmap(one_round, (0, AXES), axis_name=AXIS))
    state = jax.tree.map(np.asarray, state)
    for index in range(ROUNDS):
        state, _ = step(state, jax.tree.map(np.asarray, mlp.turn(stage, index)))
    other = run_all(mlp, ROUNDS)
    assert reference.max_difference(whole(mlp, state.params), whole(mlp, other.params)) < 2e-5


@pytest.mark.parametrize("method", ["ist", "local_sgd", "data_parallel"])
def test_one_worker_is_ordinary_sgd(method):
    optimizer = {"optimizer.weight_decay": 1e-3, "optimizer_state": "carry"}
    run = set_up("mlp", method=method, num_workers=1, **optimizer)
    (stage,), settings = run.stages, run.settings["optimizer"]
    loss_fn = scoring.make_loss_fn(run.model, run.inputs.task)
    drawn = [
        stage.recipe.batch_fn(run.inputs.train, batch, jax.random.key(0))
        for index in range(ROUNDS)
        for batch in round_indices(run, index)[0]
    ]
    key = jax.random.key(0)
    wanted = reference.train_plainly(
        lambda params, x, y: loss_fn(params, x, y, None, key), whole(run, run.state.params), drawn,
        settings["learning_rate"], settings["momentum"], settings["weight_decay"],
    )  # fmt: skip
    assert reference.max_difference(wanted, whole(run, run_all(run, ROUNDS).params)) < 1e-5


@pytest.mark.parametrize("method", ["ist", "data_parallel", "ensemble"])
def test_moments_that_are_not_finite_are_no_state(method):
    # gradients of 1e30 are finite and their squares are not: Adam would divide by infinity from then on
    params = {"w": jnp.ones(3)}
    layout = make_layout(params, {"w": (None,)}, {}, num_workers=1, num_devices=1)
    recipe = Recipe(
        layout, optax.scale_by_adam(), policy=POLICIES["carry"],
        score_fn=None, score_members=None, init_params=lambda key: params,
        loss_fn=lambda params, inputs, *_: (1e30 * (params["w"] * inputs).sum(), jnp.zeros(())),
        batch_fn=lambda data, batch, key: (data[batch], None),
    )  # fmt: skip
    made = METHODS[method].make(recipe)
    started = jax.vmap(lambda _: made.init(params), axis_name=AXIS)(jnp.zeros(1))
    state, indices = jax.tree.map(lambda x: x[0], started), np.zeros((1, 1, 1), np.int32)
    turn = Turn({}, {}, jnp.ones(1, bool), jnp.ones((1, 3)), jnp.asarray(indices), jnp.ones(1), 0)

    def one_round(_):
        value = None
        for phase in made.phases.values():
            value = phase(state, value, turn)
        return value

    after, told = jax.vmap(one_round, axis_name=AXIS)(jnp.zeros(1))
    assert not told.healthy.any()
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    assert_same_bits([x[0] for x in jax.tree.leaves(after) if x.ndim > 1], arrays)


def test_carried_momentum_travels_with_its_unit(mlp):
    (stage,), state = mlp.stages, run_all(mlp, 1)
    turn, kernel = mlp.turn(stage, 1), "layer1/dense/kernel"
    _, units = stage.programs["gather"](state, None, turn)
    (moments,) = tree_of(units)
    (before,) = tree_of(whole(mlp, state.travels))
    indices, gates = turn.draw["hidden1"]
    subnets = np.asarray(moments[kernel])
    for worker, subnet in enumerate(subnets.reshape(-1, *subnets.shape[2:])):
        held = gates[worker].sum()
        assert np.array_equal(subnet[:, :held], before[kernel][:, indices[worker, :held]])
        assert (subnet[:, held:] == 0).all()
    assert np.abs(before[kernel]).max() > 0


def tree_of(opt_state):
    """The trees shaped like the parameters."""
    is_tree = lambda x: isinstance(x, dict)  # noqa: E731
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_tree) if is_tree(x)]


def test_nothing_is_compiled_once_the_rounds_have_begun(resnet):
    compiled = []
    listener = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    jax.jit(lambda x: x + 1)(0)
    assert compiled
    state = copied(resnet.state, resnet)
    compiled.clear()
    for index in range(3):
        state, _ = train.train_round(resnet, state, index)
        train.score(resnet, state)
    jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []


def test_a_worker_with_fewer_blocks_skips_them(resnet):
    text = resnet.stages[0].programs["local"].as_text()
    assert "conditional(" in text  # the convolutions of an empty slot are in a branch that is not taken


def compile_round(name, **overrides):
    """(programs, layout, bytes of the training data) of a round with a device per worker, by shapes alone."""
    config = get_config(name, **overrides)
    recipe, _, opened = describe(config)
    phases = trace_round(config, recipe, opened)
    chosen = jax.devices()[: config.num_workers]
    size = sum(x.nbytes for x in opened.train.values())
    return programs.compile_phases(phases, chosen), recipe.layout, size


def memory(program):
    m = program.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


@pytest.mark.slow
def test_memory_per_device_is_the_share_of_the_store_and_a_subnet():
    # wide layers, so that parameters outweigh activations
    overrides = {"num_workers": 4, "model.hidden": (1024, 1024)}
    ist, layout, data = compile_round("mlp", **overrides)
    sgd, _, _ = compile_round("mlp", method="local_sgd", **overrides)
    full = 4 * formula.model_parameters(layout)
    subnet = 4 * formula.subnet_parameters(layout) / 4
    store_share = 4 * sum(np.prod(x.shape) for x in kinds.shard_shapes(layout).values())
    assert store_share < 1.02 * full / 4  # 1 / D; all is partitioned, rows of one number are padded to D
    # gather: the share, the subnet, and buffers of its size to send and to receive
    assert memory(ist["gather"]) < store_share + 4 * subnet
    # local steps: parameters, gradients and momentum of a subnet, the shared leaves, data, activations
    assert memory(ist["local"]) < 6 * subnet + data + 1e6 < full
    assert memory(ist["merge"]) < 2 * store_share + 6 * subnet < full
    for phase in ("local", "merge"):
        assert memory(ist[phase]) < memory(sgd[phase]) / 3


@pytest.mark.slow
def test_memory_of_resist_is_below_local_sgd():
    overrides = {"num_workers": 4, "model.sections": (9,), "partition.sections": (1,)}
    ist, _, _ = compile_round("resnet", **overrides)
    sgd, _, _ = compile_round("resnet", method="local_sgd", **overrides)
    for phase in ("local", "merge"):
        assert memory(ist[phase]) < memory(sgd[phase])


def test_streamed_evaluation_equals_the_whole_model(run):
    streamed = train.score(run, run.state)
    params, task, examples = reference.nested(whole(run, run.state.params)), run.inputs.task, run.inputs.test
    score = reference.plainly(partial(scoring.score_batch, run.model, task, run.scale))
    plan = batches.eval_batches(len(examples["label"]), run.settings["eval_batch_size"], 1)
    sums = [
        score({"params": params}, {name: x[indices] for name, x in examples.items()} | {"weight": weights})
        for indices, weights in zip(plan.indices[0], plan.weights[0], strict=True)
    ]
    whole_model = scoring.total_score(task, np.array(sums))
    assert streamed.examples == whole_model.examples == len(examples["label"])
    assert streamed.value == pytest.approx(whole_model.value, abs=1e-9)
    assert streamed.loss == pytest.approx(whole_model.loss, rel=1e-5)


def test_streamed_evaluation_gathers_one_block_at_a_time():
    run = set_up("resnet", evaluation_only=True, num_workers=2, **{"model.sections": (1, 9)})
    kernel = run.layout.leaves["section2/blocks/conv1/kernel"]
    text = run.splits["test"].program.as_text()
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
    sizes = [int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes]
    assert max(sizes) == kernel.row_size < np.prod(kernel.shape)  # a kernel of one block, not of all 8


@pytest.mark.parametrize(("num_workers", "least", "scale"), [(2, 0, 0.5), (2, 2, 1.0), (1, 0, 1.0)])
def test_scale_is_the_share_of_the_workers_that_held_a_unit(num_workers, least, scale):
    config = get_config("resnet", num_workers=num_workers, **{"partition.min_units": least})
    assert setup.unit_scale(config, describe(config)[0].layout) == {"section2": scale}


@pytest.mark.slow
def test_the_scale_at_evaluation_can_be_switched_off():
    losses = {}
    for enabled, scale in ((True, 0.5), (False, 1.0)):
        overrides = {"partition.scale_at_evaluation": enabled, "eval_batch_size": 360}
        run = set_up("resnet", evaluation_only=True, num_workers=2, num_devices=1, **overrides)
        params, task = reference.nested(whole(run, run.state.params)), run.inputs.task

        @reference.plainly
        def loss(params, run=run, scale=scale, task=task):
            inputs, labels = task.show(run.inputs.test)
            logits = run.model.apply({"params": params}, inputs, scale={"section2": scale})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        losses[enabled] = float(loss(params))
        assert train.score(run, run.state).loss == pytest.approx(losses[enabled], rel=1e-5)
    assert losses[False] != pytest.approx(losses[True], rel=1e-3)


def test_initial_values_do_not_depend_on_devices_or_method():
    found = []
    for overrides in ({}, {"num_devices": 2}, {"num_devices": 1}, {"method": "local_sgd"}):
        recipe, *_ = describe(get_config("mlp", num_workers=4, **overrides))
        layout = recipe.layout._replace(num_devices=overrides.get("num_devices", 4))
        chosen = jax.devices()[: layout.num_devices]
        shards = programs.init_shards(layout, recipe.init_params, recipe.seed, chosen)
        found.append(kinds.to_params(layout, shards))
    for other in found[1:]:
        assert_same_bits(other, found[0])
