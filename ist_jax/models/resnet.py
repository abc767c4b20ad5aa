"""Pre-activation ResNets of basic or bottleneck blocks, partitioned by block.

References:
  He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385, 2015: the ImageNet nets.
  He et al., Identity Mappings in Deep Residual Networks, arXiv:1603.05027, 2016.
  Dun et al., ResIST: Layer-Wise Decomposition of ResNets for Distributed Training,
  arXiv:2107.00961, 2021.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ist_jax.key import Key, Options
from ist_jax.models.conv import conv_general_dilated
from ist_jax.models.interface import Entry, Fetch, Gates, Scale, streamed
from ist_jax.models.norm import BatchNorm, at_least_float32
from ist_jax.partition import Group, Rules

Gate = jax.Array | None  # bool: whether a block is there
Factor = jax.Array | float
_Use = tuple[Gate, Factor]  # gates [units] and scale of a group


def _conv(width: int, size: int, strides: int = 1, **options: Any) -> nn.Conv:
    """A size x size convolution that pads size // 2 pixels on each side, as PyTorch's nets do.

    'SAME' is the same only where the stride is 1: of an even number of pixels at stride 2 it pads 0 and 1.
    """
    options |= {"use_bias": False, "conv_general_dilated": conv_general_dilated}
    return nn.Conv(width, (size, size), strides, size // 2, **options)


class Block(nn.Module):
    """A basic block: x + scale * conv2(relu(norm2(conv1(relu(norm1(x)))))).

    Attributes:
      width: channels; `expansion` times as many come out.
      strides: of the first 3x3 convolution.
      project: a strided 1x1 convolution on the skip connection, from the first activation.
      dtype: of the convolutions; None: of their inputs and parameters.
    """

    width: int
    strides: int = 1
    project: bool = False
    dtype: DTypeLike | None = None
    expansion = 1

    def _convolutions(self) -> list[tuple[int, int, int]]:
        """(channels, size, strides) of each."""
        return [(self.width, 3, self.strides), (self.width, 3, 1)]

    def setup(self) -> None:
        for i, convolution in enumerate(self._convolutions(), 1):
            setattr(self, f"norm{i}", BatchNorm(relu=True))
            setattr(self, f"conv{i}", _conv(*convolution, dtype=self.dtype))
        if self.project:
            self.shortcut = _conv(self.expansion * self.width, 1, self.strides, dtype=self.dtype)

    def _residual(self, x: jax.Array, scale: Factor) -> jax.Array:
        y = self.norm1(x)
        skip = self.shortcut(y) if self.project else x
        for i in range(1, len(self._convolutions())):
            y = getattr(self, f"norm{i + 1}")(getattr(self, f"conv{i}")(y))
        return skip + (scale * getattr(self, f"conv{i + 1}")(y)).astype(skip.dtype)

    def __call__(self, x: jax.Array, gate: Gate = None, scale: Factor = 1.0) -> tuple[jax.Array, None]:
        """Args: x [N, H, W, C]; gate: a bool scalar, False skips the block; scale of the branch.

        Returns: ([N, H', W', expansion * width], None), the form that `nn.scan` takes.
        """
        if gate is None:
            return self._residual(x, scale), None

        def skip(block: Block, x: jax.Array, _: Factor) -> jax.Array:
            return _pass_on(x, block.strides, block.expansion * block.width)

        return nn.cond(gate, type(self)._residual, skip, self, x, scale), None


def _pass_on(x: jax.Array, strides: int, channels: int) -> jax.Array:
    """What skips a block, [N, H, W, C] -> [N, H', W', channels]: every `strides`-th pixel, new channels 0."""
    return jnp.pad(x[:, ::strides, ::strides], ((0, 0),) * 3 + ((0, channels - x.shape[-1]),))


class Bottleneck(Block):
    """A bottleneck block: 1x1, 3x3 and 1x1 convolutions, each after norm and relu; 4 x width channels."""

    expansion = 4

    def _convolutions(self) -> list[tuple[int, int, int]]:
        return [(self.width, 1, 1), (self.width, 3, self.strides), (self.expansion * self.width, 1, 1)]


BLOCKS = {"basic": Block, "bottleneck": Bottleneck}
_STEMS = {"small": (3, 1), "imagenet": (7, 2)}  # size and strides of the first layer
OPTIONS = {
    "model.sections": Key(
        (1, 1, 9, 1), "blocks per section; the first of each is shared by all workers", kind=int, least=1
    ),
    "model.width": Key(16, "channels of section 1, doubled in each", least=1),
    "model.block": Key(
        "basic", "kind of block; 'bottleneck': 4 x width channels between blocks", choices=tuple(BLOCKS)
    ),
    "model.stem": Key(
        "small",
        "first layer; 'small': 3x3, 'imagenet': 7x7 and max-pool, both of stride 2",
        choices=tuple(_STEMS),
    ),
    "partition.sections": Key((3,), "sections whose blocks are dealt out, counted from 1", kind=int),
    "partition.deal_strided": Key(
        False, "deal out the strided blocks of those sections too: one worker has it, the others skip it"
    ),
}


class ResNet(nn.Module):
    """Pre-activation ResNet without a final norm, as in ResIST.

    Every section is a `first` block (strided but in section 1, projected where its shape changes) and
    `blocks`, the rest, stacked on axis 0 by `nn.scan`. The stacked blocks of the sections in `partitioned`
    are units, and with `deal_strided` their strided blocks are as well, a group of one each.

    Attributes:
      sections: blocks per section; (3, 4, 23, 3) is the paper's ResNet101.
      width: channels of the first section; doubled in each.
      num_classes: logits.
      partitioned: numbers of the sections that are partitioned, counted from 1.
      deal_strided: every strided block of those sections belongs to one worker; the others skip it.
      dtype: of the computation, such as bfloat16; None: of the parameters. Those, the norms' statistics
        and the logits are never narrower than float32.
      block: 'basic' (3x3, 3x3) or 'bottleneck' (1x1, 3x3, 1x1).
      stem: 'small', a 3x3 convolution, or 'imagenet', a 7x7 one and a max-pool, both of stride 2.
      fetch: see `models.streamed`.
      unroll: stacked blocks per iteration of the compiled loop.
    """

    sections: tuple[int, ...]
    width: int
    num_classes: int
    partitioned: tuple[int, ...] = (3,)
    deal_strided: bool = False
    dtype: DTypeLike | None = None
    block: str = "basic"
    stem: str = "small"
    fetch: Fetch | None = None
    unroll: int = 1

    def unit_axes(self) -> Rules:
        """One group per partitioned section, and one per dealt strided block.

        Raises:
          ValueError: there is nothing to partition.
        """
        for i in self.partitioned:
            if not 1 <= i <= len(self.sections) or self.sections[i - 1] < 2:
                raise ValueError(
                    f"partition.sections={self.partitioned}: section {i} of model.sections="
                    f"{self.sections} has no partitionable block (all but its first)"
                )
        rest = {f"section{i}/blocks/.*": (f"section{i}", ...) for i in self.partitioned}
        return rest | {f"section{i}/first/.*": (f"section{i}_first", ...) for i in self._dealt()}

    def _dealt(self) -> tuple[int, ...]:
        return tuple(i for i in self.partitioned if i > 1) if self.deal_strided else ()

    def subnet(self, sizes: Mapping[str, int]) -> "ResNet":
        """The net with `sizes['section3']` stacked blocks in section 3, and so on."""
        counts = (sizes.get(f"section{i}", s - 1) + 1 for i, s in enumerate(self.sections, 1))
        return self.clone(sections=tuple(counts))

    def check_groups(self, groups: Mapping[str, Group]) -> None:
        """Raises ValueError where every worker would hold a dealt block. groups: of `partition`, by name."""
        least = max((group.min_units for group in groups.values()), default=0)
        if self.deal_strided and least:
            raise ValueError(
                f"partition.min_units={least} gives every worker the strided blocks that "
                "partition.deal_strided=True deals out; set config.partition.min_units to 0"
            )

    def check_example(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError for examples that are no images [H, W, C]."""
        if len(shape) != 3:
            found = f"an example of shape {','.join(map(str, shape))}" if shape else "a sparse example"
            raise ValueError(f"{found} is no image for a ResNet")

    @nn.compact
    def __call__(self, x: jax.Array, gates: Gates = None, scale: Scale = None) -> jax.Array:
        """Args: x [N, H, W, C], normalised; gates and scale: see `models`. Returns: [N, classes]."""
        x = _conv(self.width, *_STEMS[self.stem], dtype=self.dtype, name="stem")(x)
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        gates, scale = gates or {}, scale or {}
        for i, count in enumerate(self.sections, 1):
            uses = [(gates.get(name), scale.get(name, 1.0)) for name in (f"section{i}", f"section{i}_first")]
            width, strides, dealt = self.width * 2 ** (i - 1), 2 if i > 1 else 1, i in self._dealt()
            fixed = (self.dtype, self.fetch, self.unroll)
            section = _Section(BLOCKS[self.block], count, width, strides, dealt, *fixed, name=f"section{i}")
            x = section(x, *uses)
        return at_least_float32(nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x.mean((1, 2))))


