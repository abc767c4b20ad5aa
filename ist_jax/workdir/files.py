"""The files of a run's folder beside its checkpoints: config.json, metrics.jsonl, summary.json and others."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from flax import traverse_util

from ist_jax import errors
from ist_jax.key import Options, Settings

Json: TypeAlias = Any  # what a JSON file holds, or part of it
Record = dict[str, Json]  # of a round: a line of metrics.jsonl
Summary = dict[str, Json]  # of a run: summary.json


def append_record(workdir: Path, record: Record) -> None:
    """Adds a line to metrics.jsonl; a loss that is not finite is written as null."""
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(_plain(dict(record)), allow_nan=False) + "\n")


def read_records(workdir: Path) -> list[Record]:
    """The records of metrics.jsonl; what follows a line that a killed process left unfinished is no record.

    Returns:
      Records of rounds 1, 2, ... without a gap; none where there is no file.
    """
    path = workdir / "metrics.jsonl"
    records: list[Record] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or record.get("round") != len(records) + 1:
            break
        records.append(record)
    return records


def write_records(workdir: Path, records: Iterable[Record]) -> None:
    """Writes metrics.jsonl anew, whole or not at all."""
    part = workdir / "metrics.part"
    part.write_text("".join(json.dumps(_plain(dict(r)), allow_nan=False) + "\n" for r in records))
    part.replace(workdir / "metrics.jsonl")


def read_config(workdir: Path) -> Settings:
    """The config of a run, nested.

    Raises:
      ValueError: there is none.
    """
    return _read(workdir, "config.json", "run")


def flatten(config: Options) -> Settings:
    """A nested config by dotted key."""
    return traverse_util.flatten_dict(config, sep=".")


def read_summary(workdir: Path) -> Summary:
    """What summary.json holds.

    Raises:
      ValueError: there is none, so the run is not finished.
    """
    return _read(workdir, "summary.json", "finished run")


def _read(workdir: Path, name: str, whose: str) -> Json:
    if not is_file(workdir / name):
        there = errors.contents(workdir)
        found = "is a file" if is_file(workdir) else f"holds {there}" if there else "is empty or not there"
        raise ValueError(f"--workdir={workdir} holds no {name}, so no {whose}; it {found}")
    return read_json(workdir / name)


def is_file(path: Path) -> bool:
    """Whether there is such a file. Raises ValueError where that cannot be told."""
    try:
        return path.is_file()
    except OSError as error:
        raise ValueError(f"cannot look into {path.parent}: {error.strerror}") from None


def read_json(path: Path) -> Json:
    """What a file holds. Raises ValueError where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def write_json(path: Path, value: Json) -> None:
    """Writes a file whole or not at all; numbers that are not finite as null."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")
    part.replace(path)


def params_sha256(leaves: Iterable[tuple[str, np.ndarray | np.generic]]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of leaves, in the order given."""
    digest = hashlib.sha256()
    for path, leaf in leaves:
        digest.update(f"{path} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _plain(value: Json) -> Json:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value
