"""What the rounds and the evaluation are fed: sets in memory, or streamed from disk."""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from ist_jax import data
from ist_jax.data import augment, batches
from ist_jax.data.encoded import EvalBatches, TrainBatches
from ist_jax.data.feed import InMemoryEvaluation, InMemoryFeed
from ist_jax.data.images import Transform
from ist_jax.data.stream import StreamingEvaluation, StreamingFeed, check_shared_memory
from ist_jax.runtime import devices, settings
from ist_jax.streams import Use, rng
from ist_jax.task import Task, classification, multi_label

log = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """A data set that is open.

    Attributes:
      dataset: what it is.
      train: from `data.load`; or, to be streamed, a `data.EncodedSource`.
      test: the same.
      validation: the part of the training examples that is held out to stop by; None: none is.
      task: what is learned from them.
    """

    dataset: data.DataSet
    train: Any
    test: Any
    validation: Any
    task: Task

    @property
    def num_train(self) -> int:
        return len(self.train if self.dataset.encoded else self.train["label"])


def open_inputs(config: config_dict.ConfigDict) -> Inputs:
    """The data set that `config` names; decoded, but where it is too large for that."""
    name = settings.get(config, "data.name")
    options = {key: settings.get(config, f"data.{key}") for key in data.OPTIONS.get(name, ())}
    dataset = data.open_data_set(name, settings.get(config, "data.dir"), **options)
    opened = _open_encoded(config, dataset) if dataset.encoded else _open_decoded(config, dataset)
    test = opened.test if dataset.encoded else opened.test["label"]
    held_out = "" if opened.validation is None else f"{len(opened.validation['label']):,} to stop by, "
    log.info(
        "data: %s; %s to train on, %s%s to test on",
        dataset.description, f"{opened.num_train:,}", held_out, f"{len(test):,}",
    )  # fmt: skip
    return opened


def _open_encoded(config: config_dict.ConfigDict, dataset: data.DataSet) -> Inputs:
    size = make_transform(config).size
    if config.data.validation:
        raise ValueError(
            f"data.validation={config.data.validation} is not for streamed images; set config.data.validation"
            "=0"
        )
    together = config.batch_size + config.eval_batch_size  # the next round waits while the model is evaluated
    check_shared_memory(config.data.processes, together, size)
    normalize = augment.make_normalize(*get_channel_statistics(config))
    task = classification(normalize, (size, size, 3), pad=0, flip=False)  # they arrive augmented
    return Inputs(dataset, dataset.train, dataset.test, None, task)


def _open_decoded(config: config_dict.ConfigDict, dataset: data.DataSet) -> Inputs:
    train, held_out = batches.split_validation(config.seed, data.load(dataset.train), config.data.validation)
    pad, flip = config.data.pad, config.data.flip
    if "image" in train:
        normalize = augment.make_normalize(*augment.channel_statistics(train["image"]))
        task = classification(normalize, train["image"].shape[1:], pad=pad, flip=flip)
    elif pad or flip:
        raise ValueError(
            "sparse examples are no images; set config.data.pad to 0 and config.data.flip to False"
        )
    else:
        task = multi_label(train["feature"].width)
    return Inputs(dataset, train, data.load(dataset.test), held_out, task)


def make_transform(config: config_dict.ConfigDict) -> Transform:
    """How streamed images become arrays of one size.

    Raises:
      ValueError: a key of `config.data` that only streamed images need is missing or cannot work.
    """
    if "size" not in settings.get(config, "data"):
        raise ValueError(
            f"data.name={config.data.name!r} is streamed, and the config has no data.size and the like; "
            "configs/resnet.py:imagenet has them"
        )
    area, aspect = (settings.get_tuple(config, f"data.{key}", float) for key in ("crop_area", "crop_aspect"))
    for key, values, most in (("crop_area", area, 1.0), ("crop_aspect", aspect, math.inf)):
        if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
            upper = " and at most 1" if most == 1 else ""
            raise ValueError(f"data.{key}={values}; set it to two ascending numbers above 0{upper}")
    size, resize = settings.get(config, "data.size"), settings.get(config, "data.resize")
    if not 1 <= size <= resize:
        raise ValueError(f"data.size={size} and data.resize={resize}; the size must be 1 to data.resize")
    if settings.get(config, "data.processes") < 0:
        raise ValueError(f"data.processes={config.data.processes}; set config.data.processes to 0 or more")
    if config.data.pad:
        raise ValueError(f"data.pad={config.data.pad}; streamed images are cropped at random, set it to 0")
    return Transform(size, resize, area, aspect, config.data.flip)


