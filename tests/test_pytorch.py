"""The ResNet against one written anew in NumPy after the papers, in PyTorch's layout and names."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ist_jax.models.pytorch import from_torch
from ist_jax.models.resnet import ResNet


def make_state_dict(sections, width, block, stem, channels=3, num_classes=5):
    """Weights by a fixed seed, in the order of the net: {name: [O, I, h, w], [O, I] or [C]}."""
    rng = np.random.default_rng(10)
    state = {}

    def conv(name, inputs, outputs, size):
        state[f"{name}.weight"] = rng.normal(size=(outputs, inputs, size, size)) / size / np.sqrt(inputs)

    def norm(name, features):
        state[f"{name}.weight"] = rng.uniform(0.5, 1.5, features)
        state[f"{name}.bias"] = rng.normal(size=features) / 2

    conv("conv1", channels, width, 7 if stem == "imagenet" else 3)
    inputs = width
    for section, count in enumerate(sections):
        inner = width * 2**section
        outputs = inner if block == "basic" else 4 * inner
        for number in range(count):
            name = f"layer{section + 1}.{number}"
            if block == "basic":
                layers = [(inputs, inner, 3), (inner, inner, 3)]
            else:
                layers = [(inputs, inner, 1), (inner, inner, 3), (inner, outputs, 1)]
            for i, layer in enumerate(layers, 1):
                norm(f"{name}.bn{i}", layer[0])
                conv(f"{name}.conv{i}", *layer)
            if number == 0 and (section > 0 or inputs != outputs):
                conv(f"{name}.shortcut.0", inputs, outputs, 1)
            inputs = outputs
    state["linear.weight"] = rng.normal(size=(num_classes, inputs))
    state["linear.bias"] = rng.normal(size=num_classes)
    return {name: array.astype(np.float32) for name, array in state.items()}


def forward(state, x):
    """Logits [N, classes] in float64 of images [N, C, H, W], from Dun et al. 2021, He et al. 2015 and 2016.

    Blocks activate first: norm with the batch's mean and biased variance (eps 1e-5), ReLU, convolution. A
    projecting skip starts at the first activation. The first block of every section but the first halves
    the image, in its first 3x3 convolution. No norm follows the last block. Convolutions pad half their size.
    """
    state = {name: array.astype(np.float64) for name, array in state.items()}

    def conv(x, name, stride=1):
        kernel = state[f"{name}.weight"]
        size = kernel.shape[-1]
        pad = size // 2
        padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        height, width = ((length - size) // stride + 1 for length in padded.shape[2:])
        out = np.zeros((len(x), len(kernel), height, width))
        for row in range(height):
            for column in range(width):
                top, left = stride * row, stride * column
                window = padded[:, :, top : top + size, left : left + size]
                out[:, :, row, column] = np.tensordot(window, kernel, ((1, 2, 3), (1, 2, 3)))
        return out

    def activate(x, name):
        mean = x.mean((0, 2, 3), keepdims=True)
        variance = ((x - mean) ** 2).mean((0, 2, 3), keepdims=True)
        scale, bias = (state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return np.maximum((x - mean) / np.sqrt(variance + 1e-5) * scale + bias, 0)

    def block(x, name, stride):
        branch = activate(x, f"{name}.bn1")
        skip = conv(branch, f"{name}.shortcut.0", stride) if f"{name}.shortcut.0.weight" in state else x
        if f"{name}.conv3.weight" not in state:
            branch = conv(branch, f"{name}.conv1", stride)
            return skip + conv(activate(branch, f"{name}.bn2"), f"{name}.conv2")
        branch = activate(conv(branch, f"{name}.conv1"), f"{name}.bn2")
        branch = activate(conv(branch, f"{name}.conv2", stride), f"{name}.bn3")
        return skip + conv(branch, f"{name}.conv3")

    if state["conv1.weight"].shape[-1] == 3:
        x = conv(x, "conv1")
    else:  # ImageNet: the convolution, then the greatest of 3x3 pixels, both of stride 2
        x = np.pad(conv(x, "conv1", 2), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
        x = windows[:, :, ::2, ::2].max((-2, -1))
    names = dict.fromkeys(re.match(r"layer\d+\.\d+|", name)[0] for name in state)
    for name in filter(None, names):
        x = block(x, name, 2 if name.endswith(".0") and name != "layer1.0" else 1)
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


# every stride meets an even and an odd size: 12x10 becomes 6x5 and 3x3; 24x17 becomes 12x9, 6x5 and 3x3
BASIC = ResNet((2, 3, 1), 4, 5, (2,))
BOTTLENECK = ResNet((1, 2), 4, 5, (2,), block="bottleneck", stem="imagenet")
SIZES = {BASIC: (12, 10), BOTTLENECK: (24, 17)}


def make(model):
    """The state dict of the model, and four images [4, 3, H, W]."""
    images = np.random.default_rng(11).normal(size=(4, 3, *SIZES[model])).astype(np.float32)
    return make_state_dict(model.sections, model.width, model.block, model.stem), images


@pytest.mark.parametrize(
    ("model", "golden"),
    [
        # the first image's, by `forward`. From these state dicts PyTorch 2.14's Conv2d, BatchNorm2d and
        # MaxPool2d give the same logits of all images, in float64 to 1e-14
        (BASIC, (-4.675349, -0.290495, 2.772987, 0.298437, -2.626189)),
        (BOTTLENECK, (-2.122645, 4.518472, -2.010992, -0.443718, 0.275252)),
    ],
)
def test_logits_are_those_of_the_papers_net(model, golden):
    state_dict, images = make(model)
    wanted = forward(state_dict, images)
    np.testing.assert_allclose(wanted[0], golden, rtol=0, atol=1e-6)
    params = from_torch(state_dict, model)
    with jax.enable_x64(True):
        for dtype, tolerance in ((np.float32, 5e-6), (np.float64, 1e-12)):
            given = jax.tree.map(lambda x, dtype=dtype: jnp.asarray(x, dtype), (params, images))
            got = jax.jit(lambda p, x: model.apply({"params": p}, x.transpose(0, 2, 3, 1)))(*given)
            assert got.dtype == dtype
            np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def to_torch(params):
    """The state dict of a net's parameters, name by name."""
    state = {
        "conv1.weight": np.einsum("hwio->oihw", params["stem"]["kernel"]),
        "linear.weight": np.einsum("io->oi", params["head"]["kernel"]),
        "linear.bias": params["head"]["bias"],
    }
    for section in (name for name in params if name.startswith("section")):
        layer = section.replace("section", "layer")
        first, rest = params[section]["first"], params[section].get("blocks", {})
        blocks = [first] if np.ndim(first["norm1"]["scale"]) == 1 else [jax.tree.map(lambda x: x[0], first)]
        count = len(rest["norm1"]["scale"]) if rest else 0
        blocks += [jax.tree.map(lambda x, i=i: x[i], rest) for i in range(count)]
        for number, block in enumerate(blocks):
            for i in (1, 2, 3):
                if f"norm{i}" in block:
                    state[f"{layer}.{number}.bn{i}.weight"] = block[f"norm{i}"]["scale"]
                    state[f"{layer}.{number}.bn{i}.bias"] = block[f"norm{i}"]["bias"]
                    kernel = block[f"conv{i}"]["kernel"]
                    state[f"{layer}.{number}.conv{i}.weight"] = np.einsum("hwio->oihw", kernel)
            if "shortcut" in block:
                kernel = block["shortcut"]["kernel"]
                state[f"{layer}.{number}.shortcut.0.weight"] = np.einsum("hwio->oihw", kernel)
    return state


