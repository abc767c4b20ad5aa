"""What a round means, swept over methods, state policies, deals, codecs and ways to place the workers.

Of every case: the round is that of the loops in reference.py, a run that was stopped goes on to the same
bits, a round without a step and one of which nobody is heard leave the state as it was, and the bytes that
are counted in the trace are those of the compiled programs.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from rounds import assert_same_bits, copied, run_all, run_turn, set_up, whole
from test_distributed import finish, launch

from ist_jax import masking, partition
from ist_jax.costs import compiled
from ist_jax.costs.traced import collectives_of, operands
from ist_jax.deals import DEALS
from ist_jax.exchange.codec import NONE, Codec
from ist_jax.exchange.kinds import unit_leaves
from ist_jax.methods import METHODS
from ist_jax.methods.outer import OUTERS
from ist_jax.methods.steps import POLICIES
from ist_jax.models.interface import streamed
from ist_jax.models.vgg import VGG
from ist_jax.runtime import devices
from ist_jax.runtime.programs import restore_state
from ist_jax.workdir import checkpoint, files
from ist_jax.workdir.checkpoint_writer import Writer

ROUNDS = 2
BFLOAT16 = Codec(encode=lambda x: x.astype(jnp.bfloat16), decode=lambda x: x.astype(jnp.float32))


class LSTM(nn.Module):
    """Reads an image from above; the four gates of a unit are columns of fused kernels."""

    hidden: int = 10

    def unit_axes(self):
        fused = partition.Blocks("hidden", outer=4)
        return {
            "input/kernel": (None, fused), "input/bias": (fused,), "recurrent/kernel": ("hidden", fused),
            "head/kernel": ("hidden", None),
        }  # fmt: skip

    def subnet(self, sizes):
        return self.clone(hidden=sizes["hidden"])

    @nn.compact
    def __call__(self, x, gates=None, scale=None):
        read, recur = (
            nn.Dense(4 * self.hidden, name="input"),
            nn.Dense(4 * self.hidden, False, name="recurrent"),
        )
        cell = hidden = jnp.zeros((len(x), self.hidden), x.dtype)
        for rows in jnp.split(x.reshape(len(x), -1), 4, axis=1):
            enter, forget, new, leave = jnp.split(read(rows) + recur(hidden), 4, axis=1)
            cell = nn.sigmoid(forget) * cell + nn.sigmoid(enter) * jnp.tanh(new)
            hidden = nn.sigmoid(leave) * jnp.tanh(cell)
        return nn.Dense(10, name="head")(hidden)


class Layer(nn.Module):
    """Adds what some neurons make of its inputs."""

    hidden: int

    @nn.compact
    def __call__(self, x, gate, scale):
        hidden = nn.sigmoid(nn.Dense(self.hidden, name="up")(x))
        hidden = hidden if gate is None else hidden * gate
        return x + scale * nn.Dense(x.shape[-1], name="down")(hidden), None


class Stack(nn.Module):
    """Scanned layers of neurons, of which a worker has others in each; evaluated with one in memory."""

    hidden: int = 10
    width: int = 12
    fetch: Any = None

    def unit_axes(self):
        each = partition.Each("hidden")
        return {
            "layers/up/kernel": (None, None, each), "layers/up/bias": (None, each),
            "layers/down/kernel": (None, each, None),
        }  # fmt: skip

    def subnet(self, sizes):
        return self.clone(hidden=sizes["hidden"])

    @nn.compact
    def __call__(self, x, gates=None, scale=None):
        gate, factor = (gates or {}).get("hidden"), (scale or {}).get("hidden", 1.0)
        x = nn.Dense(self.width, name="embed")(x.reshape(len(x), -1))
        scanned = nn.scan(
            streamed(Layer, "layers", self.fetch), variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=(nn.broadcast if gate is None else 0, nn.broadcast), length=3,
        )  # fmt: skip
        x, _ = scanned(self.hidden, name="layers")(x, gate, factor)
        return nn.Dense(10, name="head")(x)


class Case(NamedTuple):
    """A run; `place`: workers, devices and, where there are several on one, how they train.

    `bits`: of a gather and of a merge. `outer`: options of `config.outer`, all of them. `ill`: who has a bad
    batch in the last round, and whether it spoils the 'loss' or the last 'update' alone.
    """

    place: tuple
    config: str = "mlp"
    method: str = "ist"
    policy: str = "reset"
    deal: str = "random"
    codec: Codec = NONE
    bits: tuple = (32, 32)
    tx: Any = None
    overrides: Mapping[str, Any] = {}
    ill: tuple[int, str] | None = None
    outer: Mapping[str, Any] | None = None
    dtype: Any = np.float32
    tolerance: float = 2e-4
    model: nn.Module | None = None


CARRY = {"policy": "carry", "tolerance": 2e-5}
EXACT = {"dtype": np.float64, "tolerance": 1e-10}
DATA_PARALLEL = {"method": "data_parallel", "policy": "carry"}
POWER_SGD = {"method": "power_sgd", "policy": "carry"}
ENSEMBLE = {"method": "ensemble"}
NESTEROV = {"name": "nesterov", "learning_rate": 0.7, "momentum": 0.6, "beta2": 0.9, "by_holders": 0.0}
ADAM_OUTSIDE = NESTEROV | {"name": "adam", "learning_rate": 0.02}
SOME = {"participation": 0.6}
FEW = {"exchange.gather_bits": 8, "exchange.merge_bits": 4}
FED_BACK = {"exchange.error_feedback": True}
ADAM = optax.adam(1.0, eps=1e-3)
SOFTMAX = {"dtype": np.float64, "tolerance": 1e-7}  # JAX's attention has one of float32, whatever its inputs
FAST = {"optimizer.learning_rate": 0.02}
ALL = {"partition.channels": "all"}
CASES = {
    "ist": Case((4, 4)),
    "ist uneven": Case((3, 3), **EXACT, policy="carry", overrides={"partition.shares": (3.0, 2.0, 1.0)}),
    "ist rolling": Case((2, 2), **CARRY, deal="rolling"),
    "ist overlap": Case((4, 2, "map"), **CARRY, tx=ADAM, overrides={"partition.min_units": 20}),
    "ist ill": Case((4, 1, "vmap"), **CARRY, deal="fixed", ill=(2, "update")),
    "ist bfloat16": Case((4, 2, "vmap"), **EXACT, codec=BFLOAT16, deal="rolling", overrides=SOME),
    "ist 8 4": Case(
        (4, 2, "vmap"), **EXACT, bits=(8, 4), policy="carry", overrides=SOME | {"partition.min_units": 16}
    ),
    "ist 16 8": Case((3, 3), **EXACT, bits=(16, 8), model=LSTM()),
    "ist 8 16 ill": Case((4, 1, "vmap"), **EXACT, bits=(8, 16), ill=(2, "update")),
    "local_sgd 5 6": Case(
        (4, 2, "map"), **EXACT, method="local_sgd", policy="keep", bits=(5, 6), overrides=SOME
    ),
    "resnet 8 8 outer": Case((2, 1, "map"), "resnet", **EXACT, bits=(8, 8), outer=NESTEROV, policy="keep"),
    "resnet 32 4": Case((2, 2), "resnet", **EXACT, bits=(32, 4)),
    "resnet 8 32": Case((2, 2), "resnet", **EXACT, bits=(8, 32)),
    "ist largest": Case(
        (4, 2, "vmap"), **EXACT, ill=(2, "update"),
        overrides={"exchange.keep": 0.2, "partition.min_units": 16},
    ),
    "resnet 8 largest 4": Case(
        (2, 1, "map"), "resnet", **EXACT, bits=(8, 4), policy="keep",
        overrides=FED_BACK | {"exchange.keep": 0.3},
    ),
    "local_sgd largest": Case(
        (4, 4), **EXACT, method="local_sgd", policy="keep", ill=(1, "update"),
        overrides=SOME | FED_BACK | {"exchange.keep": 0.02},
    ),
    "local_sgd 32 5": Case(
        (4, 2, "map"), **EXACT, method="local_sgd", policy="keep", bits=(32, 5), overrides=SOME | FED_BACK
    ),
    "ist keep": Case((2, 2), "resnet", **EXACT, policy="keep", tx=ADAM),
    "ist outer": Case(
        (3, 3), **EXACT, outer=ADAM_OUTSIDE | {"by_holders": 1.0}, policy="carry", deal="independent",
        overrides=SOME | {"partition.min_units": 16},
    ),
    "ist outer nesterov": Case(
        (4, 2, "vmap"), **EXACT, outer=NESTEROV, deal="fixed", ill=(2, "update")
    ),
    "resnet outer": Case(
        (2, 1, "map"), "resnet", **EXACT, outer=NESTEROV | {"name": "sgd"}, policy="keep", tx=ADAM,
        deal="independent",
    ),
    "local_sgd outer": Case(
        (4, 2, "map"), **EXACT, method="local_sgd", outer=NESTEROV | {"by_holders": 0.5}, overrides=SOME
    ),
    "ist keep fixed": Case((2, 2), policy="keep", deal="fixed", tolerance=2e-5),
    "ist keep rolling": Case((2, 1, "map"), policy="keep", deal="rolling", tolerance=2e-5),
    "local_sgd keep": Case(
        (4, 2, "vmap"), **EXACT, method="local_sgd", policy="keep", tx=ADAM, overrides=SOME, ill=(1, "update")
    ),
    "ist blocks": Case((3, 3), **EXACT, policy="carry", model=LSTM()),
    "ist each": Case(
        (4, 2, "vmap"), **EXACT, policy="carry", model=Stack(),  # 4, 3, 3 and 3 neurons of each layer
        outer=NESTEROV | {"by_holders": 0.5}, ill=(1, "update"),
        overrides={"partition.min_units": 3, "partition.shares": (4.0, 2.0, 2.0, 2.0)},
    ),
    "ist each 8 4": Case(
        (2, 2), **EXACT, bits=(8, 4), model=Stack(width=33), ill=(1, "update"),
        overrides=FED_BACK | {"exchange.keep": 0.4},
    ),
    "ist each 5 16": Case((4, 2, "map"), **EXACT, bits=(5, 16), model=Stack(width=16)),
    "transformer": Case((2, 2), "transformer", **SOFTMAX, policy="carry", tx=ADAM, overrides=FAST),
    "transformer blocks": Case(
        (2, 1, "map"), "transformer", **SOFTMAX, outer=NESTEROV, tx=ADAM,  # of 3 blocks, 2 and 1
        overrides=FAST | {"model.layers": 5, "partition.units": "blocks"},
    ),
    "transformer all": Case(
        (4, 2, "vmap"), "transformer", **SOFTMAX, policy="keep", tx=ADAM, bits=(8, 4),
        overrides=FAST | {"partition.units": "all", "partition.min_units": 1},
    ),
    "channels inner": Case((2, 2), "cnn", **EXACT, overrides={"model.width": 5}),  # 3 and 2, 5 and 5 of each
    "channels all": Case((4, 2, "vmap"), "cnn", **EXACT, policy="carry", overrides=ALL, ill=(1, "update")),
    "channels all overlap": Case(
        (2, 1, "map"), "cnn", **EXACT, outer=NESTEROV,
        overrides=ALL | {"model.width": 5, "partition.min_units": 4},
    ),
    "channels vgg": Case((2, 2), "cnn", **EXACT, policy="keep", model=VGG((6, 6), 1, (7,), 10)),
    "local_sgd": Case((4, 2, "vmap"), **CARRY, method="local_sgd", ill=(0, "loss")),
    "local_sgd absent": Case((4, 1, "map"), method="local_sgd", overrides=SOME),
    "local_sgd bfloat16": Case((3, 3), **EXACT, method="local_sgd", codec=BFLOAT16, policy="carry"),
    "data_parallel": Case((4, 4), **DATA_PARALLEL, overrides=SOME),
    "data_parallel ill": Case((4, 2, "vmap"), **DATA_PARALLEL, tx=ADAM, ill=(3, "update")),
    "data_parallel map": Case((4, 2, "map"), **DATA_PARALLEL, ill=(1, "loss")),
    "power_sgd": Case((4, 2, "vmap"), **EXACT, **POWER_SGD, overrides=SOME, ill=(3, "update")),
    "power_sgd map": Case((4, 2, "map"), **EXACT, **POWER_SGD, tx=ADAM, ill=(1, "loss")),
    "power_sgd resnet": Case((2, 2), "resnet", **POWER_SGD, overrides={"power_sgd.rank": 1}),
    "ensemble": Case((3, 3), **ENSEMBLE, policy="carry"),
    "ensemble ill": Case(
        (4, 2, "vmap"), **EXACT, **ENSEMBLE, tx=ADAM, policy="carry", overrides=SOME, ill=(1, "update")
    ),
    "ensemble blocks": Case(
        (2, 1, "map"), **EXACT, **ENSEMBLE, policy="carry", model=LSTM(), ill=(0, "loss")
    ),
    "resnet": Case(
        (4, 2, "vmap"), "resnet", deal="independent",  # of 5 blocks the workers have 3, 2, 2 and 2
        overrides={
            "model.sections": (6,), "partition.sections": (1,), "partition.shares": (9.0, 2.0, 2.0, 2.0),
            "partition.min_units": 2,
        },
    ),
    "resnet strided": Case(
        (2, 2), "resnet", policy="carry",
        overrides={"model.sections": (1, 2), "partition.deal_strided": True},
    ),
}  # fmt: skip

SLOW = (
    "ist uneven",
    "ist overlap",
    "resnet",
    "resnet strided",
    "data_parallel map",
    "local_sgd bfloat16",
    "resnet outer",
    "ensemble blocks",
    "ist keep fixed",
    "ist 16 8",
    "ist 8 16 ill",
    "resnet 8 8 outer",
    "resnet 32 4",
    "resnet 8 32",
    "ist largest",
    "ist each 5 16",
    "ist each 8 4",
    "channels inner",
    "channels all",
    "channels all overlap",
    "channels vgg",
    "resnet 8 largest 4",
    "power_sgd map",
    "power_sgd resnet",
    "local_sgd 32 5",
    "ist rolling",
    "local_sgd absent",
    "local_sgd outer",
    "data_parallel",
    "ensemble ill",
    "ist outer nesterov",
    "transformer",
    "transformer all",
    "transformer blocks",
)  # another covers what they cover


def test_every_method_deal_and_policy_is_swept():
    swept = {(case.method, case.deal, case.policy) for case in CASES.values()}
    for name, entry in METHODS.items():
        for deal in DEALS if entry.deals_units else ("random",):
            assert set(entry.policies) <= set(POLICIES)
            for policy in entry.policies:
                assert (name, deal, policy) in swept
    assert OUTERS.keys() - {"none"} == {case.outer["name"] for case in CASES.values() if case.outer}


def set_up_case(case):
    workers, num_devices, *mode = case.place

    def change(recipe):
        layout = recipe.layout._replace(codec=case.codec, dtype=np.dtype(case.dtype))
        fresh = recipe.init_params
        return recipe._replace(
            layout=layout,
            tx=case.tx or recipe.tx,
            loss_fn=spoilt_by_labels(recipe.loss_fn) if case.ill else recipe.loss_fn,
            init_params=lambda key: jax.tree.map(lambda x: x.astype(case.dtype), fresh(key)),
        )

    settings = {"num_workers": workers, "num_devices": num_devices, "optimizer_state": case.policy}
    settings |= {f"outer.{key}": value for key, value in (case.outer or {}).items()}
    settings |= {"exchange.gather_bits": case.bits[0], "exchange.merge_bits": case.bits[1]}
    settings |= {"partition.deal": case.deal} | ({"workers_on_device": mode[0]} if mode else {})
    return set_up(case.config, change, model=case.model, method=case.method, **settings, **case.overrides)


def spoilt_by_labels(loss_fn):
    """Labels that are 100 too high make a loss NaN; 200, the gradient of a loss that is finite."""

    def loss(params, inputs, labels, gates, key):
        value, accuracy = loss_fn(params, inputs, labels % 100, gates, key)
        value = jnp.where((labels // 100 == 1).any(), jnp.nan, value)
        return spoil_gradient(value, (labels // 100 == 2).any()), accuracy

    return loss


@jax.custom_vjp
def spoil_gradient(value, bad):
    return value


spoil_gradient.defvjp(
    lambda value, bad: (value, bad), lambda bad, grad: (jnp.where(bad, jnp.nan, grad), None)
)


def with_bad_batch(run, turn, ill):
    """The turn, one worker's last batch with a label that `spoilt_by_labels` minds."""
    worker, kind = ill
    drawn = turn.indices.reshape(-1, *turn.indices.shape[2:])
    counts = np.bincount(drawn.ravel(), minlength=turn.data["label"].shape[1])
    number = next(number for number in drawn[worker, -1] if counts[number] == 1)
    labels = np.array(turn.data["label"])
    labels[:, number] += {"loss": 100, "update": 200}[kind]
    return turn._replace(data=turn.data | {"label": devices.put(labels, run.devices)})


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in CASES.items()],
)
def test_a_round_is_what_it_means(case, tmp_path):
    with jax.enable_x64(case.dtype is np.float64):
        run = set_up_case(case)
        turns = [run.turn(run.stage(index), index) for index in range(ROUNDS)]
        if case.ill:
            turns[-1] = with_bad_batch(run, turns[-1], case.ill)
        (stage,), states, heard = run.stages, [run.state], []
        for turn in turns:
            state, told = run_turn(stage, copied(states[-1], run), turn)
            states.append(state)
            heard.append(told)
        check_loop(case, run, turns, states, heard)
        if case.ill and case.method == "ist":
            check_left_out(run, turns[-1], case.ill[0], *states[-2:])
        check_resumption(run, turns, states, tmp_path)
        check_no_step(case, run, turns, states)
        check_traffic(case, run)


