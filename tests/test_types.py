"""Shapes and dtypes of the exchange and the local step: a wrong one is refused where it enters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import TypeCheckError
from test_masking import make_case

from ist_jax.exchange import kinds, pairs, rows, shared, store, wire
from ist_jax.exchange.layout import AXIS, invert, make_layout
from ist_jax.methods import steps
from ist_jax.methods.method import Recipe, Turn

ALL = jnp.ones((2, 2), bool)  # workers of both devices


@pytest.fixture(scope="module")
def case():
    """Four workers on two devices: their layout, draw, and on every device its shards and its two subnets."""
    params, axes, groups, draw = make_case(8, 8, 4)
    layout = make_layout(params, axes, groups, 4, 2)
    shards = {path: jnp.asarray(x) for path, x in kinds.from_params(layout, params).items()}
    subnets = {path: jnp.zeros((2, 2, *x.shape), x.dtype) for path, x in kinds.subnet_shapes(layout).items()}
    return layout, draw, shards, subnets


def merge(case, change=lambda x: x, healthy=ALL):
    """Shapes of the shards on two devices after a merge of changed subnets."""
    layout, draw, shards, subnets = case

    def fn(shards, subnets, healthy):
        return store.merge(layout, shards, {path: change(x) for path, x in subnets.items()}, draw, healthy)

    return jax.eval_shape(jax.vmap(fn, axis_name=AXIS), shards, subnets, healthy)


def test_a_merge_takes_what_it_should(case):
    shards = case[2]
    assert {path: x.shape for path, x in merge(case).items()} == {path: x.shape for path, x in shards.items()}


@pytest.mark.parametrize(
    "change",
    [
        {"change": lambda x: x[:1]},  # another number of workers than of health flags
        {"change": lambda x: x.astype(int)},
        {"healthy": jnp.ones((2, 2))},
        {"healthy": jnp.ones((2, 2, 1), bool)},
    ],
)
def test_a_merge_refuses_wrong_shapes_and_dtypes(case, change):
    with pytest.raises(TypeCheckError):
        merge(case, **change)


def test_a_merge_checks_every_leaf_and_not_the_first_alone(case):
    layout, draw, shards, subnets = case
    last = list(subnets)[-1]
    wrong = subnets | {last: subnets[last][:, :1]}
    with pytest.raises(TypeCheckError):
        merge((layout, draw, shards, wrong))


@pytest.mark.parametrize(
    "call",
    [
        lambda layout: kinds.from_params(layout, {"a": np.zeros(3, int)}),  # integers
        lambda layout: wire.all_to_all(layout, {"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 3))}, {}),
        lambda layout: wire.all_gather(layout, jnp.zeros((2, 3))),
        lambda layout: invert(jnp.zeros(3), 4),
        lambda layout: invert(jnp.zeros((2, 1), int), 4),
        lambda layout: rows.to_stored(layout.leaves["norm/scale"], np.zeros(4), 2),
        lambda layout: pairs.join(np.zeros((2, 4, 3)), layout.leaves["norm/scale"]),
        lambda layout: shared.put_back(layout, {}, {}, jnp.ones(4)),  # flags are bool
    ],
)
def test_the_exchange_has_its_shapes_and_dtypes_checked(case, call):
    with pytest.raises(TypeCheckError):
        call(case[0])


# --- the local step -----------------------------------------------------------------------------------------


def recipe_of(layout):
    def loss_fn(params, inputs, labels, gates, key):
        return jnp.sum((inputs @ params["kernel"] - labels) ** 2), jnp.float32(0)

    return Recipe(
        layout=layout,
        tx=optax.identity(),
        loss_fn=loss_fn,
        batch_fn=lambda data, batch, key: (data["image"][batch], data["label"][batch]),
        score_fn=lambda params, batches: jnp.zeros((1, 3)),
        score_members=lambda members, batches: jnp.zeros((1, 3)),
        init_params=lambda key: {},
        policy=steps.POLICIES["reset"],
    )


TURN = Turn(
    draw={},
    gates={},
    present=jnp.ones(1, bool),
    data={"image": jnp.ones((4, 3)), "label": jnp.ones(4)},
    indices=jnp.zeros((2, 4), int),
    rates=jnp.ones(2),
    index=jnp.int32(0),
)


@pytest.fixture(scope="module")
def recipe():
    return recipe_of(make_layout({"kernel": np.zeros(3, np.float32)}, {"kernel": (None,)}, {}, 1, 1))


def train(recipe, turn=TURN, worker=0):
    return steps.train_worker(recipe, {"kernel": jnp.zeros(3)}, (), turn, jnp.asarray(worker))


def test_a_local_step_takes_what_it_should(recipe):
    params, _, told = train(recipe)
    assert params["kernel"].shape == (3,)
    assert told.loss.shape == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"turn": TURN._replace(indices=jnp.zeros((2, 4, 1), int))},  # of several workers
        {"turn": TURN._replace(indices=jnp.zeros((2, 4)))},
        {"turn": TURN._replace(rates=jnp.ones(2, int))},
        {"turn": TURN._replace(rates=jnp.ones((2, 1)))},
        {"worker": [0]},
    ],
)
def test_a_local_step_refuses_wrong_shapes_and_dtypes(recipe, wrong):
    with pytest.raises(TypeCheckError):
        train(recipe, **wrong)
