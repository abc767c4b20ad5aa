"""What the rounds and the evaluation are fed: sets in memory, or streamed from disk."""

import logging
from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import jax
import numpy as np

from ist_jax import data, extension, tasks
from ist_jax.data import batches, images
from ist_jax.data.encoded import EvalBatches, TrainBatches
from ist_jax.data.feed import InMemoryEvaluation, InMemoryFeed
from ist_jax.data.sparse import Rows
from ist_jax.data.stream import Evaluation, Feed, StreamingEvaluation, StreamingFeed, check_shared_memory
from ist_jax.key import FILE, Options
from ist_jax.runtime import devices
from ist_jax.runtime.devices import Devices
from ist_jax.streams import Use, rng
from ist_jax.tasks.classification import classification
from ist_jax.tasks.task import Task, with_example

log = logging.getLogger(__name__)

# A `data.Split` in memory or, where the data set is encoded, a `source.EncodedSource`.
Examples: TypeAlias = Any


class Wanted(NamedTuple):
    """What a run asks of its data.

    Attributes:
      name: of the data set.
      task: what is learned: 'auto', one of `TASKS`, or FILE.py:NAME.
      directory: of its files.
      options: values of `data.options()`, by whole names.
      pad: pixels of padding before a random crop of a training image.
      flip: mirror half of the training images.
      validation: fraction of the training examples that is held out to stop by.
      sharing: who draws from which examples, as of `batches.share_examples`.
      concentration: of 'skewed' sharing.
      seed: of the run.
      num_workers: S.
      local_steps: of a base round.
      batch_size: B, per worker.
      eval_batch_size: examples per evaluation batch.
    """

    name: str
    task: str
    directory: str
    options: Options
    pad: int
    flip: bool
    validation: float
    sharing: str
    concentration: float
    seed: int
    num_workers: int
    local_steps: int
    batch_size: int
    eval_batch_size: int


class Inputs(NamedTuple):
    """A data set that is open.

    Attributes:
      wanted: of it.
      dataset: what it is.
      train: from `data.load`; or, to be streamed, a `source.EncodedSource`.
      test: the same.
      validation: the part of the training examples that is held out to stop by; None: none is.
      task: what is learned from them.
    """

    wanted: Wanted
    dataset: data.DataSet
    train: Examples
    test: Examples
    validation: data.Split | None
    task: Task


def count(examples: Examples) -> int:
    """How many there are."""
    return data.num_examples(examples) if isinstance(examples, dict) else len(examples)


def chance(opened: Inputs) -> float | None:
    """Test accuracy of naming the most frequent class every time; 1 / classes, where the set is streamed.

    None where the test set has no classes.
    """
    if not isinstance(opened.test, dict):
        return 1 / len(opened.dataset.classes)
    label = opened.test.get("label")
    if not _are_classes(label):
        return None
    each = label.index[: label.start[-1]] if isinstance(label, Rows) else label  # then come padding
    return float(np.bincount(each).max() / len(label))


def open_inputs(wanted: Wanted, task: tasks.Own | None = None) -> Inputs:
    """The data set that is wanted; decoded, but where it is too large for that.

    Args:
      wanted: of it.
      task: what is learned; None: what is wanted.

    Raises:
      ValueError: it is not there, or a setting does not fit it; the message names the key.
    """
    dataset = data.open_data_set(wanted.name, wanted.directory, wanted.options)
    open_set = _open_encoded if dataset.encoded else _open_decoded
    opened = open_set(wanted, dataset, task)
    held_out = "" if opened.validation is None else f"{count(opened.validation):,} to stop by, "
    counts = f"{count(opened.train):,} to train on, {held_out}{count(opened.test):,} to test on"
    log.info("data: %s; %s", dataset.description, counts)
    return opened


def make_task(wanted: Wanted, split: data.Split, num_classes: int, own: tasks.Own | None = None) -> Task:
    """What is learned, with an example.

    Args:
      wanted: of the data.
      split: the training examples.
      num_classes: C.
      own: a task of the user's own; None: what is wanted.

    Raises:
      ValueError: there is no such task, or it is not for such examples.
    """
    if own is None and FILE.fullmatch(wanted.task):
        own = _load(wanted.task)
    if own is not None:
        return with_example(_made(own, wanted, split), split)
    made = tasks.make(wanted.task, split, num_classes, pad=wanted.pad, flip=wanted.flip)
    return with_example(made, split)