def check_loop(case, run, turns, states, heard):
    """The rounds are those of the plain loop."""
    recipe, start = run.stages[-1].recipe, states[0]
    send = (lambda x: x.astype(jnp.bfloat16).astype(x.dtype)) if case.codec is BFLOAT16 else lambda x: x
    params, moments = params_of(run, start), None
    if case.method == "ensemble":
        loop, moments = reference.ensemble(recipe), by_worker(run, start.own[1])
        keys = [jax.random.fold_in(jax.random.key(recipe.seed), worker) for worker in range(len(params))]
        fresh = [reference.flat(recipe.init_params(key)) for key in keys]
        assert reference.max_difference(params, fresh) < 1e-6
        assert reference.max_difference(params[:-1], params[1:]) > 0.1
    elif case.method == "data_parallel":
        loop, moments = reference.data_parallel(recipe), recipe.tx.init(params)
    elif case.method == "power_sgd":
        thin = {path: np.asarray(q)[0, 0] for path, q in start.own[1].items()}
        loop, moments = reference.power_sgd(recipe, thin), recipe.tx.init(params)
    else:
        few_bits = reference.FewBits(recipe.layout) if recipe.layout.bits.compress else None
        keeps = case.policy == "keep"
        loop = reference.subnets(recipe, whole_axes(run), send, keeps=keeps, few_bits=few_bits)
        moments = recipe.tx.init(params) if case.policy == "carry" else None
        if case.policy == "keep":
            shared = {path: x for path, x in params.items() if not recipe.layout.leaves[path].unit_axes}
            moments = [recipe.tx.init(shared)] * recipe.layout.num_workers
    slow = {path: [np.zeros_like(x)] * 3 for path, x in params.items()} if case.outer else None
    for turn, told in zip(turns, heard, strict=True):
        turn, before = reference.of_all_workers(turn), params
        params, moments, healthy = loop(params, moments, turn)
        assert told.healthy.tolist() == list(healthy)
        if case.outer:
            held = held_by(run, turn, turn.present & np.array(healthy))
            params, slow = reference.outer(before, params, slow, held, case.outer)
    if case.ill:
        worker, kind = case.ill
        assert [w for w in range(len(healthy)) if not healthy[w]] == [worker]
        assert np.isfinite(told.loss[worker]) == (kind == "update")
    if "participation" in case.overrides:
        present = np.stack([turn.present for turn in turns])
        assert present.any() and not present.all()
    assert reference.max_difference(params, params_of(run, states[-1])) < case.tolerance
    assert reference.max_difference(params, params_of(run, start)) > 1e-2
    after, wanted = states[-1], jax.tree.leaves(moments)
    if recipe.layout.bits.compress:
        own, residual = after.own
        slices = {path: np.concatenate([*np.asarray(x)]) for path, x in residual.copies.items()}
        check_residual(few_bits.residual, slices, case.tolerance)
        unsent = {path: np.concatenate([*np.asarray(x)]) for path, x in residual.changes.items()}
        check_residual(few_bits.unsent, unsent, case.tolerance)
        after = after._replace(own=own)
    if case.method == "power_sgd":
        errors = jax.tree.map(np.concatenate, after.own[0])
        assert reference.max_difference(errors, loop.errors) < 10 * case.tolerance
        assert all(np.abs(x).max() > 1e-3 for x in errors.values())
    if case.outer:
        number = {"adam": 3}.get(case.outer["name"], 1)
        wanted_slow = tuple({path: x[i] for path, x in slow.items()} for i in range(number))
        assert reference.max_difference(whole(run, after.stays), wanted_slow) < 10 * case.tolerance
        after = after._replace(stays=())
    kept = jax.tree.leaves(whole(run, (after.travels, after.stays)))
    if case.method == "ensemble":
        kept = jax.tree.leaves(by_worker(run, after.own[1]))
    if case.policy == "keep":
        kept = [np.concatenate(x) for x in jax.tree.leaves(after.own)]
        wanted = [np.stack(x) for x in zip(*map(jax.tree.leaves, moments), strict=True)]
    assert len(kept) == len(wanted)
    if wanted:
        assert reference.max_difference(wanted, kept) < 10 * case.tolerance
        assert max(np.abs(x).max() for x in wanted) > 0.1


