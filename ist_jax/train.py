"""The driver: from a config to a trained global model, its metrics and its summary."""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from ist_jax import config as configs
from ist_jax import errors
from ist_jax.costs import ledger
from ist_jax.methods import optimizers
from ist_jax.methods.method import State, Told
from ist_jax.methods.optimizers import NOTHING_GIVEN, Given
from ist_jax.models import adapter
from ist_jax.runtime import devices, processes, record, scoring, signals
from ist_jax.runtime.observers import Observer, show_progress
from ist_jax.runtime.run import Run, Stage
from ist_jax.runtime.setup import set_up
from ist_jax.runtime.stopping import diverged, has_stopped
from ist_jax.tasks import Own
from ist_jax.workdir import checkpoint, checkpoint_writer, files, lock, resume
from ist_jax.workdir.files import Json, Record, Summary

log = logging.getLogger(__name__)

Records = Sequence[Record]


def train(
    config: ConfigDict,
    workdir: str | Path,
    model: nn.Module | None = None,
    *,
    task: Own | None = None,
    optimizer: optimizers.Transformation | None = None,
    learning_rate: optimizers.Schedule | None = None,
    progress: Observer | None = None,
) -> dict[str, Json]:
    """Trains a model and writes its results.

    Args:
      config: as from `configs/`.
      workdir: folder for config.json, metrics.jsonl, summary.json and the parameters.
      model: any Flax model that follows `ist_jax.models`; None: the one that the config describes.
      task: an `ist_jax.tasks.Task`, or a function of the training examples that returns one; None: the one
        that the config names.
      optimizer: any optax transformation, whose updates are added to the parameters; it gets them as a flat
        dict, by path. None: the one that the config describes.
      learning_rate: an optax schedule, but of the examples that all workers have seen: a factor of what the
        optimizer returns. None: the config's or, of an optimizer that is given, 1.
      progress: called with every record, in place of the bar.

    Returns:
      What summary.json holds.

    Raises:
      ValueError: a setting, data set or folder that cannot work; the message names the key.
      OSError: results could not be written.
    """
    workdir = Path(workdir)
    with ExitStack() as claim:
        run = begin(config, workdir, claim, model, task, Given(optimizer, learning_rate))
        if run is None:
            return files.read_summary(workdir)
        return run_rounds(run, workdir, own=(model, task), progress=progress)


def begin(
    config: ConfigDict,
    workdir: Path,
    claim: ExitStack,
    model: nn.Module | None = None,
    task: Own | None = None,
    given: Given = NOTHING_GIVEN,
) -> Run | None:
    """Sets a run up in its folder, or what remains of it; None: it is finished already.

    Args:
      config: as from `configs/`.
      workdir: the folder.
      claim: keeps other runs out of the folder until it is closed.
      model: as for `train`.
      task: the same.
      given: the optimizer and learning rate, as for `train`.

    Raises:
      ValueError: a setting, data set or folder that cannot work; the message names the key.
      OSError: the folder could not be written to.
    """
    settings = configs.record(config) | given.recorded()
    if (summary := resume.find_finished(settings, workdir, model, task)) is not None:
        _say_result(workdir, summary)
        return None
    leads = processes.number() == 0
    if leads:
        claim.enter_context(lock.claimed(workdir))
    with errors.reading():
        start = processes.first_alone(lambda: resume.find_start(workdir, model, task), "the checkpoints")
        run = set_up(config, model, start=start, task=task, given=given)
    if leads:
        resume.open_workdir(run.settings, workdir, start)
    processes.meet("the folder")
    return run


class Diverged(RuntimeError):
    """A worker's rounds had to be left out too many times in a row, or those of all workers always."""


