"""What a config means: checked values, and the objects they describe."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from ml_collections import config_dict

from ist_jax import partition, store
from ist_jax.models.mlp import MLP
from ist_jax.models.resnet import ResNet

_CHOICES = {
    "method": ("ist", "local_sgd", "data_parallel"),
    "workers_on_device": ("map", "vmap"),
    "optimizer_state": ("reset", "carry"),
    "optimizer.schedule": ("constant", "cosine", "step"),
}
_LEAST = {
    "num_workers": 1,
    "num_devices": 0,
    "local_steps": 1,
    "batch_size": 1,
    "eval_every": 0,
    "eval_batch_size": 1,
    "data.pad": 0,
    "partition.min_units": 0,
    "optimizer.learning_rate": 0,
    "optimizer.momentum": 0,
    "optimizer.weight_decay": 0,
    "optimizer.warmup": 0,
}


def check(config: config_dict.ConfigDict) -> None:
    """Raises ValueError, naming the key and what is allowed, for values that cannot work."""
    for key, allowed in _CHOICES.items():
        if (value := _get(config, key)) not in allowed:
            raise ValueError(f"{key}={value!r}; set config.{key} to one of {', '.join(map(repr, allowed))}")
    for key, least in _LEAST.items():
        if not (value := _get(config, key)) >= least:
            raise ValueError(f"{key}={value}; set config.{key} to {least} or more")
    if config.rounds is not None and config.rounds < 1:
        raise ValueError(f"rounds={config.rounds}; set config.rounds to 1 or more, or leave it unset")
    if config.rounds is None and not config.epochs > 0:
        raise ValueError(f"epochs={config.epochs}; set config.epochs to more than 0")


def _get(config: config_dict.ConfigDict, key: str) -> Any:
    value = config
    for part in key.split("."):
        if part not in value:
            raise ValueError(f"the config has no key {key!r}")
        value = value[part]
    return value


def build_model(config: config_dict.ConfigDict, num_classes: int) -> nn.Module:
    """The model that `config.model` describes."""
    name = _get(config, "model.name")
    if name == "resnet":
        sections = tuple(config.model.sections)
        if not sections or min(sections) < 1 or config.model.width < 1:
            raise ValueError(
                f"model.sections={sections} and model.width={config.model.width} must be positive"
            )
        return ResNet(sections, config.model.width, num_classes, tuple(config.partition.sections))
    if name == "mlp":
        hidden = tuple(config.model.hidden)
        if not hidden or min(hidden) < 1:
            raise ValueError(f"model.hidden={hidden}; set config.model.hidden to one or more positive widths")
        if config.method == "ist" and min(hidden) < config.num_workers and config.partition.min_units < 1:
            raise ValueError(
                f"num_workers={config.num_workers} leaves workers without a neuron of a layer of "
                f"model.hidden={hidden}; set config.num_workers to at most {min(hidden)} or "
                "config.partition.min_units to at least 1"
            )
        return MLP(hidden, num_classes)
    raise ValueError(f"model.name={name!r}; set config.model.name to 'resnet' or 'mlp'")


def make_groups(
    config: config_dict.ConfigDict, shapes: Any, axes: partition.Axes
) -> dict[str, partition.Group]:
    """The unit groups that `config` partitions; none for the baselines."""
    if config.method != "ist":
        return {}
    if not any(name for names in axes.values() for name in names):
        raise ValueError(
            "method='ist' has nothing to partition: the model names no unit axes (partition.sections, for a "
            "ResNet); name some, or set config.method to 'local_sgd' or 'data_parallel'"
        )
    return partition.make_groups(
        shapes,
        axes,
        config.num_workers,
        min_units=config.partition.min_units,
        shares=tuple(config.partition.shares),
    )


def make_tx(optimizer: config_dict.ConfigDict) -> optax.GradientTransformation:
    """SGD with weight decay and momentum, before the learning rate."""
    parts = []
    if optimizer.weight_decay:
        parts.append(optax.add_decayed_weights(optimizer.weight_decay))
    if optimizer.momentum:
        parts.append(optax.trace(optimizer.momentum, nesterov=optimizer.nesterov))
    return optax.chain(*parts)


def make_learning_rates(config: config_dict.ConfigDict, rounds: int) -> np.ndarray:
    """Learning rates float32 [rounds, l], by the fraction of all examples that all workers have seen."""
    optimizer, total = config.optimizer, rounds * config.local_steps
    warmup = round(optimizer.warmup * total)
    schedules: dict[str, optax.Schedule] = {
        "constant": optax.constant_schedule(optimizer.learning_rate),
        "cosine": optax.cosine_decay_schedule(optimizer.learning_rate, max(1, total - warmup)),
        "step": optax.piecewise_constant_schedule(
            optimizer.learning_rate,
            {round(at * total) - warmup: optimizer.step_factor for at in optimizer.step_at},
        ),
    }
    ramp = optax.linear_schedule(0.0, optimizer.learning_rate, max(1, warmup))
    schedule = optax.join_schedules([ramp, schedules[optimizer.schedule]], [warmup])
    return np.asarray(jax.vmap(schedule)(jnp.arange(total)), np.float32).reshape(rounds, -1)


def make_loss_fn(model: nn.Module) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(flat params, inputs, labels, gates) -> (mean cross-entropy, fraction correct) of a subnet."""

    def loss_fn(params: store.Shards, inputs: jax.Array, labels: jax.Array, gates: Any) -> tuple:
        variables = {"params": traverse_util.unflatten_dict(params, sep="/")}
        logits: Any = model.apply(variables, inputs, gates=gates)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (logits.argmax(-1) == labels).mean()

    return loss_fn
