"""The models, and what any Flax model must offer to be trained as subnets.

A model is a `flax.linen.Module`, or an NNX one in `flax.nnx.bridge.ToLinen`, with

  unit_axes()      the array axes that run over units: see `partition.resolve_axes`. Without it a model is
                   trained by the methods that deal out no units.
  subnet(sizes)    the same architecture with so many units per group (sizes: dict name -> int).
  __call__(inputs, train=False, gates=None, scale=None) -> outputs
                   called with those of these arguments that it has, see `adapter`.
                   train: whether it is trained (or deterministic: whether not), for Dropout.
                   gates: dict group -> bool [n], or [L, n] where every layer has a draw of its own
                   (`partition.Each`), given in training where a worker may have empty slots. Their
                   parameters and gradients are held at zero by the engine, so a model whose units
                   contribute nothing at zero may ignore the gates; one that looks at them can skip
                   the work.
                   scale: dict group -> float, given at evaluation: the fraction of the workers that
                   held a unit, by which ResIST scales the residual branches of the global model.
  fetch            (optional field, None by default) a `Fetch`. A model that wraps its modules in
                   `streamed` is evaluated with one block or layer in memory at a time, and one that
                   multiplies by `fetch.product` without ever having a whole kernel in memory.

  check_groups(groups)
                   (optional) raises ValueError, naming the key, for a partition of its units (dict name ->
                   `partition.Group`) that it cannot be trained with.
  check_example(shape)
                   (optional) raises ValueError for examples of a shape that it cannot be shown.

A model that a config names is one file with its module, its options and `build`, and one line of `MODELS`.
Nothing else in the package knows about a particular architecture. `pytorch.from_torch` makes parameters of a
`ResNet` of a PyTorch net's state dict.
"""

from ist_jax.models import mlp, resnet, transformer, vgg
from ist_jax.models.interface import Entry, Fetch, streamed

__all__ = ["MODELS", "Entry", "Fetch", "streamed"]

MODELS: dict[str, Entry] = {
    "resnet": resnet.RESNET,
    "mlp": mlp.FEED_FORWARD,
    "transformer": transformer.TRANSFORMER,
    "vgg": vgg.NET,
}
