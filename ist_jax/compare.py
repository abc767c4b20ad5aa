"""The methods side by side: the same initial parameters, the same examples, several seeds.

python -m ist_jax.compare --config=configs/resnet.py [--methods=ist,local_sgd,data_parallel] [--seeds=3]
                          [--workdir=DIR] [--config.num_workers=8 ...]

Every run has a folder of its own, DIR/METHOD-SEED, as by `ist_jax.main`; those that are finished are not
repeated, one that was stopped goes on. DIR/compare.json holds, by method, mean and spread of accuracy (or of
another metric of the task; of the last evaluation), seconds (of all rounds, evaluation included) and bytes
(of a worker: exchanged, by the papers' count, and sent on the wire), and the runs' folders; DIR/report.html
draws them.
"""

import json
import logging
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict

from ist_jax import cli, errors
from ist_jax.key import FILE

if TYPE_CHECKING:
    import flax.linen as nn

    from ist_jax.runtime.setup import Run
    from ist_jax.tasks import Own
    from ist_jax.workdir.files import Json, Record, Summary

log = logging.getLogger("ist_jax.compare")  # also where this file is the command

USAGE = "python -m ist_jax.compare --config=FILE[:MODE] [--methods=LIST] [--seeds=N] [--workdir=DIR]"
# Keys of compare.json, beside that of the task's metric, and of the summary that they come from.
_FIGURES = {
    "seconds": "seconds_total",
    "bytes": "bytes_exchanged_per_worker",
    "bytes_local_sgd": "bytes_local_sgd_per_worker",
    "bytes_sent": "bytes_sent_per_worker",
}
_PAGE, _RESULT = "report.html", "compare.json"


def compare(
    config: ConfigDict,
    workdir: Path,
    *,
    methods: Sequence[str],
    seeds: int,
    model: "nn.Module | None" = None,
    task: "Own | None" = None,
) -> "dict[str, Json]":
    """Trains every method with every seed, and writes what compare.json holds.

    Args:
      config: as from `configs/`; its seed is the first.
      workdir: holds a folder for each run, compare.json and report.html.
      methods: such as ('ist', 'local_sgd').
      seeds: how many.
      model: as for `train.train`.
      task: the same.

    Returns:
      'metric': that of the task, by its fields; 'methods': by method 'accuracy', or the other metric's name,
      'seconds', 'bytes' (exchanged by a worker), 'bytes_local_sgd' (what local SGD would have exchanged) and
      'bytes_sent' (by a worker, on the wire; None for runs of earlier versions), each with 'mean', 'min' and
      'max' over the seeds, and 'runs', the folders; 'start': by seed the hashes of what all methods began
      with.

    Raises:
      ValueError: a setting that cannot work, or runs that did not begin alike.
      OSError: results could not be written.
    """
    from ist_jax.report import page
    from ist_jax.runtime import setup
    from ist_jax.runtime.observers import show_runs
    from ist_jax.tasks.task import metric_of
    from ist_jax.workdir import files

    if len({_folder_name(method) for method in methods}) < len(methods):
        raise ValueError(f"two of the methods {', '.join(methods)} have one name; give one of them another")
    _check_folder(workdir, [f"{_folder_name(m)}-{config.seed + n}" for m in methods for n in range(seeds)])
    runs: dict[str, dict[Path, dict[str, Json]]] = {method: {} for method in methods}
    starts, last = {}, config.seed + seeds - 1
    named = f"seed {config.seed}" if seeds == 1 else f"seeds {config.seed} to {last}"
    log.info("%s, %s: %d runs in %s", ", ".join(methods), named, len(methods) * seeds, workdir)
    with show_runs(len(methods) * seeds) as show:
        place = Place(show, len(methods) * seeds)
        for seed in range(config.seed, last + 1):
            for method in methods:
                own = setup.for_method(config, method)
                own.seed = seed
                folder = workdir / f"{_folder_name(method)}-{seed}"
                place.enter(f"{method}, seed {seed}")
                runs[method][folder] = _train(own, folder, (model, task), place)
                place.leave()
            starts[str(seed)] = _common_start([list(folders)[-1] for folders in runs.values()])
    metric = metric_of(next(iter(next(iter(runs.values())).values())))
    keys, figures = {metric.name: f"test_{metric.name}"} | _FIGURES, {}
    for method, folders in runs.items():
        found = {name: _spread([x.get(key) for x in folders.values()]) for name, key in keys.items()}
        figures[method] = found | {"runs": [folder.name for folder in folders]}
    result = {"metric": metric._asdict(), "methods": figures, "start": starts}
    files.write_json(workdir / _RESULT, result)
    page.write_report([folder for folders in runs.values() for folder in folders], workdir / _PAGE)
    return result


