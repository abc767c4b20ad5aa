"""The round: equal to a plain-Python loop, on any number of devices, and sparing with memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import get_config
from flax import traverse_util

from ist_jax import deals, partition, train
from ist_jax.costs import formula as ledger
from ist_jax.data import batches
from ist_jax.exchange import store
from ist_jax.exchange.layout import from_params, to_params
from ist_jax.methods import local_sgd
from ist_jax.runtime import devices, settings
from ist_jax.runtime import scoring as evaluation
from ist_jax.runtime import setup as experiment
from ist_jax.runtime.programs import compile_programs

ROUNDS = 2


def params_of(run, state):
    return to_params(run.layout, state.trees[0])


def run_all(config, rounds=ROUNDS, params=None):
    run = experiment.set_up(config, params=params)
    state = run.state
    for index in range(rounds):
        state, means, _ = train.run_round(run, state, index)
        assert means.healthy.all()
    return run, state


def round_indices(run, index):
    config = run.config
    return batches.train_indices(
        config.seed, index, run.feed.shards, local_steps=config.local_steps, batch_size=config.batch_size
    )


def plain_rounds(run, params, rounds=ROUNDS):
    """The same rounds by the loop in reference.py."""
    axes = partition.resolve_axes(params, run.model.unit_axes())
    data = {name: jnp.asarray(x) for name, x in run.train.items()}
    for index in range(rounds):
        params = reference.ist_round(
            run.recipe, params, axes, run.layout.groups, data, round_indices(run, index),
            run.learning_rates[index], run.config.seed, index,
        )  # fmt: skip
    return params


CASES = {
    "resnet": ("resnet", {}),
    "resnet uneven": ("resnet", {"model.sections": (1, 6), "num_workers": 3}),
    "resnet strided": ("resnet", {"model.sections": (1, 2), "partition.deal_strided": True}),
    "resnet overlap": ("resnet", {"partition.min_units": 2, "num_workers": 2}),
    "mlp": ("mlp", {}),
    "mlp uneven": ("mlp", {"num_workers": 3, "partition.shares": (3.0, 2.0, 1.0)}),
    "mlp overlap": ("mlp", {"partition.min_units": 20}),
    "mlp local_sgd": ("mlp", {"method": "local_sgd", "num_workers": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_rounds_equal_the_plain_loop(case):
    name, overrides = CASES[case]
    run, state = run_all(get_config(name, **overrides))
    start = experiment.set_up(run.config)
    wanted = plain_rounds(run, params_of(start, start.state))
    assert reference.max_difference(wanted, params_of(run, state)) < 2e-4
    assert reference.max_difference(params_of(start, start.state), wanted) > 1e-2


def test_rounds_equal_the_plain_loop_in_float64():
    with jax.enable_x64(True):
        config = get_config("mlp", num_workers=4, **{"model.hidden": (32, 16)})
        fresh = experiment.set_up(config)
        params = jax.tree.map(lambda x: x.astype(np.float64), params_of(fresh, fresh.state))
        run, state = run_all_float64(config, params)
        assert reference.max_difference(plain_rounds(run, params), params_of(run, state)) < 1e-10


def run_all_float64(config, params):
    """Runs in float64 by vmap: the engine's dtype is that of the parameters."""
    run = experiment.set_up(config)
    layout = run.layout._replace(dtype=np.dtype(np.float64))
    recipe = run.recipe._replace(layout=layout)
    run = run._replace(recipe=recipe)
    state = local_sgd.State((from_params(layout, params),), ())
    return run, vmapped_rounds(run, state)


