"""A net's channels dealt out, inner and all, against blocks (ResIST) of a net of the same size and local SGD.

    python benchmarks/channels.py [--work=digits|cifar10] [--variant=NAME ...] [--dir=DIR] [--seeds=3]
                                  [--workdir=runs/channels]

The net is that of configs/cnn.py:small; the one for blocks has its width and, within 4%, as many parameters,
in other sections. All variants of a work with the same number of workers see the same examples. The rate of
each is the best of a grid, as of methods.py; GFLOP of a step and MB of state, of a worker, are plan's. What
is finished is recorded in channels.json here and not repeated (delete its lines to measure again). --table
prints what is recorded.
"""

import json
import statistics
import sys
from pathlib import Path

import jax
import methods
from absl import flags

from ist_jax import cli, data, plan
from ist_jax.runtime import compilation_cache
from ist_jax.workdir import files

CONFIG = "configs/cnn.py:small"
WORKS = {
    "digits": {"data.name": "digits", "data.pad": 1, "data.flip": False, "batch_size": 32, "epochs": 20.0},
    "cifar10": {},
}
BLOCKS = {  # of 6 in section 3 all but the first are dealt out
    "model.sections": (1, 1, 6, 1),
    "partition.sections": (3,),
    "partition.channels": "none",
    "partition.min_units": 2,
}
KINDS = {
    "inner": {},
    "all": {"partition.channels": "all"},
    "blocks": BLOCKS,
    "local SGD": {"method": "local_sgd"},
    "local SGD of blocks' net": BLOCKS | {"method": "local_sgd"},
}
VARIANTS = {f"{kind}, S = {s}": own | {"num_workers": s} for s in (2, 4) for kind, own in KINDS.items()}
GRID_EPOCHS = {"cifar10": 1.0}
USAGE = "python benchmarks/channels.py [--work=NAME] [--variant=NAME ...] [--dir=DIR] [--workdir=DIR]"


def costs(work: methods.Work, variant: str) -> dict[str, float]:
    """What plan says of a variant."""
    config = work.at(1.0)
    config.update_from_flattened_dict(work.variants[variant])
    cost = plan.predict(config, data.facts(config.data.name))
    return {
        "parameters_per_worker": cost.params_per_worker,
        "gigaflops": cost.flops_per_worker_per_step / 1e9,
        "state_megabytes": cost.state_bytes_per_worker / 1e6,
    }


def table(results: dict[str, dict]) -> str:
    """Markdown, a row for each variant."""
    rows = [
        "| | test % (each seed) | MB exchanged | parameters per worker | GFLOP a step | MB of state "
        "| learning rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, found in results.items():
        each = [100 * x for x in found["each"]]
        rows.append(
            f"| {variant} | {statistics.mean(each):.2f} ({', '.join(f'{x:.1f}' for x in each)}) "
            f"| {found['exchanged_megabytes']:,.1f} | {found['parameters_per_worker']:,} "
            f"| {found['gigaflops']:.3f} | {found['state_megabytes']:.1f} | {found['learning_rate']:g} |"
        )
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_enum("work", "digits", [*WORKS], "what is learned", flag_values=values)
    flags.DEFINE_multi_enum("variant", [*VARIANTS], [*VARIANTS], "which ones", flag_values=values)
    flags.DEFINE_string("dir", None, "data_dir of cifar10", flag_values=values)
    flags.DEFINE_string("workdir", "runs/channels", "folder for the runs", flag_values=values)
    flags.DEFINE_string("results", None, "file of what is recorded, if not the one here", flag_values=values)
    flags.DEFINE_integer("seeds", 3, "runs of each variant at its rate", lower_bound=1, flag_values=values)
    flags.DEFINE_float("epochs", None, "passes over the set, if not the config's", 0, flag_values=values)
    flags.DEFINE_boolean("table", False, "print what is there, train nothing", flag_values=values)
    cli.parse(values, argv, USAGE, required=[])
    path, name = Path(values.results or Path(__file__).with_suffix(".json")), values.work
    results: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}
    changes = WORKS[name] | {"eval_every": 0} | ({"data.dir": values.dir} if values.dir else {})
    changes |= {"epochs": values.epochs} if values.epochs else {}
    grid = GRID_EPOCHS.get(name, values.epochs)
    grid = min(grid, values.epochs) if values.epochs else grid
    work = methods.Work(CONFIG, changes, VARIANTS, Path(values.workdir) / name, grid)
    done = results.setdefault(name, {})
    with compilation_cache.kept(True):
        for variant in () if values.table else (own for own in values.variant if own not in done):
            found, _ = methods.measure(work, variant, variant, values.seeds)
            done[variant] = found | costs(work, variant)
            files.write_json(path, results)
            print(variant, json.dumps(done[variant]), flush=True)
            jax.clear_caches()  # of programs, which take memory
    print(table(done))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
