"""An experiment that is set up: data opened, model placed on the devices, programs compiled.

Here a config becomes values; nothing below sees one.
"""

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections.config_dict import ConfigDict

from ist_jax import data, extension, methods, partition
from ist_jax.config import build_model, check, options, record
from ist_jax.costs import formula
from ist_jax.data.stream import Feed
from ist_jax.deals import DEALS
from ist_jax.exchange.codec import CODECS, NONE, Bits, Codec
from ist_jax.exchange.kinds import from_params
from ist_jax.exchange.layout import Layout, make_layout, regroup, with_bits
from ist_jax.key import FILE
from ist_jax.masking import Params
from ist_jax.methods import optimizers, outer
from ist_jax.methods.method import Recipe, State, Turn, replay
from ist_jax.methods.optimizers import NOTHING_GIVEN, Given
from ist_jax.methods.steps import POLICIES
from ist_jax.models import adapter
from ist_jax.runtime import compile_options, devices, inputs, processes, programs, scoring
from ist_jax.runtime.clock import Clock
from ist_jax.runtime.devices import Devices
from ist_jax.runtime.run import Run, Stage
from ist_jax.runtime.schedule import (
    NOTHING_DONE,
    Part,
    Progress,
    Schedule,
    Segment,
    count_left,
    lay_out,
    quadratic,
)
from ist_jax.runtime.stages import Made, start_stages, trace_stages, untraced
from ist_jax.tasks import Own, Task
from ist_jax.tasks.task import check_fit
from ist_jax.workdir import checkpoint, files

log = logging.getLogger(__name__)

InitParams = Callable[[jax.Array], Params]
Looked = dict[
    int, tuple[nn.Module, tuple[PyTree, InitParams, PyTree]]
]  # by the id of a model, which it keeps
NUMBERS_AS_THEY_ARE = {"gather_bits": 32, "merge_bits": 32, "keep": 1.0, "error_feedback": False}
T = TypeVar("T")


