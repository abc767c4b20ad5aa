"""Nothing is lost: checkpoints, exact resume, signals, damaged files, faulty and absent workers."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, get_config

from ist_jax import data, main, partition, train
from ist_jax.exchange.kinds import from_params
from ist_jax.exchange.layout import make_layout
from ist_jax.methods.method import State
from ist_jax.runtime import signals
from ist_jax.runtime.devices import put
from ist_jax.workdir import checkpoint, checkpoint_writer, files, lock

MLP = f"--config={ROOT}/configs/mlp.py:smoke"
UNTIMED = (
    "round",
    "examples",
    "train_loss",
    "train_accuracy",
    "lr",
    "test_loss",
    "test_accuracy",
    "left_out",
)


def untimed(workdir):
    return [{k: r.get(k) for k in UNTIMED} for r in files.read_records(workdir)]


def stop_after(monkeypatch, number, signum=signal.SIGTERM):
    """A real signal in the middle of a round."""
    real = train.train_round

    def with_signal(run, state, index, *more):
        if index + 1 == number:
            os.kill(os.getpid(), signum)
        return real(run, state, index, *more)

    monkeypatch.setattr(train, "train_round", with_signal)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mlp", {"optimizer_state": "carry", "participation": 0.7}),
        pytest.param("mlp", {"method": "data_parallel"}, marks=pytest.mark.slow),  # see the sweep
        pytest.param(  # cosine, augmentation
            "resnet", {"num_workers": 3, "num_devices": 1, "data.sharing": "disjoint"}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(name, overrides, tmp_path, monkeypatch):
    config = get_config(name, rounds=4, **overrides)
    whole = train.train(config, tmp_path / "whole")
    for number in (1, 3):
        with monkeypatch.context() as patch, pytest.raises(signals.Interrupted, match=f"round {number} of 4"):
            stop_after(patch, number)
            train.train(config, tmp_path / "stopped")
    resumed = train.train(config, tmp_path / "stopped")
    assert resumed["params_sha256"] == whole["params_sha256"]
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "whole")
    wanted, got = (checkpoint.open_round(tmp_path / name, 4) for name in ("whole", "stopped"))
    assert got.arrays.keys() == wanted.arrays.keys()  # all fields of the state
    assert all((got.read(name) == wanted.read(name)).all() for name in wanted.arrays)
    assert resumed["bytes_exchanged_per_worker"] == whole["bytes_exchanged_per_worker"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_round_and_says_how_to_go_on(signum, code, tmp_path, monkeypatch, capsys):
    stop_after(monkeypatch, 2, signum)
    assert main.main(["main", MLP, f"--workdir={tmp_path}"]) == code
    assert "stopped after round 2 of 3; the same command goes on from there" in capsys.readouterr().err
    assert checkpoint.rounds(tmp_path)[-1] == 2
    assert not (tmp_path / "summary.json").exists()


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch, capsys):
    real = train.train_round

    def two_signals(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(train, "train_round", two_signals)
    assert main.main(["main", MLP, f"--workdir={tmp_path}"]) == 130
    assert files.read_records(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(30,), pytest.param((1, 30), marks=pytest.mark.slow)])
def test_killed_processes_resume_to_the_same_bits(kills, tmp_path):
    overrides = {"rounds": 150, "eval_every": 50, "checkpoint.every": 4}
    command = [
        sys.executable,
        "-m",
        "ist_jax.main",
        MLP,
        *(f"--config.{k}={v}" for k, v in overrides.items()),
    ]
    wanted = train.train(get_config("mlp", **overrides), tmp_path / "whole")
    workdir = tmp_path / "killed"
    for rounds in kills:
        process = subprocess.Popen([*command, f"--workdir={workdir}"], cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(files.read_records(workdir)) < rounds:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        done, safe = len(files.read_records(workdir)), checkpoint.rounds(workdir)
        assert done < 150  # it was killed in the middle
        assert done - max(safe, default=0) <= 4  # checkpoint.every
    done = subprocess.run([*command, f"--workdir={workdir}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["params_sha256"] == wanted["params_sha256"]
    assert untimed(workdir) == untimed(tmp_path / "whole")


@pytest.mark.slow
def test_more_rounds_and_other_workers_or_devices_go_on(tmp_path, caplog):
    for number, overrides in enumerate([{}, {"num_devices": 1}, {"num_workers": 4}, {"num_workers": 1}]):
        summary = train.train(get_config("mlp", rounds=3 * number + 3, **overrides), tmp_path)
        assert summary["rounds"] == 3 * number + 3
        assert [r["round"] for r in files.read_records(tmp_path)] == list(range(1, 3 * number + 4))
    assert summary["examples"] == 3 * 16 * (2 + 2 + 4 + 1)
    assert caplog.text.count("resuming") == 3
    with pytest.raises(ValueError, match=r"config.optimizer.momentum is 0.9 there and 0.5 here"):
        train.train(get_config("mlp", **{"optimizer.momentum": 0.5}), tmp_path)
    with pytest.raises(ValueError, match="has 12 rounds already, more than the 5"):
        train.train(get_config("mlp", rounds=5), tmp_path)


@pytest.mark.slow
def test_the_schedule_goes_on_by_examples_when_the_workers_change(tmp_path):
    overrides = {"optimizer.schedule": "step", "optimizer.step_at": (0.5,), "eval_every": 0}
    train.train(get_config("mlp", num_workers=4, rounds=6, **overrides), tmp_path)
    summary = train.train(get_config("mlp", num_workers=8, rounds=None, epochs=1.0, **overrides), tmp_path)
    records = files.read_records(tmp_path)[6:]
    assert len(records) == 9  # 6 x 64 examples were seen; 9 x 128 more make at least the 1,437 of an epoch
    total = summary["examples"]
    assert total == 6 * 64 + 9 * 128
    for record in records:
        before_last_step = record["examples"] - 8 * 8
        assert record["lr"] == pytest.approx(0.05 if before_last_step < total / 2 else 0.005)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same run on 2 and 3 devices: neither divides all of the leaves' sizes."""
    folder = tmp_path_factory.mktemp("stored")
    for devices in (2, 3):
        config = get_config("mlp", num_workers=6, num_devices=devices, optimizer_state="carry")
        train.train(config, folder / str(devices))
    return folder


