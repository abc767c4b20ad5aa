"""IST and its baselines as plain Python loops, written like the papers' pseudocode.

Whole leaves by path, one worker after another, no sharding, no collectives, no scan: the oracle for the
engine. Its steps run once or twice each, so they are compiled without optimisation.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from ist_jax import masking
from ist_jax.partition import Assignment, as_blocks

plainly = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def nested(params):
    return traverse_util.unflatten_dict(params, sep="/")


def of_all_workers(turn):
    """What a round is given, with axes [S, ...] in place of [D, W, ...]."""
    first, join = (lambda x: np.asarray(x)[0]), (lambda x: np.asarray(x).reshape(-1, *x.shape[2:]))
    return turn._replace(
        present=join(turn.present), data=jax.tree.map(first, turn.data), indices=join(turn.indices)
    )


def subnets(recipe, axes, send=lambda x: x, *, keeps=False):
    """The round of IST; without groups: of local SGD.

    Args:
      recipe: what a worker does.
      axes: unit axes by path.
      send: what becomes of an array on its way.
      keeps: every worker keeps the optimizer's state of the shared leaves.

    Returns:
      (params, moments, turn) -> (params, moments, healthy [S]): whole leaves by path; the optimizer's state
      of them, which is cut out, sent and merged like them, or None: it starts anew; or, by worker, that of
      the shared leaves; `of_all_workers`.
    """
    groups = recipe.layout.groups
    axes = {
        path: tuple(along if along and as_blocks(along).name in groups else None for along in names)
        for path, names in axes.items()
    }
    shared = [path for path, names in axes.items() if not any(names)]
    dealt = [path for path in axes if path not in shared]
    parts = [shared, dealt] if keeps else [list(axes)]  # leaves with an optimizer to themselves
    workers = range(recipe.layout.num_workers)
    gradient, update = _gradient(recipe), _update(recipe)

    @plainly
    def gather(tree, draw):
        sent = nested({path: x if path in shared else send(x) for path, x in tree.items()})
        return [flat(masking.gather(sent, axes, draw, worker)) for worker in workers]

    @plainly
    def merge(tree, draw, trained, healthy):
        sent = [nested(jax.tree.map(send, subnet)) for subnet in trained]
        merged = flat(masking.merge(nested(tree), axes, draw, sent, healthy))
        means = {path: jnp.where(healthy.any(), send(merged[path]), tree[path]) for path in shared}
        return merged | means  # which are sent as well

    @plainly
    def clear(subnet, gates):  # empty slots are no parameters
        filled = {name: gates.get(name, jnp.ones(g.shape[1:], bool)) for name, g in groups.items()}
        slots = {n: jnp.where(g, jnp.arange(g.shape[-1]), g.shape[-1]) for n, g in filled.items()}
        held = {name: Assignment(slots[name][None], gate[None]) for name, gate in filled.items()}
        masks = flat(masking.masks(nested(subnet), axes, held, 0))
        return {path: jnp.where(masks[path], x, 0) for path, x in subnet.items()}

    def one_round(params, moments, turn):
        cut_out, carries = gather(params, turn.draw), moments is not None and not keeps
        if carries:
            carried = _each_tree(
                lambda x: gather(x, turn.draw), moments, other=lambda x: [x for _ in workers]
            )
        trained, healthy = [], []
        for worker in workers:  # in parallel, on a cluster
            subnet = cut_out[worker]
            states = [recipe.tx.init({path: subnet[path] for path in part}) for part in parts]
            if keeps:
                states[0] = moments[worker]
            elif carries:
                is_list = lambda x: isinstance(x, list)  # noqa: E731
                states = [jax.tree.map(lambda x, w=worker: x[w], carried, is_leaf=is_list)]
            gates = {n: a.gates[worker] for n, a in turn.draw.items() if not groups[n].even}
            sound = True
            for i, batch in enumerate(turn.indices[worker]):
                loss, grads = gradient(subnet, turn.data, batch, batch_key(recipe, turn, worker, i), gates)
                for number, part in enumerate(parts):
                    own, slopes = ({path: tree[path] for path in part} for tree in (subnet, grads))
                    own, states[number] = update(own, states[number], slopes, turn.rates[i])
                    subnet = subnet | own
                subnet = clear(subnet, gates)
                sound = sound and is_finite(loss)
            sound = sound and is_finite((subnet, () if moments is None else states[0]))
            trained.append((subnet, states[0]))
            healthy.append(sound)
        heard = turn.present & np.array(healthy)
        params = merge(params, turn.draw, [subnet for subnet, _ in trained], heard)
        if keeps:
            moments = [new if heard[w] else moments[w] for w, (_, new) in enumerate(trained)]
        elif carries:
            moments = _each_tree(
                lambda old, *new: merge(old, turn.draw, new, heard),
                moments, *(opt_state for _, opt_state in trained),
                other=lambda old, *new: new[0],
            )  # fmt: skip
        return params, moments, healthy

    return one_round


def outer(old, new, state, held, options):
    """What an outer optimizer makes of a merge: (leaves, state), as the papers write it.

    Args:
      old, new: whole leaves by path, before the round and after the merge.
      state: (m, v, n) by path; zeros at first.
      held: by path and worker, what those hold who were heard, bool.
      options: values of `config.outer`.
    """
    mu, b2, found, after = options["momentum"], options["beta2"], {}, {}
    for path, x in old.items():
        holders, delta, (m, v, n) = sum(mask.astype(int) for mask in held[path]), new[path] - x, state[path]
        rate = options["learning_rate"] * (holders / len(held[path])) ** options["by_holders"]
        if options["name"] == "adam":
            m, v, n = mu * m + (1 - mu) * delta, b2 * v + (1 - b2) * delta**2, n + 1
            ahead = m / (1 - mu**n) / (np.sqrt(v / (1 - b2**n)) + 1e-3)
        else:
            m = mu * m + delta
            ahead = mu * m + delta if options["name"] == "nesterov" else m
        found[path] = np.where(holders, x + rate * ahead, x)
        after[path] = [np.where(holders, a, b) for a, b in zip((m, v, n), state[path], strict=True)]
    return found, after


def data_parallel(recipe):
    """The round of data-parallel SGD: l steps on the mean of the workers' gradients; as of `subnets`."""
    gradient, update = _gradient(recipe), _update(recipe)

    def one_round(params, moments, turn):
        healthy = np.ones(recipe.layout.num_workers, bool)
        for i, rate in enumerate(turn.rates):
            sound = []
            for worker, batches in enumerate(turn.indices):
                key = batch_key(recipe, turn, worker, i)
                loss, grads = gradient(params, turn.data, batches[i], key, {})
                healthy[worker] &= is_finite((loss, grads))
                if turn.present[worker] and is_finite((loss, grads)):
                    sound.append(grads)
            mean = {k: sum((g[k] for g in sound), 0 * x) / max(1, len(sound)) for k, x in params.items()}
            stepped = update(params, moments, mean, rate)
            healthy &= is_finite(stepped)
            if sound and is_finite(stepped):
                params, moments = stepped
        return params, moments, healthy

    return one_round