def averages(state_dict):
    """What `track_running_stats` adds to a state dict."""
    norms = [name.removesuffix(".bias") for name in state_dict if re.search(r"bn\d\.bias", name)]
    added = {f"{norm}.num_batches_tracked": np.asarray(7) for norm in norms}
    return added | {f"{norm}.running_{part}": np.ones(3) for norm in norms for part in ("mean", "var")}


@pytest.mark.parametrize(
    "model",
    [
        BASIC,
        BOTTLENECK,
        BASIC.clone(deal_strided=True),  # with an axis of units on its strided block, too
        ResNet((1, 4), 8, 10, (2,), dtype=jnp.bfloat16),
    ],
)
def test_parameters_come_back_from_a_state_dict_to_the_bit(model):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    state_dict = to_torch(params)
    released = {  # ResIST's own spelling, by DataParallel
        f"module.{name}".replace("shortcut.0", "downsample.0").replace("linear", "fc"): array
        for name, array in (state_dict | averages(state_dict)).items()
    }
    for given in (state_dict, dict(reversed(state_dict.items())), released):
        got = from_torch(given, model)
        assert jax.tree.structure(got) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
            assert a.dtype == np.float32
            assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer2.1.bn2.bias": None}, "state_dict lacks 'layer2.1.bn2.bias'"),
        ({"conv1.weight": None, "linear.bias": None}, "state_dict lacks 'conv1.weight' and 1 more"),
        (
            {"bn1.weight": np.ones(4), "bn1.bias": np.ones(4)},
            "state_dict has, unlike model, 'bn1.bias' and 1 more",
        ),
        (
            {"conv1.weight": np.ones((4, 3, 7, 7))},
            r"\['conv1.weight'\] has shape \(4, 3, 7, 7\), but model has \(4, 3, 3, 3\)",
        ),
        ({"conv1.weight": np.ones(4)}, r"\['conv1.weight'\] has shape \(4,\)"),
        (
            {"layer2.2.bn1.weight": np.ones(9)},
            r"\['layer2.2.bn1.weight'\] has shape \(9,\), but model has \(8,\)",
        ),
        (
            {"layer2.3.bn1.weight": np.ones(8)},
            r"state_dict has \(2, 4, 1\) blocks .* model.sections=\(2, 3, 1\)",
        ),
        (
            {"layer4.0.bn1.weight": np.ones(8)},
            r"state_dict has \(2, 3, 1, 1\) blocks .* model.sections=\(2, 3, 1\)",
        ),
        ({"fc.bias": np.ones(5)}, "state_dict has 'linear.bias' twice, once spelt 'fc.bias'"),
    ],
)
def test_a_state_dict_of_another_net_is_refused(change, message):
    state_dict, _ = make(BASIC)
    state_dict = {name: array for name, array in (state_dict | change).items() if array is not None}
    with pytest.raises(ValueError, match=message) as error:
        from_torch(state_dict, BASIC)
    assert "\n" not in str(error.value)
