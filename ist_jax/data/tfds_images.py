"""Image classification sets of tensorflow-datasets, read without TensorFlow.

They must be prepared as array_record files, which `tfds.data_source` reads by index.
"""

from typing import Any

from ist_jax.data import DataSet, Source


class _Split:
    """A split whose records are decoded when they are asked for."""

    def __init__(self, records: Any):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        return {"image": record["image"], "label": record["label"]}


def load(name: str, directory: str) -> DataSet:
    """Opens a set, preparing it first where that is possible.

    Args:
      name: of an image classification set in TFDS with splits 'train' and 'test'.
      directory: TFDS's data_dir; '' for its default.

    Raises:
      ValueError: it is not there and cannot be prepared; the message says what to run.
    """
    import tensorflow_datasets as tfds  # slow to import, and only these sets need it

    builder = tfds.builder(name, data_dir=directory or None, file_format="array_record")
    if not builder.info.splits:
        _prepare(builder, name)
    splits: dict[str, Source] = {key: _Split(builder.as_data_source(key)) for key in ("train", "test")}
    return DataSet(
        description=f"{name}: tensorflow-datasets {builder.info.version} in {builder.data_dir}",
        train=splits["train"],
        test=splits["test"],
        classes=tuple(builder.info.features["label"].names),
    )


def _prepare(builder: Any, name: str) -> None:
    """Downloads and prepares, with TFDS's own progress bars."""
    try:
        builder.download_and_prepare()
    except Exception as error:  # whatever a download can fail by: no network, a mirror's error, a full disk
        raise ValueError(
            f"data.name={name!r} is not prepared in {builder.data_dir} and cannot be downloaded here "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); on a machine "
            f"with a network run: python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
            "data_dir='DIR', file_format='array_record').download_and_prepare()\", copy DIR here and set "
            "config.data.dir to it"
        ) from error