def _train(
    config: ConfigDict, folder: Path, own: "tuple[nn.Module | None, Own | None]", place: "Place"
) -> "Summary":
    """Trains a run of the comparison, or what remains of it; own: model and task. Returns its summary."""
    from ist_jax import train
    from ist_jax.workdir import files

    with ExitStack() as claim:
        run = train.begin(config, folder, claim, *own)
        if run is None:
            return files.read_summary(folder)
        place.start(run)
        if run.schedule.first == 0:
            _note_start(folder, run)
        return train.run_rounds(run, folder, own=own, progress=place.go_on)


class Place:
    """Where a comparison is: tells `show`, of `observers.show_runs`, of every round of every run."""

    def __init__(self, show: Callable[[float, float, str], None], total: int):
        self._show, self._total, self._text = show, total, ""
        self._done, self._skipped = 0, 0.0  # runs
        self._rounds = 0  # of the run that is going on, if any of it is left

    def enter(self, text: str) -> None:
        """A run comes next; it may be finished already."""
        self._text, self._rounds = f"run {self._done + 1} of {self._total}: {text}", 0
        self._show(self._done, self._skipped, self._text)

    def start(self, run: "Run") -> None:
        """It is set up."""
        self._rounds = run.schedule.rounds
        self._skipped += run.schedule.first / self._rounds

    def go_on(self, record: "Record") -> None:
        """A round of it is done."""
        text = f"{self._text}, round {record['round']} of {self._rounds}"
        self._show(self._done + record["round"] / self._rounds, self._skipped, text)

    def leave(self) -> None:
        """It is finished."""
        self._done += 1
        self._skipped += not self._rounds


def _check_folder(workdir: Path, planned: Sequence[str]) -> None:
    """Raises ValueError where a folder holds anything but runs, begun or planned, and what compares them."""
    runs = {path.parent.name for path in workdir.glob("*/config.json")}
    if foreign := errors.contents(workdir, {*runs, *planned, _PAGE, _RESULT}):
        raise ValueError(f"{workdir} holds {foreign}, but no comparison; choose a new or empty --workdir")


def _folder_name(method: str) -> str:
    """What the folders of a method's runs begin with; FILE.py:NAME without its path."""
    return Path(method).name.replace(".py:", "-")


def _note_start(folder: Path, run: "Run") -> None:
    """Writes hashes of what a run begins with: parameters, and the examples of its first and last round."""
    import hashlib

    from ist_jax.data import batches
    from ist_jax.exchange.kinds import iter_leaves
    from ist_jax.workdir import files

    settings, digest = run.settings, hashlib.sha256()
    size = {"local_steps": settings["local_steps"], "batch_size": settings["batch_size"]}
    for index in (0, run.schedule.rounds - 1):
        digest.update(batches.train_indices(settings["seed"], index, run.feed.shards, **size).tobytes())
    params = files.params_sha256(iter_leaves(run.layout, run.state.params)) if run.state.params else None
    start = {"params_sha256": params, "examples_sha256": digest.hexdigest()}
    files.write_json(folder / "start.json", start)


