"""A step of a worker and a round, here and in plain PyTorch: the same subnets, on the same cores, in turn.

    pip install -e '.[peers]' --extra-index-url https://download.pytorch.org/whl/cpu
    python benchmarks/peers.py [--work=cifar10_small,digits] [--repeats=5] [--nopeer]

A step: here, a device per core trains its workers in the compiled local phase of a round, augmentation
included. The peer is a loop in eager PyTorch, a process per core with one thread, on batches that are in
memory already: no data, no exchange. It is timed in NCHW and in channels_last, and the better one counts.
Printed are medians over the repeats, in ms per step of a worker and core; the ratio of ours to the peer's;
and both rates as shares of that of a large matrix product, which PyTorch does on one core. With --nopeer ours
alone, without PyTorch, to compare versions and XLA_FLAGS.

A round of IST (`ist_round`), in seconds: the peer is of the design of the papers' released code, two
processes over gloo. The first keeps the model, cuts out each worker's part and puts back what has come of it.
"""

import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

ROOT = Path(__file__).parent.parent
CORES = len(os.sched_getaffinity(0))
RESNET, MLP = "configs/resnet.py", "configs/mlp.py"
SMALL = {"model.sections": (1, 1, 9, 1), "local_steps": 10, "batch_size": 64, "partition.min_units": 3}
CIFAR = {"data.name": "noise", "data.pad": 4, "data.flip": True}
IST = {
    "data.name": "features",
    "model.hidden": (4096, 4096),
    "num_workers": 2,
    "batch_size": 128,
    "local_steps": 10,
}
WORKS: dict[str, tuple[str, dict]] = {  # config, and what it changes; the image's shape follows from the data
    "wide": (
        RESNET,
        CIFAR
        | {
            "model.sections": (2, 2, 9, 2),
            "model.width": 64,
            "num_workers": 2,
            "local_steps": 4,
            "batch_size": 32,
        },
    ),
    "cifar10_small": (RESNET, CIFAR | SMALL),
    "cifar10_small local_sgd": (RESNET, CIFAR | SMALL | {"method": "local_sgd", "partition.min_units": 0}),
    "digits": (RESNET, {}),
    "digits local_sgd": (RESNET, {"method": "local_sgd"}),
    "ist": (MLP, IST),
}
ROUND = "ist_round"


# --- the peer: a process that knows PyTorch alone -----------------------------------------------------------


