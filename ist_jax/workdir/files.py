"""What a run leaves behind and what people see of it while it runs."""

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

log = logging.getLogger(__name__)


class Progress:
    """A bar in rounds on a terminal; elsewhere a plain line about twenty times a run.

    Args:
      total: rounds of the run.
      desc: what is being trained.
      done: rounds of earlier sessions.
      quiet: show nothing.
    """

    def __init__(self, total: int, desc: str, done: int = 0, *, quiet: bool = False):
        self._every, self._quiet = max(1, total // 20), quiet
        self._bar = tqdm(
            total=total, desc=desc, unit="round", initial=done, disable=quiet or not sys.stderr.isatty()
        )
        self._total = total
        self._score = ""

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows a round's record."""
        for split in ("validation", "test"):
            if f"{split}_accuracy" in record:
                accuracy, at = record[f"{split}_accuracy"], record["round"]
                self._score = f", {split} accuracy {accuracy:.2%} (round {at})"
        speed = f"{record['examples_per_second']:,.0f} examples/s"
        text = f"loss {record['train_loss']:.3f}{self._score}, {speed}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        last = record["round"] == self._total
        if self._bar.disable and not self._quiet and (last or record["round"] % self._every == 0):
            print(f"round {record['round']}/{self._total}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line of JSON; a loss that is not finite is written as null."""
    with path.open("a") as file:
        file.write(json.dumps(_plain(dict(record)), allow_nan=False) + "\n")


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; what follows a line that a killed process left unfinished is no record.

    Returns:
      Records of rounds 1, 2, ... without a gap; none where there is no file.
    """
    path = workdir / "metrics.jsonl"
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or record.get("round") != len(records) + 1:
            break
        records.append(record)
    return records


def write_records(workdir: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes metrics.jsonl anew, whole or not at all."""
    part = workdir / "metrics.part"
    part.write_text("".join(json.dumps(_plain(dict(r)), allow_nan=False) + "\n" for r in records))
    part.replace(workdir / "metrics.jsonl")


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all; numbers that are not finite as null."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")
    part.replace(path)


def params_sha256(leaves: Iterable[tuple[str, np.ndarray]]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of leaves, in the order given."""
    digest = hashlib.sha256()
    for path, leaf in leaves:
        digest.update(f"{path} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def mean_where(chosen: np.ndarray, values: np.ndarray) -> float:
    """Mean over the chosen workers; NaN where there is none."""
    return float(values[chosen].mean()) if chosen.any() else float("nan")


def warn_left_out(round_number: int, workers: np.ndarray, what: str) -> None:
    """Says which workers' rounds (or, data-parallel, single steps) were left out."""
    for worker in workers:
        log.warning(
            "round %d: worker %d had a non-finite loss or update; its %s left out",
            round_number, worker, "round is" if what == "round" else "steps that had one are",
        )  # fmt: skip
