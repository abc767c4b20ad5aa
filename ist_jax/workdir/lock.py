"""The folder of a run: that it can be written, and that one run alone writes to it."""

import contextlib
import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it; leaves nothing behind where nothing was written.

    Raises:
      ValueError: the folder cannot be written or made, or another run is writing to it.
      OSError: the disk is full.
    """
    missing = check_writable(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    handle = os.open(workdir, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"another run is writing to {workdir}; choose another --workdir") from None
    except OSError as error:  # not every network file system can
        log.warning("%s cannot be locked (%s); take care that no other run uses it", workdir, error.strerror)
    try:
        yield
    finally:
        os.close(handle)
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def check_writable(workdir: Path) -> list[Path]:
    """The folders that would be made, the innermost first; leaves nothing behind.

    Raises:
      ValueError: the folder cannot be written or made.
      OSError: the disk is full, which is no mistake in a command.
    """
    missing: list[Path] = []
    try:
        if workdir.is_file():
            raise ValueError(f"--workdir={workdir} is a file; a folder is needed")
        missing += [path for path in (workdir, *workdir.parents) if not path.exists()]
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=workdir).close()
    except OSError as error:
        kind = OSError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ValueError
        raise kind(f"cannot write to --workdir={workdir}: {error.strerror}") from None
    finally:
        for path in missing:
            if path.is_dir():
                path.rmdir()
    return missing
