"""Trains a network as independent subnets.

python -m ist_jax.main --config=configs/resnet.py [--workdir=DIR] [--tensorboard] [--profile=ROUNDS]
                       [--config.num_workers=8 ...]
"""

import datetime
import logging
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from tqdm.contrib.logging import logging_redirect_tqdm

from ist_jax import cli

USAGE = "python -m ist_jax.main --config=FILE[:MODE] [--workdir=DIR] [--config.KEY=VALUE ...]"


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    values = flags.FlagValues()
    cli.define_config(values, argv, None)
    flags.DEFINE_string(
        "workdir", None, "folder for the results; default: a new one under runs/", flag_values=values
    )
    flags.DEFINE_boolean(
        "tensorboard", False, "write event files to the folder's tensorboard/, too", flag_values=values
    )
    flags.DEFINE_integer(
        "profile", 0, "rounds, after the first, to trace to the folder's profile/", lower_bound=0,
        flag_values=values,
    )  # fmt: skip
    rest = cli.parse(values, argv, USAGE, required=["config"])
    if rest:
        raise cli.fail(f"unexpected argument {rest[0]!r}; usage: {USAGE}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ist_jax").setLevel(logging.INFO)

    from ist_jax import (
        experiment,
        results,
        signals,
        train,
        watch,
    )  # JAX starts here, after the flags are known to be right

    name = Path(config_flags.get_config_filename(values["config"]).split(":")[0]).stem
    default = Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    workdir = Path(values.workdir) if values.workdir else default
    try:
        with signals.handled(deferred=False), cli.errors():
            if results.report_if_finished(values.config, workdir):
                return 0
            results.check_writable(workdir)
            start = results.find_start(workdir)
            run = experiment.set_up(values.config, start=start)
            results.open_workdir(values.config, workdir, start)
        watchers = watch.opened(workdir, tensorboard=values.tensorboard, profile=values.profile)
        with logging_redirect_tqdm(), watchers as watching:  # warnings go above the bar
            train.run_rounds(run, workdir, watchers=watching)
    except signals.Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except (train.Diverged, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
