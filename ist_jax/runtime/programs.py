"""The compiled programs of a run, each compiled once, and the state that they start from."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from ist_jax import partition
from ist_jax.exchange import store
from ist_jax.exchange.layout import init_parts, split
from ist_jax.methods import local_sgd
from ist_jax.methods.method import State
from ist_jax.runtime import devices
from ist_jax.runtime import scoring as evaluation
from ist_jax.task import Task
from ist_jax.workdir import checkpoint


class Programs(NamedTuple):
    """The compiled programs of a run; a phase that a method does not have is None."""

    gather: jax.stages.Compiled | None
    local: Any
    merge: jax.stages.Compiled | None
    evaluate: Any
    validate: jax.stages.Compiled | None = None  # the same for the batches of a validation split


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
        for paths in init_parts(recipe.layout):
            lowered = jax.jit(partial(_init_leaves, init_params, tuple(paths))).lower(key)
            leaves = lowered.compile({"xla_backend_optimization_level": "0"})(key)  # it runs once
            for path in paths:
                whole = np.asarray(leaves.pop(path))
                parts = split(whole, recipe.layout.leaves[path], recipe.layout.num_devices)
                shards[path] = devices.put(parts, chosen)
    return build_state(recipe, {path: shards[path] for path in recipe.layout.leaves}, chosen)


def restore_state(
    recipe: local_sgd.Recipe, saved: checkpoint.Saved, chosen: Sequence[jax.Device]
) -> local_sgd.State:
    """The state of a checkpoint, placed array by array: no process ever holds the whole model.

    Raises:
      ValueError: the checkpoint is not of this model or optimizer, or damaged.
    """
    layout = recipe.layout
    shards = {
        path: jax.eval_shape(
            partial(split, leaf=leaf, num_devices=1), jax.ShapeDtypeStruct(leaf.shape, layout.dtype)
        )
        for path, leaf in layout.leaves.items()
    }
    like = to_save(jax.eval_shape(partial(local_sgd.init_state, recipe), shards))
    state = saved.restore(layout, like, partial(devices.put, devices=chosen))
    trees, rest = state.travels
    return local_sgd.State((state.params, *trees), rest)


def to_save(state: local_sgd.State) -> State:
    """The state as checkpoints name its fields."""
    return State(params=state.trees[0], travels=(state.trees[1:], state.rest))


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
    recipe: local_sgd.Recipe,
    model: nn.Module,
    task: Task,
    state: local_sgd.State,
    train_data: Any,
    test_batches: Any,
    chosen: Sequence[jax.Device],
    *,
    local_steps: int,
    batch_size: int,
    scale: Mapping[str, float],
    average_gradients: bool,
    validation_batches: Any = None,
    evaluation_only: bool = False,
) -> Programs:
    """Compiles the phases of a round and the evaluation, each once for the whole run.

    Args:
      recipe: what every worker does.
      model: the global model.
      task: what is learned.
      state: from `init_state`.
      train_data: what the rounds are fed, [D, ...]; arrays or `jax.ShapeDtypeStruct`s, as below.
      test_batches: the evaluation batches of one call, [D, ...]; None: leave the evaluation out.
      chosen: the devices.
      local_steps: l.
      batch_size: per worker.
      scale: of the units at evaluation, from `evaluation.unit_scale`; {}: none.
      average_gradients: data-parallel SGD instead of a gather, local steps and a merge.
      validation_batches: as `test_batches`; None: there is no validation split.
      evaluation_only: leave the phases of a round out.
    """
    layout = recipe.layout
    build = partial(devices.compile_program, devices=chosen)
    score_shards = partial(evaluation.evaluate_shards, layout, model, task, scale)
    evaluations: Any = tuple(
        None if batches is None else build(score_shards, (state.trees[0], batches), in_axes=[0, 0])
        for batches in (test_batches, validation_batches)
    )
    if evaluation_only:
        return Programs(None, None, None, *evaluations)

    def per_device(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((layout.num_devices, layout.workers_per_device, *shape), dtype)

    indices = per_device(local_steps, batch_size)
    feed = (
        indices,
        jax.ShapeDtypeStruct((local_steps,), np.float32),
        jax.ShapeDtypeStruct((), np.int32),
    )
    if average_gradients:
        steps = partial(local_sgd.data_parallel_steps, recipe)
        present = per_device(dtype=bool)
        local = build(
            steps, (state, present, train_data, *feed), in_axes=[0, 0, 0, 0, None, None], donate=[0]
        )
        return Programs(None, local, None, *evaluations)

    assignment = partition.sample(partition.round_rng(0, 0), layout.groups)
    gather = merge = None
    units: Any = tuple({} for _ in state.trees)
    if layout.groups:
        gather_fn = partial(local_sgd.gather, recipe)
        gather = build(gather_fn, (state, assignment), in_axes=[0, None])
        units = jax.eval_shape(jax.vmap(gather_fn, (0, None), axis_name=store.AXIS), state, assignment)
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
    return Programs(gather, local, merge, *evaluations)
