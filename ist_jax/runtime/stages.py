"""The stages of a run: traced and counted from shapes, then compiled, each program once."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.typing import DTypeLike

from ist_jax import data, partition
from ist_jax.costs.compiled import Executable
from ist_jax.costs.traced import collectives_of
from ist_jax.costs.traffic import Traffic, round_traffic
from ist_jax.data.stream import Evaluation, Feed
from ist_jax.exchange.kinds import shard_shapes
from ist_jax.exchange.layout import AXIS
from ist_jax.methods import Entry
from ist_jax.methods.method import Method, Recipe, State, TracedPhase, Turn, replay, trace, trace_init
from ist_jax.methods.stages import enter
from ist_jax.runtime import devices, programs
from ist_jax.runtime.devices import Devices
from ist_jax.runtime.run import Entrance, ScoredSplit, Stage
from ist_jax.runtime.schedule import Part, Segment

_NOTHING = Traffic({}, {})


class Made(NamedTuple):
    """A part of a run, and what it is trained by."""

    part: Part
    entry: Entry
    recipe: Recipe

    @property
    def method(self) -> Method:
        return self.entry.make(self.recipe)

    def state(self) -> State:
        """Shapes of its state on one device."""
        layout = self.recipe.layout
        return trace_init(self.method, shard_shapes(layout), layout.num_devices)[1]

    def apart(self) -> "Made":
        """The same, if each worker had a device of its own."""
        layout = self.recipe.layout
        return self._replace(
            recipe=self.recipe._replace(layout=layout._replace(num_devices=layout.num_workers))
        )


def trace_round(
    method: Entry, recipe: Recipe, data: data.Split, local_steps: int, batch_size: int
) -> dict[str, TracedPhase]:
    """The phases of a round on one device, from shapes alone.

    Args:
      method: of the round.
      recipe: that it is made from.
      data: shapes of the training data on a device.
      local_steps: l.
      batch_size: B.
    """
    made, layout = method.make(recipe), recipe.layout
    groups, workers = layout.groups, layout.workers_per_device

    def shape(*sizes: int, dtype: DTypeLike = np.int32) -> jax.Array:
        """It stands for an array."""
        return jax.ShapeDtypeStruct(sizes, dtype)  # type: ignore[return-value]

    def dealt(*sizes: int) -> partition.Assignment:
        return partition.Assignment(shape(*sizes), shape(*sizes, dtype=bool))

    draw = {name: dealt(*group.shape) for name, group in groups.items()}
    gates = {n: shape(workers, *g.shape[1:], dtype=bool) for n, g in groups.items() if not g.even}
    present, indices = shape(workers, dtype=bool), shape(workers, local_steps, batch_size)
    turn = Turn(draw, gates, present, data, indices, shape(local_steps, dtype=np.float32), shape())
    _, state = trace_init(made, shard_shapes(layout), layout.num_devices)
    return trace(made, state, turn, layout.num_devices)


def trace_entrance(before: Made, after: Made) -> tuple[ClosedJaxpr, State]:
    """What makes the first state of a stage of the last one of another, traced on one device; its shapes."""
    layout, alike = before.recipe.layout, before.entry.make is after.entry.make
    begin = enter(layout, after.recipe.layout, after.method.init, alike=alike)
    return jax.make_jaxpr(begin, axis_env=[(AXIS, layout.num_devices)], return_shape=True)(before.state())


def entrance_traffic(before: Made, after: Made) -> Traffic:
    """What a device sends meanwhile; the papers count what comes to a worker with its rounds."""
    if before.part.method == after.part.method:
        return _NOTHING
    found = collectives_of(trace_entrance(before, after)[0], before.recipe.layout.num_devices)
    return Traffic({}, {"enter": sum(c.sent for c in found)}, sum(c.messages for c in found))


def untraced(made: Sequence[Made], segment: Segment) -> Stage:
    """A stage of no round: an evaluation needs none."""
    own = made[segment.part]
    return Stage(
        name=own.part.name,
        part=segment.part,
        first=segment.until,
        until=segment.until,
        local_steps=segment.local_steps,
        recipe=own.recipe,
        method=own.method,
        phases={},
        programs={},
        traffic=_NOTHING,
        apart=_NOTHING,
        deal="",
    )


def trace_stages(
    made: Sequence[Made], segments: Sequence[Segment], first: int, feed: Feed, batch_size: int, deal: str
) -> list[Stage]:
    """A stage per segment, not compiled yet; those of one name and length share what was traced.

    Args:
      made: by part.
      segments: of the rounds that remain.
      first: the round that they begin with.
      feed: a round's number -> its examples.
      batch_size: B.
      deal: what tells the deal from others.
    """
    stages: list[Stage] = []
    known: dict[tuple[str, int], Stage] = {}
    for segment in segments:
        stage = untraced(made, segment)
        if stage.key not in known:
            spec = programs.on_one_device(feed.spec_of(stage.local_steps))
            known[stage.key] = _traced(stage, made[segment.part], spec, batch_size, deal)
        begins = stages[-1].until if stages else first
        stages.append(known[stage.key]._replace(part=segment.part, first=begins, until=segment.until))
    return stages


def _traced(stage: Stage, made: Made, data: data.Split, batch_size: int, deal: str) -> Stage:
    sizes, layout = (data, stage.local_steps, batch_size), made.recipe.layout
    phases = trace_round(made.entry, made.recipe, *sizes)
    here = apart = round_traffic(phases, layout)
    if layout.num_devices < layout.num_workers:
        alone = made.apart().recipe
        apart = round_traffic(trace_round(made.entry, alone, *sizes), alone.layout)
    dealt = partition.fingerprint(tuple(layout.groups.values()), deal)
    return stage._replace(phases=phases, traffic=here, apart=apart, deal=dealt)


def start_stages(
    stages: Sequence[Stage],
    made: Sequence[Made],
    begun: int,
    evaluations: Mapping[str, Evaluation],
    chosen: Devices,
    builder: programs.Builder,
) -> Callable[[], tuple[Stage, ...]]:
    """Begins to compile all programs of some stages.

    Args:
      stages: in order.
      made: by part.
      begun: the part that the state before the first round is of.
      evaluations: 'test' and, where there is one, 'validation'.
      chosen: the devices.
      builder: what compiles.

    Returns:
      What waits for the programs and returns the stages with them.
    """
    every, one = {stage.key: stage for stage in stages}, len({stage.key for stage in stages}) == 1
    phases = {}
    for key, stage in every.items():
        of = "" if one else f" ({stage.name}, {stage.local_steps} steps)"
        phases[key] = programs.start_phases(stage.phases, chosen, builder, of)
    methods = {made[stage.part].part.method: made[stage.part] for stage in stages}
    scores = {}
    for name, own in methods.items():
        of, state = "" if len(methods) == 1 else f" ({name})", own.state()
        for split, chunks in evaluations.items():
            jaxpr, lowered = programs.lower_score(own.method, state, chunks.spec, chosen)
            pending = builder.start(f"evaluation ({split}){of}", lowered)
            scores[name, split] = chunks, pending, jaxpr
    entrances, before = {}, made[begun]
    for number, stage in enumerate(stages):
        after = made[stage.part]
        if after.part.method != before.part.method:
            pending = builder.start(f"begin of {after.part.name}", _lower_entrance(before, after, chosen))
            apart = entrance_traffic(before.apart(), after.apart())
            entrances[number] = pending, entrance_traffic(before, after), apart
        before = after

    def finish() -> tuple[Stage, ...]:
        compiled = {key: programs.finish(own) for key, own in phases.items()}
        done = {key: ScoredSplit(chunks, own.result(), jaxpr) for key, (chunks, own, jaxpr) in scores.items()}
        found = []
        for number, stage in enumerate(stages):
            splits = {split: done[made[stage.part].part.method, split] for split in evaluations}
            stage = stage._replace(programs=compiled[stage.key], splits=splits)
            if number in entrances:
                program, here, apart = entrances[number]
                stage = stage._replace(enter=Entrance(program.result(), here, apart))
            found.append(stage)
        return tuple(found)

    return finish


def _lower_entrance(before: Made, after: Made, chosen: Devices) -> Callable[[], Executable]:
    jaxpr, like = trace_entrance(before, after)
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(chosen), *x.shape), x.dtype), before.state())
    return devices.lower_program(replay(jaxpr, like), (whole,), chosen, in_axes=(0,))