def table(result: "Mapping[str, Json]") -> str:
    """The comparison for people: means, and the least and most over the seeds."""
    from ist_jax.costs.traffic import megabytes
    from ist_jax.runtime.record import share
    from ist_jax.tasks.task import metric_of

    metric = metric_of(result)
    factor, digits, unit = (100, 2, " %") if metric.percent else (1, 4, "")
    first = max(14, *(len(method) + 1 for method in result["methods"]))
    heads = f"{f'test {metric.name}{unit}':>24}{'seconds':>24}"
    heads += f"{'MB exchanged':>14}{'share of':>11}{'MB sent on':>12}"
    lines = [
        f"{'':{first}}{heads}",
        f"{'':{first}}{'':48}{'by a worker':>14}{'local SGD':>11}{'the wire':>12}",
    ]
    for method, figures in result["methods"].items():
        reached, seconds = _text(figures[metric.name], factor, digits), _text(figures["seconds"], 1, 1)
        exchanged, full = figures["bytes"]["mean"], figures["bytes_local_sgd"]["mean"]
        part = "" if exchanged == full else share(exchanged, full).removesuffix(" of")
        sent = "-" if figures["bytes_sent"] is None else megabytes(figures["bytes_sent"]["mean"])
        sizes = f"{megabytes(exchanged):>14}{part:>11}{sent:>12}"
        lines.append(f"{method:{first}}{reached:>24}{seconds:>24}{sizes}")
    return "\n".join(lines)


def _text(figure: Mapping[str, float], factor: float, digits: int) -> str:
    mean, least, most = (f"{factor * figure[name]:,.{digits}f}" for name in ("mean", "min", "max"))
    return mean if figure["min"] == figure["max"] else f"{mean} ({least} to {most})"


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """None where one of them is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {"mean": statistics.mean(known), "min": min(known), "max": max(known)}


def _common_start(folders: Sequence[Path]) -> dict[str, str]:
    """What all of these runs began with; the nets of an ensemble begin each for themselves."""
    common: dict[str, str] = {}
    for folder in folders:
        if not (folder / "start.json").is_file():
            raise ValueError(f"{folder} is of a run by itself, no comparison's; choose another --workdir")
        start = json.loads((folder / "start.json").read_text())
        known = {name: x for name, x in start.items() if x is not None}
        if any(common.get(name, x) != x for name, x in known.items()):
            raise ValueError(f"{folder} did not begin as {folders[0].name} did; choose another --workdir")
        common |= known
    return common


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    values = flags.FlagValues()
    cli.define_config(values, argv, None)
    flags.DEFINE_list("methods", None, "methods to compare; default: all", values)
    flags.DEFINE_integer("seeds", 3, "runs of each method", flag_values=values, lower_bound=1)
    flags.DEFINE_string("workdir", None, "folder for the runs; default: a new one under runs/", values)
    cli.define_compilation_cache(values)
    cli.parse(values, argv, USAGE, required=["config"])
    from ist_jax.methods import METHODS  # JAX starts here

    methods = list(METHODS) if values.methods is None else list(dict.fromkeys(values.methods))
    unknown = [method for method in methods if method not in METHODS and not FILE.fullmatch(method)]
    if unknown or not methods:
        known = ", ".join(METHODS)
        raise errors.fail(f"--methods={','.join(methods)}; give some of {known}, or FILE.py:NAME")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)  # of the runs themselves, warnings alone

    from tqdm.contrib.logging import logging_redirect_tqdm

    from ist_jax import train
    from ist_jax.runtime import compilation_cache, signals
    from ist_jax.workdir.lock import check_writable

    workdir = cli.new_workdir(values, "compare-", "%Y%m%d-%H%M%S")
    try:
        kept = compilation_cache.kept(values.compilation_cache)
        with cli.errors(ValueError), signals.handled(deferred=False), logging_redirect_tqdm(), kept:
            check_writable(workdir)
            result = compare(values.config, workdir, methods=methods, seeds=values.seeds)
    except signals.Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except (train.Diverged, OSError) as error:  # such as a full disk: no mistake in the command
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(result))
    print(f"report: {workdir / _PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