def make_net(sections: tuple[int, ...], width: int, channels: int, classes: int):
    """The pre-activation ResNet of basic blocks of `models.resnet`; batch statistics alone."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inside: int, outside: int, stride: int):
            super().__init__()
            self.norm1 = nn.BatchNorm2d(inside, track_running_stats=False)
            self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(outside, track_running_stats=False)
            self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
            projects = stride > 1 or inside != outside
            self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if projects else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.norm1(x))
            skip = x if self.shortcut is None else self.shortcut(y)
            return skip + self.conv2(torch.relu(self.norm2(self.conv1(y))))

    layers, inside = [nn.Conv2d(channels, width, 3, 1, 1, bias=False)], width
    for number, blocks in enumerate(sections):
        outside = width * 2**number
        for block in range(blocks):
            layers.append(Block(inside, outside, 2 if number and not block else 1))
            inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))


def make_feed_forward(sizes: tuple[int, ...]):
    """The net of `models.mlp`."""
    from torch import nn

    layers: list = [nn.Flatten()]
    for number, (inside, outside) in enumerate(pairwise(sizes), 2):
        last = number == len(sizes)
        layers += [nn.Linear(inside, outside, bias=False), nn.BatchNorm1d(outside, affine=not last)]
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)


def serve(
    link: Connection, net: dict, shape: tuple[int, ...], batch: int, steps: int, momentum: float
) -> None:
    """Trains `steps` steps whenever it is asked to, in the asked memory format; answers with the seconds."""
    import torch

    torch.set_num_threads(1)
    made = make_feed_forward(**net) if "sizes" in net else make_net(**net)
    nets = {"nchw": made, "channels_last": made if "sizes" in net else make_net(**net)}
    classes = [m for m in made.modules() if isinstance(m, torch.nn.Linear)][-1].out_features
    ready = {}
    for name, model in nets.items():
        layout = (
            torch.channels_last if name == "channels_last" and len(shape) == 3 else torch.contiguous_format
        )
        x = torch.randn(batch, *([shape[2], *shape[:2]] if len(shape) == 3 else shape)).to(
            memory_format=layout
        )
        model = model.to(memory_format=layout) if len(shape) == 3 else model
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum, weight_decay=5e-4)
        ready[name] = (model, optimizer, x, torch.randint(0, classes, (batch,)))
    while name := link.recv():
        model, optimizer, x, y = ready[name]
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        link.send(time.perf_counter() - started)


def multiply(size: int = 1024, repeats: int = 20) -> float:
    """FLOPs per second of a product of matrices, on one thread of PyTorch, at best."""
    import torch

    torch.set_num_threads(1)
    matrix, seconds = torch.randn(size, size), []
    for _ in range(repeats):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def serve_round(
    link: Connection, rank: int, meeting: str, sizes: tuple[int, ...], batch: int, steps: int
) -> None:
    """A worker of IST as the papers' released code has it; answers each message with the seconds of a round.

    Every parameter is cut out, sent, received and put back on its own.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    widths = [sizes[0], *(size // 2 for size in sizes[1:-1]), sizes[-1]]
    whole = make_feed_forward(sizes).state_dict() if not rank else {}
    net = make_feed_forward(tuple(widths))
    x, y = torch.randn(batch, sizes[0]), torch.randint(0, sizes[-1], (batch,))

    def own(name: str, draws: list, worker: int) -> tuple:
        """Where a worker's part of a parameter is, by the layer of its name: outputs, then inputs."""
        layer = (int(name.split(".")[0]) - 1) // 3
        sides = [draws[layer + 1], draws[layer]] if net.state_dict()[name].ndim == 2 else [draws[layer + 1]]
        parts = [slice(None) if d is None else d.chunk(2)[worker] for d in sides]
        if all(isinstance(part, torch.Tensor) for part in parts) and len(parts) == 2:
            parts[0] = parts[0][:, None]
        return tuple(parts)

    while link.recv():
        dist.barrier()
        started = time.perf_counter()
        draws = [None, *(torch.randperm(size) for size in sizes[1:-1]), None]
        names = dict(net.named_parameters())
        for name, weight in names.items():
            parts = [whole[name][own(name, draws, w)].contiguous() for w in range(2)] if not rank else None
            dist.scatter(weight.data, parts)
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        for name, weight in names.items():
            got = [torch.empty_like(weight.data) for _ in range(2)] if not rank else None
            dist.gather(weight.data, got)
            if got is not None:
                places = [own(name, draws, w) for w in range(2)]
                if all(isinstance(part, slice) for part in places[0]):
                    whole[name].copy_(sum(got) / 2)
                else:
                    for place, part in zip(places, got, strict=True):
                        whole[name][place] = part
        link.send(time.perf_counter() - started)
    dist.destroy_process_group()


class Peer:
    """Processes that do `target`, one per set of arguments."""

    def __init__(self, target: Callable, arguments: list[tuple]):
        context = multiprocessing.get_context("spawn")
        self._links, self._processes = [], []
        for args in arguments:
            here, there = context.Pipe()
            process = context.Process(target=target, args=(there, *args), daemon=True)
            process.start()
            self._links.append(here)
            self._processes.append(process)

    def seconds(self, name: str) -> float:
        """Of the slowest process."""
        for link in self._links:
            link.send(name)
        return max(link.recv() for link in self._links)

    def close(self) -> None:
        for link in self._links:
            link.send("")
        for process in self._processes:
            process.join()


def make_config(path: str, overrides: dict) -> ConfigDict:
    """Of a work, whose data are noise where they are not embedded."""
    from ist_jax import data

    data.SETS |= {"noise": data.Entry(noise), "features": data.Entry(features)}
    config = runpy.run_path(str(ROOT / path))["get_config"]()
    config.update_from_flattened_dict(overrides)
    return config


# --- the two, in turn ---------------------------------------------------------------------------------------


def measure(name: str, repeats: int, with_peer: bool) -> dict[str, float]:
    """Medians of ms per step of a worker and core: ours, and the peer's by memory format."""
    import jax

    from ist_jax.costs.formula import step_flops
    from ist_jax.models.conv import by_definition
    from ist_jax.runtime.setup import set_up

    path, _ = WORKS[name]
    config = make_config(*WORKS[name])
    config.num_devices = min(CORES, config.num_workers)
    run = set_up(config)
    stage, turn = run.stages[-1], run.turn(run.stages[-1], 0)
    groups = stage.recipe.layout.groups
    shape = run.inputs.task.example[0].shape[1:]
    if path == MLP:
        hidden = [groups[f"hidden{i}"].slots if groups else w for i, w in enumerate(config.model.hidden, 1)]
        net: dict = {"sizes": (int(np.prod(shape)), *hidden, len(run.inputs.dataset.classes))}
    else:
        sections = list(config.model.sections)
        if groups:
            sections[2] = groups["section3"].slots + 1
        net = {"sections": tuple(sections), "width": config.model.width, "channels": shape[2], "classes": 10}
    steps = config.local_steps
    args = (net, tuple(shape), config.batch_size, steps, config.optimizer.momentum)
    formats = ("nchw", "channels_last") if with_peer else ()
    peer = Peer(serve, [args] * CORES if with_peer else [])
    times: dict[str, list[float]] = {name: [] for name in ("ours", *formats)}
    for repeat in range(repeats + 1):
        value = None
        if "gather" in stage.programs:
            value = jax.block_until_ready(stage.programs["gather"](run.state, None, turn))
        started = time.perf_counter()
        jax.block_until_ready(stage.programs["local"](run.state, value, turn))
        ours = (time.perf_counter() - started) / stage.recipe.layout.workers_per_device
        for key, seconds in {"ours": ours, **{k: peer.seconds(k) for k in formats}}.items():
            if repeat:  # the first warms up
                times[key].append(seconds / steps * 1e3)
    peer.close()
    found = {key: float(np.median(x)) for key, x in times.items()}
    if not with_peer:
        return found
    best = min(found[key] for key in formats)
    with by_definition():
        flops = step_flops(stage.recipe, run.inputs.train, config.batch_size)
    rate = multiply()
    shares = {f"{who}_share": flops / ms * 1e3 / rate for who, ms in (("our", found["ours"]), ("peer", best))}
    return found | {"ratio": found["ours"] / best, "gflops_of_products": rate / 1e9, **shares}


def measure_round(repeats: int) -> dict[str, float]:
    """Medians of the seconds of a round of IST: ours, of it those of the exchange, and the peer's."""
    import jax

    from ist_jax.runtime.setup import set_up

    config = make_config(MLP, IST | {"num_devices": 2})
    run = set_up(config)
    stage = run.stages[-1]
    sizes = (
        int(np.prod(run.inputs.task.example[0].shape)),
        *config.model.hidden,
        len(run.inputs.dataset.classes),
    )
    meeting = str(Path(tempfile.mkdtemp()) / "meeting")
    peer = Peer(
        serve_round, [(rank, meeting, sizes, config.batch_size, config.local_steps) for rank in range(2)]
    )
    times: dict[str, list[float]] = {**{name: [] for name in stage.programs}, "peer": []}
    state = run.state
    for repeat in range(repeats + 1):
        turn, value = run.turn(stage, repeat), None
        for name, program in stage.programs.items():
            started = time.perf_counter()
            value = jax.block_until_ready(program(state, value, turn))
            times[name].append(time.perf_counter() - started)
        state = value[0]
        times["peer"].append(peer.seconds("round"))
    peer.close()
    found = {name: float(np.median(x[1:])) for name, x in times.items()}  # the first warms up
    ours = sum(found[name] for name in stage.programs)
    exchange = (ours - found["local"]) / ours
    return found | {"ours": ours, "ratio": ours / found["peer"], "share_of_exchange": exchange}


def features(directory: str, options: dict):
    """As many features as the speech configs have, which say nothing."""
    from ist_jax import data

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (1024, 64, 64, 1), dtype=np.uint8), rng.integers(0, 35, 1024)
    source = data.ArraySource(images, labels.astype(np.int32))
    return data.DataSet("noise of 4096 features", source, source, tuple(map(str, range(35))))


def noise(directory: str, options: dict):
    """Images of CIFAR-10's shape that show nothing."""
    from ist_jax import data

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (1024, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 1024)
    source = data.ArraySource(images, labels.astype(np.int32))
    return data.DataSet("noise of CIFAR-10's shape", source, source, tuple("0123456789"))


def main(argv: list[str]) -> int:
    from ist_jax import cli

    values = flags.FlagValues()
    works = (*WORKS, ROUND)
    flags.DEFINE_list("work", list(works), f"of {', '.join(works)}", flag_values=values)
    flags.DEFINE_integer("repeats", 5, "to take the median of", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("peer", True, "PyTorch beside it; a round is never without", flag_values=values)
    cli.parse(values, argv, "python benchmarks/peers.py [--work=NAME,...] [--repeats=N]", required=[])
    for name in values.work:
        own = (name, values.repeats, values.peer)
        found = measure_round(values.repeats) if name == ROUND else measure(*own)
        rounded = {key: float(f"{value:.4g}") for key, value in found.items()}
        print(json.dumps({"work": name, **rounded}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
