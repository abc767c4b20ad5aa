"""An experiment that is set up: data opened, model placed on the devices, programs compiled.

Here a config becomes values; nothing below sees one.
"""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import PyTree
from ml_collections import config_dict

from ist_jax import data, extension, methods, partition
from ist_jax.config import build_model, check, options, record
from ist_jax.costs import formula
from ist_jax.costs.traffic import Traffic, round_traffic
from ist_jax.data.stream import Feed
from ist_jax.deals import DEALS
from ist_jax.exchange.codec import CODECS, NONE, Codec
from ist_jax.exchange.kinds import from_params, shard_shapes
from ist_jax.exchange.layout import Layout, make_layout, regroup
from ist_jax.masking import Params
from ist_jax.methods.method import Method, Recipe, State, TracedPhase, Turn, trace, trace_init
from ist_jax.methods.steps import POLICIES
from ist_jax.models.sparse import Sparse
from ist_jax.runtime import devices, inputs, processes, programs, scoring
from ist_jax.runtime.clock import Clock
from ist_jax.runtime.run import Run, ScoredSplit, Stage
from ist_jax.runtime.schedule import NOTHING_DONE, Progress, Rates, Schedule, count_rounds, learning_rates
from ist_jax.task import Task
from ist_jax.workdir import checkpoint, files

log = logging.getLogger(__name__)

T = TypeVar("T")


