"""Compiled programs, kept on disk for the next run of the same experiment.

The cache is JAX's own, in the user's cache folder. JAX trusts what it reads there, and never replaces an
entry; so beside each stands its hash, and one that does not fit, or has none, goes before JAX looks.
"""

import contextlib
import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import filelock
import jax

from ist_jax import errors

log = logging.getLogger(__name__)

_SETTINGS = {
    "jax_compilation_cache_max_size": 512 * 2**20,  # bytes; what was not used for longest goes first
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}
_ENTRY, _USED, _HASH = "-cache", "-atime", "-sha256"  # ends of names; the first two are JAX's
_PATIENCE = 10  # seconds for another process that has the folder's lock; JAX's own


@contextlib.contextmanager
def kept(wanted: bool) -> Iterator[None]:
    """Programs that are compiled inside are kept, and those of earlier runs found.

    To be entered before JAX compiles anything. Where the user has told JAX of another folder, or to keep
    nothing, that is left as it is; where there can be no folder, it is said, and nothing is kept.

    Args:
      wanted: False: nothing is done.
    """
    has_own, enabled = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    folder = _open_folder() if wanted and enabled and has_own is None else None
    if folder is not None:
        for name, value in _SETTINGS.items():
            if name.upper() not in os.environ:
                jax.config.update(name, value)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        yield
    finally:
        if folder is not None:
            with _said(), _locked(folder):
                _note_hashes(folder)


def _open_folder() -> Path | None:
    """The folder, rid of what is damaged; None: there can be none."""
    with _said():
        folder = default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _drop_damaged(folder)
        return folder
    return None


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """Says what keeps programs from being kept: no home, or none that can be written to, or a full disk."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        log.warning("compiled programs are not kept for the next run: %s", errors.one_line(error))


def default_folder() -> Path:
    """In the user's cache folder, one per kind of processor and jaxlib: none can use another's programs."""
    above = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return above / "ist_jax" / f"{platform.machine()}-{_processor()}-jaxlib-{metadata.version('jaxlib')}"


def _processor() -> str:
    """Marks a processor's model and its instructions, some of which a virtual machine may hide."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    except OSError:
        told = {platform.processor()}
    return hashlib.sha256("\n".join(sorted(told)).encode()).hexdigest()[:12]


def _locked(folder: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(folder / ".lockfile", timeout=_PATIENCE)  # by JAX's name for it


def _drop_damaged(folder: Path) -> None:
    for path in folder.glob(f"*{_ENTRY}"):
        noted, used = _beside(path, _HASH), _beside(path, _USED)
        if not (noted.is_file() and used.is_file() and noted.read_text() == _hash(path)):
            for part in (path, noted, used):
                part.unlink(missing_ok=True)
    for noted in folder.glob(f"*{_HASH}"):  # JAX drops entries by itself
        if not _beside(noted, _ENTRY).is_file():
            noted.unlink()


def _note_hashes(folder: Path) -> None:
    for path in folder.glob(f"*{_ENTRY}"):
        if not _beside(path, _HASH).is_file():
            _beside(path, _HASH).write_text(_hash(path))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name.rpartition("-")[0] + end)
