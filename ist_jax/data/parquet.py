"""A folder of parquet files with a column of images and one of labels, as Hugging Face's datasets have them.

    data/train-00000-of-00002.parquet    data/test-00000-of-00001.parquet
    train/0000.parquet                   test/0000.parquet

Images are PNG or JPEG files in bytes. They are held in memory: as they are where all are of one size, else
cut to one.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ist_jax import errors
from ist_jax.data import decoded, images
from ist_jax.data.source import ArraySource, DataSet, Entry, Example
from ist_jax.key import Key, Options

log = logging.getLogger(__name__)

OPTIONS = {
    "data.columns": Key((), "columns of parquet files: of the images, of the labels; (): found", kind=str),
}
_SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)
# of pyarrow, which is slow to import, and which only these sets need
Column = Any
Schema = Any
Table = Any


class TableSource:
    """One split; its images are not decoded.

    Args:
      images: structs of 'bytes' and 'path', or bytes.
      labels: int32 [N].
      split: its name.
      root: folder of the files that have a 'path' and no bytes.
    """

    def __init__(self, images: Column, labels: np.ndarray, split: str, root: Path):
        self._images, self.labels, self._split, self._root = images, labels, split, root

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """By split and row, which is counted from 0."""
        return f"row {index} of {self._split}"

    def __getitem__(self, index: int) -> Example:
        image = self._images[index].as_py()
        found = image if isinstance(image, dict) else {"bytes": image}
        if found["bytes"] is None:
            if not found.get("path"):
                raise OSError(f"{self.name(index)} has no image")
            found["bytes"] = (self._root / found["path"]).read_bytes()
        return {"image": found["bytes"], "label": int(self.labels[index])}


def load(directory: str, options: Options) -> DataSet:
    """Opens a folder.

    Args:
      directory: holds parquet files, in folders or not, whose names or folders say of which split they are:
        train, and test or else validation.
      options: 'data.columns'; 'data.in_memory'; 'data.size' and 'data.resize' for images of different sizes.

    Raises:
      ValueError: a split or a column is missing, a label is no class, or the images take too much memory.
    """
    root = Path(directory)
    files = _find(root) if directory else {}
    if len(files) < 2 or "train" not in files:
        lacking = "test or validation" if "train" in files else "train"
        raise ValueError(
            f"data.dir={directory!r} has no .parquet file named {lacking}; set config.data.dir to a folder "
            "with such files, named train and test (or validation), or in folders of those names"
        )
    tables = {split: _read(paths, options) for split, paths in files.items()}
    labels = {split: _labels(split, table.column(1)) for split, table in tables.items()}
    classes = _classes(tables["train"], labels)
    splits = [TableSource(table.column(0), labels[split], split, root) for split, table in tables.items()]
    count, (_, tested) = sum(map(len, splits)), tables
    description = f"parquet: {count:,} images of {len(classes):,} classes in {directory}, tested on {tested}"
    train, test = _decode(splits, options)
    return DataSet(description, train, test, classes)


def _decode(splits: Sequence[TableSource], options: Options) -> list[ArraySource]:
    try:
        try:
            return decoded.decode_as_is(splits, options)
        except decoded.Unlike as why:
            transform = images.make_transform(options, flip=False)
            size = transform.size
            log.info("data: the centre of every image is cut out, %d x %d pixels: %s", size, size, why)
            return decoded.decode(splits, options, (size, size, 3), transform.centre)
    except decoded.TooLarge as why:
        raise ValueError(f"{why}; raise config.data.in_memory") from None


def _find(root: Path) -> dict[str, list[Path]]:
    """The files of 'train' and of 'test' or else 'validation', of those that are there, in this order."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.parquet")):
        for part in reversed(
            path.relative_to(root).with_suffix("").parts
        ):  # a file's name before its folder's
            if splits := [_SPLITS[word] for word in re.split("[^a-z]+", part.lower()) if word in _SPLITS]:
                found.setdefault(splits[0], []).append(path)
                break
    chosen = [split for split in ("train", "test", "validation") if split in found][:2]
    for split in chosen:
        if len(folders := sorted({str(path.parent) for path in found[split]})) > 1:
            raise ValueError(
                f"{split} files are in {' and in '.join(folders)}; set config.data.dir to one set's folder"
            )
    return {split: found[split] for split in chosen}


def _read(paths: Sequence[Path], options: Options) -> Table:
    """The two columns of some files, of images and of labels."""
    import pyarrow
    from pyarrow import parquet

    tables = []
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
            columns = _columns(path, file.schema_arrow, options["data.columns"])
            tables.append(file.read(columns).select(columns))
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"cannot read {path}: {errors.one_line(error)}") from None
    try:
        return pyarrow.concat_tables(tables, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{paths[0]} and other files of its split differ: {errors.one_line(error)}"
        ) from None


def _columns(path: Path, schema: Schema, wanted: Sequence[str]) -> list[str]:
    """Names of the columns of images and labels."""
    features, there = _features(schema), f"{path} has the columns {', '.join(schema.names) or 'none'}"
    if wanted:
        if len(wanted) != 2 or (set(wanted) - set(schema.names)):
            raise ValueError(f"{there}, and data.columns={wanted}; set it to those of images and of labels")
        return list(wanted)
    images = [field.name for field in schema if _holds_files(field.type)]
    named = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    whole = [field.name for field in schema if str(field.type).startswith(("int", "uint"))]
    labels = named or whole
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{there}, {len(images)} of images and {len(labels)} of labels; set config.data.columns to those "
            "to use, such as ('image','label')"
        )
    return images + labels


def _holds_files(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _features(schema: Schema) -> dict[str, Any]:
    """What `datasets` says of the columns."""
    said = (schema.metadata or {}).get(b"huggingface", b"{}")
    return json.loads(said).get("info", {}).get("features", {})


def _labels(split: str, column: Column) -> np.ndarray:
    if not str(column.type).startswith(("int", "uint")) or column.null_count or not len(column):
        raise ValueError(
            f"the labels of {split} are {len(column)} of type {column.type}, {column.null_count} of them "
            "missing; whole numbers are needed"
        )
    return column.to_numpy().astype(np.int32)


def _classes(table: Table, labels: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """By the names in a table's metadata; where there are none, the numbers up to the greatest label."""
    names = _features(table.schema).get(table.column_names[1], {}).get("names")
    classes = tuple(names or map(str, range(1 + max(x.max() for x in labels.values()))))
    for split, own in labels.items():
        if own.min() < 0 or own.max() >= len(classes):
            wrong = own.min() if own.min() < 0 else own.max()
            raise ValueError(
                f"{split} has the label {wrong}; those of {len(classes)} classes are needed, from 0"
            )
    return classes


PARQUET = Entry(load, options=images.OPTIONS | decoded.OPTIONS | OPTIONS)
