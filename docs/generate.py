"""What the pages show of the package itself: every key of a config, pictures of a draw, the notebooks.

`write` makes the files of `docs/generated`, which no one edits; Sphinx calls it before it reads the pages.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from types import ModuleType

from flax import traverse_util

from ist_jax import data, deals, partition
from ist_jax.config import COMMON
from ist_jax.costs.ledger import COLUMNS
from ist_jax.key import Key, Value
from ist_jax.models import MODELS
from ist_jax.partition import Assignment, Group

ROOT = Path(__file__).parent.parent


def write(folder: Path) -> None:
    """Writes all of them; a file that would not change is left alone, so that its page is not built again."""
    files = {
        "keys.md": keys_page(),
        "modes.md": modes_page(),
        "sets.md": sets_table(),
        "plan.md": plan_block(),
    }
    files |= {"resume.md": resume_list(), "columns.md": columns_list()}
    files |= {f"{name}.svg": picture for name, picture in pictures().items()}
    files |= {f"notebooks/{path.name}": path.read_text() for path in (ROOT / "notebooks").glob("*.ipynb")}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


# --- keys -----------------------------------------------------------------------------------------

TITLES = {
    "": "The run",
    "checkpoint": "Checkpoints",
    "data": "Data",
    "model": "Model",
    "partition": "Partition",
    "exchange": "Exchange",
    "optimizer": "Optimizer",
    "outer": "Outer optimizer",
    "power_sgd": "PowerSGD",
}


def keys_page() -> str:
    """A section per group of keys, and in it one per key: what it means, default, bounds, may it change."""
    lines = []
    for title, keys in sections():
        lines += [f"## {title}\n", *(_entry(name, key) for name, key in keys.items())]
    return "\n".join(lines)


def sections() -> Iterator[tuple[str, Mapping[str, Key]]]:
    """Titles and keys: the common ones by the first part of their names, those of models, those of sets."""
    for prefix, title in TITLES.items():
        yield title, {name: key for name, key in COMMON.items() if name.rpartition(".")[0] == prefix}
    for model, entry in MODELS.items():
        yield f"Model `{model}`", entry.options
    owners: dict[str, list[str]] = {}
    for name, known in data.SETS.items():
        for key in known.options:
            owners.setdefault(key, []).append(name)
    for names in dict.fromkeys(map(tuple, owners.values())):
        sets = " and ".join(f"`{name}`" for name in names)
        yield f"Data {sets}", {key: data.options()[key] for key, own in owners.items() if tuple(own) == names}


def _entry(name: str, key: Key) -> str:
    default = "unset" if key.default is None else f"`{key.default!r}`"
    change = "may change on resume" + ", and makes a finished run go on" * key.extends
    notes = [f"default: {default}", key.allowed(), f"**{change}**" * key.resume]
    return f"### `{name}`\n\n{key.help}\n\n({'; '.join(filter(None, notes))})\n"


def resume_list() -> str:
    """The keys with which a run may go on."""
    names = dict.fromkeys(name for _, keys in sections() for name, key in keys.items() if key.resume)
    return ", ".join(f"`{name}`" for name in names) + ".\n"


def sets_table() -> str:
    """A row per data set, with what is known of it before it is opened."""
    rows = ["| `--config.data.name=` | an example | classes | training examples |", "|---|---|---|---|"]
    for name in sorted(data.SETS):
        known = data.facts(name)
        shape = " x ".join(f"{size:,}" for size in known.example) if known.example else "its own"
        shape += ", sparse" * known.sparse + ", streamed" * known.encoded
        counts = (f"{count:,}" if count else "its own" for count in (known.num_classes, known.num_train))
        rows.append(f"| `{name}` | {shape} | {' | '.join(counts)} |")
    return "\n".join(rows) + "\n"


def columns_list() -> str:
    """The columns of a ledger."""
    return "\n".join(f"`{name}`\n: {meaning}.\n" for name, meaning in COLUMNS.items())


def plan_block() -> str:
    """A plan, as the command prints it today."""
    flags = ["-m", "ist_jax.plan", "--config=configs/resnet.py:cifar100"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command, environment = [sys.executable, *flags], os.environ | {"PYTHONPATH": path}
    printed = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    return f"```\n$ python {' '.join(flags)}\n{printed.rstrip()}\n```\n"


def modes_page() -> str:
    """Per config file a section with what each of its modes sets, other than a key's default."""
    lines = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = load(path)
        for mode in module.MODES:
            title = f"configs/{path.name}" + f":{mode}" * (mode != next(iter(module.MODES)))
            lines += [f"### `{title}`\n", _settings(module, mode), ""]
    return "\n".join(lines)


