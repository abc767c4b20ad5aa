"""Accuracy of the three methods on ten spoken words: the table in benchmarks/RESULTS.md.

    python benchmarks/speech.py --dir=DIR [--workdir=runs/speech] [--seeds=3] [--epochs=80]

DIR holds a folder of WAV files per word. The net and numbers of configs/mlp.py:speech2, but fewer epochs;
every run sees the same number of examples. One run at a time; finished ones in the folder are not repeated.
"""

import statistics
import sys
from pathlib import Path

import runs
from absl import flags

from ist_jax import cli

CONFIG = "configs/mlp.py:speech2"
WORDS = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes")
METHODS = ("ist", "local_sgd", "data_parallel")
USAGE = "python benchmarks/speech.py --dir=DIR [--workdir=DIR] [--seeds=N] [--epochs=E]"


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("dir", None, "folder of WAV files per word", flag_values=values)
    flags.DEFINE_string("workdir", "runs/speech", "folder for the runs", flag_values=values)
    flags.DEFINE_integer("seeds", 3, "runs per method", flag_values=values)
    flags.DEFINE_float("epochs", 80.0, "passes of all workers together", flag_values=values)
    cli.parse(values, argv, USAGE, required=["dir"])
    shared = [f"data.dir={values.dir}", f"data.words={WORDS}", f"epochs={values.epochs}", "eval_every=0"]
    print("| S | method | rounds | test accuracy %, mean ± deviation (each seed) | MB per worker | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for workers in (2, 4):
        for method in METHODS:
            own = [*shared, f"num_workers={workers}", f"method={method}"]
            summaries = [
                runs.run(CONFIG, Path(values.workdir) / f"{method}-{workers}-{seed}", [*own, f"seed={seed}"])
                for seed in range(values.seeds)
            ]
            seconds = statistics.mean(s["seconds_total"] for s in summaries)
            print(
                f"| {workers} | `{method}` | {summaries[0]['rounds']} "
                f"| {runs.percent([s['test_accuracy'] for s in summaries])} "
                f"| {summaries[0]['bytes_exchanged_per_worker'] / 1e6:,.0f} | {seconds:.0f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
