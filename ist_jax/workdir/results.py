"""The folder of a run: config.json, metrics.jsonl, summary.json and the parameters."""

import datetime
import json
import logging
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util
from ml_collections import config_dict

from ist_jax import __version__
from ist_jax.config import complete, extends, may_change
from ist_jax.costs import formula as ledger
from ist_jax.exchange.layout import Layout
from ist_jax.workdir import checkpoint
from ist_jax.workdir import files as metrics

log = logging.getLogger(__name__)


def report_if_finished(config: config_dict.ConfigDict, workdir: Path, model: nn.Module | None = None) -> bool:
    """Whether the folder holds a finished run of this config, length and model; says its result.

    Args:
      config: of the run that is asked for.
      workdir: the folder.
      model: the model, where it is not the config's.

    Raises:
      ValueError: it holds a run of another config or model.
    """
    if not _is_file(workdir / "config.json"):
        return False
    before, now = complete(_read_json(workdir / "config.json")), json.loads(_to_json(config))
    before, now = (traverse_util.flatten_dict(x, sep=".") for x in (before, now))
    differing = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    refused = [k for k in differing if not may_change(k)]
    if refused:
        raise ValueError(
            f"{workdir} holds a run with other settings: "
            + ", ".join(f"{k} is {before.get(k)!r} there and {now.get(k)!r} here" for k in refused)
            + "; choose another --workdir"
        )
    if not _is_file(workdir / "summary.json"):
        return False
    summary = read_summary(workdir)
    check_model(workdir, summary["custom_model"], model)
    if any(map(extends, differing)):
        return False
    log.info("%s is finished already; nothing to do", workdir)
    log.info(last_line(summary))
    return True


def find_start(workdir: Path, model: nn.Module | None = None) -> checkpoint.Saved | None:
    """The checkpoint to go on from; None where there is no run yet, or one that did not get that far.

    Args:
      workdir: the folder.
      model: the model, where it is not the config's.

    Raises:
      ValueError: checkpoints are damaged or missing, or of another model; never a silent start from scratch.
    """
    records = metrics.read_records(workdir)
    if not _is_file(workdir / "config.json"):
        if records or checkpoint.rounds(workdir):
            raise ValueError(
                f"{workdir} holds a run without its config.json; restore it from a copy, or choose another "
                "--workdir"
            )
        return None
    saved = checkpoint.newest_intact(workdir, len(records))
    every = _read_json(workdir / "config.json")["checkpoint"]["every"]
    if saved is None:
        if (every and len(records) > every) or _is_file(workdir / "summary.json"):
            raise ValueError(
                f"{workdir} holds a run of {len(records)} rounds without a checkpoint; restore its "
                f"{checkpoint.FOLDER}/ from a copy, or choose another --workdir to start over"
            )
        log.info("%s holds a run that did not get to its first checkpoint; it starts over", workdir)
        return None
    check_model(workdir, saved.about["custom_model"], model)
    lost = len(records) - saved.round
    log.info(
        "resuming %s after round %d%s",
        workdir,
        saved.round,
        f"; {lost} later ones are trained again" if lost else "",
    )
    return saved


def check_model(workdir: Path, recorded: str | None, model: nn.Module | None) -> None:
    """Raises ValueError when a run was of another model."""
    if recorded != describe(model):
        raise ValueError(f"{workdir} holds a run of another model; choose another --workdir")


def describe(model: nn.Module | None) -> str | None:
    """A model of the user's own as text, with its fields; None for the config's."""
    return None if model is None else re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(model).split()))


