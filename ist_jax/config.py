"""Every setting, once: default, meaning, bounds, and whether a run may go on with another value.

`COMMON` holds those that every config has; those of a model or a data set stand beside it and come from the
tables `models.MODELS` and `data.SETS`. `configs/*.py` say what an experiment sets.
"""

import functools
import inspect
import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import config_dict

from ist_jax import data, extension
from ist_jax.deals import DEALS
from ist_jax.errors import did_you_mean
from ist_jax.exchange.codec import CODECS
from ist_jax.exchange.quantize import BITS
from ist_jax.key import FILE, Key, Options, Settings, Value
from ist_jax.methods import METHODS, Entry, policy_of
from ist_jax.methods.optimizers import DECAYED, OPTIMIZERS
from ist_jax.methods.outer import OUTERS
from ist_jax.methods.steps import POLICIES
from ist_jax.models import MODELS
from ist_jax.tasks import TASKS

_wrap = functools.partial(textwrap.wrap, width=100, subsequent_indent="    ", break_on_hyphens=False)
free = functools.partial(Key, resume=True)  # a run may go on with another value

COMMON: dict[str, Key] = {
    "method": Key("ist", "what a round does, where there are no stages", choices=METHODS, file=True),
    "task": Key(
        "auto", "what is learned; 'auto': what the data set is for", choices=("auto", *TASKS), file=True
    ),
    "seed": Key(0, "seed of parameters, partitions and the order of examples", least=0, most=2**31 - 1),
    "num_workers": free(4, "workers S", least=1),
    "num_devices": free(
        0, "devices that host the workers; 0: on CPU a virtual one per worker, else as many as fit", least=0
    ),
    "workers_on_device": free(
        "map", "how a device trains its workers; 'map': one by one, 'vmap': together", choices=("map", "vmap")
    ),
    "compute_dtype": Key(
        "float32", "of the layers; parameters, merges, losses stay float32", choices=("float32", "bfloat16")
    ),
    "stages": Key(
        (),
        "methods one after another, each with its passes over the training set; (): method alone",
        kind=tuple,
    ),
    "local_steps": Key(50, "steps of a worker between two exchanges", least=1),
    "local_steps_schedule": Key(
        "constant",
        "of the steps between two exchanges; 'qsr': more of them as the learning rate falls",
        choices=("constant", "qsr"),
    ),
    "local_steps_alpha": Key(
        None,
        "of 'qsr': a round has (alpha / learning rate)^2 steps, at least local_steps",
        kind=float,
        least=0,
        above=True,
    ),
    "batch_size": Key(64, "examples per worker and step", least=1),
    "rounds": free(None, "rounds of the run; unset: as many as epochs take", kind=int, least=1, extends=True),
    "epochs": free(
        40.0,
        "joint passes over the training set, where rounds is unset; stages have their own",
        least=0,
        above=True,
        extends=True,
    ),
    "eval_every": free(5, "rounds between evaluations; 0: after the last round only", least=0),
    "eval_batch_size": Key(128, "examples per evaluation batch, whose statistics are part of it", least=1),
    "patience": free(
        0,
        "evaluations without a better metric on the validation split to stop after; 0: never",
        least=0,
        extends=True,
    ),
    "participation": Key(
        1.0, "chance of each worker to take part in a round; the others change nothing", least=0, most=1
    ),
    "max_rounds_left_out": free(
        10, "rounds in a row of a worker with non-finite values that stop the run; 0: never", least=0
    ),
    "lost_after": free(60.0, "seconds without a sign of life until a process counts as lost", least=1),
    "stuck_after": free(1800.0, "seconds without progress, though all processes live; 0: for ever", least=0),
    "checkpoint.every": free(50, "rounds between checkpoints; 0: at the end alone", least=0),
    "checkpoint.keep": free(2, "latest checkpoints that stay; the best one does as well", least=1),
    "data.name": Key("digits", f"data set: {' '.join(data.SETS)}", file=True),
    "data.dir": free("", "folder or file of the data set; embedded ones need none"),
    "data.pad": Key(0, "pixels of padding before a random crop of a training image", least=0),
    "data.flip": Key(False, "mirror half of the training images"),
    "data.sharing": Key(
        "all",
        "who draws from which training examples; 'all': everybody from all, 'disjoint': from a shard, "
        "'skewed': from a shard with its own mix of classes",
        choices=("all", "disjoint", "skewed"),
    ),
    "data.concentration": Key(
        0.5, "of the Dirichlet distribution of 'skewed'; the smaller, the more skewed", least=0, above=True
    ),
    "data.validation": Key(0.0, "fraction of the training examples held out to stop by", least=0, most=0.9),
    "model.name": Key(
        "resnet", f"model: {', '.join(MODELS)}, or FILE.py:NAME; a config file has the keys of one"
    ),
    "partition.deal": Key("random", "how units are dealt to the workers", choices=DEALS, file=True),
    "partition.min_units": free(0, "least units per worker and group, reached by overlap; 0: none", least=0),
    "partition.shares": free((), "relative speed of each worker; (): equal", kind=float),
    "partition.warmup_epochs": Key(
        0.0, "first of the passes, in which all workers train the whole model", least=0
    ),
    "partition.scale_at_evaluation": Key(
        True, "scale what units add (an MLP's logits) by the fraction of the workers that held them"
    ),
    "exchange.codec": Key("none", "what an exchange sends; 'none': plain numbers", choices=CODECS, file=True),
    "exchange.gather_bits": Key(32, "of each number that an owner sends; 16: bfloat16", choices=BITS),
    "exchange.merge_bits": Key(32, "of each number that a worker sends back; 16: bfloat16", choices=BITS),
    "exchange.keep": Key(
        1.0,
        "fraction that a worker sends back of what it has changed, the largest numbers",
        least=0,
        above=True,
        most=1,
    ),
    "exchange.error_feedback": Key(
        False, "a worker keeps what few bits, or keep, leave unsent of shared leaves, for its next change"
    ),
    "optimizer.name": Key("sgd", "what a worker takes its steps by", choices=OPTIMIZERS),
    "optimizer.learning_rate": Key(0.1, "learning rate at its highest", least=0),
    "optimizer.momentum": Key(0.9, "momentum of SGD; 0: none", least=0, most=1),
    "optimizer.nesterov": Key(False, "Nesterov's momentum, of SGD"),
    "optimizer.weight_decay": Key(
        0.0, "SGD: what of each parameter is added to its gradient; others: to its step", least=0
    ),
    "optimizer.decayed": Key(
        "all",
        "what weight decay is for; 'kernels': not for norms, biases, embeddings and positions",
        choices=DECAYED,
    ),
    "optimizer.b1": Key(0.9, "decay of the mean gradient, of AdamW and Lion", least=0, most=1),
    "optimizer.b2": Key(
        None,
        "decay of AdamW's mean square, unset: 0.999; of Lion's mean, unset: 0.99",
        kind=float,
        least=0,
        most=1,
    ),
    "optimizer.eps": Key(1e-8, "added to AdamW's root mean square", least=0, above=True),
    "optimizer.schedule": Key(
        "constant", "of the learning rate, by examples seen", choices=("constant", "cosine", "step")
    ),
    "optimizer.warmup": Key(0.0, "fraction of all examples in which the rate rises from 0", least=0, most=1),
    "optimizer.step_at": Key(
        (0.5, 0.75), "fractions of all examples at which 'step' takes a step", kind=float, least=0, most=1
    ),
    "optimizer.step_factor": Key(0.1, "of the learning rate at a step of 'step'", least=0),
    "outer.name": Key("none", "what becomes of the means that a round brings", choices=OUTERS),
    "outer.learning_rate": Key(None, "of the outer optimizer; unset: 0.8, of adam 0.01", kind=float, least=0),
    "outer.momentum": Key(0.5, "of the outer optimizer; of adam the decay of its mean", least=0, most=0.999),
    "outer.beta2": Key(0.99, "decay of the mean square of outer adam", least=0, most=0.9999),
    "outer.by_holders": Key(
        0.0, "power p: the outer rate of a unit is times (its holders / workers)^p", least=0
    ),
    **{name: key for entry in METHODS.values() for name, key in entry.options.items()},
    "optimizer_state": Key(
        "",
        "at a round's start; 'reset': new, 'keep': a worker's own of the shared leaves, 'carry': what "
        "travels with the units; '': the method's default",
        choices=("", *POLICIES),
    ),
}


