"""IST and its baselines as plain Python loops, written like the papers' pseudocode.

Whole leaves by path, one worker after another, no sharding, no collectives, no scan: the oracle for the
engine. Its steps run once or twice each, so they are compiled without optimisation.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from ist_jax import masking
from ist_jax.exchange.layout import canonical, restore
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


def subnets(recipe, axes, send=lambda x: x, *, keeps=False, few_bits=None):
    """The round of IST; without groups: of local SGD.

    Args:
      recipe: what a worker does.
      axes: unit axes by path.
      send: what becomes of an array on its way.
      keeps: every worker keeps the optimizer's state of the shared leaves.
      few_bits: `FewBits` by which the parameters are sent; None: as they are.

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
        carries = moments is not None and not keeps
        cut_out = few_bits.gather(params, axes, turn) if few_bits else gather(params, turn.draw)
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
        subnets = [subnet for subnet, _ in trained]
        if few_bits:
            params = few_bits.merge(params, axes, turn, cut_out, subnets, heard)
        else:
            params = merge(params, turn.draw, subnets, heard)
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


class FewBits:
    """The exchange of few bits on whole leaves, in NumPy.

    Attributes:
      residual: by path, what the copies of a shared leaf lack.
      unsent: by path [S, ...], what was not sent of a worker's changes of a shared leaf.
    """

    def __init__(self, layout):
        self.layout, self.residual, self.unsent = layout, {}, {}
        for path, leaf in layout.leaves.items():
            if not leaf.unit_axes and self._bits(leaf, layout.bits.gather) < 32:
                self.residual[path] = np.zeros(leaf.shape, layout.dtype)
            long = leaf.row_size >= 16 * layout.num_workers
            lossy = self._bits(leaf, layout.bits.merge) < 32 or (layout.bits.keep < 1 and long)
            if layout.bits.error_feedback and not leaf.unit_axes and lossy:
                self.unsent[path] = np.zeros((layout.num_workers, *leaf.shape), layout.dtype)

    def gather(self, params, axes, turn):
        sent = {}
        for path, x in params.items():
            leaf = self.layout.leaves[path]
            bits = self._bits(leaf, self.layout.bits.gather) if leaf.unit_axes else 32
            units = by_units(np.asarray(x), leaf)
            places = np.arange(units.size, dtype=np.uint32).reshape(units.shape)
            sent[path] = of_units(self._round(path, units, places, bits, 0, turn.index), leaf)
        return [flat(masking.gather(nested(sent), axes, turn.draw, w)) for w in range(len(turn.indices))]

    def merge(self, params, axes, turn, started, trained, heard):
        old = [flat(masking.gather(nested(params), axes, turn.draw, w)) for w in range(len(heard))]
        new, means = [], {}
        for worker in range(len(heard)):
            changes = {}
            for path, x in trained[worker].items():
                x = np.asarray(x - started[worker][path])
                if path in self.unsent:
                    x = x + self.unsent[path][worker]
                sent = self._change(path, x, worker, turn)
                leaf, held = self.layout.leaves[path], {n: a.indices[worker] for n, a in turn.draw.items()}
                sent = np.where(self._largest(leaf, x, held), sent, 0)
                if path in self.unsent and heard[worker]:
                    self.unsent[path][worker] = x - sent
                changes[path] = sent
            kept = old[worker] | self.residual
            new.append(nested({path: kept[path] + x for path, x in changes.items()}))
        before = nested(dict(params) | self.residual)
        merged = flat(masking.merge(before, axes, turn.draw, new, heard))
        for path, lacking in self.residual.items():
            means[path] = params[path]
            if heard.any():
                x, bits = np.asarray(merged[path]), self.layout.bits.gather
                places = np.arange(x.size, dtype=np.uint32).reshape(1, -1)
                sent = self._round(path, x.reshape(1, -1), places, bits, 2, turn.index).reshape(x.shape)
                means[path], self.residual[path] = params[path] + sent, x - sent
            else:
                self.residual[path] = lacking
        return merged | means

    def _change(self, path, x, worker, turn):
        leaf = self.layout.leaves[path]
        bits = self._bits(leaf, self.layout.bits.merge)
        places = np.arange(x.size, dtype=np.uint32).reshape(x.shape)
        if not leaf.unit_axes:
            x, places = x.reshape(1, -1), places.reshape(1, -1)
            return self._round(path, x, places, bits, 1, turn.index, worker).reshape(leaf.shape)
        units, places = by_units(x, leaf), by_units(places, leaf)
        return of_units(self._round(path, units, places, bits, 1, turn.index, worker), leaf)

    def _largest(self, leaf, x, held):
        """Where x is one of the largest that a worker has for an owner, who has a slice of each row.

        Of two unit axes, an owner has a strip of the first. `held`: the worker's units, by group.
        """
        if (axis := leaf.layer_axis) is not None:
            layers = [
                {n: i[layer] if i.ndim > 1 else i for n, i in held.items()} for layer in range(x.shape[axis])
            ]
            each = zip(np.moveaxis(x, axis, 0), layers, strict=True)
            return np.stack([self._largest(leaf.layer, *own) for own in each], axis)
        layout, workers, axes = self.layout, self.layout.num_workers, len(leaf.unit_axes)
        if layout.bits.keep == 1 or (axes < 2 and leaf.row_size < 16 * workers):
            return np.ones(x.shape, bool)
        if axes == 2:
            first, second = leaf.groups
            size = first.strip_slots * second.slots * leaf.row_size
            rows = canonical(x, leaf)
            owner = np.asarray(held[first.name]) // first.strip_size
            owner = np.broadcast_to(owner.reshape(-1, 1, 1), rows.shape)
        else:
            long = -(-leaf.row_size // workers)
            rows = canonical(x, leaf) if axes else x.reshape(1, -1)
            size, owner = len(rows) * long, np.broadcast_to(np.arange(leaf.row_size) // long, rows.shape)
        kept = np.zeros(rows.shape, bool)
        for number in range(workers):
            own = np.flatnonzero(owner == number)
            order = np.argsort(-np.abs(rows.reshape(-1)[own]), kind="stable")
            kept.reshape(-1)[own[order[: math.ceil(layout.bits.keep * size)]]] = True
        return restore(kept, leaf) if axes else kept.reshape(x.shape)

    def _bits(self, leaf, bits):
        units = leaf.groups[0].size if leaf.unit_axes else 1
        units *= 1 if leaf.layer_axis is None else leaf.shape[leaf.layer_axis]
        return bits if np.prod(leaf.shape) // units >= 16 else 32

    def _round(self, path, rows, places, bits, *numbers):
        """What comes of [k, ...], each of the k with a scale of its own."""
        if bits == 32:
            return rows
        key, number = np.zeros(1, np.uint32), list(self.layout.leaves).index(path)
        for x in (self.layout.bits.seed, numbers[0], number, *numbers[1:]):
            key = mixed(key ^ mixed(np.array([int(x)], np.uint32) + np.uint32(0x9E3779B9)))
        return few_bits(rows.astype(np.float32), mixed(key ^ mixed(places)), bits).astype(rows.dtype)


def by_units(x, leaf):
    """[k, ...] of a leaf, of which each of the k has a scale of its own."""
    if leaf.layer_axis is None:
        return canonical(x, leaf)
    return np.concatenate([canonical(layer, leaf.layer) for layer in np.moveaxis(x, leaf.layer_axis, 0)])


def of_units(units, leaf):
    """The inverse."""
    if leaf.layer_axis is None:
        return restore(units, leaf)
    layers = np.split(units, leaf.shape[leaf.layer_axis])
    return np.stack([restore(layer, leaf.layer) for layer in layers], leaf.layer_axis)


def mixed(x):
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def few_bits(rows, random, bits):
    """float32 [k, ...] as it comes from so many bits, by 32 random ones for each number."""
    if bits == 16:
        kept = (rows.view(np.uint32) + (random & np.uint32(0xFFFF))) & np.uint32(0xFFFF0000)
        return kept.view(np.float32)
    most = 2 ** (bits - 1) - 1
    largest = np.abs(rows).reshape(len(rows), -1).max(1).reshape(-1, *[1] * (rows.ndim - 1))
    scale = (largest * np.float32(1 / most)).view(np.uint32) + np.uint32(0xFFFF)
    scale = np.where(largest > 2.0**-100, (scale & np.uint32(0xFFFF0000)).view(np.float32), np.float32(0))
    with np.errstate(divide="ignore"):
        steps = rows * np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    chance = (random >> np.uint32(8)).astype(np.float32) / np.float32(2**24)
    code = np.floor(steps) + (steps - np.floor(steps) > chance)
    return np.clip(code, -most, most).astype(np.float32) * scale


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


def power_sgd(recipe, thin):
    """The round of PowerSGD, as of `data_parallel`.

    Args:
      recipe: what a worker does.
      thin: q by path before the first round, ([layers,] columns, r); the other leaves are sent as they are.
    """
    gradient, update = _gradient(recipe), _update(recipe)
    workers, thin = recipe.layout.num_workers, dict(thin)
    errors = {path: np.zeros((workers, *recipe.layout.leaves[path].shape)) for path in thin}

    def one_round(params, moments, turn):
        healthy = np.ones(workers, bool)
        for i, rate in enumerate(turn.rates):
            sound, mean, following, lost = {}, {}, {}, {}
            for worker, batches in enumerate(turn.indices):
                key = batch_key(recipe, turn, worker, i)
                loss, grads = gradient(params, turn.data, batches[i], key, {})
                healthy[worker] &= is_finite((loss, grads))
                if turn.present[worker] and is_finite((loss, grads)):
                    sound[worker] = {k: g + errors[k][worker] if k in thin else g for k, g in grads.items()}
            for path, x in params.items():
                mean[path] = sum((np.asarray(g[path]) for g in sound.values()), 0 * x) / max(1, len(sound))
                if path in thin:
                    q = thin[path]
                    shape = (*q.shape[:-2], -1, q.shape[-2])
                    p, _ = np.linalg.qr(mean[path].reshape(shape) @ q)
                    following[path] = mean[path].reshape(shape).swapaxes(-1, -2) @ p
                    project = lambda m, p=p, s=shape: p @ (p.swapaxes(-1, -2) @ m.reshape(s))  # noqa: E731
                    mean[path] = project(mean[path]).reshape(x.shape)
                    for worker, grads in sound.items():
                        m = np.asarray(grads[path])
                        lost[worker, path] = m - project(m).reshape(x.shape)
            stepped = update(params, moments, mean, rate)
            healthy &= is_finite(stepped)
            if sound and is_finite(stepped):
                params, moments = stepped
                thin.update(following)
                for (worker, path), x in lost.items():
                    errors[path][worker] = x
        return params, moments, healthy

    one_round.errors = errors
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