def set_up(
    config: ConfigDict,
    model: nn.Module | None = None,
    params: Params | None = None,
    *,
    start: checkpoint.Saved | None = None,
    evaluation_only: bool = False,
    task: Own | None = None,
    given: Given = NOTHING_GIVEN,
) -> Run:
    """Opens the data, places the model on the devices and compiles the programs of a run.

    Args:
      config: as from `configs/`.
      model: as for `train`.
      params: the global parameters to start from (nested dict of host arrays); None: fresh ones.
      start: the checkpoint to go on from.
      evaluation_only: compile no program but the evaluation, and put no training data on the devices.
      task: as for `train`.
      given: an optimizer and a learning rate in place of the config's.

    Raises:
      ValueError: a setting that cannot work; the message names the key.
    """
    check(config)
    devices.prepare(-(-(config.num_devices or config.num_workers) // processes.count()))
    opened = inputs.open_inputs(wanted_data(config), task)
    model = model or build_model(config, len(opened.dataset.classes))
    chosen = devices.choose(config.num_workers, config.num_devices)
    if start is not None and not evaluation_only:
        compile_options.compare(start.about.get("compile_options", {}), chosen)
    settings = record(config) | given.recorded()
    devices.check_same(settings, chosen)
    made = make_all(config, model, opened.task, len(chosen), given.optimizer)
    for name, own in {own.part.method: own for own in made}.items():
        _log_model(name, model, own.recipe.layout, chosen)
    started = time.perf_counter()
    schedule = make_schedule(config, inputs.count(opened.train), _progress(config, start), given.schedule)
    begun = start.about.get("stage") if start else None  # in checkpoints of earlier versions there is none
    held_out = {} if opened.validation is None else {"validation": opened.validation}
    scored = {"test": opened.test} | held_out
    feed: Feed = None  # type: ignore[assignment]  # an evaluation has no rounds
    with programs.Builder() as builder:
        last = Segment(len(made) - 1 if begun is None else begun, config.local_steps, schedule.rounds)
        if evaluation_only:
            traced = [untraced(made, last)]
        else:
            feed = inputs.feed_rounds(opened, chosen, schedule.starts)
            deal = extension.identity(config.partition.deal)
            segments = schedule.segments or (last,)
            traced = trace_stages(made, segments, schedule.first, feed, config.batch_size, deal)
        begun = traced[0].part if begun is None else begun
        batches = {name: inputs.feed_evaluation(opened.wanted, x, chosen) for name, x in scored.items()}
        finish = start_stages(traced, made, begun, batches, chosen, builder)
        log.info("compiling %s", ", ".join(builder.seconds))
        state = _begin(made[begun], start, params, chosen)  # meanwhile
        stages = finish()
    run = Run(
        name=", then ".join(method for method, _ in itertools.groupby(own.part.method for own in made)),
        settings=settings,
        inputs=opened,
        model=model,
        scale=_scale(config, [own.recipe for own in made]),
        layouts=tuple(own.recipe.layout for own in made if not own.part.whole),
        devices=chosen,
        stages=stages,
        state=state,
        feed=feed,
        schedule=schedule,
        turn=turn_maker(config, feed, schedule),
        clock=Clock(processes.count()),
        seconds_compile=time.perf_counter() - started,
    )
    _log_set_up(run, builder.seconds)
    return run


def _progress(config: ConfigDict, start: checkpoint.Saved | None) -> Progress:
    """What earlier sessions did."""
    if start is None:
        return NOTHING_DONE
    steps = start.about.get("steps")  # in checkpoints of earlier versions, as many base rounds as rounds
    return Progress(start.round, start.about["examples"], steps and steps // config.local_steps)


def _begin(made: Made, start: checkpoint.Saved | None, params: Params | None, chosen: Devices) -> State:
    """The state to begin with: of a checkpoint, of given parameters, or fresh."""
    method, layout = made.method, made.recipe.layout
    if start is not None:
        return programs.restore_state(method, layout, start, chosen)
    if params is not None:
        return programs.init_state(method, devices.put(from_params(layout, params), chosen), chosen)
    shards = programs.init_shards(layout, made.recipe.init_params, made.recipe.seed, chosen)
    return programs.init_state(method, shards, chosen)


def wanted_data(config: ConfigDict) -> inputs.Wanted:
    """What a config asks of its data."""
    own = {"directory": config.data.dir, "options": options(config, data.options())}
    known = config.to_dict() | config.data.to_dict() | own
    return inputs.Wanted(**{field: known[field] for field in inputs.Wanted._fields})


def method_of(config: ConfigDict) -> methods.Entry:
    """The method that a config names, where it has no stages.

    Raises:
      ValueError: there is no such method.
    """
    found = _load(config, "method", methods.METHODS)
    return found if isinstance(found, methods.Entry) else methods.Entry(found, deals_units=True)


def for_method(config: ConfigDict, method: str) -> ConfigDict:
    """The config of another method to compare, as long a run; what that one cannot have is 'none' in it."""
    own = config.copy_and_resolve_references()
    own.method = method
    if config.stages:
        own.stages, own.epochs = type(own.stages)(), _epochs(config)  # a recorded one has lists
    if method != config.method or config.stages:
        entry = method_of(own)
        if not entry.exchanges:
            own.exchange.update({"codec": "none"} | NUMBERS_AS_THEY_ARE)
            own.local_steps_schedule = "constant"
        if not entry.has_outer:
            own.outer.name = "none"
    return own


def _load(config: ConfigDict, key: str, table: Mapping[str, T]) -> T:
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


def make_all(
    config: ConfigDict,
    model: nn.Module,
    task: Task,
    num_devices: int,
    tx: optimizers.Transformation | None = None,
    looked: Looked | None = None,
) -> tuple[Made, ...]:
    """The parts of a run in order, with what each is trained by; shapes alone are looked at.

    Where one of them deals units out, a method that does not trains the same model: with units scaled as at
    evaluation.

    Args:
      config: as from `configs/`.
      model: the global model.
      task: what is learned.
      num_devices: D, over which the model is sharded.
      tx: the optimizer; None: the config's.
      looked: what was found out of models before; what is found now is added.

    Raises:
      ValueError: a setting that cannot work; the message names the key.
    """
    looked = {} if looked is None else looked
    made, parts = {}, parts_of(config)
    for part in parts:
        if part.method not in made:
            own = for_method(config, part.method)
            made[part.method] = method_of(own), make_recipe(own, model, task, num_devices, tx, looked)
    scale, found = _scale(config, [recipe for _, recipe in made.values()]), []
    for part in parts:
        entry, recipe = made[part.method]
        if part.whole:
            recipe = warmup_recipe(recipe, model, task, scale)
        elif scale and not recipe.layout.groups:
            score = partial(scoring.score_shards, recipe.layout, model, task, scale)
            recipe = recipe._replace(loss_fn=scoring.make_loss_fn(model, task, scale), score_fn=score)
        found.append(Made(part, entry, recipe))
    return tuple(found)


def make_recipe(
    config: ConfigDict,
    model: nn.Module,
    task: Task,
    num_devices: int,
    tx: optimizers.Transformation | None = None,
    looked: Looked | None = None,
) -> Recipe:
    """What a config's method is made from, after a warm-up; arguments and errors as for `make_all`."""
    entry = method_of(config)

    if task.example is None:
        raise ValueError(f"task {task.name!r} has no example to show to the model")
    shown = task.example[0]
    if entry.members:
        model = _member(config, model, shown)

    if adapter.offers(model, "check_example"):
        model.check_example(getattr(shown, "shape", ())[1:])
    outputs, init_params, shapes = _look_at(model, shown, {} if looked is None else looked)
    check_fit(task, outputs)
    deals = entry.deals_units and adapter.offers(model, "unit_axes")
    axes = partition.resolve_axes(shapes, model.unit_axes() if deals else {})
    groups = _make_groups(config, model, shapes, axes) if entry.deals_units else {}
    codec = _load(config, "exchange.codec", CODECS)
    if codec != NONE and not entry.exchanges:
        raise ValueError(
            f"exchange.codec={config.exchange.codec!r} is for exchanges of parameters, and method="
            f"{config.method!r} has none; set config.exchange.codec to 'none'"
        )
    if config.outer.name != "none" and not entry.has_outer:
        remedy = "set config.outer.name to 'none'"
        if FILE.fullmatch(config.method):
            remedy += ", or give its methods.Entry has_outer=True, if it is built on what takes recipe.outer"
        raise ValueError(
            f"outer.name={config.outer.name!r} is for what a merge brings, and method={config.method!r} has "
            f"none; {remedy}"
        )
    layout = make_layout(shapes, axes, groups, config.num_workers, num_devices, codec)
    layout = with_bits(layout, _bits(config, entry, codec))
    partition.draw(config.seed, 0, groups, _load(config, "partition.deal", DEALS))  # is it sound?
    tx = optimizers.make(config.optimizer.to_dict()) if tx is None else tx
    policy = methods.policy_of(entry, config.optimizer_state)
    optimizers.check(tx, layout, policy)
    subnet = _subnet(config, model, groups) if groups else model
    return Recipe(
        layout=layout,
        tx=tx,
        loss_fn=scoring.make_loss_fn(subnet, task),
        batch_fn=task.batch,
        score_fn=partial(scoring.score_shards, layout, model, task, unit_scale(config, layout)),
        score_members=partial(scoring.score_members, model, task),
        init_params=init_params,
        policy=POLICIES[policy],
        outer=outer.make(config.outer.to_dict(), config.num_workers),
        seed=config.seed,
        vmapped=config.workers_on_device == "vmap",
        options=options(config, entry.options),
    )


def _look_at(model: nn.Module, shown: PyTree, looked: Looked) -> tuple[PyTree, InitParams, PyTree]:
    """What `looked` has of a model, traced where it is not there yet."""
    if id(model) not in looked:

        def init_params(key: jax.Array) -> Params:
            return adapter.init(model, key, shown)

        outputs = adapter.check(model, shown)
        jaxpr, shapes = jax.make_jaxpr(init_params, return_shape=True)(jax.random.key(0))
        looked[id(model)] = model, (outputs, replay(jaxpr, shapes), shapes)
    return looked[id(model)][1]


def _bits(config: ConfigDict, entry: methods.Entry, codec: Codec) -> Bits:
    """What `config.exchange` says of the numbers that are sent."""
    own = config.exchange
    bits = Bits(own.gather_bits, own.merge_bits, config.seed, own.keep, own.error_feedback)
    changed = [key for key, value in NUMBERS_AS_THEY_ARE.items() if own[key] != value]
    given = " and ".join(f"exchange.{key}={own[key]}" for key in changed)
    remedy = "set " + " and ".join(f"config.exchange.{key} to {NUMBERS_AS_THEY_ARE[key]}" for key in changed)
    if changed and not entry.exchanges:
        raise ValueError(
            f"{given}: this is for exchanges of parameters, and method={config.method!r} has none; {remedy}"
        )
    if changed and codec != NONE:
        raise ValueError(
            f"{given} beside exchange.codec={own.codec!r}: a number goes one way alone; {remedy}, or "
            "config.exchange.codec to 'none'"
        )
    if bits.error_feedback and bits.merge == 32 and bits.keep == 1:
        raise ValueError(
            "exchange.error_feedback=True, and workers send all that they have changed; set "
            "config.exchange.merge_bits below 32, config.exchange.keep below 1, or "
            "config.exchange.error_feedback to False"
        )
    return bits


def _make_groups(
    config: ConfigDict, model: nn.Module, shapes: PyTree, axes: partition.Axes
) -> dict[str, partition.Group]:
    """The unit groups that `config` partitions."""
    if not any(name for names in axes.values() for name in names):
        raise ValueError(
            f"method={config.method!r} has nothing to partition: the model names no unit axes "
            "(partition.sections, for a ResNet); name some, or set config.method to one that deals out no "
            f"units: {', '.join(repr(name) for name, x in methods.METHODS.items() if not x.deals_units)}"
        )
    own, workers = config.partition, config.num_workers
    rule = partition.rule_of(_load(config, "partition.deal", DEALS))
    groups = partition.make_groups(
        shapes,
        axes,
        workers,
        min_units=own.min_units,
        shares=tuple(own.shares),
        independent=rule.independent,
    )
    if adapter.offers(model, "check_groups"):
        model.check_groups(groups)
    return groups


def _subnet(config: ConfigDict, model: nn.Module, groups: partition.Groups) -> nn.Module:
    """The model of a worker's part."""
    if not adapter.offers(model, "subnet"):
        raise ValueError(
            f"method={config.method!r} is of parts of a model, and the model {type(model).__name__} has no "
            "method `subnet(sizes)`: the same architecture with so many units of each group"
        )
    return model.subnet({name: group.slots for name, group in groups.items()})


def _member(config: ConfigDict, model: nn.Module, shown: PyTree) -> nn.Module:
    """A net of an ensemble: of the size of the largest subnet; the whole model where that names no units."""
    shapes = jax.eval_shape(lambda: adapter.init(model, jax.random.key(0), shown))
    axes = partition.resolve_axes(shapes, model.unit_axes() if adapter.offers(model, "unit_axes") else {})
    if not any(map(partition.names_of, axes.values())):
        return model
    return _subnet(config, model, _make_groups(config, model, shapes, axes))


def warmup_recipe(recipe: Recipe, model: nn.Module, task: Task, scale: dict[str, float]) -> Recipe:
    """The same where every worker holds all units, scaled as at evaluation (arXiv:2107.00961, footnote 2)."""
    whole = regroup(recipe.layout, partition.with_everyone(recipe.layout.groups))
    return recipe._replace(layout=whole, loss_fn=scoring.make_loss_fn(model, task, scale))


def unit_scale(config: ConfigDict, layout: Layout) -> dict[str, float]:
    """By group, the factor of the units' branches at evaluation; {}: none.

    ResIST's is assigned slots / (workers x units): 1 / S without overlap (arXiv:2107.00961, section 3).
    """
    return {name: g.share for name, g in layout.groups.items() if config.partition.scale_at_evaluation}


def parts_of(config: ConfigDict) -> tuple[Part, ...]:
    """What a run is made of: its stages or, after a warm-up if there is one, the one of its method."""
    if config.stages:
        ends = itertools.accumulate(epochs for _, epochs in config.stages)
        return tuple(Part(method, end) for (method, _), end in zip(config.stages, ends, strict=True))
    warmup = config.partition.warmup_epochs
    first = (Part(config.method, warmup, whole=True),) if warmup and method_of(config).deals_units else ()
    return *first, Part(config.method)


def _scale(config: ConfigDict, recipes: Sequence[Recipe]) -> dict[str, float]:
    """That of the units of a run, by the recipe that deals them out."""
    return next((scale for x in recipes if (scale := unit_scale(config, x.layout))), {})


def make_schedule(
    config: ConfigDict,
    num_train: int,
    done: Progress = NOTHING_DONE,
    learning_rate: optimizers.Schedule | None = None,
) -> Schedule:
    """How long a run is.

    Args:
      config: of the run.
      num_train: examples to train on.
      done: in earlier sessions.
      learning_rate: of the examples seen; None: the config's.

    Raises:
      ValueError: it has more rounds already than the config asks for.
    """
    local_steps, parts = config.local_steps, parts_of(config)
    per_base = config.num_workers * config.batch_size * local_steps
    if config.rounds is None:
        left = count_left(_epochs(config), num_train, per_base, done)
    else:
        left = config.rounds - done.rounds
    if left < 0:
        raise ValueError(
            f"the run has {done.rounds} rounds already, more than the {config.rounds} that config.rounds or "
            "config.epochs ask for"
        )
    ends = [min(left, count_left(part.until, num_train, per_base, done)) for part in parts[:-1]] + [left]
    rates, risen = learning_rates(config, left, done, learning_rate)
    sizes: list[int] = []
    for part, start, end in zip(parts, [0, *ends], ends, strict=False):
        grows = for_method(config, part.method).local_steps_schedule == "qsr"
        while start < end:
            rate, alpha = risen[start * local_steps], config.local_steps_alpha
            sizes.append(quadratic(alpha, rate, local_steps, end - start) if grows else 1)
            start += sizes[-1]
    segments, starts = lay_out(ends, sizes, local_steps, done)
    past = np.full(int(starts[-1]) * local_steps - rates.size, np.nan)
    return Schedule(
        first=done.rounds,
        rounds=done.rounds + len(sizes),
        segments=segments,
        starts=starts,
        examples_before=done.examples,
        examples_per_base=per_base,
        learning_rates=np.concatenate([past, rates]).astype(np.float32).reshape(-1, local_steps),
        eval_every=config.eval_every,
        patience=config.patience,
        checkpoint_every=config.checkpoint.every,
        checkpoint_keep=config.checkpoint.keep,
        max_left_out=config.max_rounds_left_out,
    )


def _epochs(config: ConfigDict) -> float:
    """Passes over the training set, of all workers together."""
    return sum(epochs for _, epochs in config.stages) or config.epochs


def learning_rates(
    config: ConfigDict, left: int, done: Progress, given: optimizers.Schedule | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Learning rates [steps], by the fraction of all examples that all workers have seen.

    Args:
      config: of the run.
      left: base rounds that remain; of their steps are the rates.
      done: in earlier sessions.
      given: the rate by the number of examples seen; None: the config's.

    Returns:
      The rates, and the same as if the rate did not have to rise first.

    Raises:
      ValueError: a rate that is given is not finite.
    """
    optimizer, per_step = config.optimizer, config.num_workers * config.batch_size
    steps = np.arange(left * config.local_steps)
    if given is not None:
        seen = done.examples + per_step * steps
        found = np.asarray(jax.vmap(given)(np.minimum(seen, np.iinfo(np.int32).max).astype(np.int32)))
        if not np.isfinite(found).all():
            first = seen[~np.isfinite(found)][0]
            raise ValueError(f"learning_rate= is not finite after {first:,} examples")
        found = np.broadcast_to(found, steps.shape)
        return found, found
    before = done.examples / per_step  # in steps of today's workers
    total, step = before + steps.size, before + steps
    warmup = round(optimizer.warmup * total)
    after = (step - warmup) / max(1, total - warmup)  # progress after the warm-up, 0 to 1
    decays = sum((step >= at * total).astype(int) for at in optimizer.step_at)
    factors = {
        "constant": np.ones(steps.size),
        "cosine": (1 + np.cos(np.pi * np.clip(after, 0, 1))) / 2,
        "step": optimizer.step_factor ** np.asarray(decays),
    }
    ramp = np.minimum(1, (step + 1) / max(1, warmup))
    rate, factor = optimizer.learning_rate, np.broadcast_to(factors[optimizer.schedule], steps.shape)
    return rate * ramp * factor, rate * factor


def turn_maker(config: ConfigDict, feed: Feed, schedule: Schedule) -> Callable[[Stage, int], Turn]:
    """(stage, round's number) -> the inputs of the round.

    Args:
      config: of the run.
      feed: a round's number -> its examples.
      schedule: of the run.
    """
    seed, participation, workers = config.seed, config.participation, config.num_workers
    deal = _load(config, "partition.deal", DEALS)

    def turn(stage: Stage, index: int) -> Turn:
        groups, grid = stage.layout.groups, (stage.layout.num_devices, stage.layout.workers_per_device)
        shown, indices = feed(index)
        draw = partition.draw(seed, index, groups, deal)
        uneven = {name: dealt.gates for name, dealt in draw.items() if not groups[name].even}
        gates = {name: np.asarray(own).reshape(*grid, *own.shape[1:]) for name, own in uneven.items()}
        present = partition.draw_present(seed, index, workers, participation).reshape(grid)
        rates = schedule.rates(index)
        return Turn(draw, gates, present, shown, indices, rates, np.int32(index))  # type: ignore[arg-type]

    return turn


def _log_model(name: str, model: nn.Module, layout: Layout, chosen: Devices) -> None:
    """What is trained by a method of that name."""
    log.info(
        f"model: {type(model).__name__}, {formula.model_parameters(layout):,} parameters; {name} "
        f"with {layout.num_workers} workers on {len(chosen)} {chosen[0].platform} device(s), "
        f"{formula.subnet_parameters(layout) / layout.num_workers:,.0f} parameters per worker"
    )
    for group in layout.groups.values():
        least, most = min(group.counts), max(group.counts)
        each = f"{least}" if least == most else f"{least} to {most}"
        layers = f" in each of {group.layers} layers" if group.layers else ""
        nobody = f"; about {group.coverage:.0%} are trained in a round" if group.independent else ""
        log.info(f"units: {group.name} has {group.size}, {each} per worker{layers}{nobody}")
        waste = group.strips * group.strip_slots / group.slots
        if group.strips > 1 and waste > 1:
            log.info(
                f"units: {group.name} does not fall evenly into {group.strips} strips; its exchange carries "
                f"{waste:.2f} times the slots"
            )
    if layout.groups and not scoring.is_streamable(model):
        log.info("evaluation: the model has no field `fetch`, so every device gathers it whole")


def _log_set_up(run: Run, seconds: Mapping[str, float]) -> None:
    """How long it took, and what follows; `seconds` of each program, some of them beside each other."""
    sizes = sorted({stage.local_steps for stage in run.stages})
    steps = f"{sizes[0]} local steps" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} local steps"
    each = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items())
    log.info(f"compiled in {run.seconds_compile:.1f} s ({each}); {run.schedule.rounds} rounds of {steps}")
    for name, stages in itertools.groupby(run.stages, lambda stage: stage.name):
        first, *_, last = [*stages] * 2
        if first.first > run.schedule.first or last.until < run.schedule.rounds:
            log.info(f"stage: {name} in rounds {first.first + 1} to {last.until}")
