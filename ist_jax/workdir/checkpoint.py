"""Checkpoints on disk: what is in them, and how they are read.

    params = ist_jax.checkpoint.load_params("runs/digits")    # for model.apply

`checkpoint_writer` writes them. Every leaf is a zarr array in a form that does not depend on devices, workers
or padding: shared leaves as they are, others with their unit axes first and the rest raveled. A device's part
is a chunk, which its process writes. `index-<process>.json` has the SHA-256 of every part, and one
of itself: zarr (and orbax) read flipped bits and missing files without complaint.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tensorstore
from flax import traverse_util

from ist_jax import errors
from ist_jax.exchange.kinds import kind_of
from ist_jax.exchange.layout import Leaf, restore

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
ITEM = "model"
PARAMS = "params"
_DAMAGED = "damaged-"


class Damaged(ValueError):
    """A checkpoint that is incomplete or does not have the content that was written."""


class Saved(NamedTuple):
    """A checkpoint on disk whose index is sound; the arrays are verified as they are read.

    Attributes:
      folder: of the checkpoint.
      about: what the run wrote beside the arrays: 'round', 'examples', 'config', 'custom_model'.
      arrays: by name, such as 'params/stem/kernel': shape, unit_axes, dtype, and pieces
        [axis, start, stop, SHA-256].
    """

    folder: Path
    about: dict[str, Any]
    arrays: dict[str, dict[str, Any]]

    @property
    def round(self) -> int:
        return self.about["round"]

    def trees(self) -> list[str]:
        """Names of the parameter-shaped trees: 'params', then carried moments."""
        names = dict.fromkeys(name.split("/")[0] for name in self.arrays if not name.startswith("rest/"))
        return sorted(names, key=lambda name: (name != PARAMS, name))

    def leaves(self, tree: str) -> Iterator[tuple[str, np.ndarray]]:
        """(path, whole leaf) of a tree, one at a time, verified. Raises Damaged."""
        for name in self.arrays:
            if name.startswith(f"{tree}/"):
                yield name.removeprefix(f"{tree}/"), self.read(name)

    def read(self, name: str) -> np.ndarray:
        """One whole leaf, verified. Raises Damaged."""
        entry = self.arrays[name]
        leaf = Leaf(tuple(entry["shape"]), tuple(entry["unit_axes"]), ())
        whole = np.empty(shape_on_disk(entry), jnp.dtype(entry["dtype"]))
        try:
            store = tensorstore.open(array_spec(self.folder / ITEM, name)).result()
            for axis, start, stop, digest in entry["pieces"]:
                at = region(whole.ndim, axis, start, stop)
                whole[at] = store[at].read().result()
                if digest_of(whole[at]) != digest:
                    raise Damaged(f"{self.folder}: {name} is not what was written")
        except (Damaged, MemoryError):
            raise
        except Exception as error:  # tensorstore's errors have no common base class
            raise Damaged(f"{self.folder}: {name} cannot be read: {errors.one_line(error)}") from error
        return restore(whole, leaf) if leaf.unit_axes else whole


def rounds(workdir: Path) -> list[int]:
    """The rounds that finished checkpoints in a run's folder are of, in order."""
    folder = Path(workdir) / FOLDER
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if name.isdigit())


def open_round(workdir: Path, round_number: int) -> Saved:
    """A checkpoint; its arrays are verified when they are read.

    Raises:
      Damaged: its index is missing or not what was written.
    """
    folder = Path(workdir) / FOLDER / str(round_number)
    first = _read_index(folder, 0)
    arrays = first["arrays"]
    for process in range(1, first["processes"]):
        for name, entry in _read_index(folder, process)["arrays"].items():
            arrays[name]["pieces"] += entry["pieces"]
    for name, entry in arrays.items():
        shape, pieces = shape_on_disk(entry), sorted(entry["pieces"])
        ends = [0, *(stop for _, _, stop, _ in pieces)]
        whole = shape[pieces[0][0]] if pieces and shape else 1
        if [start for _, start, _, _ in pieces] != ends[:-1] or ends[-1] != whole:
            raise Damaged(f"{folder}: {name} is incomplete")
    return Saved(folder, first["about"], arrays)


