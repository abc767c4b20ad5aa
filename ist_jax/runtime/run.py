"""A run that is set up: what the driver goes by."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
from jax.extend.core import ClosedJaxpr

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


class Stage(NamedTuple):
    """Rounds that go by one method and one layout.

    Attributes:
      until: the rounds of the run after which it ends.
      recipe: what its method is made from.
      method: what a round does.
      phases: of a round, traced, in order.
      programs: the same, compiled.
      traffic: what a round sends on the devices that there are.
      apart: the same, if each worker had a device of its own.
      deal: fingerprint of what draws its partitions.
    """

    until: int
    recipe: Recipe
    method: Method
    phases: Mapping[str, TracedPhase]
    programs: Mapping[str, Executable]
    traffic: Traffic
    apart: Traffic
    deal: str

    @property
    def layout(self) -> Layout:
        return self.recipe.layout


class ScoredSplit(NamedTuple):
    """Examples that the model is scored on: chunks of batches, the program for one, and its trace."""

    chunks: Evaluation
    program: Executable
    jaxpr: ClosedJaxpr


class Run(NamedTuple):
    """A run that is set up: what the rounds need.

    Attributes:
      name: of its method.
      settings: the config that it came from, as it is recorded.
      inputs: the data set that is open, and what is learned from it.
      model: the global model.
      scale: of its units at evaluation.
      devices: D of them.
      stages: in order.
      state: before the next round; used up by it.
      feed: a round's number -> its examples.
      splits: 'test' and, where there is one, 'validation'.
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
    devices: Devices
    stages: tuple[Stage, ...]
    state: State
    feed: Feed
    splits: dict[str, ScoredSplit]
    schedule: Schedule
    turn: Callable[[Stage, int], Turn]
    clock: Clock
    seconds_compile: float

    @property
    def layout(self) -> Layout:
        return self.stages[-1].layout

    def stage(self, index: int) -> Stage:
        """What a round is run by."""
        return next(stage for stage in self.stages if index < stage.until)
