"""The devices, of one process or several, and the only place with `pmap`: programs compiled ahead of time."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import TypeAlias, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ist_jax.costs.compiled import Executable
from ist_jax.exchange.layout import AXIS
from ist_jax.runtime import compile_options

log = logging.getLogger(__name__)

T = TypeVar("T")
Devices: TypeAlias = Sequence[jax.Device]
Program: TypeAlias = Callable[..., PyTree]  # of one device
Args: TypeAlias = Sequence[PyTree]
InAxes: TypeAlias = Sequence[PyTree[int | None]]

# XLA ends the process when virtual CPU devices meet a collective further apart than this (its own
# default is 40 s); on a loaded machine long evaluations would.
_CPU_FLAGS = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 600,
    "xla_cpu_collective_call_terminate_timeout_seconds": 3600,
}


def prepare(num_cpu_devices: int) -> None:
    """Asks for virtual CPU devices. No effect on GPU or TPU, nor where JAX has already been started.

    Args:
      num_cpu_devices: how many devices the CPU backend should show.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [f"--{name}={value}" for name, value in _CPU_FLAGS.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
    try:
        jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    except RuntimeError as error:  # a notebook has used JAX before; several workers per device then
        log.info("keeping the devices that JAX already has (%s)", error)


def choose(num_workers: int, num_devices: int) -> list[jax.Device]:
    """The devices that host the workers; of several processes, as many of each.

    Args:
      num_workers: S.
      num_devices: D, over all processes; 0: the largest divisor of S that is there.

    Raises:
      ValueError: D does not divide S, or there are fewer devices.
    """
    process = attrgetter("process_index")
    by_process = [list(own) for _, own in groupby(sorted(jax.devices(), key=process), process)]
    processes, there = len(by_process), min(map(len, by_process))
    divisors = [d for d in range(processes, processes * there + 1, processes) if num_workers % d == 0]
    if not divisors or (num_devices and num_devices not in divisors):
        owners = f" in each of {processes} processes" if processes > 1 else ""
        remedy = f"config.num_devices to 0 (automatic) or one of {divisors}" if divisors else (
            f"config.num_workers to a multiple of {processes}"
        )  # fmt: skip
        raise ValueError(
            f"num_devices={num_devices} cannot host num_workers={num_workers} on "
            f"{there} {jax.devices()[0].platform} device(s){owners}; set {remedy}"
        )
    each = (num_devices or divisors[-1]) // processes
    return [device for own in by_process for device in own[:each]]


def host() -> jax.Device:
    """The CPU as a device, for work that accelerators have no memory for.

    Where JAX_PLATFORMS leaves the CPU out: the first accelerator.
    """
    platforms = os.environ.get("JAX_PLATFORMS")
    return jax.local_devices(backend="cpu" if not platforms or "cpu" in platforms else None)[0]


def put(tree: PyTree, devices: Devices) -> PyTree:
    """Places host arrays [D, ...] one slice per device, so that calls copy nothing.

    Each process places the slices of its own devices; the others' may hold anything.
    """
    sharding = _sharding(devices)
    if jax.process_count() == 1:
        return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)
    return jax.tree.map(lambda x: _place(np.asarray(x), sharding), tree)


def replicate(tree: PyTree, devices: Devices) -> PyTree:
    """Places a copy of host arrays on every device: [D, ...]."""
    return put(jax.tree.map(lambda x: np.broadcast_to(x, (len(devices), *np.shape(x))), tree), devices)


