"""How a model is called: whatever Flax module it is, with Dropout, boxes, other collections, or of NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config
from flax import nnx

from ist_jax import train
from ist_jax.models import adapter
from ist_jax.models.norm import BatchNorm
from ist_jax.runtime.setup import set_up
from ist_jax.workdir import checkpoint

X = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)


class Plain(nn.Module):
    """Without unit axes, gates or scale; boxed parameters and the package's norm."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        x = nn.relu(
            BatchNorm(name="norm")(nn.Dense(16, kernel_init=init, name="first")(x.reshape(len(x), -1)))
        )
        return nn.Dense(10, name="last")(nn.Dropout(self.rate, deterministic=not train)(x))


class Scanned(nn.Module):
    """Dropout in a scan, which is given a key whether or not it is used."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        layers = nn.scan(Layer, {"params": 0}, split_rngs={"params": True, "dropout": True}, length=2)
        x, _ = layers(deterministic, name="layers")(nn.Dense(8, name="stem")(x.reshape(len(x), -1)), None)
        self.sow("intermediates", "last", x)
        return nn.Dense(10, name="head")(x)


class Layer(nn.Module):
    deterministic: bool

    @nn.compact
    def __call__(self, x, _):
        return nn.Dropout(0.5)(nn.Dense(8)(x), deterministic=self.deterministic), None


class OfNNX(nnx.Module):
    def __init__(self, width, rngs):
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.last = nnx.Linear(width, 10, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train=False):
        x = nnx.relu(self.first(x.reshape(len(x), -1)))
        return self.last(self.dropout(x, deterministic=not train))


def bridged():
    return nnx.bridge.ToLinen(OfNNX, args=(16,))


@pytest.mark.parametrize(
    ("make", "taken"), [(Plain, ["train"]), (Scanned, ["deterministic"]), (bridged, ["train"])]
)
def test_a_model_is_given_what_it_accepts_and_is_random_in_training_alone(make, taken):
    model = make(rate=0.5) if make is Plain else make()
    assert adapter.accepted(model) == taken
    assert adapter.check(model, X[:1]).shape == (1, 10)
    params = adapter.init(model, jax.random.key(0), X[:1])
    assert all(
        isinstance(x, jax.Array) for x in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "unbox"))
    )

    @jax.jit
    def apply(key=None):
        return adapter.apply(model, {"params": params}, X, key=key, gates=None, scale={})

    one, same, other = (apply(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01
    np.testing.assert_array_equal(apply(), apply())


def test_what_takes_anything_is_given_all():
    class Anything(nn.Module):
        @nn.compact
        def __call__(self, x, **kwargs):
            assert kwargs.keys() <= {"train", "deterministic", "gates", "scale"}
            return nn.Dense(len(kwargs))(x.reshape(len(x), -1))

    assert adapter.accepted(Anything()) == ("train", "deterministic", "gates", "scale")


@pytest.mark.parametrize(("make", "method"), [(Plain, "local_sgd"), (bridged, "data_parallel")])
def test_a_model_without_units_trains_and_plain_apply_repeats_its_accuracy(make, method, tmp_path):
    config = get_config("mlp", method=method, local_steps=20, rounds=4, eval_batch_size=360)
    summary = train.train(config, tmp_path, make())
    assert summary["test_accuracy"] > 0.5
    run = set_up(config, make(), params=checkpoint.load_params(tmp_path), evaluation_only=True)
    inputs, labels = run.inputs.task.show(run.inputs.test)
    logits = make().apply({"params": checkpoint.load_params(tmp_path)}, inputs)
    assert float((logits.argmax(-1) == labels).mean()) == pytest.approx(summary["test_accuracy"], abs=1e-6)


def test_its_units_are_asked_for_where_units_are_dealt():
    with pytest.raises(ValueError, match="has nothing to partition: the model names no unit axes"):
        set_up(get_config("mlp"), bridged())


class Random(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(10)(x.reshape(len(x), -1)))


class Averaging(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(10)(x.reshape(len(x), -1)))


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(len(x), -1)) * self.variable("cache", "one", lambda: jnp.ones(10)).value


class Empty(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x.reshape(len(x), -1)[:, :10]


class RandomOfNNX(OfNNX):
    def __call__(self, x):
        return self.last(self.dropout(self.first(x.reshape(len(x), -1))))


class AveragingOfNNX(OfNNX):
    def __init__(self, width, rngs):
        super().__init__(width, rngs)
        self.norm = nnx.BatchNorm(10, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.last(self.first(x.reshape(len(x), -1))))


REFUSED = {
    "random": (Random(), "the model Random is random at evaluation"),
    "random of NNX": (nnx.bridge.ToLinen(RandomOfNNX, args=(16,)), "is random at evaluation"),
    "averages": (Averaging(), r"running averages.*use ist_jax\.models\.norm\.BatchNorm"),
    "averages of NNX": (nnx.bridge.ToLinen(AveragingOfNNX, args=(16,)), "running averages"),
    "collection": (Counting(), "variables beside its parameters, in the collection 'cache'"),
    "empty": (Empty(), "the model Empty has no parameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_before_anything_is_compiled(name):
    model, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refused:
        set_up(get_config("mlp", method="local_sgd"), model)
    assert "\n" not in str(refused.value)


def test_units_without_a_subnet_are_refused():
    class Axes(Plain):
        def unit_axes(self):
            return {"first/kernel": (None, "h"), "(first|norm)/.*": ("h",), "last/kernel": ("h", None)}

    with pytest.raises(ValueError, match=r"the model Axes has no method `subnet\(sizes\)`"):
        set_up(get_config("mlp"), Axes())


def test_dropout_differs_between_workers_of_the_same_examples():
    """With the same examples for everybody and no augmentation, masks alone tell the workers apart."""
    config = get_config("mlp", method="local_sgd", local_steps=1, rounds=1)
    run = set_up(config, Plain(rate=0.5))
    turn = run.turn(run.stages[-1], 0)
    same = turn._replace(indices=np.broadcast_to(np.arange(8, dtype=np.int32), turn.indices.shape))
    told = run.stages[-1].programs["local"](run.state, None, same)[-1]
    assert len(set(np.asarray(told.loss).ravel().tolist())) == 2
