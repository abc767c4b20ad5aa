"""A net's channels dealt out, inner and all, against blocks (ResIST) of a net of the same size and local SGD.

    python benchmarks/channels.py [--work=digits|cifar10] [--variant=NAME ...] [--dir=DIR] [--seeds=3]
                                  [--workdir=runs/channels]

The net is that of configs/cnn.py:small; the one for blocks has its width and, within 4%, as many parameters,
in other sections. All variants of a work with the same number of workers see the same examples. The rate of
each is the best of a grid, as of methods.py; GFLOP of a step and MB of state, of a worker, are plan's. What
is finished is recorded in channels.json here and not repeated (delete its lines to measure again). --table
prints what is recorded.
"""

import statistics
import sys
from pathlib import Path

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
VARIANTS: dict[str, dict] = {
    "inner": {},
    "all": {"partition.channels": "all"},
    "blocks": BLOCKS,
    "local SGD": {"method": "local_sgd"},
    "local SGD of blocks' net": BLOCKS | {"method": "local_sgd"},
}
WORKERS = (2, 4)
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
    flags.DEFINE_string("dir", None, "data_dir of cifar10", flag_values=values)
    flags.DEFINE_float("epochs", None, "passes over the set, if not the config's", 0, flag_values=values)
    methods.define_flags(values, VARIANTS, "runs/channels")
    cli.parse(values, argv, USAGE, required=[])
    path, name = Path(values.results or Path(__file__).with_suffix(".json")), values.work
    results = methods.read(path)
    changes = WORKS[name] | {"eval_every": 0} | ({"data.dir": values.dir} if values.dir else {})
    changes |= {"epochs": values.epochs} if values.epochs else {}
    grid = GRID_EPOCHS.get(name, values.epochs)
    grid = min(grid, values.epochs) if values.epochs else grid
    with compilation_cache.kept(True):
        for workers in WORKERS:
            called = f"{name}, {workers} workers"
            folder, done = Path(values.workdir) / name / str(workers), results.setdefault(called, {})
            work = methods.Work(CONFIG, changes | {"num_workers": workers}, VARIANTS, folder, grid)
            methods.run(
                work,
                () if values.table else values.variant,
                done,
                lambda: files.write_json(path, results),
                values.seeds,
                lambda variant, _, work=work: costs(work, variant),
            )
            print(f"\n{called}\n\n{table(done)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
