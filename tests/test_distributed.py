"""Several processes on loopback: the same bits as one, signals to any of them, and a lost one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, get_config

from ist_jax import checkpoint, distributed, metrics, train

OVERRIDES = {
    "num_workers": 4, "rounds": 200, "eval_every": 50, "checkpoint.every": 10, "lost_after": 15.0,
    "model.hidden": (256, 256),
}  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(workdir, processes, *, slurm=False, **overrides):
    flags = [f"--config.{key}={value}" for key, value in (OVERRIDES | overrides).items()]
    command = [sys.executable, "-m", "ist_jax.main", f"--config={ROOT}/configs/mlp.py:smoke"]
    command += [*flags, f"--workdir={workdir}"]
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
        subprocess.Popen([*command, *own], cwd=ROOT, env=env, **pipes)
        for own, env in zip(each, environments, strict=True)
    ]


def wait_for_round(workdir, number, processes):
    deadline = time.monotonic() + 180
    while len(metrics.read_records(workdir)) < number:
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
    return train.train(get_config("mlp", **OVERRIDES), folder), metrics.read_records(folder)


def test_two_processes_stopped_lost_and_resumed_give_the_bits_of_one(whole, tmp_path):
    summary, records = whole
    workdir = tmp_path / "run"

    processes = launch(workdir, 2)
    wait_for_round(workdir, 5, processes)
    processes[1].send_signal(signal.SIGTERM)  # to one of them: both stop after the same round
    stopped = finish(processes)
    assert [code for code, _ in stopped] == [143, 143], stopped
    done = len(metrics.read_records(workdir))
    assert all(f"stopped after round {done} of 200" in text for _, text in stopped)
    assert checkpoint.rounds(workdir)[-1] == done < 200
    assert checkpoint.open_round(workdir, done).arrays["params/layer1/dense/kernel"]["pieces"][3][1] > 0

    processes = launch(workdir, 1)  # another number of processes goes on
    wait_for_round(workdir, done + 5, processes)
    processes[0].send_signal(signal.SIGINT)
    ((code, text),) = finish(processes)
    assert code == 130, text
    assert f"resuming {workdir} after round {done}" in text

    done = len(metrics.read_records(workdir))
    processes = launch(workdir, 2)
    wait_for_round(workdir, done + 12, processes)
    began = time.monotonic()
    processes[1].kill()
    processes[1].wait()
    (code, text), _ = finish(processes)
    assert code == distributed.LOST
    assert "process 1 of 2 has given no sign of life for 15 s" in text
    assert time.monotonic() - began < 15 + 15
    assert len(metrics.read_records(workdir)) - checkpoint.rounds(workdir)[-1] <= 10

    results = finish(launch(workdir, 2, slurm=True))
    assert [code for code, _ in results] == [0, 0], results
    resumed = json.loads((workdir / "summary.json").read_text())
    assert resumed["params_sha256"] == summary["params_sha256"]
    assert [r["round"] for r in metrics.read_records(workdir)] == list(range(1, 201))
    ours = [r["train_loss"] for r in metrics.read_records(workdir)]
    assert ours == [r["train_loss"] for r in records]
    table = {row["cause"]: row for row in json.loads((workdir / "ledger.json").read_text())["rows"]}
    assert table["round"]["formula"] == table["round"]["hlo"]
    assert table["round"]["wire"] == pytest.approx(table["round"]["formula"], rel=0.05)


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
