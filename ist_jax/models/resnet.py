"""Pre-activation ResNets of basic or bottleneck blocks, partitioned by block or by channel.

References:
  He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385, 2015: the ImageNet nets.
  He et al., Identity Mappings in Deep Residual Networks, arXiv:1603.05027, 2016.
  Dun et al., ResIST: Layer-Wise Decomposition of ResNets for Distributed Training,
  arXiv:2107.00961, 2021: by block.
  Wang et al., LoFT: Finding Lottery Tickets through Filter-wise Training, AISTATS 2023: by the channels
  inside a block.
"""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from ist_jax.key import Key, Options
from ist_jax.models.conv import convolution
from ist_jax.models.interface import Entry, Fetch, Gates, Scale, check_image, check_none_empty, streamed
from ist_jax.models.norm import BatchNorm, at_least_float32
from ist_jax.partition import Each, Group, Names, Rules

Gate = jax.Array | None  # bool: whether a block is there
Factor = jax.Array | float


class _Use(NamedTuple):
    """How the units of a section's blocks are used: gates [units] of the blocks, the scale of their branches,
    and that of a projection of what comes in."""

    gates: Gate
    scale: Factor
    of_input: Factor


class Block(nn.Module):
    """A basic block: x + scale * conv2(relu(norm2(conv1(relu(norm1(x)))))).

    Attributes:
      channels: that come out of each convolution.
      strides: of the first 3x3 convolution.
      project: a strided 1x1 convolution on the skip connection, from the first activation.
      dtype: of the convolutions; None: of their inputs and parameters.
    """

    channels: tuple[int, ...]
    strides: int = 1
    project: bool = False
    dtype: DTypeLike | None = None
    kernels: ClassVar[tuple[int, ...]] = (3, 3)  # their sizes
    expansion = 1

    @classmethod
    def widths(cls, width: int) -> tuple[int, ...]:
        """Channels that come out of each convolution, in a section of this width."""
        return (*(width,) * (len(cls.kernels) - 1), cls.expansion * width)

    def setup(self) -> None:
        for i, (channels, size) in enumerate(zip(self.channels, self.kernels, strict=True), 1):
            strides = self.strides if i - 1 == self.kernels.index(3) else 1
            setattr(self, f"norm{i}", BatchNorm(relu=True))
            setattr(self, f"conv{i}", convolution(channels, size, strides, dtype=self.dtype))
        if self.project:
            self.shortcut = convolution(self.channels[-1], 1, self.strides, dtype=self.dtype)

    def _residual(self, x: jax.Array, scale: Factor, of_input: Factor) -> jax.Array:
        y = self.norm1(x)
        skip = x
        if self.project:
            skip = self.shortcut(y)
            skip = (of_input * skip).astype(skip.dtype)
        for i in range(1, len(self.kernels)):
            y = getattr(self, f"norm{i + 1}")(getattr(self, f"conv{i}")(y))
        return skip + (scale * getattr(self, f"conv{i + 1}")(y)).astype(skip.dtype)

    def __call__(
        self, x: jax.Array, gate: Gate = None, scale: Factor = 1.0, of_input: Factor = 1.0
    ) -> tuple[jax.Array, None]:
        """Args: x [N, H, W, C]; gate: a bool scalar, False skips the block; scales of the branch and of the
        projection.

        Returns: ([N, H', W', channels[-1]], None), the form that `nn.scan` takes.
        """
        if gate is None:
            return self._residual(x, scale, of_input), None

        def skip(block: Block, x: jax.Array, *_: Factor) -> jax.Array:
            return _pass_on(x, block.strides, block.channels[-1])

        return nn.cond(gate, type(self)._residual, skip, self, x, scale, of_input), None


def _pass_on(x: jax.Array, strides: int, channels: int) -> jax.Array:
    """What skips a block, [N, H, W, C] -> [N, H', W', channels]: every `strides`-th pixel, new channels 0."""
    return jnp.pad(x[:, ::strides, ::strides], ((0, 0),) * 3 + ((0, channels - x.shape[-1]),))