def params_of(run, state):
    """Whole leaves by path; of an ensemble, those of every net."""
    return by_worker(run, state.own[0]) if run.name == "ensemble" else whole(run, state.params)


def by_worker(run, own):
    """What each worker keeps, a list, of arrays [D, W, ...]."""
    joined = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), own)
    return [jax.tree.map(lambda x, w=worker: x[w], joined) for worker in range(run.layout.num_workers)]


def check_residual(wanted, found, tolerance):
    """What is still to be sent of shared leaves, by workers; with padding behind it."""
    assert wanted.keys() == found.keys()
    for path, x in wanted.items():
        flat = found[path].ravel()
        assert np.abs(flat[: x.size] - x.ravel()).max() < tolerance
        assert np.abs(x).max() > 1e-6 and not flat[x.size :].any()


def whole_axes(run):
    params = reference.nested(whole(run, run.state.params))
    return partition.resolve_axes(params, run.model.unit_axes())


def held_by(run, turn, heard):
    """By path and worker, which entries those hold who were heard."""
    layout, params = run.layout, reference.nested(whole(run, run.state.params))
    axes = {
        path: tuple(x if x and partition.as_blocks(x).name in layout.groups else None for x in names)
        for path, names in whole_axes(run).items()
    }
    masks = [reference.flat(masking.masks(params, axes, turn.draw, worker)) for worker in range(len(heard))]
    both = [*zip(masks, heard, strict=True)]
    return {path: [np.asarray(mask[path]) & ok for mask, ok in both] for path in axes}


