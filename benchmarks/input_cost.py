"""What the data cost: a round with its batches against the same round with one constant batch.

    python benchmarks/input_cost.py [--config=configs/resnet.py] [--rounds=15] [--config.KEY=VALUE ...]

With data: indices made on the host, examples gathered from the device's uint8 copy of the set, cropped,
flipped and normalised, in every local step. Without: every step takes the same normalised batch. The two are
measured in turn, so that a noisy machine troubles both alike; CPU time hardly feels other processes at all.
Also what the set takes in the devices' memory, and in the process's.
"""

import resource
import sys
import time

import jax
import numpy as np
from absl import flags

from ist_jax import cli, train
from ist_jax.runtime import devices, programs
from ist_jax.runtime import setup as experiment

USAGE = "python benchmarks/input_cost.py [--config=FILE[:MODE]] [--rounds=N] [--config.KEY=VALUE ...]"


def with_constant_batch(run: experiment.Run) -> experiment.Run:
    """The same run, but every local step of every worker takes the same normalised batch."""
    config, size = run.config, run.config.batch_size
    images, labels = run.task.eval_fn({name: x[:size] for name, x in run.train.items()})
    batch = {"image": np.asarray(images), "label": np.asarray(labels)}
    chunk = run.feed(0)._replace(data=devices.replicate(batch, run.devices))
    recipe = run.recipe._replace(batch_fn=lambda data, indices, key: (data["image"], data["label"]))
    state = jax.tree.map(lambda x: x.copy(), run.state)
    compiled = programs.compile_programs(
        recipe, run.model, run.task, state, chunk.data, run.test_batches.spec, run.devices,
        local_steps=config.local_steps, batch_size=size, scale=run.scale,
        average_gradients=config.method == "data_parallel",
    )  # fmt: skip
    return run._replace(recipe=recipe, programs=compiled, feed=lambda _: chunk, state=state)


def time_round(run: experiment.Run, state, index: int):
    """(state, wall seconds, CPU seconds of all threads) of a round."""
    everyone = np.ones(run.config.num_workers, bool)
    wall, cpu = time.perf_counter(), time.process_time()
    state, *_ = train.run_round(run, state, index, everyone)
    return state, time.perf_counter() - wall, time.process_time() - cpu


def report_memory(run: experiment.Run) -> None:
    """What the data set takes on each device, from the buffers themselves."""
    per_device = dict.fromkeys(run.devices, 0)
    for array in jax.tree.leaves(run.feed.data):
        for shard in array.addressable_shards:
            per_device[shard.device] += shard.data.nbytes
    ratios = [size / run.train["image"].nbytes for size in per_device.values()]
    print(f"data set on each device       {max(per_device.values()) / 1e6:8.1f} MB, "
          f"{min(ratios):.4f} to {max(ratios):.4f} x its images (at most 1.1)")  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(f"process, at its largest       {peak:8.1f} MB, with {len(run.devices)} devices in it")


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    cli.define_config(values, argv, "configs/resnet.py")
    flags.DEFINE_integer("rounds", 15, "rounds to measure", flag_values=values)
    cli.parse(values, argv, USAGE, required=[])
    run = experiment.set_up(values.config)
    report_memory(run)
    constant = with_constant_batch(run)
    state, other = run.state, constant.state
    walls, cpus = [], []
    for index in range(values.rounds + 1):
        number = index % run.num_rounds
        state, wall, cpu = time_round(run, state, number)
        other, other_wall, other_cpu = time_round(constant, other, number)
        if index:  # the first ones warm up
            walls.append((wall, other_wall))
            cpus.append((cpu, other_cpu))
    device = run.devices[0]
    print(
        f"{run.config.method}, {run.config.num_workers} workers on {len(run.devices)} {device.device_kind} "
        f"device(s), l = {run.config.local_steps}, median of {values.rounds} rounds"
    )
    for name, times in (("wall", walls), ("CPU", cpus)):
        data, none = np.median(times, 0)
        ratio = np.median([a / b for a, b in times])
        print(f"round, {name:4s} time              {data * 1e3:8.1f} ms; constant batch {none * 1e3:8.1f} ms")
        print(f"round / constant, {name:4s} time   {ratio:8.3f}   (at most 1.05)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
