"""The driver: from a config to a trained global model, its metrics and its summary."""

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from ist_jax import (
    checkpoint,
    data,
    devices,
    evaluate,
    ledger,
    local_sgd,
    metrics,
    partition,
    results,
    settings,
)
from ist_jax.data import augment, batches
from ist_jax.layout import Layout, from_params, iter_leaves, make_layout
from ist_jax.programs import Programs, build_state, compile_programs, init_state

log = logging.getLogger(__name__)


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
    shards: list[np.ndarray]
    test_batches: Any
    num_rounds: int
    learning_rates: np.ndarray
    seconds_compile: float

    @property
    def layout(self) -> Layout:
        return self.recipe.layout


def train(
    config: config_dict.ConfigDict, workdir: str | Path, model: nn.Module | None = None
) -> dict[str, Any]:
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
    if not results.report_if_finished(config, workdir, model):
        results.check_writable(workdir)
        run = set_up(config, model)
        results.open_workdir(config, workdir)
        run_rounds(run, workdir, custom_model=model)
    return json.loads((workdir / "summary.json").read_text())


# --- set-up ---------------------------------------------------------------------------------------


def open_data(config: config_dict.ConfigDict) -> tuple[data.DataSet, dict[str, Any], dict[str, Any]]:
    """The data set that `config` names, its training split and its test split, decoded."""
    dataset = data.open_data_set(settings.get(config, "data.name"), settings.get(config, "data.dir"))
    splits = data.load(dataset.train), data.load(dataset.test)
    train_size, test_size = (f"{len(split['label']):,}" for split in splits)
    log.info("data: %s; %s to train on, %s to test on", dataset.description, train_size, test_size)
    return dataset, *splits