def read_summary(workdir: Path) -> dict[str, Any]:
    """What summary.json holds.

    Raises:
      ValueError: there is none, so the run is not finished.
    """
    if not _is_file(workdir / "summary.json"):
        raise ValueError(f"--workdir={workdir} holds no summary.json, so no finished run")
    return _read_json(workdir / "summary.json")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise ValueError(f"cannot look into {path.parent}: {error.strerror}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def open_workdir(config: config_dict.ConfigDict, workdir: Path, start: checkpoint.Saved | None) -> None:
    """Makes the folder ready for the rounds after `start`: config.json, metrics up to it, no summary."""
    workdir.mkdir(parents=True, exist_ok=True)
    records = metrics.read_records(workdir)[: start.round] if start else []
    metrics.write_records(workdir, records)
    (workdir / "summary.json").unlink(missing_ok=True)
    metrics.write_json(workdir / "config.json", config.to_dict())


def read_config(workdir: Path) -> config_dict.ConfigDict:
    """The config of a run, from its folder.

    Raises:
      ValueError: there is none.
    """
    path = workdir / "config.json"
    if not _is_file(path):
        raise ValueError(f"--workdir={workdir} holds no config.json, so no run")
    return config_dict.ConfigDict(complete(_read_json(path)))


def _to_json(config: config_dict.ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2)


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


def summarize(
    config: config_dict.ConfigDict,
    layout: Layout,
    records: list[dict[str, Any]],
    *,
    trees: int,
    dataset: str,
    device: jax.Device,
    custom_model: str | None,
    seconds_compile: float,
    params_sha256: str,
) -> dict[str, Any]:
    """The final figures of a run; bytes as `ledger` counts them, times in seconds.

    Args:
      config: of the run.
      layout: of the store.
      records: of all rounds, as in metrics.jsonl.
      trees: parameter-shaped trees of the state.
      dataset: the data set's description.
      device: one of those used.
      custom_model: from `describe`.
      seconds_compile: of set-up.
      params_sha256: hash of the final parameters.
    """
    last, rounds = records[-1], len(records)
    full = ledger.full_model_bytes(layout) / config.num_workers * rounds
    wire = [r["wire_bytes_per_device"] for r in records]
    phases = ("gather", "local", "merge", "evaluate")
    return {
        "method": config.method,
        **{key: value for key, value in last.items() if key.startswith(("test_", "validation_"))},
        "train_loss": last["train_loss"],
        "rounds": rounds,
        "examples": last["examples"],
        "seconds_total": sum(r["seconds_round"] for r in records),
        "seconds_compile": seconds_compile,
        **{f"seconds_{p}": sum(r[f"seconds_{p}"] for r in records) for p in phases},
        "parameters": ledger.model_parameters(layout),
        "parameters_per_worker": ledger.subnet_parameters(layout) / config.num_workers,
        "bytes_exchanged_per_worker": sum(r["bytes_per_worker"] for r in records),
        "bytes_local_sgd_per_worker": full * (1 if config.method == "data_parallel" else trees),
        "wire_bytes_per_device": None if None in wire else sum(wire),
        "workers_left_out": sum(r["workers_left_out"] for r in records),
        "workers_absent": sum(r["workers_absent"] for r in records),
        "units": {g.name: {"size": g.size, "strips": g.strips} for g in layout.groups.values()},
        "params_sha256": params_sha256,
        "data": dataset,
        "num_workers": config.num_workers,
        "num_devices": layout.num_devices,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "seed": config.seed,
        "custom_model": custom_model,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {"ist_jax": __version__}
        | {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
    }


def write_report(workdir: Path) -> Path:
    """Writes report.html about a finished run into its folder; returns its path."""
    from ist_jax.report import page as report  # with its plotting library, which nothing else needs

    report.write_report([workdir], workdir / "report.html")
    return workdir / "report.html"


def last_line(summary: dict[str, Any]) -> str:
    """A run's result in a line for people."""
    exchanged, full = summary["bytes_exchanged_per_worker"], summary["bytes_local_sgd_per_worker"]
    return (
        f"{summary['method']}: test accuracy {summary['test_accuracy']:.2%} "
        f"in {summary['seconds_total']:.1f} s; each worker exchanged {exchanged / 1e6:,.1f} MB, "
        f"{exchanged / full:.1%} of the {full / 1e6:,.1f} MB of local SGD"
    )
