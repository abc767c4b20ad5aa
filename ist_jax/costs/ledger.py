"""The ledger of a run: what it should cost, beside what its compiled programs and its sockets say."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax.extend.core import ClosedJaxpr
from jaxtyping import PyTree

from ist_jax.costs import compiled, formula
from ist_jax.costs.compiled import Executable
from ist_jax.costs.sockets import Meter
from ist_jax.costs.traced import collectives_of, sent
from ist_jax.costs.traffic import by_cause, round_traffic
from ist_jax.data import Split
from ist_jax.exchange.layout import Layout
from ist_jax.methods.method import Recipe, State, Told, TracedPhase
from ist_jax.workdir.files import Json

COLUMNS = {
    "paper": "the papers' count: 4 bytes x 2 directions x the parameters of the slots that are assigned, "
    "wherever they already are; a mean over the workers",
    "expected": "from shapes alone. Bytes that leave a device in the traced round, shared out among its "
    "workers; as many arrive. Empty slots and padding included, a worker's own part not; nothing on one "
    "device. Memory: what must be kept. FLOPs: of matrix products and convolutions, forward and backward, "
    "all slots filled",
    "hlo": "the same from the optimised HLO of the programs that run, loops counted as often as they run. "
    "Memory by the compiler's analysis; peak: arguments + results - what they share + temporaries. FLOPs: as "
    "compiled, so on CPU with the zeros of strided convolutions' gradients",
    "wire": "bytes that arrive over a process's TCP connections, shared out among its workers; null with one "
    "process",
}

Ledger = dict[str, Json]  # what ledger.json holds


class Subject(NamedTuple):
    """What a ledger is of.

    Attributes:
      name: of the method.
      recipe: that it is made from.
      phases: traced.
      programs: compiled, by the names of the phases.
      score: the compiled evaluation.
      scored: the same, traced on one device.
      chunks: calls per evaluation.
      steps: (l, B), local steps and the examples of each.
      paper: by cause, bytes of a round as the papers count them, of all workers.
    """

    name: str
    recipe: Recipe
    phases: Mapping[str, TracedPhase]
    programs: Mapping[str, Executable]
    score: Executable
    scored: ClosedJaxpr
    chunks: int
    steps: tuple[int, int]
    paper: Mapping[str, float]

    @property
    def state(self) -> State:
        """Shapes on one device."""
        return next(iter(self.phases.values())).inputs[0]

    @property
    def data(self) -> Split:
        """Shapes of the training examples on one device."""
        return next(iter(self.phases.values())).inputs[2].data


def ledger_of(subject: Subject) -> Ledger:
    """What ledger.json holds: a row per cause with its unit, and columns, None where nothing is known."""
    layout, (local_steps, batch_size) = subject.recipe.layout, subject.steps
    workers = layout.workers_per_device
    texts = {name: compiled.read(program.as_text()) for name, program in subject.programs.items()}  # type: ignore[arg-type]
    kept, found = formula.memory(subject.recipe, subject.phases)._asdict(), _held(subject.programs)
    slots = formula.slot_parameters(layout)
    if found["subnets"]:  # their moments aside
        held = slots * found["subnets"] / kept["subnets"]
    else:
        trees = _trees(layout, subject.state._replace(own=())) + workers * _trees(layout, subject.state.own)
        held = found["store"] / trees / layout.dtype.itemsize
    figures = {"expected": slots, "hlo": held}
    figures["paper"] = formula.subnet_parameters(layout) / layout.num_workers
    parameters = _row("parameters held", "parameters", "worker", **figures)
    expected = round_traffic(subject.phases, layout).sent
    compiled_bytes: Counter[str] = Counter()
    for name, phase in subject.phases.items():
        compiled_bytes.update(by_cause(phase.parts, texts[name].operands))
    traffic = []
    for cause in dict.fromkeys([*subject.paper, *expected, *compiled_bytes]):
        figures = {"expected": expected.get(cause, 0) / workers, "hlo": compiled_bytes[cause] / workers}
        figures["paper"] = subject.paper.get(cause, 0) / layout.num_workers
        traffic.append(_row(cause, "bytes", "worker and round", **figures))
    total = {name: sum(row[name] for row in traffic) for name in ("paper", "expected", "hlo")}
    traffic.append(_row("round", "bytes", "worker and round", **total))
    by_trace = sum(c.sent for c in collectives_of(subject.scored, layout.num_devices))
    score = compiled.read(subject.score.as_text()).operands  # type: ignore[arg-type]
    by_hlo = sum(sent(kind, operand, devices) for (kind, devices), operand in score.items())
    figures = {"expected": subject.chunks * by_trace / workers, "hlo": subject.chunks * by_hlo / workers}
    scoring = _row("evaluation", "bytes", "worker and evaluation", **figures)
    memory = [_row(x, "bytes", "device", expected=kept[x], hlo=found.get(x)) for x in kept]
    programs = {**subject.programs, "evaluate": subject.score}
    memory += [_row(f"peak of {x}", "bytes", "device", hlo=_peak(program)) for x, program in programs.items()]
    flops = sum(text.flops for text in texts.values()) / (workers * local_steps)
    by_formula = formula.step_flops(subject.recipe, subject.data, batch_size)
    step = _row("training step", "FLOPs", "worker and step", expected=by_formula, hlo=flops)
    about = {"method": subject.name, "num_workers": layout.num_workers, "num_devices": layout.num_devices}
    return about | {"columns": COLUMNS, "rows": [parameters, *traffic, scoring, *memory, step]}


def joined(name: str, tables: Mapping[str, Ledger]) -> Ledger:
    """The ledgers of a run's stages, by their names, as one: of several, rows say of which stage they are."""
    first = next(iter(tables.values()))
    if len(tables) == 1:
        return first
    rows = [{"stage": stage} | row for stage, table in tables.items() for row in table["rows"]]
    return first | {"method": name, "rows": rows}


