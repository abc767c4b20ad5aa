"""What a method of training is: how its state starts, what a round does, and how the state is scored.

A method is a value of plain functions. Each is per device, with collectives over `layout.AXIS`, and holds no
program, no clock and no count of bytes: the runtime compiles, times, meters and traces every phase by its
name, and waits between them. A factory makes it from a `Recipe`:

    def make(recipe: Recipe) -> Method: ...

and is named in the table of `methods`, or given as `--config.method=FILE.py:NAME`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import optax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ist_jax.data import Split
from ist_jax.exchange import wire
from ist_jax.exchange.layout import AXIS, Layout, Shapes, Shards
from ist_jax.key import Options
from ist_jax.masking import Params
from ist_jax.methods.outer import Outer
from ist_jax.partition import Draw

Gates = Mapping[str, Bool[Array, "*W n"]]  # False in empty slots, by group
Losses = tuple[Float[Array, ""], Float[Array, ""]]  # mean loss, mean of the task's first score


class Turn(NamedTuple):
    """The only inputs of a round; on a device as `AXES` says.

    Attributes:
      draw: by group, who holds which unit: `partition.Assignment`s of int32 and bool [S, n], or
        [S, L, n] where every layer has a draw of its own.
      gates: bool [W, n] or [W, L, n] by group, only of groups in which a worker may have empty slots.
      present: bool [W], the workers that take part in the round; nobody hears of the others.
      data: the training set on this device, or what a round needs of it.
      indices: int32 [W, l, B], the examples of each batch.
      rates: float32 [l], learning rates.
      index: int scalar, the round, counted from 0.
    """

    draw: Draw
    gates: Gates
    present: Bool[Array, " W"]
    data: Split
    indices: Int[Array, "W l B"]
    rates: Float[Array, " l"]
    index: Int[Array, ""]  # type: ignore[assignment]  # a tuple has a method of the name


# 0: a slice per device; None: the same everywhere
AXES = Turn(None, 0, 0, 0, 0, None, None)  # type: ignore[arg-type]


class State(NamedTuple):
    """What is kept between rounds, by what happens to it.

    Attributes:
      params: this device's shards of the parameters.
      travels: moments that go out and come back with their parameters; a pytree with `Shards` for nodes.
        Scalars, such as a count of steps, stand in the tree that they belong to.
      stays: what the owner of a slice keeps and never sends; such a pytree too.
      own: what a worker keeps from round to round: arrays [W, ...].
    """

    params: Shards
    travels: PyTree = ()
    stays: PyTree = ()
    own: PyTree = ()


class Told(NamedTuple):
    """What is heard of each worker of a device, [W]: means over the steps, and whether all was finite.

    The score is the task's first; 0 where it has none.
    """

    loss: Float[Array, " W"]
    score: Float[Array, " W"]
    healthy: Bool[Array, " W"]


# names of other times in records and figures
RESERVED = {"compile", "enter", "evaluate", "rest", "round", "total"}
Phase = Callable[[State, PyTree, Turn], PyTree]


class Method(NamedTuple):
    """What a round does, as a value.

    Attributes:
      init: this device's shards of the parameters -> the state before the first round.
      phases: by name, in order: (state, value, turn) -> value, where the first value is None; the last phase
        returns (state, `Told`). One called 'local' is the computing, as modelled times take it.
      score: (state, evaluation batches [n, B, ...]) -> sums [n, k], as `runtime.scoring` adds them up.
      own_restarts: where the number of workers changes, what they keep is that of `init` again; else such a
        run cannot go on.
    """

    init: Callable[[Shards], State]
    phases: Mapping[str, Phase]
    score: Callable[[State, Split], Float[Array, "n k"]]
    own_restarts: bool = False


class Policy(NamedTuple):
    """What becomes of the optimizer's state between rounds.

    Attributes:
      init: (layout, tx, params) -> (what travels with the parameters, what each worker keeps, [W, ...]).
      start: (layout, tx, params, travels, own) -> a worker's optimizer state at the start of a round.
      end: its state after the round -> (what travels, what it keeps); the rest is made anew in every round.
      transform: (layout, tx) -> the optimizer of such a state.
    """

    init: Callable[[Layout, optax.GradientTransformation, Shards], tuple[PyTree, PyTree]]
    start: Callable[[Layout, optax.GradientTransformation, Shards, PyTree, PyTree], PyTree]
    end: Callable[[PyTree], tuple[PyTree, PyTree]]
    transform: Callable[[Layout, optax.GradientTransformation], optax.GradientTransformation] = (
        lambda layout, tx: tx
    )


class Recipe(NamedTuple):
    """What a method is made from.

    Attributes:
      layout: how the model is sharded, and its units.
      tx: the optimizer; what it returns, times the learning rate, is added to the parameters.
      loss_fn: (flat params, inputs, labels, gates or None, key) -> (mean loss, mean of the first score); the
        key is for what is random in the model and the loss.
      batch_fn: (data, indices [B], key) -> (inputs, labels).
      score_fn: (shards of the parameters, evaluation batches) -> sums, the `Method.score` of one model.
      score_members: (flat parameters of whole nets, one of each worker, [W, ...]; evaluation batches) ->
        sums, the score of them all together and of each by itself.
      init_params: key -> the model's fresh parameters (nested), for methods with more than one model.
      policy: of the optimizer's state.
      outer: what becomes of the means of a merge; None: they are taken as they are.
      seed: of the workers' keys.
      vmapped: a device's workers train together by `vmap` instead of one after another.
      options: values of the method's own keys, by whole names.
    """

    layout: Layout
    tx: optax.GradientTransformation
    loss_fn: Callable[[Shards, PyTree, PyTree, Gates | None, Key[Array, ""]], Losses]
    batch_fn: Callable[[Split, Int[Array, " B"], Key[Array, ""]], tuple[PyTree, PyTree]]
    score_fn: Callable[[Shards, Split], Float[Array, "n k"]]
    score_members: Callable[[Shards, Split], Float[Array, "n k"]]
    init_params: Callable[[Key[Array, ""]], Params]
    policy: Policy
    outer: Outer | None = None
    seed: int = 0
    vmapped: bool = False
    options: Options = MappingProxyType({})


class TracedPhase(NamedTuple):
    """A phase on one device, before any compiler has seen it.

    Attributes:
      jaxpr: closed, of (state, value, turn).
      inputs: shapes of (state, value, turn).
      result: shapes of what it returns.
      parts: of the exchanges in it.
    """

    jaxpr: ClosedJaxpr
    inputs: tuple[State, PyTree, Turn]
    result: PyTree
    parts: list[wire.Part]


def trace_init(method: Method, shards: Shapes, num_devices: int) -> tuple[ClosedJaxpr, State]:
    """The start of the state on one device, from shapes of the parameters' shards; nothing is compiled."""
    return jax.make_jaxpr(method.init, axis_env=[(AXIS, num_devices)], return_shape=True)(shards)


