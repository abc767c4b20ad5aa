"""Rounds of local SGD before those of IST: the same state, exchanged whole."""

import jax
import numpy as np
import pytest
import reference
from conftest import get_config
from rounds import assert_same_bits, describe, run_all, set_up, trace_round, whole

from ist_jax import deals, partition, train
from ist_jax.costs import formula
from ist_jax.costs.traffic import round_traffic
from ist_jax.runtime import scoring, setup
from ist_jax.runtime.schedule import Progress
from ist_jax.workdir import files

PER_ROUND = 2 * 8 / 1437  # passes over the digits, of a worker in a round of a smoke config
UNEVEN = {
    "num_workers": 3, "partition.shares": (3.0, 2.0, 1.0), "optimizer_state": "carry", "num_devices": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def warm():
    """A run with two rounds of warm-up and one of IST, and its states after each."""
    run = set_up("mlp", **UNEVEN, **{"partition.warmup_epochs": 1.9 * 3 * PER_ROUND})
    assert [stage.until for stage in run.stages] == [2, 3]
    state = run_all(run)
    return run, state, run_all(run, rounds=3, state=state, first=2)


@pytest.mark.slow
def test_the_rounds_of_a_warmup_are_those_of_local_sgd_bit_for_bit(warm):
    plain = set_up("mlp", method="local_sgd", **UNEVEN)
    assert len(plain.stages) == 1
    assert_same_bits(whole(warm[0], warm[1]), whole(plain, run_all(plain)))


@pytest.mark.slow
def test_after_the_warmup_the_rounds_are_those_of_ist(warm):
    fresh = set_up("mlp", **UNEVEN)
    assert len(fresh.stages) == 1
    assert_same_bits(run_all(fresh, rounds=3, state=warm[1], first=2), warm[2])


@pytest.mark.slow
def test_a_warmup_scales_branches_as_an_evaluation_does():
    config = get_config("resnet", **{"model.sections": (3,), "partition.sections": (1,)})
    recipe, model, opened = describe(config)
    scale = setup.unit_scale(config, recipe.layout)
    assert scale == {"section1": 0.5}
    warm = setup.warmup_recipe(recipe, model, opened.task, scale)
    params = recipe.init_params(jax.random.key(0))
    test = {name: x[:32] for name, x in opened.test.items()}
    inputs, labels = opened.task.show(test)
    loss, _ = reference.plainly(warm.loss_fn)(reference.flat(params), inputs, labels, None, jax.random.key(0))

    @reference.plainly
    def score(params, factor):
        batch = test | {"weight": np.ones(len(labels))}
        return scoring.score_batch(model, opened.task, {"section1": factor}, {"params": params}, batch)

    scaled, plain = (float(score(params, factor)[0]) / len(labels) for factor in (0.5, 1.0))
    assert float(loss) == pytest.approx(scaled, rel=1e-5)
    assert float(loss) != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("name", ["resnet", "mlp"])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_the_bytes_of_a_warmup_are_those_of_local_sgd(name, num_workers):
    sizes = {"resnet": {"model.width": 32}, "mlp": {}}[name]
    config = get_config(name, num_workers=num_workers, **sizes)
    recipe, model, opened = describe(config)
    warm = setup.warmup_recipe(recipe, model, opened.task, setup.unit_scale(config, recipe.layout))
    plain_config = get_config(name, num_workers=num_workers, method="local_sgd", **sizes)
    plain, *_ = describe(plain_config)
    ist = round_traffic(trace_round(config, recipe, opened), recipe.layout)
    got = round_traffic(trace_round(config, warm, opened), warm.layout)
    wanted = round_traffic(trace_round(plain_config, plain, opened), plain.layout)
    papers = [sum(traffic.paper.values()) / num_workers for traffic in (ist, got, wanted)]
    assert papers[1] == papers[2] == formula.local_sgd_bytes(recipe.layout)
    assert papers[0] < papers[1] or num_workers == 1
    sent = [sum(traffic.sent.values()) for traffic in (got, wanted)]
    most = 1.002 if name == "resnet" else 1.15  # a neuron's rows are short: more of them is padding
    assert sent[1] <= sent[0] <= most * sent[1]
    assert (sent[0] > 0) == (num_workers > 1)


def test_the_records_say_what_a_warmup_costs(tmp_path):
    config = get_config("mlp", **{"partition.warmup_epochs": 1.9 * 2 * PER_ROUND})
    summary = train.train(config, tmp_path)
    recipe, _, opened = describe(config)
    parts = sum(round_traffic(trace_round(config, recipe, opened), recipe.layout).paper.values()) / 2
    whole_model = formula.local_sgd_bytes(recipe.layout)
    rounds = files.read_records(tmp_path)
    assert [r["bytes_per_worker"] for r in rounds] == [whole_model, whole_model, parts]
    assert summary["bytes_exchanged_per_worker"] == 2 * whole_model + parts
    assert rounds[0]["partition"] == rounds[1]["partition"] != rounds[2]["partition"]


@pytest.mark.parametrize(("units", "workers"), [(5, 2), (9, 4), (3, 8)])
def test_everyone_holds_every_unit_once(units, workers):
    shapes = {"a": np.zeros((units, 4)), "b": np.zeros((units, units))}
    axes = {"a": ("u", None), "b": ("u", "u")}
    groups = partition.with_everyone(partition.make_groups(shapes, axes, workers))
    drawn = partition.draw(0, 3, groups, deals.random)["u"]
    assert (drawn.indices == np.arange(units)).all()
    assert drawn.gates.all()


@pytest.mark.parametrize(
    ("first", "before", "rounds", "wanted"),
    [(0, 0, 100, 13), (0, 0, 5, 5), (4, 4 * 16, 100, 13), (4, 8 * 16, 100, 9), (20, 20 * 16, 100, 20)],
)
def test_the_warmup_ends_by_the_examples_seen(first, before, rounds, wanted):
    own = {"num_workers": 1, "local_steps": 2, "rounds": rounds, "partition.warmup_epochs": 2.0}
    config, done = get_config("mlp", **own), Progress(first, before)
    segments = setup.make_schedule(config, 100, done).segments
    assert max([s.until for s in segments if s.part == 0], default=first) == wanted  # 200 / 16 = 12.5
    assert {s.part for s in segments} == {*[0] * (first < wanted), *[1] * (wanted < rounds)}
    config.method = "local_sgd"
    assert [(s.part, s.until) for s in setup.make_schedule(config, 100, done).segments] == [(0, rounds)]
