"""Several processes on loopback: the same bits as one, signals to any of them, and a lost one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from conftest import ROOT, get_config

from ist_jax import main, train
from ist_jax.runtime import processes as distributed
from ist_jax.runtime import signals
from ist_jax.workdir import checkpoint, files

OVERRIDES = {
    "num_workers": 4, "rounds": 200, "eval_every": 50, "checkpoint.every": 10, "lost_after": 8.0,
    "model.hidden": (256, 256),
}  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


PROGRAM = ("-m", "ist_jax.main")


def launch(workdir, processes, *, slurm=False, programs=(), **overrides):
    """Starts all; `programs` of some, by number, in place of the command's."""
    flags = [f"--config.{key}={value}" for key, value in (OVERRIDES | overrides).items()]
    command = [f"--config={ROOT}/configs/mlp.py:smoke", *flags, f"--workdir={workdir}"]
    meeting = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
    each = [[*meeting, f"--process_id={n}"] for n in range(processes)] if processes > 1 else [[]]
    environments = [os.environ | {"JAX_PLATFORMS": "cpu"} for _ in each]
    if slurm:  # what srun sets; JAX makes the port from the job's number
        each = [["--distributed"] for _ in each]
        job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "127.0.0.1"}
        job |= {"SLURM_NTASKS": str(processes)}
        environments = [
            env | job | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}
            for n, env in enumerate(environments)
        ]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *dict(programs).get(n, PROGRAM), *command, *own], cwd=ROOT, env=env, **pipes
        )
        for n, (own, env) in enumerate(zip(each, environments, strict=True))
    ]


def wait_for_round(workdir, number, processes):
    deadline = time.monotonic() + 180
    while len(files.read_records(workdir)) < number:
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        time.sleep(0.02)


