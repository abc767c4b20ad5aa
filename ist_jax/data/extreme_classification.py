"""The text format of the Extreme Classification Repository: Amazon-670k, Delicious and others.

    points features labels
    label,label,... feature:value feature:value ...          one line per point, counted from 0

A file is read line by line into flat arrays: 4 bytes per label, 8 per feature and 8 per point are all that is
kept.

Reference: Bhatia et al., The extreme classification repository: Multi-label datasets and code, 2016.
"""

import logging
import re
from array import array
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from ist_jax import errors
from ist_jax.data.source import DataSet, Entry, Facts, SparseSource
from ist_jax.data.sparse import Rows
from ist_jax.key import Options

log = logging.getLogger(__name__)

_NUMBER = rb"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_LABELS = re.compile(rb"\d+(?:,\d+)*")
_PAIR = re.compile(rb"\d+:" + _NUMBER)
_PAIRS = re.compile(rb"(?:\s+\d+:" + _NUMBER + rb")*\s*")


def load(directory: str, options: Options) -> DataSet:
    """Opens the two files of a folder: `train.txt` or `*_train.txt`, and `test.txt` or `*_test.txt`.

    Points without a label have nothing to learn or to find: they are left out, and their number is said.

    Raises:
      ValueError: a file is missing, or a line of it is malformed; the message names file and line.
    """
    paths = [_find(directory, split) for split in ("train", "test")]
    train, test = map(read, paths)
    sizes, others = ((split.feature.width, split.label.width) for split in (train, test))
    if sizes != others:
        raise ValueError(f"{paths[0]} has (features, labels) {sizes} and {paths[1]} has {others}")
    description = f"extreme_classification: {sizes[0]:,} features and {sizes[1]:,} labels in {directory}"
    return DataSet(description, train, test, tuple(map(str, range(sizes[1]))))


def _find(directory: str, split: str) -> Path:
    names = (f"{split}.txt", f"*_{split}.txt")
    found = [path for name in names for path in Path(directory).glob(name)] if directory else []
    if len(found) != 1:
        there = errors.contents(Path(directory)) if directory and not found else ""
        holds = f"{directory!r} has {len(found) or 'no'} files named {split}.txt or *_{split}.txt"
        holds += f", but holds {there}" if there else ""
        raise ValueError(
            f"data.dir={holds}; set config.data.dir to a folder with one of them, in the text format of the "
            "Extreme Classification Repository"
        )
    return found[0]


def read(path: Path) -> SparseSource:
    """One file's points that have labels.

    A label that a point repeats counts once; values of a feature that it repeats add up.

    Raises:
      ValueError: the file is malformed; the message names it and the line.
    """
    labels, features, values = array("i"), array("i"), array("f")
    label_start, feature_start = array("i", [0]), array("i", [0])
    points = longest = most = 0
    shown = {"desc": f"reading {path.name}", "unit": "B", "unit_scale": True, "leave": False, "disable": None}
    with path.open("rb") as file, tqdm(total=path.stat().st_size, **shown) as bar:
        promised, num_features, num_labels = _read_header(path, file.readline())
        for number, line in enumerate(file, start=2):
            bar.update(len(line))
            if points == promised:
                if line.strip():
                    _fail(path, number, f"is one more than the {promised:,} points of the header")
                continue
            points += 1
            own, index, value = _read_line(path, number, line, num_features, num_labels)
            if len(own):
                for flat, new in ((labels, own), (features, index), (values, value)):
                    flat.frombytes(new.tobytes())
                label_start.append(len(labels))
                feature_start.append(len(features))
                longest, most = max(longest, len(index)), max(most, len(own))
    if points < promised:
        _fail(path, points + 1, f"is the last, but the header promises {promised:,} points")
    kept = len(label_start) - 1
    if not kept:
        raise ValueError(f"{path} has no point with a label")
    log.info(
        "data: %s: %d of %d points have no label and are left out; %.1f features a point, %d at most; "
        "%.1f labels, %d at most",
        path, points - kept, points, len(features) / kept, longest, len(labels) / kept, most,
    )  # fmt: skip
    flats = (feature_start, features, values, label_start, labels)
    feature_from, index, value, label_from, label = (np.frombuffer(flat, flat.typecode) for flat in flats)
    feature = Rows(feature_from, index, value, num_features, longest)
    return SparseSource(feature, Rows(label_from, label, None, num_labels, most))


def _read_header(path: Path, line: bytes) -> list[int]:
    words = line.split()
    if len(words) != 3 or not all(word.isdigit() and int(word) < 2**31 for word in words):
        _fail(path, 1, f"must be 'points features labels', three numbers, not {_show(line)}")
    sizes = [int(word) for word in words]
    if 0 in sizes:
        _fail(path, 1, f"must be three numbers above 0, not {_show(line)}")
    return sizes


def _read_line(path: Path, number: int, line: bytes, num_features: int, num_labels: int) -> list[np.ndarray]:
    """(labels int32, features int32, values float32) of a point."""
    head, pairs = (b"", line) if line[:1].isspace() else re.split(rb"(?=\s)", line, maxsplit=1)
    if b":" in head:  # a point without labels and without the space before its features
        head, pairs = b"", b" " + line
    if head and not _LABELS.fullmatch(head):
        _fail(path, number, f"{_show(head)} is not a list of labels")
    if not _PAIRS.fullmatch(pairs):
        bad = next(word for word in pairs.split() if not _PAIR.fullmatch(word))
        _fail(path, number, f"{_show(bad)} is not feature:value")
    own = np.unique(_numbers(head, ","))
    index, value = _numbers(pairs.replace(b":", b" "), " ").reshape(-1, 2).T
    for kind, found, limit in (("label", own, num_labels), ("feature", index, num_features)):
        if len(found) and found.max() >= limit:
            _fail(path, number, f"{kind} {found.max():.0f} is not below the {limit:,} of the header")
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)
    if not np.isfinite(value).all():
        _fail(path, number, "has a value that is too large for float32")
    return [own.astype(np.int32), index.astype(np.int32), value]


def _numbers(text: bytes, sep: str) -> np.ndarray:
    text = text.strip()
    return np.fromstring(text.decode("ascii"), np.float64, sep=sep) if text else np.zeros(0)


def _show(text: bytes) -> str:
    short = text.decode("ascii", "replace").strip()
    return repr(short if len(short) <= 40 else short[:40] + "...")


def _fail(path: Path, number: int, what: str) -> NoReturn:
    raise ValueError(f"{path}, line {number}: {what}")


ANY = Entry(load, lambda _: Facts(sparse=True))
AMAZON670K = Entry(load, lambda _: Facts((135_909,), 670_091, 490_449, sparse=True))
DELICIOUS = Entry(load, lambda _: Facts((500,), 983, 12_920, sparse=True))
