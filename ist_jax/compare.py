"""Variants of a config side by side: the same initial parameters, the same examples, several seeds.

python -m ist_jax.compare --config=configs/resnet.py [--methods=ist,local_sgd,data_parallel] [--seeds=3]
                          [--variant NAME:key=value,key=value ...] [--variants=FILE.py]
                          [--workdir=DIR] [--config.num_workers=8 ...]

A variant is a name and the keys that differ in it: `--variant outer:outer.name=nesterov,outer.momentum=0.5`,
or `VARIANTS = {"outer": {"outer.name": "nesterov"}}` in a file; `--variant plain` is the config as it is, and
each of `--methods` a variant of the method alone. Without any of them, all methods are compared.

Every run has a folder of its own, DIR/NAME-SEED, as by `ist_jax.main`; those that are finished are not
repeated, one that was stopped goes on. DIR/compare.json holds, by variant, mean and spread of accuracy (or of
another metric of the task; of the last evaluation), seconds (of all rounds, evaluation included) and bytes
(of a worker: exchanged, by the papers' count, and sent on the wire), and the runs' folders; DIR/report.html
draws them.
"""

import json
import logging
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from absl import flags
from ml_collections import ConfigDict

from ist_jax import cli, errors
from ist_jax.key import FILE, Options, Value

if TYPE_CHECKING:
    import flax.linen as nn

    from ist_jax.methods.optimizers import Given
    from ist_jax.runtime.setup import Run
    from ist_jax.tasks import Own
    from ist_jax.workdir.files import Json, Record, Summary

log = logging.getLogger("ist_jax.compare")  # also where this file is the command

Variants: TypeAlias = Mapping[str, Options]  # by name, the keys that differ
USAGE = (
    "python -m ist_jax.compare --config=FILE[:MODE] [--methods=LIST] [--variant NAME:KEY=VALUE,... ...] "
    "[--variants=FILE.py] [--seeds=N] [--workdir=DIR]"
)
# Keys, or sections, with another value of which a run sees other examples.
_EXAMPLES = ("seed", "num_workers", "batch_size", "epochs", "data")
# Keys of compare.json, beside that of the task's metric, and of the summary that they come from.
_FIGURES = {
    "seconds": "seconds_total",
    "bytes": "bytes_exchanged_per_worker",
    "bytes_local_sgd": "bytes_local_sgd_per_worker",
    "bytes_sent": "bytes_sent_per_worker",
}
_PAGE, _RESULT = "report.html", "compare.json"
_NAME = re.compile(r"\w[\w.+-]*")  # of a folder