def load(path: Path) -> ModuleType:
    """The module of a config file."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _settings(module: ModuleType, mode: str) -> str:
    config = module.get_config(mode)
    flat = traverse_util.flatten_dict(config.to_dict(), sep=".")
    keys = COMMON | MODELS[config.model.name].options | data.options()
    shown = {name: _plain(value) for name, value in flat.items() if value != keys[name].default}
    return ", ".join(f"`{name}={value}`" for name, value in shown.items())


def _plain(value: Value) -> str:
    numbers = isinstance(value, tuple) and any(isinstance(x, float) for x in value)
    return f"({', '.join(f'{x:.4g}' for x in value)})" if numbers else repr(value)


# --- pictures -------------------------------------------------------------------------------------

COLORS = ("#0072B2", "#D55E00", "#009E73")  # of workers: Okabe and Ito's, as in the notebooks
SEED, WORKERS, DEVICES = 0, len(COLORS), 3
APART = {"block": Group("block", 6, WORKERS)}
OVERLAP = {"block": Group("block", 6, WORKERS, min_units=3)}
WIDTH, CELL, LEFT = 560, 56, 130
PAIR = {name: Group(name, 6, WORKERS, strips=WORKERS) for name in ("in", "out")}
KINDS = {  # of unit: the parameters that have it or, with False, are shared
    "block": {"first layer": False, "blocks": True, "last layer": False},
    "neuron": {"dense 1, out": True, "norm 1": True, "dense 2, in": True},
    "channel": {"norm 1": False, "conv 1, out": True, "norm 2": True, "conv 2, in": True},
    "head": {"query, out": True, "key, out": True, "value, out": True, "output, in": True},
}


def pictures() -> dict[str, str]:
    """The pictures by name, as SVG: units are letters, a worker is a colour and a number."""
    kinds = {kind: _unit(kind, rows) for kind, rows in KINDS.items()}
    return {"partition": _partition(), "gather": _gather(), "merge": _merge(), "pairs": _pairs()} | kinds


def drawn(groups: partition.Groups, round_index: int, name: str = "block") -> Assignment:
    """The assignment of a group in a round, counted from 0."""
    return partition.draw(SEED, round_index, groups, deals.random)[name]


def owners(assignment: Assignment) -> list[int]:
    """The worker of each unit, where nobody shares one."""
    workers = {unit: worker for worker, units in enumerate(held(assignment)) for unit in units}
    return [workers[unit] for unit in sorted(workers)]


def held(assignment: Assignment) -> list[list[int]]:
    """The units of each worker."""
    return [own[gates].tolist() for own, gates in zip(*map(list, assignment), strict=True)]


def letter(unit: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[unit]


def _partition() -> str:
    """Rounds below each other: a row per worker, a column per unit."""
    parts, y = [], 8
    rounds = [(APART, 0), (APART, 1), (OVERLAP, 0)]
    for groups, index in rounds:
        least = groups["block"].min_units
        title = f"round {index + 1}" + f", at least {least} units per worker" * bool(least)
        parts.append(_text(LEFT, y + 18, title, bold=True))
        for worker, units in enumerate(held(drawn(groups, index))):
            top = y + 30 + worker * 34
            row = [_text(0, top + 21, f"worker {worker}")]
            for unit in range(groups["block"].size):
                there = unit in units
                row.append(
                    _cell(LEFT + unit * (CELL + 6), top, CELL, 28, letter(unit) * there, [worker] * there)
                )
            parts.append(_named(f"{title}: worker {worker} holds {_list(units)}", row))
        y += 30 + WORKERS * 34 + 18
    return _svg("Who holds which unit: partitions of six units among three workers", y - 10, parts)


def _gather() -> str:
    """Above: slices of all units on every device; below: each worker's whole units."""
    of_unit = owners(drawn(APART, 0))
    size = len(of_unit)
    parts = [_text(0, 20, "the global model, a slice of every unit on each device", bold=True)]
    for device in range(DEVICES):
        top = 34 + device * 34
        row = [_text(0, top + 21, f"device {device}")]
        for unit, worker in enumerate(of_unit):
            row.append(_cell(LEFT + unit * (CELL + 6), top, CELL, 28, f"{letter(unit)}{device}", [worker]))
        parts.append(_named(f"device {device} keeps slice {device} of {_list(range(size))}", row))
    y = 34 + DEVICES * 34 + 10
    parts += _arrow(y, "gather: all-to-all")
    y += 62
    parts.append(_text(0, y + 10, "each worker's subnet, of whole units", bold=True))
    for worker, units in enumerate(held(drawn(APART, 0))):
        top = y + 24 + worker * 42
        row = [_text(0, top + 24, f"worker {worker}"), _cell(LEFT, top, 84, 34, "shared", [])]
        for place, unit in enumerate(sorted(units)):
            x = LEFT + 108 + place * (3 * 44 + 24)
            row.append(_line(x - 24, top + 17, x, top + 17))
            for device in range(DEVICES):
                row.append(_cell(x + device * 44, top, 44, 34, f"{letter(unit)}{device}", [worker]))
        parts.append(_named(f"worker {worker} trains the shared layers and {_list(units)}", row))
    return _svg(
        "Gather: the slices of a worker's units come together on its device", y + 24 + WORKERS * 42, parts
    )