def vmapped_rounds(run, state, rounds=ROUNDS):
    """The per-device functions under vmap on one device: the oracle for pmap."""
    recipe, layout = run.recipe, run.layout
    grid = (layout.num_devices, layout.workers_per_device)

    def one_round(state, gates, data, indices, assignment, rates, index):
        units = local_sgd.gather(recipe, state, assignment)
        subnets, means = local_sgd.local_steps(recipe, state, units, gates, data, indices, rates, index)
        return local_sgd.merge(recipe, state, subnets, assignment, means.healthy)

    step = jax.jit(jax.vmap(one_round, (0, 0, 0, 0, None, None, None), axis_name=store.AXIS))
    data = {name: np.broadcast_to(x, (layout.num_devices, *x.shape)) for name, x in run.train.items()}
    for index in range(rounds):
        assignment = partition.draw(run.config.seed, index, layout.groups, deals.random)
        gates = {n: a.gates.reshape(*grid, -1) for n, a in assignment.items() if not layout.groups[n].even}
        indices = round_indices(run, index)
        indices = indices.reshape(*grid, *indices.shape[1:])
        state = step(state, gates, data, indices, assignment, run.learning_rates[index], np.int32(index))
    return state


@pytest.mark.parametrize("case", ["resnet uneven", "mlp"])
def test_pmap_equals_vmap(case):
    name, overrides = CASES[case]
    run, state = run_all(get_config(name, **overrides))
    fresh = experiment.set_up(run.config)
    start = local_sgd.State((from_params(run.layout, params_of(fresh, fresh.state)),), ())
    other = vmapped_rounds(run, start)
    assert reference.max_difference(params_of(run, other), params_of(run, state)) < 2e-5


@pytest.mark.parametrize("name", ["resnet", "mlp"])
@pytest.mark.parametrize("workers_on_device", ["map", "vmap"])
def test_any_number_of_devices_agrees(name, workers_on_device):
    overrides = {"num_workers": 4, "workers_on_device": workers_on_device}
    if name == "resnet":
        overrides["model.sections"] = (1, 6)
    results = [params_of(*run_all(get_config(name, num_devices=d, **overrides))) for d in (1, 2, 4)]
    for other in results[1:]:
        assert reference.max_difference(results[0], other) < 2e-4


@pytest.mark.parametrize("method", ["ist", "local_sgd", "data_parallel"])
def test_one_worker_is_ordinary_sgd(method):
    config = get_config("mlp", method=method, num_workers=1, optimizer_state="carry")
    config.optimizer.weight_decay = 1e-3
    run, state = run_all(config)
    fresh = experiment.set_up(config)
    loss_fn = settings.make_loss_fn(run.model, run.task.score_fn)
    drawn = [
        run.recipe.batch_fn(run.train, batch, jax.random.key(0))
        for index in range(ROUNDS)
        for batch in round_indices(run, index)[0]
    ]
    wanted = reference.train_plainly(
        lambda p, x, y: loss_fn(reference.flat(p), x, y, None),
        params_of(fresh, fresh.state), drawn,
        config.optimizer.learning_rate, config.optimizer.momentum, config.optimizer.weight_decay,
    )  # fmt: skip
    assert reference.max_difference(wanted, params_of(run, state)) < 1e-5


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_data_parallel_is_the_mean_of_the_workers_gradients(num_devices):
    config = get_config("mlp", method="data_parallel", num_workers=4, num_devices=num_devices)
    run, state = run_all(config)
    fresh = experiment.set_up(config)
    params = params_of(fresh, fresh.state)
    data = {name: jnp.asarray(x) for name, x in run.train.items()}
    opt_state = run.recipe.tx.init(reference.flat(params))
    for index in range(ROUNDS):
        params, opt_state = reference.data_parallel_round(
            run.recipe, params, opt_state, data, round_indices(run, index), run.learning_rates[index],
            run.config.seed, index,
        )  # fmt: skip
    assert reference.max_difference(params, params_of(run, state)) < 1e-4


@pytest.mark.parametrize("optimizer_state", ["reset", "carry"])
@pytest.mark.parametrize("name", ["resnet", "mlp"])
def test_learning_rate_zero_leaves_the_store_bit_identical(name, optimizer_state):
    config = get_config(name, optimizer_state=optimizer_state, num_workers=3, **{"partition.min_units": 2})
    config.optimizer.learning_rate = 0.0
    run, state = run_all(config)
    fresh = experiment.set_up(config)
    before, after = params_of(fresh, fresh.state), params_of(run, state)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.array_equal(x.view(np.uint32), y.view(np.uint32))


