"""The driver: from a config to a trained global model, its metrics and its summary."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import config_dict

from ist_jax import (
    checkpoint,
    evaluate,
    local_sgd,
    metrics,
    partition,
    results,
)
from ist_jax.experiment import Run, set_up
from ist_jax.layout import iter_leaves

log = logging.getLogger(__name__)


def train(
    config: config_dict.ConfigDict, workdir: str | Path, model: nn.Module | None = None
) -> dict[str, Any]:
    """Trains a model and writes its results.

    Args:
      config: as from `configs/`.
      workdir: folder for config.json, metrics.jsonl, summary.json and the parameters.
      model: any Flax model that follows `ist_jax.models`; None: the one that the config describes.

    Returns:
      What summary.json holds.

    Raises:
      ValueError: a setting, data set or folder that cannot work; the message names the key.
    """
    workdir = Path(workdir)
    if not results.report_if_finished(config, workdir, model):
        results.check_writable(workdir)
        run = set_up(config, model)
        results.open_workdir(config, workdir)
        run_rounds(run, workdir, custom_model=model)
    return json.loads((workdir / "summary.json").read_text())


def run_rounds(run: Run, workdir: Path, custom_model: nn.Module | None = None) -> dict[str, Any]:
    """Trains for all rounds, writing metrics as they come, then the parameters and the summary.

    Args:
      run: from `set_up`; its state is used up.
      workdir: from `open_workdir`.
      custom_model: the model, where it is not the config's; recorded.

    Returns:
      What summary.json holds.
    """
    config, layout, state = run.config, run.layout, run.state
    per_round = config.num_workers * config.local_steps * config.batch_size
    log.info("results: %s", workdir)
    progress = metrics.Progress(run.num_rounds, config.method)
    records: list[dict[str, Any]] = []
    started = time.perf_counter()
    for index in range(run.num_rounds):
        round_started = time.perf_counter()
        state, means, seconds = run_round(run, state, index)
        if not means.healthy.all():
            warn_left_out(index + 1, means.healthy, "steps" if config.method == "data_parallel" else "round")
        record = {
            "round": index + 1,
            "examples": (index + 1) * per_round,
            "train_loss": mean_of_healthy(means.loss, means.healthy),
            "train_accuracy": mean_of_healthy(means.accuracy, means.healthy),
            "lr": float(run.learning_rates[index, -1]),
            **seconds,
            "seconds_evaluate": 0.0,
            "workers_left_out": int((~means.healthy).sum()),
        }
        last = index + 1 == run.num_rounds
        if last or (config.eval_every and (index + 1) % config.eval_every == 0):
            evaluation_started = time.perf_counter()
            score = evaluate_state(run, state)
            record |= {"test_loss": score.loss, "test_accuracy": score.accuracy}
            record["seconds_evaluate"] = time.perf_counter() - evaluation_started
        record["seconds_round"] = time.perf_counter() - round_started
        record["examples_per_second"] = per_round / record["seconds_round"]
        metrics.append_record(workdir / "metrics.jsonl", record)
        progress.update(record)
        records.append(record)
    progress.close()
    seconds_total = time.perf_counter() - started
    checkpoint.save_params(workdir, iter_leaves(layout, state.trees[0]))
    summary = results.summarize(
        config,
        layout,
        records,
        trees=len(state.trees),
        dataset=run.dataset.description,
        device=run.devices[0],
        custom_model=results.describe(custom_model),
        seconds_total=seconds_total,
        seconds_compile=run.seconds_compile,
        params_sha256=metrics.params_sha256(iter_leaves(layout, state.trees[0])),
    )
    metrics.write_json(workdir / "summary.json", summary)
    log.info(results.last_line(summary))
    return summary


def run_round(
    run: Run, state: local_sgd.State, index: int
) -> tuple[local_sgd.State, local_sgd.Metrics, dict[str, float]]:
    """One round: the state after it, the workers' metrics [S], and the seconds of its phases.

    The programs are waited for one after another: that is how the phases are timed, and it keeps CPU
    devices from meeting a collective too far apart.
    """
    config, layout, programs = run.config, run.layout, run.programs
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
    if programs.merge is None:
        state, means = jax.block_until_ready(programs.local(state, data, *feed))
        times[2] = times[3] = time.perf_counter()
    else:
        units: Any = tuple({} for _ in state.trees)
        if programs.gather is not None:
            units = jax.block_until_ready(programs.gather(state, assignment))
            times[1] = time.perf_counter()
        subnets, means = jax.block_until_ready(programs.local(state, units, gates, data, *feed))
        times[2] = time.perf_counter()
        state = jax.block_until_ready(programs.merge(state, subnets, assignment, means.healthy))
        times[3] = time.perf_counter()
    phases = dict(
        zip(("seconds_gather", "seconds_local", "seconds_merge"), np.diff(times).tolist(), strict=True)
    )
    return state, local_sgd.Metrics(*(np.asarray(x).reshape(-1) for x in means)), phases


def evaluate_state(run: Run, state: local_sgd.State) -> evaluate.Score:
    """The global model's score on the test set."""
    sums = [
        np.asarray(jax.block_until_ready(run.programs.evaluate(state.trees[0], chunk)))
        for chunk in run.test_batches
    ]
    return evaluate.total_score(np.concatenate(sums, axis=1))


def mean_of_healthy(values: np.ndarray, healthy: np.ndarray) -> float:
    """Mean over the workers that are not left out; NaN where there is none."""
    return float(values[healthy].mean()) if healthy.any() else float("nan")


def warn_left_out(round_number: int, healthy: np.ndarray, what: str) -> None:
    """Says which workers' rounds (or, data-parallel, single steps) were left out."""
    for worker in np.flatnonzero(~healthy):
        log.warning(
            "round %d: worker %d had a non-finite loss or update; its %s left out",
            round_number, worker, "round is" if what == "round" else "steps that had one are",
        )  # fmt: skip