class _Section(nn.Module):
    """The first block, then count - 1 stacked ones: [N, H, W, C] -> [N, H / strides, W / strides, C']."""

    block: type[Block]
    count: int
    width: int
    strides: int
    dealt: bool
    dtype: DTypeLike | None
    fetch: Fetch | None
    unroll: int

    @nn.compact
    def __call__(self, x: jax.Array, rest: _Use, first: _Use) -> jax.Array:
        project = self.strides > 1 or x.shape[-1] != self.block.expansion * self.width
        block = self.block
        if self.dealt:
            block = streamed(_with_unit_axis(block, self.is_initializing()), f"{self.name}/first", self.fetch)
        gates, scale = first
        gate = None if gates is None else gates[0]
        y, _ = block(self.width, self.strides, project, self.dtype, name="first")(x, gate)
        if self.dealt and gate is None:  # what x + scale * branch is to the blocks that keep the shape
            y = scale * y + (1 - scale) * _pass_on(x, self.strides, y.shape[-1])
        gates, scale = rest
        if self.count > 1:
            blocks = nn.scan(
                streamed(self.block, f"{self.name}/blocks", self.fetch),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast if gates is None else 0, nn.broadcast),
                length=self.count - 1,
                unroll=self.unroll,
            )
            y, _ = blocks(self.width, dtype=self.dtype, name="blocks")(y, gates, scale)
        return y


def _with_unit_axis(block: type[Block], init: bool) -> type[Block]:
    """The block with a leading axis of size 1 on all of its parameters; init: they are made now."""
    cut, put_back = partial(jax.tree.map, lambda x: x[0]), partial(jax.tree.map, lambda x: x[None])
    return nn.map_variables(block, "params", trans_in_fn=cut, trans_out_fn=put_back, init=init)


def build(options: Options, num_classes: int, dtype: DTypeLike | None) -> ResNet:
    """The net that the values of `OPTIONS` describe; dtype: as for `ResNet`."""
    if not options["model.sections"]:
        raise ValueError("model.sections=(); set config.model.sections to one or more positive numbers")
    own = {name: options[f"model.{name}"] for name in ("sections", "width", "block", "stem")}
    dealt = {"partitioned": options["partition.sections"], "deal_strided": options["partition.deal_strided"]}
    return ResNet(num_classes=num_classes, dtype=dtype, **own, **dealt)


RESNET = Entry(build, OPTIONS)
