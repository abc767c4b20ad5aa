"""Small models of many kinds, by 2 and 4 workers: what a run promises holds for each of them."""

import inspect
import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from conftest import get_config
from small_models import SMALL

from ist_jax import data, plan, train
from ist_jax.runtime import inputs, setup
from ist_jax.workdir import checkpoint, files

COMMON = {
    "local_steps": 10,
    "rounds": 8,
    "batch_size": 16,
    "eval_every": 0,
    "eval_batch_size": 360,  # one batch: BatchNorm goes by all test examples
    "checkpoint.every": 4,
}
# By one of the numbers of workers, in turn; by the other one where slow tests are run, and there every model.
ALIKE = ("MLP", "CNN with GroupNorm", "ResNet by inner channels", "transformer", "Dropout", "multi-label")
CASES = [
    pytest.param(
        (name, workers),
        id=f"{name} by {workers}",
        marks=[pytest.mark.slow] * (name in ALIKE or number % 2 != other),
    )
    for number, name in enumerate(SMALL)
    for other, workers in enumerate((2, 4))
]


@pytest.fixture(scope="module", params=CASES)
def finished(request, tmp_path_factory):
    """(what was trained, its config, facts of its data, folder) of a run."""
    name, workers = request.param
    small, workdir = SMALL[name], tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        facts = data.facts("digits")
        overrides = {**COMMON, "num_workers": workers, "optimizer.learning_rate": 0.1, **small.overrides}
        if small.splits is not None:
            opened = data.DataSet(name, *small.splits, tuple(map(str, range(small.classes))))
            patch.setitem(data.SETS, "small", data.Entry(lambda *_: opened))
            facts = data.Facts(split=small.splits[0], num_classes=small.classes)
            overrides["data.name"] = "small"
        config = get_config("mlp", **overrides)
        train.train(config, workdir, small.model, task=small.task)
        yield small, config, facts, workdir


def test_the_loss_falls(finished):
    records = files.read_records(finished[-1])
    assert all(not record["left_out"] for record in records)
    assert records[-1]["train_loss"] < 0.9 * records[0]["train_loss"]


def means_of(task, outputs, labels):
    """The loss and the figures that a task makes of outputs."""

    @jax.jit
    def means(outputs, labels):
        judged = {name: judge(outputs, labels) for name, judge in task.scores.items()}
        return jax.tree.map(jnp.mean, judged | {"loss": task.loss(outputs, labels, None)})

    found = {name: float(mean) for name, mean in means(outputs, labels).items()}
    return {"loss": found["loss"], **task.figures(found)}


def test_plain_apply_repeats_what_is_recorded(finished):
    small, config, _, workdir = finished
    summary = json.loads((workdir / "summary.json").read_text())
    opened = inputs.open_inputs(setup.wanted_data(config), small.task)
    shown, labels = opened.task.show(opened.test)
    called = getattr(small.model, "nnx_class", type(small.model)).__call__
    assert "scale" in inspect.signature(called).parameters and summary["scale"]
    variables = {"params": checkpoint.load_params(workdir)}
    plain = jax.jit(small.model.apply)(variables, shown, scale=summary["scale"])
    normalized = opened.task.normalization is not None
    loaded = checkpoint.load_model(workdir, model=small.model)(opened.test["image"] if normalized else shown)
    for outputs in (plain, loaded):
        for name, value in means_of(opened.task, outputs, labels).items():
            assert value == pytest.approx(summary[f"test_{name}"], rel=1e-4), name


def test_plan_and_ledger_agree_on_bytes(finished):
    small, config, facts, workdir = finished
    cost = plan.predict(config, facts, small.model, small.task)
    rows = {row["cause"]: row for row in json.loads((workdir / "ledger.json").read_text())["rows"]}
    assert cost.wire_bytes_per_worker_per_round == rows["round"]["expected"] == rows["round"]["hlo"] > 0
    summary = files.read_summary(workdir)
    exchanged = cost.exchanged_bytes_per_worker_per_round
    assert exchanged * summary["rounds"] == summary["bytes_exchanged_per_worker"]
    assert exchanged < summary["bytes_local_sgd_per_worker"] / summary["rounds"]


def test_a_stopped_run_goes_on_to_the_same_bits(finished, tmp_path):
    small, config, _, workdir = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    whole = files.read_summary(tmp_path)
    (tmp_path / "summary.json").unlink()  # as of a run that was killed after four rounds
    shutil.rmtree(tmp_path / checkpoint.FOLDER / "8")
    files.write_records(tmp_path, files.read_records(tmp_path)[:4])
    assert checkpoint.rounds(tmp_path) == [4]
    again = train.train(config, tmp_path, small.model, task=small.task)
    assert again["params_sha256"] == whole["params_sha256"]
    assert again["rounds"] == 8
