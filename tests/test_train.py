"""Whole runs: what they leave behind, and models that the engine has never seen."""

import json
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config
from PIL import Image
from rounds import image_task, train_and_look

from ist_jax import data, evaluate, train
from ist_jax.config import build_model
from ist_jax.data.sparse import Rows
from ist_jax.exchange.kinds import iter_leaves
from ist_jax.models import adapter
from ist_jax.models.mlp import MLP
from ist_jax.runtime import inputs, setup
from ist_jax.runtime.record import doubts, last_line
from ist_jax.workdir import checkpoint, files

slow = pytest.mark.slow


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config's name, method) -> the folder of its run, and the run and its first state; trained once."""
    kept = {}

    def folder_of(name="mlp", method="ist"):
        if (name, method) not in kept:
            folder = tmp_path_factory.mktemp(f"{name}-{method}")
            kept[name, method] = folder, *train_and_look(get_config(name, method=method), folder)[1:]
        return kept[name, method]

    return folder_of


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("mlp", "ist"), ("mlp", "local_sgd"), ("mlp", "data_parallel"),
        pytest.param("resnet", "ist", marks=slow),
        pytest.param("resnet", "local_sgd", marks=slow), pytest.param("resnet", "data_parallel", marks=slow),
    ],
)  # fmt: skip
def test_every_config_and_method_leaves_a_complete_folder(name, method, trained):
    folder, *_ = trained(name, method)
    summary, records = files.read_summary(folder), read_metrics(folder)
    assert [r["round"] for r in records] == [1, 2, 3]
    assert [r["examples"] for r in records] == [2 * 2 * 8 * r for r in (1, 2, 3)]
    assert checkpoint.rounds(folder)[-2:] == [2, 3]
    phases = {
        "ist": ["gather", "local", "merge"], "local_sgd": ["local", "merge"], "data_parallel": ["local"],
    }[method]  # fmt: skip
    for record in records:
        for key in ("train_loss", "lr", *(f"seconds_{phase}" for phase in phases)):
            assert np.isfinite(record[key])
        timed = {key for key in record if key.startswith("seconds_")} - {"seconds_round", "seconds_evaluate"}
        assert timed == {f"seconds_{phase}" for phase in phases}
        assert all(record[key] > 0 for key in timed)
    assert ["test_accuracy" in r for r in records] == [False, True, True]  # eval_every = 2, and the last
    assert 0 <= records[-1]["test_accuracy"] <= 1
    assert summary["test_accuracy"] == records[-1]["test_accuracy"]
    recorded = json.loads((folder / "config.json").read_text())
    assert recorded["method"] == method
    policies = {"ist": "reset", "local_sgd": "keep", "data_parallel": "carry"}
    assert recorded["optimizer_state"] == summary["optimizer_state"] == policies[method]
    full = 2 * 4 * summary["parameters"] * 3
    assert summary["bytes_local_sgd_per_worker"] == full
    exchanged = {"ist": full * summary["parameters_per_worker"] / summary["parameters"], "local_sgd": full}
    assert summary["bytes_exchanged_per_worker"] == pytest.approx(exchanged.get(method, full * 2))
    assert set(summary["versions"]) >= {"python", "jax", "flax"}
    table = json.loads((folder / "ledger.json").read_text())
    rows = {row["cause"]: row for row in table["rows"]}
    assert all(row.keys() == {"cause", "unit", "per", *table["columns"]} for row in rows.values())
    assert rows["round"]["paper"] == summary["bytes_exchanged_per_worker"] / 3
    assert rows["round"]["expected"] > 0
    causes = {
        "ist": ["gather", "merge_units", "merge_shared"], "local_sgd": ["merge_shared"],
        "data_parallel": ["gradients"],
    }[method]  # fmt: skip
    for cause in (*causes, "round", "store", "parameters held"):
        assert rows[cause]["expected"] == rows[cause]["hlo"], cause
    evaluation = rows["evaluation"]
    assert (method == "ist") == (0 < evaluation["hlo"] <= evaluation["expected"])
    assert all(rows[f"peak of {program}"]["hlo"] > 0 for program in (*phases, "evaluate"))


