"""What the rounds and the evaluation are fed: sets in memory, or streamed from disk."""

import logging
from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from ist_jax import data
from ist_jax.data import augment, batches, images
from ist_jax.data.encoded import EvalBatches, TrainBatches
from ist_jax.data.feed import InMemoryEvaluation, InMemoryFeed
from ist_jax.data.sparse import Rows
from ist_jax.data.stream import Evaluation, Feed, StreamingEvaluation, StreamingFeed, check_shared_memory
from ist_jax.key import Options
from ist_jax.runtime import devices
from ist_jax.runtime.devices import Devices
from ist_jax.streams import Use, rng
from ist_jax.task import Task, classification, multi_label

log = logging.getLogger(__name__)

# A `data.Split` in memory or, where the data set is encoded, a `source.EncodedSource`.
Examples: TypeAlias = Any


class Wanted(NamedTuple):
    """What a run asks of its data.

    Attributes:
      name: of the data set.
      directory: of its files.
      options: values of `data.options()`, by whole names.
      pad: pixels of padding before a random crop of a training image.
      flip: mirror half of the training images.
      validation: fraction of the training examples that is held out to stop by.
      sharing: who draws from which examples, as of `batches.share_examples`.
      concentration: of 'skewed' sharing.
      seed: of the run.
      num_workers: S.
      local_steps: l.
      batch_size: B, per worker.
      eval_batch_size: examples per evaluation batch.
    """

    name: str
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
      normalization: mean and deviation, per channel or feature, of what a model is shown; None: examples are
        shown as they are.
    """

    wanted: Wanted
    dataset: data.DataSet
    train: Examples
    test: Examples
    validation: data.Split | None
    task: Task
    normalization: augment.Statistics | None = None


def count(examples: Examples) -> int:
    """How many there are."""
    return len(examples["label"] if isinstance(examples, dict) else examples)


def chance(opened: Inputs) -> float:
    """Test accuracy of naming the most frequent class every time; 1 / classes, where the set is streamed."""
    if not isinstance(opened.test, dict):
        return 1 / len(opened.dataset.classes)
    label = opened.test["label"]
    each = label.index[: label.start[-1]] if isinstance(label, Rows) else label  # then come padding
    return float(np.bincount(each).max() / len(label))


def open_inputs(wanted: Wanted) -> Inputs:
    """The data set that is wanted; decoded, but where it is too large for that.

    Raises:
      ValueError: it is not there, or a setting does not fit it; the message names the key.
    """
    dataset = data.open_data_set(wanted.name, wanted.directory, wanted.options)
    opened = _open_encoded(wanted, dataset) if dataset.encoded else _open_decoded(wanted, dataset)
    held_out = "" if opened.validation is None else f"{count(opened.validation):,} to stop by, "
    counts = f"{count(opened.train):,} to train on, {held_out}{count(opened.test):,} to test on"
    log.info("data: %s; %s", dataset.description, counts)
    return opened


def _open_encoded(wanted: Wanted, dataset: data.DataSet) -> Inputs:
    size = make_transform(wanted).size
    together = wanted.batch_size + wanted.eval_batch_size  # the next round waits while the model is evaluated
    check_shared_memory(wanted.options["data.processes"], together, size)
    normalization = images.channel_statistics(wanted.options)
    normalize = augment.make_normalize(*normalization)
    task = classification(normalize, (size, size, 3), pad=0, flip=False)  # they arrive augmented
    return Inputs(wanted, dataset, dataset.train, dataset.test, None, task, normalization)


def _open_decoded(wanted: Wanted, dataset: data.DataSet) -> Inputs:
    train, held_out = batches.split_validation(wanted.seed, data.load(dataset.train), wanted.validation)
    pad, flip, normalization = wanted.pad, wanted.flip, None
    if (pad or flip) and ("image" not in train or train["image"].ndim == 2):
        raise ValueError("the examples are no images; set config.data.pad to 0, config.data.flip to False")
    if "image" in train:
        normalization = augment.channel_statistics(train["image"])
        normalize = augment.make_normalize(*normalization)
        task = classification(normalize, train["image"].shape[1:], pad=pad, flip=flip)
    else:
        task = multi_label(train["feature"].width)
    return Inputs(wanted, dataset, train, data.load(dataset.test), held_out, task, normalization)


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


def feed_rounds(inputs: Inputs, chosen: Devices, rounds: int) -> Feed:
    """What feeds the rounds: the whole set on every device, or a chunk per round."""
    wanted, encoded = inputs.wanted, inputs.dataset.encoded
    labels = np.zeros(count(inputs.train), np.int32)  # no sharing but 'skewed' looks at them
    if not encoded or wanted.sharing == "skewed":
        labels = inputs.train.labels if encoded else inputs.train["label"]
    workers, sharing = wanted.num_workers, wanted.sharing
    shards = batches.share_examples(wanted.seed, labels, workers, sharing, wanted.concentration)
    steps = {"seed": wanted.seed, "local_steps": wanted.local_steps, "batch_size": wanted.batch_size}
    if not encoded:
        return InMemoryFeed(devices.replicate(inputs.train, chosen), shards, len(chosen), **steps)
    each = workers // len(chosen)
    here = [each * device + i for device in _devices_here(chosen) for i in range(each)]
    make = TrainBatches(inputs.train, shards, here, make_transform(wanted), **steps)
    put = partial(devices.put, devices=chosen)
    return StreamingFeed(make, len(chosen), rounds, processes=wanted.options["data.processes"], put=put)


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
    plan = batches.eval_batches(len(split["label"]), batch_size, num_devices)
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