def set_up(
    config: config_dict.ConfigDict,
    model: nn.Module | None = None,
    params: Params | None = None,
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
      evaluation_only: compile no program but the evaluation, and put no training data on the devices.

    Raises:
      ValueError: a setting that cannot work; the message names the key.
    """
    check(config)
    devices.prepare(-(-(config.num_devices or config.num_workers) // processes.count()))
    opened = inputs.open_inputs(wanted_data(config))
    model = model or build_model(config, len(opened.dataset.classes))
    chosen = devices.choose(config.num_workers, config.num_devices)
    devices.check_same(record(config), chosen)
    recipe = make_recipe(config, model, opened.task, len(chosen))
    layout, method = recipe.layout, method_of(config).make(recipe)
    scale = unit_scale(config, layout)
    started = time.perf_counter()
    state = _first_state(method, recipe, chosen, start, params)
    done = Progress(start.round, start.about["examples"]) if start else NOTHING_DONE
    schedule = make_schedule(config, opened.num_train, done)
    splits = _make_splits(opened, method, state, chosen)
    stages: tuple[Stage, ...] = ()
    feed: Feed = None  # type: ignore[assignment]  # an evaluation has no rounds
    if evaluation_only:
        nothing = Traffic({}, {})
        stages = (Stage(schedule.rounds, recipe, method, {}, {}, nothing, nothing, ""),)
    else:
        feed = inputs.feed_rounds(opened, chosen, schedule.rounds)
        recipes = [(schedule.rounds, recipe)]
        warmup = count_warmup_rounds(config, opened.num_train, done, schedule.rounds)
        if warmup > schedule.first:
            recipes.insert(0, (warmup, warmup_recipe(recipe, model, opened.task, scale)))
        stages = tuple(_make_stage(config, until, recipe, feed, chosen) for until, recipe in recipes)
    run = Run(
        name=config.method,
        settings=record(config),
        inputs=opened,
        model=model,
        scale=scale,
        devices=chosen,
        stages=stages,
        state=state,
        feed=feed,
        splits=splits,
        schedule=schedule,
        turn=turn_maker(config, feed, schedule),
        clock=Clock(processes.count()),
        seconds_compile=time.perf_counter() - started,
    )
    _log_set_up(run)
    return run


def wanted_data(config: config_dict.ConfigDict) -> inputs.Wanted:
    """What a config asks of its data."""
    data_keys = ("pad", "flip", "validation", "sharing", "concentration")
    keys = ("seed", "num_workers", "local_steps", "batch_size", "eval_batch_size")
    return inputs.Wanted(
        config.data.name,
        config.data.dir,
        options(config, data.options()),
        **{key: config.data[key] for key in data_keys},
        **{key: config[key] for key in keys},
    )


def method_of(config: config_dict.ConfigDict) -> methods.Entry:
    """The method that a config names.

    Raises:
      ValueError: there is no such method.
    """
    found = _load(config, "method", methods.METHODS)
    return found if isinstance(found, methods.Entry) else methods.Entry(found, deals_units=True)


def _load(config: config_dict.ConfigDict, key: str, table: Mapping[str, T]) -> T:
    """What a key names: of its table, or of a file of the user's own."""
    name = files.flatten(config.to_dict())[key]
    try:
        found = extension.load(name, table)
    except ValueError as error:
        raise ValueError(f"{key}={name}: {error}") from None
    is_codec = isinstance(found, Codec) and (found.encode is None) == (found.decode is None)
    if key == "exchange.codec" and not is_codec:
        raise ValueError(f"{key}={name} is no ist_jax.exchange.codec.Codec with both of its functions")
    if key != "exchange.codec" and not (callable(found) or isinstance(found, methods.Entry)):
        raise ValueError(f"{key}={name} is a {type(found).__name__}, and no function")
    return found


def make_recipe(config: config_dict.ConfigDict, model: nn.Module, task: Task, num_devices: int) -> Recipe:
    """What a config's method is made from, after a warm-up; shapes alone are looked at.

    Args:
      config: as from `configs/`.
      model: the global model.
      task: what is learned.
      num_devices: D, over which the model is sharded.

    Raises:
      ValueError: a setting that cannot work; the message names the key.
    """
    entry = method_of(config)
    init_params = partial(_init_params, model, task.example)
    shapes = jax.eval_shape(init_params, jax.random.key(0))
    axes = partition.resolve_axes(shapes, model.unit_axes() if entry.deals_units else {})
    groups = _make_groups(config, model, shapes, axes) if entry.deals_units else {}
    codec = _load(config, "exchange.codec", CODECS)
    if codec != NONE and not entry.exchanges:
        raise ValueError(
            f"exchange.codec={config.exchange.codec!r} is for exchanges of parameters, and method="
            f"{config.method!r} has none; set config.exchange.codec to 'none'"
        )
    layout = make_layout(shapes, axes, groups, config.num_workers, num_devices, codec)
    partition.draw(config.seed, 0, groups, _load(config, "partition.deal", DEALS))  # is it sound?
    subnet = model.subnet({name: group.slots for name, group in groups.items()}) if groups else model
    return Recipe(
        layout=layout,
        tx=make_tx(config.optimizer),
        loss_fn=scoring.make_loss_fn(subnet, task.score_fn),
        batch_fn=task.batch_fn,
        score_fn=partial(scoring.score_shards, layout, model, task, unit_scale(config, layout)),
        init_params=init_params,
        policy=POLICIES[entry.optimizer_state or config.optimizer_state],
        seed=config.seed,
        vmapped=config.workers_on_device == "vmap",
    )


def _make_groups(
    config: config_dict.ConfigDict, model: nn.Module, shapes: PyTree, axes: partition.Axes
) -> dict[str, partition.Group]:
    """The unit groups that `config` partitions."""
    if not any(name for names in axes.values() for name in names):
        raise ValueError(
            f"method={config.method!r} has nothing to partition: the model names no unit axes "
            "(partition.sections, for a ResNet); name some, or set config.method to one that deals out no "
            f"units: {', '.join(repr(name) for name, x in methods.METHODS.items() if not x.deals_units)}"
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


def warmup_recipe(recipe: Recipe, model: nn.Module, task: Task, scale: dict[str, float]) -> Recipe:
    """The same where every worker holds all units, scaled as at evaluation (arXiv:2107.00961, footnote 2)."""
    whole = regroup(recipe.layout, partition.with_everyone(recipe.layout.groups))
    return recipe._replace(layout=whole, loss_fn=scoring.make_loss_fn(model, task.score_fn, scale))


def unit_scale(config: config_dict.ConfigDict, layout: Layout) -> dict[str, float]:
    """By group, the factor of the units' branches at evaluation; {}: none.

    ResIST's is assigned slots / (workers x units): 1 / S without overlap (arXiv:2107.00961, section 3).
    """
    return {name: g.share for name, g in layout.groups.items() if config.partition.scale_at_evaluation}


def make_tx(optimizer: config_dict.ConfigDict) -> optax.GradientTransformation:
    """SGD with weight decay and momentum, before the learning rate."""
    parts = []
    if optimizer.weight_decay:
        parts.append(optax.add_decayed_weights(optimizer.weight_decay))
    if optimizer.momentum:
        parts.append(optax.trace(optimizer.momentum, nesterov=optimizer.nesterov))
    return optax.chain(*parts) if parts else optax.identity()


def make_schedule(config: config_dict.ConfigDict, num_train: int, done: Progress = NOTHING_DONE) -> Schedule:
    """How long a run is.

    Args:
      config: of the run.
      num_train: examples to train on.
      done: in earlier sessions.

    Raises:
      ValueError: it has more rounds already than the config asks for.
    """
    per_step = config.num_workers * config.batch_size
    per_round = per_step * config.local_steps
    rounds = config.rounds
    if rounds is None:
        rounds = count_rounds(config.epochs, num_train, per_round, done)
    if done.rounds > rounds:
        raise ValueError(
            f"the run has {done.rounds} rounds already, more than the {rounds} that config.rounds or "
            "config.epochs ask for"
        )
    optimizer = config.optimizer
    rates = Rates(*(optimizer[field] for field in Rates._fields))
    return Schedule(
        first=done.rounds,
        rounds=rounds,
        examples_before=done.examples,
        examples_per_round=per_round,
        learning_rates=learning_rates(rates, (rounds, config.local_steps), per_step, done),
        eval_every=config.eval_every,
        patience=config.patience,
        checkpoint_every=config.checkpoint.every,
        checkpoint_keep=config.checkpoint.keep,
        max_left_out=config.max_rounds_left_out,
    )


def count_warmup_rounds(config: config_dict.ConfigDict, num_train: int, done: Progress, rounds: int) -> int:
    """Rounds, from the run's start, in which all workers train the whole model; at most those of the run.

    0 for methods in which they always do. Arguments as of `make_schedule`, and the rounds of the whole run.
    """
    if not method_of(config).deals_units:
        return 0
    per_round = config.num_workers * config.batch_size * config.local_steps
    return min(rounds, count_rounds(config.partition.warmup_epochs, num_train, per_round, done))


def turn_shapes(layout: Layout, data: data.Split, local_steps: int, batch_size: int) -> Turn:
    """What a round is given on one device.

    Args:
      layout: of the model.
      data: shapes of the training data on a device.
      local_steps: l.
      batch_size: B.
    """
    workers = layout.workers_per_device

    def shape(*sizes: int, dtype: DTypeLike = np.int32) -> jax.Array:
        """It stands for an array."""
        return jax.ShapeDtypeStruct(sizes, dtype)  # type: ignore[return-value]

    def dealt(group: partition.Group) -> partition.Assignment:
        size = (group.num_workers, group.slots)
        return partition.Assignment(shape(*size), shape(*size, dtype=bool))

    return Turn(
        draw={name: dealt(group) for name, group in layout.groups.items()},
        gates={n: shape(workers, g.slots, dtype=bool) for n, g in layout.groups.items() if not g.even},
        present=shape(workers, dtype=bool),
        data=data,
        indices=shape(workers, local_steps, batch_size),
        rates=shape(local_steps, dtype=np.float32),
        index=shape(),
    )


def trace_round(
    method: methods.Entry, recipe: Recipe, data: data.Split, local_steps: int, batch_size: int
) -> dict[str, TracedPhase]:
    """The phases of a round on one device, from shapes alone; arguments as of `turn_shapes`."""
    made, layout = method.make(recipe), recipe.layout
    _, state = trace_init(made, shard_shapes(layout), layout.num_devices)
    turn = turn_shapes(layout, data, local_steps, batch_size)
    return trace(made, state, turn, layout.num_devices)


def _make_stage(
    config: config_dict.ConfigDict, until: int, recipe: Recipe, feed: Feed, chosen: list[jax.Device]
) -> Stage:
    """Rounds by one recipe: traced, counted and compiled."""
    entry, layout = method_of(config), recipe.layout
    shown = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), feed.spec)
    sizes = (shown, config.local_steps, config.batch_size)
    method, phases = entry.make(recipe), trace_round(entry, recipe, *sizes)
    here = apart = round_traffic(phases, layout)
    if layout.num_devices < layout.num_workers:
        alone = recipe._replace(layout=layout._replace(num_devices=layout.num_workers))
        apart = round_traffic(trace_round(entry, alone, *sizes), alone.layout)
    deal = partition.fingerprint(tuple(layout.groups.values()), extension.identity(config.partition.deal))
    compiled = programs.compile_phases(method, phases, chosen)
    return Stage(until, recipe, method, phases, compiled, here, apart, deal)


