"""Small models of different kinds, each with the data that it learns from."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ist_jax.data import Split
from ist_jax.data.sparse import Rows
from ist_jax.models.conv import conv_general_dilated
from ist_jax.models.mlp import MLP
from ist_jax.models.resnet import ResNet
from ist_jax.models.vgg import VGG
from ist_jax.partition import Blocks, Each
from ist_jax.tasks import Metric, Task
from ist_jax.tasks.classification import cross_entropy, is_right

RNG = np.random.default_rng(0)


class Small(NamedTuple):
    """A model, and what it learns.

    Attributes:
      model: whose units are dealt out.
      splits: training and test examples; None: scikit-learn's digits.
      classes: how many, where the examples do not tell.
      task: of one's own; None: the one that the examples are for.
      overrides: of the config.
    """

    model: nn.Module
    splits: tuple[Split, Split] | None = None
    classes: int = 0
    task: Task | None = None
    overrides: Mapping[str, Any] = {}


def conv(channels: int, stride: int = 1, *, name: str) -> nn.Conv:
    """3x3, fast on CPU."""
    options = {"use_bias": False, "conv_general_dilated": conv_general_dilated, "name": name}
    return nn.Conv(channels, (3, 3), stride, [(1, 1), (1, 1)], **options)


# --- images ---------------------------------------------------------------------------------------


class GroupedCNN(nn.Module):
    """A unit is a whole group of GroupNorm, several channels; behind it they are flattened."""

    groups: int = 8
    each: int = 2

    def unit_axes(self):
        channels = Blocks("norm_group", inner=self.each)
        return {
            "conv/kernel": (None, None, None, channels),
            "norm/.*": (channels,),
            "head/kernel": (Blocks("norm_group", outer=4 * 4, inner=self.each), None),
        }

    def subnet(self, sizes):
        return self.clone(groups=sizes["norm_group"])

    @nn.compact
    def __call__(self, x, scale=None):
        x = nn.GroupNorm(self.groups, name="norm")(conv(self.groups * self.each, 2, name="conv")(x))
        x = nn.relu(x).reshape(len(x), -1)
        return nn.Dense(10, name="head")(x * (scale or {}).get("norm_group", 1.0))


class Dropping(nn.Module):
    """Dropout of hidden neurons, in training alone."""

    width: int = 64

    def unit_axes(self):
        return {"up/kernel": (None, "neuron"), "up/bias": ("neuron",), "down/kernel": ("neuron", None)}

    def subnet(self, sizes):
        return self.clone(width=sizes["neuron"])

    @nn.compact
    def __call__(self, x, train=False, scale=None):
        x = nn.relu(nn.Dense(self.width, name="up")(x.reshape(len(x), -1)))
        x = nn.Dropout(0.3, deterministic=not train)(x * (scale or {}).get("neuron", 1.0))
        return nn.Dense(10, name="down")(x)


class OfNNX(nnx.Module):
    def __init__(self, width, rngs):
        self.up = nnx.Linear(64, width, rngs=rngs)
        self.down = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x, scale=None):
        x = nnx.relu(self.up(x.reshape(len(x), -1)))
        return self.down(x * (scale or {}).get("neuron", 1.0))


class Bridged(nnx.bridge.ToLinen):
    """The same through Flax's bridge, which names the units."""

    def unit_axes(self):
        return {"up/kernel": (None, "neuron"), "up/bias": ("neuron",), "down/kernel": ("neuron", None)}

    def subnet(self, sizes):
        return self.clone(args=(sizes["neuron"],))


# --- images read from above, row by row -----------------------------------------------------------