class Bottleneck(Block):
    """A bottleneck block: 1x1, 3x3 and 1x1 convolutions, each after norm and relu; 4 x width channels."""

    kernels = (1, 3, 1)
    expansion = 4


_NORM1 = ("norm1/scale", "norm1/bias")
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
    "partition.sections": Key(
        (3,), "sections whose blocks or channels are dealt out, counted from 1", kind=int
    ),
    "partition.channels": Key(
        "none",
        "channels that are dealt out in place of blocks; 'inner': those inside a block, 'all': those between "
        "blocks, too",
        choices=("none", "inner", "all"),
    ),
    "partition.deal_strided": Key(
        False, "deal out the strided blocks of those sections too: one worker has it, the others skip it"
    ),
}


class ResNet(nn.Module):
    """Pre-activation ResNet without a final norm, as in ResIST.

    Every section is a `first` block (strided but in section 1, projected where its shape changes) and
    `blocks`, the rest, stacked on axis 0 by `nn.scan`. What is dealt out of the sections in `partitioned`:

    Blocks: the stacked ones, group 'section3', and with `deal_strided` the strided block of each as well, a
    group of one.

    Channels, where `channels` is 'inner': those between the convolutions of a block, with a draw for every
    block, groups 'section3_first_inner1' and, of the stacked ones, 'section3_inner1'. Where it is 'all',
    those that run through the section as well, 'section3_stream', of which a worker has the same in all
    blocks. A norm's scale and bias go with their channel.

    Attributes:
      sections: blocks per section; (3, 4, 23, 3) is the paper's ResNet101, (2, 2, 2, 2) ResNet18.
      width: channels of the first section; doubled in each.
      num_classes: logits.
      partitioned: numbers of the sections that are partitioned, counted from 1.
      deal_strided: every strided block of those sections belongs to one worker; the others skip it.
      dtype: of the computation, such as bfloat16; None: of the parameters. Those, the norms' statistics
        and the logits are never narrower than float32.
      block: 'basic' (3x3, 3x3) or 'bottleneck' (1x1, 3x3, 1x1).
      stem: 'small', a 3x3 convolution, or 'imagenet', a 7x7 one and a max-pool, both of stride 2.
      channels: 'none', 'inner' or 'all' of the channels are dealt out, in place of blocks.
      sizes: how many there are of each group of channels, where they are not those of the width: of a subnet.
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
    channels: str = "none"
    sizes: Mapping[str, int] = FrozenDict()
    fetch: Fetch | None = None
    unroll: int = 1

    def unit_axes(self) -> Rules:
        """One group per partitioned section, and one per dealt strided block; or those of channels.

        Raises:
          ValueError: there is nothing to partition.
        """
        least = 2 if self.channels == "none" else 1
        for i in self.partitioned:
            if not 1 <= i <= len(self.sections) or self.sections[i - 1] < least:
                raise ValueError(
                    f"partition.sections={self.partitioned}: section {i} of model.sections={self.sections} "
                    + ("has no partitionable block (all but its first)" if least == 2 else "is not there")
                )
        if self.channels != "none":
            return self._channel_axes() if self.partitioned else {}
        rest = {f"section{i}/blocks/.*": (f"section{i}", ...) for i in self.partitioned}
        return rest | {f"section{i}/first/.*": (f"section{i}_first", ...) for i in self._dealt()}

    def _channel_axes(self) -> Rules:
        group = {name: name for name in self._dealt_channels()}.get
        rules: dict[str, Names] = {
            "stem/kernel": (None, None, None, group(self._along(1, first=True)[0])),
            "head/kernel": (group(f"section{len(self.sections)}_stream"), None),
        }
        for i, count in enumerate(self.sections, 1):
            for stack in ("first", "blocks")[: min(count, 2)]:
                place, first = f"section{i}/{stack}", stack == "first"
                lead = () if first else (None,)
                source, *inner, target = map(group, self._along(i, first))
                # the stacked blocks have draws of their own of what is inside them
                along = [source, *(name and (name if first else Each(name)) for name in inner), target]
                for j, (before, after) in enumerate(pairwise(along), 1):
                    rules[f"{place}/norm{j}/.*"] = (*lead, before)
                    rules[f"{place}/conv{j}/kernel"] = (*lead, None, None, before, after)
                if first and self._projects(i):
                    rules[f"{place}/shortcut/kernel"] = (None, None, source, target)
        return rules

    def _dealt_channels(self) -> set[str]:
        """The groups of channels."""
        of_blocks = (self._along(i, first)[1:] for i in self.partitioned for first in (True, False))
        names = {name for own in of_blocks for name in own}
        return {name for name in names if self.channels == "all" or not name.endswith("_stream")}

    def _along(self, i: int, first: bool) -> list[str]:
        """What the channels of a block are called: that come in, between its convolutions, and out."""
        inner = range(1, len(BLOCKS[self.block].kernels))
        before = i - 1 if first and self._projects(i) else i
        stack = f"section{i}_first" if first else f"section{i}"
        return [f"section{before}_stream", *(f"{stack}_inner{j}" for j in inner), f"section{i}_stream"]

    def _dealt(self) -> tuple[int, ...]:
        return tuple(i for i in self.partitioned if i > 1) if self.deal_strided else ()

    def _projects(self, i: int) -> bool:
        """Whether the first block of a section changes the shape."""
        return i > 1 or BLOCKS[self.block].expansion > 1

    def _widths(self, i: int, first: bool) -> tuple[int, ...]:
        """Channels that come out of the convolutions of a section's blocks."""
        widths = BLOCKS[self.block].widths(self.width * 2 ** (i - 1))
        return tuple(map(self.sizes.get, self._along(i, first)[1:], widths))

    def subnet(self, sizes: Mapping[str, int]) -> "ResNet":
        """The net with `sizes['section3']` stacked blocks in section 3, and so on, or so many channels."""
        if self.channels != "none":
            return self.clone(sizes=FrozenDict(sizes))
        counts = (sizes.get(f"section{i}", s - 1) + 1 for i, s in enumerate(self.sections, 1))
        return self.clone(sections=tuple(counts))

    def check_groups(self, groups: Mapping[str, Group]) -> None:
        """Raises ValueError where every worker would hold a dealt block, or one no channel of a convolution.

        groups: of `partition`, by name.
        """
        if self.channels != "none":
            check_none_empty(groups, "channel")
        least = max((group.min_units for group in groups.values()), default=0)
        if self.deal_strided and least:
            raise ValueError(
                f"partition.min_units={least} gives every worker the strided blocks that "
                "partition.deal_strided=True deals out; set config.partition.min_units to 0"
            )

    def check_example(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError for examples that are no images [H, W, C]."""
        check_image(shape, "a ResNet")

    @nn.compact
    def __call__(self, x: jax.Array, gates: Gates = None, scale: Scale = None) -> jax.Array:
        """Args: x [N, H, W, C], normalised; gates and scale: see `models`. Returns: [N, classes].

        Gates of channels are not looked at: what is zero adds nothing. What comes in where a sum over dealt
        channels joins others' results or the logits is scaled; in front of a norm it need not be.
        """
        stem = streamed(nn.Conv, "stem", self.fetch)
        width = self.sizes.get(self._along(1, first=True)[0], self.width)
        x = convolution(width, *_STEMS[self.stem], of=stem, dtype=self.dtype, name="stem")(x)
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        gates, scale = gates or {}, scale or {}
        for i, count in enumerate(self.sections, 1):
            section = _Section(
                block=BLOCKS[self.block],
                count=count,
                channels=(self._widths(i, first=True), self._widths(i, first=False)),
                strides=2 if i > 1 else 1,
                project=self._projects(i),
                dealt=i in self._dealt(),
                streams=f"section{i}_stream" in self._dealt_channels(),
                dtype=self.dtype,
                fetch=self.fetch,
                unroll=self.unroll,
                name=f"section{i}",
            )
            x = section(x, self._use(i, True, gates, scale), self._use(i, False, gates, scale))
        x = x.mean((1, 2)) * scale.get(f"section{len(self.sections)}_stream", 1.0)
        head = streamed(nn.Dense, "head", self.fetch)(self.num_classes, dtype=self.dtype, name="head")
        return at_least_float32(head(x))

    def _use(self, i: int, first: bool, gates: Mapping[str, jax.Array], scale: Mapping[str, float]) -> _Use:
        """Of a section's first block, or of its stacked ones."""
        source, *_, last, _ = self._along(i, first)
        blocks = f"section{i}_first" if first else f"section{i}"
        own = scale.get(blocks if self.channels == "none" else last, 1.0)
        return _Use(gates.get(blocks), own, scale.get(source, 1.0))


class _Section(nn.Module):
    """The first block, then count - 1 stacked ones: [N, H, W, C] -> [N, H / strides, W / strides, C']."""

    block: type[Block]
    count: int
    channels: tuple[tuple[int, ...], tuple[int, ...]]  # of the first block and of the stacked ones
    strides: int
    project: bool
    dealt: bool
    streams: bool
    dtype: DTypeLike | None
    fetch: Fetch | None
    unroll: int

    @nn.compact
    def __call__(self, x: jax.Array, first: _Use, rest: _Use) -> jax.Array:
        block = _with_unit_axis(self.block, self.is_initializing()) if self.dealt else self.block
        block = streamed(block, f"{self.name}/first", self.fetch)
        own = block(self.channels[0], self.strides, self.project, self.dtype, name="first")
        gate = None if first.gates is None else first.gates[0]
        if self.dealt:
            y, _ = own(x, gate)
            if gate is None:  # what x + scale * branch is to the blocks that keep the shape
                y = first.scale * y + (1 - first.scale) * _pass_on(x, self.strides, y.shape[-1])
        else:
            y, _ = own(x, None, first.scale, first.of_input)
        if self.count > 1:
            blocks = nn.scan(
                streamed(self.block, f"{self.name}/blocks", self.fetch, kept=_NORM1 if self.streams else ()),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast if rest.gates is None else 0, nn.broadcast),
                length=self.count - 1,
                unroll=self.unroll,
            )
            if self.streams:  # a device keeps no layer of these, but a part of all
                blocks = streamed(blocks, f"{self.name}/blocks", self.fetch, only=_NORM1)
            y, _ = blocks(self.channels[1], dtype=self.dtype, name="blocks")(y, rest.gates, rest.scale)
        return y