def check_left_out(run, turn, worker, before, after):
    """What only the ill worker holds has kept its bits, and all else that a worker sends has not."""
    path, params = unit_leaves(run.layout)[-1][0], reference.nested(whole(run, before.params))
    masks = [masking.masks(params, whole_axes(run), turn.draw, w) for w in range(turn.present.size)]
    held = [np.asarray(reference.flat(mask)[path]) for mask in masks]
    mine, others = held[worker], np.any(held[:worker] + held[worker + 1 :], axis=0)
    old, new = (whole(run, state.params)[path] for state in (before, after))
    mine = mine & ~others
    assert mine.any()
    assert_same_bits(new[mine], old[mine])
    assert (new != old)[others].mean() > 0.9 * run.layout.bits.keep


def check_resumption(run, turns, states, folder):
    """A run that was stopped after a round goes on to the same bits, of all fields of the state."""
    writer = Writer(folder, run.layout, keep=1)
    writer.save(states[1], {"round": 1})
    writer.close()
    saved = checkpoint.open_round(folder, 1)
    state = restore_state(run.stages[-1].method, run.layout, saved, run.devices)
    assert_same_bits(state, states[1])
    assert_same_bits(run_turn(run.stages[-1], state, turns[1])[0], states[2])


def check_no_step(case, run, turns, states):
    """What is sent and comes back unchanged is as it was, and so is all of which nobody is heard."""
    rates = np.zeros_like(turns[1].rates)
    number = 0 if case.outer else 1  # momentum of a round before goes on
    begun, turn = states[number], turns[number]._replace(rates=rates)
    still, _ = run_turn(run.stages[-1], copied(begun, run), turn)
    if case.codec is NONE:
        found = [params_of(run, state) for state in (still, begun)]
        if run.layout.bits.compress:  # what copies of shared leaves lack still comes
            dealt = [path for path, leaf in run.layout.leaves.items() if leaf.unit_axes]
            found = [{path: params[path] for path in dealt} for params in found]
        assert_same_bits(*found)
    for turn, before in zip(turns, states, strict=False):
        lost, told = run_turn(run.stages[-1], copied(before, run), turn._replace(rates=rates + np.inf))
        assert not told.healthy.any()
        arrays = lambda state: [x for x in jax.tree.leaves(state) if x.ndim > 1]  # noqa: E731
        assert_same_bits(arrays(lost), arrays(before))


