"""Batch normalisation without running averages, as in both papers."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
    """x in float32, or as it is where it is wider: for statistics, logits and losses."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class BatchNorm(nn.Module):
    """Normalises over all axes but the last with the statistics of the batch at hand.

    The papers use batch statistics in training and evaluation alike; averages collected by subnets
    would not describe the global net. Statistics are never narrower than float32. When the collection
    `batch_stats` is mutable, the mean and the mean square of the batch are stored there; when it is given
    and fixed, it is used instead of the batch's own (`scoring.estimate_batch_stats`), so that a single
    example can be classified.

    Attributes:
      affine: learn a scale and a bias.
      epsilon: added to the variance.
    """

    affine: bool = True
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Args: x [..., C]. Returns: of its shape and dtype."""
        axes = tuple(range(x.ndim - 1))
        if self.has_variable("batch_stats", "mean") and not self.is_mutable_collection("batch_stats"):
            mean: jax.Array = self.get_variable("batch_stats", "mean")
            var = self.get_variable("batch_stats", "mean_square") - mean**2
        else:
            wide = at_least_float32(x)
            mean = wide.mean(axes)
            var = jnp.square(wide - mean).mean(axes)
            if self.is_mutable_collection("batch_stats"):
                self.put_variable("batch_stats", "mean", mean)
                self.put_variable("batch_stats", "mean_square", var + mean**2)
        factor = jax.lax.rsqrt(jnp.maximum(var, 0) + self.epsilon)
        if not self.affine:
            return ((x - mean) * factor).astype(x.dtype)
        factor *= self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return ((x - mean) * factor + bias).astype(x.dtype)