def run_rounds(
    run: Run,
    workdir: Path,
    own: tuple[nn.Module | None, Own | None] = (None, None),
    observers: Sequence[Observer] = (),
    progress: Observer | None = None,
) -> dict[str, Json]:
    """Trains for the rounds that remain, writing metrics and checkpoints as they come, then the summary.

    Args:
      run: from `set_up`; its state is used up.
      workdir: from `open_workdir`.
      own: model and task, where they are not the config's; recorded.
      observers: called with every record.
      progress: the same, in place of the bar.

    Returns:
      What summary.json holds.

    Raises:
      Interrupted: SIGINT or SIGTERM; the round was finished and a checkpoint written.
      Diverged: a worker was left out too many times in a row, or all of them in every round; a checkpoint was
        written.
    """
    schedule, state, leads = run.schedule, run.state, processes.number() == 0
    log.info("results: %s", workdir)
    tables = record.make_ledgers(run) if leads else {}
    if leads:
        files.write_json(workdir / "ledger.json", ledger.joined(run.name, tables))
    records = files.read_records(workdir)
    given = {"custom_model": adapter.describe(own[0]), "custom_task": resume.name_of(own[1])}
    metric = run.inputs.task.metric
    writer = checkpoint_writer.Writer(workdir, run.layout, keep=schedule.checkpoint_keep, metric=metric)
    stuck, signum = None, 0
    with ExitStack() as stack:
        request = stack.enter_context(signals.handled(deferred=True))
        stack.enter_context(closing(writer))
        stack.enter_context(closing(run.feed))
        if leads:
            if progress is None:
                bar = show_progress(schedule.rounds, run.name, schedule.first, metric)
                progress = stack.enter_context(bar)
            observers = [progress, *observers]
        for index in range(schedule.first, schedule.rounds):
            if has_stopped(records, schedule.patience, metric):  # in an earlier session
                break
            state, entry = train_and_score(run, state, index, records)
            writer.wait()  # so that a kill never costs more than `checkpoint.every` recorded rounds
            records.append(entry)
            if leads:
                files.append_record(workdir, entry)
            processes.progress(f"round {index + 1}")
            signum = devices.agree(request.signum, run.devices)
            for observe in observers:
                observe(entry)
            stuck = diverged(records, schedule.max_left_out)
            finished = schedule.is_last(index) or has_stopped(records, schedule.patience, metric)
            leaving = finished or bool(signum) or stuck is not None
            if leaving or schedule.saves(index):
                about = record.about_checkpoint(run, entry, given)
                writer.save(state, about, records, run.stage(index).layout)
            if leaving:
                break
    _raise_if_cut_short(run, workdir, records, stuck, signum)
    if "test_loss" not in records[-1]:  # a run that was stopped, and is now wanted no longer than it is
        stage = run.stage(len(records) - 1)
        records[-1] |= score(run, _enter(run, stage, state, len(records)), "test", stage).figures("test")
        records[-1]["seconds_evaluate"] += run.clock.take()["evaluate"]
    if has_stopped(records, schedule.patience, metric):
        change = "risen" if metric.higher_is_better else "fallen"
        told = (metric.name, change, schedule.patience)
        log.info("the validation %s has not %s for %d evaluations: stopped", *told)
    if leads:
        if run.clock.meters:
            phases = {stage.name: [*stage.phases] for stage in run.stages}
            here = run.layout.num_workers // processes.count()
            for name, meter in run.clock.meters.items():
                tables[name] = ledger.with_wire(tables[name], meter, phases=phases[name], workers=here)
            files.write_json(workdir / "ledger.json", ledger.joined(run.name, tables))
        files.write_records(workdir, records)
        digest = files.params_sha256(checkpoint.open_round(workdir, len(records)).params())
        files.write_json(workdir / "summary.json", record.summarize(run, records, given, digest))
        record.write_report(workdir)
    processes.meet("the summary")
    summary = files.read_summary(workdir)
    _say_result(workdir, summary)
    return summary


def _say_result(workdir: Path, summary: Summary) -> None:
    """The end of a run in words: what is to be doubted, the path of its report, and the line that matters."""
    if processes.number():
        return
    for doubt in summary.get("doubts", ()):  # earlier versions had none
        log.warning("warning: %s: %s", workdir, doubt)
    log.info("report: %s", workdir / "report.html")
    log.info(record.last_line(summary))


