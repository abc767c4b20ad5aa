"""What XLA is told beside every program so that CPUs run it faster.

As options of `lowered.compile`, not as XLA_FLAGS: one that this jaxlib does not know is an error that can be
answered, and does not end the process. A user's own XLA_FLAGS win. Some change the last bits of results; they
are recorded, so that who resumes a run under others is told.
"""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import jax

log = logging.getLogger(__name__)

Options: TypeAlias = dict[str, str | bool]

# BatchNorm and ReLU of [32, 32, 32, 64], both ways, on an AMD EPYC with AVX-512, JAX 0.10.2, 2026-11-24:
# 0.86 -> 0.74 ms. Whole steps on an Intel Xeon, 2026-11-30: the same (benchmarks/RESULTS.md).
_WIDE: Options = {"xla_cpu_prefer_vector_width": "512"}
# where every core has a device, their work need not fight over one pool
_NO_POOL: Options = {"xla_cpu_multi_thread_eigen": False}


def compile_lowered(
    lowered: jax.stages.Lowered, devices: Sequence[jax.Device]
) -> Callable[[], jax.stages.Compiled]:
    """What compiles a program for these devices, in any thread."""
    options = _choose(devices[0].platform, len(jax.local_devices()))
    return functools.partial(lowered.compile, options or None)


def changing_bits(devices: Sequence[jax.Device]) -> Options:
    """Those of the devices' options that results depend on, in their last bits."""
    return {
        k: v for k, v in _choose(devices[0].platform, len(jax.local_devices())).items() if k not in _NO_POOL
    }


def compare(begun: Options, devices: Sequence[jax.Device]) -> None:
    """Says where a run that was begun under others goes on, on another kind of processor perhaps."""
    if begun != (now := changing_bits(devices)):
        log.warning(
            "the run was begun with the compile options %s and goes on with %s: the same computation, but not"
            " the same last bits",
            begun or "of XLA",
            now or "of XLA",
        )


@functools.cache
def _choose(platform: str, local_devices: int) -> Options:
    if platform != "cpu" or not _has_avx512():
        return {}
    options = _WIDE | (_NO_POOL if local_devices >= (os.cpu_count() or 1) else {})
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags and _is_known(name, value)}


def _has_avx512() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "avx512f" in cpuinfo.read_text()


def _is_known(name: str, value: str | bool) -> bool:
    """Whether this jaxlib takes an option, tried on a program of nothing."""
    try:
        jax.jit(lambda x: x).lower(0.0).compile({name: value})
    except jax.errors.JaxRuntimeError as error:
        if "option" not in str(error):
            raise
        log.info("programs are compiled without %s, which this jaxlib does not take", name)
        return False
    return True
