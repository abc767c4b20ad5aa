"""Command lines: a mistake of the user is one line and exit code 2, never a traceback."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

# What absl and config_flags raise for unknown flags, keys, files and modes, and wrong types.
_MISTAKES = (flags.Error, OSError, ImportError, TypeError, ValueError, SyntaxError)


def fail(message: str) -> SystemExit:
    """The exit of a user's mistake: one line on stderr, code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return SystemExit(2)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Turns the ValueError of a setting, path or file that cannot work into one line."""
    try:
        yield
    except ValueError as error:
        raise fail(str(error)) from error


def parse(values: flags.FlagValues, argv: Sequence[str], usage: str, *, required: Sequence[str]) -> list[str]:
    """Parses flags and returns the other arguments.

    Args:
      values: with the flags defined.
      argv: the command line, the program's name first.
      usage: a line for --help and for mistakes.
      required: names of flags that must be given.

    Raises:
      SystemExit: 0 after --help, 2 after a mistake.
    """
    if {"--help", "-h", "-help"} & set(argv[1:]):
        print(f"usage: {usage}\n{values.get_help()}")
        raise SystemExit(0)
    for name in (arg.split("=", 1)[1].split(":")[0] for arg in argv if arg.startswith("--config=")):
        if not Path(name).is_file():
            raise fail(f"--config={name}: there is no such file")
    try:
        rest = values(argv)[1:]
    except (LookupError, AttributeError) as error:
        raise fail(f"unknown config key {error.args[0]}") from error
    except _MISTAKES as error:  # config_flags puts a traceback into its message; its last line says it
        raise fail(f"{str(error).strip().splitlines()[-1]} (see --help)") from error
    for name in required:
        if values[name].value is None:
            raise fail(f"--{name} is missing; usage: {usage}")
    return rest
