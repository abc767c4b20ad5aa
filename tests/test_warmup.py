"""Rounds of local SGD before those of IST: the same state, exchanged whole."""

import json
from functools import partial

import jax
import numpy as np
import pytest
import reference
from conftest import get_config

from ist_jax import deals, partition, train
from ist_jax.costs import formula as ledger
from ist_jax.exchange.layout import make_layout, regroup, to_params
from ist_jax.runtime import record, settings
from ist_jax.runtime import setup as experiment

PER_ROUND = 2 * 2 * 8 / 1437  # passes over the digits, of a round of a smoke config


def params_after(run, rounds=2, state=None, first=0):
    state = run.state if state is None else state
    for index in range(first, rounds):
        state, means, _ = train.run_round(run, state, index)
        assert means.healthy.all()
    return to_params(run.layout, state.trees[0]), state


UNEVEN = {"num_workers": 3, "partition.shares": (3.0, 2.0, 1.0)}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("resnet", {}),
        ("mlp", UNEVEN | {"optimizer_state": "carry", "num_devices": 1}),
    ],
)
def test_nothing_but_warmup_is_local_sgd_bit_for_bit(name, overrides, monkeypatch):
    warm = experiment.set_up(get_config(name, **overrides, **{"partition.warmup_epochs": 1e6}))
    assert warm.warmup.rounds == warm.num_rounds == 3
    if name == "resnet":  # scaled in training as it is at evaluation; an MLP has no branches to scale
        assert warm.scale == {"section2": 0.5}
        scaled = partial(settings.make_loss_fn, scale={"section2": 0.5})
        monkeypatch.setattr(settings, "make_loss_fn", scaled)
    plain = experiment.set_up(get_config(name, method="local_sgd", **overrides))
    assert plain.warmup is None
    assert reference.max_difference(params_after(warm)[0], params_after(plain)[0]) == 0


def test_after_the_warmup_the_rounds_are_those_of_ist():
    run = experiment.set_up(get_config("mlp", **{"partition.warmup_epochs": 0.9 * PER_ROUND}))
    assert run.warmup.rounds == 1
    params, state = params_after(run, rounds=1)
    fresh = experiment.set_up(get_config("mlp"), params=params)
    assert fresh.warmup is None
    got = params_after(run, state=state, first=1)[0]
    wanted = params_after(fresh, first=1)[0]
    assert reference.max_difference(got, wanted) == 0


def layout_of(config):
    model = settings.build_model(config, 10)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1)))["params"]
    axes = partition.resolve_axes(shapes, model.unit_axes() if config.method == "ist" else {})
    groups = settings.make_groups(config, model, shapes, axes)
    return make_layout(shapes, axes, groups, config.num_workers, config.num_workers)


@pytest.mark.parametrize("name", ["resnet", "mlp"])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_the_bytes_of_a_warmup_are_those_of_local_sgd(name, num_workers):
    config = get_config(name, num_workers=num_workers, **({"model.width": 32} if name == "resnet" else {}))
    layout = layout_of(config)
    warm = regroup(layout, partition.with_everyone(layout.groups))
    got = record.round_bytes(config, warm, trees=1)
    config.method = "local_sgd"
    wanted = record.round_bytes(config, layout_of(config), trees=1)
    assert got["bytes_per_worker"] == wanted["bytes_per_worker"]
    assert ledger.paper_bytes_per_round(layout) < ledger.full_model_bytes(layout) or num_workers == 1
    for key in ("bytes_sent", "wire_bytes_per_device"):  # a neuron's rows are short: more of them is padding
        assert wanted[key] <= got[key] <= wanted[key] * (1.002 if name == "resnet" else 1.15)


def test_the_records_say_what_a_warmup_costs(tmp_path):
    config = get_config("mlp", **{"partition.warmup_epochs": 1.9 * PER_ROUND})
    summary = train.train(config, tmp_path)
    layout = layout_of(config)
    whole, parts = ledger.full_model_bytes(layout) / 2, ledger.paper_bytes_per_round(layout) / 2
    rounds = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["bytes_per_worker"] for r in rounds] == [whole, whole, parts]
    assert summary["bytes_exchanged_per_worker"] == 2 * whole + parts
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
    config = get_config("mlp", num_workers=1, local_steps=2, **{"partition.warmup_epochs": 2.0})
    assert settings.count_warmup_rounds(config, 100, first, before, rounds) == wanted  # 200 / 16 = 12.5
    config.method = "local_sgd"
    assert settings.count_warmup_rounds(config, 100, first, before, rounds) == 0
