"""Batch normalisation without running averages, as in both papers."""

from collections.abc import Iterable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ist_jax.masking import Params
from ist_jax.models import adapter
from ist_jax.models.interface import Scale

Vectors = tuple[jax.Array, ...]


def at_least_float32(x: jax.Array) -> jax.Array:
    """x in float32, or as it is where it is wider: for statistics, logits and losses."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class BatchNorm(nn.Module):
    """Normalises over all axes but the last with the statistics of the batch at hand.

    The papers use batch statistics in training and evaluation alike; averages collected by subnets
    would not describe the global net. Statistics are never narrower than float32. When the collection
    `batch_stats` is mutable, the mean and the mean square of the batch are stored there; when it is given
    and fixed, it is used instead of the batch's own (`estimate_batch_stats`), so that a single
    example can be classified.

    Attributes:
      affine: learn a scale and a bias.
      relu: of what comes out; one pass over the array with the norm.
      epsilon: added to the variance.
    """

    affine: bool = True
    relu: bool = False
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Args: x [..., C]. Returns: of its shape and dtype."""
        scale, bias = jnp.ones(x.shape[-1:]), jnp.zeros(x.shape[-1:])
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        if self.has_variable("batch_stats", "mean") and not self.is_mutable_collection("batch_stats"):
            mean: jax.Array = self.get_variable("batch_stats", "mean")
            var = self.get_variable("batch_stats", "mean_square") - mean**2
            return _apply(x, mean, _inverse(var, self.epsilon) * scale, bias, self.relu)
        y, mean, var = _normalize(x, scale, bias, self.epsilon, self.relu)
        if self.is_mutable_collection("batch_stats"):
            self.put_variable("batch_stats", "mean", mean)
            self.put_variable("batch_stats", "mean_square", var + mean**2)
        return y


def estimate_batch_stats(model: nn.Module, params: Params, batches: Iterable[PyTree], scale: Scale) -> PyTree:
    """BatchNorm statistics of the merged model over training batches ("precise BN").

    Mean and mean square of every norm's input, averaged over the batches: with them a single example
    can be classified. Subnets' own averages would not describe the global net.

    Args:
      model: with `BatchNorm`s.
      params: nested dict, the global parameters.
      batches: inputs of the model, all of one size.
      scale: from `setup.unit_scale`.

    Returns:
      The collection `batch_stats`, which `model.apply` takes beside `params`; {} where there is no norm.
    """

    @jax.jit
    def statistics(params: Params, inputs: PyTree) -> PyTree:
        _, state = adapter.apply(model, {"params": params}, inputs, scale=scale, mutable=["batch_stats"])
        return state.get("batch_stats", {})

    collected: list[PyTree] = []
    for inputs in batches:
        collected.append(statistics(params, inputs))
        if not collected[0]:
            return {}
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *collected)


def _inverse(var: jax.Array, epsilon: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.maximum(var, 0) + epsilon)


def _apply(x: jax.Array, mean: jax.Array, factor: jax.Array, bias: jax.Array, relu: bool) -> jax.Array:
    y = (x - mean) * factor + bias
    return (nn.relu(y) if relu else y).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, relu: bool) -> Vectors:
    """(normalised x, mean [C], variance [C]); gradients flow through the first alone.

    Mean and mean square are taken in one pass, of the differences to one pixel: of those, the variance does
    not cancel where the mean is large.
    """
    axes = tuple(range(x.ndim - 1))
    wide = at_least_float32(x)
    pixel = wide[(0,) * len(axes)]
    shifted = wide - pixel
    shift, square = shifted.mean(axes), jnp.square(shifted).mean(axes)
    mean, var = pixel + shift, jnp.maximum(square - shift**2, 0)
    return _apply(x, mean, _inverse(var, epsilon) * scale, bias, relu), mean, var


def _normalize_fwd(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, relu: bool
) -> tuple[Vectors, Vectors]:
    y, mean, var = out = _normalize(x, scale, bias, epsilon, relu)
    return out, (x, y, scale, mean, _inverse(var, epsilon))


def _normalize_bwd(epsilon: float, relu: bool, residuals: Vectors, cotangents: Vectors) -> Vectors:
    x, y, scale, mean, inverse = residuals
    dy = at_least_float32(cotangents[0])
    dy = jnp.where(y > 0, dy, 0) if relu else dy
    axes, normed = tuple(range(x.ndim - 1)), (x - mean) * inverse
    dbias, dscale = dy.sum(axes), (dy * normed).sum(axes)
    number = x.size // x.shape[-1]
    dx = (dy - (dbias + normed * dscale) / number) * (scale * inverse)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(scale.dtype)


_normalize.defvjp(_normalize_fwd, _normalize_bwd)
