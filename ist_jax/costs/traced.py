"""FLOPs and bytes sent, from a function's trace alone: nothing is compiled, no array is made.

FLOPs are the multiplications and additions of matrix products and convolutions, which are nearly all of
a net's; not normalisation, activations or the update. Products with the zeros of padding and dilation are
left out, as XLA's own count does. The gradient by either factor of a product costs what the product cost, and
is there where that factor depends on a parameter: so the forward pass tells the whole step, and the count is
that of ordinary backpropagation, whatever a backend makes of it.

Bytes are those of the collectives that stand in the trace; a compiler may drop or merge some. In both, loops
count as often as they run, and of a conditional the dearest branch.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params
from jax.lax import ConvDimensionNumbers
from jaxtyping import PyTree

Lists = Sequence[Sequence[int]]
_KINDS = {
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_to_all": "all-to-all",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "ppermute": "collective-permute",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "reduce_scatter": "reduce-scatter",
}
_SILENT = ("axis_index", "pvary")  # primitives with a named axis that send nothing


class Collective(NamedTuple):
    """A collective of a traced function.

    Attributes:
      kind: as in optimised HLO: 'all-to-all', 'all-gather', 'all-reduce', 'reduce-scatter' or
        'collective-permute'.
      devices: that take part.
      runs: how often it runs.
      operand: bytes of a device's operands, of all of its runs together.
      floats: those of them that are floating-point numbers, the only ones that papers count.
      joined: goes with the one before, of the same kind: neither needs what the other gives.
      scope: the `jax.named_scope`s around it, 'outer/inner'; 'jvp(...)' and the like in derivatives.
    """

    kind: str
    devices: int
    runs: float
    operand: float
    floats: float
    joined: bool
    scope: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends in it, and receives."""
        return sent(self.kind, self.operand, self.devices)

    @property
    def messages(self) -> float:
        """That a device sends one after another, in all of its runs; where it is joined none of its own."""
        return 0 if self.joined else self.runs * messages(self.kind, self.devices)


def collectives_of(jaxpr: ClosedJaxpr, num_devices: int) -> list[Collective]:
    """The collectives of a traced per-device function that send anything: none on one device.

    Args:
      jaxpr: closed, as from `jax.make_jaxpr(fn, axis_env=[(axis_name, num_devices)])`.
      num_devices: D, of the only named axis.

    Raises:
      ValueError: a collective stands in a `while` loop, so nobody knows how often it runs, or it is of a
        kind whose bytes are not known here.
    """

    def weigh(eqn: JaxprEqn, _: Sequence[bool]) -> float:
        return _collective(eqn, num_devices).sent if _is_collective(eqn) else 0

    result = []
    for cost in _walk(jaxpr.jaxpr, [False] * len(jaxpr.jaxpr.invars), weigh)[0]:
        if math.isnan(cost.times):
            raise ValueError(
                f"{cost.eqn.primitive.name} (scope {cost.scope!r}) runs in a while loop, as often as the "
                "data say; put it into a lax.scan, or a fori_loop with constant bounds"
            )
        once = _collective(cost.eqn, num_devices)
        operand, floats = once.operand * cost.times, once.floats * cost.times
        once = once._replace(operand=operand, floats=floats)
        result.append(once._replace(runs=cost.times, joined=cost.joined, scope=cost.scope))
    return result


def operands(found: Iterable[Collective]) -> dict[tuple[str, float], float]:
    """Bytes of a device's operands by kind and number of devices, as `compiled.Program.operands`."""
    total: dict[tuple[str, float], float] = defaultdict(float)
    for c in found:
        total[c.kind, c.devices] += c.operand
    return total


def sent(kind: str, operand: float, devices: float) -> float:
    """Bytes that a device sends in a collective over D devices, and receives.

    Args:
      kind: 'all-to-all', 'all-gather', 'all-reduce' (a ring), 'reduce-scatter' or 'collective-permute'.
      operand: bytes of the device's operand.
      devices: D.
    """
    parts = {"all-gather": devices, "all-reduce": 2, "collective-permute": devices / max(1, devices - 1)}
    return operand * parts.get(kind, 1) * (devices - 1) / devices


