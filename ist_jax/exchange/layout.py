"""How a model is cut up over the devices: the static description that `gather` and `merge` are compiled for.

A leaf is of one of three kinds, by how many of its axes run over units: `shared` (none), `rows` (one) and
`pairs` (two); a fourth, `layers`, is a stack of rows or pairs with a draw for each. Each kind is a file that
says what a device keeps of such a leaf and how it is exchanged.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from ist_jax.exchange.codec import LEAST, NONE, PLAIN, Bits, Codec
from ist_jax.partition import Axes, Draw, Group, Groups, as_blocks, layer_axis_of

AXIS = "devices"  # the name that collectives go by
_FEW = 16  # devices
A = TypeVar("A", np.ndarray, jax.Array)  # on the host or on a device
Shards = dict[str, jax.Array]  # what a device keeps of every leaf, by path
Shapes = dict[str, jax.ShapeDtypeStruct]  # of such leaves
Flags = Bool[Array, " S"]  # which workers' subnets count
Fn = Callable[..., PyTree]


class Leaf(NamedTuple):
    """Where the units of a leaf are: global shape, axes with units, their groups and (outer, inner); which
    axis is that of the layers, where they have a draw of their own.

    The kinds cut up a view of it in which an axis of `Blocks` is three, (outer, U, inner), but for ones. A
    row is padded to a multiple of `slices`, of which the number of devices is a divisor.
    """

    shape: tuple[int, ...]
    unit_axes: tuple[int, ...]
    groups: tuple[Group, ...]
    blocks: tuple[tuple[int, int], ...]
    layer_axis: int | None = None
    slices: int = 1

    @property
    def layer(self) -> "Leaf":
        """The leaf of one layer."""
        out = self.layer_axis
        assert out is not None
        shape = (*self.shape[:out], *self.shape[out + 1 :])
        axes = tuple(a - (a > out) for a in self.unit_axes)
        return Leaf(shape, axes, self.groups, self.blocks, slices=self.slices)

    @property
    def view(self) -> tuple[int | None, ...]:
        """Sizes of the view's axes, None where the units are."""
        view: tuple[int | None, ...] = ()
        blocks = dict(zip(self.unit_axes, self.blocks, strict=True))
        for axis, size in enumerate(self.shape):
            outer, inner = blocks.get(axis, (0, 0))
            view += (outer,) * (outer > 1) + (None,) + (inner,) * (inner > 1) if outer else (size,)
        return view

    @property
    def rest(self) -> tuple[int, ...]:
        """Sizes of the view's axes without units."""
        return tuple(size for size in self.view if size is not None)

    @property
    def row_size(self) -> int:
        """p: the numbers per unit (rows) or per pair of units (pairs)."""
        return int(np.prod(self.rest, dtype=int))

    def slice_size(self, num_devices: int) -> int:
        """How many numbers of every row a device keeps, padding included."""
        slices = max(self.slices, num_devices)
        return -(-self.row_size // slices) * (slices // num_devices)

    @property
    def unit_last(self) -> bool:
        """The view has one unit axis, the last of several."""
        return len(self.unit_axes) == 1 and len(self.view) > 1 and self.view[-1] is None

    @property
    def subnet_shape(self) -> tuple[int, ...]:
        """The shape in a worker's subnet: n slots, those of the largest subnet, in place of the units."""
        return self.shape_of([group.slots for group in self.groups])

    def shape_of(self, units: Sequence[int]) -> tuple[int, ...]:
        """The leaf's shape with so many units on its unit axes."""
        long = {
            axis: outer * count * inner
            for axis, (outer, inner), count in zip(self.unit_axes, self.blocks, units, strict=True)
        }
        return tuple(long.get(axis, size) for axis, size in enumerate(self.shape))

    def units_in(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How many units are on the unit axes of a leaf of this form; the inverse of `shape_of`."""
        each = zip(self.unit_axes, self.blocks, strict=True)
        return tuple(shape[axis] // (outer * inner) for axis, (outer, inner) in each)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """On disk: unit axes first, behind that of layers with draws of their own, and the rest raveled."""
        if self.layer_axis is not None:
            return self.shape[self.layer_axis], *self.layer.stored_shape
        return (*self.units_in(self.shape), self.row_size) if self.unit_axes else self.shape


class Layout(NamedTuple):
    """The static description of a sharded model.

    Attributes:
      leaves: by path, in the order of the paths.
      groups: by name; none for methods that deal out no units.
      dtype: of all leaves.
      num_workers: S.
      num_devices: D, a divisor of S.
      codec: what becomes of the numbers on their way.
      bits: how many a number has on its way, where there is no codec.
    """

    leaves: dict[str, Leaf]
    groups: dict[str, Group]
    dtype: np.dtype
    num_workers: int
    num_devices: int
    codec: Codec = NONE
    bits: Bits = PLAIN

    @property
    def workers_per_device(self) -> int:
        return self.num_workers // self.num_devices

    def is_tree(self, x: object) -> bool:
        """Whether x is shaped like the parameters: a flat dict of the same paths."""
        return isinstance(x, dict) and x.keys() == self.leaves.keys()


def make_layout(
    params: PyTree, axes: Axes, groups: Groups, num_workers: int, num_devices: int, codec: Codec = NONE
) -> Layout:
    """Describes how a model is sharded.

    Args:
      params: nested dict of arrays or shapes, all of one floating dtype.
      axes: from `partition.resolve_axes`; a leaf's axes of groups not in `groups` are shared.
      groups: from `partition.make_groups`; empty where no units are dealt out.
      num_workers: S.
      num_devices: D, a divisor of S.
      codec: of the exchange.

    Raises:
      ValueError: D does not divide S, or the leaves differ in dtype.
    """
    if num_workers % num_devices:
        raise ValueError(
            f"num_devices={num_devices} does not divide num_workers={num_workers}; set "
            f"config.num_devices to one of {[d for d in range(1, num_workers + 1) if num_workers % d == 0]}"
        )
    flat = traverse_util.flatten_dict(params, sep="/")
    dtypes = sorted({str(x.dtype) for x in flat.values()})
    if len(dtypes) != 1 or not jnp.issubdtype(dtypes[0], jnp.floating):
        raise ValueError(f"parameters must share one floating dtype, these have {', '.join(dtypes)}")
    leaves = {}
    for path, x in sorted(flat.items()):
        named = {a: blocks for a, blocks in enumerate(map(as_blocks, axes[path])) if blocks}
        dealt = {a: blocks for a, blocks in named.items() if blocks.name in groups}
        leaves[path] = Leaf(
            tuple(x.shape),
            tuple(dealt),
            tuple(groups[blocks.name] for blocks in dealt.values()),
            tuple((blocks.outer, blocks.inner) for blocks in dealt.values()),
            layer_axis_of([axes[path][a] for a in dealt]),
        )
    return Layout(leaves, dict(groups), np.dtype(dtypes[0]), num_workers, num_devices, codec)


def with_bits(layout: Layout, bits: Bits) -> Layout:
    """The layout for an exchange in few bits.

    Where a worker sends the largest of the numbers that an owner gets, rows are cut for S owners, so that no
    owner's are kept by two devices.
    """
    leaves = layout.leaves
    if bits.keep < 1:
        rows = {path for path, leaf in leaves.items() if len(leaf.unit_axes) == 1 and is_long(layout, leaf)}
        wide = {path: leaves[path]._replace(slices=layout.num_workers) for path in rows}
        leaves = {path: wide.get(path, leaf) for path, leaf in leaves.items()}
    return layout._replace(leaves=leaves, bits=bits)


def is_long(layout: Layout, leaf: Leaf) -> bool:
    """Whether an owner's slice of a row, of one layer, has numbers enough to choose from."""
    row = leaf.row_size if leaf.layer_axis is None else leaf.layer.row_size
    return row >= LEAST * layout.num_workers


def regroup(layout: Layout, groups: Groups) -> Layout:
    """The same shards on the same devices for other draws: `groups` of the same names, sizes and strips."""
    leaves = {
        path: leaf._replace(groups=tuple(groups[group.name] for group in leaf.groups))
        for path, leaf in layout.leaves.items()
    }
    return layout._replace(leaves=leaves, groups=dict(groups))


def map_trees(layout: Layout, fn: Fn, first: PyTree, *rest: PyTree, scalar: Fn = lambda x, *_: x) -> PyTree:
    """`fn` of the parameter-shaped trees in a pytree, such as an optimizer's state.

    Args:
      layout: knows the paths.
      fn: (tree of `first`, what stands at its place in each of `rest`) -> anything.
      first: the pytree.
      *rest: pytrees of the same structure, down to the trees and the other leaves.
      scalar: as `fn`, for the other leaves.
    """

    def visit(x: PyTree, *others: PyTree) -> PyTree:
        return fn(x, *others) if layout.is_tree(x) else scalar(x, *others)

    return jax.tree.map(visit, first, *rest, is_leaf=layout.is_tree)


def indices_of(group: Group, draw: Draw) -> Int[Array, "S *L n"]:
    """Which units of a group the workers hold, U where a slot is empty."""
    return jnp.asarray(draw[group.name].indices)


def invert(places: Int[Array, " k"], size: int) -> Int[Array, " size"]:
    """Where each number from 0 to size - 1 stands in `places`, which has none twice; k where it does not.

    By it, what comes back is put in its place by a gather: XLA:CPU takes half the time of a scatter.
    """
    empty = jnp.full(size, places.size, jnp.int32)
    return empty.at[places].set(jnp.arange(places.size, dtype=jnp.int32), mode="drop")


# --- one leaf in the form that the kinds cut up ------------------------------------------------------------


def canonical(x: Shaped[A, "..."], leaf: Leaf) -> Shaped[A, "..."]:
    """[..., units..., p] from [..., shape]: unit axes first, the rest raveled; leading axes kept."""
    x = viewed(x, leaf)
    lead: int = x.ndim - len(leaf.view)
    x = x.transpose(_units_first(leaf, lead))
    return x.reshape(*x.shape[: lead + len(leaf.unit_axes)], -1)


def viewed(x: Shaped[A, "..."], leaf: Leaf) -> Shaped[A, "..."]:
    """[..., view] from [..., shape], for any number of units."""
    lead = x.ndim - len(leaf.shape)
    units = iter(leaf.units_in(x.shape[lead:]))
    return x.reshape(*x.shape[:lead], *(next(units) if size is None else size for size in leaf.view))


def restore(x: Shaped[A, "..."], leaf: Leaf) -> Shaped[A, "..."]:
    """The inverse of `canonical`, for any number of units."""
    lead: int = x.ndim - 1 - len(leaf.unit_axes)
    shape = (*x.shape[:lead], *leaf.shape_of(x.shape[lead:-1]))
    return x.reshape(*x.shape[:-1], *leaf.rest).transpose(np.argsort(_units_first(leaf, lead))).reshape(shape)


def from_stored(x: Shaped[np.ndarray, "..."], leaf: Leaf) -> Shaped[np.ndarray, "..."]:
    """The leaf, from how it is stored."""
    if leaf.layer_axis is not None:
        return np.moveaxis(restore(x, leaf.layer), 0, leaf.layer_axis)
    return restore(x, leaf) if leaf.unit_axes else x


def _units_first(leaf: Leaf, lead: int) -> tuple[int, ...]:
    """The order of a view's axes that has the ones with units first, behind `lead` leading ones."""
    axes = sorted(range(len(leaf.view)), key=lambda axis: leaf.view[axis] is not None)
    return *range(lead), *(lead + axis for axis in axes)


def for_each_device(layout: Layout, fn: Fn, *arrays: Shaped[Array, "D ..."]) -> Shaped[Array, "D ..."]:
    """`fn` of every device's part of some arrays, stacked.

    Of few devices one by one: XLA:CPU then sends the results without copying them together. Of many, such a
    program would be too long.
    """
    if layout.num_devices > _FEW:
        return jax.vmap(fn)(*arrays)
    return jnp.stack([fn(*(x[device] for x in arrays)) for device in range(layout.num_devices)])


def pad(x: Shaped[A, "..."], *widths: tuple[int, int]) -> Shaped[A, "..."]:
    """x, of NumPy or JAX, with zeros around its first axes."""
    module = np if isinstance(x, np.ndarray) else jnp
    return module.pad(x, (*widths, *((0, 0),) * (x.ndim - len(widths))))


def cut(x: Shaped[A, "..."], devices: int, axis: int = -1, slices: int = 1) -> Shaped[A, "..."]:
    """[..., D, q, ...] from [..., p, ...]: an axis, counted from the end, padded and cut into slices.

    slices: a multiple of D of which the padded axis is a multiple.
    """
    axis += x.ndim
    x = pad(x, *((0, 0),) * axis, (0, -x.shape[axis] % max(devices, slices)))
    return x.reshape(*x.shape[:axis], devices, -1, *x.shape[axis + 1 :])
