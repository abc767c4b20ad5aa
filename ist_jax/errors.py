"""Errors in the words of people: one line each, and another for each of its notes."""

import contextlib
import difflib
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

_NAMED = 5  # of a folder's contents


def fail(message: str, notes: Iterable[str] = ()) -> SystemExit:
    """The exit of a user's mistake: one line on stderr, an indented one for each note, code 2."""
    lines = [" ".join(text.split()) for text in (message, *notes)]
    print("error: " + "\n  ".join(lines), file=sys.stderr)
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


def contents(folder: Path, known: Collection[str] = ()) -> str:
    """The first names in a folder, such as 'a, b and 3 more', the known and the hidden ones left out.

    '' where there are no others, or no such folder.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = sorted(name for name in names if name not in known and not name.startswith("."))
    more = f" and {len(others) - _NAMED:,} more" if len(others) > _NAMED else ""
    return ", ".join(others[:_NAMED]) + more


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A hint such as "did you mean 'seed'? "; '' where no word is close."""
    close = difflib.get_close_matches(word, words, 1)
    return f"did you mean {close[0]!r}? " if close else ""
