"""Runs that are set up for a test, perhaps with another recipe than the config's, and their rounds."""

from contextlib import ExitStack

import jax
import numpy as np
import pytest
from conftest import get_config

from ist_jax import train
from ist_jax.exchange.kinds import iter_leaves
from ist_jax.exchange.layout import map_trees
from ist_jax.methods.method import Told
from ist_jax.runtime import devices, inputs, setup, stages
from ist_jax.tasks.classification import classification
from ist_jax.tasks.task import with_example


def set_up(name, change=None, *, model=None, params=None, evaluation_only=False, **overrides):
    """The run of a config, with `change` of the recipe that its method is made from."""
    make_recipe = setup.make_recipe
    with pytest.MonkeyPatch.context() as patch:
        if change is not None:
            patch.setattr(setup, "make_recipe", lambda *args: change(make_recipe(*args)))
        config = get_config(name, **overrides)
        return setup.set_up(config, model, params, evaluation_only=evaluation_only)


def train_and_look(config, workdir, model=None):
    """(summary, run, its first state) of a training as by `train.train`."""
    with ExitStack() as claim:
        run = train.begin(config, workdir, claim, model)
        first = copied(run.state, run)
        return train.run_rounds(run, workdir, own=(model, None)), run, first


def describe(config):
    """(recipe, model, inputs) of a config, a device per worker; nothing is compiled."""
    opened = inputs.open_inputs(setup.wanted_data(config))
    model = setup.build_model(config, len(opened.dataset.classes))
    return setup.make_recipe(config, model, opened.task, config.num_workers), model, opened


def image_task(*shape, classes=10):
    """Classification of images of a shape, as they are."""
    one = {"image": np.zeros((1, *shape), np.float32), "label": np.zeros(1, np.int32)}
    return with_example(classification(((0.0,), (1.0,)), pad=0, flip=False, num_classes=classes), one)


def trace_round(config, recipe, opened):
    """The phases of a round of a config by a recipe."""
    data = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), opened.train)
    sizes = (data, config.local_steps, config.batch_size)
    return stages.trace_round(setup.method_of(config), recipe, *sizes)


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
    state = copied(run.state if state is None else state, run)
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


def assert_same_bits(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