@pytest.mark.parametrize("overrides", [{}, {"partition.min_units": 20}, {"method": "local_sgd"}])
def test_carried_momentum_equals_the_plain_loop(overrides):
    config = get_config("mlp", optimizer_state="carry", num_workers=3, **overrides)
    run, state = run_all(config)
    fresh = experiment.set_up(config)
    params = params_of(fresh, fresh.state)
    axes = partition.resolve_axes(params, run.model.unit_axes())
    data = {name: jnp.asarray(x) for name, x in run.train.items()}
    trace = jax.tree.map(np.zeros_like, params)
    for index in range(ROUNDS):
        params, trace = reference.ist_round(
            run.recipe, params, axes, run.layout.groups, data, round_indices(run, index),
            run.learning_rates[index], config.seed, index, trace,
        )  # fmt: skip
    assert reference.max_difference(params, params_of(run, state)) < 2e-5
    assert reference.max_difference(trace, to_params(run.layout, state.trees[1])) < 2e-4
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(trace)) > 0.1


def test_carried_momentum_travels_with_its_unit():
    config = get_config("mlp", optimizer_state="carry", num_workers=2)
    run, state = run_all(config, rounds=1)
    assert len(state.trees) == 2
    before = {p: np.asarray(x) for p, x in to_flat(run, state, 1).items()}
    assignment = partition.draw(config.seed, 1, run.layout.groups, deals.random)
    subnet = jax.device_get(run.programs.gather(state, assignment))[1]["layer1/dense/kernel"]
    indices = assignment["hidden1"].indices
    for worker in range(2):
        wanted = before["layer1/dense/kernel"][:, indices[worker]]
        assert np.array_equal(subnet[worker, 0], wanted)
    assert np.abs(before["layer1/dense/kernel"]).max() > 0


def to_flat(run, state, tree):
    return traverse_util.flatten_dict(to_params(run.layout, state.trees[tree]), sep="/")


def poisoned(run, worker):
    """The run with a loss that is NaN for one worker: its device's labels carry a mark."""
    labels = {name: np.array(x) for name, x in run.feed.data.items()}
    labels["label"][worker] = run.feed.data["label"][worker] + 200
    loss_fn = run.recipe.loss_fn

    def sick(params, inputs, marked, gates):
        loss, accuracy = loss_fn(params, inputs, marked % 200, gates)
        return loss * jnp.where(marked[0] >= 200, jnp.nan, 1), accuracy

    recipe, config, data = run.recipe._replace(loss_fn=sick), run.config, devices.put(labels, run.devices)
    programs = compile_programs(
        recipe, run.model, run.task, run.state, data, run.test_batches.spec, run.devices,
        local_steps=config.local_steps, batch_size=config.batch_size, scale=run.scale,
        average_gradients=config.method == "data_parallel",
    )  # fmt: skip
    return run._replace(recipe=recipe, programs=programs, feed=run.feed._replace(data=data))


def test_a_sick_worker_changes_nothing_that_only_it_holds():
    config = get_config("mlp", num_workers=2)
    clean, run = experiment.set_up(config), poisoned(experiment.set_up(config), worker=1)
    before = params_of(run, run.state)
    state, means, _ = train.run_round(run, run.state, 0)
    assert means.healthy.tolist() == [True, False]
    after = params_of(run, state)
    wanted = params_of(clean, train.run_round(clean, clean.state, 0)[0])
    mine = partition.draw(config.seed, 0, run.layout.groups, deals.random)["hidden1"].indices
    kernels = [tree["layer1"]["dense"]["kernel"] for tree in (before, after, wanted)]
    assert np.array_equal(kernels[1][:, mine[1]], kernels[0][:, mine[1]])  # the sick one's: as before
    assert np.array_equal(kernels[1][:, mine[0]], kernels[2][:, mine[0]])  # the healthy one's: trained
    assert not np.array_equal(kernels[1][:, mine[0]], kernels[0][:, mine[0]])


