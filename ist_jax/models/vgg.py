"""VGG nets with batch normalisation, partitioned by channel.

References:
  Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition,
  arXiv:1409.1556, 2014.
  Yuan et al., Distributed Learning of Deep Neural Networks using Independent Subnet Training,
  arXiv:1910.02120, 2019: a VGG12, whose layers it does not list.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise

import flax.linen as nn
import jax
from flax.core import FrozenDict
from jax.typing import DTypeLike

from ist_jax.key import Key, Options
from ist_jax.models.conv import convolution
from ist_jax.models.interface import Entry, Fetch, Scale, check_image, check_none_empty, streamed
from ist_jax.models.norm import BatchNorm, at_least_float32
from ist_jax.partition import Group, Names, Rules

OPTIONS = {
    "model.channels": Key(
        (64, 128, 256, 512, 512),
        "channels of each section, behind which the image is halved",
        kind=int,
        least=1,
    ),
    "model.convolutions": Key(2, "3x3 convolutions in each section", least=1),
    "model.dense": Key((4096,), "neurons of the dense layers before the logits", kind=int, least=1),
}


class _Layer(nn.Module):
    """A convolution, BatchNorm and ReLU: [N, H, W, C] -> [N, H, W, width]."""

    width: int
    size: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = convolution(self.width, self.size, dtype=self.dtype, name="conv")(x)
        return BatchNorm(relu=True, name="norm")(y)


class VGG(nn.Module):
    """Sections of 3x3 convolutions with max-pooling behind each, a mean over the image, and dense layers.

    Every layer is followed by BatchNorm and ReLU and has no bias; its channels, or neurons, are a group that
    is named like the layer, 'layer1' and so on. A dense layer is a 1x1 convolution of the image's mean. All
    workers see all inputs and emit all logits.

    Attributes:
      channels: of each section.
      convolutions: in each section.
      dense: neurons of the dense layers before the logits.
      num_classes: logits.
      dtype: as for `resnet.ResNet`.
      sizes: how many units there are of each group, where they are not those of the above: of a subnet.
      fetch: see `models.streamed`.
    """

    channels: tuple[int, ...]
    convolutions: int
    dense: tuple[int, ...]
    num_classes: int
    dtype: DTypeLike | None = None
    sizes: Mapping[str, int] = FrozenDict()
    fetch: Fetch | None = None

    def _layers(self) -> Iterator[tuple[str, int, int]]:
        """(name, units, size of the kernel) of each."""
        convolutions = [(width, 3) for width in self.channels for _ in range(self.convolutions)]
        layers = convolutions + [(width, 1) for width in self.dense]
        for i, (width, size) in enumerate(layers, 1):
            yield f"layer{i}", self.sizes.get(f"layer{i}", width), size

    def unit_axes(self) -> Rules:
        """One group per layer: the channels that come out, their norm, and the next layer's inputs."""
        names = [name for name, *_ in self._layers()]
        rules: dict[str, Names] = {f"{name}/norm/.*": (name,) for name in names}
        rules |= {f"{b}/conv/kernel": (None, None, a, b) for a, b in pairwise([None, *names])}
        return rules | {"head/kernel": (names[-1], None)}

    def subnet(self, sizes: Mapping[str, int]) -> "VGG":
        """The net with `sizes['layer1']` channels in the first layer, and so on."""
        return self.clone(sizes=FrozenDict(sizes))

    def check_groups(self, groups: Mapping[str, Group]) -> None:
        """Raises ValueError where a worker would have an empty layer. groups: of `partition`, by name."""
        check_none_empty(groups, "channel")

    def check_example(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError for examples that are no images [H, W, C] or too small to be halved so often."""
        check_image(shape, "a VGG net")
        least = 2 ** len(self.channels)
        if min(shape[:2]) < least:
            raise ValueError(
                f"an image of {shape[0]} x {shape[1]} pixels cannot be halved by each of the "
                f"{len(self.channels)} sections of model.channels; set config.model.channels to fewer "
                f"numbers or show images of {least} x {least} and more"
            )

    @nn.compact
    def __call__(self, x: jax.Array, scale: Scale = None) -> jax.Array:
        """Args: x [N, H, W, C], normalised; scale: see `models`. Returns: [N, classes].

        The global net's wider sums are absorbed by BatchNorm; those of the logits are scaled to the mean of
        what the subnets' would be.
        """
        count = len(self.channels) * self.convolutions
        name = ""
        for i, (name, width, size) in enumerate(self._layers(), 1):
            x = streamed(_Layer, name, self.fetch)(width, size, self.dtype, name=name)(x)
            if i <= count and not i % self.convolutions:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            if i == count:
                x = x.mean((1, 2), keepdims=True)
        head = streamed(nn.Dense, "head", self.fetch)(self.num_classes, dtype=self.dtype, name="head")
        return at_least_float32(head(x[:, 0, 0] * (scale or {}).get(name, 1.0)))


def build(options: Options, num_classes: int, dtype: DTypeLike | None) -> VGG:
    """The net that the values of `OPTIONS` describe; dtype: as for `VGG`."""
    if not options["model.channels"]:
        raise ValueError("model.channels=(); set config.model.channels to one or more positive numbers")
    own = {name: options[f"model.{name}"] for name in ("channels", "convolutions", "dense")}
    return VGG(num_classes=num_classes, dtype=dtype, **own)


NET = Entry(build, OPTIONS)