class Transformer(nn.Module):
    """Two encoder layers that are not scanned; units are the heads and the feed-forward neurons of each."""

    heads: tuple[int, ...] = (4, 4)
    neurons: tuple[int, ...] = (32, 32)
    width: int = 16
    head_width: int = 4

    def unit_axes(self):
        axes = {}
        for number in range(len(self.heads)):
            head, neuron = f"head{number}", f"neuron{number}"
            fused = Blocks(head, outer=3, inner=self.head_width)
            axes |= {
                f"layer{number}/qkv/kernel": (None, fused),
                f"layer{number}/qkv/bias": (fused,),
                f"layer{number}/out/kernel": (Blocks(head, inner=self.head_width), None),
                f"layer{number}/up/kernel": (None, neuron),
                f"layer{number}/up/bias": (neuron,),
                f"layer{number}/down/kernel": (neuron, None),
            }
        return axes

    def subnet(self, sizes):
        numbers = range(len(self.heads))
        heads, neurons = (tuple(sizes[f"{name}{n}"] for n in numbers) for name in ("head", "neuron"))
        return self.clone(heads=heads, neurons=neurons)

    @nn.compact
    def __call__(self, x, scale=None):
        x = x.reshape(len(x), *x.shape[1:3])  # [B, rows, pixels of a row]
        x = nn.Dense(self.width, name="embed")(x)
        x = x + self.param("position", nn.initializers.normal(0.1), x.shape[1:])
        for number, sizes in enumerate(zip(self.heads, self.neurons, strict=True)):
            factors = [(scale or {}).get(f"{name}{number}", 1.0) for name in ("head", "neuron")]
            x = EncoderLayer(*sizes, self.head_width, name=f"layer{number}")(x, *factors)
        return nn.Dense(10, name="classes")(nn.LayerNorm(name="norm")(x).mean(1))


class EncoderLayer(nn.Module):
    heads: int
    neurons: int
    head_width: int

    @nn.compact
    def __call__(self, x, of_heads, of_neurons):
        y = nn.Dense(3 * self.heads * self.head_width, name="qkv")(nn.LayerNorm(name="norm1")(x))
        query, key, value = jnp.moveaxis(y.reshape(*y.shape[:2], 3, self.heads, self.head_width), 2, 0)
        y = jax.nn.dot_product_attention(query, key, value).reshape(*x.shape[:2], -1)
        x = x + of_heads * nn.Dense(x.shape[-1], name="out")(y)
        y = nn.relu(nn.Dense(self.neurons, name="up")(nn.LayerNorm(name="norm2")(x)))
        return x + of_neurons * nn.Dense(x.shape[-1], name="down")(y)