@pytest.mark.parametrize("method", ["local_sgd", "data_parallel"])
def test_a_sick_worker_is_left_out_of_the_mean(method):
    config = get_config("mlp", method=method, num_workers=2)
    run = poisoned(experiment.set_up(config), worker=1)
    fresh = experiment.set_up(config)
    params = params_of(fresh, fresh.state)
    state, means, _ = train.run_round(run, run.state, 0)
    assert means.healthy.tolist() == [True, False]
    data, alone = {n: jnp.asarray(x) for n, x in run.train.items()}, round_indices(run, 0)[:1]
    args = (data, alone, run.learning_rates[0], config.seed, 0)
    if method == "data_parallel":
        opt_state = run.recipe.tx.init(reference.flat(params))
        wanted, _ = reference.data_parallel_round(fresh.recipe, params, opt_state, *args)
    else:
        axes = partition.resolve_axes(params, {})
        wanted = reference.ist_round(fresh.recipe, params, axes, {}, *args)
    assert reference.max_difference(wanted, params_of(run, state)) < 1e-5
    assert reference.max_difference(params, wanted) > 1e-3


@pytest.mark.parametrize("method", ["ist", "local_sgd", "data_parallel"])
def test_all_sick_workers_leave_the_store_as_it_was(method):
    config = get_config("mlp", method=method, num_workers=2)
    run = experiment.set_up(config)
    run = run._replace(learning_rates=np.full_like(run.learning_rates, np.inf))
    before = jax.tree.map(np.array, params_of(run, run.state))
    state, means, _ = train.run_round(run, run.state, 0)
    assert not means.healthy.any()
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(params_of(run, state)), strict=True):
        assert np.array_equal(x, y)


def test_nothing_is_compiled_once_the_rounds_have_begun():
    compiled = []
    listener = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    config = get_config("resnet", num_workers=3, **{"model.sections": (1, 6)})  # uneven: 2, 2, 1
    run = experiment.set_up(config)
    assert compiled
    state = run.state
    compiled.clear()
    for index in range(3):
        state, _, _ = train.run_round(run, state, index)
        train.evaluate_state(run, state)
    jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []


@pytest.mark.parametrize("name", ["resnet", "mlp"])
def test_local_steps_do_not_communicate(name):
    text = experiment.set_up(get_config(name, num_workers=2)).programs.local.as_text()
    for collective in ("all-to-all", "all-gather", "all-reduce", "collective-permute", "reduce-scatter"):
        assert collective not in text


def test_a_worker_with_fewer_blocks_skips_them():
    config = get_config("resnet", num_workers=3, num_devices=3, **{"model.sections": (1, 6)})
    text = experiment.set_up(config).programs.local.as_text()
    assert "conditional(" in text  # the convolutions of an empty slot are in a branch that is not taken


def memory(program):
    m = program.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def test_memory_per_device_is_the_share_of_the_store_and_a_subnet():
    # wide layers, so that parameters outweigh activations
    overrides = {"num_workers": 4, "model.hidden": (1024, 1024)}
    ist = experiment.set_up(get_config("mlp", **overrides))
    sgd = experiment.set_up(get_config("mlp", method="local_sgd", **overrides))
    full = 4 * ledger.model_parameters(ist.layout)
    subnet = 4 * ledger.subnet_parameters(ist.layout) / 4
    data = sum(x.nbytes for x in ist.train.values())
    store_share = sum(np.asarray(x[0]).nbytes for x in ist.state.trees[0].values())
    assert store_share < 1.02 * full / 4  # 1 / D; all is partitioned, rows of one number are padded to D
    # gather: the share, the subnet, and buffers of its size to send and to receive
    assert memory(ist.programs.gather) < store_share + 4 * subnet
    # local steps: parameters, gradients and momentum of a subnet, the shared leaves, data, activations
    assert memory(ist.programs.local) < 6 * subnet + data + 1e6 < full
    assert memory(ist.programs.merge) < 2 * store_share + 6 * subnet < full
    for phase in ("local", "merge"):
        assert memory(getattr(ist.programs, phase)) < memory(getattr(sgd.programs, phase)) / 3


