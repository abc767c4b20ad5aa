"""What a finished run recorded, and what its rounds would take over a network.

The modelled time of a round is that of S workers on machines of their own: the local steps took as long as
they were measured here, and everything a worker sends passes through its link of a given bandwidth,

  modelled seconds = measured seconds of the local steps + 8 x bytes sent by a worker / bits per second.

Left out: the measured gather and merge (copies within this machine), evaluation, latency, and any
overlap of sending with computing.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from ist_jax import partition, results

BANDWIDTHS = (1e8, 1e9, 1e10)  # bits per second: 0.1, 1 and 10 Gb/s


class Trace(NamedTuple):
    """A finished run: what its folder holds."""

    folder: Path
    config: dict[str, Any]  # flat, by dotted key
    summary: dict[str, Any]
    records: list[dict[str, Any]]  # a line of metrics.jsonl per round
    ledger: Any  # ledger.json; None where there is none

    def column(self, key: str) -> np.ndarray:
        """A figure of all rounds, float64 [rounds]; NaN in rounds that lack it."""
        values = (record.get(key) for record in self.records)
        return np.array([np.nan if value is None else value for value in values], float)

    def bytes_sent(self) -> np.ndarray:
        """Bytes that a worker has sent by the end of each round, float64 [rounds]."""
        return np.arange(1, len(self.records) + 1) * bytes_sent_per_round(self.summary)


class Curve(NamedTuple):
    """Test accuracy after each evaluated round, of a run or of several on average; float64 [evaluations]."""

    round: np.ndarray
    examples: np.ndarray  # of all workers
    bytes_sent: np.ndarray  # by a worker
    seconds_local: np.ndarray  # of the local steps, as measured
    accuracy: np.ndarray  # percent


class Series(NamedTuple):
    """Runs of one config that differ in nothing but the seed."""

    label: str
    traces: list[Trace]

    def curves(self) -> list[Curve]:
        """A curve per run."""
        return [_curve(trace) for trace in self.traces]

    def mean(self) -> Curve:
        """The mean over the runs, after the rounds that all of them evaluated."""
        curves = self.curves()
        common = set.intersection(*(set(curve.round) for curve in curves))
        kept = [[column[[r in common for r in curve.round]] for column in curve] for curve in curves]
        return Curve(*np.mean(kept, axis=0))


def read_trace(folder: Path) -> Trace:
    """Reads a run's folder.

    Raises:
      ValueError: it holds no finished run, or a file of it cannot be read.
    """
    config = traverse_util.flatten_dict(results.read_config(folder).to_dict(), sep=".")
    summary = results.read_summary(folder)
    try:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        ledger = json.loads(path.read_text()) if (path := folder / "ledger.json").is_file() else None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the metrics or the ledger of {folder}: {error}") from None
    if not records:
        raise ValueError(f"{folder / 'metrics.jsonl'} holds no round")
    return Trace(folder, config, summary, records, ledger)


def bytes_sent_per_round(summary: dict[str, Any]) -> float:
    """Bytes that a worker on a machine of its own sends in a round.

    The papers' count of both directions x (S - 1) / S, since 1 / S of what is exchanged is its own: it
    sends slices of the others' units at the gather and its own units home at the merge; shared leaves,
    and the gradients of data-parallel SGD, travel as in a ring all-reduce.

    Args:
      summary: of the run, as in summary.json.
    """
    workers = summary["num_workers"]
    return summary["bytes_exchanged_per_worker"] / summary["rounds"] * (workers - 1) / workers


def modelled_seconds(seconds_local: np.ndarray, bytes_sent: np.ndarray, bits_per_second: float) -> np.ndarray:
    """Modelled time, entry by entry; of rounds, or of sums over rounds since it is linear.

    The same function in the page's script is `modelledSeconds`.

    Args:
      seconds_local: measured seconds of the local steps.
      bytes_sent: bytes sent by a worker, of the same shape.
      bits_per_second: bandwidth of a worker's link.

    Returns:
      Seconds, of the same shape.
    """
    return seconds_local + 8 * bytes_sent / bits_per_second


def group_by_config(traces: Sequence[Trace]) -> list[Series]:
    """Puts runs together that differ in nothing but the seed, in the order of their first runs.

    Labels are the methods and, where several configs share one, the keys in which they differ.
    """
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        settings = {k: v for k, v in trace.config.items() if k != "seed"}
        groups.setdefault(json.dumps([settings, trace.summary["custom_model"]], sort_keys=True), []).append(
            trace
        )
    firsts = [group[0] for group in groups.values()]
    labels = [_label(first, firsts) for first in firsts]
    if len(set(labels)) < len(labels):  # models of the user's own
        labels = [f"{label} ({first.folder.name})" for label, first in zip(labels, firsts, strict=True)]
    return [Series(label, group) for label, group in zip(labels, groups.values(), strict=True)]


def differing_keys(traces: Sequence[Trace]) -> list[str]:
    """The keys of the config, the seed aside, in which runs differ."""
    keys = sorted(set().union(*(trace.config for trace in traces)) - {"seed"})
    return [k for k in keys if any(t.config.get(k) != traces[0].config.get(k) for t in traces)]


class Deals(NamedTuple):
    """To whom the units of a group were dealt, in evenly spaced rounds of a run."""

    group: partition.Group
    rounds: np.ndarray  # int [r], counted from 1: those drawn again
    counts: np.ndarray  # int [S, U]: in how many of them a worker held a unit
    columns: np.ndarray  # int [c]: the rounds of `held`
    rows: np.ndarray  # int [u]: the units of `held`, counted from 0
    held: np.ndarray  # bool [c, S, u]


def draw_deals(trace: Trace, *, columns: int, rows: int, budget: int) -> list[Deals]:
    """Draws a run's partitions again, from its seed and the groups in its summary.

    Args:
      trace: of the run; the baselines have no groups.
      columns: the most rounds in `held`.
      rows: the most units in `held`.
      budget: draw no more than so many entries, each a worker and unit of a round (at least one round).

    Returns:
      Per group, alphabetically.
    """
    config, workers = trace.config, trace.summary["num_workers"]
    groups = [
        partition.make_group(
            name, unit["size"], workers, unit["strips"],
            config["partition.min_units"], config["partition.shares"],
        )
        for name, unit in sorted(trace.summary["units"].items())
    ]  # fmt: skip
    entries = workers * sum(group.size for group in groups)
    rounds = _spaced(len(trace.records), max(1, budget // max(1, entries)))
    by_name = {group.name: group for group in groups}
    drawn = [partition.sample(partition.round_rng(config["seed"], int(r)), by_name) for r in rounds]
    return [_deals(g, rounds, [draw[g.name] for draw in drawn], columns, rows) for g in groups]


def _deals(
    group: partition.Group, rounds: np.ndarray, drawn: list[partition.Assignment], columns: int, rows: int
) -> Deals:
    counts = np.zeros((group.num_workers, group.size), int)
    chosen, units = _spaced(len(rounds), columns), _spaced(group.size, rows)
    shown = np.zeros((len(chosen), group.num_workers, len(units)), bool)
    for place, (indices, gates) in enumerate(drawn):
        held = np.zeros(counts.shape, bool)
        held[np.nonzero(gates)[0], indices[gates]] = True
        counts += held
        shown[chosen == place] = held[:, units]
    return Deals(group, rounds + 1, counts, rounds[chosen] + 1, units, shown)


def _spaced(size: int, most: int) -> np.ndarray:
    """0, k, 2 k, ... below `size`: `most` of them at most."""
    return np.arange(0, size, -(-size // most))


def _label(trace: Trace, others: Sequence[Trace]) -> str:
    method = trace.config["method"]
    alike = [other for other in others if other.config["method"] == method]
    return ", ".join([method, *(f"{key}={trace.config.get(key)}" for key in differing_keys(alike))])


def _curve(trace: Trace) -> Curve:
    accuracy = trace.column("test_accuracy")
    evaluated = np.isfinite(accuracy)
    columns = (
        trace.column("round"),
        trace.column("examples"),
        trace.bytes_sent(),
        np.cumsum(trace.column("seconds_local")),
        100 * accuracy,
    )
    return Curve(*(column[evaluated] for column in columns))