def messages(kind: str, devices: int) -> int:
    """Messages that a device sends in one run of a collective over D devices, one after another.

    An all-to-all sends one to each of the D - 1 others. The ring of an all-gather or of a reduce-scatter has
    D - 1 steps, that of an all-reduce both of them, 2 (D - 1); a collective-permute sends one. Of collectives
    that are joined, as those of all leaves' gradients, one counts: they can be sent together.

    Args:
      kind: as for `sent`.
      devices: D.
    """
    return {"all-reduce": 2 * (devices - 1), "collective-permute": 1}.get(kind, devices - 1)


def _aval(atom: Var | Literal) -> ShapedArray:
    """Shape and dtype."""
    return atom.aval  # type: ignore[return-value]  # no other kind has operands


def _is_collective(eqn: JaxprEqn) -> bool:
    axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    return any(isinstance(axis, str) for axis in jax.tree.leaves(axes)) and eqn.primitive.name not in _SILENT


def _collective(eqn: JaxprEqn, num_devices: int) -> Collective:
    """One run of a collective; its scope is left to the caller."""
    if eqn.primitive.name not in _KINDS:
        raise ValueError(f"how much {eqn.primitive.name} sends is not known; known are {', '.join(_KINDS)}")
    groups = eqn.params.get("axis_index_groups")
    avals = [_aval(atom) for atom in eqn.invars]
    sizes = [aval.size * aval.dtype.itemsize for aval in avals]
    floats = sum(s for s, aval in zip(sizes, avals, strict=True) if jnp.issubdtype(aval.dtype, jnp.floating))
    devices = len(groups[0]) if groups else num_devices
    return Collective(_KINDS[eqn.primitive.name], devices, 1, sum(sizes), floats, joined=False, scope="")


# --- FLOPs ----------------------------------------------------------------------------------------


def step_flops(loss_fn: Callable[..., PyTree], params: PyTree, *args: PyTree) -> float:
    """FLOPs of the loss of a batch and its gradient by the parameters.

    Args:
      loss_fn: (params, *args) -> anything; as for `jax.value_and_grad`.
      params: pytree of arrays or `jax.ShapeDtypeStruct`s.
      *args: pytrees of the same.

    Returns:
      A whole number; NaN where a loop runs so often as the data say.
    """
    traced = jax.make_jaxpr(loss_fn)(params, *args)
    trained = len(jax.tree.leaves(params))
    found, _ = _walk(traced.jaxpr, [i < trained for i in range(len(traced.jaxpr.invars))], _products)
    return sum(cost.once * cost.times for cost in found)


def _products(eqn: JaxprEqn, trained: Sequence[bool]) -> int:
    """FLOPs of a product, forward and backward."""
    name = eqn.primitive.name
    once = _dot(eqn) if name == "dot_general" else _conv(eqn) if name == "conv_general_dilated" else 0
    return once * (1 + sum(trained))


