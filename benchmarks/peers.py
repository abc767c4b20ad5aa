"""A step of a worker, here and in plain PyTorch: the same subnets, on the same cores, in turn in one run.

    pip install -e '.[peers]' --extra-index-url https://download.pytorch.org/whl/cpu
    python benchmarks/peers.py [--work=cifar10_small,digits] [--repeats=5]

Here, a device per core trains its workers in the compiled local phase of a round, augmentation included. The
peer is a loop in eager PyTorch, a process per core with one thread, on batches that are in memory already: no
data, no exchange. It is timed in NCHW and in channels_last, and the better one counts. Seconds are medians
over the repeats of ms per step of a worker and core; the ratio is ours to the peer's.
"""

import json
import multiprocessing
import os
import runpy
import sys
import time
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from absl import flags

ROOT = Path(__file__).parent.parent
CORES = len(os.sched_getaffinity(0))
RESNET, MLP = "configs/resnet.py", "configs/mlp.py"
SMALL = {"model.sections": (1, 1, 9, 1), "local_steps": 10, "batch_size": 64, "partition.min_units": 3}
CIFAR = {"data.name": "noise", "data.pad": 4, "data.flip": True}
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
    "ist": (MLP, {"model.hidden": (4096, 4096), "num_workers": 2, "batch_size": 128, "local_steps": 10}),
}


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


class Peer:
    """A process per core."""

    def __init__(self, *args: object):
        context = multiprocessing.get_context("spawn")
        self._links, self._processes = [], []
        for _ in range(CORES):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, *args), daemon=True)
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


# --- the two, in turn ---------------------------------------------------------------------------------------


def measure(name: str, repeats: int) -> dict[str, float]:
    """Medians of ms per step of a worker and core: ours, and the peer's by memory format."""
    import jax

    from ist_jax.runtime.setup import set_up

    path, overrides = WORKS[name]
    config = runpy.run_path(str(ROOT / path))["get_config"]()
    config.update_from_flattened_dict(
        overrides | {"num_devices": min(CORES, overrides.get("num_workers", 4))}
    )
    run = set_up(config)
    stage, turn = run.stages[-1], run.turn(run.stages[-1], 0)
    groups = stage.recipe.layout.groups
    shape = run.inputs.task.example[0].shape[1:]
    if path == MLP:
        hidden = [groups[f"hidden{i}"].slots if groups else w for i, w in enumerate(config.model.hidden, 1)]
        net: dict = {"sizes": (int(np.prod(shape)), *hidden, 10)}
    else:
        sections = list(config.model.sections)
        if groups:
            sections[2] = groups["section3"].slots + 1
        net = {"sections": tuple(sections), "width": config.model.width, "channels": shape[2], "classes": 10}
    steps = config.local_steps
    peer = Peer(net, tuple(shape), config.batch_size, steps, config.optimizer.momentum)
    times: dict[str, list[float]] = {"ours": [], "nchw": [], "channels_last": []}
    for repeat in range(repeats + 1):
        value = None
        if "gather" in stage.programs:
            value = jax.block_until_ready(stage.programs["gather"](run.state, None, turn))
        started = time.perf_counter()
        jax.block_until_ready(stage.programs["local"](run.state, value, turn))
        ours = (time.perf_counter() - started) / stage.recipe.layout.workers_per_device
        for key, seconds in {"ours": ours, **{k: peer.seconds(k) for k in ("nchw", "channels_last")}}.items():
            if repeat:  # the first warms up
                times[key].append(seconds / steps * 1e3)
    peer.close()
    return {key: float(np.median(x)) for key, x in times.items()}


def noise(directory: str, options: dict):
    """Images of CIFAR-10's shape that show nothing."""
    from ist_jax import data

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (1024, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 1024)
    source = data.ArraySource(images, labels.astype(np.int32))
    return data.DataSet("noise of CIFAR-10's shape", source, source, tuple("0123456789"))


def main(argv: list[str]) -> int:
    from ist_jax import cli, data

    values = flags.FlagValues()
    flags.DEFINE_list("work", list(WORKS), f"of {', '.join(WORKS)}", flag_values=values)
    flags.DEFINE_integer("repeats", 5, "to take the median of", lower_bound=1, flag_values=values)
    cli.parse(values, argv, "python benchmarks/peers.py [--work=NAME,...] [--repeats=N]", required=[])
    data.SETS["noise"] = data.Entry(noise)
    for name in values.work:
        found = measure(name, values.repeats)
        best = min(found["nchw"], found["channels_last"])
        print(json.dumps({"work": name, **found, "ratio": round(found["ours"] / best, 3)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
