"""PowerSGD: what is sent of which leaf, and that it is data-parallel SGD where nothing is lost."""

import math

import jax
import numpy as np
import pytest
import reference
from conftest import get_config
from rounds import describe, run_all, set_up, whole

from ist_jax import data, plan, train
from ist_jax.methods import power_sgd
from ist_jax.runtime import setup
from ist_jax.workdir import checkpoint, files

POWER = {"method": "power_sgd"}
DIGITS = data.facts("digits", {})


def test_bytes_by_hand():
    # 64 inputs, 32 and 32 neurons with 2 x 32 numbers of a norm each, 10 classes; l = 2 steps, rank 3: the
    # kernels go as 3 x (64 + 32 + 32 + 32 + 32 + 10) numbers, 128 numbers as they are; and a count
    numbers = 3 * (64 + 32 + 32 + 32 + 32 + 10) + 128
    cost = plan.predict(get_config("mlp", num_workers=2, **POWER, **{"power_sgd.rank": 3}), DIGITS)
    assert cost.wire_bytes_per_worker_per_round == 2 * (4 * numbers + 4)  # a ring of 2 sends it once
    assert cost.exchanged_bytes_per_worker_per_round == 2 * 2 * 4 * numbers
    # kept: parameters, momentum, an error of every matrix and its q
    kept = 2 * 3520 + 64 * 32 + 32 * 32 + 32 * 10 + 3 * (32 + 32 + 10)
    assert cost.state_bytes_per_worker == 4 * kept
    dense = plan.predict(get_config("mlp", num_workers=2, method="data_parallel"), DIGITS)
    assert cost.messages_per_device_per_round == 2 * dense.messages_per_device_per_round


def test_the_matrices_of_a_stack_are_those_of_its_blocks():
    recipe, *_ = describe(get_config("resnet", **POWER, **{"model.sections": (1, 4)}))
    found = power_sgd._matrices(recipe, 2)
    assert found["section2/blocks/conv1/kernel"] == (3, 9 * 8, 8)
    assert found["section2/first/conv1/kernel"] == (9 * 4, 8)
    assert all(len(recipe.layout.leaves[path].shape) > 1 for path in found)
    assert not any("norm" in path for path in found)  # vectors, stacked or not
    sizes = {path: math.prod(recipe.layout.leaves[path].shape) for path in found}
    assert {path: math.prod(shape) for path, shape in found.items()} == sizes


@pytest.mark.parametrize("rank", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_where_nothing_is_lost_it_is_data_parallel_sgd(rank):
    # 16 examples a step: gradients of rank 16; rank 64 leaves no matrix that would be less
    settings = {"num_workers": 2, "batch_size": 8, "local_steps": 3}
    run = set_up("mlp", **settings, **POWER, **{"power_sgd.rank": rank})
    assert set(run.state.own[0]) == ({"layer1/dense/kernel"} if rank == 16 else set())
    plain = set_up("mlp", **settings, method="data_parallel")
    got, wanted = run_all(run), run_all(plain)
    assert reference.max_difference(whole(run, got.params), whole(plain, wanted.params)) < 2e-5
    moved = reference.max_difference(whole(run, got.params), whole(run, run.state.params))
    assert moved > 1e-2
    assert all(np.abs(x).max() < 1e-5 for x in jax.tree.leaves(jax.tree.map(np.asarray, got.own[0])))


@pytest.mark.slow
def test_it_learns_goes_on_to_the_same_bits_and_anew_with_other_workers(tmp_path, caplog):
    config = get_config("mlp", **POWER, rounds=30, num_workers=2, local_steps=4, batch_size=16)
    summary = train.train(config, tmp_path / "whole")
    losses = [entry["train_loss"] for entry in files.read_records(tmp_path / "whole")]
    assert losses[-1] < 0.3 * losses[0]
    half = get_config("mlp", **POWER, rounds=15, num_workers=2, local_steps=4, batch_size=16)
    train.train(half, tmp_path / "half")
    resumed = train.train(config, tmp_path / "half")
    assert resumed["params_sha256"] == summary["params_sha256"]
    config.update({"rounds": 31, "num_workers": 3})
    with caplog.at_level("WARNING"):
        train.train(config, tmp_path / "half")
    assert "what 2 workers kept (moments, residuals) starts anew" in caplog.text
    saved = checkpoint.open_round(tmp_path / "half", 31)
    assert saved.workers == 3


def test_in_a_comparison_its_numbers_are_as_they_are():
    few = {"exchange.merge_bits": 8, "exchange.keep": 0.5, "exchange.error_feedback": True}
    own = setup.for_method(get_config("mlp", **few), "power_sgd")
    assert own.exchange.to_dict() == get_config("mlp").exchange.to_dict()
    assert setup.for_method(get_config("mlp", **few), "local_sgd").exchange.keep == 0.5
