"""Feed-forward nets in the form of IST, partitioned by hidden neuron.

References:
  Yuan et al., Distributed Learning of Deep Neural Networks using Independent Subnet Training,
  arXiv:1910.02120, 2019, and its released code (bias-free layers, batch normalisation).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ist_jax.models import Fetch, streamed
from ist_jax.models.norm import BatchNorm, at_least_float32


class _Layer(nn.Module):
    """Dense without bias, BatchNorm, and ReLU but on the logits, whose norm has no parameters."""

    features: int
    is_output: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.features, use_bias=False, dtype=self.dtype, name="dense")(x)
        x = at_least_float32(x) if self.is_output else x
        x = BatchNorm(affine=not self.is_output, name="norm")(x)
        return x if self.is_output else nn.relu(x)


class MLP(nn.Module):
    """Hidden layers of any width; every worker sees all inputs and emits all logits.

    Attributes:
      hidden: widths of the hidden layers.
      num_classes: logits.
      dtype: of the computation, such as bfloat16; None: of the parameters. Those, the norms' statistics
        and the logits are never narrower than float32.
      fetch: see `models.streamed`.
    """

    hidden: tuple[int, ...]
    num_classes: int
    dtype: Any = None
    fetch: Fetch | None = None

    def unit_axes(self) -> dict[str, Any]:
        """One group per hidden layer: its columns, its norm, and the next layer's rows."""
        names = [None, *(f"hidden{i + 1}" for i in range(len(self.hidden))), None]
        layers = [f"layer{i + 1}" for i in range(len(self.hidden))] + ["output"]
        axes: dict[str, Any] = {
            f"{layer}/dense/kernel": (names[i], names[i + 1]) for i, layer in enumerate(layers)
        }
        return axes | {f"layer{i + 1}/norm/.*": (f"hidden{i + 1}",) for i in range(len(self.hidden))}

    def subnet(self, sizes: Mapping[str, int]) -> "MLP":
        """The net with `sizes['hidden1']` neurons in the first hidden layer, and so on."""
        return self.clone(hidden=tuple(sizes.get(f"hidden{i + 1}", w) for i, w in enumerate(self.hidden)))

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        gates: Mapping[str, jax.Array] | None = None,
        scale: Mapping[str, float] | None = None,
    ) -> jax.Array:
        """Args: x [N, ...], flattened here; gates: see `models`; scale is unused, since BatchNorm
        absorbs the wider sums of the global net. Returns: [N, classes]."""
        del scale
        x = x.reshape(len(x), -1)
        for i, width in enumerate(self.hidden):
            layer = streamed(_Layer, f"layer{i + 1}", self.fetch)
            x = layer(width, False, self.dtype, name=f"layer{i + 1}")(x)
            gate = (gates or {}).get(f"hidden{i + 1}")
            x = x if gate is None else jnp.where(gate, x, 0)
        return streamed(_Layer, "output", self.fetch)(self.num_classes, True, self.dtype, name="output")(x)