def _with_unit_axis(block: type[Block], init: bool) -> type[Block]:
    """The block with a leading axis of size 1 on all of its parameters; init: they are made now."""
    cut, put_back = partial(jax.tree.map, lambda x: x[0]), partial(jax.tree.map, lambda x: x[None])
    return nn.map_variables(block, "params", trans_in_fn=cut, trans_out_fn=put_back, init=init)


def build(options: Options, num_classes: int, dtype: DTypeLike | None) -> ResNet:
    """The net that the values of `OPTIONS` describe; dtype: as for `ResNet`."""
    if not options["model.sections"]:
        raise ValueError("model.sections=(); set config.model.sections to one or more positive numbers")
    if options["partition.deal_strided"] and options["partition.channels"] != "none":
        raise ValueError(
            f"partition.deal_strided=True deals out blocks, and partition.channels="
            f"{options['partition.channels']!r} their channels; set config.partition.deal_strided to False "
            "or config.partition.channels to 'none'"
        )
    own = {name: options[f"model.{name}"] for name in ("sections", "width", "block", "stem")}
    own |= {name: options[f"partition.{name}"] for name in ("deal_strided", "channels")}
    return ResNet(num_classes=num_classes, dtype=dtype, partitioned=options["partition.sections"], **own)


RESNET = Entry(build, OPTIONS)