def compare(
    config: ConfigDict,
    workdir: Path,
    *,
    variants: Variants,
    seeds: int,
    model: "nn.Module | None" = None,
    task: "Own | None" = None,
    given: "Given | None" = None,
) -> "dict[str, Json]":
    """Trains every variant with every seed, and writes what compare.json holds.

    Args:
      config: as from `configs/`; its seed is the first.
      workdir: holds a folder for each run, compare.json and report.html.
      variants: by name, such as {'outer': {'outer.name': 'nesterov'}}; `of_methods` makes those of methods.
      seeds: how many.
      model: as for `train.train`.
      task: the same.
      given: optimizer and learning rate of all variants, as for `train.train`; None: the config's.

    Returns:
      'metric': that of the task, by its fields; 'variants': by name 'overrides' (the keys that differ),
      'accuracy', or the other metric's name, 'seconds', 'bytes' (exchanged by a worker), 'bytes_local_sgd'
      (what local SGD would have exchanged) and 'bytes_sent' (by a worker, on the wire; None for runs of
      earlier versions), each with 'mean', 'min' and 'max' over the seeds, 'modelled' (of a run, a mean over
      the seeds: by link the fields of `costs.link.Link` and `costs.link.Modelled`; None for runs of earlier
      versions) and 'runs', the folders; 'start': by seed the hashes of what all variants began with.

    Raises:
      ValueError: a setting that cannot work, variants that would not see the same examples, or runs that did
        not begin alike.
      OSError: results could not be written.
    """
    from ist_jax.methods.optimizers import NOTHING_GIVEN
    from ist_jax.report import page
    from ist_jax.runtime.observers import show_runs
    from ist_jax.tasks.task import metric_of
    from ist_jax.workdir import files

    if len({_folder_name(name) for name in variants}) < len(variants):
        raise ValueError(f"two of the variants {', '.join(variants)} have one name; give one of them another")
    configs, given_own = _configs(config, variants), (model, task, given or NOTHING_GIVEN)
    _check_folder(workdir, [f"{_folder_name(x)}-{config.seed + n}" for x in variants for n in range(seeds)])
    runs: dict[str, dict[Path, Summary]] = {name: {} for name in variants}
    starts, last, total = {}, config.seed + seeds - 1, len(variants) * seeds
    named = f"seed {config.seed}" if seeds == 1 else f"seeds {config.seed} to {last}"
    log.info("%s, %s: %d runs in %s", ", ".join(variants), named, total, workdir)
    with show_runs(total) as show:
        place = Place(show, total)
        for seed in range(config.seed, last + 1):
            folders: list[Path] = []
            for name, own in configs.items():
                own.seed = seed
                folders.append(workdir / f"{_folder_name(name)}-{seed}")
                place.enter(f"{name}, seed {seed}")

                def started(run: "Run", folders: Sequence[Path] = tuple(folders)) -> None:
                    place.start(run)
                    _check_lengths(configs, run)
                    if run.schedule.first == 0:
                        _note_start(folders[-1], run)
                    _common_start(folders)

                runs[name][folders[-1]] = _train(own, folders[-1], given_own, started, place)
                place.leave()
            starts[str(seed)] = _common_start(folders)
    metric = metric_of(next(iter(next(iter(runs.values())).values())))
    keys = {metric.name: f"test_{metric.name}"} | _FIGURES
    figures: dict[str, dict[str, Json]] = {}
    for name, found in runs.items():
        spread = {figure: _spread([x.get(key) for x in found.values()]) for figure, key in keys.items()}
        about = {"overrides": dict(variants[name]), "modelled": _modelled(list(found.values()))}
        figures[name] = about | spread | {"runs": [folder.name for folder in found]}
    result = {"metric": metric._asdict(), "variants": figures, "start": starts}
    files.write_json(workdir / _RESULT, result)
    page.write_report({folder: name for name, found in runs.items() for folder in found}, workdir / _PAGE)
    return result


def of_methods(methods: Iterable[str]) -> Variants:
    """The variants that differ in the method alone, by its name."""
    return {method: {"method": method} for method in methods}


def of_texts(config: ConfigDict, texts: Sequence[str]) -> Variants:
    """Variants as --variant has them, 'NAME:key=value,key=value' or 'NAME'.

    Raises:
      ValueError: a key that is not there or given twice, a value that it cannot have, or a name given twice.
    """
    variants: dict[str, Options] = {}
    for text in texts:
        name, _, rest = text.partition(":")
        if name in variants:
            raise ValueError(f"--variant {name} is given twice; give one of them another name")
        found: dict[str, Value] = {}
        for pair in re.split(r",(?=[\w.]+=)", rest) if rest else ():  # a tuple has commas of its own
            key, is_pair, value = pair.partition("=")
            if not is_pair or key in found:
                wrong = f"{key} is given twice" if is_pair else f"{pair!r} is no key=value"
                raise ValueError(f"--variant {text}: {wrong}; give NAME:key=value,key=value")
            with _named(name):
                found[key] = cli.parse_value(config, key, value)
        variants[name] = found
    return variants


def of_file(path: str) -> Variants:
    """Variants as --variants has them: a file's dict VARIANTS, by name the keys that differ.

    Raises:
      ValueError: there is no such file, or no such dict in it.
    """
    from ist_jax import extension

    found: Value = extension.load(f"{path}:VARIANTS", {})
    every = [found, *found.values()] if isinstance(found, Mapping) else [None]
    if not all(isinstance(own, Mapping) and all(isinstance(key, str) for key in own) for own in every):
        raise ValueError(
            f"VARIANTS of {path} must be a dict of dicts, such as {{'whole': {{'method': 'local_sgd'}}}}"
        )
    return found


