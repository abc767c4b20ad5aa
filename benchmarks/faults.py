"""Kills, damaged files, memory over time and the price of checkpoints: the long versions of the tests.

    python benchmarks/faults.py --part=kills [--count=20]      SIGKILL at random instants, then go on
    python benchmarks/faults.py --part=damage [--count=200]    random damage to a checkpoint, then a load
    python benchmarks/faults.py --part=memory [--count=2000]   resident memory over so many rounds
    python benchmarks/faults.py --part=price                   what saving costs the default ResNet run

Prints a line per part, last; `benchmarks/RESULTS.md` has them.
"""

import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from absl import flags

from ist_jax import cli
from ist_jax.workdir import checkpoint, checkpoint_writer, files

SMOKE = [sys.executable, "-m", "ist_jax.main", "--config=configs/mlp.py:smoke"]
RUN = {"num_workers": 4, "rounds": 400, "eval_every": 100, "checkpoint.every": 20, "lost_after": 15.0}


def launch(workdir: Path, processes: int, settings: dict) -> list[subprocess.Popen]:
    command = [*SMOKE, f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in settings.items())]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    meeting = [f"--coordinator={address}", f"--num_processes={processes}"]
    each = [[*meeting, f"--process_id={n}"] for n in range(processes)] if processes > 1 else [[]]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [subprocess.Popen([*command, *own], **quiet) for own in each]


def finish(processes: list[subprocess.Popen]) -> list[int]:
    return [process.wait() for process in processes]


def kills(count: int, folder: Path) -> str:
    """Half of the runs in one process, half in two, of which one is killed."""
    finish(launch(folder / "whole", 1, RUN))
    wanted = json.loads((folder / "whole" / "summary.json").read_text())["params_sha256"]
    identical, lost, rng = 0, [], random.Random(0)
    for number in range(count):
        workdir, processes = folder / str(number), 1 + number % 2
        running = launch(workdir, processes, RUN)
        while not files.read_records(workdir):
            assert all(process.poll() is None for process in running), finish(running)
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 4))
        running[rng.randrange(processes)].send_signal(signal.SIGKILL)
        codes = finish(running)
        done, safe = len(files.read_records(workdir)), max(checkpoint.rounds(workdir), default=0)
        lost.append(done - safe)
        finish(launch(workdir, processes, RUN))
        same = json.loads((workdir / "summary.json").read_text())["params_sha256"] == wanted
        rounds = [r["round"] for r in files.read_records(workdir)]
        same = same and rounds == list(range(1, RUN["rounds"] + 1))
        identical += same
        print(
            f"kill {number}: {processes} process(es), exits {codes}, {done} rounds, {safe} safe: {same}",
            flush=True,
        )
    return f"{identical} of {count} kills resumed to an unbroken run's bits; at most {max(lost)} rounds lost"


def damage(count: int, folder: Path) -> str:
    """One file of a checkpoint truncated, deleted, or with a flipped bit."""
    finish(launch(folder / "run", 1, RUN | {"rounds": 20}))
    whole = checkpoint.open_round(folder / "run", 20)
    wanted = {name: whole.read(name) for name in whole.arrays}
    rng, outcomes = np.random.default_rng(0), Counter()
    for _ in range(count):
        target = folder / "damaged" / checkpoint.FOLDER / "20"
        shutil.rmtree(folder / "damaged", ignore_errors=True)
        shutil.copytree(whole.folder, target)
        files = sorted(path for path in target.rglob("*") if path.is_file())
        path = files[rng.integers(len(files))]
        content, kind = bytearray(path.read_bytes()), ("truncated", "deleted", "flipped")[rng.integers(3)]
        if kind == "deleted":
            path.unlink()
        elif kind == "truncated" or not content:
            path.write_bytes(content[: rng.integers(max(1, len(content)))])
        else:
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            path.write_bytes(content)
        try:
            saved = checkpoint.open_round(folder / "damaged", 20)
            got = {name: saved.read(name) for name in saved.arrays}
        except checkpoint.Damaged:
            outcomes[f"{kind}, detected"] += 1
        else:
            sound = got.keys() == wanted.keys() and all((got[n] == wanted[n]).all() for n in wanted)
            outcomes[f"{kind}, {'harmless' if sound else 'WRONG NUMBERS'}"] += 1
    return f"{count} damages: " + ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items()))


def memory(count: int, folder: Path) -> str:
    """Resident memory of the second and the last quarter of the rounds."""
    settings = RUN | {"rounds": count, "eval_every": 50}
    (process,) = launch(folder / "run", 1, settings)
    page, samples = os.sysconf("SC_PAGE_SIZE") / 2**20, []
    while process.poll() is None:
        done = len(files.read_records(folder / "run"))
        resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page
        samples.append((done / count, resident))
        time.sleep(0.2)
    second = statistics.mean(m for part, m in samples if 0.25 <= part < 0.5)
    last = statistics.mean(m for part, m in samples if 0.75 <= part < 1)
    return (
        f"resident over {count} rounds: {second:.1f} MiB in the second quarter, {last:.1f} in the last: "
        f"{last / second - 1:+.2%}"
    )


def price(_: int, folder: Path) -> str:
    """How long saves block the default ResNet run, and their share of its time."""
    from absl import flags as absl_flags
    from ml_collections import config_flags

    from ist_jax import train
    from ist_jax.runtime import setup as experiment
    from ist_jax.workdir import resume

    values = absl_flags.FlagValues()
    config_flags.DEFINE_config_file("config", "configs/resnet.py", flag_values=values, sys_argv=[])
    values(["price"])
    spent: dict[str, list[float]] = {"save": [], "wait": []}

    class Timed(checkpoint_writer.Writer):
        def save(self, *args: object) -> None:
            started = time.perf_counter()
            super().save(*args)
            spent["save"].append(time.perf_counter() - started)

        def wait(self) -> None:
            started = time.perf_counter()
            super().wait()
            spent["wait"].append(time.perf_counter() - started)

    checkpoint_writer.Writer = Timed
    run = experiment.set_up(values.config)
    resume.open_workdir(run.settings, folder / "run", None)
    started = time.perf_counter()
    train.run_rounds(run, folder / "run")
    total = time.perf_counter() - started
    blocked = [s * 1000 for s in spent["save"]]
    return (
        f"{len(blocked)} saves: {statistics.median(blocked):.1f} ms (median; most {max(blocked):.1f}), "
        f"with the waits {(sum(spent['save']) + sum(spent['wait'])) / total:.2%} of {total:.1f} s"
    )


PARTS = {"kills": (kills, 20), "damage": (damage, 200), "memory": (memory, 2000), "price": (price, 0)}


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_enum("part", None, list(PARTS), "what to do", flag_values=values)
    flags.DEFINE_integer("count", None, "how many; default: as above", flag_values=values)
    cli.parse(values, argv, "python benchmarks/faults.py --part=PART [--count=N]", required=["part"])
    part, default = PARTS[values.part]
    with tempfile.TemporaryDirectory() as folder:
        print(part(default if values.count is None else values.count, Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
