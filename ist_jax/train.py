"""The driver: from a config to a trained global model, its metrics and its summary."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import config_dict

from ist_jax import errors, partition
from ist_jax.costs import formula
from ist_jax.costs import ledger as audit
from ist_jax.costs import sockets as wire
from ist_jax.methods import local_sgd
from ist_jax.runtime import devices, signals
from ist_jax.runtime import processes as distributed
from ist_jax.runtime import scoring as evaluation
from ist_jax.runtime.observers import Observer, show_progress
from ist_jax.runtime.programs import to_save
from ist_jax.runtime.record import (
    Provenance,
    last_line,
    record_workers,
    round_bytes,
    summarize,
    warn_left_out,
    write_report,
)
from ist_jax.runtime.setup import Run, set_up
from ist_jax.runtime.stopping import diverged, has_stopped
from ist_jax.workdir import checkpoint, checkpoint_writer, files, lock, resume

log = logging.getLogger(__name__)


def train(
    config: config_dict.ConfigDict,
    workdir: str | Path,
    model: nn.Module | None = None,
    *,
    started: Callable[[Run], None] | None = None,
) -> dict[str, Any]:
    """Trains a model and writes its results.

    Args:
      config: as from `configs/`.
      workdir: folder for config.json, metrics.jsonl, summary.json and the parameters.
      model: any Flax model that follows `ist_jax.models`; None: the one that the config describes.
      started: called before the first round of a run that does not go on from a checkpoint.

    Returns:
      What summary.json holds.

    Raises:
      ValueError: a setting, data set or folder that cannot work; the message names the key.
      OSError: results could not be written.
    """
    workdir = Path(workdir)
    if (summary := resume.find_finished(config.to_dict(), workdir, model)) is not None:
        log.info(last_line(summary))
        return summary
    with lock.claimed(workdir):
        with errors.reading():
            start = resume.find_start(workdir, model)
            run = set_up(config, model, start=start)
        resume.open_workdir(config.to_dict(), workdir, start)
        if started is not None and start is None:
            started(run)
        return run_rounds(run, workdir, custom_model=model)


class Diverged(RuntimeError):
    """A worker's rounds had to be left out too many times in a row."""