def make(model: str, *settings: Options) -> config_dict.ConfigDict:
    """A config with all of its keys, locked.

    Args:
      model: one of `MODELS`.
      *settings: values by key, such as {'model.width': 64}; the later ones count.

    Raises:
      ValueError: a key or the model does not exist.
    """
    keys = _keys(model)
    unset = {name: config_dict.placeholder(key.kind) for name, key in keys.items() if key.default is None}
    flat = {name: key.default for name, key in keys.items()} | unset
    config = config_dict.ConfigDict(traverse_util.unflatten_dict(flat, sep="."))
    config.model.name = model
    config.lock()  # a misspelt key would be kept
    for name, value in (item for own in settings for item in own.items()):
        if name not in keys:
            raise ValueError(f"the config has no key {name!r}; {did_you_mean(name, keys)}".rstrip("; "))
        config.update_from_flattened_dict({name: value})
    return config


def choose(modes: Mapping[str, Options], mode: str) -> Options:
    """What a mode of a config file sets.

    Raises:
      ValueError: the file has no such mode.
    """
    if mode not in modes:
        raise ValueError(f"the config has no mode {mode!r}; it has {', '.join(modes)}")
    return modes[mode]


def keys_of(config: config_dict.ConfigDict) -> dict[str, Key]:
    """All keys that a config must have, by whole names: the common ones, its model's, those of all data sets.

    Raises:
      ValueError: there is no such model.
    """
    return _keys(_get(config, "model.name"))


