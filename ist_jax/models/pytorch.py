"""Weights of a PyTorch net for `ResNet`: names and transposes, without PyTorch.

    state_dict = {name: x.cpu().numpy() for name, x in net.state_dict().items()}
    params = from_torch(state_dict, ResNet((3, 4, 23, 3), 64, 100))    # for model.apply

References:
  PreActResNet of https://github.com/kuangliu/pytorch-cifar, from which the net of ResIST's released code was
  taken; that calls `shortcut` `downsample`, and `linear` `fc`.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import traverse_util

from ist_jax.masking import Params
from ist_jax.models.resnet import ResNet

_SPELLINGS = ((r"^(module\.)+", ""), (r"\.downsample\.0\.", ".shortcut.0."), (r"^fc\.", "linear."))
_AVERAGES = re.compile(r"\b(running_mean|running_var|num_batches_tracked)$")
_MODULES = {"stem": "conv1", "head": "linear", "shortcut": "shortcut.0"}
# by rank: [O, I, h, w] from Flax's [h, w, I, O], [O, I] from [I, O]
_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


def from_torch(state_dict: Mapping[str, np.ndarray], model: ResNet) -> Params:
    """The parameters of `model` from the state dict of a PyTorch net of the same form.

    The net has no running averages: `running_mean`, `running_var` and `num_batches_tracked` are ignored, and
    the logits are those of the PyTorch net with the statistics of the batch, as `net.train()` has them. A
    prefix `module.` is dropped; `downsample.0` may stand for `shortcut.0`, and `fc` for `linear`.

    Args:
      state_dict: name -> array: `conv1.weight` [O, I, h, w], `layer3.5.bn1.weight` and `.bias` [C],
        `layer3.5.conv2.weight` [O, I, h, w], `layer2.0.shortcut.0.weight` [O, I, 1, 1], `linear.weight`
        [classes, C], `linear.bias` [classes]. Layers are counted from 1, their blocks from 0.
      model: of the net's sections, width, classes, block and stem.

    Returns:
      Float32 arrays, nested as in `model.init(...)["params"]`: kernels [h, w, I, O] and [I, O]; all blocks of
      a section but the first are stacked on axis 0.

    Raises:
      ValueError: a name is missing, unknown or there twice; blocks or a shape do not fit the model.
    """
    arrays = _with_plain_names(state_dict)
    found = {match[0] for name in arrays if (match := re.match(r"layer\d+\.\d+\.", name))}
    blocks = tuple(count for _, count in sorted(Counter(name.split(".")[0] for name in found).items()))
    if blocks != model.sections:
        raise ValueError(f"state_dict has {blocks} blocks in its layers, but model.sections={model.sections}")
    channels = np.shape(arrays.get("conv1.weight", 0))[1:2] or (3,)  # any: the stem is refused below
    image = jax.ShapeDtypeStruct((1, 32, 32, *channels), np.float32)
    nested = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    leaves = traverse_util.flatten_dict(nested, sep="/")
    names = {path: _torch_names(path, model.sections) for path in leaves}
    wanted = {name for several in names.values() for name in several}
    for fault, odd in (("lacks", wanted - arrays.keys()), ("has, unlike model,", arrays.keys() - wanted)):
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise ValueError(f"state_dict {fault} {min(odd)!r}{more}")
    given = {path: {name: arrays[name] for name in names[path]} for path in leaves}
    params = {path: _leaf(path, leaf.shape, given[path]) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def _with_plain_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without averages, and in one spelling."""
    arrays = {}
    for given, array in state_dict.items():
        name = given
        for pattern, spelling in _SPELLINGS:
            name = re.sub(pattern, spelling, name)
        if name in arrays:
            raise ValueError(f"state_dict has {name!r} twice, once spelt {given!r}")
        if not _AVERAGES.search(name):
            arrays[name] = array
    return arrays


def _torch_names(path: str, sections: Sequence[int]) -> list[str]:
    """What a leaf such as `section3/blocks/norm1/scale` is called, for each block in it."""
    *place, module, leaf = path.split("/")
    module = _MODULES.get(module, module.replace("norm", "bn"))
    name = f"{module}.{'bias' if leaf == 'bias' else 'weight'}"
    if not place:
        return [name]
    number = int(place[0].removeprefix("section"))
    blocks = range(1, sections[number - 1]) if place[1] == "blocks" else [0]
    return [f"layer{number}.{block}.{name}" for block in blocks]


def _leaf(path: str, shape: tuple[int, ...], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The leaf of this shape, from the arrays of its blocks by name."""
    rank = 1 if not path.endswith("kernel") else 2 if path.startswith("head") else 4
    wanted = tuple(shape[-rank:][axis] for axis in _AXES[rank])
    for name, array in arrays.items():
        if np.shape(array) != wanted:
            raise ValueError(f"state_dict[{name!r}] has shape {np.shape(array)}, but model has {wanted}")
    axes = np.argsort(_AXES[rank])
    return np.stack([np.asarray(x, np.float32).transpose(axes) for x in arrays.values()]).reshape(shape)
