"""What a run leaves behind in figures and words: a record per round, the summary, the page."""

import datetime
import logging
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

from ist_jax import __version__
from ist_jax.costs import formula, ledger
from ist_jax.costs.traffic import megabytes
from ist_jax.methods.method import Told
from ist_jax.runtime import inputs
from ist_jax.runtime.compile_options import changing_bits
from ist_jax.runtime.run import Run, Stage
from ist_jax.tasks.task import metric_of
from ist_jax.workdir.files import Json, Record, Summary

log = logging.getLogger(__name__)

Given = dict[str, str | None]


def round_record(run: Run, stage: Stage, index: int, told: Told, present: jax.Array | np.ndarray) -> Record:
    """The record of a round, but for its times; says which workers were left out.

    Args:
      run: of which it is a round.
      stage: that it was run by.
      index: its number, counted from 0.
      told: by the workers, [S].
      present: bool [S], who took part.
    """
    schedule, workers = run.schedule, stage.layout.num_workers
    moved, here = [stage.apart], [stage.traffic]
    if stage.enter is not None and index == stage.first:
        moved, here = [*moved, stage.enter.apart], [*here, stage.enter.traffic]
    merged, sick = told.healthy & present, np.flatnonzero(~told.healthy & present)
    for worker in sick:
        log.warning(f"round {index + 1}: worker {worker} had a non-finite loss or update, which is left out")
    return {
        "round": index + 1,
        "stage": stage.name,
        "local_steps": stage.local_steps,
        "examples": schedule.examples_after(index),
        "train_loss": _mean_where(merged, told.loss),
        **{f"train_{name}": _mean_where(merged, told.score) for name in [*run.inputs.task.scores][:1]},
        "lr": float(schedule.rates(index)[-1]),
        "bytes_per_worker": sum(stage.apart.paper.values()) / workers,
        "bytes_sent": sum(sum(traffic.sent.values()) for traffic in moved),
        "messages_sent": sum(traffic.messages for traffic in moved),
        "wire_bytes_per_device": sum(sum(traffic.sent.values()) for traffic in here),
        "workers_left_out": len(sick),
        "left_out": sick.tolist(),
        "workers_absent": int((~present).sum()),
        "partition": stage.deal,
    }


def _mean_where(chosen: jax.Array | np.ndarray, values: jax.Array | np.ndarray) -> float:
    """Mean over the chosen workers; NaN where there is none."""
    return float(values[chosen].mean()) if chosen.any() else float("nan")


def about_checkpoint(run: Run, record: Record, given: Given) -> dict[str, Json]:
    """What a checkpoint says of the run and of its last round, by that round's record."""
    metric = run.inputs.task.metric
    scored = (f"{split}_{metric.name}" for split in ("test", "validation"))
    about = {key: record.get(key) for key in ("round", "examples", *scored)}
    own = {"task": run.inputs.task.name, "metric": metric._asdict()}
    done = record["round"]
    about |= {"stage": run.stage(done - 1).part, "steps": run.schedule.steps_before(done)}
    told = {"config": run.settings, "version": __version__, "compile_options": changing_bits(run.devices)}
    return about | given | own | told


def make_ledgers(run: Run) -> dict[str, ledger.Ledger]:
    """The ledger of each of a run's stages by name, of its longest rounds; see `costs.ledger`."""
    longest = {stage.name: stage for stage in sorted(run.stages, key=lambda stage: stage.local_steps)}
    found = {}
    for name in dict.fromkeys(stage.name for stage in run.stages):
        stage = longest[name]
        chunks, program, scored = stage.splits["test"]
        subject = ledger.Subject(
            name=name,
            recipe=stage.recipe,
            phases=stage.phases,
            programs=stage.programs,
            score=program,
            scored=scored,
            chunks=len(chunks),
            steps=(stage.local_steps, run.settings["batch_size"]),
            paper=stage.apart.paper,
        )
        found[name] = ledger.ledger_of(subject)
    return found


