"""What a run leaves behind in words and figures: a record per round, the summary, the page."""

import datetime
import logging
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from ist_jax import __version__
from ist_jax.costs import formula as ledger
from ist_jax.exchange.layout import Layout
from ist_jax.partition import Group

log = logging.getLogger(__name__)


class Provenance(NamedTuple):
    """What the results of a run are of.

    Attributes:
      method: its name.
      seed: of the run.
      layout: of the model, after a warm-up.
      data: the data set's description.
      custom_model: from `workdir.resume.describe`.
      device: one of those used.
      seconds_compile: of set-up.
      bytes_local_sgd: what a worker would exchange in a round of local SGD with the same state.
    """

    method: str
    seed: int
    layout: Layout
    data: str
    custom_model: str | None
    device: jax.Device
    seconds_compile: float
    bytes_local_sgd: float


def record_workers(
    healthy: np.ndarray, present: np.ndarray, told: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """What a round's record says of the workers.

    Args:
      healthy: bool [S], whose losses and updates were finite.
      present: bool [S], who took part.
      told: by key, float [S]; the mean over those who were both is recorded, NaN where there is none.
    """
    merged, sick = healthy & present, np.flatnonzero(~healthy & present)
    return {
        **{
            key: float(values[merged].mean()) if merged.any() else float("nan")
            for key, values in told.items()
        },
        "workers_left_out": len(sick),
        "left_out": sick.tolist(),
        "workers_absent": int((~present).sum()),
    }


def warn_left_out(round_number: int, workers: Sequence[int], what: str) -> None:
    """Says which workers' rounds (or, data-parallel, single steps) were left out."""
    for worker in workers:
        log.warning(
            "round %d: worker %d had a non-finite loss or update; its %s left out",
            round_number, worker, "round is" if what == "round" else "steps that had one are",
        )  # fmt: skip


def round_bytes(config: config_dict.ConfigDict, layout: Layout, *, trees: int) -> dict[str, float | None]:
    """Bytes of a round, as `ledger` counts them, for its record.

    Args:
      config: of the run.
      layout: of the store.
      trees: parameter-shaped trees that are exchanged (1, and 1 per carried moment).

    Returns:
      'bytes_per_worker' by the papers' count; 'bytes_sent', by a worker if each has a device of its own;
      and 'wire_bytes_per_device', by the devices that there are, None for data-parallel SGD, whose
      gradients travel as the backend likes (a ring all-reduce is counted in 'bytes_sent').
    """
    workers, averaged = config.num_workers, config.method == "data_parallel"
    apart, steps = layout._replace(num_devices=workers), config.local_steps if averaged else 0
    sent = sum(ledger.round_bytes(apart, trees=trees, averaged_steps=steps).values())
    if averaged:  # gradients alone, every step; momentum is the same everywhere
        both_ways = ledger.full_model_bytes(layout) / workers * config.local_steps
        return {"bytes_per_worker": both_ways, "bytes_sent": sent, "wire_bytes_per_device": None}
    return {
        "bytes_per_worker": ledger.paper_bytes_per_round(layout, trees=trees) / workers,
        "bytes_sent": sent,
        "wire_bytes_per_device": ledger.wire_bytes(layout, trees=trees),
    }


def describe_units(groups: Mapping[str, Group]) -> dict[str, dict[str, Any]]:
    """What there is to know of each group to deal it out again; see `report.runs`."""
    return {g.name: {"size": g.size, "strips": g.strips, "min_units": g.min_units} for g in groups.values()}


def summarize(
    provenance: Provenance, records: Sequence[Mapping[str, Any]], params_sha256: str
) -> dict[str, Any]:
    """The final figures of a run; bytes as its records count them, times in seconds.

    Args:
      provenance: of the run.
      records: of all rounds, as in metrics.jsonl.
      params_sha256: hash of the final parameters.
    """
    last, rounds, layout = records[-1], len(records), provenance.layout
    wire = [r["wire_bytes_per_device"] for r in records]
    seconds = dict.fromkeys(key for r in records for key in r if key.startswith("seconds_"))
    totals = {key: sum(r.get(key, 0.0) for r in records) for key in seconds}
    return {
        "method": provenance.method,
        **{key: value for key, value in last.items() if key.startswith(("test_", "validation_"))},
        "train_loss": last["train_loss"],
        "rounds": rounds,
        "examples": last["examples"],
        "seconds_total": totals.pop("seconds_round"),
        "seconds_compile": provenance.seconds_compile,
        **totals,
        "parameters": ledger.model_parameters(layout),
        "parameters_per_worker": ledger.subnet_parameters(layout) / layout.num_workers,
        "bytes_exchanged_per_worker": sum(r["bytes_per_worker"] for r in records),
        "bytes_local_sgd_per_worker": provenance.bytes_local_sgd * rounds,
        "wire_bytes_per_device": None if None in wire else sum(wire),
        "workers_left_out": sum(r["workers_left_out"] for r in records),
        "workers_absent": sum(r["workers_absent"] for r in records),
        "units": describe_units(layout.groups),
        "params_sha256": params_sha256,
        "data": provenance.data,
        "num_workers": layout.num_workers,
        "num_devices": layout.num_devices,
        "platform": provenance.device.platform,
        "device_kind": provenance.device.device_kind,
        "seed": provenance.seed,
        "custom_model": provenance.custom_model,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {"ist_jax": __version__}
        | {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
    }


def write_report(workdir: Path) -> Path:
    """Writes report.html about a finished run into its folder; returns its path."""
    from ist_jax.report import page  # with its plotting library, which nothing else needs

    page.write_report([workdir], workdir / "report.html")
    return workdir / "report.html"


def last_line(summary: dict[str, Any]) -> str:
    """A run's result in a line for people."""
    exchanged, full = summary["bytes_exchanged_per_worker"], summary["bytes_local_sgd_per_worker"]
    return (
        f"{summary['method']}: test accuracy {summary['test_accuracy']:.2%} "
        f"in {summary['seconds_total']:.1f} s; each worker exchanged {exchanged / 1e6:,.1f} MB, "
        f"{exchanged / full:.1%} of the {full / 1e6:,.1f} MB of local SGD"
    )