def run_rounds(
    run: Run, workdir: Path, custom_model: nn.Module | None = None, observers: Sequence[Observer] = ()
) -> dict[str, Any]:
    """Trains for the rounds that remain, writing metrics and checkpoints as they come, then the summary.

    Args:
      run: from `set_up`; its state is used up.
      workdir: from `open_workdir`.
      custom_model: the model, where it is not the config's; recorded.
      observers: called with every record.

    Returns:
      What summary.json holds.

    Raises:
      Interrupted: SIGINT or SIGTERM; the round was finished and a checkpoint written.
      Diverged: a worker was left out too many times in a row; a checkpoint was written.
    """
    config, state, leads = run.config, run.state, distributed.number() == 0
    log.info("results: %s", workdir)
    table, meter = audit.ledger_of(run) if leads else {}, wire.open_meter(distributed.count())
    if leads:
        files.write_json(workdir / "ledger.json", table)
    records = files.read_records(workdir)
    progress = show_progress(run.num_rounds, config.method, run.first_round) if leads else nullcontext()
    writer = checkpoint_writer.Writer(workdir, run.layout, keep=config.checkpoint.keep)
    stuck, signum = None, 0
    with signals.handled(deferred=True) as request, closing(writer), progress as bar, closing(run.feed):
        for index in range(run.first_round, run.num_rounds):
            if has_stopped(records, config.patience):  # in an earlier session
                break
            state, record = train_round(run, state, index, records, meter)
            writer.wait()  # so that a kill never costs more than `checkpoint.every` recorded rounds
            records.append(record)
            if leads:
                files.append_record(workdir, record)
            if bar is not None:
                bar(record)
            distributed.progress(f"round {index + 1}")
            signum = devices.agree(request.signum, run.devices)
            for observe in observers:
                observe(record)
            stuck = diverged(records, config.max_rounds_left_out)
            finished = index + 1 == run.num_rounds or has_stopped(records, config.patience)
            leaving = finished or bool(signum) or stuck is not None
            if leaving or (config.checkpoint.every and (index + 1) % config.checkpoint.every == 0):
                about = {
                    "round": index + 1,
                    "examples": record["examples"],
                    "test_accuracy": record.get("test_accuracy"),
                    "validation_accuracy": record.get("validation_accuracy"),
                    "custom_model": resume.describe(custom_model),
                    "config": config.to_dict(),
                }
                writer.save(to_save(state), about, records)
            if leaving:
                break
    safe = max(checkpoint.rounds(workdir), default=0)
    if safe < len(records):
        raise OSError(
            f"the checkpoint of round {len(records)} could not be written to {workdir}; the same command "
            f"goes on from round {safe}"
        )
    if stuck is not None:
        raise Diverged(
            f"round {len(records)}: worker {stuck} has been left out {config.max_rounds_left_out} times in a "
            f"row (config.max_rounds_left_out); stopped, results so far are in {workdir}"
        )
    stopped = has_stopped(records, config.patience)
    if len(records) < run.num_rounds and not stopped:
        raise signals.Interrupted(
            signum,
            f"stopped after round {len(records)} of {run.num_rounds}; the same command goes on from there",
            agreed=True,
        )
    if "test_accuracy" not in records[-1]:  # a run that was stopped, and is now wanted no longer than it is
        evaluate_into(records[-1], run, state, "test")
    if stopped:
        log.info("the validation accuracy has not risen for %d evaluations: stopped", config.patience)
    if leads:
        if meter is not None:
            table = audit.with_wire(table, meter, workers=config.num_workers // distributed.count())
            files.write_json(workdir / "ledger.json", table)
        files.write_records(workdir, records)
        files.write_json(workdir / "summary.json", _summary(run, records, workdir, custom_model))
        log.info("report: %s", write_report(workdir))
    distributed.meet("the summary")
    summary = files.read_summary(workdir)
    log.info(last_line(summary))
    return summary


def _summary(
    run: Run, records: list[dict[str, Any]], workdir: Path, custom_model: nn.Module | None
) -> dict[str, Any]:
    config, layout = run.config, run.layout
    times = 1 if config.method == "data_parallel" else len(run.state.trees)
    provenance = Provenance(
        method=config.method,
        seed=config.seed,
        layout=layout,
        data=run.dataset.description,
        custom_model=resume.describe(custom_model),
        device=run.devices[0],
        seconds_compile=run.seconds_compile,
        bytes_local_sgd=times * formula.full_model_bytes(layout) / config.num_workers,
    )
    params = checkpoint.open_round(workdir, len(records)).params()
    return summarize(provenance, records, files.params_sha256(params))


def train_round(
    run: Run,
    state: local_sgd.State,
    index: int,
    before: Sequence[dict[str, Any]],
    meter: wire.Meter | None = None,
) -> tuple[local_sgd.State, dict[str, Any]]:
    """One round and, when it is due, the evaluation: the state after it, and its record.

    Evaluated is the validation split, where there is one, and the test set then at the end alone; whether
    that is now also depends on the records `before`.
    """
    config, (layout, _) = run.config, run.phase(index)
    per_round = config.num_workers * config.local_steps * config.batch_size
    started = time.perf_counter()
    present = partition.sample_present(config.seed, index, config.num_workers, config.participation)
    state, means, seconds = run_round(run, state, index, present, meter)
    told = {"train_loss": means.loss, "train_accuracy": means.accuracy}
    record = {
        "round": index + 1,
        "examples": run.examples_before + (index + 1 - run.first_round) * per_round,
        **record_workers(means.healthy, present, told),
        "lr": float(run.learning_rates[index, -1]),
        **round_bytes(config, layout, trees=len(state.trees)),
        **seconds,
        "seconds_evaluate": 0.0,
        "partition": partition.fingerprint(tuple(layout.groups.values())),
    }
    warn_left_out(index + 1, record["left_out"], "steps" if config.method == "data_parallel" else "round")
    last = index + 1 == run.num_rounds
    if last or (config.eval_every and (index + 1) % config.eval_every == 0):
        split = "validation" if run.validation_batches is not None else "test"
        evaluate_into(record, run, state, split, meter)
    if "test_accuracy" not in record and (last or has_stopped([*before, record], config.patience)):
        evaluate_into(record, run, state, "test", meter)
    record["seconds_round"] = time.perf_counter() - started
    record["examples_per_second"] = per_round / record["seconds_round"]
    return state, record


def evaluate_into(
    record: dict[str, Any], run: Run, state: local_sgd.State, split: str, meter: wire.Meter | None = None
) -> None:
    """Adds the figures of an evaluation to a record; a `meter` counts what one on the test set received."""
    started = time.perf_counter()
    with wire.metered(meter if split == "test" else None, "evaluation"):
        record |= evaluate_state(run, state, split).figures(split)
    record["seconds_evaluate"] += time.perf_counter() - started


def run_round(
    run: Run,
    state: local_sgd.State,
    index: int,
    present: np.ndarray | None = None,
    meter: wire.Meter | None = None,
) -> tuple[local_sgd.State, local_sgd.Metrics, dict[str, float]]:
    """One round: the state after it, the workers' metrics [S], and the seconds of its phases.

    Workers that are not `present` (bool [S]; None: all are) train, but nobody hears of it. What arrives from
    other processes is counted by the `meter`.

    The programs are waited for one after another: that is how the phases are timed, and it keeps CPU
    devices from meeting a collective too far apart.
    """
    config, (layout, programs) = run.config, run.phase(index)
    meter = meter if programs is run.programs else None  # the ledger is of the rounds after a warm-up
    grid = (layout.num_devices, layout.workers_per_device)
    data, indices = run.feed(index)
    feed = (indices, run.learning_rates[index], np.int32(index))
    assignment = partition.sample(partition.round_rng(config.seed, index), layout.groups)
    gates = {
        name: np.asarray(a.gates).reshape(*grid, -1)
        for name, a in assignment.items()
        if not layout.groups[name].even
    }
    times = [time.perf_counter()] * 4
    here = np.ones(grid, bool) if present is None else present.reshape(grid)
    if programs.merge is None:
        with wire.metered(meter, "round"):
            state, means = jax.block_until_ready(programs.local(state, here, data, *feed))
        means = devices.fetch(tuple(means))
        times[2] = times[3] = time.perf_counter()
    else:
        units: Any = tuple({} for _ in state.trees)
        if programs.gather is not None:
            with wire.metered(meter, "round", "gather"):
                units = jax.block_until_ready(programs.gather(state, assignment))
            times[1] = time.perf_counter()
        subnets, means = jax.block_until_ready(programs.local(state, units, gates, data, *feed))
        means = devices.fetch(tuple(means))
        times[2] = time.perf_counter()
        with wire.metered(meter, "round"):
            state = jax.block_until_ready(programs.merge(state, subnets, assignment, means[2] & here))
        times[3] = time.perf_counter()
    phases = dict(
        zip(("seconds_gather", "seconds_local", "seconds_merge"), np.diff(times).tolist(), strict=True)
    )
    return state, local_sgd.Metrics(*(x.reshape(-1) for x in means)), phases


def evaluate_state(run: Run, state: local_sgd.State, split: str = "test") -> evaluation.Score:
    """The global model's score on the test set or, where there is one, the 'validation' split."""
    program: Any = run.programs.evaluate if split == "test" else run.programs.validate
    chunks: Any = run.test_batches if split == "test" else run.validation_batches
    sums = [devices.fetch(jax.block_until_ready(program(state.trees[0], chunk))) for chunk in chunks]
    return evaluation.total_score(run.task, np.concatenate(sums, axis=1))