def to_host(tree: PyTree) -> PyTree:
    """Host arrays [D, ...] of small results, whole in every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def agree(value: int, devices: Devices) -> int:
    """The largest value of all processes."""
    if jax.process_count() == 1:
        return value
    return int(to_host(put(np.full(len(devices), value, np.int32), devices)).max())


def check_same(settings: Mapping[str, object], devices: Devices) -> None:
    """Raises ValueError where processes of a run differ in their settings or the hashes of files."""
    text = json.dumps(settings, sort_keys=True, default=str)
    mark = int(hashlib.sha256(text.encode()).hexdigest()[:7], 16)
    most, least = agree(mark, devices), -agree(-mark, devices)  # both, before any process leaves
    if most != least:
        raise ValueError("the processes of this run have different settings, or different files of one name")


def compile_program(
    fn: Program, args: Args, devices: Devices, *, in_axes: InAxes, donate: Sequence[int] = ()
) -> Executable:
    """Compiles a per-device function for all devices; arguments and result as of `lower_program`."""
    return lower_program(fn, args, devices, in_axes=in_axes, donate=donate)()


def lower_program(
    fn: Program, args: Args, devices: Devices, *, in_axes: InAxes, donate: Sequence[int] = ()
) -> Callable[[], Executable]:
    """Traces a per-device function for all devices.

    Args:
      fn: plain JAX with collectives over `layout.AXIS`.
      args: example arguments; arrays or `jax.ShapeDtypeStruct`s.
      devices: from `choose`.
      in_axes: per argument 0 (one slice per device), None (the same on all), or a tree of them.
      donate: numbers of the arguments whose memory the program may reuse.

    Returns:
      What compiles it, in any thread. The executable accepts just these shapes, so nothing can
      ever be compiled again. Wait for its results before the next program with collectives: queued programs
      can block each other on CPU.
    """
    if jax.process_count() > 1:
        return partial(_SpanningProgram, devices, *_lower_spanning(fn, args, devices, in_axes, donate))  # type: ignore[return-value]
    mapped = jax.pmap(fn, AXIS, in_axes=tuple(in_axes), devices=devices, donate_argnums=donate)
    return compile_options.compile_lowered(mapped.lower(*args), devices)  # type: ignore[return-value]


def _lower_spanning(
    fn: Program, args: Args, devices: Devices, in_axes: InAxes, donate: Sequence[int]
) -> tuple[jax.stages.Lowered, PyTree[NamedSharding]]:
    """A program over several processes, and how its arguments are placed; args as of `lower_program`."""
    sliced = per_leaf(lambda axis: axis == 0, in_axes, args)

    def per_device(*slices: PyTree) -> PyTree:
        own = jax.tree.map(lambda x, one: x[0] if one else x, slices, sliced)
        return jax.tree.map(lambda x: x[None], fn(*own))

    shardings = per_leaf(partial(_sharding, devices), in_axes, args)
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    mesh, out = _sharding(devices).mesh, PartitionSpec(AXIS)
    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return jax.jit(mapped, in_shardings=shardings, donate_argnums=donate).lower(*args), shardings


class _SpanningProgram:
    """What `pmap` would compile for several processes, if it could be compiled ahead of time there.

    Arrays are global, [D, ...], each process with the slices of its own devices; host arrays are the same in
    all processes. Args: the devices, and `_lower_spanning`'s results.
    """

    def __init__(self, devices: Devices, lowered: jax.stages.Lowered, shardings: PyTree[NamedSharding]):
        self._shardings = shardings
        self.compiled = compile_options.compile_lowered(lowered, devices)()
        self.as_text, self.memory_analysis = self.compiled.as_text, self.compiled.memory_analysis
        self.args_info, self.in_tree = self.compiled.args_info, self.compiled.in_tree
        self.input_shardings = self.compiled.input_shardings

    def __call__(self, *args: PyTree) -> PyTree:
        return self.compiled(*jax.tree.map(_place, args, self._shardings))


def per_leaf(of: Callable[[int | None], T], axes: InAxes, args: Args) -> PyTree[T]:
    """`of` the axis of every array in some arguments; an axis may stand for a whole tree, as for `pmap`."""
    found = jax.tree.map(of, tuple(axes), is_leaf=lambda axis: axis is None)
    return jax.tree.broadcast(found, tuple(args))


def _place(x: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array as a global one; of that, each process needs its own slices."""
    if isinstance(x, jax.Array):
        return x
    return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])


def _sharding(devices: Devices, axis: int | None = 0) -> NamedSharding:
    spec = PartitionSpec(AXIS) if axis == 0 else PartitionSpec()
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), spec)