def test_the_hash_is_of_the_parameters_and_repeats(trained, tmp_path):
    folder, run, _ = trained()
    first = files.read_summary(folder)
    again = train.train(get_config("mlp"), tmp_path / "b")
    other = train.train(get_config("mlp", seed=1), tmp_path / "c")
    assert first["params_sha256"] == again["params_sha256"] != other["params_sha256"]
    start = setup.set_up(get_config("mlp"), params=checkpoint.load_params(folder), evaluation_only=True)
    assert files.params_sha256(iter_leaves(run.layout, start.state.params)) == first["params_sha256"]


def test_a_finished_run_is_left_as_it_is(trained, caplog):
    folder, *_ = trained()
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
    train.train(get_config("mlp"), folder)
    assert "finished already" in caplog.text
    with pytest.raises(ValueError, match=r"config.seed is 0 there and 5 here"):
        train.train(get_config("mlp", seed=5), folder)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_run_that_has_learnt_nothing_says_so_again_and_again(tmp_path, caplog):
    config = get_config("mlp", **{"optimizer.learning_rate": 1e3})
    for _ in range(2):
        caplog.clear()
        summary = train.train(config, tmp_path)
        told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert told == [f"warning: {tmp_path}: {doubt}" for doubt in summary["doubts"]]
        assert len(told) == 2
        assert "the training loss rose from" in told[0]
        assert "is that of chance: naming one class every time is right in 10.28%" in told[1]


def test_what_a_run_is_doubted_for(trained):
    folder, run, _ = trained()

    def found(accuracy, *losses):
        return doubts(run.inputs, [{"train_loss": x, "test_accuracy": accuracy} for x in losses])

    assert files.read_summary(folder)["doubts"] == []
    chance = 37 / 360  # of the 360 test images, at most 37 show the same digit
    error = (chance * (1 - chance) / 360) ** 0.5
    for nothing in (found(chance + 2.1 * error, 2.0, 3.0, 1.9), found(1.0, 2.0, None, 1.0), found(1.0, 2.0)):
        assert nothing == []
    assert len(found(chance + 1.9 * error, 2.0)) == 1
    assert found(1.0, 2.0, 2.5, None) == ["the training loss rose from 2.000 in the first round to 2.500"]
    assert found(1.0, None, float("nan")) == ["no round has a finite training loss"]


def test_the_chance_of_several_labels_is_that_of_the_most_frequent():
    # two of three points have label 1; the last entry is padding
    label = Rows(np.array([0, 2, 3, 4], np.int32), np.array([0, 1, 1, 2, 1], np.int32), None, 3, longest=2)
    opened = inputs.Inputs(None, data.DataSet("", None, None, "abcd"), None, {"label": label}, None, None)
    assert inputs.chance(opened) == 2 / 3
    assert inputs.chance(opened._replace(test=range(100))) == 1 / 4  # streamed: labels are not read


@pytest.mark.parametrize(
    ("exchanged", "sent", "devices", "text"),
    [
        (
            30.8e6,
            24.1e6,
            4,
            "exchanged 30.8 MB, 7.6% of the 406.2 MB of local SGD; 24.1 MB were sent on the wire",
        ),
        (406.2e6, 304e6, 4, "exchanged 406.2 MB; 304.0 MB were sent on the wire"),
        (
            20310e6,
            1e6,
            1,
            "20,310.0 MB, 50 times the 406.2 MB of local SGD; 1 MB were sent on the wire if each",
        ),
        (30.8e6, None, 4, "exchanged 30.8 MB, 7.6% of the 406.2 MB of local SGD"),
    ],
)
def test_the_line_that_matters(exchanged, sent, devices, text):
    summary = {"method": "ist", "test_accuracy": 0.5, "seconds_total": 1.0, "num_workers": 4}
    summary |= {"bytes_exchanged_per_worker": exchanged, "bytes_local_sgd_per_worker": 406.2e6}
    summary |= {"num_devices": devices} | ({} if sent is None else {"bytes_sent_per_worker": sent})
    line = last_line(summary)
    assert line.startswith("ist: test accuracy 50.00% in 1.0 s; each worker ")
    assert text in line
    assert line.endswith(text) or devices == 1


def test_a_model_is_told_by_its_text_without_addresses():
    texts = [adapter.describe(nn.Dense(3, kernel_init=partial(min, key=lambda: 0))) for _ in range(2)]
    assert texts[0] == texts[1]  # no addresses, which another process would not have
    assert " at 0x" not in texts[0]


