"""A transformer trained as subnets against local SGD, DiLoCo and others, by bits per byte and bytes.

    python benchmarks/transformer.py --path=FILE.txt [--variant=NAME ...] [--workdir=DIR] [--seeds=3]

The config is configs/transformer.py:chars with 4 workers, of a file's text. All variants see the same
examples; the small net, by data-parallel SGD, has 4 of the 10 blocks, about as many weights as a subnet. The
rate of each is the best of a grid, as of methods.py. What is finished is recorded in transformer.json here
and not repeated (delete its lines to measure again). --table prints what is recorded.
"""

import statistics
import sys
from pathlib import Path

import methods
from absl import flags

from ist_jax import cli
from ist_jax.partition import Group
from ist_jax.runtime import compilation_cache
from ist_jax.workdir import files

CONFIG = "configs/transformer.py:chars"
DILOCO = {"outer.name": "nesterov", "outer.learning_rate": 0.7, "outer.momentum": 0.9}
LOCAL = "local SGD"  # whose bytes are 100%
VARIANTS: dict[str, dict] = {
    "heads and neurons": {},
    "blocks": {"partition.units": "blocks"},
    "all": {"partition.units": "all"},
    "heads and neurons, outer Nesterov": {"outer.name": "nesterov"},
    "heads and neurons, keep": {"optimizer_state": "keep"},
    LOCAL: {"method": "local_sgd"},
    "DiLoCo": {"method": "local_sgd"} | DILOCO,
    "data-parallel": {"method": "data_parallel"},
    "Federated Dropout": {"partition.deal": "independent"},
    "small net": {"method": "data_parallel", "model.layers": 4},
}
GRID_EPOCHS = 1.0
USAGE = "python benchmarks/transformer.py --path=FILE.txt [--variant=NAME ...] [--workdir=DIR] [--seeds=N]"


def coverage(summary: dict) -> float:
    """The share of the units that somebody trains in a round; 1 where none are dealt out."""
    groups = [Group.from_dict(group) for group in summary["units"].values()]
    trained = sum(group.total * group.coverage for group in groups)
    return trained / sum(group.total for group in groups) if groups else 1.0


def about(summary: dict) -> dict[str, float]:
    """What the table says of a run beside its score."""
    return {"parameters_per_worker": summary["parameters_per_worker"], "coverage": coverage(summary)}


def table(results: dict[str, dict]) -> str:
    """Markdown, a row for each variant."""
    rows = [
        "| | bits per byte (each seed) | parameters per worker | MB exchanged | of local SGD's | coverage "
        "| learning rate |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = results.get(LOCAL, {}).get("exchanged_megabytes")
    for variant, found in results.items():
        each, sent = found["each"], found["exchanged_megabytes"]
        share = f"{sent / whole:.1%}" if whole else ""
        rows.append(
            f"| {variant} | {statistics.mean(each):.3f} ({', '.join(f'{x:.3f}' for x in each)}) "
            f"| {found['parameters_per_worker']:,.0f} | {sent:,.1f} | {share} | {found['coverage']:.0%} "
            f"| {found['learning_rate']:g} |"
        )
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("path", "", "text file", flag_values=values)
    flags.DEFINE_float("epochs", None, "passes over the text, if not the config's", 0, flag_values=values)
    methods.define_flags(values, VARIANTS, "runs/transformer")
    cli.parse(values, argv, USAGE, required=[])
    path = Path(values.results or Path(__file__).with_suffix(".json"))
    results = methods.read(path)
    changes = {"data.path": values.path, "eval_every": 0, "num_workers": 4}
    changes |= {"epochs": values.epochs} if values.epochs else {}
    grid = min(GRID_EPOCHS, values.epochs or GRID_EPOCHS)
    work = methods.Work(CONFIG, changes, VARIANTS, Path(values.workdir), grid)
    with compilation_cache.kept(True):
        methods.run(
            work,
            () if values.table else values.variant,
            results,
            lambda: files.write_json(path, results),
            values.seeds,
            lambda _, summaries: about(summaries[0]),
        )
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