def _configs(config: ConfigDict, variants: Variants) -> dict[str, ConfigDict]:
    """By name, the config of each variant.

    Raises:
      ValueError: it cannot work, would see other examples, or is the same as another.
    """
    from ist_jax import config as configs
    from ist_jax.runtime import setup

    made: dict[str, ConfigDict] = {}
    for name, overrides in variants.items():
        if not _NAME.fullmatch(_folder_name(name)):
            raise ValueError(f"variant {name!r}: a name has letters, digits, '_', '.', '+' and '-' alone")
        with _named(name):
            for key in overrides:
                cli.check_key(config, key)
                if key in _EXAMPLES or key.split(".")[0] in _EXAMPLES:
                    raise ValueError(
                        f"with another {key} a run sees other examples, which is no comparison; set it for "
                        f"all of them, --config.{key}={overrides[key]}"
                    )
            own = config.copy_and_resolve_references()
            own = setup.for_method(own, overrides["method"]) if "method" in overrides else own
            try:
                own.update_from_flattened_dict(dict(overrides))
            except TypeError as error:
                raise ValueError(errors.one_line(error)) from error
            configs.check(own)
            for other, before in made.items():
                if configs.record(before) == configs.record(own):
                    raise ValueError(f"it has the settings of variant {other}; leave one of them out")
        made[name] = own
    return made


@contextmanager
def _named(variant: str) -> Iterator[None]:
    """Says of which variant a mistake is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"variant {variant}: {error}") from error


def _check_lengths(configs: Mapping[str, ConfigDict], run: "Run") -> None:
    """Raises ValueError where the variants take different numbers of steps; run: any of them, set up."""
    from ist_jax.runtime import inputs, setup

    count = inputs.count(run.inputs.train)
    schedules = {name: setup.make_schedule(own, count) for name, own in configs.items()}
    if len({schedule.steps_before(schedule.rounds) for schedule in schedules.values()}) > 1:
        told = ", ".join(
            f"{name} {schedules[name].rounds} x {own.local_steps}" for name, own in configs.items()
        )
        raise ValueError(
            f"the variants do not take the same number of steps (rounds x local_steps: {told}), so they see "
            "other examples; set rounds and local_steps of each, or the passes of its stages"
        )


def _train(
    config: ConfigDict,
    folder: Path,
    own: "tuple[nn.Module | None, Own | None, Given]",
    started: "Callable[[Run], None]",
    place: "Place",
) -> "Summary":
    """Trains a run of the comparison, or what remains of it, and returns its summary.

    Args:
      config: of the run.
      folder: its folder.
      own: model, task, optimizer and learning rate.
      started: is told of the run when it is set up.
      place: is told of its rounds.
    """
    from ist_jax import train
    from ist_jax.workdir import files

    with ExitStack() as claim:
        run = train.begin(config, folder, claim, *own)
        if run is None:
            return files.read_summary(folder)
        started(run)
        return train.run_rounds(run, folder, own=own[:2], progress=place.go_on)


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


def _folder_name(variant: str) -> str:
    """What the folders of a variant's runs begin with; a method FILE.py:NAME without its path."""
    return Path(variant).name.replace(".py:", "-") if FILE.fullmatch(variant) else variant


def _note_start(folder: Path, run: "Run") -> None:
    """Writes hashes of what a run begins with: parameters, and the examples of its first and last step."""
    import hashlib

    from ist_jax.data import batches
    from ist_jax.exchange.kinds import iter_leaves
    from ist_jax.workdir import files

    settings, digest = run.settings, hashlib.sha256()
    size = {"local_steps": settings["local_steps"], "batch_size": settings["batch_size"]}
    for index, step in ((0, 0), (int(run.schedule.starts[-1]) - 1, -1)):
        shown = batches.train_indices(settings["seed"], index, run.feed.shards, **size)
        digest.update(shown[:, step].tobytes())
    leaves = iter_leaves(run.stages[0].layout, run.state.params) if run.state.params else None
    params = leaves and files.params_sha256(leaves)
    start = {"params_sha256": params, "examples_sha256": digest.hexdigest()}
    files.write_json(folder / "start.json", start)


def _modelled(summaries: "Sequence[Summary]") -> "list[dict[str, float]] | None":
    """The modelled time of a run, a mean over the seeds, by link; None where messages were not counted."""
    from ist_jax.costs.link import LINKS, modelled

    keys = ("seconds_local", "bytes_sent_per_worker", "messages_sent_per_worker")
    if any(summary.get(key) is None for summary in summaries for key in keys[1:]):
        return None
    # a method without a phase 'local' computes elsewhere, as on the page
    local, sent, messages = (statistics.mean(x.get(key, 0.0) for x in summaries) for key in keys)
    return [link._asdict() | modelled(local, sent, messages, link)._asdict() for link in LINKS]