def test_sick_workers_are_named_counted_and_written_as_null(tmp_path, caplog):
    config = get_config("mlp")
    config.optimizer.learning_rate = 1e38
    with pytest.raises(train.Diverged, match="all workers were left out of all 3 rounds"):
        train.train(config, tmp_path)
    assert "round 3: worker 1 had a non-finite loss or update, which is left out" in caplog.text
    records = read_metrics(tmp_path)
    assert [r["workers_left_out"] for r in records] == [2, 2, 2]
    assert records[-1]["train_loss"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert records[-1]["test_accuracy"] > 0


@pytest.mark.parametrize(
    ("method", "optimizer_state"),
    [
        ("ist", "carry"), ("data_parallel", "carry"), ("local_sgd", "reset"), ("local_sgd", "keep"),
        pytest.param("ist", "reset", marks=slow), pytest.param("local_sgd", "carry", marks=slow),
    ],
)  # fmt: skip
def test_plain_sgd_without_momentum_or_decay_trains(method, optimizer_state, tmp_path):
    config = get_config("mlp", method=method, optimizer_state=optimizer_state)
    config.optimizer.update({"momentum": 0.0, "weight_decay": 0.0})
    assert np.isfinite(train.train(config, tmp_path)["train_loss"])


@pytest.mark.parametrize("name", ["mlp", pytest.param("resnet", marks=slow)])
def test_bfloat16_trains_and_keeps_float32_parameters(name, tmp_path):
    sizes = {"mlp": {}, "resnet": {"model.width": 8}}[name]
    config = get_config(name, compute_dtype="bfloat16", rounds=12, local_steps=5, batch_size=16, **sizes)
    assert build_model(config, 10).dtype == jnp.bfloat16
    assert build_model(get_config(name), 10).dtype is None
    train.train(config, tmp_path)
    records = read_metrics(tmp_path)
    assert records[-1]["train_loss"] < 0.8 * records[0]["train_loss"]
    for leaf in jax.tree.leaves(checkpoint.load_params(tmp_path)):
        assert leaf.dtype == np.float32
        assert (leaf != leaf.astype(jnp.bfloat16).astype(np.float32)).any()  # merged in float32, too


@pytest.mark.parametrize("method", ["local_sgd", "data_parallel"])
def test_baselines_need_no_units(method):
    config = get_config("resnet", method=method, **{"model.sections": (1, 1)})
    task = image_task(8, 8, 1)
    recipe = setup.make_recipe(config, build_model(config, 10), task, 2)
    assert recipe.layout.groups == {}
    config.method = "ist"
    with pytest.raises(ValueError, match="no partitionable block"):
        setup.make_recipe(config, build_model(config, 10), task, 2)


def test_epochs_count_the_examples_of_all_workers():
    schedule = setup.make_schedule(get_config("mlp", rounds=None, epochs=0.1), 1437)
    assert schedule.rounds == 5  # 143.7 examples, 32 a round
    assert schedule.examples_after(4) == 160


def test_schedules_follow_the_examples_seen():
    config = get_config("mlp", local_steps=5)
    config.optimizer.update({"learning_rate": 1.0, "schedule": "step", "warmup": 0.2, "step_at": (0.5, 0.75)})

    def rates_of(rounds):
        config.rounds = rounds
        return setup.make_schedule(config, 1437).learning_rates.ravel()

    rates = rates_of(20)
    assert rates.shape == (100,)
    np.testing.assert_allclose(rates[:20], np.arange(1, 21) / 20, atol=1e-6)
    np.testing.assert_allclose(rates[[20, 49, 50, 74, 75]], [1, 1, 0.1, 0.1, 0.01], rtol=1e-5)
    # boundaries that fall on one step: both
    np.testing.assert_allclose(rates_of(1), [1, 1, 1, 0.1, 0.01], rtol=1e-5)
    config.optimizer.schedule = "cosine"
    wanted = 0.5 * (1 + np.cos(np.pi * np.arange(80) / 80))
    np.testing.assert_allclose(rates_of(20)[20:], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "width"),
    [("mlp", {}), pytest.param("resnet", {"model.width": 8, "batch_size": 32}, marks=slow)],
)
def test_evaluate_repeats_the_result_and_reads_images(name, width, tmp_path, capsys):
    summary = train.train(get_config(name, rounds=60, local_steps=10, **width), tmp_path / "run")
    digits = data.open_data_set("digits", "")
    files = []
    for index in range(6):
        example = digits.test[index]
        files.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(example["image"][..., 0]).resize((32, 32), Image.Resampling.NEAREST).save(files[-1])
    assert evaluate.main(["evaluate", f"--workdir={tmp_path / 'run'}", *files]) == 0
    out = capsys.readouterr().out
    assert f"test accuracy {summary['test_accuracy']:.2%}" in out
    estimated = float(re.search(r"([\d.]+)% with BatchNorm statistics re-estimated", out).group(1))
    assert abs(estimated - 100 * summary["test_accuracy"]) < 3
    assert estimated > 85
    guesses = [line.split(": ")[1][0] for line in out.splitlines() if ".png: " in line]
    right = [guess == str(digits.test[i]["label"]) for i, guess in enumerate(guesses)]
    assert sum(right) >= 5  # one image each: batch statistics would be useless


