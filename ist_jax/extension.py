"""Things of the user's own, named like those of a table: FILE.py:NAME."""

import functools
import hashlib
import importlib.util
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from ist_jax.errors import did_you_mean, last_line
from ist_jax.key import FILE, Options, Value

T = TypeVar("T")


def load(reference: str, table: Mapping[str, T]) -> T:
    """What a table has under a name, or what a file of the user's own has.

    A file is executed once, as long as it does not change.

    Args:
      reference: a name in the table, or FILE.py:NAME.
      table: of such things.

    Raises:
      ValueError: there is no such name or file, or the file raises something.
    """
    if reference in table:
        return table[reference]
    match = FILE.fullmatch(reference)
    if match is None:
        raise ValueError(
            f"{reference!r} is not there; {did_you_mean(reference, table)}give one of "
            f"{', '.join(map(repr, table))}, or FILE.py:NAME"
        )
    path, name = match.groups()
    module = _execute(Path(path), digest(reference))
    if name not in vars(module):
        own = [n for n, x in vars(module).items() if n[0] != "_" and not isinstance(x, types.ModuleType)]
        raise ValueError(
            f"{path} has no name {name!r}; {did_you_mean(name, own)}names there: {', '.join(own) or 'none'}"
        )
    return getattr(module, name)


def digest(reference: Value) -> str | None:
    """The first 16 hexadecimal digits of the SHA-256 of a FILE.py:NAME's file; None for anything else.

    Of pairs, those of all that are in them.

    Raises:
      ValueError: there is no such file.
    """
    if isinstance(reference, tuple | list):
        inside = [digest(x) for pair in reference if isinstance(pair, tuple | list) for x in pair]
        return " ".join(filter(None, inside)) or None
    if not isinstance(reference, str) or (match := FILE.fullmatch(reference)) is None:
        return None
    try:
        return hashlib.sha256(Path(match[1]).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise ValueError(f"cannot read {match[1]} of {reference!r}: {error.strerror}") from None


def identity(reference: str) -> str:
    """What tells a thing from others of its name: the name, and of FILE.py:NAME the digest of the file."""
    match = FILE.fullmatch(reference)
    return f"{match[2]} {digest(reference)}" if match else reference


def digests(settings: Options) -> dict[str, str]:
    """The digests of those settings that are FILE.py:NAME, by their keys.

    Raises:
      ValueError: there is no such file.
    """
    return {key: found for key, x in settings.items() if (found := digest(x))}


def fingerprint(thing: object) -> str:
    """What a thing given from Python is called, and 16 hexadecimal digits that tell it from another one.

    Functions count by name, code, and what they refer to; so do tuples and the like by their elements.
    """
    name = getattr(thing, "__name__", type(thing).__name__)
    return f"{name} {hashlib.sha256(_text(thing).encode()).hexdigest()[:16]}"


def _text(x: object, inside: tuple[object, ...] = ()) -> str:
    """The same in every process, unlike `repr`, which has addresses in it."""
    if isinstance(x, types.FunctionType) and x not in inside:  # it may refer to itself
        closed = [cell.cell_contents for cell in x.__closure__ or ()]
        parts = _text((x.__code__, x.__defaults__, x.__kwdefaults__, closed), (*inside, x))
        return f"{x.__module__}.{x.__qualname__} {parts}"
    if isinstance(x, functools.partial):
        return _text(("partial", x.func, x.args, x.keywords), inside)
    if isinstance(x, types.MethodType):
        return _text(("method", x.__func__, x.__self__), inside)
    if isinstance(x, types.CodeType):
        return _text((x.co_code.hex(), x.co_names, x.co_consts), inside)
    if isinstance(x, Mapping):
        return _text([*x.items()], inside)
    if isinstance(x, list | tuple):
        return f"[{', '.join(_text(part, inside) for part in x)}]"
    if hasattr(x, "__array__"):
        array = np.asarray(x)
        return f"{array.dtype}{array.shape} {array.tobytes().hex()}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(x))


def _execute(path: Path, version: str | None) -> types.ModuleType:
    """The module of a file, under a name that no other version of it has."""
    whole = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"ist_jax_extension_{path.stem}_{whole}_{version}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # pickle and dataclasses look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file is the user's own code
        del sys.modules[name]
        raise ValueError(f"{path} fails: {last_line(error)}") from error
    return module
