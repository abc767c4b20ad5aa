"""What a round sends, by cause, from its trace.

Two counts of bytes, which must not be mixed up:

  paper  'exchanged', the headline of every table: as the papers count, 4 bytes (the dtype's) x 2 directions
         x the parameters of all subnets; the slots that are assigned, whoever's memory they already are in.
  sent   'sent on the wire', beside it: bytes that leave a device in the collectives that stand in the trace:
         n slots per worker, empty ones included, rows padded to the devices; a worker's own part does not
         move, one device sends nothing. A device receives as many.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ist_jax.costs.traced import collectives_of, operands, sent
from ist_jax.exchange.layout import Layout
from ist_jax.exchange.wire import Part
from ist_jax.methods.method import TracedPhase

_CAUSES = {"all-reduce": "gradients"}  # of collectives that are no exchange; else their kind


class Traffic(NamedTuple):
    """Messages of a round, and its bytes by cause.

    Causes are 'gather' of the units, 'merge_units', 'merge_shared' (the shared leaves, and a flag per
    worker), 'gradients', or the kind of a collective of a method's own.
    """

    paper: dict[str, float]  # of all workers together
    sent: dict[str, float]  # by one device
    messages: float = 0.0  # by one device, as `traced.messages` counts


def round_traffic(phases: Mapping[str, TracedPhase], layout: Layout) -> Traffic:
    """The bytes and messages of a round.

    Args:
      phases: from `methods.method.trace`.
      layout: that they were traced for.
    """
    paper: dict[str, float] = defaultdict(float)
    leaving: dict[str, float] = defaultdict(float)
    messages = 0.0
    for phase in phases.values():
        found = collectives_of(phase.jaxpr, layout.num_devices)
        messages += sum(c.messages for c in found)
        for cause, size in by_cause(phase.parts, operands(found)).items():
            leaving[cause] += size
            paper[cause] += 0.0  # there, whatever it is
        for part in phase.parts:
            paper[part.cause] += part.paper
        exchanges = {part.kind for part in phase.parts}
        for other in found:
            if other.kind not in exchanges:
                paper[_CAUSES.get(other.kind, other.kind)] += 2 * layout.num_workers * other.floats
    return Traffic(dict(paper), dict(leaving), messages)


def megabytes(size: float) -> str:
    """Bytes in 10^6 for people, without the unit: one decimal, or three digits where that shows too few."""
    return f"{size / 1e6:,.1f}" if size >= 1e7 or not size else f"{size / 1e6:.3g}"


def by_cause(parts: Sequence[Part], found: Mapping[tuple[str, float], float]) -> dict[str, float]:
    """Bytes that a device sends in a phase, told apart: the all-to-alls of a merge have several causes.

    Args:
      parts: of the exchanges in it.
      found: bytes of the operands of its collectives, by kind and number of devices (NaN: not known), in its
        trace or in its optimised HLO; where they are fewer or more than the parts, so are the bytes of each
        cause.
    """
    told: dict[str, float] = defaultdict(float, {part.cause: 0.0 for part in parts})
    exchanged: dict[str, float] = defaultdict(float)
    for part in parts:
        exchanged[part.kind] += part.operand
    for (kind, devices), operand in found.items():
        if kind not in exchanged:
            told[_CAUSES.get(kind, kind)] += sent(kind, operand, devices)
            continue
        for part in parts:
            if part.kind == kind:
                told[part.cause] += sent(kind, operand * part.operand / exchanged[kind], devices)
    return told
