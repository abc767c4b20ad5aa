"""What a round costs beyond its local steps: gather, merge, loop and host work.

    python benchmarks/round_overhead.py [--config=configs/resnet.py] [--rounds=15] [--config.KEY=VALUE ...]

Prints the time of a whole round and of l times one step of the same subnets on the same devices, compiled
on its own; the two are measured in turn, so that a noisy machine troubles both alike. Also the share of
gather and merge in a round. Medians.
"""

import sys
import time

import jax
import numpy as np
from absl import flags
from ml_collections import config_dict

from ist_jax import cli, train
from ist_jax.runtime.run import Run
from ist_jax.runtime.setup import set_up


def one_step_run(config: config_dict.ConfigDict) -> Run:
    """The same run with programs for a single local step."""
    single = config.copy_and_resolve_references()
    single.local_steps = 1
    return set_up(single)


def time_round(run: Run, state, index: int):
    """(state, seconds of the round, seconds of its phases)."""
    started = time.perf_counter()
    state, _ = train.train_round(run, state, index)
    return state, time.perf_counter() - started, run.clock.take()


def time_step(run: Run, state, index: int) -> float:
    """One step from gathered subnets; only the step is timed."""
    return time_round(run, state, index)[2]["local"]


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    cli.define_config(values, argv, "configs/resnet.py")
    flags.DEFINE_integer("rounds", 15, "rounds to measure", flag_values=values)
    cli.parse(values, argv, "python benchmarks/round_overhead.py [--config=FILE] [--rounds=N]", required=[])
    run = set_up(values.config)
    single = one_step_run(values.config)
    steps = values.config.local_steps
    state, step_state = run.state, single.state
    rounds, locals_, exchanges = [], [], []
    for index in range(values.rounds + 2):
        state, seconds, phases = time_round(run, state, index % run.schedule.rounds)
        step = []
        for _ in range(steps):
            donated = jax.tree.map(lambda x: x.copy(), step_state)
            step.append(time_step(single, jax.block_until_ready(donated), index % single.schedule.rounds))
        if index >= 2:  # the first ones warm up
            rounds.append(seconds)
            locals_.append(sum(step))
            exchanges.append((sum(phases.values()) - phases["local"]) / seconds)
    device = run.devices[0]
    workers = values.config.num_workers
    print(f"{values.config.method}, {workers} workers on {len(run.devices)} {device.device_kind} device(s)")
    print(f"round                         {np.median(rounds) * 1e3:8.1f} ms")
    print(f"{steps:3d} x one step               {np.median(locals_) * 1e3:8.1f} ms")
    print(f"round / ({steps} x one step)       {np.median(np.divide(rounds, locals_)):8.3f}   (at most 1.10)")
    print(f"gather + merge of a round     {np.median(exchanges):8.1%}   (below 10%)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
