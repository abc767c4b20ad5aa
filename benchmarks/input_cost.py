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
from ist_jax.config import restore
from ist_jax.runtime import devices, programs, setup, stages
from ist_jax.runtime.run import Run

USAGE = "python benchmarks/input_cost.py [--config=FILE[:MODE]] [--rounds=N] [--config.KEY=VALUE ...]"


def with_constant_batch(run: Run) -> Run:
    """The same run, but every local step of every worker takes the same normalised batch."""
    config, stage = restore(run.settings), run.stages[-1]
    first = {name: x[: config.batch_size] for name, x in run.inputs.train.items()}
    images, labels = run.inputs.task.show(first)
    batch = {"image": np.asarray(images), "label": np.asarray(labels)}
    chunk = run.feed(0)._replace(data=devices.replicate(batch, run.devices))
    recipe = stage.recipe._replace(batch_fn=lambda data, indices, key: (data["image"], data["label"]))
    entry = setup.method_of(config)
    phases = stages.trace_round(entry, recipe, batch, config.local_steps, config.batch_size)
    compiled = programs.compile_phases(phases, run.devices)
    return run._replace(
        stages=(stage._replace(recipe=recipe, phases=phases, programs=compiled),),
        turn=setup.turn_maker(config, lambda _: chunk, run.schedule),
        state=jax.tree.map(lambda x: x.copy(), run.state),
    )


def time_round(run: Run, state, index: int):
    """(state, wall seconds, CPU seconds of all threads) of a round."""
    wall, cpu = time.perf_counter(), time.process_time()
    state, _ = train.train_round(run, state, index)
    return state, time.perf_counter() - wall, time.process_time() - cpu


def report_memory(run: Run) -> None:
    """What the data set takes on each device, from the buffers themselves."""
    per_device = dict.fromkeys(run.devices, 0)
    for array in jax.tree.leaves(run.feed.data):
        for shard in array.addressable_shards:
            per_device[shard.device] += shard.data.nbytes
    ratios = [size / run.inputs.train["image"].nbytes for size in per_device.values()]
    print(f"data set on each device       {max(per_device.values()) / 1e6:8.1f} MB, "
          f"{min(ratios):.4f} to {max(ratios):.4f} x its images (at most 1.1)")  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(f"process, at its largest       {peak:8.1f} MB, with {len(run.devices)} devices in it")


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    cli.define_config(values, argv, "configs/resnet.py")
    flags.DEFINE_integer("rounds", 15, "rounds to measure", flag_values=values)
    cli.parse(values, argv, USAGE, required=[])
    run = setup.set_up(values.config)
    report_memory(run)
    constant = with_constant_batch(run)
    state, other = run.state, constant.state
    walls, cpus = [], []
    for index in range(values.rounds + 1):
        number = index % run.schedule.rounds
        state, wall, cpu = time_round(run, state, number)
        other, other_wall, other_cpu = time_round(constant, other, number)
        if index:  # the first ones warm up
            walls.append((wall, other_wall))
            cpus.append((cpu, other_cpu))
    device = run.devices[0]
    print(
        f"{run.name}, {run.layout.num_workers} workers on {len(run.devices)} {device.device_kind} "
        f"device(s), l = {run.settings['local_steps']}, median of {values.rounds} rounds"
    )
    for name, times in (("wall", walls), ("CPU", cpus)):
        data, none = np.median(times, 0)
        ratio = np.median([a / b for a, b in times])
        print(f"round, {name:4s} time              {data * 1e3:8.1f} ms; constant batch {none * 1e3:8.1f} ms")
        print(f"round / constant, {name:4s} time   {ratio:8.3f}   (at most 1.05)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
