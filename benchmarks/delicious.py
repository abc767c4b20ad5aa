"""Precision, time and bytes of the three methods on the multi-label set Delicious.

    python benchmarks/delicious.py --dir=DIR [--seeds=3]

DIR holds the set's train.txt and test.txt. Runs `python -m ist_jax.main` with `configs/mlp.py:delicious`, one
run at a time, each in a new folder; the last row has BatchNorm on the logits.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags

from ist_jax import cli

RUNS = {
    "ist": ["--config.method=ist"],
    "ist, momentum carried": ["--config.method=ist", "--config.optimizer_state=carry"],
    "local_sgd": ["--config.method=local_sgd"],
    "data_parallel": ["--config.method=data_parallel"],
    "data_parallel, output_norm": ["--config.method=data_parallel", "--config.model.output_norm=True"],
}


def run(directory: str, options: list[str], seed: int, workdir: Path) -> dict:
    command = [sys.executable, "-m", "ist_jax.main", "--config=configs/mlp.py:delicious",
               f"--workdir={workdir}", f"--config.data.dir={directory}", f"--config.seed={seed}",
               *options]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return json.loads((workdir / "summary.json").read_text())


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("dir", None, "folder of train.txt and test.txt", flag_values=values)
    flags.DEFINE_integer("seeds", 3, "runs per method", flag_values=values)
    cli.parse(values, argv, "python benchmarks/delicious.py --dir=DIR [--seeds=N]", required=["dir"])
    print("| method | P@1 % (each seed) | P@3 | P@5 | test loss | seconds | MB per worker |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, options in RUNS.items():
            runs = [
                run(values.dir, options, seed, Path(folder) / f"{name}-{seed}")
                for seed in range(values.seeds)
            ]
            each = ", ".join(f"{100 * r['test_p1']:.2f}" for r in runs)
            p1, p3, p5 = (100 * statistics.mean(r[f"test_p{k}"] for r in runs) for k in (1, 3, 5))
            loss, seconds = (statistics.mean(r[key] for r in runs) for key in ("test_loss", "seconds_total"))
            megabytes = runs[0]["bytes_exchanged_per_worker"] / 1e6
            print(
                f"| {name} | {p1:.2f} ({each}) | {p3:.2f} | {p5:.2f} | {loss:.3f} | {seconds:.1f} "
                f"| {megabytes:,.1f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
