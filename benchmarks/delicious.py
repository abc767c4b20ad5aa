"""Precision, time and bytes of the three methods on the multi-label set Delicious: a table in RESULTS.md.

    python benchmarks/delicious.py --dir=DIR [--workdir=runs/delicious] [--seeds=3]

DIR holds the set's train.txt and test.txt. `configs/mlp.py:delicious`, evaluated at the end alone; the last
row has BatchNorm on the logits. One run at a time; finished ones in the folder are not repeated.
"""

import statistics
import sys
from pathlib import Path

import runs
from absl import flags

from ist_jax import cli

CONFIG = "configs/mlp.py:delicious"
VARIANTS = {
    "ist": ["method=ist"],
    "ist, momentum carried": ["method=ist", "optimizer_state=carry"],
    "local_sgd": ["method=local_sgd"],
    "data_parallel": ["method=data_parallel"],
    "data_parallel, output_norm": ["method=data_parallel", "model.output_norm=True"],
}
USAGE = "python benchmarks/delicious.py --dir=DIR [--workdir=DIR] [--seeds=N]"


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("dir", None, "folder of train.txt and test.txt", flag_values=values)
    flags.DEFINE_string("workdir", "runs/delicious", "folder for the runs", flag_values=values)
    flags.DEFINE_integer("seeds", 3, "runs per method", flag_values=values)
    cli.parse(values, argv, USAGE, required=["dir"])
    print("| method | P@1 %, mean ± deviation (each seed) | P@3 | P@5 | loss | seconds | MB per worker |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, own in VARIANTS.items():
        shared = [f"data.dir={values.dir}", "eval_every=0", *own]
        summaries = [
            runs.run(CONFIG, Path(values.workdir) / f"{name}-{seed}", [*shared, f"seed={seed}"])
            for seed in range(values.seeds)
        ]

        def mean(key: str, summaries: list[dict] = summaries) -> float:
            return statistics.mean(s[key] for s in summaries)

        print(
            f"| {name} | {runs.percent([s['test_p1'] for s in summaries])} "
            f"| {100 * mean('test_p3'):.2f} | {100 * mean('test_p5'):.2f} | {mean('test_loss'):.3f} "
            f"| {mean('seconds_total'):.0f} | {mean('bytes_exchanged_per_worker') / 1e6:,.1f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
