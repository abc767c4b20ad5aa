"""The models, and what any Flax model must offer to be trained as subnets.

A model is a `flax.linen.Module` with

  unit_axes()      the array axes that run over units: see `partition.resolve_axes`.
  subnet(sizes)    the same architecture with so many units per group (sizes: dict name -> int).
  __call__(inputs, gates=None, scale=None) -> logits
                   gates: dict group -> bool [n], given in training where a worker may have empty
                   slots. Their parameters and gradients are held at zero by the engine, so a model
                   whose units contribute nothing at zero may ignore the gates; one that looks at
                   them can skip the work.
                   scale: dict group -> float, given at evaluation: the fraction of the workers that
                   held a unit, by which ResIST scales the residual branches of the global model.
  fetch            (optional field, None by default) a `Fetch`. A model that wraps its modules in
                   `streamed` is evaluated with one block or layer in memory at a time, and one that
                   multiplies by `fetch.product` without ever having a whole kernel in memory.

Nothing else in the package knows about a particular architecture. `pytorch.from_torch` makes parameters of a
`ResNet` of a PyTorch net's state dict.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
from flax import traverse_util


class Fetch(Protocol):
    """Access to parameters of which every device keeps a part."""

    def __call__(self, path: str, shard: jax.Array) -> jax.Array:
        """The whole leaf, from what each device keeps of it."""

    def product(self, path: str, x: Any, shard: jax.Array) -> jax.Array:
        """x @ kernel for a leaf [I, O], by which the inputs travel and not the kernel.

        Args: path of the leaf; x [B, I], or `sparse.Sparse`; what this device keeps of it. Returns: [B, O].
        """


def streamed(module: Any, path: str, fetch: Fetch | None, kept: Sequence[str] = ()) -> Any:
    """The module class with its parameters fetched when it is called.

    Args:
      module: a `flax.linen.Module` class.
      path: where its instance stands in the model, such as `section3/blocks`.
      fetch: None: `module` as it is.
      kept: leaves of the module that it takes as this device keeps them, such as `dense/kernel`.
    """
    if fetch is None:
        return module

    def fetch_all(variables: Any) -> Any:
        flat = traverse_util.flatten_dict(variables["params"], sep="/")
        whole = {name: x if name in kept else fetch(f"{path}/{name}", x) for name, x in flat.items()}
        return {"params": traverse_util.unflatten_dict(whole, sep="/")}

    return nn.map_variables(module, "params", trans_in_fn=fetch_all, init=False)
