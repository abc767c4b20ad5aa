"""Checkpoints on disk: what is in them, and how they are read.

    logits = ist_jax.workdir.checkpoint.load_model("runs/digits")(images)
    params = ist_jax.workdir.checkpoint.load_params("runs/digits")    # for model.apply

`checkpoint_writer` writes them. Every array of a `State` is a zarr array in a form that does not depend on
devices or padding:

  params/<path>       a leaf of the parameters: shared ones as they are, others with their unit axes first and
                      the rest raveled.
  travels/<i>/<path>  the same of the i-th tree shaped like the parameters; `stays` likewise.
  travels/<i>         the i-th part where it is no such tree, but an array that is the same on all devices.
  own/<i>/<path>      [S, ...], a leaf of the i-th such tree that workers keep, as it is.
  own/<i>             [S, ...], the i-th part of what workers keep where it is no such tree, but an array.

Of an ensemble there are no params, and own/0 are the parameters of its nets.

A device's part is a chunk, which its process writes. `index-<process>.json` has the SHA-256 of every part,
and one of itself: zarr (and orbax) read flipped bits and missing files without complaint.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from flax import traverse_util
from jaxtyping import PyTree

from ist_jax import config, errors
from ist_jax.data import augment
from ist_jax.data.source import with_channels
from ist_jax.exchange.kinds import kind_of
from ist_jax.exchange.layout import Layout, Leaf, from_stored
from ist_jax.masking import Params
from ist_jax.methods.method import State
from ist_jax.models import adapter, norm
from ist_jax.models.sparse import Sparse
from ist_jax.tasks.task import Metric, metric_of
from ist_jax.workdir import files
from ist_jax.workdir.files import Json, Record

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
ITEM = "model"
PARAMS = "params"
MEMBERS = "own/0"
# what an index says of an array: shape, unit_axes, their blocks (outer, inner), layer_axis (of layers with a
# draw each, or null), dtype, chunk, and pieces [axis, start, stop, SHA-256]
Entry = dict[str, Json]


class Damaged(ValueError):
    """A checkpoint that is incomplete or does not have the content that was written."""


class Stored(NamedTuple):
    """How an array of a state is stored.

    Attributes:
      name: on disk.
      shape: of the whole array.
      dtype: its.
      leaf: how the devices share it; None: each keeps the rows [W, ...] of its workers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    leaf: Leaf | None

    def piece(self, device: int, num_devices: int) -> tuple[int, int, int]:
        """(axis, start, stop): the part of the stored form that a device writes."""
        if self.leaf is not None:
            return kind_of(self.leaf).stored_piece(self.leaf, device, num_devices)
        rows = self.shape[0] // num_devices
        return 0, device * rows, (device + 1) * rows

    def to_stored(self, kept: np.ndarray, length: int) -> np.ndarray | np.generic:
        """That part, of such a length, from what the device keeps."""
        if self.leaf is None:
            return kept
        return kind_of(self.leaf).to_stored(self.leaf, kept, length)

    def split(self, whole: np.ndarray, num_devices: int) -> np.ndarray:
        """What each device keeps, [D, ...]."""
        if self.leaf is None:
            return whole.reshape(num_devices, -1, *whole.shape[1:])
        return kind_of(self.leaf).split(whole, self.leaf, num_devices)

    def entry(self, num_devices: int) -> Entry:
        """What an index says of the array, the pieces aside."""
        axes, blocks = (self.leaf.unit_axes, self.leaf.blocks) if self.leaf else ((), ())
        entry: Entry = {"shape": self.shape, "unit_axes": axes, "blocks": blocks, "dtype": str(self.dtype)}
        entry |= {"layer_axis": self.leaf.layer_axis if self.leaf else None}
        axis, start, stop = self.piece(0, num_devices)
        chunk = tuple(stop - start if a == axis else s for a, s in enumerate(shape_on_disk(entry)))
        return entry | {"chunk": chunk, "pieces": []}


def stored_arrays(layout: Layout, like: State) -> list[Stored]:
    """A `Stored` for every array of a state, in the order of its leaves.

    Args:
      layout: of the model.
      like: the state of one device; arrays or shapes.

    Raises:
      ValueError: an array of `own` has no axis of workers, or one elsewhere is none that can be stored.
    """

    stored: list[Stored] = []
    for field in State._fields[:-1]:
        for number, x in enumerate(jax.tree.leaves(getattr(like, field), is_leaf=layout.is_tree)):
            name = PARAMS if field == PARAMS else f"{field}/{number}"
            if layout.is_tree(x):
                leaves = sorted(layout.leaves.items())
                stored += [Stored(f"{name}/{path}", leaf.shape, x[path].dtype, leaf) for path, leaf in leaves]
            elif x.ndim:
                raise ValueError(
                    f"{name} of the state has shape {tuple(x.shape)}: what travels or stays is shaped like "
                    "the parameters or a single number; arrays of a worker's own belong into `own`"
                )
            else:
                stored.append(Stored(name, (), x.dtype, Leaf((), (), (), ())))
    for number, part in enumerate(jax.tree.leaves(like.own, is_leaf=layout.is_tree)):
        named = {f"own/{number}/{path}": x for path, x in part.items()} if layout.is_tree(part) else {}
        for name, x in sorted(named.items()) or [(f"own/{number}", part)]:
            if x.shape[:1] != (layout.workers_per_device,):
                raise ValueError(
                    f"{name} of the state has shape {tuple(x.shape)} on a device; its first axis must be "
                    f"that of the device's {layout.workers_per_device} workers"
                )
            stored.append(Stored(name, (layout.num_workers, *x.shape[1:]), x.dtype, None))
    return stored