def with_wire(table: Ledger, meter: Meter, *, phases: Sequence[str], workers: int) -> Ledger:
    """The ledger with its last column filled in.

    Args:
      table: from `ledger_of`.
      meter: of a process and the stage: by phase, and 'evaluate'.
      phases: of a round.
      workers: of the process.
    """
    rounds = meter.times[phases[-1]]
    measured = {name: meter.bytes[name] / rounds for name in phases if rounds}
    measured["round"] = sum(measured.values())
    if meter.times["evaluate"]:
        measured["evaluation"] = meter.bytes["evaluate"] / meter.times["evaluate"]
    wire = {cause: x / workers for cause, x in measured.items()}
    return dict(table) | {"rows": [row | {"wire": wire.get(row["cause"])} for row in table["rows"]]}


def _row(cause: str, unit: str, per: str, **columns: float | None) -> dict[str, Json]:
    whole = {name: int(x) if x is not None and x % 1 == 0 else x for name, x in columns.items()}
    return {"cause": cause, "unit": unit, "per": per} | {name: whole.get(name) for name in COLUMNS}


def _held(programs: Mapping[str, Executable]) -> dict[str, int]:
    """What a device keeps, from the arguments (state, value, turn) of the phases' programs, read or not."""
    arguments = [compiled.argument_bytes(program) for program in programs.values()]
    every = [(path, size) for own in arguments for path, size in own.items()]
    state = {path: size for path, size in every if path.startswith("[0]") and size is not None}
    told = tuple(f".{field}" for field in Told._fields)

    def value(own: dict[str, int | None]) -> int:
        """Bytes of what a phase is handed by the one before."""
        return sum(x or 0 for path, x in own.items() if path.startswith("[1]") and not path.endswith(told))

    return {"store": sum(state.values()), "subnets": max(map(value, arguments))}


def _trees(layout: Layout, tree: PyTree) -> int:
    """How many in it are shaped like the parameters."""
    return sum(map(layout.is_tree, jax.tree.leaves(tree, is_leaf=layout.is_tree)))


def _peak(program: Executable) -> int | None:
    """Bytes of a device's memory that a program needs; None where the backend does not say."""
    if (m := program.memory_analysis()) is None:
        return None
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