def get_channel_statistics(config: config_dict.ConfigDict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of streamed images, 0 to 255."""
    mean, std = settings.get_tuple(config, "data.mean", float), settings.get_tuple(config, "data.std", float)
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"data.mean={mean} and data.std={std}; set them to three numbers each, std above 0")
    return mean, std


def feed_rounds(
    config: config_dict.ConfigDict, inputs: Inputs, chosen: Sequence[jax.Device], rounds: int
) -> InMemoryFeed | StreamingFeed:
    """What feeds the rounds: the whole set on every device, or a chunk per round."""
    sharing, encoded = config.data.sharing, inputs.dataset.encoded
    labels = np.zeros(inputs.num_train, np.int32)  # no sharing but 'skewed' looks at them
    if not encoded or sharing == "skewed":
        labels = inputs.train.labels if encoded else inputs.train["label"]
    shards = batches.share_examples(
        config.seed, labels, config.num_workers, sharing, config.data.concentration
    )
    steps = {"seed": config.seed, "local_steps": config.local_steps, "batch_size": config.batch_size}
    if not encoded:
        return InMemoryFeed(devices.replicate(inputs.train, chosen), shards, len(chosen), **steps)
    transform = make_transform(config)
    each = config.num_workers // len(chosen)
    workers = [each * device + i for device in _devices_here(chosen) for i in range(each)]
    return StreamingFeed(
        TrainBatches(inputs.train, shards, workers, transform, **steps),
        len(chosen),
        rounds,
        processes=config.data.processes,
        put=partial(devices.put, devices=chosen),
    )


def feed_evaluation(
    config: config_dict.ConfigDict, split: Any, chosen: Sequence[jax.Device]
) -> InMemoryEvaluation | StreamingEvaluation:
    """A split as fixed, class-mixed batches: all on the devices, or read anew by every pass.

    Args:
      config: of the run.
      split: `test` or `validation` of the `Inputs`.
      chosen: the devices.
    """
    put = partial(devices.put, devices=chosen)
    if isinstance(split, dict):
        return InMemoryEvaluation(put(deal_batches(split, config.eval_batch_size, len(chosen))))
    plan = batches.eval_batches(len(split), config.eval_batch_size, len(chosen))
    make = EvalBatches(split, plan, _devices_here(chosen), make_transform(config))
    return StreamingEvaluation(make, processes=config.data.processes, put=put)


def deal_batches(split: data.Split, batch_size: int, num_devices: int) -> dict[str, Any]:
    """The fixed batches [D, n, B, ...] of a split in memory, and the examples' 'weight' float32 [D, n, B]."""
    plan = batches.eval_batches(len(split["label"]), batch_size, num_devices)
    return data.select(split, plan.indices) | {"weight": plan.weights}


def calibration_batches(config: config_dict.ConfigDict, inputs: Inputs, most: int) -> Iterator[Any]:
    """At most so many batches of training examples, not augmented, each example once."""
    size = min(config.eval_batch_size, inputs.num_train)
    order = rng(config.seed, Use.CALIBRATION).permutation(inputs.num_train).astype(np.int32)
    order = order[: min(most, len(order) // size) * size].reshape(-1, size)
    if not inputs.dataset.encoded:
        chosen = data.select(inputs.train, order)
        return (jax.tree.map(itemgetter(number), chosen) for number in range(len(order)))
    plan = batches.EvalBatches(order[None], np.ones((1, *order.shape), np.float32))
    make = EvalBatches(inputs.train, plan, [0], make_transform(config))
    stream = StreamingEvaluation(make, processes=config.data.processes, put=lambda chunk: chunk)
    return (jax.tree.map(itemgetter((0, 0)), chunk) for chunk in stream)


def _devices_here(chosen: Sequence[jax.Device]) -> list[int]:
    """Which of the devices are this process's."""
    return [i for i, device in enumerate(chosen) if device.process_index == jax.process_index()]
