"""ResIST against local SGD and data-parallel SGD on CIFAR-10, and what narrows the gap: one table.

    python benchmarks/cifar10_small.py --dir=DIR [--workdir=runs/cifar10_small] [--train] [--rounds=3]

DIR is tensorflow-datasets' data_dir. With --train, trains configs/resnet.py:cifar10_small and its variants,
one at a time, one seed, all with the same examples; finished runs in the folder are not repeated. Then
evaluates the ResIST runs without their scale, measures a round of every variant (all in turn, in one process,
so that a noisy machine troubles all alike), and prints the table of the runs that are there.

"Equal bytes" and "equal time" are the test accuracy that local SGD or data-parallel SGD had, in the run of
the same net, when it had sent as much, or used as many CPU seconds, as the variant in all. Its learning rate
is then still high, as its schedule is that of the whole run.
"""

import json
import sys
from pathlib import Path

import numpy as np
import runs
from absl import flags
from input_cost import time_round

from ist_jax import cli, errors, train
from ist_jax.config import restore
from ist_jax.runtime import setup
from ist_jax.workdir import checkpoint, files

CONFIG = "configs/resnet.py:cifar10_small"
VARIANTS = {
    "ist": ("ResIST: section 3, 3 of 8 blocks each", ()),
    "local_sgd": ("local SGD", ("method=local_sgd",)),
    "local_sgd_reset": ("local SGD, momentum restarted", ("method=local_sgd", "optimizer_state=reset")),
    "data_parallel": ("data-parallel SGD", ("method=data_parallel",)),
    "min0": ("ResIST, 2 blocks each: no overlap", ("partition.min_units=0",)),
    "min4": ("ResIST, 4 blocks each", ("partition.min_units=4",)),
    "carry": (
        "ResIST, 2 blocks each, momentum travels along",
        ("partition.min_units=0", "optimizer_state=carry"),
    ),
    "l80": ("ResIST, 2 blocks each, l = 80", ("partition.min_units=0", "local_steps=80")),
    "wide_s3": (
        "ResIST, sections 2-2-6-2, section 3",
        ("partition.min_units=0", "model.sections=(2,2,6,2)"),
    ),
    "wide_all": (
        "ResIST, sections 2-2-6-2, all sections",
        ("partition.min_units=0", "model.sections=(2,2,6,2)", "partition.sections=(1,2,3,4)"),
    ),
    "wide_strided": (
        "ResIST, sections 2-2-6-2, all sections, strided blocks dealt out as well",
        (
            "partition.min_units=0",
            "model.sections=(2,2,6,2)",
            "partition.sections=(1,2,3,4)",
            "partition.deal_strided=True",
        ),
    ),
}
USAGE = "python benchmarks/cifar10_small.py --dir=DIR [--workdir=DIR] [--train] [--rounds=N]"


def read(folder: Path) -> dict:
    """What a finished run left: 'config', 'summary' and 'records'."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "config": restore(files.read_config(folder)),
        "summary": files.read_summary(folder),
        "records": records,
    }


def without_scale(folder: Path, config) -> float:
    """Test accuracy of a run's parameters with residual branches as they were trained."""
    config.partition.scale_at_evaluation = False
    run = setup.set_up(config, params=checkpoint.load_params(folder), evaluation_only=True)
    return train.score(run, run.state).value