def check(config: config_dict.ConfigDict) -> None:
    """Raises ValueError, naming the key and what is allowed, for values that cannot work."""
    for name, key in keys_of(config).items():
        value = _get(config, name)
        if name != "epochs" or config.rounds is None:  # rounds win
            key.check(name, value)
    if config.patience and not (config.data.validation and config.eval_every):
        raise ValueError(
            f"patience={config.patience} counts evaluations of a validation split; set "
            "config.data.validation and config.eval_every above 0, or config.patience to 0"
        )
    if config.stages:
        _check_stages(config)
    if config.local_steps_schedule == "qsr":
        _check_qsr(config)


def _check_stages(config: config_dict.ConfigDict) -> None:
    said = f"stages={config.stages!r}"
    for stage in config.stages:
        right = len(stage) == 2 and isinstance(stage[0], str) and type(stage[1]) in (int, float)
        if not (right and 0 < stage[1] < math.inf):
            example = "(('data_parallel',1.0),('ist',3.0))"
            raise ValueError(
                f"{said}: {stage!r} is no method with its passes over the training set, above 0; set "
                f"config.stages to such pairs, as in {example}"
            )
        if stage[0] not in METHODS and not FILE.fullmatch(stage[0]):
            allowed = COMMON["method"].allowed()
            raise ValueError(f"{said}: there is no method {stage[0]!r}; set config.stages to {allowed}")
    if config.rounds is not None:
        raise ValueError(
            f"rounds={config.rounds} beside stages: their passes say how long the run is; leave rounds unset"
        )
    if config.partition.warmup_epochs:
        raise ValueError(
            f"partition.warmup_epochs={config.partition.warmup_epochs} beside stages; set it to 0, and give "
            "the warm-up as the first stage, such as ('local_sgd',1.0)"
        )
    entries = {name: entry_of(name) for name in methods_of(config)}
    members = [name for name, entry in entries.items() if entry.members]
    if members and len(entries) > 1:
        raise ValueError(
            f"{said}: the nets of {members[0]!r} are never merged into a model that another stage could "
            "begin or end with; make it the only method"
        )
    if config.outer.name != "none" and not any(entry.has_outer for entry in entries.values()):
        raise ValueError(
            f"outer.name={config.outer.name!r} is for what a merge brings, and no method of {said} has one; "
            "set config.outer.name to 'none'"
        )
    own = {f"exchange.{key}": value for key, value in config.exchange.items()}
    changed = [f"{key}={value!r}" for key, value in own.items() if value != COMMON[key].default]
    if changed and not any(entry.exchanges for entry in entries.values()):
        raise ValueError(
            f"{', '.join(changed)}: for exchanges of parameters, and no method of {said} has one; leave "
            "config.exchange as it is by default"
        )


def _check_qsr(config: config_dict.ConfigDict) -> None:
    said = "local_steps_schedule='qsr'"
    if config.local_steps_alpha is None:
        raise ValueError(
            f"{said} needs an alpha; set config.local_steps_alpha to a number above 0, such as 0.2"
        )
    if config.rounds is not None:
        raise ValueError(
            f"rounds={config.rounds} beside {said}, by which the learning rate says how many there are; "
            "leave rounds unset"
        )
    if not any(entry_of(name).exchanges for name in methods_of(config)):
        raise ValueError(
            f"{said} is for exchanges of parameters, and method={methods_of(config)[0]!r} has none; set "
            "config.local_steps_schedule to 'constant'"
        )


def methods_of(config: config_dict.ConfigDict) -> list[str]:
    """The names of a run's methods, each once, in order."""
    return list(dict.fromkeys(name for name, _ in config.stages)) or [config.method]


def entry_of(method: str) -> Entry:
    """A method's line of the table, or what a file of the user's own makes one of.

    Raises:
      ValueError: there is no such method.
    """
    found: Any = extension.load(method, METHODS)
    return found if isinstance(found, Entry) else Entry(found, deals_units=True)