def set_up(
    config: config_dict.ConfigDict,
    model: nn.Module | None = None,
    params: Any = None,
    *,
    evaluation_only: bool = False,
) -> Run:
    """Opens the data, places the model on the devices and compiles the programs of a run.

    Args:
      config: as from `configs/`.
      model: as for `train`.
      params: the global parameters to start from (nested dict of host arrays); None: fresh ones.
      evaluation_only: compile no program but the evaluation.

    Raises:
      ValueError: a setting that cannot work; the message names the key.
    """
    settings.check(config)
    devices.prepare(config.num_devices or config.num_workers)
    dataset, train_set, test_set = open_data(config)
    normalize = augment.make_normalize(*augment.channel_statistics(train_set["image"]))
    model = model or settings.build_model(config, len(dataset.classes))
    example = jnp.zeros((1, *train_set["image"].shape[1:]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
    axes = partition.resolve_axes(shapes, model.unit_axes() if config.method == "ist" else {})
    groups = settings.make_groups(config, model, shapes, axes)
    chosen = devices.choose(config.num_workers, config.num_devices)
    layout = make_layout(shapes, axes, groups, config.num_workers, len(chosen))
    recipe = local_sgd.Recipe(
        layout=layout,
        tx=settings.make_tx(config.optimizer),
        loss_fn=settings.make_loss_fn(
            model.subnet({n: g.slots for n, g in groups.items()}) if groups else model
        ),
        batch_fn=augment.make_batch_fn(normalize, pad=config.data.pad, flip=config.data.flip),
        seed=config.seed,
        carry=config.optimizer_state == "carry" or config.method == "data_parallel",
        vmapped=config.workers_on_device == "vmap",
    )
    started = time.perf_counter()
    if params is None:
        state = init_state(recipe, lambda key: model.init(key, example)["params"], config.seed, chosen)
    else:
        state = build_state(recipe, devices.put(from_params(layout, params), chosen), chosen)
    plan = batches.eval_batches(len(test_set["label"]), config.eval_batch_size, len(chosen))
    test_batches = {name: x[plan.indices] for name, x in test_set.items()} | {"weight": plan.weights}
    test_batches = devices.put(test_batches, chosen)
    shards = batches.share_examples(
        config.seed, train_set["label"], config.num_workers, config.data.sharing, config.data.concentration
    )
    train_data = devices.replicate(train_set, chosen)
    programs = compile_programs(
        recipe,
        model,
        normalize,
        state,
        train_data,
        test_batches,
        chosen,
        local_steps=config.local_steps,
        batch_size=config.batch_size,
        average_gradients=config.method == "data_parallel",
        evaluation_only=evaluation_only,
    )
    per_round = config.num_workers * config.local_steps * config.batch_size
    rounds = config.rounds or math.ceil(config.epochs * len(train_set["label"]) / per_round)
    run = Run(
        config=config,
        dataset=dataset,
        train=train_set,
        test=test_set,
        model=model,
        normalize=normalize,
        devices=chosen,
        recipe=recipe,
        programs=programs,
        state=state,
        train_data=train_data,
        shards=shards,
        test_batches=test_batches,
        num_rounds=rounds,
        learning_rates=settings.make_learning_rates(config, rounds),
        seconds_compile=time.perf_counter() - started,
    )
    _log_set_up(run)
    return run


def _log_set_up(run: Run) -> None:
    layout, config = run.layout, run.config
    log.info(
        "model: %s, %s parameters; %s with %d workers on %d %s device(s), %s parameters per worker",
        type(run.model).__name__, f"{ledger.model_parameters(layout):,}", config.method, config.num_workers,
        len(run.devices), run.devices[0].platform,
        f"{ledger.subnet_parameters(layout) / config.num_workers:,.0f}",
    )  # fmt: skip
    for group in layout.groups.values():
        log.info(
            "units: %s has %d, %d to %d per worker",
            group.name,
            group.size,
            min(group.counts),
            max(group.counts),
        )
        waste = group.strips * group.strip_slots / group.slots
        if group.strips > 1 and waste > 1:
            log.info(
                "units: %s does not fall evenly into %d strips; its exchange carries %.2f times the slots",
                group.name, group.strips, waste,
            )  # fmt: skip
    if not evaluate.is_streamable(run.model):
        log.info(
            "evaluation: the model has no field `fetch`, so every device gathers it whole to evaluate it"
        )
    log.info(
        "compiled in %.1f s; %d rounds of %d local steps",
        run.seconds_compile,
        run.num_rounds,
        config.local_steps,
    )


# --- the rounds -----------------------------------------------------------------------------------


def run_rounds(run: Run, workdir: Path, custom_model: nn.Module | None = None) -> dict[str, Any]:
    """Trains for all rounds, writing metrics as they come, then the parameters and the summary.

    Args:
      run: from `set_up`; its state is used up.
      workdir: from `open_workdir`.
      custom_model: the model, where it is not the config's; recorded.

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
            warn_left_out(index + 1, means.healthy, "steps" if config.method == "data_parallel" else "round")
        record = {
            "round": index + 1,
            "examples": (index + 1) * per_round,
            "train_loss": mean_of_healthy(means.loss, means.healthy),
            "train_accuracy": mean_of_healthy(means.accuracy, means.healthy),
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
    checkpoint.save_params(workdir, iter_leaves(layout, state.trees[0]))
    summary = results.summarize(
        config,
        layout,
        records,
        trees=len(state.trees),
        dataset=run.dataset.description,
        device=run.devices[0],
        custom_model=results.describe(custom_model),
        seconds_total=seconds_total,
        seconds_compile=run.seconds_compile,
        params_sha256=metrics.params_sha256(iter_leaves(layout, state.trees[0])),
    )
    metrics.write_json(workdir / "summary.json", summary)
    log.info(results.last_line(summary))
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
        config.seed, index, run.shards, local_steps=config.local_steps, batch_size=config.batch_size
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
    phases = dict(
        zip(("seconds_gather", "seconds_local", "seconds_merge"), np.diff(times).tolist(), strict=True)
    )
    return state, local_sgd.Metrics(*(np.asarray(x).reshape(-1) for x in means)), phases


def evaluate_state(run: Run, state: local_sgd.State) -> evaluate.Score:
    """The global model's score on the test set."""
    return evaluate.total_score(
        jax.block_until_ready(run.programs.evaluate(state.trees[0], run.test_batches))
    )


def mean_of_healthy(values: np.ndarray, healthy: np.ndarray) -> float:
    """Mean over the workers that are not left out; NaN where there is none."""
    return float(values[healthy].mean()) if healthy.any() else float("nan")


def warn_left_out(round_number: int, healthy: np.ndarray, what: str) -> None:
    """Says which workers' rounds (or, data-parallel, single steps) were left out."""
    for worker in np.flatnonzero(~healthy):
        log.warning(
            "round %d: worker %d had a non-finite loss or update; its %s left out",
            round_number, worker, "round is" if what == "round" else "steps that had one are",
        )  # fmt: skip
