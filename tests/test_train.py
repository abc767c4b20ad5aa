"""Whole runs: what they leave behind, and models that the engine has never seen."""

import json
import re
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, get_config
from PIL import Image

from ist_jax import data, deals, evaluate, partition, train
from ist_jax.exchange.layout import iter_leaves
from ist_jax.runtime import settings
from ist_jax.runtime import setup as experiment
from ist_jax.workdir import checkpoint, files, resume


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["resnet", "mlp"])
@pytest.mark.parametrize("method", ["ist", "local_sgd", "data_parallel"])
def test_every_config_and_method_leaves_a_complete_folder(name, method, tmp_path):
    config = get_config(name, method=method)
    summary = train.train(config, tmp_path)
    records = read_metrics(tmp_path)
    assert [r["round"] for r in records] == [1, 2, 3]
    assert [r["examples"] for r in records] == [2 * 2 * 8 * r for r in (1, 2, 3)]
    assert checkpoint.rounds(tmp_path)[-2:] == [2, 3]
    for record in records:
        for key in ("train_loss", "seconds_gather", "seconds_local", "seconds_merge", "lr"):
            assert np.isfinite(record[key])
    assert ["test_accuracy" in r for r in records] == [False, True, True]  # eval_every = 2, and the last
    assert 0 <= records[-1]["test_accuracy"] <= 1
    assert summary["test_accuracy"] == records[-1]["test_accuracy"]
    has_gather, has_merge = method == "ist", method != "data_parallel"
    assert all((r["seconds_gather"] > 0) == has_gather for r in records)
    assert all((r["seconds_merge"] > 0) == has_merge for r in records)
    assert json.loads((tmp_path / "config.json").read_text())["method"] == method
    full = 2 * 4 * summary["parameters"] * 3
    assert summary["bytes_local_sgd_per_worker"] == full
    exchanged = {"ist": full * summary["parameters_per_worker"] / summary["parameters"], "local_sgd": full}
    assert summary["bytes_exchanged_per_worker"] == pytest.approx(exchanged.get(method, full * 2))
    assert set(summary["versions"]) >= {"python", "jax", "flax"}
    table = json.loads((tmp_path / "ledger.json").read_text())
    rows = {row["cause"]: row for row in table["rows"]}
    assert all(row.keys() == {"cause", "unit", "per", *table["columns"]} for row in rows.values())
    assert rows["round"]["paper"] == summary["bytes_exchanged_per_worker"] / 3
    assert rows["round"]["formula"] > 0
    for cause in rows.keys() & {"round", "gather", "merge_units", "merge_shared", "gradients", "store"}:
        assert rows[cause]["formula"] == rows[cause]["hlo"], cause
    evaluation = rows["evaluation"]
    assert has_gather == (0 < evaluation["hlo"] <= evaluation["formula"])
    assert rows["parameters held"]["hlo"] == rows["parameters held"]["formula"]
    assert all(rows[f"peak of {name}"]["hlo"] > 0 for name in ("local", "evaluate"))


def test_the_hash_is_of_the_parameters_and_repeats(tmp_path):
    first = train.train(get_config("mlp"), tmp_path / "a")
    again = train.train(get_config("mlp"), tmp_path / "b")
    other = train.train(get_config("mlp", seed=1), tmp_path / "c")
    assert first["params_sha256"] == again["params_sha256"] != other["params_sha256"]
    run = experiment.set_up(get_config("mlp"), params=checkpoint.load_params(tmp_path / "a"))
    assert files.params_sha256(iter_leaves(run.layout, run.state.trees[0])) == first["params_sha256"]


def test_a_finished_run_is_left_as_it_is(tmp_path, caplog):
    config = get_config("mlp")
    train.train(config, tmp_path)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}
    train.train(config, tmp_path)
    assert "finished already" in caplog.text
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="other settings: seed is 0 there and 5 here"):
        train.train(get_config("mlp", seed=5), tmp_path)


def test_another_model_in_the_same_folder_is_refused(tmp_path):
    config = get_config("mlp", rounds=1)
    train.train(config, tmp_path, model=TinyTransformer())
    train.train(config, tmp_path, model=TinyTransformer())
    for other in (TinyTransformer(depth=8), None):
        with pytest.raises(ValueError, match="holds a run of another model"):
            train.train(config, tmp_path, model=other)
    texts = [resume.describe(nn.Dense(3, kernel_init=partial(min, key=lambda: 0))) for _ in range(2)]
    assert texts[0] == texts[1]  # no addresses, which another process would not have
    assert " at 0x" not in texts[0]


def test_sick_workers_are_named_counted_and_written_as_null(tmp_path, caplog):
    config = get_config("mlp")
    config.optimizer.learning_rate = 1e38
    summary = train.train(config, tmp_path)
    assert "round 3: worker 1 had a non-finite loss or update, which is left out" in caplog.text
    assert summary["workers_left_out"] == 6
    assert read_metrics(tmp_path)[-1]["train_loss"] is None
    assert "NaN" not in (tmp_path / "summary.json").read_text()
    assert summary["test_accuracy"] > 0