def check_traffic(case, run):
    """The bytes in the trace are those of the compiled programs; the parts of an exchange are all of it."""
    (stage,), layout = run.stages, run.layout
    for name, phase in stage.phases.items():
        found = operands(collectives_of(phase.jaxpr, layout.num_devices))
        assert compiled_operands(stage.programs[name]) == found, name
        parts = Counter()
        for part in phase.parts:
            parts[part.kind, layout.num_devices] += part.operand
        exchanges = {key: size for key, size in found.items() if key[0] != "all-reduce" or key in parts}
        assert exchanges == (dict(parts) if layout.num_devices > 1 else {}), name
        sends = case.method != "ensemble" and (name != "local" or "merge" not in stage.phases)
        assert bool(found) == (layout.num_devices > 1 and sends)
    _, program, trace = run.splits["test"]
    traced = operands(collectives_of(trace, layout.num_devices))
    there = compiled_operands(program)
    assert there.keys() <= traced.keys()
    assert all(0 < there[key] <= traced[key] for key in there)
    apart = layout.groups or case.method == "ensemble"  # no device has all that is scored
    assert bool(there) == (layout.num_devices > 1 and bool(apart))


def compiled_operands(program):
    """Of the collectives between several devices."""
    found = compiled.read(program.as_text()).operands
    return {(kind, devices): size for (kind, devices), size in found.items() if devices > 1}


