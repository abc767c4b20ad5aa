"""Runs that are set up for a test, perhaps with another recipe than the config's, and their rounds."""

import jax
import numpy as np
import pytest
from conftest import get_config

from ist_jax import train
from ist_jax.exchange.kinds import iter_leaves
from ist_jax.exchange.layout import map_trees
from ist_jax.methods.method import Told
from ist_jax.runtime import devices, setup


def set_up(name, change=None, *, start=None, **overrides):
    """The run of a config, with `change` of the recipe that its method is made from."""
    make_recipe = setup.make_recipe
    with pytest.MonkeyPatch.context() as patch:
        if change is not None:
            patch.setattr(setup, "make_recipe", lambda *args: change(make_recipe(*args)))
        return setup.set_up(get_config(name, **overrides), start=start)


def copied(state, run):
    """A state that a round may use up."""
    return devices.put(jax.tree.map(np.asarray, state), run.devices)


def run_turn(stage, state, turn):
    """A round by what it is given: (state, what all workers tell)."""
    value = None
    for program in stage.programs.values():
        value = jax.block_until_ready(program(state, value, turn))
    state, told = value
    return state, Told(*(np.asarray(x).reshape(-1) for x in told))


def run_all(run, rounds=2, state=None, first=0):
    """The state after these rounds, in which nobody was left out."""
    state = copied(run.state, run) if state is None else state
    for index in range(first, rounds):
        state, entry = train.train_round(run, state, index)
        assert entry["left_out"] == []
    return state


def whole(run, tree):
    """What a field of a state says of the whole model: leaves by path in place of shards."""
    layout = run.layout
    return map_trees(
        layout, lambda shards: dict(iter_leaves(layout, shards)), tree, scalar=lambda x: np.asarray(x)[0]
    )