def test_what_is_stored_does_not_depend_on_devices(stored):
    first, saved = (checkpoint.open_round(stored / number, 3) for number in ("2", "3"))
    paths = {name.removeprefix("params/") for name in first.arrays if name.startswith("params/")}
    assert first.arrays.keys() == {f"{tree}/{path}" for tree in ("params", "travels/0") for path in paths}
    assert saved.arrays.keys() == first.arrays.keys()
    for name, entry in saved.arrays.items():
        assert entry["shape"] == first.arrays[name]["shape"]
        assert (saved.read(name) == first.read(name)).all()
        metadata = json.loads((saved.folder / "model" / name / ".zarray").read_text())
        assert np.prod(metadata["shape"]) == np.prod(entry["shape"])  # no padding


def everything(num_devices, num_workers=4):
    """A layout with every kind of leaf, and a state with something in every field: whole, and split."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(5, 3)), "b": rng.normal(size=7), "c": rng.normal(size=(5, 7, 2))}
    shapes = {path: np.zeros(x.shape, np.float32) for path, x in params.items()}
    axes = {"a": ("units", None), "b": (None,), "c": ("units", "others", None)}
    groups = partition.make_groups(shapes, axes, num_workers)
    layout = make_layout(shapes, axes, groups, num_workers, num_devices)
    tree = {path: x.astype(np.float32) for path, x in params.items()}
    whole = State(
        params=tree,
        travels=({path: x + 1 for path, x in tree.items()}, np.int32(12)),  # as Adam's count
        stays=[{path: (2 * x).astype(jnp.bfloat16) for path, x in tree.items()}],
        own={"key": np.arange(num_workers, dtype=np.uint32), "rest": rng.normal(size=(num_workers, 3))},
    )
    whole = jax.tree.map(lambda x: np.asarray(x, np.float32 if x.dtype == np.float64 else x.dtype), whole)
    shards = jax.tree.map(
        lambda x: (
            from_params(layout, x) if isinstance(x, dict) else np.broadcast_to(x, (num_devices, *x.shape))
        ),
        whole._replace(own=()),
        is_leaf=lambda x: isinstance(x, dict),
    )
    own = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), whole.own)
    return layout, whole, shards._replace(own=own)


def on_one_device(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)


def save(layout, state, workdir):
    writer = checkpoint_writer.Writer(workdir, layout, keep=1)
    writer.save(put(state, jax.devices()[: layout.num_devices]), {"round": 1})
    writer.close()
    return checkpoint.open_round(workdir, 1)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (4, 1), (2, 4), (1, 2)])
def test_all_fields_of_a_state_come_back_on_other_devices(before, after, tmp_path):
    layout, whole, state = everything(before)
    saved = save(layout, state, tmp_path)
    trees = [f"{tree}/{path}" for tree in ("params", "travels/0", "stays/0") for path in "abc"]
    assert sorted(saved.arrays) == sorted([*trees, "travels/1", "own/0", "own/1"])
    assert saved.read("own/1").tolist() == whole.own["rest"].tolist()  # by workers, whatever the devices
    assert saved.read("travels/1") == 12
    layout, _, wanted = everything(after)
    got = saved.restore(layout, on_one_device(wanted), lambda x: x)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    params = checkpoint.load_params(tmp_path)
    assert params.keys() == whole.params.keys()
    assert all((params[path] == whole.params[path]).all() for path in params)


def test_a_state_of_another_model_method_or_number_of_workers_is_refused(tmp_path):
    layout, _, state = everything(2)
    saved = save(layout, state, tmp_path)

    def refusal(like, layout=layout):
        with pytest.raises(ValueError, match=r"choose another --workdir$") as refused:
            saved.restore(layout, on_one_device(like), lambda x: pytest.fail("nothing may be read"))
        return str(refused.value)

    what = "is of another model, method or version: "
    assert what + "travels/1 is int32 [] there and missing here" in refusal(
        state._replace(travels=state.travels[:1])
    )
    more = state._replace(own=state.own | {"s": state.own["key"]})
    assert what + "own/2 is missing there and uint32 [4] here" in refusal(more)
    wider = layout._replace(leaves=layout.leaves | {"b": layout.leaves["b"]._replace(shape=(8,))})
    assert what + "params/b is float32 [7] there and float32 [8] here" in refusal(state, wider)
    other, _, fewer = everything(2, num_workers=2)
    message = (
        "holds what each of 4 workers kept for itself, and num_workers=2; set config.num_workers to 4, or"
    )
    assert message in refusal(fewer, other)
    none = save(
        layout, state._replace(own=()), tmp_path / "none"
    )  # nothing of their own: other workers go on
    none.restore(other, on_one_device(fewer._replace(own=())), lambda x: x)
    crooked = on_one_device(state)._replace(own=jax.ShapeDtypeStruct((3,), np.float32))
    with pytest.raises(
        ValueError, match=r"own.* has shape \(3,\) on a device; its first axis must .* 2 workers"
    ):
        saved.restore(layout, crooked, lambda x: x)


def test_best_and_latest_checkpoints_are_kept(tmp_path):
    config = get_config("mlp", rounds=8, eval_every=1, **{"checkpoint.keep": 2})
    train.train(config, tmp_path)
    accuracies = {r["round"]: r["test_accuracy"] for r in files.read_records(tmp_path)}
    kept = checkpoint.rounds(tmp_path)
    assert kept[-2:] == [7, 8]
    assert len(kept) <= 3
    number = max(kept, key=lambda r: accuracies[r])
    assert accuracies[number] == max(accuracies.values())
    best, last = (checkpoint.load_params(tmp_path, which) for which in ("best", "last"))
    same = checkpoint.load_params(tmp_path / "checkpoints" / str(number))
    assert (best["output"]["dense"]["kernel"] == same["output"]["dense"]["kernel"]).all()
    assert number == 8 or (best["output"]["dense"]["kernel"] != last["output"]["dense"]["kernel"]).any()
    with pytest.raises(ValueError, match=r"no checkpoint of round 99; there are \["):
        checkpoint.load_params(tmp_path, 99)


@pytest.mark.parametrize("seed", range(24))
def test_damage_is_detected_or_harmless(seed, stored, tmp_path):
    source = stored / "2"
    wanted = {
        name: checkpoint.open_round(source, 3).read(name) for name in checkpoint.open_round(source, 3).arrays
    }
    damage(source / "checkpoints" / "3", tmp_path / "checkpoints" / "3", np.random.default_rng(seed))
    try:
        saved = checkpoint.open_round(tmp_path, 3)
        got = {name: saved.read(name) for name in saved.arrays}
    except checkpoint.Damaged as error:
        assert str(tmp_path) in str(error)
    else:
        assert got.keys() == wanted.keys()
        assert all((got[name] == wanted[name]).all() for name in wanted)


def damage(source, target, rng):
    """A copy with one file truncated, deleted, or with flipped bits."""
    shutil.copytree(source, target)
    files = sorted(p for p in target.rglob("*") if p.is_file())
    path = files[rng.integers(len(files))]
    content = bytearray(path.read_bytes())
    kind = rng.integers(3)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(content[: rng.integers(len(content))] if content else b"x")
    else:
        at = rng.integers(max(1, len(content)))
        content[at : at + 1] = bytes([(content[at] if content else 0) ^ (1 << rng.integers(8))])
        path.write_bytes(content)


@pytest.mark.parametrize(("error", "raised"), [(KeyError(), "KeyError"), (MemoryError(), None)])
def test_errors_without_a_text_and_too_little_memory(error, raised, stored, monkeypatch):
    def fail(*_):
        raise error

    saved = checkpoint.open_round(stored / "2", 3)
    monkeypatch.setattr(checkpoint.tensorstore, "open", fail)
    with pytest.raises(checkpoint.Damaged if raised else MemoryError, match=raised):
        checkpoint.verify(saved)


def test_the_newest_intact_checkpoint_is_used_and_damaged_ones_are_named(tmp_path, caplog):
    whole = train.train(get_config("mlp", rounds=6), tmp_path / "whole")
    workdir = tmp_path / "run"
    train.train(get_config("mlp", rounds=3), workdir)
    chunk = next(p for p in (workdir / "checkpoints" / "3").rglob("0.0") if p.is_file())
    content = bytearray(chunk.read_bytes())
    content[5] ^= 4
    chunk.write_bytes(content)
    resumed = train.train(get_config("mlp", rounds=6), workdir)
    assert "the checkpoint of round 3 cannot be used" in caplog.text
    assert "after round 2; 1 later ones are trained again" in caplog.text
    assert resumed["params_sha256"] == whole["params_sha256"]
    assert (workdir / "checkpoints" / "damaged-3").is_dir()


def test_without_an_intact_checkpoint_nothing_starts_from_scratch(tmp_path):
    train.train(get_config("mlp", rounds=3), tmp_path)
    for path in (tmp_path / "checkpoints").rglob("index-0.json"):
        path.write_text("{}")
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* is intact"):
        train.train(get_config("mlp", rounds=6), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="a run of 3 rounds without a checkpoint"):
        train.train(get_config("mlp", rounds=6), tmp_path)
    seldom = get_config("mlp", rounds=6, **{"checkpoint.every": 50})
    files.write_json(tmp_path / "config.json", seldom.to_dict() | {"rounds": 3})  # finished: it had one
    with pytest.raises(ValueError, match="a run of 3 rounds without a checkpoint"):
        train.train(seldom, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="a run without its config"):
        train.train(seldom, tmp_path)
    assert len(files.read_records(tmp_path)) == 3


def test_a_checkpoint_beyond_the_metrics_gives_way_to_an_older_one(tmp_path, caplog):
    whole = train.train(get_config("mlp", rounds=4), tmp_path / "whole")
    workdir = tmp_path / "run"
    train.train(get_config("mlp", rounds=3), workdir)
    files.write_records(workdir, files.read_records(workdir)[:2])  # as power may be lost
    resumed = train.train(get_config("mlp", rounds=4), workdir)
    assert "round 3 cannot be used: metrics.jsonl ends at round 2" in caplog.text
    assert resumed["params_sha256"] == whole["params_sha256"]
    assert [r["round"] for r in files.read_records(workdir)] == [1, 2, 3, 4]


def test_one_run_at_a_time_writes_to_a_folder(tmp_path):
    with lock.claimed(tmp_path / "new" / "run"):
        with pytest.raises(ValueError, match="another run is writing to"):
            train.train(get_config("mlp"), tmp_path / "new" / "run")
        (tmp_path / "new" / "run" / "metrics.jsonl").touch()
    assert (tmp_path / "new" / "run" / "metrics.jsonl").is_file()
    with lock.claimed(tmp_path / "other" / "run"):
        assert (tmp_path / "other" / "run").is_dir()  # made, and nothing came of it
    assert not (tmp_path / "other").exists()
    assert train.train(get_config("mlp"), tmp_path / "new" / "run")["rounds"] == 3


def test_a_full_disk_is_reported_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    real, rounds = checkpoint_writer._write_piece, []

    async def full_for_a_while(folder, piece, entry):
        if "3." in folder.parent.name or folder.parent.name.startswith("3"):
            rounds.append(3)
            raise OSError(errno.ENOSPC, "No space left on device")
        await real(folder, piece, entry)

    monkeypatch.setattr(checkpoint_writer, "_write_piece", full_for_a_while)
    whole = train.train(get_config("mlp", rounds=5), tmp_path)
    assert rounds
    assert "could not be written, training goes on; the last one is of round 2" in caplog.text
    assert "No space left on device" in caplog.text
    assert whole["rounds"] == 5
    assert 3 not in checkpoint.rounds(tmp_path)
    assert checkpoint.rounds(tmp_path)[-1] == 5


@pytest.mark.parametrize("where", ["NamedTemporaryFile", "write_records"])
def test_a_full_disk_before_the_first_round_is_no_mistake_of_the_user(where, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files if where == "write_records" else lock.tempfile, where, full)
        assert main.main(["main", MLP, f"--workdir={tmp_path}/run"]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert (
        f"written to {tmp_path}/run: No space" in line
        or f"write to --workdir={tmp_path}/run: No space" in line
    )
    assert not checkpoint.rounds(tmp_path / "run")


def test_data_that_cannot_be_read_are_the_users_mistake(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "data/train.txt")

    monkeypatch.setattr(data, "open_data_set", refuse)
    with pytest.raises(SystemExit) as stop:
        main.main(["main", MLP, f"--workdir={tmp_path}"])
    assert stop.value.code == 2
    assert "Permission denied: 'data/train.txt'" in capsys.readouterr().err


def test_a_full_disk_at_the_end_is_no_finished_run(tmp_path, monkeypatch, capsys):
    async def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "_write_piece", full)
        assert main.main(["main", MLP, f"--workdir={tmp_path}"]) == 1
    assert "the checkpoint of round 3 could not be written" in capsys.readouterr().err
    assert not (tmp_path / "summary.json").exists()


def test_a_worker_that_stays_sick_stops_the_run(tmp_path, capsys):
    flags = ["--config.rounds=9", "--config.max_rounds_left_out=4", "--config.optimizer.learning_rate=1e38"]
    code = main.main(["main", MLP, f"--workdir={tmp_path}", *flags])
    assert code == 1
    assert "error: round 4: worker 0 has been left out 4 times in a row" in capsys.readouterr().err
    assert checkpoint.rounds(tmp_path)[-1] == 4


@pytest.mark.parametrize(
    "method",
    ["ist", *(pytest.param(name, marks=pytest.mark.slow) for name in ("local_sgd", "data_parallel"))],
)
def test_absent_workers_change_nothing(method, tmp_path):
    none = train.train(get_config("mlp", method=method, participation=0.0), tmp_path / "none")
    assert none["workers_absent"] == 6
    assert none["train_loss"] is None
    still = train.train(
        get_config("mlp", method=method, **{"optimizer.learning_rate": 0.0, "optimizer.weight_decay": 0.0}),
        tmp_path / "still",
    )
    assert none["params_sha256"] == still["params_sha256"]
    some = train.train(get_config("mlp", method=method, participation=0.5, rounds=8), tmp_path / "some")
    absent = [r["workers_absent"] for r in files.read_records(tmp_path / "some")]
    assert 0 < sum(absent) < 16
    assert some["workers_absent"] == sum(absent)
