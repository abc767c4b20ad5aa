"""The arithmetic of the tables in benchmarks/."""

import re

import numpy as np
import pytest
from conftest import ROOT, get_config

from ist_jax import train
from ist_jax.runtime import inputs, setup


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def cifar10_small():
    import cifar10_small

    return cifar10_small


@pytest.mark.slow
def test_the_input_is_measured_against_a_constant_batch(capsys):
    import input_cost

    assert input_cost.main(["input_cost", f"--config={ROOT}/configs/mlp.py:smoke", "--rounds=1"]) == 0
    out = capsys.readouterr().out
    assert "0.1 MB, 1.0625 to 1.0625 x its images" in out  # 64 bytes of image, 4 of label
    assert len(re.findall(r"round / constant, \w+ +time +\d+\.\d+", out)) == 2


@pytest.mark.slow
def test_a_constant_batch_is_all_that_is_seen():
    import input_cost

    run = setup.set_up(get_config("mlp"))
    constant = input_cost.with_constant_batch(run)
    (stage,), state = constant.stages, constant.state
    for index in range(2):
        turn = constant.turn(stage, index)
        shown = {name: x[0] for name, x in turn.data.items()}
        images, labels = stage.recipe.batch_fn(shown, None, None)
        assert np.array_equal(labels, run.inputs.train["label"][:8])
        np.testing.assert_allclose(images, run.inputs.task.show(run.inputs.train)[0][:8], rtol=1e-6)
        state, record = train.train_round(constant, state, index)
        assert np.isfinite(record["train_loss"])
    assert not np.array_equal(*(constant.turn(stage, k).draw["hidden1"].indices for k in (0, 1)))


def test_images_are_read_as_the_imagenet_config_says(capsys, monkeypatch):
    import image_pipeline

    monkeypatch.chdir(ROOT)  # of the default config
    # starts processes
    monkeypatch.setattr(image_pipeline, "read_all", lambda make, count, _: (1.0, float(count), 1.0))
    made = []
    monkeypatch.setattr(
        image_pipeline, "TrainBatches", lambda *args, **_: made.append(args[3]) or (lambda _: None)
    )
    monkeypatch.setattr(image_pipeline, "EvalBatches", lambda *_: lambda _: None)
    for size in ([], ["--size=56"]):
        assert image_pipeline.main(["image_pipeline", "--images=32", *size]) == 0
    whole = inputs.make_transform(setup.wanted_data(get_config("resnet", "imagenet")))
    assert made == [whole, whole._replace(size=56, resize=64)]
    assert "size 224" in capsys.readouterr().out


@pytest.mark.slow
def test_rounds_are_measured_in_turn(cifar10_small):
    configs = {method: get_config("mlp", method=method) for method in ("ist", "local_sgd")}
    times = cifar10_small.time_rounds(configs, 2)
    assert list(times) == ["ist", "local_sgd"]
    assert all(0 < seconds < 60 for pair in times.values() for seconds in pair)


def finished(method, rounds, megabytes, cpu, accuracies, **settings):
    records = [{"round": k + 1, "test_accuracy": a} for k, a in enumerate(accuracies)]
    records = [r if r["test_accuracy"] else {"round": r["round"]} for r in records]
    summary = {
        "rounds": rounds,
        "bytes_exchanged_per_worker": megabytes * 1e6,
        "test_accuracy": accuracies[-1],
    }
    config = get_config("resnet", method=method, **settings)
    return {"config": config, "summary": summary, "records": records, "seconds": (cpu / 2, cpu),
            "without_scale": None}  # fmt: skip


def test_equal_bytes_and_equal_time_are_read_between_evaluations(cifar10_small):
    own = finished("ist", 4, 50, 10.0, [None, None, None, 0.6])
    # half its bytes: round 2, between .1 before the first and .5 after the third; 40 s: round 40 / 12
    other = finished("local_sgd", 4, 100, 12.0, [None, None, 0.5, 0.7])
    by_bytes, by_time = cifar10_small.at_equal_cost(own, other)
    assert by_bytes == pytest.approx(0.1 + (0.5 - 0.1) * 2 / 3)
    assert by_time == pytest.approx(0.5 + 0.2 / 3)
    assert cifar10_small.at_equal_cost(other, own) == (None, None)  # it never cost as much


def test_the_table_compares_nets_of_one_kind(cifar10_small):
    there = {
        "ist": finished("ist", 4, 50, 10.0, [0.2, 0.3, 0.4, 0.6]),
        "local_sgd": finished("local_sgd", 4, 100, 20.0, [0.3, 0.4, 0.5, 0.7]),
        "wide_s3": finished("ist", 4, 60, 10.0, [0.2, 0.3, 0.4, 0.5], **{"model.width": 8}),
    }
    there["ist"]["without_scale"] = 0.55
    rows = cifar10_small.table(there).splitlines()
    assert {row.count("|") for row in rows} == {12}
    cells = [[cell.strip() for cell in row.split("|")[2:-1]] for row in rows[2:]]
    assert cells[0] == ["60.0", "55.0", "50", "5.0", "10.0", "40", "40.0", "40.0", "", ""]
    assert cells[1] == ["70.0", "", "100", "10.0", "20.0", "80", "", "", "", ""]
    assert cells[2] == ["50.0", "", "60", "5.0", "10.0", "40", "", "", "", ""]


@pytest.mark.slow
def test_an_accelerator_is_checked_and_timed():
    import accelerator

    still, *rounds = accelerator.check()
    assert still == "a round at learning rate 0 changes 0 numbers (0)"
    assert (
        all(float(re.search(r"at most (\S+) from", line)[1]) < 1e-3 for line in rounds) and len(rounds) == 2
    )
    config = accelerator.make(accelerator.Kind("ist", "float32", "map"), 8, True)
    run, seconds, examples, flops = accelerator.speed(config, "float32", 1)
    assert examples == pytest.approx(4 * 2 * 8 / seconds["local"])
    assert flops > 1e6 and set(accelerator.exchanged(run, seconds)) == {"gather", "merge"}
