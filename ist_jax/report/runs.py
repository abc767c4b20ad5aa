"""What a finished run recorded.

Its modelled time (`costs.link`) is that of S workers on machines of their own: its local steps, the phase
called 'local', took as long as they were measured here. Left out: the measured time of other phases (copies
within this machine), evaluation, and any overlap of sending with computing.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ist_jax import extension, partition
from ist_jax.deals import DEALS
from ist_jax.key import Settings
from ist_jax.tasks.task import ACCURACY, Metric, metric_of
from ist_jax.workdir import files
from ist_jax.workdir.files import Json, Record

Drawn = Sequence[tuple[partition.Assignment, np.ndarray]]  # by round; bool [S], who took part
MAPPED = 64  # units of a group, at most, whose workers are remembered by round
_SECONDS = "seconds_"  # and the name of a phase: a key of a record


class RunFiles(NamedTuple):
    """A finished run: what its folder holds."""

    folder: Path
    config: Settings  # flat, by dotted key
    summary: dict[str, Json]
    records: list[Record]
    ledger: Json  # None where there is none

    def column(self, key: str) -> np.ndarray:
        """A figure of all rounds, float64 [rounds]; NaN in rounds that lack it."""
        values = (record.get(key) for record in self.records)
        return np.array([np.nan if value is None else value for value in values], float)

    @property
    def phases(self) -> list[str]:
        """What the time of a round goes to, in the order of the records; the evaluation is one."""
        keys = dict.fromkeys(key for record in self.records for key in record)
        names = [key.removeprefix(_SECONDS) for key in keys if key.startswith(_SECONDS)]
        return [name for name in names if name != "round"]

    def seconds(self, phase: str) -> np.ndarray:
        """Of all rounds, float64 [rounds]; 0 in those that had no such phase."""
        return np.nan_to_num(self.column(_SECONDS + phase))

    def stages(self) -> np.ndarray:
        """Names, by round; '' where an earlier version recorded none."""
        return np.array([record.get("stage", "") for record in self.records])

    def messages(self) -> np.ndarray:
        """That a worker sent, float64 [rounds]; 0 in those of earlier versions, which did not count them."""
        return np.nan_to_num(self.column("messages_sent"))

    @property
    def method(self) -> str:
        """Its name, or those of the stages."""
        return self.summary["method"] if self.config.get("stages") else self.config["method"]

    @property
    def metric(self) -> Metric:
        """By which it is compared with others."""
        return metric_of(self.summary)

    def curve(self) -> "Curve":
        """The metric on the test set after each evaluated round."""
        metric, examples = self.metric, self.column("examples")
        value = self.column(f"test_{metric.name}")
        sums = [self.column(name) for name in ("bytes_per_worker", "bytes_sent", "seconds_round")]
        totals = map(np.cumsum, [*sums, self.seconds("local"), self.messages()])
        error = np.full(len(value), np.nan)
        if metric == ACCURACY:
            error = np.sqrt(value * (1 - value) / self.summary.get("test_examples", np.nan))
        scale = 100 if metric.percent else 1
        columns = (self.column("round"), examples, *totals, scale * value, scale * error)
        return Curve(*(column[np.isfinite(value)] for column in columns))


class Curve(NamedTuple):
    """The metric on the test set after each evaluated round, of a run or several; float64 [evaluations]."""

    round: np.ndarray
    examples: np.ndarray  # of all workers
    exchanged: np.ndarray  # bytes per worker, the papers' count
    bytes_sent: np.ndarray  # on the wire, by a worker
    seconds: np.ndarray  # as measured
    seconds_local: np.ndarray  # of them those of the phase "local"
    messages: np.ndarray  # sent by a worker
    value: np.ndarray  # of the metric; of an accuracy percent
    # percent, binomial: of one accuracy on the test set; NaN: its size is not known, or the metric is another
    standard_error: np.ndarray

    def first(self, target: float, metric: Metric) -> dict[str, float] | None:
        """The figures of the first evaluation as good as a value of the metric; None where there is none."""
        reached = np.flatnonzero(metric.better(self.value) >= metric.better(target))
        return {k: float(x[reached[0]]) for k, x in self._asdict().items()} if len(reached) else None


class Series(NamedTuple):
    """Runs of one config that differ in nothing but the seed."""

    label: str
    runs: list[RunFiles]

    def curves(self) -> list[Curve]:
        """A curve per run."""
        return [run.curve() for run in self.runs]

    def mean(self) -> Curve:
        """The mean over the runs, after the rounds that all of them evaluated; empty where there is none.

        Runs with a validation split are evaluated on the test set after their last round alone.
        """
        curves = self.curves()
        common = set.intersection(*(set(curve.round) for curve in curves))
        kept = [[column[[r in common for r in curve.round]] for column in curve] for curve in curves]
        return Curve(*np.mean(kept, axis=0))


def read_run(folder: Path) -> RunFiles:
    """Reads a run's folder.

    Raises:
      ValueError: it holds no finished run, or a file of it cannot be read.
    """
    config, summary = files.flatten(files.read_config(folder)), files.read_summary(folder)
    try:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        ledger = json.loads(path.read_text()) if (path := folder / "ledger.json").is_file() else None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the metrics or the ledger of {folder}: {error}") from None
    if not records:
        raise ValueError(f"{folder / 'metrics.jsonl'} holds no round")
    return RunFiles(folder, config, summary, records, ledger)


def group_by_config(runs: Sequence[RunFiles], names: Mapping[Path, str] | None = None) -> list[Series]:
    """Puts runs together that differ in nothing but the seed, in the order of their first runs.

    Labels are the names, by the runs' folders; without, the methods and, where several configs share one, the
    keys in which they differ.
    """
    groups: dict[str, list[RunFiles]] = {}
    for run in runs:
        settings = {k: v for k, v in run.config.items() if k != "seed"}
        settings["custom_model"] = run.summary["custom_model"]
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    firsts = [group[0] for group in groups.values()]
    labels = [names[first.folder] if names else _label(first, firsts) for first in firsts]
    if len(set(labels)) < len(labels):  # models of the user's own
        labels = [f"{label} ({first.folder.name})" for label, first in zip(labels, firsts, strict=True)]
    return [Series(label, group) for label, group in zip(labels, groups.values(), strict=True)]


class UnitMap(NamedTuple):
    """Who trained the units of a group, in evenly spaced rounds of a run."""

    group: partition.Group
    rounds: np.ndarray  # int [r], counted from 1: those drawn again
    counts: np.ndarray  # int [S, U]: in how many of them a worker trained a unit; layer after layer, L U
    columns: np.ndarray  # int [c]: the rounds of `trained`; none where more than `MAPPED` units are too many
    trained: np.ndarray  # bool [c, S, U]


def draw_maps(run: RunFiles, *, columns: int, budget: int) -> list[UnitMap]:
    """Draws a run's partitions again, from its seed and the groups in its summary.

    Rounds that were drawn for another number of workers, or by other rules, before the run was resumed are
    passed over. Workers that were absent or left out have trained nothing.

    Args:
      run: what its folder holds.
      columns: the most rounds in `trained`.
      budget: draw no more than so many entries, each a worker and unit of a round (at least one round).

    Returns:
      Per group, alphabetically; [] where all rounds are passed over, as in a warm-up to the end.
    """
    config, groups, dealt = run.config, _groups(run), _deal(run)
    if dealt is None:
        return []
    deal, rule = dealt
    same = partition.fingerprint(tuple(groups.values()), rule)
    records = [record for record in run.records if groups and record["partition"] == same]
    if not records:
        return []
    workers = run.summary["num_workers"]
    most = budget // (workers * sum(group.total for group in groups.values()))
    chosen = [records[i] for i in _spaced(len(records), max(1, most))]
    drawn = []
    for record in chosen:
        seed, index = config["seed"], record["round"] - 1
        present = partition.draw_present(seed, index, workers, config["participation"])
        here = present & ~np.isin(np.arange(workers), record["left_out"])
        drawn.append((partition.draw(seed, index, groups, deal), here))
    rounds, maps = np.array([record["round"] for record in chosen]), []
    for name, group in groups.items():
        maps.append(_map(group, rounds, [(draw[name], here) for draw, here in drawn], columns))
    return maps


def _groups(run: RunFiles) -> dict[str, partition.Group]:
    """What was dealt; none where an earlier version recorded too little to deal it again."""
    units = sorted(run.summary["units"].items())
    return {name: partition.Group.from_dict(unit) for name, unit in units if "num_workers" in unit}


def _deal(run: RunFiles) -> tuple[partition.Deal, str] | None:
    """Who got which units, and what tells that rule from others; None: its file is gone or another one."""
    name = run.config.get("partition.deal", "random")  # earlier versions have no other
    try:
        same = extension.digest(name) == run.config.get("files.partition.deal")
    except ValueError:  # the user's file is gone
        same = False
    return (extension.load(name, DEALS), extension.identity(name)) if same else None


def _map(group: partition.Group, rounds: np.ndarray, drawn: Drawn, columns: int) -> UnitMap:
    counts = np.zeros((group.num_workers, group.total), int)
    chosen = _spaced(len(rounds), columns) if group.total <= MAPPED else np.arange(0)
    shown = np.zeros((len(chosen), *counts.shape), bool)
    for place, ((indices, gates), here) in enumerate(drawn):
        trained = np.zeros(counts.shape, bool)
        worker, *layer = np.nonzero(gates)[:-1]
        trained[worker, indices[gates] + sum(layer) * group.size] = True
        trained &= here[:, None]
        counts += trained
        shown[chosen == place] = trained
    return UnitMap(group, rounds, counts, rounds[chosen], shown)


def _spaced(size: int, most: int) -> np.ndarray:
    """0, k, 2 k, ... below `size`: `most` of them at most."""
    return np.arange(0, size, -(-size // most))


def _label(run: RunFiles, others: Sequence[RunFiles]) -> str:
    """Its method and, where several configs share that, the keys in which they differ, the seed aside."""
    config, method = run.config, run.method
    alike = [other.config for other in others if other.method == method]
    keys = sorted(set().union(*alike) - {"seed"})
    differing = [key for key in keys if any(other.get(key) != config.get(key) for other in alike)]
    return ", ".join([method, *(f"{key}={config.get(key)}" for key in differing)])