def _init_params(model: nn.Module, example: jax.Array | Sparse, key: jax.Array) -> Params:
    return model.init(key, example)["params"]


def _first_state(
    method: Method,
    recipe: Recipe,
    chosen: list[jax.Device],
    start: checkpoint.Saved | None,
    params: Params | None,
) -> State:
    layout = recipe.layout
    if start is not None:
        return programs.restore_state(method, layout, start, chosen)
    if params is not None:
        return programs.init_state(method, devices.put(from_params(layout, params), chosen), chosen)
    shards = programs.init_shards(layout, recipe.init_params, recipe.seed, chosen)
    return programs.init_state(method, shards, chosen)


def _make_splits(
    opened: inputs.Inputs, method: Method, state: State, chosen: list[jax.Device]
) -> dict[str, ScoredSplit]:
    """The test set and, where there is one, the validation split."""
    splits = {}
    for name, examples in (("test", opened.test), ("validation", opened.validation)):
        if examples is not None:
            chunks = inputs.feed_evaluation(opened.wanted, examples, chosen)
            splits[name] = ScoredSplit(chunks, programs.compile_score(method, state, chunks.spec, chosen))
    return splits


def turn_maker(
    config: config_dict.ConfigDict, feed: Feed, schedule: Schedule
) -> Callable[[Stage, int], Turn]:
    """(stage, round's number) -> the inputs of the round.

    Args:
      config: of the run.
      feed: a round's number -> its examples.
      schedule: of the run.
    """
    seed, participation, workers = config.seed, config.participation, config.num_workers
    deal = _load(config, "partition.deal", DEALS)

    def turn(stage: Stage, index: int) -> Turn:
        layout = stage.layout
        grid = (layout.num_devices, layout.workers_per_device)
        shown, indices = feed(index)
        draw = partition.draw(seed, index, layout.groups, deal)
        gates = {
            name: np.asarray(dealt.gates).reshape(*grid, -1)
            for name, dealt in draw.items()
            if not layout.groups[name].even
        }
        present = partition.draw_present(seed, index, workers, participation).reshape(grid)
        rates = schedule.learning_rates[index]
        return Turn(draw, gates, present, shown, indices, rates, np.int32(index))  # type: ignore[arg-type]

    return turn