@pytest.mark.parametrize(
    ("own", "causes", "kept"),  # trees of moments, residuals or nets that travel or are a worker's; that stay
    [
        ({"optimizer_state": "carry"}, ("gather", "merge_units", "merge_shared", "round"), [1, 0]),
        pytest.param(
            {"method": "local_sgd", "outer.name": "adam"}, ("merge_shared", "round"), [1, 3],
            marks=pytest.mark.slow,
        ),
        pytest.param({"method": "ensemble"}, (), [2, 0], marks=pytest.mark.slow),
        pytest.param(
            FEW | {"exchange.keep": 0.2}, ("gather", "merge_units", "merge_shared", "round"), [0, 0],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            FEW | FED_BACK | {"method": "local_sgd"}, ("merge_shared", "round"), [3, 0],
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_two_processes_do_what_one_does(own, causes, kept, tmp_path):
    settings = {"num_workers": 4, "num_devices": 4, "model.hidden": (32, 32)} | own
    processes = launch(tmp_path, 2, rounds=2, eval_every=1, **{"checkpoint.every": 1}, **settings)
    run = set_up("mlp", rounds=2, **settings)
    states = [run_all(run, rounds) for rounds in (1, 2)]
    results = finish(processes)
    assert [code for code, _ in results] == [0, 0], results
    for number, state in enumerate(states, 1):
        saved = checkpoint.open_round(tmp_path, number)
        found = restore_state(run.stages[-1].method, run.layout, saved, run.devices)
        assert_same_bits(found, state)
    moments = jax.tree.leaves((state.travels, state.own)), jax.tree.leaves(state.stays)
    assert [len(x) // len(run.layout.leaves) for x in moments] == kept
    rows = {row["cause"]: row for row in files.read_json(tmp_path / "ledger.json")["rows"]}
    for cause in causes:
        assert rows[cause]["expected"] == rows[cause]["hlo"] > 0
    evaluation = rows["evaluation"]
    assert evaluation["hlo"] <= evaluation["expected"]
    assert (evaluation["hlo"] > 0) == (own.get("method") != "local_sgd")  # a whole model: without a byte
