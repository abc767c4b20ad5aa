"""Every method, optimizer's state, outer optimizer, deal and codec at a learning rate of its own: one table.

    python benchmarks/methods.py [--work=resnet,mlp] [--dir=DIR] [--workdir=runs/methods] [--seeds=3]

The rate of each variant is the best of one grid by the examples that are held out of the training set
(data.validation, seed 0; cifar10_small's grid by runs of a fifth of the length); then it is trained on all
of them, with every seed, and the test set is looked at once, after the last round. A codec takes the rate
of what it makes smaller. All variants of a work see the same examples. What is finished is recorded in
methods.json here and not repeated (delete its lines to measure again); a run that was stopped goes on, in
its folder. --table prints what is recorded.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from ist_jax import cli, compare
from ist_jax.runtime import compilation_cache
from ist_jax.workdir import files

WORKS = {  # config, and what it changes; digits in short runs, as the long ones end near 100%
    "resnet": ("configs/resnet.py", {"eval_every": 0, "epochs": 10.0}),
    "mlp": ("configs/mlp.py", {"eval_every": 0, "epochs": 50.0}),
    "delicious": ("configs/mlp.py:delicious", {"eval_every": 0}),
    "cifar10_small": ("configs/resnet.py:cifar10_small", {"eval_every": 0}),
}
FACTORS = (0.5, 1.0, 2.0, 4.0)  # the grid, times the config's learning rate
GRID_EPOCHS = {"cifar10_small": 1.0}  # where the grid's runs are shorter than those at the chosen rate
HELD_OUT = 0.2
BITS = "exchange.{}_bits"


def _bits(gather: int, merge: int) -> dict:
    return {BITS.format("gather"): gather, BITS.format("merge"): merge}


LOCAL = {"method": "local_sgd"}
VARIANTS: dict[str, dict] = {
    "ist": {},
    "ist keep": {"optimizer_state": "keep"},
    "ist carry": {"optimizer_state": "carry"},
    "ist outer sgd": {"outer.name": "sgd"},
    "ist outer nesterov": {"outer.name": "nesterov"},
    "ist outer adam": {"outer.name": "adam"},
    "ist keep, outer nesterov": {"optimizer_state": "keep", "outer.name": "nesterov"},
    "ist 8/8 bits": _bits(8, 8),
    "ist 8/4 bits": _bits(8, 4),
    "ist 4/4 bits": _bits(4, 4),
    "ist rolling": {"partition.deal": "rolling"},
    "ist fixed": {"partition.deal": "fixed"},
    "ist independent": {"partition.deal": "independent"},
    "local_sgd keep": LOCAL,
    "local_sgd reset": LOCAL | {"optimizer_state": "reset"},
    "local_sgd outer nesterov": LOCAL | {"outer.name": "nesterov"},
    "local_sgd 8/8 bits": LOCAL | _bits(8, 8),
    "local_sgd 8/4 bits, feedback": LOCAL | _bits(8, 4) | {"exchange.error_feedback": True},
    "ist largest quarter": {"exchange.keep": 0.25},
    "ensemble": {"method": "ensemble"},
    "data_parallel": {"method": "data_parallel"},
    "power_sgd": {"method": "power_sgd"},
}
RATE_OF = {  # codecs: what they make smaller, at whose rate they are trained
    "ist 8/8 bits": "ist",
    "ist 8/4 bits": "ist",
    "ist 4/4 bits": "ist",
    "ist largest quarter": "ist",
    "local_sgd 8/8 bits": "local_sgd keep",
    "local_sgd 8/4 bits, feedback": "local_sgd keep",
}
USAGE = "python benchmarks/methods.py [--work=NAME,...] [--variants=NAME,...] [--dir=DIR] [--workdir=DIR]"


class Work(NamedTuple):
    """What is trained, by which variants.

    Attributes:
      config: such as 'configs/mlp.py:smoke'.
      changes: keys that differ from it, in all variants.
      variants: by name, the keys that differ.
      workdir: for the runs.
      grid_epochs: of the grid's runs; None: of as many as the others.
    """

    config: str
    changes: dict
    variants: dict[str, dict]
    workdir: Path
    grid_epochs: float | None = None

    def at(self, rate: float) -> ConfigDict:
        """The config at so many times its learning rate."""
        probe = flags.FlagValues()
        config_flags.DEFINE_config_file("config", self.config, flag_values=probe, sys_argv=[])
        probe([""])
        config = probe.config
        config.update_from_flattened_dict(self.changes)
        config.optimizer.learning_rate *= rate
        return config


def get_work(name: str, folder: str | None, workdir: Path) -> Work:
    """A line of `WORKS`."""
    path, changes = WORKS[name]
    changes = changes | ({"data.dir": folder} if folder else {})
    return Work(path, changes, VARIANTS, workdir / name, GRID_EPOCHS.get(name))


def name_of(variant: str, *more: object) -> str:
    """What a folder is called by."""
    words = variant.replace(",", "").replace("/", "-").split()
    return "_".join([*words, *map(str, more)])


def search(work: Work, variant: str) -> tuple[dict[float, float], float]:
    """What is reached on held-out examples at each rate of the grid, and the best of them."""
    held_out = {}
    for factor in FACTORS:
        config = work.at(factor)
        config.data.validation = HELD_OUT
        config.epochs = work.grid_epochs or config.epochs
        place = work.workdir / name_of(variant, factor)
        found = compare.compare(config, place, variants={"grid": work.variants[variant]}, seeds=1)
        metric = found["metric"]
        last = files.read_records(place / found["variants"]["grid"]["runs"][0])[-1]
        held_out[factor] = last[f"validation_{metric['name']}"]
    return held_out, (max if metric["higher_is_better"] else min)(held_out, key=lambda x: held_out[x])


def measure(work: Work, variant: str, rate_of: str, seeds: int) -> tuple[dict, list[dict]]:
    """Chooses a variant's rate, that of `rate_of`, and trains it.

    Returns:
      What a table says of it, and the runs' summaries.
    """
    own = work.variants[variant]
    held_out, best = search(work, rate_of)
    place, config = work.workdir / name_of(variant, "final", best), work.at(best)
    found = compare.compare(config, place, variants={"final": own}, seeds=seeds)
    metric, figures = found["metric"], found["variants"]["final"]
    summaries = [files.read_summary(place / run) for run in figures["runs"]]
    about = {
        "overrides": own,
        "metric": metric["name"],
        "held_out": held_out,
        "learning_rate": config.optimizer.learning_rate,
        "each": [summary[f"test_{metric['name']}"] for summary in summaries],
        "exchanged_megabytes": figures["bytes"]["mean"] / 1e6,
        "sent_megabytes": figures["bytes_sent"]["mean"] / 1e6,
    }
    return about, summaries


def run(
    work: Work,
    variants: Iterable[str],
    done: dict[str, dict],
    save: Callable[[], None],
    seeds: int,
    more: Callable[[str, list[dict]], dict] = lambda variant, summaries: {},
) -> None:
    """Measures the variants that are not in `done` yet, and saves each there as soon as it is finished.

    Args:
      work: what is trained.
      variants: their names.
      done: what is recorded, by name.
      save: writes it.
      seeds: runs of each.
      more: what else is recorded of a variant, of its name and its runs' summaries.
    """
    for variant in (name for name in variants if name not in done):
        found, summaries = measure(work, variant, RATE_OF.get(variant, variant), seeds)
        done[variant] = found | more(variant, summaries)
        save()
        print(variant, json.dumps(done[variant]), flush=True)
        jax.clear_caches()  # of programs, which take memory


def define_flags(values: flags.FlagValues, variants: Iterable[str], workdir: str) -> None:
    """The flags of this script and of those like it."""
    names = [*variants]
    flags.DEFINE_multi_enum("variant", names, names, "which ones", flag_values=values)
    flags.DEFINE_string("workdir", workdir, "folder for the runs", flag_values=values)
    flags.DEFINE_integer("seeds", 3, "runs of each variant at its rate", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("table", False, "print what is there, train nothing", flag_values=values)
    flags.DEFINE_string("results", None, "file of what is recorded, if not the one here", flag_values=values)


def read(path: Path) -> dict[str, dict]:
    """What is recorded in a file; {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def table(results: dict[str, dict]) -> str:
    """Markdown, a row for each variant of a work."""
    rows = [
        "| | test % (each seed) | learning rate | held out % at "
        f"{', '.join(f'{f:g}x' for f in FACTORS)} | MB exchanged |",
        "|---|---|---|---|---|",
    ]
    for variant, found in results.items():
        each = [100 * x for x in found["each"]]
        spread = f" ± {statistics.stdev(each):.2f}" if len(each) > 1 else ""
        grid = ", ".join(f"{100 * x:.1f}" for x in found["held_out"].values())
        rows.append(
            f"| {variant} | {statistics.mean(each):.2f}{spread} ({', '.join(f'{x:.1f}' for x in each)}) "
            f"| {found['learning_rate']:g} | {grid} | {found['exchanged_megabytes']:,.1f} |"
        )
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_multi_enum("work", ["resnet", "mlp"], [*WORKS], "what is trained", flag_values=values)
    flags.DEFINE_string("dir", None, "data_dir of delicious and cifar10_small", flag_values=values)
    define_flags(values, VARIANTS, "runs/methods")
    cli.parse(values, argv, USAGE, required=[])
    path = Path(values.results or Path(__file__).with_suffix(".json"))
    results = read(path)
    with compilation_cache.kept(True):
        for work in () if values.table else values.work:
            own, done = get_work(work, values.dir, Path(values.workdir)), results.setdefault(work, {})
            print(work, flush=True)
            run(own, values.variant, done, lambda: files.write_json(path, results), values.seeds)
    for work in values.work:
        print(f"\n{work}\n\n{table(results.get(work, {}))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
