"""Whether a run is finished, where one goes on, and the folder made ready for it."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn

from ist_jax import __version__, config, errors
from ist_jax.key import Settings
from ist_jax.models import adapter
from ist_jax.tasks import Own, Task
from ist_jax.workdir import checkpoint, files
from ist_jax.workdir.files import Json, Summary

log = logging.getLogger(__name__)

_BEFORE_THE_CONFIG = ("metrics.jsonl", "metrics.part", "config.part")  # what a killed run may leave


def find_finished(
    settings: Settings, workdir: Path, model: nn.Module | None = None, task: Own | None = None
) -> Summary | None:
    """The summary of the finished run of this config, length and model in the folder; None: there is none.

    Args:
      settings: of the run that is asked for, from `config.record`.
      workdir: the folder.
      model: the model, where it is not the config's.
      task: the same.

    Raises:
      ValueError: it holds a run of another config, model or task.
    """
    if not files.is_file(workdir / "config.json"):
        return None
    recorded = config.complete(files.read_config(workdir))
    before, now = (files.flatten(x) for x in (recorded, json.loads(json.dumps(settings))))
    differing = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if refused := [_difference(k, before, now) for k in differing if not config.may_change(k)]:
        error = ValueError(f"{workdir} holds a run with other settings; choose another --workdir")
        for line in refused:
            error.add_note(line)
        raise error
    if not files.is_file(workdir / "summary.json"):
        return None
    summary = files.read_summary(workdir)
    check_own(workdir, summary, model, task)
    if any(map(config.extends, differing)):
        return None
    log.info("%s is finished already; nothing to do", workdir)
    return summary


def _difference(key: str, before: Settings, now: Settings) -> str:
    if key.startswith("files."):  # what a user's own file held
        named = key.removeprefix("files.")
        return f"config.{named}={now.get(named)} is not the file that it was begun with"
    if key.startswith("given."):  # from Python
        argument = key.removeprefix("given.")
        return f"{argument}= is {before.get(key, 'not given')} there and {now.get(key, 'not given')} here"
    return f"config.{key} is {before.get(key)!r} there and {now.get(key)!r} here"


def find_start(
    workdir: Path, model: nn.Module | None = None, task: Own | None = None
) -> checkpoint.Saved | None:
    """The checkpoint to go on from; None where there is no run yet, or one that did not get that far.

    Args:
      workdir: the folder.
      model: the model, where it is not the config's.

    Raises:
      ValueError: checkpoints are damaged or missing, or of another model; never a silent start from scratch.
    """
    records = files.read_records(workdir)
    if not files.is_file(workdir / "config.json"):
        if records or checkpoint.rounds(workdir):
            raise ValueError(
                f"{workdir} holds a run without its config.json; restore it from a copy, or choose another "
                "--workdir"
            )
        if foreign := errors.contents(workdir, _BEFORE_THE_CONFIG):
            raise ValueError(f"{workdir} holds {foreign}, but no run; choose a new or empty --workdir")
        return None
    saved = checkpoint.newest_intact(workdir, len(records))
    every = files.read_config(workdir)["checkpoint"]["every"]
    if saved is None:
        if (every and len(records) > every) or files.is_file(workdir / "summary.json"):
            raise ValueError(
                f"{workdir} holds a run of {len(records)} rounds without a checkpoint; restore its "
                f"{checkpoint.FOLDER}/ from a copy, or choose another --workdir to start over"
            )
        log.info("%s holds a run that did not get to its first checkpoint; it starts over", workdir)
        return None
    check_own(workdir, saved.about, model, task)
    if (version := saved.about.get("version", "an earlier version")) != __version__:
        since = f"this is {__version__}; what may differ since stands in CHANGELOG.md"
        log.warning("%s was begun by ist_jax %s, %s", workdir, version, since)
    lost = len(records) - saved.round
    again = f"; {lost} later ones are trained again" if lost else ""
    log.info("resuming %s after round %d%s", workdir, saved.round, again)
    return saved


def open_workdir(settings: Settings, workdir: Path, start: checkpoint.Saved | None) -> None:
    """Makes the folder ready for the rounds after `start`: config.json, metrics up to it, no summary.

    Raises:
      OSError: they cannot be written, on a full disk say.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        records = files.read_records(workdir)[: start.round] if start else []
        files.write_records(workdir, records)
        (workdir / "summary.json").unlink(missing_ok=True)
        files.write_json(workdir / "config.json", settings)
    except OSError as error:
        raise OSError(f"no result can be written to {workdir}: {error.strerror}") from error


def check_own(workdir: Path, recorded: Mapping[str, Json], model: nn.Module | None, task: Own | None) -> None:
    """Raises ValueError when a run was of another model or task than the given ones.

    Args:
      workdir: of the run.
      recorded: its summary, or what a checkpoint says of it.
      model: the model, where it is not the config's.
      task: the same.
    """
    if recorded["custom_model"] != adapter.describe(model):
        raise ValueError(f"{workdir} holds a run of another model; choose another --workdir")
    before, now = recorded.get("custom_task"), name_of(task)
    if before != now:
        was, here = (x or "the config's" for x in (before, now))
        raise ValueError(f"{workdir} holds a run of the task {was}, not of {here}; choose another --workdir")


def name_of(task: Own | None) -> str | None:
    """A task of the user's own by its name; None for the config's."""
    return None if task is None else task.name if isinstance(task, Task) else task.__name__