def time_rounds(configs: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """Median (wall, CPU) seconds of a round of each config, measured in turn after one to warm up."""
    ready, states, feed = {}, {}, None
    for name, config in configs.items():
        run = setup.set_up(config)
        feed = feed or run.feed  # one copy of the data set for all
        own = run.feed._replace(data=feed.data)
        turn = setup.turn_maker(config, own, run.schedule)
        states[name] = run.state
        stages = tuple(stage._replace(splits={}) for stage in run.stages)
        ready[name] = run._replace(stages=stages, state=None, feed=own, turn=turn)
    times: dict[str, list] = {name: [] for name in configs}
    for index in range(rounds + 1):
        for name, run in ready.items():
            states[name], *seconds = time_round(run, states[name], index)
            times[name] += [seconds] if index else []
    return {name: tuple(np.median(pairs, 0).tolist()) for name, pairs in times.items()}


def accuracy_at(records: list[dict], round_number: float) -> float | None:
    """Test accuracy after so many rounds, between evaluations in a straight line; None after the last."""
    known = [(r["round"], r["test_accuracy"]) for r in records if r.get("test_accuracy") is not None]
    if round_number > known[-1][0]:
        return None
    return float(np.interp(round_number, [0, *(k for k, _ in known)], [0.1, *(a for _, a in known)]))


def at_equal_cost(own: dict, other: dict) -> tuple[float | None, float | None]:
    """Accuracy of another run when it had cost as much as this one in all: (in bytes, in CPU time)."""
    rounds = own["summary"]["rounds"], other["summary"]["rounds"]
    sent, other_sent = (run["summary"]["bytes_exchanged_per_worker"] for run in (own, other))
    by_bytes = rounds[1] * sent / other_sent
    by_time = rounds[0] * own["seconds"][1] / other["seconds"][1]
    return accuracy_at(other["records"], by_bytes), accuracy_at(other["records"], by_time)


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def table(there: dict[str, dict]) -> str:
    """The markdown table of the runs."""
    lines = [
        "| | accuracy % | without scale | MB per worker | s per round | CPU s per round | CPU s in all "
        "| local SGD at equal bytes | at equal time | data-parallel at equal bytes | at equal time |",
        "|" + "---|" * 11,
    ]
    for name, run in there.items():
        compared = []
        for other in (there.get(baseline) for baseline in ("local_sgd", "data_parallel")):
            known = other and run["config"].method == "ist" and other["config"].model == run["config"].model
            compared += at_equal_cost(run, other) if known else (None, None)
        summary, (wall, cpu) = run["summary"], run["seconds"]
        cells = [
            VARIANTS[name][0],
            percent(summary["test_accuracy"]),
            percent(run["without_scale"]),
            f"{summary['bytes_exchanged_per_worker'] / 1e6:,.0f}",
            f"{wall:.1f}",
            f"{cpu:.1f}",
            f"{summary['rounds'] * cpu:,.0f}",
            *map(percent, compared),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("dir", None, "tensorflow-datasets' data_dir", flag_values=values)
    flags.DEFINE_string("workdir", "runs/cifar10_small", "folder for the runs", flag_values=values)
    flags.DEFINE_boolean("train", False, "train what is not there (hours)", flag_values=values)
    flags.DEFINE_integer("rounds", 3, "rounds of each variant to measure", flag_values=values)
    cli.parse(values, argv, USAGE, required=["dir"])
    workdir = Path(values.workdir)
    for name, (_, settings) in VARIANTS.items() if values.train else ():
        runs.run(CONFIG, workdir / name, [f"data.dir={values.dir}", *settings])
    there = {name: read(workdir / name) for name in VARIANTS if (workdir / name / "summary.json").is_file()}
    if not there:
        raise errors.fail(f"{workdir} holds no finished run; --train trains them")
    configs = {name: run["config"].copy_and_resolve_references() for name, run in there.items()}
    for config in configs.values():
        config.data.dir = values.dir
    kept = workdir / "measured.json"
    measured = json.loads(kept.read_text()) if kept.is_file() else {"seconds": {}, "without_scale": {}}
    for name, config in configs.items():
        if config.method == "ist" and name not in measured["without_scale"]:
            own = config.copy_and_resolve_references()
            measured["without_scale"][name] = without_scale(workdir / name, own)
    if measured["seconds"].keys() < there.keys():  # all at once, or they could not be compared
        measured["seconds"] = time_rounds(configs, values.rounds)
    kept.write_text(json.dumps(measured, indent=2) + "\n")
    for name, run in there.items():
        run |= {"seconds": measured["seconds"][name], "without_scale": measured["without_scale"].get(name)}
    print(table(there))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