class ScannedTransformer(nn.Module):
    """The same layers stacked by `nn.scan`; every layer's heads and neurons have a draw of their own."""

    heads: int = 4
    neurons: int = 32
    width: int = 16
    head_width: int = 4
    layers: int = 2

    def unit_axes(self):
        fused, inner = Each(Blocks("head", 3, self.head_width)), Each(Blocks("head", 1, self.head_width))
        neuron = Each("neuron")
        return {
            "layers/qkv/kernel": (None, None, fused),
            "layers/qkv/bias": (None, fused),
            "layers/out/kernel": (None, inner, None),
            "layers/up/kernel": (None, None, neuron),
            "layers/up/bias": (None, neuron),
            "layers/down/kernel": (None, neuron, None),
        }

    def subnet(self, sizes):
        return self.clone(heads=sizes["head"], neurons=sizes["neuron"])

    @nn.compact
    def __call__(self, x, scale=None):
        x = nn.Dense(self.width, name="embed")(x.reshape(len(x), *x.shape[1:3]))
        x = x + self.param("position", nn.initializers.normal(0.1), x.shape[1:])
        factors = [(scale or {}).get(name, 1.0) for name in ("head", "neuron")]
        stack = nn.scan(
            lambda layer, x, _: (layer(x, *factors), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = stack(EncoderLayer(self.heads, self.neurons, self.head_width, name="layers"), x, None)
        return nn.Dense(10, name="classes")(nn.LayerNorm(name="norm")(x).mean(1))


class LSTM(nn.Module):
    """The four gates of a hidden unit are columns of fused kernels."""

    hidden: int = 32

    def unit_axes(self):
        fused = Blocks("hidden", outer=4)
        return {
            "input/kernel": (None, fused),
            "input/bias": (fused,),
            "recurrent/kernel": ("hidden", fused),
            "head/kernel": ("hidden", None),
        }

    def subnet(self, sizes):
        return self.clone(hidden=sizes["hidden"])

    @nn.compact
    def __call__(self, x, scale=None):
        factor = (scale or {}).get("hidden", 1.0)
        read = nn.Dense(4 * self.hidden, name="input")(x.reshape(len(x), *x.shape[1:3]))
        recur = nn.Dense(4 * self.hidden, False, name="recurrent")
        cell = hidden = jnp.zeros((len(x), self.hidden), x.dtype)
        for row in range(x.shape[1]):
            new, keep, take, show = jnp.split(read[:, row] + recur(factor * hidden), 4, axis=-1)
            cell = nn.sigmoid(keep) * cell + nn.sigmoid(take) * jnp.tanh(new)
            hidden = nn.sigmoid(show) * jnp.tanh(cell)
        return nn.Dense(10, name="head")(factor * hidden)


# --- other kinds of examples ----------------------------------------------------------------------


class Tied(nn.Module):
    """The same table embeds tokens and tells the next one; units are hidden neurons and its columns."""

    columns: int = 16
    neurons: int = 32
    vocabulary: int = 12

    def unit_axes(self):
        return {
            "table/embedding": (None, "column"),
            "up/kernel": ("column", "neuron"),
            "down/kernel": ("neuron", "column"),
        }

    def subnet(self, sizes):
        return self.clone(columns=sizes["column"], neurons=sizes["neuron"])

    @nn.compact
    def __call__(self, tokens, scale=None):
        of_columns, of_neurons = ((scale or {}).get(name, 1.0) for name in ("column", "neuron"))
        table = nn.Embed(self.vocabulary, self.columns, name="table")
        x = table(tokens)
        y = nn.relu(nn.Dense(self.neurons, False, name="up")(of_columns * x))
        x = x + of_neurons * nn.Dense(self.columns, False, name="down")(y)
        return table.attend(of_columns * x)


def sentences(n: int) -> Split:
    """Every token is the one before plus 1, 2 or, rarely, 3."""
    steps = RNG.choice([1, 2, 3], (n, 9), p=[0.8, 0.15, 0.05])
    return {"tokens": (steps.cumsum(1) + RNG.integers(0, 12, (n, 1))) % 12}


class GraphNet(nn.Module):
    """A message from the neighbours, twice; a graph is a dict of its nodes and edges."""

    hidden: tuple[int, int] = (16, 16)

    def unit_axes(self):
        return {
            "own0/kernel": (None, "hidden0"),
            "from0/kernel": (None, "hidden0"),
            "own1/kernel": ("hidden0", "hidden1"),
            "from1/kernel": ("hidden0", "hidden1"),
            "head/kernel": ("hidden1", None),
        }

    def subnet(self, sizes):
        return self.clone(hidden=(sizes["hidden0"], sizes["hidden1"]))

    @nn.compact
    def __call__(self, graph, scale=None):
        x, factor = graph["nodes"], 1.0
        for number, hidden in enumerate(self.hidden):
            heard = nn.Dense(hidden, False, name=f"from{number}")(factor * graph["edges"] @ x)
            x = nn.relu(nn.Dense(hidden, False, name=f"own{number}")(factor * x) + heard)
            factor = (scale or {}).get(f"hidden{number}", 1.0)
        return nn.Dense(2, name="head")(factor * x.mean(1))


def graphs(n: int) -> Split:
    """Six nodes of two colours; the class is whether edges between equal colours are the more frequent."""
    colour = RNG.integers(0, 2, (n, 6))
    label, same = RNG.integers(0, 2, n), colour[:, :, None] == colour[:, None, :]
    chance = np.where(same == label[:, None, None].astype(bool), 0.8, 0.2)
    edges = np.triu(RNG.random((n, 6, 6)) < chance, 1).astype(np.float32)
    return {
        "x": {"nodes": np.eye(2, dtype=np.float32)[colour], "edges": edges + edges.swapaxes(1, 2)},
        "y": label,
    }


class Curve(nn.Module):
    """One number from several."""

    width: int = 32

    def unit_axes(self):
        return {"up/kernel": (None, "neuron"), "up/bias": ("neuron",), "down/kernel": ("neuron", None)}

    def subnet(self, sizes):
        return self.clone(width=sizes["neuron"])

    @nn.compact
    def __call__(self, x, scale=None):
        x = nn.tanh(nn.Dense(self.width, name="up")(x)) * (scale or {}).get("neuron", 1.0)
        return nn.Dense(1, name="down")(x)[:, 0]


def measurements(n: int) -> Split:
    x = RNG.normal(size=(n, 4)).astype(np.float32)
    return {"x": x, "y": np.sin(x[:, 0]) + 0.5 * x[:, 1]}


def documents(n: int) -> Split:
    """Words 4 k to 4 k + 3 are of topic k, of five; each document has two words of each of two topics."""
    topics = np.argsort(RNG.random((n, 5)), axis=1)[:, :2]
    words = (4 * topics[:, :, None] + np.argsort(RNG.random((n, 2, 4)), axis=2)[:, :, :2]).reshape(n, 4)
    value = np.ones(words.size, np.float32)

    def rows(index, value, width):
        start = np.arange(n + 1, dtype=np.int32) * index.shape[1]
        return Rows(start, index.astype(np.int32).ravel(), value, width, longest=index.shape[1])

    return {"feature": rows(words, value, 20), "label": rows(np.sort(topics), None, 5)}


CLASSES = {"scores": {"accuracy": is_right}, "metric": Metric("accuracy", higher_is_better=True)}
OF_GRAPHS = Task("classes of graphs", cross_entropy, **CLASSES)
REGRESSION = Task(
    "regression",
    loss=lambda outputs, y, key: optax.l2_loss(outputs, y),
    scores={"error": lambda outputs, y: abs(outputs - y)},
    metric=Metric("error"),
)

ADAMW = {"optimizer.name": "adamw", "optimizer.learning_rate": 0.01}

SMALL = {
    "MLP": Small(MLP((32, 32), 10)),
    "VGG": Small(VGG((32, 32), 1, (64,), 10)),
    "CNN with GroupNorm": Small(GroupedCNN()),
    "ResNet by inner channels": Small(ResNet((1, 2), 8, 10, (1, 2), channels="inner")),
    "ResNet by all channels": Small(ResNet((1, 2), 32, 10, (1, 2), channels="all")),
    "transformer": Small(
        Transformer(), overrides={"optimizer.name": "adamw", "optimizer.learning_rate": 0.01}
    ),
    "scanned transformer": Small(
        ScannedTransformer(), overrides={"optimizer.name": "adamw", "optimizer.learning_rate": 0.01}
    ),
    "LSTM": Small(LSTM(), overrides={"optimizer.name": "adamw", "optimizer.learning_rate": 0.02}),
    "tied embeddings": Small(Tied(), (sentences(400), sentences(50))),
    "Dropout": Small(Dropping()),
    "NNX": Small(Bridged(OfNNX, args=(64,))),
    "graph net": Small(GraphNet(), (graphs(400), graphs(50)), task=OF_GRAPHS),
    "regression": Small(Curve(), (measurements(400), measurements(50)), task=REGRESSION),
    "multi-label": Small(MLP((32,), 5, output_norm=False), (documents(400), documents(50)), classes=5),
}
