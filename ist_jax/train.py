"""The driver: from a config to a trained global model, its metrics and its summary."""

import datetime
import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from ml_collections import config_dict

from ist_jax import checkpoint, data, devices, evaluate, ledger, local_sgd, metrics, partition, store
from ist_jax.data import augment, batches
from ist_jax.models.mlp import MLP
from ist_jax.models.resnet import ResNet

log = logging.getLogger(__name__)

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


class Programs(NamedTuple):
    """The compiled programs of a run; a phase that a method does not have is None."""

    gather: jax.stages.Compiled | None
    local: jax.stages.Compiled
    merge: jax.stages.Compiled | None
    evaluate: jax.stages.Compiled


class Run(NamedTuple):
    """A run that is set up: what the rounds need."""

    config: config_dict.ConfigDict
    dataset: data.DataSet
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    model: nn.Module
    normalize: Callable[[jax.Array], jax.Array]
    devices: list[jax.Device]
    recipe: local_sgd.Recipe
    programs: Programs
    state: local_sgd.State
    train_data: Any
    test_batches: Any
    num_rounds: int
    learning_rates: np.ndarray
    seconds_compile: float

    @property
    def layout(self) -> store.Layout:
        return self.recipe.layout


def train(config: config_dict.ConfigDict, workdir: str | Path, model: nn.Module | None = None) -> dict[str, Any]:
    """Trains a model and writes its results.

    Args:
      config: as from `configs/`.
      workdir: folder for config.json, metrics.jsonl, summary.json and the parameters.
      model: any Flax model that follows `ist_jax.models`; None: the one that the config describes.

    Returns:
      What summary.json holds.

    Raises:
      ValueError: a setting, data set or folder that cannot work; the message names the key.
    """
    workdir = Path(workdir)
    if not report_if_finished(config, workdir):
        run = set_up(config, model)
        open_workdir(config, workdir)
        run_rounds(run, workdir)
    return json.loads((workdir / "summary.json").read_text())


# --- set-up ---------------------------------------------------------------------------------------