def _load(name: str) -> tasks.Own:
    """The task that FILE.py:NAME stands for."""
    try:
        found: Any = extension.load(name, {})
    except ValueError as error:
        raise ValueError(f"task={name}: {error}") from None
    if not isinstance(found, Task) and not callable(found):
        raise ValueError(f"task={name} is a {type(found).__name__}, no ist_jax.tasks.Task and no function")
    return found


def _made(own: tasks.Own, wanted: Wanted, split: data.Split) -> Task:
    """A task of the user's own, for these training examples."""
    if wanted.pad or wanted.flip:
        raise ValueError(
            f"data.pad={wanted.pad} and data.flip={wanted.flip} are for the package's tasks; one of your own "
            "augments in its `batch`: set config.data.pad to 0 and config.data.flip to False"
        )
    task = own if isinstance(own, Task) else own(split)
    if not isinstance(task, Task):
        raise ValueError(f"the function for a task returned a {type(task).__name__}, no ist_jax.tasks.Task")
    return task


def _open_encoded(wanted: Wanted, dataset: data.DataSet, own: tasks.Own | None) -> Inputs:
    size = make_transform(wanted).size
    together = wanted.batch_size + wanted.eval_batch_size  # the next round waits while the model is evaluated
    check_shared_memory(wanted.options["data.processes"], together, size)
    normalization = images.channel_statistics(wanted.options)
    one = {"image": np.zeros((1, size, size, 3), np.uint8), "label": np.zeros(1, np.int32)}
    # what is streamed arrives augmented
    if own is None and not FILE.fullmatch(wanted.task):
        task = classification(normalization, pad=0, flip=False, num_classes=len(dataset.classes))
    else:
        task = make_task(wanted._replace(flip=False), one, len(dataset.classes), own)
    return Inputs(wanted, dataset, dataset.train, dataset.test, None, with_example(task, one))


def _open_decoded(wanted: Wanted, dataset: data.DataSet, own: tasks.Own | None) -> Inputs:
    whole, test = data.load(dataset.train), data.load(dataset.test)
    if not dataset.classes:
        dataset = dataset._replace(classes=_numbered(whole, test))
    train, held_out = batches.split_validation(wanted.seed, whole, wanted.validation)
    task = make_task(wanted, train, len(dataset.classes), own)
    for name, split in (("training", whole), ("test", test)):
        try:
            task.check(split)
        except ValueError as error:
            raise ValueError(f"data.name={wanted.name!r}: in the {name} examples {error}") from None
    return Inputs(wanted, dataset, train, test, held_out, task)


def _numbered(*splits: data.Split) -> tuple[str, ...]:
    """As many classes as labels, or tokens, of whole numbers tell; none for labels of other kinds."""
    name, ndim = ("label", 1) if "label" in splits[0] else ("tokens", 2)
    labels = [split[name] for split in splits if isinstance(split.get(name), np.ndarray)]
    if len(labels) < len(splits) or any(x.dtype.kind not in "iu" or x.ndim != ndim for x in labels):
        return ()
    return tuple(map(str, range(max(0, *(int(x.max()) + 1 for x in labels)))))


def make_transform(wanted: Wanted) -> images.Transform:
    """How streamed images become arrays of one size.

    Raises:
      ValueError: a key of `config.data` that cannot work with streamed images.
    """
    if wanted.validation:
        raise ValueError(f"data.validation={wanted.validation} is not for streamed images; set it to 0")
    if wanted.pad:
        raise ValueError(f"data.pad={wanted.pad}; streamed images are cropped at random, set it to 0")
    return images.make_transform(wanted.options, flip=wanted.flip)


