"""The compiled programs of a run, each compiled once, and the state that they start from."""

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeAlias

import jax
import numpy as np
from flax import traverse_util
from jax.extend.core import ClosedJaxpr
from jaxtyping import PyTree

from ist_jax.costs.compiled import Executable
from ist_jax.data import Split
from ist_jax.exchange.kinds import init_parts, shard_shapes, split_leaf
from ist_jax.exchange.layout import Layout, Shards
from ist_jax.masking import Params
from ist_jax.methods.method import (
    AXES,
    Method,
    State,
    TracedPhase,
    Turn,
    replay,
    trace_init,
    trace_score,
)  # fmt: skip
from ist_jax.runtime import devices
from ist_jax.runtime.devices import Devices
from ist_jax.workdir import checkpoint

log = logging.getLogger(__name__)

Pending: TypeAlias = Future[Executable]
_IN_AXES = (0, 0, AXES)  # of (state, value, turn)


class Builder(contextlib.AbstractContextManager):
    """Compiles programs in threads, beside whatever else is done: XLA lets go of Python's lock.

    They are traced one after another, by the caller. A context; after it, nothing is compiled any more.

    Attributes:
      seconds: of each program that has been compiled, by name, in the order in which they were given.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(os.cpu_count(), "compile")

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, name: str, compile_lowered: Callable[[], Executable]) -> Pending:
        """Compiles what `devices.lower_program` returned; an error of it is raised by the result."""

        def compiled() -> Executable:
            started = time.perf_counter()
            program = compile_lowered()
            self.seconds[name] = time.perf_counter() - started
            return program

        self.seconds[name] = 0.0
        return self._pool.submit(compiled)


def start_phases(
    traced: Mapping[str, TracedPhase], chosen: Devices, builder: Builder, of: str = ""
) -> dict[str, Pending]:
    """The phases of a round, in order, each compiled once for the whole run; the computing begins first.

    The last one may reuse the memory of the state, the others that of their value where all of it fits what
    they return.

    Args:
      traced: from `methods.method.trace`; these traces are compiled, the functions are not called again.
      chosen: the devices.
      builder: what compiles them.
      of: which stage, behind the name of a phase.
    """

    def start(name: str) -> Pending:
        phase, last = traced[name], name == list(traced)[-1]
        donate = [0] if last else [1] if _fits(phase.inputs[1], phase.result) else []
        args, fn = with_axes(phase.inputs, len(chosen)), replay(phase.jaxpr, phase.result)
        return builder.start(
            name + of, devices.lower_program(fn, args, chosen, in_axes=_IN_AXES, donate=donate)
        )

    started = {name: start(name) for name in sorted(traced, key=lambda name: name != "local")}
    return {name: started[name] for name in traced}


def compile_phases(traced: Mapping[str, TracedPhase], chosen: Devices) -> dict[str, Executable]:
    """The same, waited for."""
    with Builder() as builder:
        return finish(start_phases(traced, chosen, builder))


def finish(started: Mapping[str, Pending]) -> dict[str, Executable]:
    """The programs, once they are compiled."""
    return {name: pending.result() for name, pending in started.items()}


def lower_score(
    method: Method, state: State, batches: Split, chosen: Devices
) -> tuple[ClosedJaxpr, Callable[[], Executable]]:
    """The evaluation, traced on one device, and what compiles it for all.

    Args:
      method: whose score it is.
      state: shapes on one device.
      batches: shapes [D, ...] of those of one call.
      chosen: the devices.
    """
    args = (state, on_one_device(batches))
    jaxpr, sums = trace_score(method, *args, len(chosen))
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(chosen), *x.shape), x.dtype), args)
    return jaxpr, devices.lower_program(replay(jaxpr, sums), whole, chosen, in_axes=(0, 0))


def with_axes(inputs: tuple[State, PyTree, Turn], num_devices: int) -> tuple[State, PyTree, Turn]:
    """The shapes of (state, value, turn) on all devices, from those on one."""

    def spread(x: jax.ShapeDtypeStruct, sliced: bool) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_devices, *x.shape) if sliced else x.shape, x.dtype)

    return jax.tree.map(spread, inputs, devices.per_leaf(lambda axis: axis == 0, _IN_AXES, inputs))


def _fits(value: PyTree, result: PyTree) -> bool:
    """Whether every array of `value` has one of the same shape and dtype to itself in `result`."""
    needed, free = (Counter((x.shape, x.dtype) for x in jax.tree.leaves(tree)) for tree in (value, result))
    return needed <= free


# --- the state ----------------------------------------------------------------------------------------------


def init_shards(layout: Layout, init_params: Callable[..., Params], seed: int, chosen: Devices) -> Shards:
    """Freshly initialised parameters.

    Made part by part in the host's memory and placed in shards: no accelerator ever holds more than its
    share, and the values do not depend on the devices.
    """
    shards: Shards = {}

    def leaves_of(paths: tuple[str, ...], key: jax.Array) -> Shards:  # under `jit` no others are computed
        flat = traverse_util.flatten_dict(init_params(key), sep="/")
        return {path: flat[path] for path in paths}

    with jax.default_device(devices.host()):
        key = jax.random.key(seed)
        for paths in init_parts(layout):
            lowered = jax.jit(leaves_of, static_argnums=0).lower(tuple(paths), key)
            leaves = lowered.compile({"xla_backend_optimization_level": "0"})(key)  # it runs once
            for path in paths:
                shards[path] = devices.put(split_leaf(layout, path, np.asarray(leaves.pop(path))), chosen)
    return {path: shards[path] for path in layout.leaves}


def init_state(method: Method, shards: Shards, chosen: Devices) -> State:
    """The state before the first round, from the parameters' shards on the devices."""
    traced, like = trace_init(method, on_one_device(shards), len(chosen))
    if traced.jaxpr.outvars == traced.jaxpr.invars:  # nothing but the parameters, as they are
        return like._replace(params=shards)
    program = devices.compile_program(method.init, (shards,), chosen, in_axes=(0,))
    return jax.block_until_ready(program(shards))


def restore_state(method: Method, layout: Layout, saved: checkpoint.Saved, chosen: Devices) -> State:
    """The state of a checkpoint, placed array by array: no process ever holds the whole model.

    Of another number of workers, what they kept is not restored, if the method can do without.

    Raises:
      ValueError: the checkpoint is not of this model or method, or damaged.
    """
    _, like = trace_init(method, shard_shapes(layout), layout.num_devices)
    put = partial(devices.put, devices=chosen)
    if not method.own_restarts or saved.workers in (None, layout.num_workers):
        return saved.restore(layout, like, put)
    before, now = f"what {saved.workers} workers kept", f"num_workers={layout.num_workers}"
    log.warning("%s: %s (moments, residuals) starts anew, for %s", saved.folder, before, now)
    state = saved.without_own().restore(layout, like._replace(own=()), put)
    return state._replace(own=init_state(method, state.params, chosen).own)


def on_one_device(tree: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes on one device of arrays [D, ...]."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)