class TransformerLayer(nn.Module):
    """Something that the engine has never seen: attention, LayerNorm, biases; it ignores gates."""

    @nn.compact
    def __call__(self, x, scale):
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm(name="norm1")(x))
        x = x + scale * y
        y = nn.Dense(24, name="up")(nn.LayerNorm(name="norm2")(x))
        return x + scale * nn.Dense(x.shape[-1], name="down")(nn.gelu(y)), None


class TinyTransformer(nn.Module):
    """Rows of the image are tokens; stacked encoder layers are units."""

    depth: int = 5

    def unit_axes(self):
        return {"layers/.*": ("layer", ...)}

    def subnet(self, sizes):
        return self.clone(depth=sizes["layer"])

    @nn.compact
    def __call__(self, x, gates=None, scale=None):
        x = nn.Dense(12, name="embed")(x.reshape(*x.shape[:2], -1))
        layers = nn.scan(TransformerLayer, variable_axes={"params": 0}, split_rngs={"params": True},
                         in_axes=nn.broadcast, length=self.depth)  # fmt: skip
        x, _ = layers(name="layers")(x, (scale or {}).get("layer", 1.0))
        return nn.Dense(10, name="head")(x.mean(1))


def transformer_config(num_workers):
    config = get_config("mlp", num_workers=num_workers, rounds=30, local_steps=10, batch_size=16)
    config.optimizer.learning_rate = 0.05
    return config


@pytest.mark.parametrize(
    "num_workers", [pytest.param(2, marks=slow), pytest.param(5, marks=slow)]
)  # 5 layers: 3 and 2, or one each
def test_a_model_never_seen_before_trains(num_workers, tmp_path, caplog):
    config = transformer_config(num_workers)
    summary, *seen = train_and_look(config, tmp_path, TinyTransformer())
    records = read_metrics(tmp_path)
    assert records[-1]["train_loss"] < 0.6 * records[0]["train_loss"]
    assert summary["parameters_per_worker"] < summary["parameters"]
    assert "gathers it whole" in caplog.text

    # in the same folder: it is finished, and another model is refused
    assert train.train(config, tmp_path, model=TinyTransformer()) == summary
    for other in (TinyTransformer(depth=8), None):
        with pytest.raises(ValueError, match="holds a run of another model"):
            train.train(config, tmp_path, model=other)

    # an empty slot stays empty, though the model ignores the gates
    run, state = seen
    stage = run.stages[-1]
    turn = run.turn(stage, 0)
    gates = turn.draw["layer"].gates.reshape(num_workers, 1, -1)
    assert gates.all() == (num_workers == 5)
    units = jax.block_until_ready(stage.programs["gather"](state, None, turn))
    (params, _), *_, told = stage.programs["local"](state, units, turn)
    assert np.asarray(told.healthy).all()
    for path, leaf in run.layout.leaves.items():
        if len(leaf.unit_axes) == 1:
            assert (np.asarray(params[path])[~gates] == 0).all(), path
            assert np.asarray(params[path])[gates].any()


def test_loaded_parameters_go_into_apply(trained):
    params = checkpoint.load_params(trained()[0])
    logits = MLP((32, 32), 10).apply({"params": params}, jnp.zeros((4, 8, 8, 1)))
    assert logits.shape == (4, 10)
    assert jax.tree.all(jax.tree.map(lambda x: isinstance(x, np.ndarray), params))