def test_memory_of_resist_is_below_local_sgd():
    overrides = {"num_workers": 4, "model.sections": (1, 9)}
    ist = experiment.set_up(get_config("resnet", **overrides))
    sgd = experiment.set_up(get_config("resnet", method="local_sgd", **overrides))
    assert memory(ist.programs.local) < memory(sgd.programs.local)
    assert memory(ist.programs.merge) < memory(sgd.programs.merge)


@pytest.mark.parametrize("case", ["resnet uneven", "mlp uneven"])
def test_streamed_evaluation_equals_the_whole_model(case):
    name, overrides = CASES[case]
    run = experiment.set_up(get_config(name, **overrides))
    streamed = train.evaluate_state(run, run.state)
    params, scale = params_of(run, run.state), evaluation.unit_scale(run.layout)
    plan = batches.eval_batches(len(run.test["label"]), run.config.eval_batch_size, 1)
    sums = []
    for indices, weights in zip(plan.indices[0], plan.weights[0], strict=True):
        inputs, _ = run.task.eval_fn({name: x[indices] for name, x in run.test.items()})
        logits = run.model.apply({"params": params}, inputs, scale=scale)
        labels = run.test["label"][indices]
        losses = settings.optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = logits.argmax(-1) == labels
        sums.append([(weights * losses).sum(), (weights * correct).sum(), weights.sum()])
    whole = evaluation.total_score(run.task, np.array(sums))
    assert streamed.examples == whole.examples == len(run.test["label"])
    assert streamed.accuracy == pytest.approx(whole.accuracy, abs=1e-9)
    assert streamed.loss == pytest.approx(whole.loss, rel=1e-5)


def test_streamed_evaluation_gathers_one_block_at_a_time():
    run = experiment.set_up(get_config("resnet", num_workers=2, **{"model.sections": (1, 9)}))
    kernel = run.layout.leaves["section2/blocks/conv1/kernel"]
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", run.programs.evaluate.as_text())
    sizes = [int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes]
    assert max(sizes) == kernel.row_size < np.prod(kernel.shape)  # a kernel of one block, not of all 8


def test_scale_is_the_share_of_the_workers_that_held_a_unit():
    run = experiment.set_up(get_config("resnet", num_workers=2))
    assert evaluation.unit_scale(run.layout) == {"section2": 0.5}
    run = experiment.set_up(get_config("resnet", num_workers=2, **{"partition.min_units": 2}))
    assert evaluation.unit_scale(run.layout) == {"section2": 1.0}
    run = experiment.set_up(get_config("resnet", num_workers=1))
    assert evaluation.unit_scale(run.layout) == {"section2": 1.0}


def test_the_scale_at_evaluation_can_be_switched_off():
    losses = {}
    for enabled, scale in ((True, 0.5), (False, 1.0)):
        overrides = {"partition.scale_at_evaluation": enabled, "eval_batch_size": 360}
        config = get_config("resnet", num_workers=2, num_devices=1, **overrides)
        run = experiment.set_up(config, evaluation_only=True)

        @jax.jit
        def loss(params, run=run, scale=scale):
            logits = run.model.apply(
                {"params": params}, run.task.eval_fn(run.test)[0], scale={"section2": scale}
            )
            return settings.optax.softmax_cross_entropy_with_integer_labels(logits, run.test["label"]).mean()

        losses[enabled] = float(loss(params_of(run, run.state)))
        assert train.evaluate_state(run, run.state).loss == pytest.approx(losses[enabled], rel=1e-5)
    assert losses[False] != pytest.approx(losses[True], rel=1e-3)


def test_initial_values_do_not_depend_on_devices_or_method():
    config = get_config("mlp", num_workers=4)
    first = experiment.set_up(config)
    for overrides in ({"num_devices": 2}, {"num_devices": 1}, {"method": "local_sgd"}):
        other = experiment.set_up(get_config("mlp", num_workers=4, **overrides))
        a, b = params_of(first, first.state), params_of(other, other.state)
        assert reference.max_difference(a, b) == 0
