"""IST and its baselines as plain Python loops, written like the papers' pseudocode.

Whole pytrees, one worker after another, no sharding, no collectives, no scan: the oracle for the engine.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from ist_jax import deals, masking, partition


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def nested(params):
    return traverse_util.unflatten_dict(params, sep="/")


def worker_key(seed, round_index, worker):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), round_index), worker)


def sgd_step(recipe, params, opt_state, inputs, labels, learning_rate, gates=None):
    grads = jax.grad(lambda p: recipe.loss_fn(p, inputs, labels, gates)[0])(params)
    updates, opt_state = recipe.tx.update(grads, opt_state, params)
    return {k: params[k] - learning_rate * updates[k] for k in params}, opt_state


def ist_round(recipe, params, axes, groups, data, indices, learning_rates, seed, round_index, trace=None):
    """One round of IST; `groups` empty: of local SGD.

    Momentum starts at zero, or, where `trace` (shaped like the parameters) is given, is cut out, merged and
    returned like them.
    """
    assignment = partition.draw(seed, round_index, groups, deals.random)
    axes = {path: tuple(n if n in groups else None for n in names) for path, names in axes.items()}
    step = jax.jit(lambda *args: sgd_step(recipe, *args))
    gather = jax.jit(lambda p, a, w: masking.gather(p, axes, a, w), static_argnums=2)
    subnets, traces = [], []
    for worker in range(len(indices)):  # in parallel, on a cluster
        subnet = flat(gather(params, assignment, worker))
        opt_state = recipe.tx.init(subnet)
        if trace is not None:
            treedef = jax.tree.structure(opt_state, is_leaf=lambda x: isinstance(x, dict))
            opt_state = jax.tree.unflatten(treedef, [flat(gather(trace, assignment, worker))])
        gates = {n: jnp.asarray(a.gates[worker]) for n, a in assignment.items() if not groups[n].even}
        key = worker_key(seed, round_index, worker)
        for i, batch in enumerate(indices[worker]):
            inputs, labels = recipe.batch_fn(data, batch, jax.random.fold_in(key, i))
            subnet, opt_state = step(subnet, opt_state, inputs, labels, learning_rates[i], gates or None)
            for path, names in axes.items():  # empty slots are no parameters
                for axis, name in enumerate(names):
                    if name in gates:
                        others = [a for a in range(len(names)) if a != axis]
                        subnet[path] = jnp.where(jnp.expand_dims(gates[name], others), subnet[path], 0)
        subnets.append(nested(subnet))
        if trace is not None:
            (own,) = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, dict))
            traces.append(nested(own))
    merge = jax.jit(lambda p, a, s: masking.merge(p, axes, a, s))
    merged = merge(params, assignment, subnets)
    return merged if trace is None else (merged, merge(trace, assignment, traces))


def data_parallel_round(recipe, params, opt_state, data, indices, learning_rates, seed, round_index):
    """l steps on the mean of the workers' gradients."""
    params = flat(params)
    grad = jax.jit(lambda p, x, y: jax.grad(lambda p: recipe.loss_fn(p, x, y, None)[0])(p))
    for i, learning_rate in enumerate(learning_rates):
        grads = []
        for worker in range(len(indices)):
            key = jax.random.fold_in(worker_key(seed, round_index, worker), i)
            grads.append(grad(params, *recipe.batch_fn(data, indices[worker, i], key)))
        mean = {k: sum(g[k] for g in grads) / len(grads) for k in params}
        updates, opt_state = recipe.tx.update(mean, opt_state, params)
        params = {k: params[k] - learning_rate * updates[k] for k in params}
    return nested(params), opt_state


def train_plainly(loss_fn, params, batches, learning_rate, momentum, weight_decay):
    """Ordinary SGD with optax's own `sgd`, on nested parameters."""
    tx = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum))
    opt_state = tx.init(params)
    for inputs, labels in batches:
        grads = jax.grad(lambda p, x, y: loss_fn(p, x, y)[0])(params, inputs, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def max_difference(a, b):
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(
        jax.tree.leaves(a), jax.tree.leaves(b), strict=True))  # fmt: skip