def table(result: "Mapping[str, Json]") -> str:
    """The comparison for people: means, and the least and most over the seeds."""
    from ist_jax.costs.traffic import megabytes
    from ist_jax.runtime.record import share
    from ist_jax.tasks.task import metric_of

    metric = metric_of(result)
    factor, digits, unit = (100, 2, " %") if metric.percent else (1, 4, "")
    first = max(14, *(len(name) + 1 for name in result["variants"]))
    heads = f"{f'test {metric.name}{unit}':>24}{'seconds':>24}"
    heads += f"{'MB exchanged':>14}{'share of':>11}{'MB sent on':>12}"
    lines = [
        f"{'':{first}}{heads}",
        f"{'':{first}}{'':48}{'by a worker':>14}{'local SGD':>11}{'the wire':>12}",
    ]
    for name, figures in result["variants"].items():
        reached, seconds = _text(figures[metric.name], factor, digits), _text(figures["seconds"], 1, 1)
        exchanged, full = figures["bytes"]["mean"], figures["bytes_local_sgd"]["mean"]
        part = "" if exchanged == full else share(exchanged, full).removesuffix(" of")
        sent = "-" if figures["bytes_sent"] is None else megabytes(figures["bytes_sent"]["mean"])
        sizes = f"{megabytes(exchanged):>14}{part:>11}{sent:>12}"
        lines.append(f"{name:{first}}{reached:>24}{seconds:>24}{sizes}")
    return "\n".join([*lines, *_modelled_table(result["variants"], first)])


def _modelled_table(variants: "Mapping[str, Json]", first: int) -> list[str]:
    """The lines of what is modelled, by link."""
    from ist_jax.costs.link import LINKS

    links = "".join(f"{f'{link.bandwidth_text}, {link.latency_text}':>28}" for link in LINKS)
    head = (f"{'s':>10}{'computing':>10}{'overlap':>8}") * len(LINKS)
    lines = ["", f"{'modelled':{first}}{links}", f"{'':{first}}{head}"]
    for name, figures in variants.items():
        cells = [
            f"{own['seconds']:>10,.1f}{own['utilisation']:>10.1%}{own['overlap_saves']:>8,.1f}"
            for own in figures["modelled"] or ()
        ]
        lines.append(f"{name:{first}}{''.join(cells) or '-'.rjust(10)}")
    told = "overlap: the seconds that overlapping exchange and steps would save at most; no run did so"
    return [*lines, told]


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


def _together(*every: Variants) -> Variants:
    """All variants. Raises ValueError where there are none, or two of one name."""
    names = [name for variants in every for name in variants]
    if not names:
        raise ValueError("there is no variant to compare; VARIANTS is empty")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"variant {twice[0]} is given twice; give one of them another name")
    return {name: own for variants in every for name, own in variants.items()}


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    values = flags.FlagValues()
    cli.define_config(values, argv, None)
    flags.DEFINE_list("methods", None, "methods to compare; default: all, if no variant is given", values)
    text = "a variant to compare, NAME:key=value,key=value; may be given several times"
    flags.DEFINE_multi_string("variant", [], text, flag_values=values)
    text = "a file with a dict VARIANTS: by name, the keys that differ, by name"
    flags.DEFINE_string("variants", None, text, flag_values=values)
    flags.DEFINE_integer("seeds", 3, "runs of each", flag_values=values, lower_bound=1)
    flags.DEFINE_string("workdir", None, "folder for the runs; default: a new one under runs/", values)
    cli.define_compilation_cache(values)
    cli.parse(values, argv, USAGE, required=["config"])
    from ist_jax.methods import METHODS  # JAX starts here

    others = bool(values.variant or values.variants)
    methods = ([] if others else list(METHODS)) if values.methods is None else values.methods
    unknown = [method for method in methods if method not in METHODS and not FILE.fullmatch(method)]
    if unknown or not (methods or others):
        known = ", ".join(METHODS)
        raise errors.fail(f"--methods={','.join(methods)}; give some of {known}, or FILE.py:NAME")
    with cli.errors(ValueError):
        variants = _together(
            of_methods(methods),
            of_file(values.variants) if values.variants is not None else {},
            of_texts(values.config, values.variant),
        )
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
            result = compare(values.config, workdir, variants=variants, seeds=values.seeds)
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