def summarize(run: Run, records: Sequence[Record], given: Given, params_sha256: str) -> Summary:
    """The final figures of a run; bytes as its records count them, times in seconds.

    Args:
      run: of which they are.
      records: of all rounds, as in metrics.jsonl.
      given: 'custom_model' and 'custom_task', as `workdir.resume` describes them; None: the config's.
      params_sha256: hash of the final parameters.
    """
    last, rounds, layout, device = records[-1], len(records), run.layout, run.devices[0]
    groups = next((own.groups for own in run.layouts if own.groups), {})
    most = max(formula.subnet_parameters(own) for own in run.layouts)
    keys = dict.fromkeys(key for r in records for key in r if key.startswith("seconds_"))
    seconds = {key: sum(r.get(key, 0.0) for r in records) for key in keys}
    wire = [r["wire_bytes_per_device"] for r in records]  # earlier versions had none for some methods
    sent = [r.get("messages_sent") for r in records]  # earlier versions had none
    return {
        "method": run.name,
        **{key: value for key, value in last.items() if key.startswith(("test_", "validation_"))},
        "train_loss": last["train_loss"],
        "rounds": rounds,
        "examples": last["examples"],
        "seconds_total": seconds.pop("seconds_round"),
        "seconds_compile": run.seconds_compile,
        **seconds,
        "parameters": formula.model_parameters(layout),
        "parameters_per_worker": most / layout.num_workers,
        "bytes_exchanged_per_worker": sum(r["bytes_per_worker"] for r in records),
        "bytes_local_sgd_per_worker": formula.local_sgd_bytes(layout, run.stages[-1].travels) * rounds,
        "bytes_sent_per_worker": sum(r["bytes_sent"] for r in records),
        "messages_sent_per_worker": None if None in sent else sum(sent),
        "wire_bytes_per_device": None if None in wire else sum(wire),
        "workers_left_out": sum(r["workers_left_out"] for r in records),
        "workers_absent": sum(r["workers_absent"] for r in records),
        "num_classes": len(run.inputs.dataset.classes),
        "normalization": _normalization(run.inputs),
        "scale": run.scale,
        "units": {name: group.to_dict() for name, group in groups.items()},
        "doubts": doubts(run.inputs, records),
        "params_sha256": params_sha256,
        "data": run.inputs.dataset.description,
        "num_workers": layout.num_workers,
        "num_devices": layout.num_devices,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "compile_options": changing_bits(run.devices),
        "seed": run.settings["seed"],
        "optimizer_state": run.settings["optimizer_state"],
        **given,
        "task": run.inputs.task.name,
        "metric": run.inputs.task.metric._asdict(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "ist_jax": __version__}
        | {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
    }


def _normalization(opened: inputs.Inputs) -> dict[str, Json] | None:
    """As `augment.make_normalize` takes it; None: inputs stay as they are."""
    statistics = opened.task.normalization
    return statistics and dict(zip(("mean", "std"), statistics, strict=True))


def doubts(opened: inputs.Inputs, records: Sequence[Record]) -> list[str]:
    """What says that a finished run has learnt nothing, in words; usually nothing does.

    Args:
      opened: its data set.
      records: of all rounds.
    """
    found = []
    losses = [r["train_loss"] for r in records if np.isfinite(np.array(r["train_loss"], float))]
    if not losses:
        found.append("no round has a finite training loss")
    elif losses[-1] > losses[0]:
        found.append(f"the training loss rose from {losses[0]:.3f} in the first round to {losses[-1]:.3f}")
    accuracy, chance = records[-1].get("test_accuracy"), inputs.chance(opened)
    if accuracy is not None and chance is not None:
        error = np.sqrt(chance * (1 - chance) / inputs.count(opened.test))
        if accuracy <= chance + 2 * error:
            always = f"naming one class every time is right in {chance:.2%}"
            found.append(f"the test accuracy of {accuracy:.2%} is that of chance: {always}")
    return found


def write_report(workdir: Path) -> Path:
    """Writes report.html about a finished run into its folder; returns its path."""
    from ist_jax.report import page  # with its plotting library, which nothing else needs

    page.write_report([workdir], workdir / "report.html")
    return workdir / "report.html"


def last_line(summary: Summary) -> str:
    """A run's result in a line for people."""
    exchanged, full = summary["bytes_exchanged_per_worker"], summary["bytes_local_sgd_per_worker"]
    metric = metric_of(summary)
    reached = f"{summary['method']}: test {metric.name} {metric.text(summary[f'test_{metric.name}'])}"
    cost = f"each worker exchanged {megabytes(exchanged)} MB" if exchanged else "nothing was exchanged"
    if exchanged and exchanged != full:
        cost += f", {share(exchanged, full)} the {megabytes(full)} MB of local SGD"
    if exchanged and "bytes_sent_per_worker" in summary:  # earlier versions did not sum it up
        apart = " if each had a device of its own" * (summary["num_devices"] < summary["num_workers"])
        cost += f"; {megabytes(summary['bytes_sent_per_worker'])} MB were sent on the wire{apart}"
    return f"{reached} in {summary['seconds_total']:.1f} s; {cost}"


def share(part: float, whole: float) -> str:
    """For people: '7.6% of', or '50 times' where it is more than twice the whole."""
    return f"{part / whole:.1%} of" if part <= 2 * whole else f"{part / whole:,.0f} times"