@pytest.mark.parametrize("method", ["ist", "local_sgd", "data_parallel"])
@pytest.mark.parametrize("optimizer_state", ["reset", "carry"])
def test_plain_sgd_without_momentum_or_decay_trains(method, optimizer_state, tmp_path):
    config = get_config("mlp", method=method, optimizer_state=optimizer_state)
    config.optimizer.update({"momentum": 0.0, "weight_decay": 0.0})
    assert np.isfinite(train.train(config, tmp_path)["train_loss"])


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_bfloat16_trains_and_keeps_float32_parameters(name, tmp_path):
    sizes = {"mlp": {}, "resnet": {"model.width": 8}}[name]
    config = get_config(name, compute_dtype="bfloat16", rounds=12, local_steps=5, batch_size=16, **sizes)
    assert settings.build_model(config, 10).dtype == jnp.bfloat16
    assert settings.build_model(get_config(name), 10).dtype is None
    train.train(config, tmp_path)
    records = read_metrics(tmp_path)
    assert records[-1]["train_loss"] < 0.8 * records[0]["train_loss"]
    for leaf in jax.tree.leaves(checkpoint.load_params(tmp_path)):
        assert leaf.dtype == np.float32
        assert (leaf != leaf.astype(jnp.bfloat16).astype(np.float32)).any()  # merged in float32, too


@pytest.mark.parametrize("method", ["local_sgd", "data_parallel"])
def test_baselines_need_no_units(method, tmp_path):
    config = get_config("resnet", method=method, rounds=1, **{"model.sections": (1, 1)})
    assert train.train(config, tmp_path)["parameters_per_worker"] > 0


def test_epochs_count_the_examples_of_all_workers(tmp_path):
    config = get_config("mlp", rounds=None, epochs=0.1)
    summary = train.train(config, tmp_path)
    assert summary["rounds"] == 5  # 143.7 examples, 32 a round
    assert summary["examples"] == 160


def test_schedules_follow_the_examples_seen():
    config = get_config("mlp", local_steps=5)
    config.optimizer.update({"learning_rate": 1.0, "schedule": "step", "warmup": 0.2, "step_at": (0.5, 0.75)})
    rates = settings.make_learning_rates(config, 20).ravel()
    assert rates.shape == (100,)
    np.testing.assert_allclose(rates[:20], np.arange(1, 21) / 20, atol=1e-6)
    np.testing.assert_allclose(rates[[20, 49, 50, 74, 75]], [1, 1, 0.1, 0.1, 0.01], rtol=1e-5)
    few = settings.make_learning_rates(config, 1).ravel()  # boundaries that fall on one step: both
    np.testing.assert_allclose(few, [1, 1, 1, 0.1, 0.01], rtol=1e-5)
    config.optimizer.schedule = "cosine"
    rates = settings.make_learning_rates(config, 20).ravel()
    np.testing.assert_allclose(rates[20:], 0.5 * (1 + np.cos(np.pi * np.arange(80) / 80)), atol=1e-6)


@pytest.mark.parametrize(("name", "width"), [("mlp", {}), ("resnet", {"model.width": 8, "batch_size": 32})])
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


@pytest.mark.parametrize("num_workers", [2, 5])
def test_a_model_never_seen_before_trains(num_workers, tmp_path, caplog):
    config = get_config("mlp", num_workers=num_workers, rounds=30, local_steps=10, batch_size=16)
    config.optimizer.learning_rate = 0.05
    summary = train.train(config, tmp_path, model=TinyTransformer())
    records = read_metrics(tmp_path)
    assert records[-1]["train_loss"] < 0.6 * records[0]["train_loss"]
    assert summary["parameters_per_worker"] < summary["parameters"]
    assert "gathers it whole" in caplog.text


def test_an_empty_slot_of_a_model_that_ignores_gates_stays_empty():
    config = get_config("mlp", num_workers=2)  # 5 layers: 3 and 2
    run = experiment.set_up(config, model=TinyTransformer())
    assignment = partition.draw(config.seed, 0, run.layout.groups, deals.random)
    gates = assignment["layer"].gates.reshape(2, 1, -1)
    assert not gates.all()
    units = run.programs.gather(run.state, assignment)
    feed = (np.zeros((2, 1, 2, 8), np.int32), np.full(2, 0.1, np.float32), np.int32(0))
    subnets, _ = run.programs.local(run.state, units, {"layer": gates}, run.feed.data, *feed)
    for path, leaf in run.layout.leaves.items():
        if leaf.kind == "rows":
            empty = np.asarray(subnets.trees[0][path])[~gates]
            assert (empty == 0).all(), path


def test_the_readmes_own_model_runs(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    example = next(b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "unit_axes" in b)
    assert len(example.strip().splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(str(ROOT))
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    summaries = list(Path().rglob("summary.json"))
    assert len(summaries) == 1
    assert json.loads(summaries[0].read_text())["test_accuracy"] > 0.5


def test_the_readmes_own_data_are_trained_on(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    example = next(b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "OPENERS" in b)
    example = example.replace("mlp.get_config()", 'mlp.get_config("smoke")')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(data, "OPENERS", dict(data.OPENERS))
    images = np.random.default_rng(0).integers(0, 256, (2, 60, 5, 5, 1), dtype=np.uint8)
    labels = np.arange(60) % 2
    sets = {"x_train": images[0], "y_train": labels, "x_test": images[1], "y_test": labels}
    exec(compile(example, "README.md", "exec"), sets)
    summary = json.loads(Path("runs/mine/summary.json").read_text())
    assert summary["data"] == "mine"
    assert summary["rounds"] == 3


def test_loaded_parameters_go_into_apply(tmp_path):
    train.train(get_config("mlp"), tmp_path)
    params = checkpoint.load_params(tmp_path)
    logits = settings.MLP((32, 32), 10).apply({"params": params}, jnp.zeros((4, 8, 8, 1)))
    assert logits.shape == (4, 10)
    assert jax.tree.all(jax.tree.map(lambda x: isinstance(x, np.ndarray), params))
