"""FLOPs of a training step, from its trace alone: nothing is compiled, no array is made.

Counted are the multiplications and additions of matrix products and convolutions, which are nearly all of
a net's; not normalisation, activations or the update. Products with the zeros of padding and dilation are
left out, as XLA's own count does. The gradient by either factor of a product costs what the product cost, and
is there where that factor depends on a parameter: so the forward pass tells the whole step, and the count is
that of ordinary backpropagation, whatever a backend makes of it. Loops count as often as they run.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Window(NamedTuple):
    """One spatial axis of a convolution."""

    size: int  # of the input
    output: int
    kernel: int
    stride: int
    padding: int  # before the first element
    input_dilation: int
    kernel_dilation: int

    def products(self) -> int:
        """Pairs of an output and a kernel element that meet an element of the input, not a zero."""
        outputs, kernel = np.arange(self.output)[:, None], np.arange(self.kernel)
        place = outputs * self.stride + kernel * self.kernel_dilation - self.padding
        inside = (place >= 0) & (place <= (self.size - 1) * self.input_dilation)
        return int((inside & (place % self.input_dilation == 0)).sum())


def step_flops(loss_fn: Callable[..., Any], params: Any, *args: Any) -> float:
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
    flops, _ = _count(traced.jaxpr, [i < trained for i in range(len(traced.jaxpr.invars))])
    return flops


def _count(jaxpr: Any, trained: Sequence[bool]) -> tuple[float, list[bool]]:
    """(FLOPs forward and backward, which results depend on a parameter), from which arguments do."""
    known = {var for var, flag in zip(jaxpr.invars, trained, strict=True) if flag}
    total = 0.0

    def depends(atom: Any) -> bool:
        return not hasattr(atom, "val") and atom in known

    for eqn in jaxpr.eqns:
        flags = [depends(atom) for atom in eqn.invars]
        flops, results = _count_equation(eqn, flags)
        total += flops
        known |= {var for var, flag in zip(eqn.outvars, results, strict=True) if flag}
    return total, [depends(atom) for atom in jaxpr.outvars]


def _count_equation(eqn: Any, flags: list[bool]) -> tuple[float, list[bool]]:
    name, params = eqn.primitive.name, eqn.params
    every = [any(flags)] * len(eqn.outvars)
    if name == "dot_general":
        return _dot(eqn) * (1 + sum(flags)), every
    if name == "conv_general_dilated":
        return _conv(eqn) * (1 + sum(flags)), every
    if name == "scan":
        return _count_scan(eqn, flags)
    if name == "while":
        body = params["body_jaxpr"].jaxpr
        flops, _ = _count(body, [any(flags)] * len(body.invars))
        return flops and math.nan, every
    if name == "cond":
        branches = [_count(branch.jaxpr, flags[1:]) for branch in params["branches"]]
        return max(flops for flops, _ in branches), every
    for inner in (params[key] for key in ("jaxpr", "call_jaxpr") if key in params):
        return _count(getattr(inner, "jaxpr", inner), flags)
    return 0.0, every


def _count_scan(eqn: Any, flags: list[bool]) -> tuple[float, list[bool]]:
    body = eqn.params["jaxpr"].jaxpr
    carry = sum(_same_rank(*pair) for pair in zip(eqn.outvars, body.outvars, strict=True))
    whole = sum(_same_rank(*pair) for pair in zip(eqn.invars, body.invars, strict=True))
    consts = whole - carry  # arguments: constants, what is carried, what is scanned over
    while True:  # until what depends on a parameter after a step does so before it
        flops, results = _count(body, flags)
        carried = [a or b for a, b in zip(flags[consts:whole], results[:carry], strict=True)]
        if carried == flags[consts:whole]:
            return flops * eqn.params["length"], results
        flags = flags[:consts] + carried + flags[whole:]


def _same_rank(outside: Any, inside: Any) -> bool:
    """Whether a variable of a loop is not cut into one piece per step."""
    return outside.aval.ndim == inside.aval.ndim


def _dot(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _conv(eqn: Any) -> int:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    left, right, out = (atom.aval.shape for atom in (*eqn.invars, *eqn.outvars))
    windows = [
        Window(
            size=left[numbers.lhs_spec[2 + axis]],
            output=out[numbers.out_spec[2 + axis]],
            kernel=right[numbers.rhs_spec[2 + axis]],
            stride=params["window_strides"][axis],
            padding=params["padding"][axis][0],
            input_dilation=params["lhs_dilation"][axis],
            kernel_dilation=params["rhs_dilation"][axis],
        )
        for axis in range(len(left) - 2)
    ]
    features = left[numbers.lhs_spec[1]] // params["feature_group_count"]
    batch = left[numbers.lhs_spec[0]] // params["batch_group_count"]
    return conv_flops(windows, features, batch, out[numbers.out_spec[1]])


def conv_flops(windows: Sequence[Window], features: int, batch: int, output_features: int) -> int:
    """FLOPs of a convolution.

    Args:
      windows: of the spatial axes.
      features: of the input, per feature group.
      batch: of the input, per batch group.
      output_features: of the output.
    """
    return 2 * features * batch * output_features * math.prod(window.products() for window in windows)
