"""Writes the page about a finished run, or a comparison of several.

python -m ist_jax.report --workdir=DIR [DIR ...] [--out=report.html]
"""

import sys
from pathlib import Path

from absl import flags

from ist_jax import cli
from ist_jax.report.page import write_report

USAGE = "python -m ist_jax.report --workdir=DIR [DIR ...] [--out=FILE]"


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of a finished run; more of them as arguments", values)
    flags.DEFINE_string(
        "out", None, "the page; default: report.html, in the run's folder or, for several, here", values
    )
    more = cli.parse(values, argv, USAGE, required=["workdir"], more=True)
    folders = [Path(values.workdir), *map(Path, more)]
    out = Path(values.out or (Path("report.html") if more else folders[0] / "report.html"))
    with cli.errors():
        write_report(folders, out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