def train_round(run: Run, state: State, index: int) -> tuple[State, Record]:
    """One round: the state after it, and its record.

    The programs are waited for one after another: that is how the phases are timed, and CPU collectives must
    not queue.
    """
    stage = run.stage(index)
    turn, value = run.turn(stage, index), cast(PyTree, None)
    state = _enter(run, stage, state, index)
    for name, program in stage.programs.items():
        with run.clock.lap(name, stage.name):
            value = jax.block_until_ready(program(state, value, turn))
    state, told = value
    heard = Told(*(x.reshape(-1) for x in devices.to_host(tuple(told))))
    return state, record.round_record(run, stage, index, heard, turn.present.reshape(-1))


def _enter(run: Run, stage: Stage, state: State, index: int) -> State:
    """The state that a round of a stage takes: in its first, made of that of the stage before."""
    if stage.enter is None or index != stage.first:
        return state
    with run.clock.lap("enter"):
        return jax.block_until_ready(stage.enter.program(state))


def train_and_score(run: Run, state: State, index: int, before: Records = ()) -> tuple[State, Record]:
    """One round and, when it is due, the evaluation: the state after it, and its record with all times.

    Evaluated is the validation split, where there is one, and the test set then at the end alone; whether
    that is now also depends on the records `before`.
    """
    schedule, started = run.schedule, time.perf_counter()
    state, entry = train_round(run, state, index)
    if schedule.evaluates(index):
        split = "validation" if "validation" in run.splits else "test"
        entry |= score(run, state, split, run.stage(index)).figures(split)
    ended = schedule.is_last(index) or has_stopped(
        [*before, entry], schedule.patience, run.inputs.task.metric
    )
    if ended and "test_loss" not in entry:
        entry |= score(run, state, "test", run.stage(index)).figures("test")
    entry |= {"seconds_evaluate": 0.0} | {f"seconds_{name}": s for name, s in run.clock.take().items()}
    entry["seconds_round"] = time.perf_counter() - started
    entry["examples_per_second"] = schedule.examples_in(index) / entry["seconds_round"]
    return state, entry


def score(run: Run, state: State, split: str = "test", stage: Stage | None = None) -> scoring.Score:
    """The score of a state on a split: 'test' or, where there is one, 'validation'.

    Args:
      run: of which it is a state.
      state: to score.
      split: name of the split.
      stage: that the state is of; None: the last.
    """
    stage = stage or run.stages[-1]
    with run.clock.lap("evaluate", stage.name if split == "test" else ""):
        chunks, program, _ = stage.splits[split]
        sums = [devices.to_host(jax.block_until_ready(program(state, chunk))) for chunk in chunks]
    return scoring.total_score(run.inputs.task, np.concatenate(sums, axis=1))


def _is_finite(figure: float | None) -> bool:
    """Of a record; one that is not finite is null in metrics.jsonl."""
    return figure is not None and math.isfinite(figure)


def _raise_if_cut_short(run: Run, workdir: Path, records: Records, stuck: int | None, signum: int) -> None:
    """Raises what ended the run before its last round, if anything did, or that nothing came of it."""
    schedule, done = run.schedule, len(records)
    safe = max(checkpoint.rounds(workdir), default=0)
    if safe < done:
        remedy = f"the same command goes on from round {safe}"
        raise OSError(f"the checkpoint of round {done} could not be written to {workdir}; {remedy}")
    if stuck is not None:
        raise Diverged(
            f"round {done}: worker {stuck} has been left out {schedule.max_left_out} times in a row "
            f"(config.max_rounds_left_out); stopped, results so far are in {workdir}"
        )
    if done < schedule.rounds and not has_stopped(records, schedule.patience, run.inputs.task.metric):
        text = f"stopped after round {done} of {schedule.rounds}; the same command goes on from there"
        raise signals.Interrupted(signum, text, agreed=True)
    if all(r["workers_left_out"] and not _is_finite(r["train_loss"]) for r in records):
        raise Diverged(
            f"all workers were left out of all {done} rounds, for losses or updates that are not finite: "
            "nothing was learned; look at the data and the loss, or lower config.optimizer.learning_rate; "
            f"their records are in {workdir}"
        )
