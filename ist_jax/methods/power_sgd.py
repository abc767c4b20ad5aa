"""PowerSGD: data-parallel SGD that sends each gradient as the product of two thin matrices.

    m = gradient + error            of each worker, a matrix [rows, columns]
    p = orthogonal(mean(m q))       all-reduce of [rows, r]
    q = mean(m^T p)                 all-reduce of [columns, r]; the next step begins with it
    error = m - p p^T m             stays with the worker

The optimizer is given p q^T for the mean gradient. A leaf is a matrix of its last axis against the others; of
a stack that a model's `scan` makes, each layer is one. Leaves that would not be less, such as vectors, go as
they are, with the first all-reduce.

The mean of the errors is what p q^T lacks of the mean of m. The paper's errors are m - p q^T: their mean is
the same, but each grows by how its worker differs from the others, which no longer cancels where one is
absent. The paper's step is x - rate (p q^T + momentum); here it is the optimizer's own, as for data-parallel
SGD.

Reference:
  Vogels, Karimireddy, Jaggi, PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization,
  arXiv:1905.13727, 2019.
"""

import math

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax
from jax.extend.core import jaxprs_in_params
from jaxtyping import Array, Float, PyTree

from ist_jax.exchange.layout import AXIS, Shards
from ist_jax.key import Key
from ist_jax.methods import steps
from ist_jax.methods.data_parallel import Averaged, Gradient, averaging
from ist_jax.methods.method import Method, Recipe

OPTIONS = {"power_sgd.rank": Key(2, "r, of the matrices that power_sgd sends", least=1)}


def make(recipe: Recipe) -> Method:
    """The method; the layout has no groups.

    `State.own` is (errors, q): by path [W, ...] of the leaf's form, and [W, columns, r], the same everywhere.
    """
    rank = recipe.options.get("power_sgd.rank", OPTIONS["power_sgd.rank"].default)
    leaves, workers, dtype = recipe.layout.leaves, recipe.layout.workers_per_device, recipe.layout.dtype
    matrices = _matrices(recipe, rank)

    def init(params: Shards) -> tuple[PyTree, PyTree]:
        errors, thin = {}, {}
        for number, (path, shape) in enumerate(matrices.items()):
            key = jax.random.fold_in(jax.random.key(recipe.seed), number)
            first = jax.random.normal(key, (*shape[:-2], shape[-1], rank), dtype)
            errors[path] = jnp.zeros((workers, *leaves[path].shape), dtype)
            thin[path] = jnp.broadcast_to(first, (workers, *first.shape))
        return errors, thin

    def average(own: tuple[PyTree, PyTree], gradient: Gradient, args: steps.PerWorker) -> Averaged:
        errors, thin = own
        grads, told, counts = steps.each_worker(recipe, gradient, args)  # 0 of who does not count
        choose = jax.vmap(jnp.where)  # by worker
        fed = {path: choose(counts, grads[path] + errors[path], grads[path]) for path in matrices}
        fed = {path: x.reshape(workers, *matrices[path]) for path, x in fed.items()}
        small = {path: grads[path].sum(0) for path in leaves if path not in matrices}
        left = {path: x.sum(0) @ thin[path][0] for path, x in fed.items()}
        count, small, left = lax.psum((counts.sum(), small, left), AXIS)
        number = jnp.maximum(count, 1)
        left = {path: jnp.linalg.qr(x / number)[0] for path, x in left.items()}
        right = {path: _transposed(x) @ left[path] for path, x in fed.items()}  # of each worker
        mean = {path: x / number for path, x in small.items()}
        again, lost = {}, {}
        for path, x in lax.psum({path: x.sum(0) for path, x in right.items()}, AXIS).items():
            again[path] = jnp.broadcast_to(x / number, thin[path].shape)
            mean[path] = (left[path] @ _transposed(x / number)).reshape(leaves[path].shape)
            error = (fed[path] - left[path] @ _transposed(right[path])).reshape(errors[path].shape)
            lost[path] = choose(counts, error, errors[path])
        return Averaged({path: mean[path] for path in leaves}, (lost, again), told, count)

    return averaging(recipe, average, init)._replace(own_restarts=True)


def _matrices(recipe: Recipe, rank: int) -> dict[str, tuple[int, ...]]:
    """The leaves that are sent as two thin matrices: ([layers,] rows, columns)."""
    found, stacked = {}, _stacked(recipe)
    for path, leaf in recipe.layout.leaves.items():
        layers = leaf.shape[: path in stacked]
        *others, columns = leaf.shape[len(layers) :] or (1,)
        rows = math.prod(others)
        if rank * (rows + columns) < rows * columns:
            found[path] = (*layers, rows, columns)
    return found


def _stacked(recipe: Recipe) -> set[str]:
    """The leaves that the model initialises in a scan, which have its steps for the first axis."""
    key = jax.eval_shape(jax.random.key, 0)
    traced, params = jax.make_jaxpr(recipe.init_params, return_shape=True)(key)
    made = set()
    for eqn in traced.eqns:
        if eqn.primitive.name == "scan":
            (body,) = jaxprs_in_params(eqn.params)
            pairs = zip(eqn.outvars, body.outvars, strict=True)
            made |= {out for out, inner in pairs if out.aval.ndim > inner.aval.ndim}  # type: ignore[attr-defined]
    paths = traverse_util.flatten_dict(params, sep="/")  # in another order than the leaves
    names = jax.tree.leaves(traverse_util.unflatten_dict({p: p for p in paths}, sep="/"))
    return {path for path, var in zip(names, traced.jaxpr.outvars, strict=True) if var in made}


def _transposed(x: Float[Array, "*L a b"]) -> Float[Array, "*L b a"]:
    return x.swapaxes(-1, -2)
