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
  fetch            (optional field, None by default) a function (path, shard) -> parameter. A model
                   that wraps its modules in `streamed` is evaluated with one block or layer in
                   memory at a time.

Nothing else in the package knows about a particular architecture.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

Fetch = Callable[[str, jax.Array], jax.Array]


def streamed(module: Any, path: str, fetch: Fetch | None) -> Any:
    """The module class with its parameters fetched when it is called.

    Args:
      module: a `flax.linen.Module` class.
      path: where its instance stands in the model, such as `section3/blocks`.
      fetch: (leaf path, what this device keeps of it) -> the leaf; None: `module` as it is.
    """
    if fetch is None:
        return module

    def fetch_all(variables: Any) -> Any:
        flat = traverse_util.flatten_dict(variables["params"], sep="/")
        whole = {name: fetch(f"{path}/{name}", shard) for name, shard in flat.items()}
        return {"params": traverse_util.unflatten_dict(whole, sep="/")}

    return nn.map_variables(module, "params", trans_in_fn=fetch_all, init=False)
