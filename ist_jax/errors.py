"""Errors in the words of people: one line each."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


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


def last_line(error: BaseException) -> str:
    """The last line of what an error in the user's own file says; its type, where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A hint such as "did you mean 'seed'? "; '' where no word is close."""
    close = difflib.get_close_matches(word, words, 1)
    return f"did you mean {close[0]!r}? " if close else ""
