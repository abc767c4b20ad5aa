"""Writes checkpoints of a run: in the background, from the shards, whole or not at all.

orbax decides what is kept, writes beside the training and makes a checkpoint appear when it is complete; the
arrays inside are tensorstore's. What they hold is described in `checkpoint`.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from ist_jax import errors
from ist_jax.exchange.layout import Layout
from ist_jax.methods.method import State
from ist_jax.tasks.task import ACCURACY, Metric
from ist_jax.workdir import checkpoint
from ist_jax.workdir.checkpoint import Entry
from ist_jax.workdir.files import Json, Record

log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """What a device contributes to an array: `data` at `start` along `axis`."""

    array: str
    axis: int
    start: int
    data: np.ndarray


def snapshot(layout: Layout, state: State) -> tuple[list[Piece], dict[str, Entry]]:
    """Copies of what this process's devices keep, for a write in the background; and the index's entries.

    What is the same on all devices is taken from device 0 alone.
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)
    stored_arrays = checkpoint.stored_arrays(layout, like)
    pieces = []
    for stored, x in zip(stored_arrays, jax.tree.leaves(state), strict=True):
        for shard in x.addressable_shards:
            device = shard.index[0].start or 0
            axis, start, stop = stored.piece(device, layout.num_devices)
            if start < stop:
                part = stored.to_stored(np.asarray(shard.data)[0], stop - start)
                pieces.append(Piece(stored.name, axis, start, np.array(part, order="C")))
    return pieces, {stored.name: stored.entry(layout.num_devices) for stored in stored_arrays}


class Writer:
    """Writes checkpoints of a run in the background, and decides which are kept.

    Args:
      workdir: of the run; checkpoints go to `workdir/checkpoints/<round>`.
      layout: of the store.
      keep: how many of the latest to keep, beside the best.
      metric: of the task.
    """

    def __init__(self, workdir: Path, layout: Layout, *, keep: int, metric: Metric = ACCURACY):
        self.layout, self.keep, self.metric = layout, keep, metric
        self._values: dict[int, float] = {}
        folder, handlers = (workdir / checkpoint.FOLDER).resolve(), {checkpoint.ITEM: _Handler()}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, cleanup_tmp_directories=True, save_root_metadata=False
        )
        self._manager = ocp.CheckpointManager(folder, item_handlers=handlers, options=options)

    def save(
        self,
        state: State,
        about: dict[str, Json],
        records: Sequence[Record] = (),
        layout: Layout | None = None,
    ) -> None:
        """Copies the state to the host and starts the write; `wait` (or the next save) ends it.

        Args:
          state: of this process's devices.
          about: 'round' (rounds done), 'examples', 'config' and whatever a later run should know.
          records: of the rounds so far, which say what is best.
          layout: of the state; None: the store's.
        """
        self.wait()
        scored = ((r["round"], checkpoint.value_of(r, self.metric)) for r in records)
        self._values = {number: value for number, value in scored if value is not None}
        item = _Save(*snapshot(layout or self.layout, state), dict(about))
        try:
            self._manager.save(about["round"], args=ocp.args.Composite(**{checkpoint.ITEM: item}), force=True)
        except OSError as error:
            self._failed(error)

    def wait(self) -> None:
        """Waits for the write at hand; one that failed, on a full disk say, is reported as a warning."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax and tensorstore wrap a full disk in errors of their own
            self._failed(error)

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """orbax asks what is kept: the latest ones, and the best one."""
        scored = [c.step for c in checkpoints if c.step in self._values]
        best = max(scored, key=self._values.__getitem__, default=None)
        recent = len(checkpoints) - self.keep
        return [i >= recent or c.step == best for i, c in enumerate(checkpoints)]

    def _failed(self, error: Exception) -> None:
        there = checkpoint.rounds(Path(self._manager.directory).parent)
        last = f"the last one is of round {there[-1]}" if there else "there is none yet"
        why = errors.one_line(error)
        log.warning("a checkpoint could not be written, training goes on; %s (%s)", last, why)


class _Handler(ocp.AsyncCheckpointHandler):
    """Writes a `_Save`; reading is `Saved`'s, since it needs no run and no orbax manager."""

    async def async_save(self, directory: Path, args: "_Save") -> list[ocp.future.Future]:
        write = _write(Path(directory), args)
        return [ocp.future.CommitFutureAwaitingContractedSignals(write, name="ist_jax_checkpoint")]

    def save(self, directory: Path, args: "_Save") -> None:
        asyncio.run(_write(Path(directory), args))

    def restore(self, directory: Path, args: object = None) -> NoReturn:
        raise NotImplementedError("checkpoints are read by workdir.checkpoint.open_round")


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclass
class _Save(ocp.args.CheckpointArgs):
    pieces: list[Piece]
    arrays: dict[str, Entry]
    about: dict[str, Json]


async def _write(folder: Path, save: _Save) -> None:
    await asyncio.gather(*(_write_piece(folder, piece, save.arrays[piece.array]) for piece in save.pieces))
    content = json.dumps({"about": save.about, "arrays": save.arrays, "processes": jax.process_count()})
    index = folder / f"index-{jax.process_index()}.json"
    index.write_text(f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}\n")


async def _write_piece(folder: Path, piece: Piece, entry: Entry) -> None:
    name, axis, start, data = piece
    stop = start + (data.shape[axis] if data.ndim else 1)
    entry["pieces"].append([axis, start, stop, checkpoint.digest_of(data)])
    metadata = {"shape": checkpoint.shape_on_disk(entry), "chunks": entry["chunk"], "compressor": None}
    spec = checkpoint.array_spec(folder, name) | {"dtype": entry["dtype"], "metadata": metadata}
    store = await tensorstore.open(spec | {"create": True, "open": True})
    await store[checkpoint.region(data.ndim, axis, start, stop)].write(data)
