"""A run that is set up: what the driver goes by."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
from jax.extend.core import ClosedJaxpr
from jaxtyping import PyTree

from ist_jax.costs.compiled import Executable
from ist_jax.costs.traffic import Traffic
from ist_jax.data.stream import Evaluation, Feed
from ist_jax.exchange.layout import Layout
from ist_jax.key import Settings
from ist_jax.methods.method import Method, Recipe, State, TracedPhase, Turn
from ist_jax.runtime.clock import Clock
from ist_jax.runtime.devices import Devices
from ist_jax.runtime.inputs import Inputs
from ist_jax.runtime.schedule import Schedule


class ScoredSplit(NamedTuple):
    """Examples that the model is scored on: chunks of batches, the program for one, and its trace."""

    chunks: Evaluation
    program: Executable
    jaxpr: ClosedJaxpr


class Entrance(NamedTuple):
    """The begin of a stage.

    Attributes:
      program: the last state of the stage before -> the first of this one.
      traffic: what it sends on the devices that there are.
      apart: the same, if each worker had a device of its own.
    """

    program: Executable
    traffic: Traffic
    apart: Traffic


class Stage(NamedTuple):
    """Rounds that go by one method, one layout and one number of local steps.

    Attributes:
      name: of its method; 'warm-up'.
      part: of the run that it belongs to, a number.
      first: the round that it begins with, in this session.
      until: the rounds of the run after which it ends.
      local_steps: l.
      recipe: what its method is made from.
      method: what a round does.
      phases: of a round, traced, in order.
      programs: the same, compiled.
      traffic: what a round sends on the devices that there are.
      apart: the same, if each worker had a device of its own.
      deal: fingerprint of what draws its partitions.
      splits: 'test' and, where there is one, 'validation'.
      enter: what makes its first state; None: that of the stage before it is as it needs it.
    """

    name: str
    part: int
    first: int
    until: int
    local_steps: int
    recipe: Recipe
    method: Method
    phases: Mapping[str, TracedPhase]
    programs: Mapping[str, Executable]
    traffic: Traffic
    apart: Traffic
    deal: str
    splits: Mapping[str, ScoredSplit] = {}
    enter: Entrance | None = None

    @property
    def layout(self) -> Layout:
        return self.recipe.layout

    @property
    def travels(self) -> PyTree:
        """Shapes of what goes out and comes back with the parameters, on one device."""
        return next(iter(self.phases.values())).inputs[0].travels

    @property
    def key(self) -> tuple[str, int]:
        """Equal ones have the same phases."""
        return self.name, self.local_steps


class Run(NamedTuple):
    """A run that is set up: what the rounds need.

    Attributes:
      name: of its method, or those of its stages.
      settings: the config that it came from, as it is recorded.
      inputs: the data set that is open, and what is learned from it.
      model: the global model.
      scale: of its units at evaluation.
      layouts: of its parts, in order, a warm-up left out.
      devices: D of them.
      stages: those that remain, in order.
      state: before the next round; used up by it.
      feed: a round's number -> its examples.
      schedule: how long, and what is due when.
      turn: (stage, round's number) -> the inputs of the round.
      clock: of what is waited for.
      seconds_compile: of set-up.
    """

    name: str
    settings: Settings
    inputs: Inputs
    model: nn.Module
    scale: dict[str, float]
    layouts: tuple[Layout, ...]
    devices: Devices
    stages: tuple[Stage, ...]
    state: State
    feed: Feed
    schedule: Schedule
    turn: Callable[[Stage, int], Turn]
    clock: Clock
    seconds_compile: float

    @property
    def layout(self) -> Layout:
        return self.stages[-1].layout

    @property
    def splits(self) -> Mapping[str, ScoredSplit]:
        """Those of the last stage."""
        return self.stages[-1].splits

    def stage(self, index: int) -> Stage:
        """What a round is run by."""
        return next(stage for stage in self.stages if index < stage.until)
