"""What is recorded of a round, and of a run."""

from typing import Any

import numpy as np

from ist_jax.methods.method import Told
from ist_jax.runtime.run import Run, Stage


def round_record(run: Run, stage: Stage, index: int, told: Told, present: np.ndarray) -> dict[str, Any]:
    """The record of a round, but for its times.

    Args:
      run: of which it is a round.
      stage: that it was run by.
      index: its number, counted from 0.
      told: by the workers, [S].
      present: bool [S], who took part.
    """
    schedule, workers = run.schedule, stage.layout.num_workers
    merged, sick = told.healthy & present, np.flatnonzero(~told.healthy & present)
    return {
        "round": index + 1,
        "examples": schedule.examples_after(index),
        "train_loss": _mean_where(merged, told.loss),
        "train_accuracy": _mean_where(merged, told.accuracy),
        "lr": float(schedule.learning_rates[index, -1]),
        "bytes_per_worker": sum(stage.apart.paper.values()) / workers,
        "bytes_sent": sum(stage.apart.sent.values()),
        "wire_bytes_per_device": sum(stage.traffic.sent.values()),
        "workers_left_out": len(sick),
        "left_out": sick.tolist(),
        "workers_absent": int((~present).sum()),
        "partition": stage.deal,
    }


def _mean_where(chosen: np.ndarray, values: np.ndarray) -> float:
    """Mean over the chosen workers; NaN where there is none."""
    return float(values[chosen].mean()) if chosen.any() else float("nan")
