"""What the rounds and the evaluation are fed: sets in memory, or streamed from disk."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from ist_jax import data, devices, settings
from ist_jax.data import augment, batches
from ist_jax.data.encoded import EvalBatches, TrainBatches
from ist_jax.data.feed import InMemoryEvaluation, InMemoryFeed
from ist_jax.data.stream import StreamingEvaluation, StreamingFeed, check_shared_memory

log = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """A data set that is open.

    Attributes:
      dataset: what it is.
      train: decoded, 'image' [N, ...] and 'label' int32 [N]; or, to be streamed, a `data.EncodedSource`.
      test: the same.
      normalize: images or features as they are -> inputs of a model.
      shape: of one example.
    """

    dataset: data.DataSet
    train: Any
    test: Any
    normalize: Callable[[jax.Array], jax.Array]
    shape: tuple[int, ...]

    @property
    def num_train(self) -> int:
        return len(self.train if self.dataset.encoded else self.train["label"])


def open_inputs(config: config_dict.ConfigDict) -> Inputs:
    """The data set that `config` names; decoded, but where it is too large for that."""
    name = settings.get(config, "data.name")
    options = {key: settings.get(config, f"data.{key}") for key in data.OPTIONS.get(name, ())}
    dataset = data.open_data_set(name, settings.get(config, "data.dir"), **options)
    if dataset.encoded:
        size, train, test = settings.make_transform(config).size, dataset.train, dataset.test
        check_shared_memory(config.data.processes, max(config.batch_size, config.eval_batch_size), size)
        sizes, shape = (len(train), len(test)), (size, size, 3)
        statistics = settings.get_channel_statistics(config)
    else:
        train, test = data.load(dataset.train), data.load(dataset.test)
        sizes, shape = (len(train["label"]), len(test["label"])), train["image"].shape[1:]
        statistics = augment.channel_statistics(train["image"])
    log.info("data: %s; %s to train on, %s to test on", dataset.description, *(f"{n:,}" for n in sizes))
    return Inputs(dataset, train, test, augment.make_normalize(*statistics), shape)


def make_batch_fn(config: config_dict.ConfigDict, inputs: Inputs) -> Callable[..., Any]:
    """The function that draws a training batch on the device; streamed images arrive augmented."""
    pad, flip = (0, False) if inputs.dataset.encoded else (config.data.pad, config.data.flip)
    return augment.make_batch_fn(inputs.normalize, pad=pad, flip=flip)


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
    transform = settings.make_transform(config)
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
    config: config_dict.ConfigDict, inputs: Inputs, chosen: Sequence[jax.Device]
) -> InMemoryEvaluation | StreamingEvaluation:
    """The test set as fixed, class-mixed batches: all on the devices, or read anew by every pass."""
    put = partial(devices.put, devices=chosen)
    if inputs.dataset.encoded:
        plan = batches.eval_batches(len(inputs.test), config.eval_batch_size, len(chosen))
        make = EvalBatches(inputs.test, plan, _devices_here(chosen), settings.make_transform(config))
        return StreamingEvaluation(make, processes=config.data.processes, put=put)
    plan = batches.eval_batches(len(inputs.test["label"]), config.eval_batch_size, len(chosen))
    dealt = {name: x[plan.indices] for name, x in inputs.test.items()}
    return InMemoryEvaluation(put(dealt | {"weight": plan.weights}))


def calibration_batches(config: config_dict.ConfigDict, inputs: Inputs, most: int) -> Iterator[np.ndarray]:
    """At most so many batches [B, ...] of training examples, not augmented, each example once."""
    size = min(config.eval_batch_size, inputs.num_train)
    order = np.random.default_rng(config.seed).permutation(inputs.num_train).astype(np.int32)
    order = order[: min(most, len(order) // size) * size].reshape(-1, size)
    if not inputs.dataset.encoded:
        return (inputs.train["image"][indices] for indices in order)
    plan = batches.EvalBatches(order[None], np.ones((1, *order.shape), np.float32))
    make = EvalBatches(inputs.train, plan, [0], settings.make_transform(config))
    stream = StreamingEvaluation(make, processes=config.data.processes, put=lambda chunk: chunk)
    return (chunk["image"][0, 0] for chunk in stream)


def _devices_here(chosen: Sequence[jax.Device]) -> list[int]:
    """Which of the devices are this process's."""
    return [i for i, device in enumerate(chosen) if device.process_index == jax.process_index()]