def options(config: config_dict.ConfigDict, names: Iterable[str]) -> Settings:
    """The values of some keys by whole names, tuples as such.

    Raises:
      ValueError: the config has no such key.
    """
    values = {name: _get(config, name) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def build_model(config: config_dict.ConfigDict, num_classes: int) -> nn.Module:
    """The model that `config.model` describes.

    FILE.py:NAME is a model, or a class or function that returns one, called with those of `num_classes` and
    `config` that it has parameters for.

    Raises:
      ValueError: there is no such model, or its options cannot work.
    """
    _keys(name := config.model.name)
    if name not in MODELS:
        return _build_own(config, num_classes)
    entry = MODELS[name]
    dtype = None if config.compute_dtype == "float32" else jnp.bfloat16  # None: the parameters'
    return entry.build(options(config, entry.options), num_classes, dtype)


def _build_own(config: config_dict.ConfigDict, num_classes: int) -> nn.Module:
    try:
        found: Any = extension.load(config.model.name, {})
    except ValueError as error:
        raise ValueError(f"model.name={config.model.name}: {error}") from None
    if callable(found) and not isinstance(found, nn.Module):
        given = {"num_classes": num_classes, "config": config}
        found = found(**{name: given[name] for name in inspect.signature(found).parameters if name in given})
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"model.name={config.model.name} is a {type(found).__name__}; a flax.linen.Module is needed, or "
            "what returns one (of an NNX model: flax.nnx.bridge.ToLinen)"
        )
    return found


def complete(recorded: Options) -> Settings:
    """A recorded config.json with the defaults of those keys that were added since.

    Args:
      recorded: nested, as in the file; tuples are lists.
    """
    flat = traverse_util.flatten_dict(dict(recorded), sep=".")
    model = flat.get("model.name")
    known = model in MODELS or FILE.fullmatch(str(model))
    for name, key in (_keys(model) if known else COMMON).items():
        flat.setdefault(name, list(key.default) if isinstance(key.default, tuple) else key.default)
    return _plainly(traverse_util.unflatten_dict(flat, sep="."), METHODS.get(flat.get("method", "")))


def _plainly(settings: Settings, entry: object) -> Settings:
    """Settings that say what is done with the optimizer's state, where a run has one method."""
    if settings.get("stages"):
        return settings
    return settings | {"optimizer_state": policy_of(entry, settings.get("optimizer_state", ""))}


def record(config: config_dict.ConfigDict) -> Settings:
    """A config as a run records it: nested, with the hashes of the files of the user's own by key.

    Raises:
      ValueError: there is no such file.
    """
    settings = config.to_dict()
    name = str(settings.get("method"))
    entry = extension.load(name, METHODS) if FILE.fullmatch(name) else METHODS.get(name)
    digests = extension.digests(traverse_util.flatten_dict(settings, sep="."))
    return _plainly(settings, entry) | {"files": digests}


def restore(recorded: Options) -> config_dict.ConfigDict:
    """The config of a recorded one.

    Raises:
      ValueError: a file of the user's own is missing or not the one that the run was made with.
    """
    settings = complete(recorded)
    digests = traverse_util.flatten_dict(settings.pop("files", {}), sep=".")
    for key, name in traverse_util.flatten_dict(settings, sep=".").items():
        if key in digests and extension.digest(name) != digests[key]:
            raise ValueError(f"{key}={name}: the file is not the one that the run was made with")
    return config_dict.ConfigDict(settings)


def may_change(name: str) -> bool:
    """Whether a run may go on with another value of a key."""
    return any(name in keys and keys[name].resume for keys in map(_keys, MODELS))


def extends(name: str) -> bool:
    """Whether a finished run is not finished with another value of a key."""
    return name in COMMON and COMMON[name].extends


def help_text(config: config_dict.ConfigDict) -> str:
    """Two lines per key: what it means; its value in the config, what is allowed, may it change on resume."""
    lines: list[str] = []
    for name, key in sorted(keys_of(config).items(), key=lambda item: item[0].rpartition(".")[0]):
        notes = [f"default: {_get(config, name)!r}", key.allowed(), "may change on resume" * key.resume]
        meaning, limits = f"--config.{name}: {key.help}", f"({'; '.join(filter(None, notes))})"
        lines += [*_wrap(meaning, initial_indent="  "), *_wrap(limits, initial_indent="    ")]
    return "\n".join(lines)


def _keys(model: str) -> dict[str, Key]:
    if model in MODELS:
        return COMMON | MODELS[model].options | data.options()
    if FILE.fullmatch(model):
        return COMMON | data.options()
    known = ", ".join(map(repr, MODELS))
    raise ValueError(f"model.name={model!r}; set config.model.name to one of {known}, or FILE.py:NAME")


def _get(config: config_dict.ConfigDict, name: str) -> Value:
    value = config
    for part in name.split("."):
        if part not in value:
            raise ValueError(f"the config has no key {name!r}; keys beside it: {', '.join(sorted(value))}")
        value = value[part]
    return value