class Saved(NamedTuple):
    """A checkpoint on disk whose index is sound; the arrays are verified as they are read.

    Attributes:
      folder: of the checkpoint.
      about: what the run wrote beside the arrays: 'round', 'examples', 'config', 'custom_model'.
      arrays: by name, such as 'params/stem/kernel': shape, unit_axes, blocks, layer_axis, dtype, and pieces
        [axis, start, stop, SHA-256].
    """

    folder: Path
    about: dict[str, Json]
    arrays: dict[str, Entry]

    @property
    def round(self) -> int:
        return self.about["round"]

    @property
    def workers(self) -> int | None:
        """How many there were; None where none kept anything."""
        return next((x["shape"][0] for name, x in self.arrays.items() if name.startswith("own/")), None)

    def without_own(self) -> "Saved":
        """The same without what workers kept."""
        return self._replace(arrays={n: x for n, x in self.arrays.items() if not n.startswith("own/")})

    @property
    def members(self) -> int:
        """How many nets an ensemble has; 0 where there is one model."""
        return 0 if any(name.startswith(f"{PARAMS}/") for name in self.arrays) else self.workers or 0

    def params(self) -> Iterator[tuple[str, np.ndarray]]:
        """(path, whole leaf) of the parameters, one at a time, verified; of an ensemble [S, ...].

        Raises:
          Damaged: one is not what was written.
        """
        prefix = f"{MEMBERS if self.members else PARAMS}/"
        for name in self.arrays:
            if name.startswith(prefix):
                yield name.removeprefix(prefix), self.read(name)

    def restore(self, layout: Layout, like: State, put: Callable[[np.ndarray], jax.Array]) -> State:
        """The state that was saved, placed array by array: no process ever holds the whole model.

        Args:
          layout: of the model.
          like: shapes of the state of one device, as of the method's `init` by `jax.eval_shape`.
          put: places what each device keeps of an array, [D, ...].

        Raises:
          Damaged: it is not what was written.
          ValueError: it is of another model, method or version, or of other workers where they keep anything.
        """
        stored = stored_arrays(layout, like)
        self._check(stored, layout.num_workers)
        placed = [put(one.split(self.read(one.name), layout.num_devices)) for one in stored]
        return jax.tree.unflatten(jax.tree.structure(like), placed)

    def _check(self, wanted: list[Stored], workers: int) -> None:
        there = {name: (x["dtype"], *x["shape"]) for name, x in self.arrays.items()}
        here = {one.name: (str(one.dtype), *one.shape) for one in wanted}
        if there.keys() == here.keys() and self.workers not in (None, workers):
            raise ValueError(
                f"{self.folder} holds what each of {self.workers} workers kept for itself, and num_workers="
                f"{workers}; set config.num_workers to {self.workers}, or choose another --workdir"
            )
        for name in sorted(there.keys() | here.keys()):
            before, now = there.get(name), here.get(name)
            if before == now:
                continue
            raise ValueError(
                f"{self.folder} is of another model, method or version: {name} is {_text(before)} there and "
                f"{_text(now)} here; choose another --workdir"
            )

    def read(self, name: str) -> np.ndarray:
        """One whole leaf, verified. Raises Damaged."""
        entry = self.arrays[name]
        leaf = _leaf_of(entry)
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
        return from_stored(whole, leaf)


def _text(found: tuple | None) -> str:
    return "missing" if found is None else f"{found[0]} {list(found[1:])}"


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
            damaged.append(Path(workdir) / FOLDER / str(round_number))
        else:
            for folder in damaged:
                folder.replace(_free(folder.with_name(f"damaged-{folder.name}")))
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


