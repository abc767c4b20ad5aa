"""The ledger of a run: what it costs by formula, beside what its compiled programs and its sockets say."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from ist_jax.costs import compiled as hlo
from ist_jax.costs import formula as ledger
from ist_jax.costs.sockets import Meter
from ist_jax.exchange import streaming as fetch
from ist_jax.exchange.layout import Layout
from ist_jax.runtime import scoring as evaluation
from ist_jax.runtime.setup import Run

COLUMNS = {
    "paper": "the papers' count: 4 bytes x 2 directions x the parameters of the slots that are assigned, "
    "wherever they already are; a mean over the workers",
    "formula": "bytes that leave a device, shared out among its workers; as many arrive. Empty slots and "
    "padding included, a worker's own part not; nothing on one device. Memory: what must be kept. FLOPs: of "
    "matrix products and convolutions, forward and backward, all slots filled",
    "hlo": "the same from the optimised HLO of the programs that run, loops counted as often as they run. "
    "Memory by the compiler's analysis; peak: arguments + results - what they share + temporaries. FLOPs: as "
    "compiled, so on CPU with the zeros of strided convolutions' gradients",
    "wire": "bytes that arrive over a process's TCP connections, shared out among its workers; null with one "
    "process",
}


def ledger_of(run: Run) -> dict[str, Any]:
    """What ledger.json holds: a row per cause with its unit, and columns, None where nothing is known."""
    config, layout = run.config, run.layout
    programs = {name: hlo.read(p.as_text()) for name, p in run.programs._asdict().items() if p is not None}
    trees, workers = len(run.state.trees), layout.workers_per_device
    averaged_steps = config.local_steps if config.method == "data_parallel" else 0
    kept = ledger.memory(run.recipe, in_place=averaged_steps > 0)._asdict()
    found = _kept(run, programs)
    numbers = found["subnets"] / workers if found["subnets"] else found["store"]
    parameters = _row(
        "parameters held", "parameters", "worker",
        paper=ledger.subnet_parameters(layout) / config.num_workers, formula=ledger.slot_parameters(layout),
        hlo=numbers / trees / layout.dtype.itemsize,
    )  # fmt: skip
    paper = ledger.paper_bytes(layout, trees=trees, averaged_steps=averaged_steps)
    formula = ledger.round_bytes(layout, trees=trees, averaged_steps=averaged_steps)
    sent = sent_bytes(layout, programs, trees=trees)
    traffic = [
        _row(
            cause, "bytes", "worker and round", paper=paper[cause] / config.num_workers,
            formula=formula[cause] / workers, hlo=sent[cause] / workers,
        )
        for cause in formula
    ]  # fmt: skip
    total = {name: sum(row[name] for row in traffic) for name in ("paper", "formula", "hlo")}
    traffic.append(_row("round", "bytes", "worker and round", **total))
    scoring = _row(
        "evaluation", "bytes", "worker and evaluation",
        formula=_evaluation_bytes(run, programs["evaluate"]) / workers,
        hlo=len(run.test_batches) * sent["evaluation"] / workers,
    )  # fmt: skip
    memory = [_row(x, "bytes", "device", formula=kept[x], hlo=found.get(x)) for x in kept]
    for name, program in run.programs._asdict().items():
        if program is not None:
            memory.append(_row(f"peak of {name}", "bytes", "device", hlo=_peak(program)))
    step = _row(
        "training step", "FLOPs", "worker and step",
        formula=ledger.step_flops(run.recipe, run.task, config.batch_size),
        hlo=programs["local"].flops / (workers * config.local_steps),
    )  # fmt: skip
    return {
        "method": config.method,
        "num_workers": config.num_workers,
        "num_devices": layout.num_devices,
        "columns": COLUMNS,
        "rows": [parameters, *traffic, scoring, *memory, step],
    }


def with_wire(table: Mapping[str, Any], meter: Meter, *, workers: int) -> dict[str, Any]:
    """The ledger with its last column filled in.

    Args:
      table: from `ledger_of`.
      meter: of a process; in every round it has measured 'gather' and 'round', then 'round' once more for the
        rest of it, and 'evaluation' in each.
      workers: of the process.
    """
    rounds = meter.times["round"] - meter.times["gather"]
    times = {"evaluation": meter.times["evaluation"]}
    measured = {cause: x / times.get(cause, rounds) / workers for cause, x in meter.bytes.items()}
    rows = [row | {"wire": measured.get(row["cause"])} for row in table["rows"]]
    return dict(table) | {"rows": rows}


def _row(cause: str, unit: str, per: str, **columns: float | None) -> dict[str, Any]:
    whole = {name: int(x) if x is not None and x % 1 == 0 else x for name, x in columns.items()}
    return {"cause": cause, "unit": unit, "per": per} | {name: whole.get(name) for name in COLUMNS}


def sent_bytes(layout: Layout, programs: Mapping[str, hlo.Program], *, trees: int) -> dict[str, float]:
    """Bytes that a device sends by the collectives of its programs, by cause.

    The one all-to-all of a merge is told apart by its all-gather: what that one collects, every worker sent
    slices of. There is a flag per worker and tree, too; the rest are the units.
    """

    def by_kind(name: str) -> dict[str, float]:
        kinds: dict[str, float] = {}
        for (kind, devices), operand in programs[name].operands.items() if name in programs else ():
            kinds[kind] = kinds.get(kind, 0) + ledger.sent(kind, operand, devices)
        return kinds

    gather, local, merge, evaluation = map(by_kind, ("gather", "local", "merge", "evaluate"))
    causes = {"evaluation": sum(evaluation.values())}
    if "merge" not in programs:
        return causes | {"gradients": sum(local.values())}
    flags = trees * (layout.num_devices - 1) * layout.dtype.itemsize
    slices = (merge.get("all-gather", 0) + flags) * layout.workers_per_device
    units = merge.get("all-to-all", 0) - slices
    shared = sum(merge.values()) - units + sum(local.values())
    return causes | {"gather": sum(gather.values()), "merge_units": units, "merge_shared": shared}


def _kept(run: Run, programs: Mapping[str, hlo.Program]) -> dict[str, int]:
    """What a device keeps, from the arguments of the programs.

    Those of a merge begin with the state (its trees, then the rest) and the subnets; data-parallel steps have
    no subnets.
    """
    leaves = len(run.state.trees) * len(run.layout.leaves)
    if "merge" not in programs:
        return {"store": sum(programs["local"].arguments[:leaves]), "subnets": 0}
    arguments = programs["merge"].arguments
    after = leaves + len(run.state.rest)
    return {"store": sum(arguments[:leaves]), "subnets": sum(arguments[after : after + leaves])}


def _peak(program: jax.stages.Compiled) -> int | None:
    """Bytes of a device's memory that a program needs; None where the backend does not say."""
    m = program.memory_analysis()
    if m is None:
        return None
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def _evaluation_bytes(run: Run, program: hlo.Program) -> float:
    batches = len(run.test_batches) * run.test_batches.spec["weight"].shape[1]
    streamed = evaluation.is_streamable(run.model)
    sends_products = any(kind == "all-to-all" for kind, _ in program.operands)  # else a trace is spared
    products = _products(run) if streamed and sends_products else {}
    return ledger.evaluation_bytes(run.layout, batches, streamed=streamed, products=products)


