"""What a config means: checked values, and the objects they describe."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import config_dict

from ist_jax import METHODS, partition
from ist_jax.models.mlp import MLP
from ist_jax.models.resnet import BLOCKS, STEMS, ResNet

_CHOICES = {
    "method": METHODS,
    "workers_on_device": ("map", "vmap"),
    "compute_dtype": ("float32", "bfloat16"),
    "data.sharing": ("all", "disjoint", "skewed"),
    "data.clip_length": ("pad", "drop"),
    "optimizer_state": ("reset", "carry"),
    "optimizer.schedule": ("constant", "cosine", "step"),
}
# Numbers and their bounds, both allowed; tuples are checked element by element.
_BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "num_workers": (1, math.inf),
    "num_devices": (0, math.inf),
    "local_steps": (1, math.inf),
    "batch_size": (1, math.inf),
    "eval_every": (0, math.inf),
    "eval_batch_size": (1, math.inf),
    "patience": (0, math.inf),
    "data.pad": (0, math.inf),
    "data.validation": (0, 0.9),
    "participation": (0, 1),
    "max_rounds_left_out": (0, math.inf),
    "checkpoint.every": (0, math.inf),
    "checkpoint.keep": (1, math.inf),
    "lost_after": (1, math.inf),
    "stuck_after": (0, math.inf),
    "partition.min_units": (0, math.inf),
    "partition.warmup_epochs": (0, math.inf),
    "optimizer.learning_rate": (0, math.inf),
    "optimizer.momentum": (0, 1),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.warmup": (0, 1),
    "optimizer.step_at": (0, 1),
    "optimizer.step_factor": (0, math.inf),
}
_TUPLES: dict[str, type] = {"partition.shares": float, "optimizer.step_at": float, "data.words": str}
_REQUIRED = (
    "rounds",
    "epochs",
    "data.name",
    "data.dir",
    "data.flip",
    "optimizer.nesterov",
    "model.name",
    "partition.scale_at_evaluation",
)


def check(config: config_dict.ConfigDict) -> None:
    """Raises ValueError, naming the key and what is allowed, for values that cannot work."""
    for key in _REQUIRED:
        get(config, key)
    for key, allowed in _CHOICES.items():
        if (value := get(config, key)) not in allowed:
            raise ValueError(f"{key}={value!r}; set config.{key} to one of {', '.join(map(repr, allowed))}")
    for key, kind in _TUPLES.items():
        get_tuple(config, key, kind)
    for key, (least, most) in _BOUNDS.items():
        values = get(config, key)
        for value in values if isinstance(values, tuple | list) else (values,):
            if not (least <= value <= most and math.isfinite(value)):
                upper = "or more (a finite number)" if most == math.inf else f"to {most}"
                raise ValueError(f"{key}={values}; set config.{key} to {least} {upper}")
    if config.patience and not (config.data.validation and config.eval_every):
        raise ValueError(
            f"patience={config.patience} counts evaluations of a validation split; set "
            "config.data.validation and config.eval_every above 0, or config.patience to 0"
        )
    if not get(config, "data.concentration") > 0:
        raise ValueError(f"data.concentration={config.data.concentration}; set it to more than 0")
    if config.rounds is not None and config.rounds < 1:
        raise ValueError(f"rounds={config.rounds}; set config.rounds to 1 or more, or leave it unset")
    if config.rounds is None and not 0 < config.epochs < math.inf:
        raise ValueError(f"epochs={config.epochs}; set config.epochs to a number above 0")


def get(config: config_dict.ConfigDict, key: str) -> Any:
    """A value by its dotted key.

    Raises:
      ValueError: the config has no such key.
    """
    value = config
    for part in key.split("."):
        if part not in value:
            raise ValueError(f"the config has no key {key!r}; keys beside it: {', '.join(sorted(value))}")
        value = value[part]
    return value


def get_tuple(config: config_dict.ConfigDict, key: str, kind: type) -> tuple:
    """A tuple of finite numbers, or of strings, by its dotted key.

    Raises:
      ValueError: it is missing or something else.
    """
    values = get(config, key)
    kinds: Any = (int, float) if kind is float else kind

    def fits(value: Any) -> bool:
        right = isinstance(value, kinds) and not isinstance(value, bool)
        return right and (kind is str or math.isfinite(value))

    if not isinstance(values, tuple | list) or not all(map(fits, values)):
        plural, example = ("strings", "('yes','no')") if kind is str else (f"{kind.__name__}s", "'(1,2)'")
        raise ValueError(f"{key}={values!r}; set config.{key} to a tuple of {plural}, such as {example}")
    return tuple(values)


def build_model(config: config_dict.ConfigDict, num_classes: int) -> nn.Module:
    """The model that `config.model` describes."""
    name = get(config, "model.name")
    dtype = None if get(config, "compute_dtype") == "float32" else jnp.bfloat16  # None: the parameters'
    if name == "resnet":
        sections, width = get_tuple(config, "model.sections", int), get(config, "model.width")
        if not sections or min(sections) < 1 or width < 1:
            raise ValueError(f"model.sections={sections} and model.width={width} must be positive")
        partitioned = get_tuple(config, "partition.sections", int)
        kind, stem = get(config, "model.block"), get(config, "model.stem")
        for key, value, allowed in (("block", kind, tuple(BLOCKS)), ("stem", stem, STEMS)):
            if value not in allowed:
                raise ValueError(f"model.{key}={value!r}; set config.model.{key} to one of {allowed}")
        dealt = get(config, "partition.deal_strided")
        return ResNet(sections, width, num_classes, partitioned, dealt, dtype, kind, stem)
    if name == "mlp":
        hidden = get_tuple(config, "model.hidden", int)
        if not hidden or min(hidden) < 1:
            raise ValueError(f"model.hidden={hidden}; set config.model.hidden to one or more positive widths")
        return MLP(hidden, num_classes, dtype, get(config, "model.output_norm"))
    raise ValueError(f"model.name={name!r}; set config.model.name to 'resnet' or 'mlp'")


def make_groups(
    config: config_dict.ConfigDict, model: nn.Module, shapes: Any, axes: partition.Axes
) -> dict[str, partition.Group]:
    """The unit groups that `config` partitions; none for the baselines."""
    if not any(name for names in axes.values() for name in names):
        raise ValueError(
            "method='ist' has nothing to partition: the model names no unit axes (partition.sections, for a "
            "ResNet); name some, or set config.method to 'local_sgd' or 'data_parallel'"
        )
    if isinstance(model, ResNet) and model.deal_strided and config.partition.min_units:
        raise ValueError(
            f"partition.min_units={config.partition.min_units} gives every worker the strided blocks that "
            "partition.deal_strided=True deals out; set config.partition.min_units to 0"
        )
    groups = partition.make_groups(
        shapes,
        axes,
        config.num_workers,
        min_units=config.partition.min_units,
        shares=get_tuple(config, "partition.shares", float),
    )
    if isinstance(model, MLP):
        for group in groups.values():
            if min(group.counts) < 1:
                raise ValueError(
                    f"num_workers={config.num_workers} leaves a worker without a neuron of the {group.size} "
                    f"of {group.name}; lower config.num_workers, even out config.partition.shares, or set "
                    "config.partition.min_units to at least 1"
                )
    return groups
