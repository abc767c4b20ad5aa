"""Command lines: a mistake of the user is one line and exit code 2, never a traceback."""

import contextlib
import sys
from collections.abc import Iterator, Sequence

from absl import flags

# What absl and config_flags raise for unknown flags, keys, files and modes, and wrong types.
_MISTAKES = (
    flags.Error,
    OSError,
    ImportError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    SyntaxError,
)


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
    try:
        rest = values(argv)[1:]
    except _MISTAKES as error:
        raise fail(f"{error or type(error).__name__} (see --help)") from error
    for name in required:
        if values[name].value is None:
            raise fail(f"--{name} is missing; usage: {usage}")
    return rest
