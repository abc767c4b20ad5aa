"""One accelerator, in under 8 minutes: is it right, how fast, what does the exchange take, PyTorch beside it.

    python benchmarks/accelerator.py [--batch=128] [--peak=989e12] [--bandwidth=3.35e12] [--minutes=8]
        [--small]

On images of CIFAR-10's shape that show nothing, all workers on one device, results last:

- right: a round with learning rate 0 leaves every bit as it was; the parameters after two rounds are those of
  the CPU within what the precision allows, mapped and vmapped alike.
- examples per second of `configs/resnet.py:cifar10` by method, dtype ('tf32' is what JAX does with float32 by
  default, 'float32' asks for its whole precision) and how a device trains its workers; the share of --peak, a
  data sheet's FLOP/s in bfloat16 without sparsity (989e12: NVIDIA H100 SXM); a section of width 256 alone.
- gather and merge: bytes that they must read and write, a second, as a share of --bandwidth in bytes/s.
- the same whole net in PyTorch, eager and compiled, where it is installed: examples per second.

What the minutes leave no time for is named. --small is a little of each, to try it on a CPU.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import peers
from absl import flags
from ml_collections import ConfigDict

from ist_jax import cli
from ist_jax.costs.formula import step_flops
from ist_jax.runtime.run import Run
from ist_jax.runtime.setup import set_up
from ist_jax.train import train_round

USAGE = (
    "python benchmarks/accelerator.py [--batch=N] [--peak=FLOPS] [--bandwidth=BYTES] [--minutes=N] [--small]"
)
PRECISION = {"float32": "highest", "tf32": "default", "bfloat16": "default"}
SECTION = {"model.sections": (4,), "model.width": 256}
TINY = {"model.sections": (1, 1, 3, 1), "model.width": 4, "local_steps": 2}


class Kind(NamedTuple):
    """What is timed: a method, how its layers compute, and how a device trains its workers."""

    method: str
    dtype: str = "bfloat16"
    workers: str = "vmap"

    def __str__(self) -> str:
        return f"{self.method}, {self.dtype}, {self.workers}"


KINDS = (
    Kind("ist"),
    Kind("ist", workers="map"),
    Kind("ist", "tf32"),
    Kind("ist", "float32"),
    Kind("local_sgd"),
    Kind("data_parallel"),
    Kind("ist", "tf32", "map"),
    Kind("local_sgd", workers="map"),
    Kind("data_parallel", workers="map"),
)


def make(kind: Kind, batch: int, small: bool, **overrides: object) -> ConfigDict:
    """The config of a kind, on one device."""
    size = TINY if small else {"model.sections": (3, 4, 23, 3), "model.width": 64, "local_steps": 10}
    config = peers.make_config(peers.RESNET, peers.CIFAR | size | overrides)
    config.method, config.workers_on_device = kind.method, kind.workers
    config.compute_dtype = "bfloat16" if kind.dtype == "bfloat16" else "float32"
    config.batch_size, config.num_devices, config.rounds = (8 if small else batch), 1, 2
    return config


def two_rounds(workers: str) -> dict[str, np.ndarray]:
    """The parameters after two rounds of a tiny net in whole float32."""
    with jax.default_matmul_precision("highest"):
        run = set_up(make(Kind("ist", "float32", workers), 8, True))
    state = run.state
    for index in range(2):
        state, _ = train_round(run, state, index)
    return jax.device_get(state.params)


def check() -> list[str]:
    """Whether the device computes what it should, a line each."""
    still = set_up(make(Kind("ist", "float32"), 8, True, **{"optimizer.learning_rate": 0.0}))
    before = jax.device_get(still.state.params)
    after = jax.device_get(train_round(still, still.state, 0)[0].params)
    changed = sum(int((before[path] != after[path]).sum()) for path in before)
    lines = [f"a round at learning rate 0 changes {changed} numbers (0)"]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/cpu.npz"
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, __file__, f"--reference={path}"], env=env, check=True)
        reference = dict(np.load(path))
    for workers in ("map", "vmap"):
        found = two_rounds(workers)
        apart = max(float(np.abs(found[path] - reference[path]).max()) for path in reference)
        lines.append(f"two rounds, {workers}: parameters at most {apart:.1e} from the CPU's (1e-3)")
    return lines


def median_phases(run: Run, repeats: int) -> dict[str, float]:
    """Seconds of the phases of a round; the first warms the device up."""
    state, stage, times = run.state, run.stages[-1], []
    for repeat in range(repeats + 1):
        turn, value, took = run.turn(stage, repeat % run.schedule.rounds), None, {}
        for name, program in stage.programs.items():
            started = time.perf_counter()
            value = jax.block_until_ready(program(state, value, turn))
            took[name] = time.perf_counter() - started
        state = value[0]
        times.append(took)
    return {name: float(np.median([took[name] for took in times[1:]])) for name in times[0]}


def speed(config: ConfigDict, dtype: str, repeats: int) -> tuple[Run, dict[str, float], float, float]:
    """(run, seconds by phase, examples/s and FLOP/s of the local steps)."""
    with jax.default_matmul_precision(PRECISION[dtype]):
        run = set_up(config)
    seconds = median_phases(run, repeats)
    examples = config.num_workers * config.local_steps * config.batch_size
    flops = step_flops(run.stages[-1].recipe, run.inputs.train, config.batch_size)
    steps = config.num_workers * config.local_steps
    return run, seconds, examples / seconds["local"], flops * steps / seconds["local"]


def exchanged(run: Run, seconds: dict[str, float]) -> dict[str, float]:
    """Bytes per second of gather and merge: numbers of the subnets and of what is kept, each once."""
    layout, size = run.stages[-1].recipe.layout, run.stages[-1].recipe.layout.dtype.itemsize
    dealt = {path: leaf for path, leaf in layout.leaves.items() if leaf.unit_axes}
    subnets = layout.num_workers * size * sum(int(np.prod(leaf.subnet_shape)) for leaf in dealt.values())
    shared = size * sum(int(np.prod(x.shape)) for path, x in layout.leaves.items() if path not in dealt)
    kept = size * sum(int(np.prod(x.shape)) for x in layout.leaves.values())
    return {
        "gather": 2 * subnets / seconds["gather"],
        "merge": (subnets + layout.num_workers * shared + 2 * kept) / seconds["merge"],
    }


def peer(config: ConfigDict, compiled: bool, repeats: int = 20) -> float:
    """Examples per second of the whole net in PyTorch, in channels_last and bfloat16."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = peers.make_net(tuple(config.model.sections), config.model.width, 3, 10)
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, config.optimizer.momentum, weight_decay=5e-4)
    shown = torch.compile(net) if compiled else net
    x = torch.randn(config.batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (config.batch_size,), device=device)

    def steps(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(shown(x), y)
            loss.backward()
            optimizer.step()
        loss.item()  # waits
        return time.perf_counter() - started

    steps(3)
    return config.batch_size * repeats / steps(repeats)


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_integer("batch", 128, "examples of a worker and step", lower_bound=1, flag_values=values)
    flags.DEFINE_float("peak", 989e12, "FLOP/s in bfloat16, of the data sheet", 1, flag_values=values)
    flags.DEFINE_float("bandwidth", 3.35e12, "bytes/s of its memory", 1, flag_values=values)
    flags.DEFINE_float("minutes", 8.0, "to take at most", 0, flag_values=values)
    flags.DEFINE_boolean("small", False, "a little of each", flag_values=values)
    flags.DEFINE_string("reference", "", "where to write what the check compares with", flag_values=values)
    cli.parse(values, argv, USAGE, required=[])
    if values.reference:
        np.savez(values.reference, **two_rounds("map"))
        return 0
    ends, small, lines, left = time.monotonic() + 60 * values.minutes, values.small, [], []
    repeats = 1 if small else 3

    def part(name: str, measure: Callable[[], str]) -> None:
        if time.monotonic() > ends:
            left.append(name)
            return
        lines.append(measure())
        print(lines[-1], flush=True)

    def of_kind(kind: Kind, **overrides: object) -> str:
        config = make(kind, values.batch, small, **overrides)
        run, seconds, examples, flops = speed(config, kind.dtype, repeats)
        text = f"{kind}: {examples:,.0f} examples/s, {flops / values.peak:.1%} of the peak in the local steps"
        if kind == KINDS[0]:
            for name, rate in exchanged(run, seconds).items():
                text += (
                    f"; {name} {seconds[name] * 1e3:.2f} ms, {rate / values.bandwidth:.1%} of the bandwidth"
                )
        return text

    def of_peer(name: str, compiled: bool) -> str:
        rate = peer(make(Kind("data_parallel"), values.batch, small), compiled, repeats)
        return f"{name}: {rate:,.0f} examples/s"

    part("check", lambda: "; ".join(check()))
    for kind in KINDS[: 2 if small else None]:
        part(str(kind), partial(of_kind, kind))
    section = Kind("local_sgd")
    narrow = {"model.width": 8} if small else {}
    part("width 256", lambda: "a section of width 256: " + of_kind(section, **SECTION | narrow))
    for compiled in (False, True):
        name = f"PyTorch, {'compiled' if compiled else 'eager'}, bfloat16"
        if importlib.util.find_spec("torch"):
            part(name, partial(of_peer, name, compiled))
        else:
            left.append(f"{name} (not installed)")
    device = jax.devices()[0]
    print(f"\n{device.device_kind}, JAX {jax.__version__}, {time.strftime('%Y-%m-%d')}, batch {values.batch}")
    print("\n".join(f"- {line}" for line in lines))
    if left:
        print("left out: " + "; ".join(left))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
