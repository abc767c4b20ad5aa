"""An experiment that is set up: data opened, model placed on the devices, programs compiled."""

import logging
import time
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import config_dict

from ist_jax import data, partition
from ist_jax.config import build_model, check
from ist_jax.costs import formula as ledger
from ist_jax.data.feed import InMemoryEvaluation, InMemoryFeed
from ist_jax.data.stream import StreamingEvaluation, StreamingFeed
from ist_jax.exchange.layout import Layout, from_params, make_layout, regroup
from ist_jax.methods import local_sgd
from ist_jax.runtime import devices, inputs, settings
from ist_jax.runtime import processes as distributed
from ist_jax.runtime import scoring as evaluation
from ist_jax.runtime.programs import Programs, build_state, compile_programs, init_state, restore_state
from ist_jax.task import Task
from ist_jax.workdir import checkpoint

log = logging.getLogger(__name__)


class Warmup(NamedTuple):
    """The rounds before those of ResIST, in which every worker trains the whole model: local SGD.

    The state between rounds is the same; what differs is how many units a worker is given.
    """

    rounds: int
    layout: Layout
    programs: Programs


class Run(NamedTuple):
    """A run that is set up: what the rounds need."""

    config: config_dict.ConfigDict
    inputs: inputs.Inputs
    model: nn.Module
    scale: dict[str, float]
    devices: list[jax.Device]
    recipe: local_sgd.Recipe
    programs: Programs
    warmup: Warmup | None
    state: local_sgd.State
    feed: InMemoryFeed | StreamingFeed
    test_batches: InMemoryEvaluation | StreamingEvaluation
    validation_batches: InMemoryEvaluation | StreamingEvaluation | None
    first_round: int  # counted from 0: the rounds done by earlier sessions
    examples_before: int  # seen in them
    num_rounds: int
    learning_rates: np.ndarray  # [num_rounds, l]; the rows before first_round are not used
    seconds_compile: float

    @property
    def layout(self) -> Layout:
        return self.recipe.layout

    def phase(self, round_index: int) -> tuple[Layout, Programs]:
        """What a round, counted from 0, is run by."""
        if self.warmup is not None and round_index < self.warmup.rounds:
            return self.warmup.layout, self.warmup.programs
        return self.layout, self.programs

    @property
    def dataset(self) -> data.DataSet:
        return self.inputs.dataset

    @property
    def train(self) -> Any:
        return self.inputs.train

    @property
    def test(self) -> Any:
        return self.inputs.test

    @property
    def task(self) -> Task:
        return self.inputs.task


def set_up(
    config: config_dict.ConfigDict,
    model: nn.Module | None = None,
    params: Any = None,
    *,
    start: checkpoint.Saved | None = None,
    evaluation_only: bool = False,
) -> Run:
    """Opens the data, places the model on the devices and compiles the programs of a run.

    Args:
      config: as from `configs/`.
      model: as for `train`.
      params: the global parameters to start from (nested dict of host arrays); None: fresh ones.
      start: the checkpoint to go on from.
      evaluation_only: compile no program but the evaluation.

    Raises:
      ValueError: a setting that cannot work; the message names the key.
    """
    check(config)
    devices.prepare(-(-(config.num_devices or config.num_workers) // distributed.count()))
    opened = inputs.open_inputs(config)
    model = model or build_model(config, len(opened.dataset.classes))
    task = opened.task
    chosen = devices.choose(config.num_workers, config.num_devices)
    recipe = make_recipe(config, model, task, len(chosen))
    layout = recipe.layout
    started = time.perf_counter()
    if start is not None:
        state = restore_state(recipe, start, chosen)
    elif params is None:
        state = init_state(recipe, lambda key: model.init(key, task.example)["params"], config.seed, chosen)
    else:
        state = build_state(recipe, devices.put(from_params(layout, params), chosen), chosen)
    scale = evaluation.unit_scale(layout) if config.partition.scale_at_evaluation else {}
    first, before = (start.round, start.about["examples"]) if start else (0, 0)
    rounds = settings.count_rounds(config, opened.num_train, first, before)
    if first > rounds:
        raise ValueError(
            f"the run has {first} rounds already, more than the {rounds} that config.rounds or config.epochs "
            "ask for"
        )
    feed = inputs.feed_rounds(config, opened, chosen, rounds)
    test_batches = inputs.feed_evaluation(config, opened.test, chosen)
    validation_batches = None
    if opened.validation is not None:
        validation_batches = inputs.feed_evaluation(config, opened.validation, chosen)
    compile_for = partial(
        compile_programs,
        model=model,
        task=task,
        state=state,
        train_data=feed.spec,
        chosen=chosen,
        local_steps=config.local_steps,
        batch_size=config.batch_size,
        scale=scale,
        average_gradients=config.method == "data_parallel",
        evaluation_only=evaluation_only,
    )
    validation_spec = None if validation_batches is None else validation_batches.spec
    programs = compile_for(recipe, test_batches=test_batches.spec, validation_batches=validation_spec)
    warmup = None
    warmup_rounds = settings.count_warmup_rounds(config, opened.num_train, first, before, rounds)
    if warmup_rounds > first and not evaluation_only:
        whole = regroup(layout, partition.with_everyone(layout.groups))
        # scaled as at evaluation (arXiv:2107.00961, footnote 2)
        whole_recipe = recipe._replace(
            layout=whole, loss_fn=settings.make_loss_fn(model, task.score_fn, scale)
        )
        warmup = Warmup(warmup_rounds, whole, compile_for(whole_recipe, test_batches=None))
    run = Run(
        config=config,
        inputs=opened,
        model=model,
        scale=scale,
        devices=chosen,
        recipe=recipe,
        programs=programs,
        warmup=warmup,
        state=state,
        feed=feed,
        test_batches=test_batches,
        validation_batches=validation_batches,
        first_round=first,
        examples_before=before,
        num_rounds=rounds,
        learning_rates=settings.make_learning_rates(config, rounds, first, before),
        seconds_compile=time.perf_counter() - started,
    )
    _log_set_up(run)
    return run


def make_recipe(
    config: config_dict.ConfigDict, model: nn.Module, task: Task, num_devices: int
) -> local_sgd.Recipe:
    """What every worker does, after a warm-up; shapes alone are looked at.

    Args:
      config: as from `configs/`.
      model: the global model.
      task: what is learned.
      num_devices: D, over which the model is sharded.

    Raises:
      ValueError: a setting that cannot work; the message names the key.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), task.example)["params"]
    axes = partition.resolve_axes(shapes, model.unit_axes() if config.method == "ist" else {})
    groups = settings.make_groups(config, model, shapes, axes)
    return local_sgd.Recipe(
        layout=make_layout(shapes, axes, groups, config.num_workers, num_devices),
        tx=settings.make_tx(config.optimizer),
        loss_fn=settings.make_loss_fn(
            model.subnet({n: g.slots for n, g in groups.items()}) if groups else model, task.score_fn
        ),
        batch_fn=task.batch_fn,
        seed=config.seed,
        carry=config.optimizer_state == "carry" or config.method == "data_parallel",
        vmapped=config.workers_on_device == "vmap",
    )


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
    if layout.groups and not evaluation.is_streamable(run.model):
        log.info(
            "evaluation: the model has no field `fetch`, so every device gathers it whole to evaluate it"
        )
    log.info(
        "compiled in %.1f s; %d rounds of %d local steps",
        run.seconds_compile,
        run.num_rounds,
        config.local_steps,
    )
    if run.warmup is not None:
        log.info("warm-up: in the first %d rounds all workers train the whole model", run.warmup.rounds)
