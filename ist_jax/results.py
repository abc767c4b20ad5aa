"""The folder of a run: config.json, metrics.jsonl, summary.json and the parameters."""

import datetime
import json
import logging
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util
from ml_collections import config_dict

from ist_jax import __version__, ledger
from ist_jax.layout import Layout

log = logging.getLogger(__name__)


def report_if_finished(config: config_dict.ConfigDict, workdir: Path, model: nn.Module | None = None) -> bool:
    """Whether the folder holds a finished run of this config and model; says its result.

    Args:
      config: of the run that is asked for.
      workdir: the folder.
      model: the model, where it is not the config's.

    Raises:
      ValueError: it holds a run of another config or model.
    """
    if not _is_file(workdir / "config.json"):
        return False
    before, now = _read_json(workdir / "config.json"), json.loads(_to_json(config))
    before, now = (traverse_util.flatten_dict(x, sep=".") for x in (before, now))
    differing = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if differing:
        raise ValueError(
            f"{workdir} holds a run with other settings: "
            + ", ".join(f"{k} is {before.get(k)!r} there and {now.get(k)!r} here" for k in differing)
            + "; choose another --workdir"
        )
    if not _is_file(workdir / "summary.json"):
        log.info("%s holds a run that did not finish; it starts over", workdir)
        return False
    summary = read_summary(workdir)
    if summary["custom_model"] != describe(model):
        raise ValueError(f"{workdir} holds a run of another model; choose another --workdir")
    log.info("%s is finished already; nothing to do", workdir)
    log.info(last_line(summary))
    return True


def describe(model: nn.Module | None) -> str | None:
    """A model of the user's own as text, with its fields; None for the config's."""
    return None if model is None else " ".join(repr(model).split())


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


def check_writable(workdir: Path) -> None:
    """Raises ValueError when the folder cannot be written or made; leaves nothing behind."""
    missing: list[Path] = []
    try:
        missing += [path for path in (workdir, *workdir.parents) if not path.exists()]
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to --workdir={workdir}: {error.strerror}") from None
    finally:
        for path in missing:
            if path.is_dir():
                path.rmdir()


def open_workdir(config: config_dict.ConfigDict, workdir: Path) -> None:
    """Makes the folder and writes config.json and an empty metrics.jsonl."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(_to_json(config) + "\n")
    (workdir / "metrics.jsonl").write_text("")


def read_config(workdir: Path) -> config_dict.ConfigDict:
    """The config of a run, from its folder.

    Raises:
      ValueError: there is none.
    """
    path = workdir / "config.json"
    if not _is_file(path):
        raise ValueError(f"--workdir={workdir} holds no config.json, so no run")
    return config_dict.ConfigDict(_read_json(path))


def _to_json(config: config_dict.ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2)


def summarize(
    config: config_dict.ConfigDict,
    layout: Layout,
    records: list[dict[str, Any]],
    *,
    trees: int,
    dataset: str,
    device: jax.Device,
    custom_model: str | None,
    seconds_total: float,
    seconds_compile: float,
    params_sha256: str,
) -> dict[str, Any]:
    """The final figures of a run; bytes as `ledger` counts them, times in seconds.

    Args:
      config: of the run.
      layout: of the store.
      records: of all rounds, as in metrics.jsonl.
      trees: parameter-shaped trees that are exchanged (1, and 1 per carried moment).
      dataset: the data set's description.
      device: one of those used.
      custom_model: from `describe`.
      seconds_total: of all rounds.
      seconds_compile: of set-up.
      params_sha256: hash of the final parameters.
    """
    last, rounds = records[-1], len(records)
    full = ledger.full_model_bytes(layout) * trees * rounds / config.num_workers
    exchanged = ledger.paper_bytes_per_round(layout, trees=trees) * rounds / config.num_workers
    wire: float | None = ledger.wire_bytes(layout, trees=trees) * rounds
    if config.method == "data_parallel":  # gradients, every step; how they travel is the backend's
        full /= trees  # momentum is the same everywhere and never sent
        exchanged, wire = full * config.local_steps, None
    phases = ("gather", "local", "merge", "evaluate")
    return {
        "method": config.method,
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "train_loss": last["train_loss"],
        "rounds": rounds,
        "examples": last["examples"],
        "seconds_total": seconds_total,
        "seconds_compile": seconds_compile,
        **{f"seconds_{p}": sum(r[f"seconds_{p}"] for r in records) for p in phases},
        "parameters": ledger.model_parameters(layout),
        "parameters_per_worker": ledger.subnet_parameters(layout) / config.num_workers,
        "bytes_exchanged_per_worker": exchanged,
        "bytes_local_sgd_per_worker": full,
        "wire_bytes_per_device": wire,
        "workers_left_out": sum(r["workers_left_out"] for r in records),
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


def last_line(summary: dict[str, Any]) -> str:
    """A run's result in a line for people."""
    exchanged, full = summary["bytes_exchanged_per_worker"], summary["bytes_local_sgd_per_worker"]
    return (
        f"{summary['method']}: test accuracy {summary['test_accuracy']:.2%} "
        f"in {summary['seconds_total']:.1f} s; each worker exchanged {exchanged / 1e6:,.1f} MB, "
        f"{exchanged / full:.1%} of the {full / 1e6:,.1f} MB of local SGD"
    )