def newest_intact(workdir: Path, recorded: int) -> Saved | None:
    """The newest checkpoint that is sound in every bit; None where there is no checkpoint at all.

    Damaged ones are named in warnings and moved aside, to `damaged-<round>`, and so are those of later rounds
    than metrics.jsonl has, as after a loss of power.

    Args:
      workdir: of the run.
      recorded: rounds in metrics.jsonl.

    Raises:
      ValueError: there are checkpoints, but none is intact.
    """
    found, damaged = rounds(workdir), []
    for round_number in reversed(found):
        try:
            if round_number > recorded:
                raise Damaged(f"metrics.jsonl ends at round {recorded}")
            saved = open_round(workdir, round_number)
            verify(saved)
        except Damaged as error:
            log.warning("the checkpoint of round %d cannot be used: %s", round_number, error)
            damaged.append(round_number)
        else:
            for number in damaged:
                folder = saved.folder.with_name(str(number))
                folder.replace(_free(folder.with_name(f"{_DAMAGED}{number}")))
            return saved
    if found:
        raise ValueError(
            f"none of the {len(found)} checkpoints in {Path(workdir) / FOLDER} is intact and of a round in "
            "metrics.jsonl; restore one from a copy, or choose another --workdir to start over"
        )
    return None


def verify(saved: Saved) -> None:
    """Reads every array. Raises Damaged where one is not what was written."""
    for name in saved.arrays:
        saved.read(name)


def load_params(workdir: str | Path, which: int | str = "last") -> Any:
    """The global parameters of a run: nested dict of NumPy arrays, for `model.apply`.

    Args:
      workdir: of the run; or the folder of one checkpoint.
      which: 'last', 'best' (by validation accuracy where there is one, else by test accuracy; among those
        that were kept) or the number of a round.

    Raises:
      ValueError: there is no such checkpoint, or it is damaged.
    """
    workdir = Path(workdir)
    if (workdir / ITEM).is_dir() and workdir.name.isdigit():
        workdir, which = workdir.parent.parent, int(workdir.name)
    there = rounds(workdir)
    if not there:
        raise ValueError(f"{workdir} holds no checkpoint, so no parameters")
    if which == "best":
        accuracies: Any = {r: accuracy(open_round(workdir, r).about) for r in there}
        which = max(there, key=lambda r: -1.0 if accuracies[r] is None else accuracies[r])
    number = there[-1] if which == "last" else which
    if number not in there:
        raise ValueError(f"{workdir} holds no checkpoint of round {which}; there are {there}")
    return traverse_util.unflatten_dict(dict(open_round(workdir, int(number)).leaves(PARAMS)), sep="/")


def accuracy(record: Mapping[str, Any]) -> float | None:
    """What a state is judged by, from its record: on the validation split, where there is one."""
    return record.get("test_accuracy" if record.get("validation_accuracy") is None else "validation_accuracy")


def _read_index(folder: Path, process: int) -> dict[str, Any]:
    path = folder / ITEM / f"index-{process}.json"
    try:
        digest, _, content = path.read_text().partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    content = content.removesuffix("\n")
    if hashlib.sha256(content.encode()).hexdigest() != digest:
        raise Damaged(f"{path} is not what was written")
    return json.loads(content)


def array_spec(folder: Path, name: str) -> dict[str, Any]:
    """Where tensorstore finds an array. Not synced to the disk one by one: what a power failure takes of the
    newest checkpoint, its hashes tell."""
    path = f"{folder.resolve()}/{name}/"
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": path, "file_io_sync": False}}


def shape_on_disk(entry: Mapping[str, Any]) -> tuple[int, ...]:
    leaf = Leaf(tuple(entry["shape"]), tuple(entry["unit_axes"]), ())
    return kind_of(leaf).stored_shape(leaf)


def region(ndim: int, axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return tuple(slice(start, stop) if a == axis else slice(None) for a in range(ndim))


def digest_of(data: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()


def _free(path: Path) -> Path:
    """The path, or the first free one with a number."""
    numbered = (path.with_name(f"{path.name}-{n}") for n in range(2, 1000))
    return next(p for p in (path, *numbered) if not p.exists())
