"""Feed-forward nets in the form of IST, partitioned by hidden neuron.

References:
  Yuan et al., Distributed Learning of Deep Neural Networks using Independent Subnet Training,
  arXiv:1910.02120, 2019, and its released code (bias-free layers, batch normalisation).
"""

from collections.abc import Mapping
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ist_jax.key import Key, Options
from ist_jax.models.interface import Entry, Fetch, Gates, Scale, check_none_empty, streamed
from ist_jax.models.norm import BatchNorm, at_least_float32
from ist_jax.models.sparse import Sparse
from ist_jax.partition import Group, Names

OPTIONS = {
    "model.hidden": Key((1024, 1024), "neurons of each hidden layer", kind=int, least=1),
    "model.output_norm": Key(True, "BatchNorm on the logits, which makes all classes equally likely"),
}
_KERNEL = "dense/kernel"
Inputs = jax.Array | Sparse


class _Dense(nn.Module):
    """x @ kernel, [B, F] -> [B, features]; with `fetch`, of the kernel this device keeps a part."""

    features: int
    dtype: DTypeLike | None
    leaf: str
    fetch: Fetch | None

    @nn.compact
    def __call__(self, x: Inputs) -> jax.Array:
        if self.fetch is not None:
            kernel: jax.Array = self.get_variable("params", "kernel")
        else:
            width = x.width if isinstance(x, Sparse) else x.shape[-1]
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, self.features), jnp.float32)
        if not isinstance(x, Sparse):  # a sum of few rows has no use for a narrow copy of all
            x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        y = x @ kernel if self.fetch is None else self.fetch.product(self.leaf, x, kernel)
        return y if self.dtype is None else y.astype(self.dtype)


class _Layer(nn.Module):
    """Dense without bias, BatchNorm, and ReLU but on the logits, whose norm has no parameters."""

    features: int
    is_output: bool
    normalized: bool
    dtype: DTypeLike | None
    place: str
    fetch: Fetch | None

    @nn.compact
    def __call__(self, x: Inputs) -> jax.Array:
        y = _Dense(self.features, self.dtype, f"{self.place}/{_KERNEL}", self.fetch, name="dense")(x)
        y = at_least_float32(y) if self.is_output else y
        hidden = not self.is_output
        return BatchNorm(affine=hidden, relu=hidden, name="norm")(y) if self.normalized else y


class MLP(nn.Module):
    """Hidden layers of any width; every worker sees all inputs and emits all logits.

    Attributes:
      hidden: widths of the hidden layers.
      num_classes: logits.
      dtype: of the computation, such as bfloat16; None: of the parameters. Those, the norms' statistics
        and the logits are never narrower than float32.
      output_norm: BatchNorm on the logits too, as in IST's speech nets. It makes all classes equally likely,
        which ruins many, rare labels.
      fetch: see `models.streamed`.
    """

    hidden: tuple[int, ...]
    num_classes: int
    dtype: DTypeLike | None = None
    output_norm: bool = True
    fetch: Fetch | None = None

    def unit_axes(self) -> dict[str, Names]:
        """One group per hidden layer: its columns, its norm, and the next layer's rows."""
        numbers = range(1, len(self.hidden) + 1)
        ends = pairwise([None, *(f"hidden{i}" for i in numbers), None])
        layers = [*(f"layer{i}" for i in numbers), "output"]
        axes: dict[str, Names] = {f"{name}/{_KERNEL}": pair for name, pair in zip(layers, ends, strict=True)}
        return axes | {f"layer{i}/norm/.*": (f"hidden{i}",) for i in numbers}

    def subnet(self, sizes: Mapping[str, int]) -> "MLP":
        """The net with `sizes['hidden1']` neurons in the first hidden layer, and so on."""
        return self.clone(hidden=tuple(sizes.get(f"hidden{i + 1}", w) for i, w in enumerate(self.hidden)))

    def check_groups(self, groups: Mapping[str, Group]) -> None:
        """Raises ValueError where a worker would have an empty layer. groups: of `partition`, by name."""
        check_none_empty(groups, "neuron")

    @nn.compact
    def __call__(self, x: Inputs, gates: Gates = None, scale: Scale = None) -> jax.Array:
        """Args: x [N, ...], flattened here, or `Sparse`; gates, scale: see `models`. Returns: [N, classes].

        The global net's wider sums are absorbed by BatchNorm; without one on the logits, they are scaled to
        the mean of what the subnets' would be.
        """
        y: Inputs = x if isinstance(x, Sparse) else x.reshape(len(x), -1)

        def layer(y: Inputs, features: int, place: str, is_output: bool, normalized: bool) -> jax.Array:
            module = streamed(_Layer, place, self.fetch, kept=[_KERNEL])
            return module(features, is_output, normalized, self.dtype, place, self.fetch, name=place)(y)

        for i, width in enumerate(self.hidden, 1):
            y = layer(y, width, f"layer{i}", False, True)
            gate = (gates or {}).get(f"hidden{i}")
            y = y if gate is None else jnp.where(gate, y, 0)
        logits = layer(y, self.num_classes, "output", True, self.output_norm)
        return logits if self.output_norm else logits * (scale or {}).get(f"hidden{len(self.hidden)}", 1.0)


def build(options: Options, num_classes: int, dtype: DTypeLike | None) -> MLP:
    """The net that the values of `OPTIONS` describe; dtype: as for `MLP`."""
    if not options["model.hidden"]:
        raise ValueError("model.hidden=(); set config.model.hidden to one or more positive widths")
    return MLP(options["model.hidden"], num_classes, dtype, options["model.output_norm"])


FEED_FORWARD = Entry(build, OPTIONS)