def set_up(config: config_dict.ConfigDict, model: nn.Module | None = None, params: Any = None) -> Run:
    """Opens the data, places the model on the devices and compiles the programs of a run.

    Args:
      config: as from `configs/`.
      model: as for `train`.
      params: the global parameters to start from (nested dict of host arrays); None: fresh ones.

    Raises:
      ValueError: a setting that cannot work; the message names the key.
    """
    check(config)
    devices.prepare(config.num_devices or config.num_workers)
    dataset = data.open_data_set(config.data.name, config.data.dir)
    train_set, test_set = data.load(dataset.train), data.load(dataset.test)
    log.info("data: %s; %s to train on, %s to test on", dataset.description, *(
        f"{len(x['label']):,}" for x in (train_set, test_set)))  # fmt: skip
    normalize = augment.make_normalize(*augment.channel_statistics(train_set["image"]))
    model = model or build_model(config, len(dataset.classes))
    example = jnp.zeros((1, *train_set["image"].shape[1:]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
    axes = partition.resolve_axes(shapes, model.unit_axes())
    groups = make_groups(config, shapes, axes)
    chosen = devices.choose(config.num_workers, config.num_devices)
    layout = store.make_layout(shapes, axes, groups, config.num_workers, len(chosen))
    recipe = local_sgd.Recipe(
        layout=layout,
        tx=make_tx(config.optimizer),
        loss_fn=make_loss_fn(model.subnet({n: g.slots for n, g in groups.items()}) if groups else model),
        batch_fn=augment.make_batch_fn(normalize, pad=config.data.pad, flip=config.data.flip),
        seed=config.seed,
        carry=config.optimizer_state == "carry" or config.method == "data_parallel",
        vmapped=config.workers_on_device == "vmap",
    )
    started = time.perf_counter()
    if params is None:
        state = init_state(recipe, lambda key: model.init(key, example)["params"], config.seed, chosen)
    else:
        shards = devices.put(store.from_params(layout, params), chosen)
        state = build_state(recipe, shards, chosen)
    plan = batches.eval_batches(len(test_set["label"]), config.eval_batch_size, len(chosen))
    test_batches = {name: x[plan.indices] for name, x in test_set.items()} | {"weight": plan.weights}
    test_batches = devices.put(test_batches, chosen)
    train_data = devices.replicate(train_set, chosen)
    programs = compile_programs(config, recipe, model, normalize, state, train_data, test_batches, chosen)
    per_round = config.num_workers * config.local_steps * config.batch_size
    rounds = config.rounds or max(1, round(config.epochs * len(train_set["label"]) / per_round))
    run = Run(
        config, dataset, train_set, test_set, model, normalize, chosen, recipe, programs, state, train_data,
        test_batches, rounds, make_learning_rates(config, rounds), time.perf_counter() - started,
    )  # fmt: skip
    _log_set_up(run)
    return run


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
            raise ValueError(f"model.sections={sections} and model.width={config.model.width} must be positive")
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


def make_groups(config: config_dict.ConfigDict, shapes: Any, axes: partition.Axes) -> dict[str, partition.Group]:
    """The unit groups that `config` partitions; none for the baselines."""
    if config.method != "ist":
        return {}
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
        logits = model.apply(variables, inputs, gates=gates)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (logits.argmax(-1) == labels).mean()

    return loss_fn


def init_state(
    recipe: local_sgd.Recipe, init_params: Callable[[jax.Array], Any], seed: int, chosen: Sequence[jax.Device]
) -> local_sgd.State:
    """The state of freshly initialised parameters.

    Made part by part in the host's memory and placed in shards: no accelerator ever holds more than its
    share, and the values do not depend on the devices.
    """
    shards: store.Shards = {}
    with jax.default_device(devices.host()):
        key = jax.random.key(seed)
        for paths in store.init_parts(recipe.layout):
            leaves = jax.jit(partial(_init_leaves, init_params, tuple(paths)))(key)
            for path in paths:
                whole = np.asarray(leaves.pop(path))
                parts = store.split(whole, recipe.layout.leaves[path], recipe.layout.num_devices)
                shards[path] = devices.put(parts, chosen)
    return build_state(recipe, {path: shards[path] for path in recipe.layout.leaves}, chosen)


def _init_leaves(init_params: Callable[[jax.Array], Any], paths: tuple[str, ...], key: jax.Array) -> dict:
    """The leaves asked for; under `jit` the others are not computed."""
    flat = traverse_util.flatten_dict(init_params(key), sep="/")
    return {path: flat[path] for path in paths}


def build_state(
    recipe: local_sgd.Recipe, shards: store.Shards, chosen: Sequence[jax.Device]
) -> local_sgd.State:
    """The state before the first round, from the parameters' shards on the devices."""
    if not recipe.carry:
        return local_sgd.State((shards,), ())
    start = partial(local_sgd.init_state, recipe)
    return jax.block_until_ready(devices.compile_program(start, (shards,), chosen, in_axes=[0])(shards))


def compile_programs(
    config: config_dict.ConfigDict,
    recipe: local_sgd.Recipe,
    model: nn.Module,
    normalize: Callable[[jax.Array], jax.Array],
    state: local_sgd.State,
    train_data: Any,
    test_batches: Any,
    chosen: Sequence[jax.Device],
) -> Programs:
    """Compiles the phases of a round and the evaluation, each once for the whole run."""
    layout = recipe.layout
    build = partial(devices.compile_program, devices=chosen)
    evaluation = partial(evaluate.evaluate_shards, layout, model, normalize)
    args = (state.trees[0], test_batches)
    evaluate_program = build(evaluation, args, in_axes=[0, 0])

    def per_device(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((layout.num_devices, layout.workers_per_device, *shape), dtype)

    indices = per_device(config.local_steps, config.batch_size)
    feed = (indices, jax.ShapeDtypeStruct((config.local_steps,), np.float32), jax.ShapeDtypeStruct((), np.int32))
    if config.method == "data_parallel":
        steps = partial(local_sgd.data_parallel_steps, recipe)
        local = build(steps, (state, train_data, *feed), in_axes=[0, 0, 0, None, None], donate=[0])
        return Programs(None, local, None, evaluate_program)

    assignment = partition.sample(partition.round_rng(0, 0), layout.groups)
    gather = merge = None
    units: Any = tuple({} for _ in state.trees)
    if layout.groups:
        gather_fn = partial(local_sgd.gather, recipe)
        gather = build(gather_fn, (state, assignment), in_axes=[0, None])
        units = jax.eval_shape(
            jax.vmap(gather_fn, (0, None), axis_name=store.AXIS), state, assignment
        )
    gates = {n: per_device(g.slots, dtype=bool) for n, g in layout.groups.items() if not g.even}
    steps = partial(local_sgd.local_steps, recipe)
    args = (state, units, gates, train_data, *feed)
    in_axes = [0, 0, 0, 0, 0, None, None]
    local = build(steps, args, in_axes=in_axes, donate=[1])
    subnets, _ = jax.eval_shape(jax.vmap(steps, in_axes, axis_name=store.AXIS), *args)
    merge = build(
        partial(local_sgd.merge, recipe),
        (state, subnets, assignment, per_device(dtype=bool)),
        in_axes=[0, 0, None, 0],
        donate=[0],
    )
    return Programs(gather, local, merge, evaluate_program)


def _log_set_up(run: Run) -> None:
    layout, config = run.layout, run.config
    total = sum(int(np.prod(leaf.shape)) for leaf in layout.leaves.values())
    log.info(
        "model: %s, %s parameters; %s with %d workers on %d %s device(s), %s parameters per worker",
        type(run.model).__name__, f"{total:,}", config.method, config.num_workers, len(run.devices),
        run.devices[0].platform, f"{ledger.subnet_parameters(layout) / config.num_workers:,.0f}",
    )  # fmt: skip
    for group in layout.groups.values():
        log.info("units: %s has %d, %d to %d per worker", group.name, group.size, min(group.counts), max(group.counts))
        waste = group.strips * group.strip_slots / group.slots
        if group.strips > 1 and waste > 1:
            log.info(
                "units: %d workers squared do not divide %s: its exchange carries %.2f times the slots",
                group.num_workers, group.name, waste,
            )  # fmt: skip
    if not evaluate.is_streamable(run.model):
        log.info("evaluation: the model has no field `fetch`, so every device gathers it whole to evaluate it")
    log.info("compiled in %.1f s; %d rounds of %d local steps", run.seconds_compile, run.num_rounds, config.local_steps)


# --- the folder -----------------------------------------------------------------------------------


def report_if_finished(config: config_dict.ConfigDict, workdir: Path) -> bool:
    """Whether the folder holds a finished run of this config; says its result.

    Raises:
      ValueError: it holds a run of another config.
    """
    if not (workdir / "config.json").exists():
        return False
    before, now = json.loads((workdir / "config.json").read_text()), json.loads(_to_json(config))
    before, now = (traverse_util.flatten_dict(x, sep=".") for x in (before, now))
    differing = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if differing:
        raise ValueError(
            f"{workdir} holds a run with other settings: "
            + ", ".join(f"{k} is {before.get(k)!r} there and {now.get(k)!r} here" for k in differing)
            + "; choose another --workdir"
        )
    if not (workdir / "summary.json").exists():
        log.info("%s holds a run that did not finish; it starts over", workdir)
        return False
    log.info("%s is finished already; nothing to do", workdir)
    log.info(last_line(json.loads((workdir / "summary.json").read_text())))
    return True


def open_workdir(config: config_dict.ConfigDict, workdir: Path) -> None:
    """Makes the folder and writes config.json.

    Raises:
      ValueError: the folder cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(_to_json(config) + "\n")
        (workdir / "metrics.jsonl").write_text("")
    except OSError as error:
        raise ValueError(f"cannot write to --workdir={workdir}: {error.strerror}") from None


def read_config(workdir: Path) -> config_dict.ConfigDict:
    """The config of a run, from its folder.

    Raises:
      ValueError: there is none.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"--workdir={workdir} holds no config.json, so no run")
    return config_dict.ConfigDict(json.loads(path.read_text()))


def _to_json(config: config_dict.ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2)


# --- the rounds -----------------------------------------------------------------------------------


def run_rounds(run: Run, workdir: Path) -> dict[str, Any]:
    """Trains for all rounds, writing metrics as they come, then the parameters and the summary.

    Args:
      run: from `set_up`; its state is used up.
      workdir: from `open_workdir`.

    Returns:
      What summary.json holds.
    """
    config, layout, state = run.config, run.layout, run.state
    per_round = config.num_workers * config.local_steps * config.batch_size
    log.info("results: %s", workdir)
    progress = metrics.Progress(run.num_rounds, config.method)
    records: list[dict[str, Any]] = []
    started = time.perf_counter()
    for index in range(run.num_rounds):
        round_started = time.perf_counter()
        state, means, seconds = run_round(run, state, index)
        if not means.healthy.all():
            warn_left_out(index + 1, means.healthy)
        record = {
            "round": index + 1,
            "examples": (index + 1) * per_round,
            "train_loss": float(means.loss[means.healthy].mean()) if means.healthy.any() else float("nan"),
            "train_accuracy": float(means.accuracy.mean()),
            "lr": float(run.learning_rates[index, -1]),
            **seconds,
            "seconds_evaluate": 0.0,
            "workers_left_out": int((~means.healthy).sum()),
        }
        last = index + 1 == run.num_rounds
        if last or (config.eval_every and (index + 1) % config.eval_every == 0):
            evaluation_started = time.perf_counter()
            score = evaluate_state(run, state)
            record |= {"test_loss": score.loss, "test_accuracy": score.accuracy}
            record["seconds_evaluate"] = time.perf_counter() - evaluation_started
        record["seconds_round"] = time.perf_counter() - round_started
        record["examples_per_second"] = per_round / record["seconds_round"]
        metrics.append_record(workdir / "metrics.jsonl", record)
        progress.update(record)
        records.append(record)
    progress.close()
    seconds_total = time.perf_counter() - started
    checkpoint.save_params(workdir, store.iter_leaves(layout, state.trees[0]))
    summary = summarize(run, records, seconds_total, metrics.params_sha256(store.iter_leaves(layout, state.trees[0])))
    metrics.write_json(workdir / "summary.json", summary)
    log.info(last_line(summary))
    return summary


def run_round(
    run: Run, state: local_sgd.State, index: int
) -> tuple[local_sgd.State, local_sgd.Metrics, dict[str, float]]:
    """One round: the state after it, the workers' metrics [S], and the seconds of its phases.

    The programs are waited for one after another: that is how the phases are timed, and it keeps CPU
    devices from meeting a collective too far apart.
    """
    config, layout, programs = run.config, run.layout, run.programs
    grid = (layout.num_devices, layout.workers_per_device)
    indices = batches.train_indices(
        config.seed,
        index,
        num_examples=len(run.train["label"]),
        num_workers=config.num_workers,
        local_steps=config.local_steps,
        batch_size=config.batch_size,
    )
    feed = (indices.reshape(*grid, *indices.shape[1:]), run.learning_rates[index], np.int32(index))
    assignment = partition.sample(partition.round_rng(config.seed, index), layout.groups)
    gates = {
        name: np.asarray(a.gates).reshape(*grid, -1)
        for name, a in assignment.items()
        if not layout.groups[name].even
    }
    times = [time.perf_counter()] * 4
    if programs.merge is None:
        state, means = jax.block_until_ready(programs.local(state, run.train_data, *feed))
        times[2] = times[3] = time.perf_counter()
    else:
        units: Any = tuple({} for _ in state.trees)
        if programs.gather is not None:
            units = jax.block_until_ready(programs.gather(state, assignment))
            times[1] = time.perf_counter()
        subnets, means = jax.block_until_ready(programs.local(state, units, gates, run.train_data, *feed))
        times[2] = time.perf_counter()
        state = jax.block_until_ready(programs.merge(state, subnets, assignment, means.healthy))
        times[3] = time.perf_counter()
    phases = dict(zip(("seconds_gather", "seconds_local", "seconds_merge"), np.diff(times).tolist(), strict=True))
    return state, local_sgd.Metrics(*(np.asarray(x).reshape(-1) for x in means)), phases


def evaluate_state(run: Run, state: local_sgd.State) -> evaluate.Score:
    """The global model's score on the test set."""
    return evaluate.total_score(jax.block_until_ready(run.programs.evaluate(state.trees[0], run.test_batches)))


def warn_left_out(round_number: int, healthy: np.ndarray) -> None:
    """Says which workers' rounds were left out of the merge."""
    for worker in np.flatnonzero(~healthy):
        log.warning("round %d: worker %d had a non-finite loss or update; its round is left out", round_number, worker)


def summarize(run: Run, records: list[dict[str, Any]], seconds: float, sha256: str) -> dict[str, Any]:
    """The final figures of a run; bytes as `ledger` counts them, times in seconds."""
    config, layout, last = run.config, run.layout, records[-1]
    trees = len(run.state.trees)
    full = ledger.full_model_bytes(layout) * len(records) / config.num_workers
    if config.method == "data_parallel":
        exchanged = full * config.local_steps
        wire = None
    else:
        exchanged = ledger.paper_bytes_per_round(layout, trees=trees) * len(records) / config.num_workers
        wire = ledger.wire_bytes(layout, trees=trees) * len(records)
    return {
        "method": config.method,
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "train_loss": last["train_loss"],
        "rounds": len(records),
        "examples": last["examples"],
        "seconds_total": seconds,
        "seconds_compile": run.seconds_compile,
        **{f"seconds_{p}": sum(r[f"seconds_{p}"] for r in records) for p in ("gather", "local", "merge", "evaluate")},
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in layout.leaves.values()),
        "parameters_per_worker": ledger.subnet_parameters(layout) / config.num_workers,
        "bytes_exchanged_per_worker": exchanged,
        "bytes_local_sgd_per_worker": full,
        "wire_bytes_per_device": wire,
        "workers_left_out": sum(r["workers_left_out"] for r in records),
        "params_sha256": sha256,
        "data": run.dataset.description,
        "num_workers": config.num_workers,
        "num_devices": len(run.devices),
        "platform": run.devices[0].platform,
        "device_kind": run.devices[0].device_kind,
        "seed": config.seed,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("ist_jax", "jax", "jaxlib", "flax", "optax", "numpy")},
    }


def last_line(summary: dict[str, Any]) -> str:
    """A run's result in a line for people."""
    exchanged, full = summary["bytes_exchanged_per_worker"], summary["bytes_local_sgd_per_worker"]
    return (
        f"{summary['method']}: test accuracy {summary['test_accuracy']:.2%} in {summary['seconds_total']:.1f} s; "
        f"each worker exchanged {exchanged / 1e6:,.1f} MB, {exchanged / full:.1%} of the {full / 1e6:,.1f} MB "
        "of local SGD"
    )
