"""The merged global parameters on disk, with orbax."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

_FOLDER = "params"


def save_params(workdir: Path, leaves: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes the global parameters, from (path, whole leaf) pairs, to `workdir/params`."""
    tree = traverse_util.unflatten_dict(dict(leaves), sep="/")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(workdir.resolve() / _FOLDER, tree, force=True)


def load_params(workdir: Path) -> Any:
    """The global parameters of a finished run: nested dict of NumPy arrays, for `model.apply`.

    Raises:
      ValueError: there are none.
    """
    folder = workdir.resolve() / _FOLDER
    if not folder.is_dir():
        raise ValueError(f"{workdir} holds no parameters; is the run finished?")
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(folder)
