"""Trains a network as independent subnets.

python -m ist_jax.main --config=configs/resnet.py [--workdir=DIR] [--tensorboard] [--profile=ROUNDS]
                       [--config.num_workers=8 ...]

The same command on the same --workdir goes on from the newest intact checkpoint.
"""

import contextlib
import logging
import re
import sys
import time
import traceback
from pathlib import Path

from absl import flags
from ml_collections import config_dict
from tqdm.contrib.logging import logging_redirect_tqdm

from ist_jax import cli, errors

log = logging.getLogger("ist_jax.main")  # also where this file is the command

_BEGAN = time.monotonic()

USAGE = "python -m ist_jax.main --config=FILE[:MODE] [--workdir=DIR] [--config.KEY=VALUE ...]"


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    values = flags.FlagValues()
    cli.define_config(values, argv, None)
    flags.DEFINE_string("workdir", None, "folder for the results; default: a new one under runs/", values)
    flags.DEFINE_string(
        "coordinator", None, "host:port of process 0, where a run has several processes", values
    )
    flags.DEFINE_integer("num_processes", None, "how many processes there are", flag_values=values)
    flags.DEFINE_integer("process_id", None, "the number of this one, from 0", flag_values=values)
    pod = "several processes, found through SLURM, Open MPI, Kubernetes or a TPU pod"
    flags.DEFINE_boolean("distributed", False, pod, values)
    flags.DEFINE_boolean("tensorboard", False, "write event files to the folder's tensorboard/, too", values)
    flags.DEFINE_integer(
        "profile", 0, "rounds, after the first, to trace to the folder's profile/", 0, flag_values=values
    )
    cli.define_compilation_cache(values)
    cli.parse(values, argv, USAGE, required=["config"])
    several = [values.coordinator, values.num_processes, values.process_id]
    if None in several and several != [None] * 3:
        raise errors.fail("--coordinator, --num_processes and --process_id go together")
    if values.coordinator and not re.fullmatch(r".+:\d+", values.coordinator):
        raise errors.fail(f"--coordinator={values.coordinator}: host:port is needed, such as 10.0.0.1:9000")
    spans = values.distributed or None not in several
    if spans and not values.workdir:
        raise errors.fail("several processes need a --workdir that all of them see")
    workdir = cli.new_workdir(values, "", "%Y%m%d-%H%M%S-%f")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # JAX starts here, after the flags are known to be right
    from ist_jax import train
    from ist_jax.config import check
    from ist_jax.runtime import compilation_cache, processes, signals

    config = values.config
    code, agreed = 1, False  # that the run ends here, in all of its processes
    try:
        with signals.handled(deferred=False), compilation_cache.kept(values.compilation_cache):
            if spans:
                with cli.errors():
                    check(config)
                    processes.start(several, lost_after=config.lost_after, stuck_after=config.stuck_after)
            run_once(config, workdir, tensorboard=values.tensorboard, profile=values.profile)
        code, agreed = 0, True
    except signals.Interrupted as stop:
        print(stop, file=sys.stderr)
        code, agreed = stop.exit_code, stop.agreed
    except (train.Diverged, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        agreed = isinstance(error, train.Diverged)
    except SystemExit as mistake:
        if not processes.is_started():
            raise
        code = int(mistake.code or 0)
    except Exception as error:
        if not processes.is_started():
            raise
        if processes.is_of_jax(error):
            processes.explain()  # ends this process, if another one is lost
        traceback.print_exc()
    if processes.is_started() and not agreed:
        processes.leave(code)  # the others wait in a collective, and notice
    processes.stop()
    return code


def run_once(config: config_dict.ConfigDict, workdir: Path, *, tensorboard: bool, profile: int) -> None:
    """Trains, or goes on training, unless it is done already."""
    from ist_jax import train
    from ist_jax.partition import BrokenDeal
    from ist_jax.runtime import observers, processes

    leads = processes.number() == 0
    logging.getLogger("ist_jax").setLevel(logging.INFO if leads else logging.WARNING)
    with contextlib.ExitStack() as claim:
        with cli.errors(ValueError):  # an OSError is no mistake where results are written
            run = train.begin(config, workdir, claim)
        if run is None:
            return
        opened = observers.open_observers(
            workdir, tensorboard=tensorboard and leads, profile=profile if leads else 0
        )
        log.info("set up %.1f s after the start", time.monotonic() - _BEGAN)
        # warnings go above the bar; a deal of the user's own can turn out wrong in any round
        with logging_redirect_tqdm(), cli.errors(BrokenDeal), opened as looking_on:
            train.run_rounds(run, workdir, observers=looking_on)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
