"""An ensemble in the commands: scored together and singly, saved, gone on with; and what it cannot have."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, get_config
from rounds import assert_same_bits, describe, run_all, set_up

from ist_jax import compare, evaluate, main, train
from ist_jax.config import build_model
from ist_jax.exchange.codec import Codec
from ist_jax.report.__main__ import main as report
from ist_jax.tasks.task import mean_outputs, mean_probability
from ist_jax.workdir import checkpoint, files

CODEC = Codec(lambda x: x.astype(jnp.bfloat16), lambda y: y.astype(jnp.float32))
OWN = {"method": "ensemble", "num_workers": 2, "eval_batch_size": 360}  # all that there are
FLAGS = [f"--config={ROOT}/configs/mlp.py:smoke", *(f"--config.{key}={value}" for key, value in OWN.items())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ensemble")
    train.train(get_config("mlp", **OWN), workdir)
    return workdir


def test_nets_are_scored_together_by_their_mean_probability_and_singly(folder, capsys):
    run = set_up("mlp", evaluation_only=True, **OWN)
    net, (x, labels) = build_model(get_config("mlp"), 10), run.inputs.task.show(run.inputs.test)
    net = net.subnet({"hidden1": 16, "hidden2": 16})  # of 32
    found = [
        jax.nn.softmax(net.apply({"params": checkpoint.load_params(folder, member=n)}, x)) for n in (0, 1)
    ]
    right = [float((p.argmax(-1) == labels).mean()) for p in (*found, sum(found))]
    summary = files.read_summary(folder)
    assert summary["test_accuracy"] == pytest.approx(right[2])
    assert summary["test_member_accuracy"] == pytest.approx(np.mean(right[:2]))
    assert len({*right}) == 3
    loss = -jnp.log(sum(found)[jnp.arange(len(labels)), labels] / 2).mean()
    assert summary["test_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert summary["bytes_exchanged_per_worker"] == summary["bytes_sent_per_worker"] == 0
    assert evaluate.main(["evaluate", f"--workdir={folder}"]) == 0
    shown = [float(x) / 100 for x in re.findall(r"test accuracy ([\d.]+)%", capsys.readouterr().out)]
    assert shown == pytest.approx([right[2], *right[:2]], abs=1e-4)
    assert report(["report", f"--workdir={folder}"]) == 0


@pytest.mark.slow
def test_the_bits_are_the_same_on_any_number_of_devices():
    states = [run_all(set_up("mlp", **OWN, num_devices=devices)).own for devices in (1, 2)]
    of_workers = [jax.tree.map(lambda x: np.asarray(x).reshape(2, *x.shape[2:]), own) for own in states]
    assert_same_bits(*of_workers)


def refusal(command, flags, capsys):
    """The line that a command ends with."""
    with pytest.raises(SystemExit) as refused:
        command.main([command.__name__, *flags])
    assert refused.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


def test_there_is_no_model_of_all(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"an ensemble of 2 nets, and no model of all; .* member=0 to 1$"):
        checkpoint.load_params(folder)
    with pytest.raises(ValueError, match="an ensemble of 2 nets"):
        checkpoint.load_params(folder, member=2)
    with pytest.raises(ValueError, match="an ensemble of 2 nets, and no model of all"):
        checkpoint.load_model(folder)
    flags = [f"--workdir={folder}", "image.png"]
    assert "an ensemble: images are classified by one model" in refusal(evaluate, flags, capsys)
    train.train(get_config("mlp", method="data_parallel", rounds=1), tmp_path)
    with pytest.raises(ValueError, match="holds one model, and no ensemble; leave member=0 out"):
        checkpoint.load_params(tmp_path, member=0)


def test_other_workers_are_other_nets(folder, capsys):
    flags = [*FLAGS, "--config.num_workers=4", "--config.rounds=4", f"--workdir={folder}"]
    assert "kept for itself, and num_workers=4; set config.num_workers to 2" in refusal(main, flags, capsys)


@pytest.mark.parametrize("own", ["--config.outer.name=sgd", f"--config.exchange.codec={__file__}:CODEC"])
def test_what_is_for_exchanges_is_refused_by_name(own, tmp_path, capsys):
    key = own.split("=")[0].removeprefix("--")
    line = refusal(main, [*FLAGS, own, f"--workdir={tmp_path / 'run'}"], capsys)
    assert f"method='ensemble' has none; set {key} to 'none'" in line


def test_a_net_of_a_model_without_units_is_all_of_it():
    found = [
        describe(get_config("resnet", num_workers=2, method=method, **{"partition.sections": ()}))[0].layout
        for method in ("ensemble", "local_sgd")
    ]
    assert found[0] == found[1]


@pytest.mark.slow
def test_it_is_compared_with_methods_of_one_model(tmp_path):
    found = compare.compare(
        get_config("mlp", rounds=1), tmp_path, variants=compare.of_methods(["ensemble", "ist"]), seeds=1
    )
    assert found["start"]["0"].keys() == {"params_sha256", "examples_sha256"}
    assert found["variants"]["ensemble"]["bytes"]["mean"] == 0


def test_probabilities_are_averaged_not_logits():
    logits = jnp.array([[[0.0, 0.0]], [[4.0, 0.0]]])  # of two nets: 1/2 and 1 / (1 + e^-4)
    wanted = (0.5 + 1 / (1 + np.exp(-4))) / 2
    assert jnp.exp(mean_probability(logits))[0, 0] == pytest.approx(wanted, rel=1e-6)
    assert mean_outputs({"y": logits})["y"].tolist() == [[2.0, 0.0]]
