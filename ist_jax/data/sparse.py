"""Rows of different lengths: one after another in flat arrays, on the host and on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ist_jax.models.sparse import Sparse


@struct.dataclass
class Rows:
    """N rows of entries (compressed sparse rows), of NumPy or JAX arrays.

    Attributes:
      start: int32 [N + 1], where each row begins in the flat arrays, and where the last one ends.
      index: int32 [M], the features or labels of all rows; entries beyond start[N] are padding.
      value: float32 [M], their values; None: the entries have none.
      width: one more than the largest index that there can be.
      longest: K, the most entries that a row can have.
    """

    start: jax.Array | np.ndarray
    index: jax.Array | np.ndarray
    value: jax.Array | np.ndarray | None
    width: int = struct.field(pytree_node=False)
    longest: int = struct.field(pytree_node=False)

    def __len__(self) -> int:
        return len(self.start) - 1


def take(rows: Rows, numbers: np.ndarray) -> Rows:
    """The rows with the given numbers, on the host.

    Args:
      rows: of NumPy arrays.
      numbers: int [..., B].

    Returns:
      Rows with leading axes: B rows for each of `numbers[...]`, start [..., B + 1], index and value [..., P]
      with P of the fullest.
    """
    counts = np.diff(rows.start)[numbers]
    start = np.zeros((*numbers.shape[:-1], numbers.shape[-1] + 1), np.int32)
    np.cumsum(counts, axis=-1, out=start[..., 1:])
    places = np.zeros((*numbers.shape[:-1], max(1, int(start[..., -1].max(initial=0)))), np.int32)
    for lead in np.ndindex(numbers.shape[:-1]):
        shift = np.repeat(rows.start[:-1][numbers[lead]] - start[lead][:-1], counts[lead])
        places[lead][: len(shift)] = np.arange(len(shift)) + shift
    value = None if rows.value is None else rows.value[places]
    return Rows(start, rows.index[places], value, rows.width, rows.longest)


def draw(rows: Rows, numbers: jax.Array) -> Sparse:
    """The rows with the given numbers [B], padded by index `width`; all values are 1 where rows have none."""
    rows = jax.tree.map(jnp.asarray, rows)
    first, last = rows.start[numbers], rows.start[numbers + 1]
    place = first[:, None] + jnp.arange(rows.longest)
    inside = place < last[:, None]
    index = jnp.where(inside, rows.index.at[place].get(mode="clip"), rows.width)  # type: ignore[union-attr]
    value = 1.0 if rows.value is None else rows.value.at[place].get(mode="clip")  # type: ignore[union-attr]
    return Sparse(index, jnp.where(inside, value, 0), last - first, rows.width)
