"""A decoder-only language model of GPT-2's form, partitioned by attention head, feed-forward neuron or block.

References:
  Radford et al., Language Models are Unsupervised Multitask Learners, 2019: pre-LN blocks, learned positions,
  one table that embeds tokens and tells the next one, residual projections drawn smaller by their number.
  TwIST, arXiv:2511.03983, 2025: transformers as subnets, the first and last two blocks shared.
"""

from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ist_jax.key import Key, Options
from ist_jax.models.interface import Entry, Fetch, Gates, Scale, streamed
from ist_jax.models.norm import at_least_float32
from ist_jax.partition import Blocks, Each, Names

_HEADS, _NEURONS = ("head",), ("neuron",)
# What is dealt out of the blocks in the middle, and of those at the ends.
_UNITS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "heads": (_HEADS, ()),
    "neurons": (_NEURONS, ()),
    "width": (_HEADS + _NEURONS, ()),
    "blocks": (("block",), ()),
    "all": (("block",), _HEADS + _NEURONS),
}
OPTIONS = {
    "model.layers": Key(8, "blocks, each of attention and a feed-forward net", least=1),
    "model.d_model": Key(128, "width of the residual stream: numbers of a token between blocks", least=1),
    "model.heads": Key(8, "attention heads of a block", least=1),
    "model.head_width": Key(None, "of a head; unset: d_model / heads", kind=int, least=1),
    "model.neurons": Key(None, "of a block's feed-forward net; unset: 4 x d_model", kind=int, least=1),
    "model.vocabulary": Key(0, "tokens that the embedding has; 0: those of the data set", least=0),
    "model.tied": Key(True, "the table that embeds tokens tells the next one as well, as in GPT-2"),
    "model.dropout": Key(0.0, "of embeddings and of what a block adds, in training", least=0, most=0.9),
    "partition.units": Key(
        "width",
        "what is dealt out; 'width': heads and neurons, drawn for each block; 'blocks': whole ones; 'all': "
        "whole blocks, and heads and neurons of the shared ones",
        choices=tuple(_UNITS),
    ),
    "partition.shared_layers": Key(
        1, "blocks at each end that every worker trains; with units='all', a part of each", least=0
    ),
}


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); of each sum, the second part can be scaled.

    Attributes:
      heads: of the attention, causal.
      head_width: of each.
      neurons: of the feed-forward net, with GELU.
      width: of x.
      depth: blocks of the whole model, by which the last kernels of both parts begin smaller.
      dropout: of what is added.
      dtype: of the computation; None: of inputs and parameters. x keeps its own.
    """

    heads: int
    head_width: int
    neurons: int
    width: int
    depth: int
    dropout: float = 0.0
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        def dense(features: int, deviation: float) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=nn.initializers.normal(deviation))

        last = 0.02 / (2 * self.depth) ** 0.5
        self.norm1, self.norm2 = (nn.LayerNorm(1e-5, dtype=self.dtype) for _ in range(2))
        self.qkv, self.out = dense(3 * self.heads * self.head_width, 0.02), dense(self.width, last)
        self.up, self.down = dense(self.neurons, 0.02), dense(self.width, last)
        self.drop = nn.Dropout(self.dropout, deterministic=not self.dropout)

    def _residual(self, x: jax.Array, scales: tuple[jax.Array | float, ...]) -> jax.Array:
        of_block, of_heads, of_neurons = scales

        def add(x: jax.Array, y: jax.Array) -> jax.Array:
            return x + (of_block * self.drop(y)).astype(x.dtype)

        fused = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, self.heads, self.head_width)
        query, key, value = jnp.moveaxis(fused, 2, 0)
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(*x.shape[:2], -1)
        x = add(x, self.out((of_heads * y).astype(y.dtype)))
        y = nn.gelu(self.up(self.norm2(x)))
        return add(x, self.down((of_neurons * y).astype(y.dtype)))

    def __call__(
        self, x: jax.Array, gate: jax.Array | None, scales: tuple[jax.Array | float, ...]
    ) -> tuple[jax.Array, None]:
        """Args: x [B, T, width]; gate: a bool scalar, False skips the block; scales: of what is added by the
        block, of what its heads and of what its neurons add. A bias that workers share is not scaled.

        Returns: ([B, T, width], None), the form that `nn.scan` takes.
        """
        if gate is None:
            return self._residual(x, scales), None
        return nn.cond(gate, Block._residual, lambda block, x, scales: x, self, x, scales), None


class Transformer(nn.Module):
    """Blocks in up to three stacks, scanned: `first`, `middle` and `last`.

    A group of units is called by its stack: `middle_head` and `middle_neuron`, of which every block has a
    draw of its own; `middle_block`; with `units='all'` also `first_head` and so on.

    Attributes:
      vocabulary: V, tokens.
      layers: blocks.
      width: of the residual stream.
      heads: of a block.
      head_width: of a head.
      neurons: of a block.
      tied: logits are products with the embeddings; else of a kernel of their own, without bias.
      dropout: in training.
      units: what is dealt out, one of `partition.units`.
      shared: blocks at each end that are not, or of which heads and neurons are ('all').
      sizes: (group, units) of a subnet, in place of the model's.
      dtype: of the computation, such as bfloat16; None: of the parameters. Those, the residual stream, the
        norms' statistics and the logits are never narrower than float32.
      fetch: see `models.streamed`.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    head_width: int
    neurons: int
    tied: bool = True
    dropout: float = 0.0
    units: str = "width"
    shared: int = 1
    sizes: tuple[tuple[str, int], ...] = ()
    dtype: DTypeLike | None = None
    fetch: Fetch | None = None

    def _stacks(self) -> dict[str, int]:
        """Blocks of each stack that there is."""
        ends = self.shared
        counts = {"first": ends, "middle": self.layers - 2 * ends, "last": ends}
        return {name: count for name, count in counts.items() if count}

    def unit_axes(self) -> dict[str, Names]:
        """The groups that `units` names, in every stack.

        Raises:
          ValueError: there are no blocks at the ends for 'all'.
        """
        middle, ends = _UNITS[self.units]
        if ends and not self.shared:
            raise ValueError(
                f"partition.units={self.units!r} with partition.shared_layers=0: there are no blocks whose "
                "heads and neurons could be dealt out; set config.partition.shared_layers to 1 or more, or "
                "config.partition.units to 'blocks'"
            )
        own = {name: middle if name == "middle" else ends for name in self._stacks()}
        return dict(rule for name, units in own.items() for unit in units for rule in self._rules(name, unit))

    def _rules(self, stack: str, unit: str) -> Iterator[tuple[str, Names]]:
        group = f"{stack}_{unit}"
        if unit == "block":
            yield f"{stack}/.*", (group, ...)  # type: ignore[misc]
        elif unit == "head":
            fused = Each(Blocks(group, outer=3, inner=self.head_width))
            yield f"{stack}/qkv/kernel", (None, None, fused)
            yield f"{stack}/qkv/bias", (None, fused)
            yield f"{stack}/out/kernel", (None, Each(Blocks(group, inner=self.head_width)), None)
        else:
            yield f"{stack}/up/kernel", (None, None, Each(group))
            yield f"{stack}/up/bias", (None, Each(group))
            yield f"{stack}/down/kernel", (None, Each(group), None)

    def subnet(self, sizes: Mapping[str, int]) -> "Transformer":
        """The model with `sizes['middle_head']` heads in each block of the middle, and so on."""
        return self.clone(sizes=tuple(sizes.items()))

    def check_example(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError for examples that are no sequences [T]."""
        if len(shape) != 1:
            raise ValueError(
                f"an example is {list(shape)}, and a transformer reads sequences of tokens [T]; set "
                "config.data.name to 'text', or config.model.name to another model"
            )

    @nn.compact
    def __call__(
        self, tokens: jax.Array, train: bool = False, gates: Gates = None, scale: Scale = None
    ) -> jax.Array:
        """Args: tokens int [B, T], T at most that of the first call; train, gates, scale: see `models`.

        Returns: logits [B, T, V] of the token behind each.
        """
        embed = nn.Embed(
            self.vocabulary, self.width, self.dtype, embedding_init=nn.initializers.normal(0.02), name="embed"
        )
        if self.is_initializing():
            place: jax.Array = self.param(
                "position", nn.initializers.normal(0.01), (tokens.shape[1], self.width), jnp.float32
            )
        else:  # of fewer tokens the first ones
            place = self.get_variable("params", "position")[: tokens.shape[1]]
        dropout = self.dropout if train else 0.0
        x = embed(tokens).astype(place.dtype) + place
        x = nn.Dropout(dropout, deterministic=not dropout, name="drop")(x)
        sizes = dict(self.sizes)
        for name, count in self._stacks().items():
            gate = (gates or {}).get(f"{name}_block")
            scales = tuple((scale or {}).get(f"{name}_{unit}", 1.0) for unit in ("block", "head", "neuron"))
            stack = nn.scan(
                streamed(Block, name, self.fetch),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast if gate is None else 0, nn.broadcast),
                length=sizes.get(f"{name}_block", count),
            )
            heads, neurons = (
                sizes.get(f"{name}_{unit}", own)
                for unit, own in (("head", self.heads), ("neuron", self.neurons))
            )
            fixed = self.width, self.layers, dropout, self.dtype
            x, _ = stack(heads, self.head_width, neurons, *fixed, name=name)(x, gate, scales)
        x = nn.LayerNorm(1e-5, dtype=self.dtype, name="norm")(x)
        if self.tied:
            return at_least_float32(embed.attend(x))
        head = nn.Dense(
            self.vocabulary, False, self.dtype, kernel_init=nn.initializers.normal(0.02), name="head"
        )
        return at_least_float32(head(x))


def build(options: Options, num_classes: int, dtype: DTypeLike | None) -> Transformer:
    """The model that the values of `OPTIONS` describe; dtype: as for `Transformer`."""
    own = {name: options[f"model.{name}"] for name in ("layers", "heads", "tied", "dropout")}
    units, shared = options["partition.units"], options["partition.shared_layers"]
    layers, width, heads = own["layers"], options["model.d_model"], own["heads"]
    if 2 * shared >= layers:
        raise ValueError(
            f"partition.shared_layers={shared} at each end leaves none of model.layers={layers} to deal out; "
            f"set config.partition.shared_layers below {layers / 2:g}"
        )
    head_width = options["model.head_width"]
    if head_width is None and width % heads:
        raise ValueError(
            f"model.heads={heads} does not divide model.d_model={width}; set config.model.heads to a "
            "divisor, or config.model.head_width"
        )
    known = options["model.vocabulary"]
    if 0 < known < num_classes:
        raise ValueError(
            f"model.vocabulary={known:,} is less than the {num_classes:,} tokens of the data set; set "
            "config.model.vocabulary to 0, or at least so many"
        )
    return Transformer(
        vocabulary=known or num_classes,
        width=width,
        head_width=head_width or width // heads,
        neurons=options["model.neurons"] or 4 * width,
        units=units,
        shared=shared,
        dtype=dtype,
        **own,
    )


TRANSFORMER = Entry(build, OPTIONS)
