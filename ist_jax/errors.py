"""Errors in the words of people: one line each."""

import contextlib
import sys
from collections.abc import Iterator


def fail(message: str) -> SystemExit:
    """The exit of a user's mistake: one line on stderr, code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return SystemExit(2)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """For what reads and writes nothing: a file that cannot be read is the user's mistake, a ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(str(error)) from error


def one_line(error: BaseException) -> str:
    """The first line of what an error says; its type, where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