def load_params(workdir: str | Path, which: int | str = "last", *, member: int | None = None) -> Params:
    """The global parameters of a run: nested dict of NumPy arrays, for `model.apply`.

    Args:
      workdir: of the run; or the folder of one checkpoint.
      which: 'last', 'best' (by the task's metric on the validation split where there is one, else on the test
        set; among those that were kept) or the number of a round.
      member: of an ensemble, which of its nets, counted from 0; `model.subnet` makes the model of one.

    Raises:
      ValueError: there is no such checkpoint or net, or it is damaged.
    """
    workdir = Path(workdir)
    if (workdir / ITEM).is_dir() and workdir.name.isdigit():
        workdir, which = workdir.parent.parent, int(workdir.name)
    there = rounds(workdir)
    if not there:
        raise ValueError(f"{workdir} holds no checkpoint, so no parameters")
    if which == "best":
        abouts = {r: open_round(workdir, r).about for r in there}
        values = {r: value_of(about, metric_of(about)) for r, about in abouts.items()}
        which = max(there, key=lambda r: -math.inf if (value := values[r]) is None else value)
    number = there[-1] if which == "last" else which
    if number not in there:
        raise ValueError(f"{workdir} holds no checkpoint of round {which}; there are {there}")
    saved = open_round(workdir, int(number))
    if saved.members and member not in range(saved.members):
        raise ValueError(
            f"{workdir} holds an ensemble of {saved.members} nets, and no model of all; give load_params one "
            f"of member=0 to {saved.members - 1}"
        )
    if member is not None and not saved.members:
        raise ValueError(f"{workdir} holds one model, and no ensemble; leave member={member} out")
    flat = ((path, x[member] if saved.members else x) for path, x in saved.params())
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def load_model(
    workdir: str | Path,
    which: int | str = "last",
    *,
    model: nn.Module | None = None,
    calibration: Iterable[np.ndarray | Sparse] | None = None,
) -> Callable[[np.ndarray | jax.Array | Sparse], jax.Array]:
    """The global model of a finished run as a function: inputs [N, ...] -> logits [N, classes].

    Inputs are those of the data set, such as images uint8 [N, H, W, C]: their normalisation and the scale of
    units at evaluation are the run's, from its summary.json.

    BatchNorm uses the statistics of the N inputs that are given together, as in the run's evaluation; the
    logits of a single one mean nothing then (an MLP of `models.mlp` has the same ones for any). With
    `calibration` it uses those of the calibration's batches, and an input has the same logits alone as among
    others.

    Args:
      workdir: of the run.
      which: as for `load_params`.
      model: what the run trained, where its config does not name that.
      calibration: batches of training inputs, all of one size; 32 of them are usual.

    Raises:
      ValueError: there is no finished run or no such checkpoint, or the model is not told or another one.
    """
    workdir = Path(workdir)
    summary, params = files.read_summary(workdir), load_params(workdir, which)
    if "normalization" not in summary:
        raise ValueError(f"{workdir} is of an earlier version, whose summary.json lacks what a model needs")
    if (custom := summary["custom_model"]) is None:
        own = config.build_model(config.restore(files.read_config(workdir)), summary["num_classes"])
        custom, model = adapter.describe(own), model or own
    if model is None:
        raise ValueError(f"{workdir} holds a model of your own, {custom.split('(')[0]}: give it as `model`")
    if (described := adapter.describe(model)) != custom:
        raise ValueError(f"{workdir} holds the model {custom}, and `model` is {described}")
    scale, known = summary["scale"], summary["normalization"]
    normalize = augment.make_normalize(**known) if known else None

    def prepare(inputs: Any) -> Any:
        return inputs if normalize is None else normalize(with_channels(inputs))

    @jax.jit
    def apply(variables: PyTree, inputs: Any) -> jax.Array:
        return cast(jax.Array, adapter.apply(model, variables, prepare(inputs), scale=scale))

    variables = {"params": params}
    if calibration is not None:
        batches = map(prepare, calibration)
        variables["batch_stats"] = norm.estimate_batch_stats(model, params, batches, scale)
    return partial(apply, jax.device_put(variables))


def value_of(record: Record, metric: Metric) -> float | None:
    """What a state is judged by, the more the better: on the validation split, where there is one."""
    found = (record.get(f"{split}_{metric.name}") for split in ("validation", "test"))
    return next((metric.better(x) for x in found if x is not None), None)


def _read_index(folder: Path, process: int) -> dict[str, Json]:
    path = folder / ITEM / f"index-{process}.json"
    try:
        digest, _, content = path.read_text().removesuffix("\n").partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    if hashlib.sha256(content.encode()).hexdigest() != digest:
        raise Damaged(f"{path} is not what was written")
    return json.loads(content)


def array_spec(folder: Path, name: str) -> dict[str, Json]:
    """Where tensorstore finds an array. Not synced to the disk one by one: what a power failure takes of the
    newest checkpoint, its hashes tell."""
    path = f"{folder.resolve()}/{name}/"
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": path, "file_io_sync": False}}


def shape_on_disk(entry: Entry) -> tuple[int, ...]:
    """Of an array."""
    return _leaf_of(entry).stored_shape


def _leaf_of(entry: Entry) -> Leaf:
    axes = tuple(entry["unit_axes"])
    blocks = entry.get("blocks") or [(1, 1)] * len(axes)  # not in checkpoints from before there were any
    blocks = tuple((outer, inner) for outer, inner in blocks)
    return Leaf(tuple(entry["shape"]), axes, (), blocks, entry.get("layer_axis"))


def region(ndim: int, axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return tuple(slice(start, stop) if a == axis else slice(None) for a in range(ndim))


def digest_of(data: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()


def _free(path: Path) -> Path:
    """The path, or the first free one with a number."""
    numbered = (path.with_name(f"{path.name}-{n}") for n in range(2, 1000))
    return next(p for p in (path, *numbered) if not p.exists())
