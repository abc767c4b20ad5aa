"""What a config means: the objects that its values describe."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import traverse_util
from ml_collections import config_dict

from ist_jax import partition
from ist_jax.exchange import store


def make_groups(
    config: config_dict.ConfigDict, model: nn.Module, shapes: Any, axes: partition.Axes
) -> dict[str, partition.Group]:
    """The unit groups that `config` partitions; none for the baselines."""
    if config.method != "ist":
        return {}
    if not any(name for names in axes.values() for name in names):
        raise ValueError(
            "method='ist' has nothing to partition: the model names no unit axes (partition.sections, for a "
            "ResNet); name some, or set config.method to 'local_sgd' or 'data_parallel'"
        )
    groups = partition.make_groups(
        shapes,
        axes,
        config.num_workers,
        min_units=config.partition.min_units,
        shares=tuple(config.partition.shares),
    )
    if check_groups := getattr(model, "check_groups", None):
        check_groups(groups)
    return groups


def make_tx(optimizer: config_dict.ConfigDict) -> optax.GradientTransformation:
    """SGD with weight decay and momentum, before the learning rate."""
    parts = []
    if optimizer.weight_decay:
        parts.append(optax.add_decayed_weights(optimizer.weight_decay))
    if optimizer.momentum:
        parts.append(optax.trace(optimizer.momentum, nesterov=optimizer.nesterov))
    return optax.chain(*parts) if parts else optax.identity()


def count_rounds(config: config_dict.ConfigDict, num_examples: int, first: int, before: int) -> int:
    """Rounds of the whole run: `rounds`, or as many as `epochs` of the training set take.

    Args:
      config: of the run.
      num_examples: in the training set.
      first: rounds done by earlier sessions, perhaps with another number of workers.
      before: examples seen in them.
    """
    if config.rounds is not None:
        return config.rounds
    return _rounds_of(config, config.epochs, num_examples, first, before)


def count_warmup_rounds(
    config: config_dict.ConfigDict, num_examples: int, first: int, before: int, rounds: int
) -> int:
    """Rounds, from the run's start, in which all workers train the whole model; arguments as above.

    Not more than the `rounds` of the run; 0 for the methods in which they always do.
    """
    if config.method != "ist":
        return 0
    return min(rounds, _rounds_of(config, config.partition.warmup_epochs, num_examples, first, before))


def _rounds_of(
    config: config_dict.ConfigDict, epochs: float, num_examples: int, first: int, before: int
) -> int:
    per_round = config.num_workers * config.local_steps * config.batch_size
    left = (epochs * num_examples - before) / per_round
    return first + max(0, math.ceil(left - 1e-9))


def make_learning_rates(
    config: config_dict.ConfigDict, rounds: int, first: int = 0, before: int = 0
) -> np.ndarray:
    """Learning rates float32 [rounds, l], by the fraction of all examples that all workers have seen.

    Args:
      config: of the run.
      rounds: of the whole run.
      first: rounds done by earlier sessions; their rows are NaN.
      before: examples seen in them.
    """
    optimizer, left = config.optimizer, max(0, rounds - first) * config.local_steps
    done = before / (config.num_workers * config.batch_size)  # in steps of today's workers
    total, step = done + left, done + np.arange(left)
    warmup = round(optimizer.warmup * total)
    after = (step - warmup) / max(1, total - warmup)  # progress after the warm-up, 0 to 1
    decays = sum((step >= at * total).astype(int) for at in optimizer.step_at)
    factors = {
        "constant": np.ones(left),
        "cosine": (1 + np.cos(np.pi * np.clip(after, 0, 1))) / 2,
        "step": optimizer.step_factor ** np.asarray(decays),
    }
    ramp = np.minimum(1, (step + 1) / max(1, warmup))
    rates = optimizer.learning_rate * ramp * factors[optimizer.schedule]
    past = np.full(rounds * config.local_steps - left, np.nan)
    return np.concatenate([past, rates]).astype(np.float32).reshape(rounds, -1)


def make_loss_fn(
    model: nn.Module,
    score_fn: Callable[..., tuple[jax.Array, jax.Array]],
    scale: Mapping[str, float] | None = None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(flat params, inputs, labels, gates) -> (mean loss, mean of the first score) of a subnet.

    Args:
      model: the subnet.
      score_fn: of the task.
      scale: of its units' branches; None: as they are.
    """

    def loss_fn(params: store.Shards, inputs: Any, labels: jax.Array, gates: Any) -> tuple:
        variables = {"params": traverse_util.unflatten_dict(params, sep="/")}
        logits: Any = model.apply(variables, inputs, gates=gates, scale=scale)
        losses, scores = score_fn(logits, labels)
        return losses.mean(), scores[:, 0].mean()

    return loss_fn