def finish(processes):
    """[(exit code, stderr)] of all."""
    try:
        errors = [p.communicate(timeout=120)[1] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, text) for p, text in zip(processes, errors, strict=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The unbroken run, in one process on four devices."""
    folder = tmp_path_factory.mktemp("whole")
    return train.train(get_config("mlp", **OVERRIDES), folder), files.read_records(folder)


@pytest.mark.slow
def test_two_processes_stopped_lost_and_resumed_give_the_bits_of_one(whole, tmp_path):
    summary, records = whole
    workdir = tmp_path / "run"

    processes = launch(workdir, 2)
    wait_for_round(workdir, 5, processes)
    processes[1].send_signal(signal.SIGTERM)  # to one of them: both stop after the same round
    stopped = finish(processes)
    assert [code for code, _ in stopped] == [143, 143], stopped
    done = len(files.read_records(workdir))
    assert all(f"stopped after round {done} of 200" in text for _, text in stopped)
    assert checkpoint.rounds(workdir)[-1] == done < 200
    assert checkpoint.open_round(workdir, done).arrays["params/layer1/dense/kernel"]["pieces"][3][1] > 0

    processes = launch(workdir, 1)  # another number of processes goes on
    wait_for_round(workdir, done + 5, processes)
    processes[0].send_signal(signal.SIGINT)
    ((code, text),) = finish(processes)
    assert code == 130, text
    assert f"resuming {workdir} after round {done}" in text

    done = len(files.read_records(workdir))
    processes = launch(workdir, 2)
    wait_for_round(workdir, done + 12, processes)
    began = time.monotonic()
    processes[1].kill()
    processes[1].wait()
    (code, text), _ = finish(processes)
    assert code == distributed.LOST
    assert "process 1 of 2 has given no sign of life for 8 s" in text
    assert time.monotonic() - began < 15 + 15
    assert len(files.read_records(workdir)) - checkpoint.rounds(workdir)[-1] <= 10

    results = finish(launch(workdir, 2, slurm=True))
    assert [code for code, _ in results] == [0, 0], results
    resumed = json.loads((workdir / "summary.json").read_text())
    assert resumed["params_sha256"] == summary["params_sha256"]
    assert [r["round"] for r in files.read_records(workdir)] == list(range(1, 201))
    ours = [r["train_loss"] for r in files.read_records(workdir)]
    assert ours == [r["train_loss"] for r in records]
    table = {row["cause"]: row for row in json.loads((workdir / "ledger.json").read_text())["rows"]}
    assert table["round"]["expected"] == table["round"]["hlo"]
    for cause in ("gather", "round", "evaluation"):
        assert table[cause]["wire"] == pytest.approx(table[cause]["hlo"], rel=0.05), cause


SIGNALLED_TWICE = """
import os, signal, sys
from ist_jax import main
from ist_jax import train
real = train.train_round
def train_round(run, state, index, *more):
    if index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    return real(run, state, index, *more)
train.train_round = train_round
sys.exit(main.main(["main", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_process_that_ends_alone_is_missed_at_once(tmp_path):
    size = {"lost_after": 4.0, "model.hidden": (32, 32), "num_workers": 2}
    processes = launch(tmp_path, 2, programs={1: ("-c", SIGNALLED_TWICE)}, **size)
    processes[1].wait(100)
    began = time.monotonic()
    (code, text), (own_code, own_text) = finish(processes)
    assert time.monotonic() - began < 4 + 10
    assert (own_code, own_text.splitlines()[-1]) == (143, "interrupted")
    assert code == distributed.LOST
    assert "process 1 of 2 has given no sign of life for 4 s" in text


class Left(BaseException):
    pass


GLOO = ValueError("UNKNOWN: Gloo AllGather failed: connection closed by peer")


@pytest.mark.parametrize(
    ("error", "calls", "text"),
    [
        (None, ["stop"], ""),
        (signals.Interrupted(signal.SIGTERM, "stopped after round 3", agreed=True), ["stop"], "stopped afte"),
        (signals.Interrupted(signal.SIGINT), ["leave 130"], "interrupted"),
        (train.Diverged("worker 1"), ["stop"], "error: worker 1"),
        (OSError("no space"), ["leave 1"], "error: no space"),
        (SystemExit(2), ["leave 2"], ""),
        (RuntimeError("a worker process was killed"), ["leave 1"], "Traceback"),
        (ZeroDivisionError(), ["leave 1"], "Traceback"),
        (GLOO, ["explain", "leave 1"], "Traceback"),
        (jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed"), ["explain", "leave 1"], "Traceback"),
    ],
)
@pytest.mark.parametrize("several", [True, False])
def test_only_what_ends_all_processes_waits_for_them(several, error, calls, text, monkeypatch, capsys):
    def run_once(*_, **__):
        if error is not None:
            raise error

    def leave(code):
        called.append(f"leave {code}")
        raise Left

    called = []
    monkeypatch.setattr(main, "run_once", run_once)
    monkeypatch.setattr(distributed, "is_started", lambda: several)
    monkeypatch.setattr(distributed, "stop", lambda: called.append("stop"))
    monkeypatch.setattr(distributed, "explain", lambda: called.append("explain"))
    monkeypatch.setattr(distributed, "leave", leave)
    caught = None
    try:
        main.main(["main", f"--config={ROOT}/configs/mlp.py:smoke"])
    except BaseException as found:
        caught = found
    if several:
        assert called == calls
        assert isinstance(caught, Left) == (calls[-1] != "stop")
        assert capsys.readouterr().err.startswith(text)
    else:
        handled = error is None or isinstance(error, signals.Interrupted | train.Diverged | OSError)
        assert (caught, called) == ((None, ["stop"]) if handled else (error, []))


def test_a_stuck_run_ends(monkeypatch):
    ended = []
    monkeypatch.setattr(distributed, "end", lambda message: ended.append(message) or watch.stopped.set())
    monkeypatch.setattr(distributed, "_BEAT_SECONDS", 0.01)
    monkeypatch.setattr(distributed.Watch, "_look", lambda *_: None)
    watch = distributed.Watch(lost_after=5.0, stuck_after=0.05)
    watch.progress = ("round 7", time.monotonic())
    watch.start()
    watch.join(5)
    assert ended == ["nothing has happened for 0 s after round 7"]


@pytest.mark.slow
def test_two_processes_find_their_programs_again_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    left = []
    for name in ("first", "second"):
        done = finish(launch(tmp_path / name, 2, rounds=3, eval_every=0))
        assert [code for code, _ in done] == [0, 0], done
        used = {path.name: path.read_bytes() for path in (tmp_path / "cache").rglob("*-atime")}
        left.append((files.read_summary(tmp_path / name)["params_sha256"], used))
    (first, before), (second, after) = left
    assert first == second
    assert len(before) >= 4  # three phases, the evaluation and what takes a tenth of a second
    assert all(before[name] != after[name] for name in before)  # each was found, and when is noted
