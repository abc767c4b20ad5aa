"""Runs of `python -m ist_jax.main` in folders of their own, for the tables here."""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run(config: str, workdir: Path, settings: Sequence[str] = ()) -> dict:
    """Trains, unless the folder holds this very run, finished; returns its summary.

    Args:
      config: such as 'configs/mlp.py:speech2'.
      workdir: for the results.
      settings: such as 'num_workers=4', over those of the config.
    """
    flags = [f"--config.{setting}" for setting in settings]
    command = [sys.executable, "-m", "ist_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]
    print(workdir, file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads((workdir / "summary.json").read_text())


def percent(values: Sequence[float]) -> str:
    """'58.10 ± 0.42 (57.7, 58.1, 58.5)': mean, standard deviation and each of several fractions, in %."""
    each = [100 * value for value in values]
    spread = f" ± {statistics.stdev(each):.2f}" if len(each) > 1 else ""
    return f"{statistics.mean(each):.2f}{spread} ({', '.join(f'{value:.1f}' for value in each)})"
