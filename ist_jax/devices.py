"""The devices, and the only place with `pmap`: a program per device, compiled once, ahead of time."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ist_jax.store import AXIS

log = logging.getLogger(__name__)

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
    if jax.config.values["jax_num_cpu_devices"] == num_cpu_devices:  # by an earlier run of the process
        return
    try:
        jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    except RuntimeError as error:  # a notebook has used JAX before; several workers per device then
        log.info("keeping the devices that JAX already has (%s)", error)


def choose(num_workers: int, num_devices: int) -> list[jax.Device]:
    """The devices that host the workers.

    Args:
      num_workers: S.
      num_devices: D; 0: the largest divisor of S that is there.

    Raises:
      ValueError: D does not divide S, or there are fewer devices.
    """
    there = jax.local_devices()
    divisors = [d for d in range(1, num_workers + 1) if num_workers % d == 0 and d <= len(there)]
    if num_devices and num_devices not in divisors:
        raise ValueError(
            f"num_devices={num_devices} cannot host num_workers={num_workers} on "
            f"{len(there)} {there[0].platform} device(s); set config.num_devices to 0 (automatic) or "
            f"one of {divisors}"
        )
    return there[: num_devices or divisors[-1]]


def host() -> jax.Device:
    """The CPU as a device, for work that accelerators have no memory for.

    Where JAX_PLATFORMS leaves the CPU out: the first accelerator.
    """
    platforms = os.environ.get("JAX_PLATFORMS")
    return jax.local_devices(backend="cpu" if not platforms or "cpu" in platforms else None)[0]


def put(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Places arrays [D, ...] one slice per device, so that calls copy nothing."""
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
    return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Places a copy of host arrays on every device: [D, ...]."""
    return put(jax.tree.map(lambda x: np.broadcast_to(x, (len(devices), *np.shape(x))), tree), devices)


def compile_program(
    fn: Callable[..., Any],
    args: Sequence[Any],
    devices: Sequence[jax.Device],
    *,
    in_axes: Sequence[int | None],
    donate: Sequence[int] = (),
) -> jax.stages.Compiled:
    """Compiles a per-device function for all devices.

    Args:
      fn: plain JAX with collectives over `store.AXIS`.
      args: example arguments; arrays or `jax.ShapeDtypeStruct`s.
      devices: from `choose`.
      in_axes: per argument 0 (one slice per device) or None (the same on all).
      donate: numbers of the arguments whose memory the program may reuse.

    Returns:
      The executable; it accepts just these shapes, so nothing can ever be compiled again. Wait for its
      results before the next program with collectives: queued programs can block each other on CPU.
    """
    mapped = jax.pmap(
        fn, axis_name=AXIS, in_axes=tuple(in_axes), devices=list(devices), donate_argnums=tuple(donate)
    )
    return mapped.lower(*args).compile()
