"""Accuracy, time and bytes of the three methods on scikit-learn's digits: the table in README.md.

    python benchmarks/digits.py [--seeds=3]

Runs `python -m ist_jax.main` with the default configs, one run at a time, each in a new folder.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags

from ist_jax import cli

METHODS = ("ist", "local_sgd", "data_parallel")


def run(config: str, method: str, seed: int, folder: Path) -> dict:
    workdir = folder / f"{Path(config).stem}-{method}-{seed}"
    command = [sys.executable, "-m", "ist_jax.main", f"--config={config}", f"--workdir={workdir}",
               f"--config.method={method}", f"--config.seed={seed}"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return json.loads((workdir / "summary.json").read_text())


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_integer("seeds", 3, "runs per method", flag_values=values)
    cli.parse(values, argv, "python benchmarks/digits.py [--seeds=N]", required=[])
    print("| config | method | test accuracy % (each seed) | seconds | MB per worker |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for config in ("configs/resnet.py", "configs/mlp.py"):
            for method in METHODS:
                runs = [run(config, method, seed, Path(folder)) for seed in range(values.seeds)]
                accuracies = [100 * r["test_accuracy"] for r in runs]
                each = ", ".join(f"{a:.2f}" for a in accuracies)
                seconds = statistics.mean(r["seconds_total"] for r in runs)
                megabytes = runs[0]["bytes_exchanged_per_worker"] / 1e6
                print(
                    f"| {config} | {method} | {statistics.mean(accuracies):.2f} ({each}) | {seconds:.1f} "
                    f"| {megabytes:,.1f} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
