"""Optimizers by name and from Python: optax's own sign, schedules over examples, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from conftest import get_config
from rounds import assert_same_bits, run_all, set_up, whole

from ist_jax import compare, data, evaluate, plan, train
from ist_jax.costs.link import Link
from ist_jax.data import batches
from ist_jax.extension import fingerprint
from ist_jax.methods import outer
from ist_jax.methods.optimizers import OPTIMIZERS, Given, make
from ist_jax.runtime import scoring, setup
from ist_jax.runtime.schedule import Progress
from ist_jax.workdir import checkpoint, files

ONE = {"num_workers": 1, "method": "local_sgd", "optimizer_state": "carry", "optimizer.learning_rate": 0.01}
COSINE = optax.cosine_decay_schedule(0.1, 100)


def train_by_optax(run, tx, rate, rounds=2):
    """Whole leaves by path after the steps of one worker, by optax alone."""
    params, recipe = whole(run, run.state.params), run.stages[0].recipe
    loss_fn, opt_state = scoring.make_loss_fn(run.model, run.inputs.task), tx.init(params)
    gradient = reference.plainly(jax.grad(lambda p, x, y: loss_fn(p, x, y, None, jax.random.key(0))[0]))
    for index in range(rounds):
        for batch in batches.train_indices(0, index, run.feed.shards, local_steps=2, batch_size=8)[0]:
            grads = gradient(params, *recipe.batch_fn(run.inputs.train, batch, jax.random.key(0)))
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates))
    return params


def test_a_round_of_adamw_is_optax_s_own():
    # a large eps: else gradients near zero decide by their sign
    options = {"name": "adamw", "b2": 0.99, "eps": 0.01, "weight_decay": 0.1}
    run = set_up("mlp", **ONE, **{f"optimizer.{key}": value for key, value in options.items()})
    tx = optax.adamw(1.0, b2=0.99, eps=0.01, weight_decay=0.1)
    found, wanted = whole(run, run_all(run).params), train_by_optax(run, tx, 0.01)
    assert reference.max_difference(found, wanted) < 2e-5
    assert reference.max_difference(found, whole(run, run.state.params)) > 1e-2


def sgd(x, grads):
    speed = 0
    for grad in grads:
        speed = 0.5 * speed + grad + 0.1 * x
        x = x - speed
    return x


def adamw(x, grads):
    mean = square = 0
    for step, grad in enumerate(grads, 1):
        mean, square = 0.8 * mean + 0.2 * grad, 0.9 * square + 0.1 * grad**2
        ahead = mean / (1 - 0.8**step) / (np.sqrt(square / (1 - 0.9**step)) + 0.3)
        x = x - ahead - 0.1 * x
    return x


def lion(x, grads):
    mean = 0
    for grad in grads:
        x = x - np.sign(0.8 * mean + 0.2 * grad) - 0.1 * x
        mean = 0.9 * mean + 0.1 * grad
    return x


@pytest.mark.parametrize("loop", [sgd, adamw, lion], ids=list(OPTIMIZERS))
def test_an_optimizer_by_name_is_its_formula(loop):
    keys = {"momentum": 0.5, "b1": 0.8, "b2": 0.9, "eps": 0.3, "weight_decay": 0.1}
    tx = make(get_config("mlp").optimizer.to_dict() | keys | {"name": loop.__name__})
    x, grads = np.array([1.0, -2.0]), np.random.default_rng(0).normal(size=(4, 2))
    params, state = {"w": jnp.asarray(x)}, tx.init({"w": jnp.asarray(x)})
    for grad in grads:
        updates, state = tx.update({"w": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
    assert np.allclose(params["w"], loop(x, grads), atol=1e-6)


def test_what_is_unset_is_optax_s_default():
    options = get_config("mlp").optimizer.to_dict()
    assert options["b2"] is None
    for name, b2 in (("adamw", 0.999), ("lion", 0.99)):
        tx = make(options | {"name": name})
        state = tx.init({"w": jnp.zeros(1)})
        _, state = tx.update({"w": jnp.ones(1)}, state, {"w": jnp.zeros(1)})
        second = state[0].nu if name == "adamw" else state[0].mu
        assert float(second["w"][0]) == pytest.approx(1 - b2, rel=1e-3)


@pytest.mark.parametrize("policy", ["reset", pytest.param("carry", marks=pytest.mark.slow)])
def test_a_whole_optimizer_of_ones_own_descends(policy, tmp_path):
    config = get_config("mlp", rounds=6, local_steps=8, eval_every=0, optimizer_state=policy)
    summary = train.train(config, tmp_path, optimizer=optax.adamw(0.01))
    records = files.read_records(tmp_path)
    assert records[-1]["train_loss"] < 0.8 * records[0]["train_loss"]
    assert {record["lr"] for record in records} == {1.0}
    assert train.train(config, tmp_path, optimizer=optax.adamw(0.01)) == summary  # finished already
    for other in ({}, {"optimizer": optax.adamw(0.02)}):
        with pytest.raises(ValueError, match="other settings") as refused:
            train.train(config, tmp_path, **other)
        (note,) = refused.value.__notes__
        assert note.startswith("optimizer= is GradientTransformation")


def test_a_learning_rate_is_a_function_of_the_examples_that_all_workers_have_seen():
    config = get_config("mlp", num_workers=2, rounds=3)  # 2 steps of 8 examples each
    found = setup.make_schedule(config, 1000, learning_rate=lambda seen: seen / 2).learning_rates
    assert found.tolist() == [[0, 8], [16, 24], [32, 40]]
    later = setup.make_schedule(config, 1000, Progress(2, 100), lambda seen: seen / 2).learning_rates
    assert later[2].tolist() == [50, 58]
    with pytest.raises(ValueError, match="learning_rate= is not finite after 32 examples"):
        setup.make_schedule(config, 1000, learning_rate=lambda seen: jnp.where(seen < 32, 1.0, jnp.nan))
    assert Given(learning_rate=COSINE).schedule is COSINE
    assert Given().schedule is None
    rates = setup.make_schedule(config, 1000, learning_rate=Given(optax.sgd(0.1)).schedule).learning_rates
    assert (rates == 1).all()


def set_up_given(optimizer, policy, **overrides):
    config = get_config("mlp", optimizer_state=policy, num_workers=2, num_devices=1, **overrides)
    return setup.set_up(config, given=Given(optimizer), evaluation_only=True)


@pytest.mark.parametrize(
    "optimizer",
    [optax.adam(COSINE), optax.inject_hyperparams(optax.sgd)(learning_rate=COSINE)],
    ids=["adam", "inject_hyperparams"],
)
def test_a_schedule_that_every_round_would_restart_is_refused(optimizer):
    with pytest.raises(ValueError, match=r"'reset' restarts in every round.* learning_rate="):
        set_up_given(optimizer, "reset")
    set_up_given(optimizer, "carry")


def test_moments_that_leave_parameters_out_are_refused_where_they_are_kept():
    masked = optax.chain(optax.masked(optax.trace(0.9), lambda p: {k: x.ndim > 1 for k, x in p.items()}))
    for optimizer in (masked, optax.contrib.muon(0.01)):
        with pytest.raises(ValueError, match=r"left out, as optax.masked and muon do"):
            set_up_given(optimizer, "carry")
        set_up_given(optimizer, "reset")
    with pytest.raises(ValueError, match=r"'layer1/dense/kernel' \(64, 32\) is \(1,\) there"):
        set_up_given(optax.adafactor(0.01), "carry")
    with pytest.raises(ValueError, match="rng_key of the optimizer's state is"):
        set_up_given(optax.add_noise(0.1, 0.5, 0), "carry")
    set_up_given(optax.inject_hyperparams(optax.adam)(learning_rate=0.1), "carry")


def test_what_is_no_optimizer_or_schedule_is_refused(tmp_path):
    for given, told in (
        ({"optimizer": optax.adam}, "is no optax transformation; give one, such as optax.adamw"),
        ({"learning_rate": 0.1}, "learning_rate=0.1 is no function of the examples seen; set config.opt"),
    ):
        with pytest.raises(ValueError, match=told):
            train.train(get_config("mlp"), tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


LOCAL_SGD = {"method": "local_sgd", "optimizer.name": "adamw", "optimizer.learning_rate": 0.01}


@pytest.mark.slow
def test_local_sgd_keeps_its_moments_the_same_on_any_number_of_devices():
    found = []
    for num_devices in (4, 2, 1):
        run = set_up("mlp", **LOCAL_SGD, num_workers=4, num_devices=num_devices)
        assert run.settings["optimizer_state"] == "keep"
        state = run_all(run)
        assert state.travels == state.stays == ()
        found.append((whole(run, state.params), jax.tree.map(np.concatenate, state.own)))
    for other in found[1:]:
        assert_same_bits(other, found[0])
    counts, means, squares = jax.tree.leaves(found[0][1])[0], *found[0][1][0][1:]
    assert counts.tolist() == [4] * 4  # two rounds of two steps
    for tree in (means, squares):
        assert all(np.ptp(x, axis=0).max() > 0 for x in tree.values())  # each has its own


@pytest.mark.slow
def test_the_moments_of_other_workers_start_at_zero_and_it_is_said(tmp_path, caplog):
    config = get_config("mlp", **LOCAL_SGD, rounds=1)
    train.train(config, tmp_path)
    before = checkpoint.load_params(tmp_path)
    config.update({"rounds": 2, "num_workers": 3})
    with caplog.at_level("WARNING"):
        train.train(config, tmp_path)
    assert "what 2 workers kept (moments, residuals) starts anew, for num_workers=3" in caplog.text
    saved = checkpoint.open_round(tmp_path, 2)
    assert saved.read("own/0").tolist() == [2] * 3  # Adam's count, of the second round alone
    assert reference.max_difference(checkpoint.load_params(tmp_path), before) > 0


def test_kept_moments_are_memory_and_never_sent():
    planned = {}
    for policy in ("reset", "keep", "carry"):
        config = get_config("mlp", method="local_sgd", optimizer_state=policy, num_workers=4)
        planned[policy] = plan.predict(config, data.facts("digits", {}))
    reset, keep, carry = planned.values()
    assert keep.wire_bytes_per_worker_per_round == reset.wire_bytes_per_worker_per_round
    assert keep.exchanged_bytes_per_worker_per_round == reset.exchanged_bytes_per_worker_per_round
    assert carry.wire_bytes_per_worker_per_round > 1.9 * reset.wire_bytes_per_worker_per_round
    # parameters in the state, twice (before and after) with moments that outlast the round
    assert reset.state_bytes_per_worker == 3 * 4 * reset.params_per_worker
    assert keep.state_bytes_per_worker == carry.state_bytes_per_worker == 4 * 4 * keep.params_per_worker


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam"])
@pytest.mark.parametrize("power", [0.0, 0.5])
def test_an_outer_step_is_what_its_operations_are_one_by_one(name, power):
    # a product and a sum in one operation round once, and in some programs only
    options = get_config("mlp", **{"outer.name": name, "outer.by_holders": power}).outer.to_dict()
    made, rng = outer.make(options, 4), np.random.default_rng(0)
    old, new = ({"w": jnp.asarray(rng.normal(size=(57, 1003)), jnp.float32)} for _ in range(2))
    moments = tuple(jax.tree.map(lambda x: abs(x) * 3, {"w": old["w"][::-1]}) for _ in made.init(old))
    if name == "adam":
        moments = (*moments[:2], {"w": jnp.asarray(rng.integers(0, 9, (57, 1003)), jnp.uint16)})
    holders = {"w": jnp.asarray(rng.integers(0, 5, (57, 1)), jnp.int32)}
    assert_same_bits(jax.jit(made.step)(old, new, moments, holders), made.step(old, new, moments, holders))


@pytest.mark.parametrize("name", [pytest.param("nesterov", marks=pytest.mark.slow), "adam"])
def test_an_outer_optimizer_has_the_same_bits_on_any_number_of_devices(name):
    found = []
    overrides = {"outer.name": name, "partition.min_units": 12, "participation": 0.7}
    for num_devices in (4, 1):
        run = set_up("mlp", num_workers=4, num_devices=num_devices, **overrides)
        state = run_all(run)
        found.append(jax.tree.map(np.asarray, whole(run, (state.params, state.stays))))
    assert_same_bits(*found)
    plain = set_up("mlp", num_workers=4, **(overrides | {"outer.name": "none"}))
    assert reference.max_difference(whole(plain, run_all(plain).params), found[0][0]) > 1e-3


def test_outer_sgd_without_momentum_at_a_rate_of_one_is_the_plain_round():
    options = get_config("mlp", **{"outer.name": "sgd", "outer.momentum": 0.0}).outer.to_dict()
    assert outer.make(options | {"learning_rate": 1.0}, 4) is None
    assert outer.make(options | {"name": "none"}, 4) is None
    for other in ({}, {"learning_rate": 1.0, "momentum": 0.1}, {"learning_rate": 1.0, "by_holders": 0.1}):
        assert outer.make(options | other, 4) is not None


def test_an_outer_optimizer_is_memory_and_refused_where_nothing_is_merged():
    def planned(**overrides):
        config = get_config("mlp", **{"num_workers": 4, "method": "local_sgd"} | overrides)
        return plan.predict(config, data.facts("digits", {}))

    plain = planned()
    for name, bytes_each in (("nesterov", 4), ("adam", 4 + 4 + 2)):
        cost = planned(**{"outer.name": name})
        more = cost.state_bytes_per_worker - plain.state_bytes_per_worker
        assert more == bytes_each * plain.params_per_worker
        assert cost.wire_bytes_per_worker_per_round == plain.wire_bytes_per_worker_per_round
    with pytest.raises(ValueError, match="method='data_parallel' has none"):
        planned(**{"outer.name": "adam", "method": "data_parallel"})
    config = get_config("mlp", **{"outer.name": "adam"})
    assert setup.for_method(config, "local_sgd").outer.name == "adam"
    assert setup.for_method(config, "data_parallel").outer.name == "none"


GIVEN = Given(optax.adam(0.01))


def planned_bytes(config, given):
    return plan.predict(config, data.facts("digits", {}), given=given).exchanged_bytes_per_worker_per_round


def test_a_plan_is_of_a_given_optimizer():
    config = get_config("mlp", optimizer_state="carry")
    # beside the parameters there travels the momentum or, with Adam, two moments and not the count
    assert 2 * planned_bytes(config, GIVEN) == 3 * planned_bytes(config, None)
    found = plan.plan(config, data.facts("digits", {}), links=[Link(1e9, 0)], flops=1e13, given=GIVEN)["ist"]
    assert found["exchanged_bytes_per_worker_per_round"] == planned_bytes(config, GIVEN)


@pytest.mark.slow
def test_a_comparison_is_of_a_given_optimizer(tmp_path):
    config = get_config("mlp", optimizer_state="carry", rounds=2)
    result = compare.compare(config, tmp_path, variants=compare.of_methods(["ist"]), seeds=1, given=GIVEN)
    assert result["variants"]["ist"]["bytes"]["mean"] == 2 * planned_bytes(config, GIVEN)
    assert files.read_records(tmp_path / "ist-0")[-1]["lr"] == 1
    with pytest.raises(ValueError, match="holds a run with other settings") as refused:
        compare.compare(
            config, tmp_path, variants=compare.of_methods(["ist"]), seeds=1, given=Given(optax.adam(0.02))
        )
    assert any(note.startswith("optimizer= is ") for note in refused.value.__notes__)


def test_a_run_whose_moments_no_config_describes_is_evaluated(tmp_path, capsys):
    config = get_config("mlp", optimizer_state="carry")
    summary = train.train(config, tmp_path, optimizer=optax.adam(0.01))
    assert evaluate.main(["evaluate", f"--workdir={tmp_path}", "--nocompilation_cache"]) == 0
    assert f"test accuracy {summary['test_accuracy']:.2%}, loss" in capsys.readouterr().out


def test_a_fingerprint_tells_things_by_what_they_do():
    def again(n):
        return again(n - 1) if n else partial(optax.adam, b1=0.5)

    things = [
        optax.adam(0.1), optax.adam(0.2), optax.adam(COSINE), optax.adamw(0.1),
        optax.masked(optax.adam(0.1), again),
        lambda x: x, lambda x: x + 1, again, partial(optax.adam, b1=0.5), np.ones(2), np.zeros(2), COSINE,
        Given(COSINE).recorded, {"a": 1},
    ]  # fmt: skip
    assert len({fingerprint(thing) for thing in things}) == len(things)
    assert fingerprint(optax.adam(0.1)) == fingerprint(optax.adam(0.1))
    assert "0x" not in fingerprint(again)