def _log_set_up(run: Run) -> None:
    layout, schedule = run.layout, run.schedule
    log.info(
        "model: %s, %s parameters; %s with %d workers on %d %s device(s), %s parameters per worker",
        type(run.model).__name__, f"{formula.model_parameters(layout):,}", run.name, layout.num_workers,
        len(run.devices), run.devices[0].platform,
        f"{formula.subnet_parameters(layout) / layout.num_workers:,.0f}",
    )  # fmt: skip
    for group in layout.groups.values():
        log.info(
            "units: %s has %d, %d to %d per worker",
            group.name, group.size, min(group.counts), max(group.counts),
        )  # fmt: skip
        waste = group.strips * group.strip_slots / group.slots
        if group.strips > 1 and waste > 1:
            log.info(
                "units: %s does not fall evenly into %d strips; its exchange carries %.2f times the slots",
                group.name, group.strips, waste,
            )  # fmt: skip
    if layout.groups and not scoring.is_streamable(run.model):
        log.info(
            "evaluation: the model has no field `fetch`, so every device gathers it whole to evaluate it"
        )
    log.info(
        "compiled in %.1f s; %d rounds of %d local steps",
        run.seconds_compile, schedule.rounds, schedule.learning_rates.shape[1],
    )  # fmt: skip
    for stage in run.stages[:-1]:
        log.info("warm-up: in the first %d rounds all workers train the whole model", stage.until)