def trace_score(
    method: Method, state: State, batches: Split, num_devices: int
) -> tuple[ClosedJaxpr, jax.ShapeDtypeStruct]:
    """The score on one device, from shapes, and the shape of its sums; nothing is compiled."""
    return jax.make_jaxpr(method.score, axis_env=[(AXIS, num_devices)], return_shape=True)(state, batches)


def replay(jaxpr: ClosedJaxpr, result: PyTree) -> Callable[..., PyTree]:
    """A traced function again, without running its Python code: a trace takes seconds for a large model.

    Args:
      jaxpr: of the function.
      result: shapes of what it returns.
    """
    run, structure = jaxpr_as_fun(jaxpr), jax.tree.structure(result)
    return lambda *args: jax.tree.unflatten(structure, run(*jax.tree.leaves(args)))


def trace(method: Method, state: State, turn: Turn, num_devices: int) -> dict[str, TracedPhase]:
    """The phases of a round, chained by their shapes; nothing is compiled, no array is made.

    Args:
      method: of the round.
      state: arrays or shapes of one device.
      turn: the same.
      num_devices: D.

    Raises:
      ValueError: there is no phase, one has a name that is taken, or the last one returns something else.
    """
    if taken := RESERVED & method.phases.keys():
        raise ValueError(f"a phase must not be called {min(taken)!r}: times are recorded under that name")
    if not method.phases:
        raise ValueError("a method needs at least one phase")
    traced, value = {}, None
    for name, phase in method.phases.items():
        make = jax.make_jaxpr(phase, axis_env=[(AXIS, num_devices)], return_shape=True)
        with wire.noting() as parts:
            jaxpr, result = make(state, value, turn)
        traced[name] = TracedPhase(jaxpr, (state, value, turn), result, parts)
        value = result
    pair = value if isinstance(value, tuple) and len(value) == 2 else (None, None)
    if not isinstance(pair[1], Told) or describe(pair[0]) != describe(state):
        raise ValueError(
            f"the last phase, {name!r}, must return (state, Told), the state with the structure, shapes and "
            "dtypes that it had"
        )
    return traced


def describe(tree: PyTree) -> tuple[object, ...]:
    """The structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, *((x.shape, x.dtype) for x in leaves)