def feed_rounds(inputs: Inputs, chosen: Devices, starts: np.ndarray) -> Feed:
    """What feeds the rounds: the whole set on every device, or a chunk per round.

    Args:
      inputs: the data set.
      chosen: the devices.
      starts: int [rounds + 1], the base rounds before each round, and all.
    """
    wanted, encoded = inputs.wanted, inputs.dataset.encoded
    labels: Any = np.zeros(count(inputs.train), np.int32)  # no sharing but 'skewed' looks at them
    if wanted.sharing == "skewed":
        labels = inputs.train.labels if encoded else _classes(inputs.train)
    workers, sharing = wanted.num_workers, wanted.sharing
    shards = batches.share_examples(wanted.seed, labels, workers, sharing, wanted.concentration)
    steps = {"seed": wanted.seed, "local_steps": wanted.local_steps, "batch_size": wanted.batch_size}
    if not encoded:
        return InMemoryFeed(devices.replicate(inputs.train, chosen), shards, starts, len(chosen), **steps)
    each = workers // len(chosen)
    here = [each * device + i for device in _devices_here(chosen) for i in range(each)]
    make = TrainBatches(inputs.train, shards, here, make_transform(wanted), **steps)
    put = partial(devices.put, devices=chosen)
    return StreamingFeed(
        make, len(chosen), starts.tolist(), processes=wanted.options["data.processes"], put=put
    )


def _classes(split: data.Split) -> np.ndarray | Rows:
    """The labels by which examples are shared out askew."""
    if _are_classes(label := split.get("label")):
        return label
    raise ValueError(
        "data.sharing='skewed' needs a class per example, 'label' int [N]; set config.data.sharing to "
        "'all' or 'disjoint'"
    )


def _are_classes(label: Any) -> TypeGuard[np.ndarray | Rows]:
    """One of each example, or several."""
    one = isinstance(label, np.ndarray) and label.ndim == 1 and label.dtype.kind in "iu"
    return one or isinstance(label, Rows)


def feed_evaluation(wanted: Wanted, split: Examples, chosen: Devices) -> Evaluation:
    """A split as fixed, class-mixed batches: all on the devices, or read anew by every pass.

    Args:
      wanted: of the data.
      split: `test` or `validation` of the `Inputs`.
      chosen: the devices.
    """
    put = partial(devices.put, devices=chosen)
    if isinstance(split, dict):
        return InMemoryEvaluation(put(deal_batches(split, wanted.eval_batch_size, len(chosen))))
    plan = batches.eval_batches(len(split), wanted.eval_batch_size, len(chosen))
    make = EvalBatches(split, plan, _devices_here(chosen), make_transform(wanted))
    return StreamingEvaluation(make, processes=wanted.options["data.processes"], put=put)


def deal_batches(split: data.Split, batch_size: int, num_devices: int) -> data.Split:
    """The fixed batches [D, n, B, ...] of a split in memory, and the examples' 'weight' float32 [D, n, B]."""
    plan = batches.eval_batches(data.num_examples(split), batch_size, num_devices)
    return data.select(split, plan.indices) | {"weight": plan.weights}


def calibration_batches(inputs: Inputs, most: int) -> Iterator[data.Split]:
    """At most so many batches of training examples, not augmented, each example once."""
    wanted = inputs.wanted
    size = min(wanted.eval_batch_size, count(inputs.train))
    order = rng(wanted.seed, Use.CALIBRATION).permutation(count(inputs.train)).astype(np.int32)
    order = order[: min(most, len(order) // size) * size].reshape(-1, size)
    if not inputs.dataset.encoded:
        chosen = data.select(inputs.train, order)
        return (jax.tree.map(itemgetter(number), chosen) for number in range(len(order)))
    plan = batches.EvalPlan(order[None], np.ones((1, *order.shape), np.float32))
    make = EvalBatches(inputs.train, plan, [0], make_transform(wanted))
    stream = StreamingEvaluation(make, processes=wanted.options["data.processes"], put=lambda chunk: chunk)
    return (jax.tree.map(itemgetter((0, 0)), chunk) for chunk in stream)


def _devices_here(chosen: Devices) -> list[int]:
    """Which of the devices are this process's."""
    return [i for i, device in enumerate(chosen) if device.process_index == jax.process_index()]