def _dot(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = _aval(eqn.invars[0]).shape
    return 2 * math.prod(_aval(eqn.outvars[0]).shape) * math.prod(left[axis] for axis in contracted)


def _conv(eqn: JaxprEqn) -> int:
    params = eqn.params
    before = [pad for pad, _ in params["padding"]]
    axes = zip(params["window_strides"], before, params["lhs_dilation"], params["rhs_dilation"], strict=True)
    shapes = [_aval(atom).shape for atom in (*eqn.invars, *eqn.outvars)]
    groups = params["feature_group_count"] * params["batch_group_count"]
    return conv_flops(shapes, params["dimension_numbers"], list(axes), groups)


def conv_flops(shapes: Lists, numbers: ConvDimensionNumbers, axes: Lists, groups: int) -> int:
    """FLOPs of a convolution, products with the zeros of padding and dilation left out.

    Args:
      shapes: of the input, the kernel and the output.
      numbers: where their axes are.
      axes: of each spatial axis (stride, padding before the first element, dilation of the input, of the
        kernel).
      groups: feature groups x batch groups.
    """
    left, right, out = ([shape[axis] for axis in spec] for shape, spec in zip(shapes, numbers, strict=True))
    products = 1  # pairs of an output and a kernel element that meet an element of the input, not a zero
    for size, window, output, (stride, padding, dilation, kernel_dilation) in zip(
        left[2:], right[2:], out[2:], axes, strict=True
    ):
        place = stride * np.arange(output)[:, None] + kernel_dilation * np.arange(window) - padding
        inside = (place >= 0) & (place <= (size - 1) * dilation)
        products *= int((inside & (place % dilation == 0)).sum())
    return 2 * left[0] * left[1] // groups * out[1] * products


# --- one walk over a trace --------------------------------------------------------------------------


class _Cost(NamedTuple):
    """An equation that costs something."""

    eqn: JaxprEqn
    once: float
    times: float  # NaN: as often as the data say
    scope: str
    joined: bool  # with the one before it, of the same primitive: neither needs what the other gives


# (equation, which arguments depend on a parameter) -> cost
_Weigh = Callable[[JaxprEqn, Sequence[bool]], float]
_Walked = tuple[list[_Cost], list[bool]]


def _walk(jaxpr: Jaxpr, trained: Sequence[bool], weigh: _Weigh) -> _Walked:
    """(what costs something, which results depend on a parameter), from which arguments do."""
    known = {var for var, flag in zip(jaxpr.invars, trained, strict=True) if flag}
    found: list[_Cost] = []
    last = None  # the primitive of the latest costs
    given: set[Var] = set()  # what depends on what they gave

    def depends(atom: Var | Literal) -> bool:
        return not hasattr(atom, "val") and atom in known

    for eqn in jaxpr.eqns:
        costs, results = _enter(eqn, [depends(atom) for atom in eqn.invars], weigh)
        own = eqn.primitive if costs and costs[0].eqn is eqn else None
        needs = any(not hasattr(atom, "val") and atom in given for atom in eqn.invars)
        joined = own is not None and own is last and not needs
        for cost in costs:  # an inner trace does not know the scopes around it
            scope = f"{eqn.source_info.name_stack}/{cost.scope}".strip("/")
            found.append(cost._replace(scope=scope, joined=joined or cost.joined))
        if costs and not joined:
            last, given = own, set()
        if costs or needs:
            given |= set(eqn.outvars)
        known |= {var for var, flag in zip(eqn.outvars, results, strict=True) if flag}
    return found, [depends(atom) for atom in jaxpr.outvars]


def _enter(eqn: JaxprEqn, flags: list[bool], weigh: _Weigh) -> _Walked:
    """`_walk` of an equation."""
    name, every = eqn.primitive.name, [any(flags)] * len(eqn.outvars)
    if once := weigh(eqn, flags):
        return [_Cost(eqn, once, 1, "", joined=False)], every
    bodies = list(jaxprs_in_params(eqn.params))
    if name == "scan":
        return _enter_scan(eqn, bodies[0], flags, weigh)
    flags = flags[1:] if name == "cond" else flags
    inner = [
        _walk(body, flags if len(flags) == len(body.invars) else [any(flags)] * len(body.invars), weigh)
        for body in bodies
    ]
    if name == "cond":
        return max((costs for costs, _ in inner), key=_total), every
    times = math.nan if name == "while" else 1
    found = [cost._replace(times=cost.times * times) for costs, _ in inner for cost in costs]
    is_call = len(inner) == 1 and len(inner[0][1]) == len(every)
    return found, inner[0][1] if is_call else every


def _enter_scan(eqn: JaxprEqn, body: Jaxpr, flags: list[bool], weigh: _Weigh) -> _Walked:
    carry = sum(_same_rank(*pair) for pair in zip(eqn.outvars, body.outvars, strict=True))
    whole = sum(_same_rank(*pair) for pair in zip(eqn.invars, body.invars, strict=True))
    consts = whole - carry  # arguments: constants, what is carried, what is scanned over
    while True:  # until what depends on a parameter after a step does so before it
        found, results = _walk(body, flags, weigh)
        carried = [a or b for a, b in zip(flags[consts:whole], results[:carry], strict=True)]
        if carried == flags[consts:whole]:
            return [cost._replace(times=cost.times * eqn.params["length"]) for cost in found], results
        flags = flags[:consts] + carried + flags[whole:]


def _same_rank(outside: Var | Literal, inside: Var | Literal) -> bool:
    """Whether a variable of a loop is not cut into one piece per step."""
    return _aval(outside).ndim == _aval(inside).ndim


def _total(found: list[_Cost]) -> float:
    """Of a branch; what runs nobody knows how often is dearest."""
    total = sum(cost.once * cost.times for cost in found)
    return math.inf if math.isnan(total) else total
