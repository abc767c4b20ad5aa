"""Data sets: what is known of them, and how they are opened, by name.

A set is one file with its facts, its reader and its options, and one line of `SETS`. What is slow to import
is imported when a set is opened.
"""

import inspect
from typing import Any

from ist_jax import extension
from ist_jax.data import (
    digits,
    extreme_classification,
    image_folder,
    npz,
    parquet,
    speech_commands,
    text,
    tfds_images,
)
from ist_jax.data.source import (
    ArraySource,
    DataSet,
    Entry,
    Facts,
    SparseSource,
    Split,
    load,
    num_examples,
    select,
)
from ist_jax.key import FILE, Key, Options

__all__ = [
    "SETS", "ArraySource", "DataSet", "Entry", "Facts", "SparseSource", "Split", "facts", "load",
    "num_examples", "open_data_set", "options", "select",
]  # fmt: skip

SETS: dict[str, Entry] = {
    "amazon670k": extreme_classification.AMAZON670K,
    "delicious": extreme_classification.DELICIOUS,
    "digits": digits.DIGITS,
    "extreme_classification": extreme_classification.ANY,
    "image_folder": image_folder.IMAGE_FOLDER,
    "npz": npz.NPZ,
    "parquet": parquet.PARQUET,
    "speech_commands": speech_commands.SPEECH_COMMANDS,
    "text": text.TEXT,
    **tfds_images.SETS,
}


def options() -> dict[str, Key]:
    """The options of all sets: every config has them, for any set can be chosen by `data.name`."""
    return {name: key for entry in SETS.values() for name, key in entry.options.items()}


def facts(name: str, given: Options | None = None) -> Facts:
    """What is known of a set before it is opened; nothing, if it is not in `SETS`.

    Args:
      name: of the set.
      given: values of its options; those that lack have their defaults.
    """
    return SETS[name].facts(_completed(name, given)) if name in SETS else Facts()


def open_data_set(name: str, directory: str, given: Options | None = None) -> DataSet:
    """Opens a data set.

    Args:
      name: one of `SETS`; or FILE.py:NAME, an `Entry`, a `DataSet`, two splits (train, test), or a function
        that returns one of the latter, called with the directory if it has a parameter.
      directory: where its files are; unused by embedded sets.
      given: values of its options; those that lack have their defaults.

    Raises:
      ValueError: there is no such data set, or not there, or an option cannot be met.
    """
    if FILE.fullmatch(name):
        return _open_own(name, directory)
    if name not in SETS:
        known = f"one of {sorted(SETS)}, or FILE.py:NAME"
        raise ValueError(f"data.name={name!r} does not exist; set config.data.name to {known}")
    return SETS[name].load(directory, _completed(name, given))


def _open_own(name: str, directory: str) -> DataSet:
    """A data set from a file of the user's own."""
    try:
        found: Any = extension.load(name, {})
    except ValueError as error:
        raise ValueError(f"data.name={name}: {error}") from None
    if isinstance(found, Entry):
        found = found.load(directory, {option: key.default for option, key in found.options.items()})
    elif callable(found):
        found = found(directory) if inspect.signature(found).parameters else found()
    if isinstance(found, tuple) and not isinstance(found, DataSet) and len(found) == 2:
        found = DataSet(name, *found)
    if not isinstance(found, DataSet):
        raise ValueError(
            f"data.name={name} is a {type(found).__name__}; an ist_jax.data.DataSet is needed, or two splits "
            "(train, test), or a function that returns one of these"
        )
    return found


def _completed(name: str, given: Options | None) -> Options:
    return {option: (given or {}).get(option, key.default) for option, key in SETS[name].options.items()}
