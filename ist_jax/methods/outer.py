"""The outer optimizer: what the owner of a unit makes of the mean of what came back of it.

The difference of that mean to the value before the round is the delta; the plain round takes it as it is.

    sgd       m <- mu m + delta;  x <- x + eta m
    nesterov  m <- mu m + delta;  x <- x + eta (mu m + delta)
    adam      m and v, means of delta and its square, corrected for their start by the rounds that the unit
              was in;  x <- x + eta m / (sqrt(v) + epsilon)

Moments stay with the owner of a slice and are never sent. What nobody held stays as it was, moments and count
too. A device's shards may be cut differently on other devices, with the same bits: a product is nowhere added
to something without a `where` in between (`_apart`): XLA makes one operation of them in some programs only.

References:
  Wang et al., SlowMo, arXiv:1910.00643, 2019. Douillard et al., DiLoCo, arXiv:2311.08105, 2023.
  Reddi et al., Adaptive Federated Optimization, arXiv:2003.00295, 2020.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ist_jax.exchange.layout import Shards
from ist_jax.key import Options

EPSILON = 1e-3  # of Adam, as Reddi et al. have it
Numbers = Float[Array, "..."]
Moments = tuple[Array, ...]  # of a leaf
Rate = Numbers | float
Step = Callable[[Numbers, Numbers, Moments, Int[Array, "..."], Rate], tuple[Numbers, Moments]]


class Outer(NamedTuple):
    """An outer optimizer.

    Attributes:
      init: this device's shards of the parameters -> its moments, a tuple of trees shaped like them.
      step: (shards before the round, after the merge, moments, healthy holders of the entries by path) ->
        (shards, moments).
    """

    init: Callable[[Shards], PyTree]
    step: Callable[[Shards, Shards, PyTree, Shards], tuple[Shards, PyTree]]


class Rule(NamedTuple):
    """A line of the table.

    Attributes:
      make: (momentum, beta2) -> (dtypes of the moments, None for the parameters'; the step of a leaf).
      rate: the learning rate, where none is set.
    """

    make: Callable[[float, float], tuple[tuple[type | None, ...], Step]]
    rate: float


def momentum(mu: float, _: float, *, nesterov: bool = False) -> tuple[tuple[None, ...], Step]:
    """Heavy-ball or Nesterov's momentum."""

    def step(
        old: Numbers, new: Numbers, moments: Moments, holders: Int[Array, "..."], rate: Rate
    ) -> tuple[Numbers, Moments]:
        held, delta, moved = holders > 0, new - old, new
        if not isinstance(rate, float) or rate != 1:
            moved = moved + _apart((rate - 1) * delta)
        if not mu:
            return jnp.where(held, moved, new), ()
        (before,) = moments
        after = _apart(mu * before) + delta
        moved = moved + _apart(rate * mu * (after if nesterov else before))
        return jnp.where(held, moved, new), (jnp.where(held, after, before),)

    return (None,) if mu else (), step


def adam(b1: float, b2: float) -> tuple[tuple[type | None, ...], Step]:
    """Adam, with a count of rounds for every entry."""
    # where 1 - b^n is 1 in float32; powers come from a table, since XLA's depend on where a number stands
    most = min(math.ceil(18 / -math.log(max(b1, b2, 1e-8))), np.iinfo(np.uint16).max)
    corrections = [1 / (1 - b ** np.arange(1, most + 1)) for b in (b1, b2)]

    def step(
        old: Numbers, new: Numbers, moments: Moments, holders: Int[Array, "..."], rate: Rate
    ) -> tuple[Numbers, Moments]:
        held, delta = holders > 0, new - old
        mean, square, count = moments
        mean = jnp.where(held, mean + _apart((1 - b1) * (delta - mean)), mean)
        square = jnp.where(held, square + _apart((1 - b2) * (_apart(delta * delta) - square)), square)
        count = jnp.where(held, jnp.minimum(count + 1, most), count).astype(count.dtype)
        first, second = (jnp.asarray(c, old.dtype)[jnp.maximum(count, 1) - 1] for c in corrections)
        ahead = rate * (first * mean / (jnp.sqrt(second * square) + EPSILON))
        return jnp.where(held, old + _apart(ahead), new), (mean, square, count)

    return (None, None, np.uint16), step


def _apart(product: Numbers) -> Numbers:
    """The same number, of which and a sum that it goes into XLA does not make one operation."""
    return jnp.where(product == product, product, 0)


def nesterov(mu: float, b2: float) -> tuple[tuple[None, ...], Step]:
    """Nesterov's momentum."""
    return momentum(mu, b2, nesterov=True)


OUTERS: dict[str, Rule | None] = {
    "none": None,
    "sgd": Rule(momentum, 0.8),
    "nesterov": Rule(nesterov, 0.8),
    "adam": Rule(adam, 0.01),
}


def make(options: Options, num_workers: int) -> Outer | None:
    """The outer optimizer of `config.outer`; None where what comes back is taken as it is.

    Args:
      options: values of `config.outer`.
      num_workers: S.
    """
    if (rule := OUTERS[options["name"]]) is None:
        return None
    eta, power = options["learning_rate"], options["by_holders"]
    eta = rule.rate if eta is None else eta
    dtypes, step = rule.make(options["momentum"], options["beta2"])
    if not dtypes and eta == 1 and not power:  # SGD without momentum
        return None
    rates = eta * (np.arange(num_workers + 1) / num_workers) ** power

    def init(params: Shards) -> PyTree:
        return tuple(jax.tree.map(lambda x, d=d: jnp.zeros(x.shape, d or x.dtype), params) for d in dtypes)

    def step_all(old: Shards, new: Shards, moments: PyTree, holders: Shards) -> tuple[Shards, PyTree]:
        found = {}
        for path, x in new.items():
            rate = jnp.asarray(rates, x.dtype)[holders[path]] if power else float(eta)
            found[path] = step(old[path], x, tuple(m[path] for m in moments), holders[path], rate)
        after = tuple({path: own[i] for path, (_, own) in found.items()} for i in range(len(dtypes)))
        return {path: x for path, (x, _) in found.items()}, after

    return Outer(init, step_all)