@dataclasses.dataclass(frozen=True, eq=False)
class _Notes:
    """A `models.Fetch` that notes what is multiplied by the leaves that stay where they are."""

    layout: Layout
    products: list[tuple[str, tuple[int, int]]]

    def __call__(self, path: str, shard: jax.Array) -> jax.Array:
        leaf = self.layout.leaves[path]
        if leaf.kind == "shared":
            return shard
        return jnp.zeros(leaf.rest if leaf.kind == "rows" and shard.ndim == 1 else leaf.shape, shard.dtype)

    def product(self, path: str, x: Any, shard: jax.Array) -> jax.Array:
        self.products.append((path, fetch.operands(self.layout, path, x)))
        return jnp.zeros((len(jax.tree.leaves(x)[0]), self.layout.leaves[path].shape[1]), shard.dtype)


def _products(run: Run) -> dict[str, tuple[int, int]]:
    """`fetch.operands` of the products of an evaluation batch."""
    notes = _Notes(run.layout, [])

    def logits(shards: Any, batch: Any) -> Any:
        params = traverse_util.unflatten_dict(shards, sep="/")
        model: Any = run.model.clone(fetch=notes)
        return model.apply({"params": params}, run.task.eval_fn(batch)[0], scale=run.scale)

    def without(x: Any, axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape[axes:], x.dtype)

    shards = jax.tree.map(partial(without, axes=1), run.state.trees[0])
    jax.eval_shape(logits, shards, jax.tree.map(partial(without, axes=2), run.test_batches.spec))
    return dict(notes.products)
