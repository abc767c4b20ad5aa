"""What a compiled program moves and computes, read from the text of its optimised HLO.

XLA's own `cost_analysis` counts the body of a loop once; here every instruction counts as often as it runs,
by the trip counts that XLA writes beside its loops. Where a loop has none, or a product has become a call
of a library that the text does not describe, the figure is NaN: not known.
"""

import functools
import math
import re
from collections import defaultdict
from typing import NamedTuple

import jax
from jax.lax import ConvDimensionNumbers

from ist_jax.costs.traced import conv_flops

Costs = dict[tuple[str, float], float]  # by kind of collective and number of devices, or `_FLOPS`
Executable = jax.stages.Compiled  # or what calls one and tells the same of it

_COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", re.M)
_INSTRUCTION = re.compile(r" = (.*?) ([a-z][a-z0-9\-]*)\((.*?)(?:\), |$)", re.M)  # type, opcode, operands
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{[^}]*\}|(?:true|false)_computation=%[\w.\-]+")
_NAMES = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_RELEVANT = re.compile(r"=%|_computation| dot\(| convolution\(| custom-call\(|_groups=|_pairs=")
_FLOPS = ("flops", 0)  # a key beside those of the collectives
_OPAQUE = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|conv|dot|cublas|cudnn|onednn)[^"]*"', re.I)


class Program(NamedTuple):
    """One run of a compiled program, on one device.

    Attributes:
      operands: bytes of the operands of its collectives, by kind ('all-to-all', 'all-gather', ...) and
        number of devices that take part.
      flops: of its matrix products and convolutions; of a conditional, the dearest branch's.
    """

    operands: Costs
    flops: float


def read(text: str) -> Program:
    """Reads the text of a compiled program, `jax.stages.Compiled.as_text()`."""
    bodies = {}
    for header in _HEADER.finditer(text):
        bodies[header[1] or header[2]] = text[header.end() + 1 : text.index("\n}", header.end())]
    tally = _tally(bodies)
    flops = tally.pop(_FLOPS, 0.0)
    return Program(tally, flops)


def argument_bytes(program: Executable) -> dict[str, int | None]:
    """Bytes of each argument on one device, by its place in the call's tree, such as "[0].params['w']".

    All of them are there: what the program does not read, and was therefore compiled without, is None; the
    programs that do read it tell its size.

    Args:
      program: of `devices.compile_program`.
    """
    found: dict[str, int | None] = {}

    def note(path: tuple, argument: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None) -> None:
        size = math.prod(sharding.shard_shape(argument.shape)) * argument.dtype.itemsize if sharding else None
        found[jax.tree_util.keystr(path)] = size

    jax.tree_util.tree_map_with_path(note, program.args_info[0], program.input_shardings[0])
    return found


def _tally(bodies: dict[str, str]) -> Costs:
    """Sums over all instructions, as often as they run: FLOPs and operands of collectives."""

    @functools.cache
    def total(name: str) -> Costs:
        tally: Costs = defaultdict(float)
        body = bodies[name]
        for line in filter(_RELEVANT.search, body.splitlines()):
            trips = _TRIPS.search(line)
            times = 1 if " while(" not in line else int(trips[1]) if trips else math.nan
            branches = [total(name) for text in _BRANCHES.findall(line) for name in _NAMES.findall(text)]
            dearest = {key: max(branch.get(key, 0) for branch in branches) for key in set().union(*branches)}
            called = [(total(other), times) for other in _CALLED.findall(line)]
            for part, often in [(_cost(line, body), 1), (dearest, 1), *called]:
                for key, value in part.items():
                    tally[key] += value * often
        return tally

    return dict(total("ENTRY "))


def _cost(line: str, body: str) -> Costs:
    """What an instruction costs by itself, one thing at most."""
    result, opcode, operands = next(_INSTRUCTION.finditer(line)).groups()
    kind = opcode.removesuffix("-start")
    if kind in _COLLECTIVES:
        return {(kind, _group_size(line)): sum(map(_bytes, _types(operands, body)))}
    if opcode == "dot":
        left, out = _dims(_types(operands, body)[0]), _dims(result)
        contracted = _attribute(line, r"lhs_contracting_dims=\{([\d,]*)\}").split(",")
        return {_FLOPS: 2 * math.prod(out) * math.prod(left[int(axis)] for axis in contracted if axis)}
    if opcode == "convolution":
        return {_FLOPS: _convolution(line, [_dims(x) for x in (*_types(operands, body), result)])}
    opaque = opcode == "custom-call" and _OPAQUE.search(line)
    return {_FLOPS: math.nan} if opaque else {}


def _convolution(line: str, shapes: list[list[int]]) -> int:
    labels = re.split("_|->", _attribute(line, r"dim_labels=(\S+?)[,\s]"))
    spatial = sorted(filter(str.isdigit, labels[0]))
    ends = ("bf", "oi", "bf")
    specs = [[*map(label.index, (*end, *spatial))] for label, end in zip(labels, ends, strict=True)]
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", _attribute(line, r"window=\{([^}]*)\}")))

    def field(name: str, default: int) -> list[int]:
        if name not in fields:
            return [default] * len(spatial)
        return [int(pair.split("_")[0]) for pair in fields[name].split("x")]

    names = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
    axes = zip(*(field(*name) for name in names.items()), strict=True)
    groups = [int(_attribute(line, rf"{name}_group_count=(\d+)", "1")) for name in ("feature", "batch")]
    return conv_flops(shapes, ConvDimensionNumbers(*specs), list(axes), math.prod(groups))


def _attribute(line: str, pattern: str, default: str = "") -> str:
    match = re.search(pattern, line)
    return match[1] if match else default


def _types(operands: str, body: str) -> list[str]:
    """Types of an instruction's operands, from the lines of the same computation that define them."""
    places = [body.index(f"%{name} = ") for name in _NAMES.findall(operands)]
    return [next(_INSTRUCTION.finditer(body, place))[1] for place in places]


def _dims(text: str) -> list[int]:
    return [int(d) for d in _SHAPE.findall(text)[0][1].split(",") if d]


def _bytes(text: str) -> int:
    """Bytes of a type, of all elements of a tuple."""
    shapes = [(kind, math.prod(int(d) for d in dims.split(",") if d)) for kind, dims in _SHAPE.findall(text)]
    return sum(-(-_bits(kind) * size // 8) for kind, size in shapes)


def _bits(kind: str) -> int:
    digits = re.match(r"[a-z]+(\d+)", kind)
    return 8 if kind == "pred" else int(digits[1]) if digits else 0  # a token carries nothing


def _group_size(line: str) -> float:
    """Devices in a group: of {{0,1},{2,3}}, of [2,2]<=[4] or of mesh['a'=2,'b'=2] {'b'}; NaN: not known."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"['\"](.+?)['\"]=(\d+)", mesh[1]))
        parts = re.findall(r"['\"](.+?)['\"](?::\(\d+\)(\d+))?", mesh[2])  # whole axes, or parts of them
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    pairs = re.search(r"source_target_pairs=\{(\S*)\}", line)
    return len(set(re.findall(r"\{(\d+),", pairs[1]))) if pairs else math.nan
