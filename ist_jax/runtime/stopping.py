"""When to stop: a pure function of the records, so that a resumed run stops at the same round."""

import math
from collections.abc import Sequence

from ist_jax.tasks.task import Metric
from ist_jax.workdir.files import Record


def has_stopped(records: Sequence[Record], patience: int, metric: Metric) -> bool:
    """Whether the metric on the validation split has not got better than its best for `patience` evaluations.

    Args:
      records: of all rounds so far, as in metrics.jsonl; those with an evaluation have its figures.
      patience: evaluations; 0: never stop.
      metric: of the task.
    """
    # a figure that is not finite is null in metrics.jsonl
    key = f"validation_{metric.name}"
    found = [r[key] for r in records if key in r]
    scores = [metric.better(x) if x is not None and math.isfinite(x) else -math.inf for x in found]
    return bool(patience and scores) and len(scores) - 1 - scores.index(max(scores)) >= patience


def diverged(records: Sequence[Record], limit: int) -> int | None:
    """The worker that was left out in each of the last `limit` rounds, if there is one; 0: no limit."""
    if not limit or len(records) < limit:
        return None
    always = set.intersection(*(set(r["left_out"]) for r in records[-limit:]))
    return min(always, default=None)