def _merge() -> str:
    """Above: what the workers trained, with overlap; below: what each unit becomes."""
    subnets = held(drawn(OVERLAP, 0))
    size = OVERLAP["block"].size
    parts = [_text(0, 20, "after the local steps: every worker's own version", bold=True)]
    for worker, units in enumerate(subnets):
        top = 34 + worker * 34
        row = [_text(0, top + 21, f"worker {worker}")]
        row += [_cell(LEFT + unit * (CELL + 6), top, CELL, 28, letter(unit), [worker]) for unit in units]
        parts.append(_named(f"worker {worker} has trained {_list(units)}", row))
    y = 34 + WORKERS * 34 + 10
    parts += _arrow(y, "merge: the units go home")
    y += 62
    parts.append(_text(0, y + 10, "the global model: a copy, or the mean over the holders", bold=True))
    row = []
    for unit in range(size):
        holders = [worker for worker, units in enumerate(subnets) if unit in units]
        x, what = LEFT + unit * (CELL + 6), "mean" if len(holders) > 1 else "copy"
        cell = [
            _cell(x, y + 24, CELL, 40, letter(unit), holders),
            _text(x + CELL / 2, y + 88, what, middle=True),
        ]
        row.append(_named(f"unit {letter(unit)}: {what} of {_list(holders, 'worker {}'.format)}", cell))
    return _svg("Merge: what several workers hold becomes the mean over them", y + 100, parts + row)


def _unit(kind: str, rows: Mapping[str, bool]) -> str:
    """A row per parameter: the entries that belong to units in the colours of their workers."""
    parts, of_unit = [], owners(drawn(APART, 0))
    for number, (name, dealt) in enumerate(rows.items()):
        top = 8 + number * 40
        if dealt:
            cells = [
                _cell(LEFT + unit * (CELL + 6), top, CELL, 30, letter(unit), [worker])
                for unit, worker in enumerate(of_unit)
            ]
        else:
            cells = [_cell(LEFT, top, 6 * (CELL + 6) - 6, 30, "shared by all workers", [])]
        whose = f"a {kind} to an entry" if dealt else "shared"
        parts.append(_named(f"{name}: {whose}", [_text(0, top + 22, name), *cells]))
    return _svg(f"What a {kind} is made of: six of them, dealt to three workers", 8 + len(rows) * 40, parts)


def _pairs() -> str:
    """A matrix with units along both axes: a worker trains what is in one of its rows and of its columns."""
    of_input, of_output = (owners(drawn(PAIR, 0, name)) for name in PAIR)
    parts = [_text(LEFT, 20, "out: channels a to f", bold=True)]
    for i, worker in enumerate(of_input):
        top = 32 + i * 36
        row = [_text(0, top + 21, f"in: {letter(i)}")]
        for j, other in enumerate(of_output):
            mine = worker == other
            row.append(
                _cell(LEFT + j * (CELL + 6), top, CELL, 28, (letter(i) + letter(j)) * mine, [worker] * mine)
            )
        parts.append(_named(f"input {letter(i)}: trained by worker {worker} for its outputs", row))
    return _svg("A kernel between two dealt layers: a third of its entries is trained in a round", 248, parts)


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" {size} role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>", ""])


def _named(title: str, parts: Sequence[str]) -> str:
    return "\n".join(["<g>", f"<title>{escape(title)}</title>", *parts, "</g>"])


def _cell(x: float, y: float, width: float, height: float, text: str, workers: Sequence[int]) -> str:
    """A box in the colours of its workers, side by side; dashed and empty without a text."""
    part = width / max(len(workers), 1)
    fills = [
        f'<rect x="{x + i * part:g}" y="{y:g}" width="{part:g}" height="{height:g}" fill="{COLORS[w]}" '
        f'fill-opacity="0.35"/>'
        for i, w in enumerate(workers)
    ]
    stroke = COLORS[workers[0]] if len(workers) == 1 else "currentColor"
    dash = "" if text else ' stroke-dasharray="3 4" stroke-opacity="0.4"'
    frame = (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="none" stroke="{stroke}" '
        f'stroke-width="1.5"{dash}/>'
    )
    label = [_text(x + width / 2, y + height / 2 + 7, text, middle=True)] if text else []
    return "".join([*fills, frame, *label])


def _text(x: float, y: float, text: str, *, bold: bool = False, middle: bool = False) -> str:
    more = ' font-weight="bold"' * bold + ' text-anchor="middle"' * middle
    return f'<text x="{x:g}" y="{y:g}" font-size="20" fill="currentColor"{more}>{escape(text)}</text>'


def _line(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="currentColor" stroke-width="1.5"/>'


def _arrow(y: float, text: str) -> list[str]:
    """Downwards, among the units."""
    x = LEFT + 2 * (CELL + 6)
    head = f'<path d="M{x - 6} {y + 26}h12l-6 10z" fill="currentColor"/>'
    return [_line(x, y, x, y + 28), head, _text(x + 16, y + 24, text)]


def _list(units: Sequence[int], name=letter) -> str:
    return ", ".join(map(name, units))