def ensemble(recipe):
    """The round of nets that are never merged: (params by worker, moments by worker, turn) -> the same."""
    gradient, update = _gradient(recipe), _update(recipe)

    def one_round(params, moments, turn):
        nets, states, healthy = list(params), list(moments), []
        for worker, batches in enumerate(turn.indices):
            net, state, sound = params[worker], moments[worker], True
            for i, rate in enumerate(turn.rates):
                loss, grads = gradient(net, turn.data, batches[i], batch_key(recipe, turn, worker, i), {})
                net, state = update(net, state, grads, rate)
                sound = sound and is_finite(loss)
            healthy.append(sound and is_finite((net, state)))
            if turn.present[worker] and healthy[worker]:
                nets[worker], states[worker] = net, state
        return nets, states, healthy

    return one_round


def batch_key(recipe, turn, worker, step):
    """A function of the seed, the round, the worker and the step alone."""
    key = jax.random.fold_in(jax.random.key(recipe.seed), turn.index)
    return jax.random.fold_in(jax.random.fold_in(key, worker), step)


def _gradient(recipe):
    @plainly
    def gradient(params, data, batch, key, gates):
        inputs, labels = recipe.batch_fn(data, batch, key)
        both = jax.value_and_grad(recipe.loss_fn, has_aux=True)
        (loss, _), grads = both(params, inputs, labels, gates or None, key)
        return loss, grads

    return gradient


def _update(recipe):
    @plainly
    def update(params, opt_state, grads, rate):
        updates, opt_state = recipe.tx.update(grads, opt_state, params)
        return {k: params[k] + rate * updates[k] for k in params}, opt_state

    return update


def _each_tree(fn, *states, other):
    """`fn` of the trees of leaves by path in optimizer states, `other` of what else is in them."""
    is_tree = lambda x: isinstance(x, dict)  # noqa: E731
    return jax.tree.map(lambda x, *xs: (fn if is_tree(x) else other)(x, *xs), *states, is_leaf=is_tree)


def is_finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def train_plainly(loss_fn, params, batches, learning_rate, momentum, weight_decay):
    """Ordinary SGD with optax's own `sgd`, on nested parameters."""
    tx = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum))
    opt_state = tx.init(params)
    gradient = plainly(jax.grad(lambda p, x, y: loss_fn(p, x, y)[0]))
    for inputs, labels in batches:
        updates, opt_state = tx.update(gradient(params, inputs, labels), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def max_difference(a, b):
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(
        jax.tree.leaves(a), jax.tree.leaves(b), strict=True))  # fmt: skip
