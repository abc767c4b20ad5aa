"""Accuracy, time and bytes of the three methods on scikit-learn's digits: the table in README.md.

    python benchmarks/digits.py [--seeds=3] [--workdir=DIR]

`ist_jax.compare` with both default configs; runs that DIR holds are not repeated.
"""

import json
import sys
import tempfile
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from ist_jax import cli, compare

CONFIGS = ("configs/resnet.py", "configs/mlp.py")
METHODS = ("ist", "local_sgd", "data_parallel")  # of all of them: methods.py


def rows(config: str, folder: Path, seeds: int) -> list[str]:
    """A row of the table for each method."""
    probe = flags.FlagValues()
    config_flags.DEFINE_config_file("config", config, flag_values=probe, sys_argv=[])
    probe([""])
    result = compare.compare(probe.config, folder, variants=compare.of_methods(METHODS), seeds=seeds)
    lines = []
    for method, figures in result["variants"].items():
        summaries = [json.loads((folder / run / "summary.json").read_text()) for run in figures["runs"]]
        each = ", ".join(f"{100 * summary['test_accuracy']:.2f}" for summary in summaries)
        lines.append(
            f"| {config} | {method} | {100 * figures['accuracy']['mean']:.2f} ({each}) "
            f"| {figures['seconds']['mean']:.1f} | {figures['bytes']['mean'] / 1e6:,.1f} |"
        )
    return lines


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_integer("seeds", 3, "runs per method", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder for the runs; default: a temporary one", flag_values=values)
    cli.parse(values, argv, "python benchmarks/digits.py [--seeds=N] [--workdir=DIR]", required=[])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(values.workdir or temporary)
        table = [row for name in CONFIGS for row in rows(name, folder / Path(name).stem, values.seeds)]
    head = (
        "| config | method | test accuracy % (each seed) | seconds | MB per worker |",
        "|---|---|---|---|---|",
    )
    print(*head, *table, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
