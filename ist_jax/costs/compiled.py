"""What a compiled program moves and computes, read from the text of its optimised HLO.

XLA's own `cost_analysis` counts the body of a loop once; here every instruction counts as often as it runs,
by the trip counts that XLA writes beside its loops. Where a loop has none, or a product has become a call
of a library that the text does not describe, the figure is NaN: not known.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import jax
from jaxtyping import PyTree

from ist_jax.costs.traced import Window, conv_flops

_COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", re.M)
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_RELEVANT = re.compile(r"=%|_computation| dot\(| convolution\(| custom-call\(|_groups=|_pairs=")
_FLOPS = ("flops", 0)  # a key beside those of the collectives
_OPAQUE = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|conv|dot|cublas|cudnn|onednn)[^"]*"', re.I)


class MemoryStats(Protocol):
    """Bytes on a device, as the compiler counts them."""

    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    temp_size_in_bytes: int


class Executable(Protocol):
    """A compiled program: a `jax.stages.Compiled`, or what calls one."""

    def __call__(self, *args: PyTree) -> PyTree: ...

    def as_text(self) -> str | None:
        """Its optimised HLO."""

    def memory_analysis(self) -> MemoryStats | None:
        """None where the backend does not say."""

    @property
    def args_info(self) -> PyTree:
        """(arguments, keyword arguments): shape and dtype of every array."""

    @property
    def input_shardings(self) -> PyTree[jax.sharding.Sharding | None]:
        """The same tree; None where the program does not read the array."""


class Program(NamedTuple):
    """One run of a compiled program, on one device.

    Attributes:
      operands: bytes of the operands of its collectives, by kind ('all-to-all', 'all-gather', ...) and
        number of devices that take part.
      flops: of its matrix products and convolutions; of a conditional, the dearest branch's.
    """

    operands: dict[tuple[str, float], float]
    flops: float


def read(text: str) -> Program:
    """Reads the text of a compiled program, `jax.stages.Compiled.as_text()`."""
    computations, entry = _split(text)
    tally = _tally(computations, entry)
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
        shape = argument.shape if sharding is None else sharding.shard_shape(argument.shape)
        size = math.prod(shape) * argument.dtype.itemsize
        found[jax.tree_util.keystr(path)] = None if sharding is None else size

    jax.tree_util.tree_map_with_path(note, program.args_info[0], program.input_shardings[0])
    return found


def _split(text: str) -> tuple[dict[str, str], str]:
    """The text of each computation by name, and the name of the entry."""
    computations, entry = {}, ""
    for header in _HEADER.finditer(text):
        name = header[2]
        computations[name] = text[header.end() + 1 : text.index("\n}", header.end())]
        entry = name if header[1] else entry
    return computations, entry


def _tally(computations: dict[str, str], entry: str) -> dict[tuple[str, float], float]:
    """Sums over all instructions, as often as they run: FLOPs and operands of collectives."""

    @functools.cache
    def total(name: str) -> dict[tuple[str, float], float]:
        tally: dict[tuple[str, float], float] = defaultdict(float)
        body = computations[name]
        if not _RELEVANT.search(body):
            return tally
        for line in filter(_RELEVANT.search, body.splitlines()):
            for key, value in (*_collective(line, body), *_product(line, body)):
                tally[key] += value
            for called, times in _calls(line):
                for key, value in total(called).items():
                    tally[key] += value * times
            if branches := [total(branch) for branch in _branch_names(line)]:
                for key in {key for branch in branches for key in branch}:
                    tally[key] += max(branch.get(key, 0) for branch in branches)
        return tally

    return dict(total(entry))


def _calls(line: str) -> Iterator[tuple[str, float]]:
    """(computation, how often) that an instruction runs."""
    trips = _TRIPS.search(line)
    is_loop = " while(" in line
    times = (int(trips[1]) if trips else math.nan) if is_loop else 1
    for name in _CALLED.findall(line):
        yield name, times


def _branch_names(line: str) -> list[str]:
    names = [match[1] or match[2] for match in _BRANCHES.finditer(line)]
    return [part.strip(" %") for name in names for part in name.split(",")]


def _collective(line: str, body: str) -> Iterator[tuple[tuple, float]]:
    if "replica_groups=" not in line and "source_target_pairs=" not in line:
        return
    match = _OPCODE.search(line)
    kind = match[1].removesuffix("-start") if match else ""
    if match and kind in _COLLECTIVES:
        sizes = sum(_bytes(_type(_definition(name, body))) for name in _arguments(line, match.end()))
        yield (kind, _group_size(line)), sizes


def _product(line: str, body: str) -> Iterator[tuple[tuple, float]]:
    if " dot(" in line:
        left, _ = _argument_dims(line, " dot(", body)
        contracted = [int(a) for a in _attribute(line, r"lhs_contracting_dims=\{([\d,]*)\}").split(",") if a]
        yield _FLOPS, 2 * math.prod(_dims(_type(line))) * math.prod(left[a] for a in contracted)
    elif " convolution(" in line:
        yield _FLOPS, _convolution(line, body)
    elif " custom-call(" in line and _OPAQUE.search(line):
        yield _FLOPS, math.nan


def _convolution(line: str, body: str) -> int:
    left, right = _argument_dims(line, " convolution(", body)
    out = _dims(_type(line))
    labels = re.split("_|->", _attribute(line, r"dim_labels=(\S+?)[,\s]"))
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", _attribute(line, r"window=\{([^}]*)\}")))
    spatial = [d for d in labels[0] if d.isdigit()]

    def field(name: str, axis: int, default: str) -> int:
        return int(fields[name].split("x")[axis].split("_")[0]) if name in fields else int(default)

    windows = [
        Window(
            size=left[labels[0].index(d)],
            output=out[labels[2].index(d)],
            kernel=right[labels[1].index(d)],
            stride=field("stride", axis, "1"),
            padding=field("pad", axis, "0"),
            input_dilation=field("lhs_dilate", axis, "1"),
            kernel_dilation=field("rhs_dilate", axis, "1"),
        )
        for axis, d in enumerate(spatial)
    ]
    groups, batches = (
        int(_attribute(line, rf"{name}_group_count=(\d+)", "1")) for name in ("feature", "batch")
    )
    return conv_flops(
        windows, left[labels[0].index("f")] // groups, left[labels[0].index("b")] // batches,
        out[labels[2].index("f")],
    )  # fmt: skip


def _attribute(line: str, pattern: str, default: str = "") -> str:
    match = re.search(pattern, line)
    return match[1] if match else default


def _argument_dims(line: str, opcode: str, body: str) -> tuple[list[int], list[int]]:
    left, right = _arguments(line, line.index(opcode) + len(opcode))
    return _dims(_type(_definition(left, body))), _dims(_type(_definition(right, body)))


def _arguments(line: str, start: int) -> list[str]:
    """Names of an instruction's operands; `start` is behind its opening bracket."""
    end = line.find("), ", start)
    return re.findall(r"%([\w.\-]+)", line[start : end if end >= 0 else len(line)])


def _definition(name: str, body: str) -> str:
    """The line of the same computation that defines a name."""
    start = body.index(f"%{name} = ")
    end = body.find("\n", start)
    return body[start : end if end >= 0 else len(body)]


def _type(line: str) -> str:
    """What stands between '=' and the opcode."""
    text = line.split(" = ", 1)[1]
    match = _OPCODE.search(text)
    return text[: match.start()] if match else text


def _dims(text: str) -> list[int]:
    match = _SHAPE.search(text)
    return [int(d) for d in match[2].split(",") if d] if match else []


def _bytes(text: str) -> int:
    """Bytes of a type, of all elements of a tuple."""
    return sum(
        -(-_bits(kind) * math.prod(int(d) for d in dims.split(",") if d) // 8)
        for kind, dims in _SHAPE.findall(text)
    )


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8
    digits = re.match(r"[a-z]+(\d+)", kind)
    return int(digits[1]) if digits else 0  # a token carries nothing


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
