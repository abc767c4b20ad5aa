"""The models: sizes, gates, subnets, and the convolution that is fast in loops."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config
from flax import traverse_util
from jax import lax
from reference import plainly
from rounds import image_task

from ist_jax import data, masking, partition, plan
from ist_jax.config import build_model
from ist_jax.deals import random
from ist_jax.models import conv as conv_module
from ist_jax.models.conv import conv_general_dilated
from ist_jax.models.mlp import MLP
from ist_jax.models.norm import BatchNorm
from ist_jax.models.resnet import BLOCKS, ResNet
from ist_jax.models.vgg import VGG
from ist_jax.runtime import setup

INNER = ResNet((1, 3), 4, 10, (1, 2), channels="inner")


def shapes(model, *example):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *example)))["params"]


def count(tree):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def test_resnet101_of_the_paper_has_41396900_parameters():
    params = shapes(ResNet((3, 4, 23, 3), 64, 100), 32, 32, 3)
    assert count(params) == 41_396_900
    assert count(params["section3"]["blocks"]) / count(params) == pytest.approx(0.627, abs=5e-4)


@pytest.mark.parametrize(
    ("block", "sections", "parameters"),
    [
        # torchvision's post-activation nets, less what pre-activation without a final norm does not have:
        # the stem's norm (128 numbers), and norms of the first block of a section
        ("bottleneck", (3, 4, 6, 3), 25_557_032 - 11_776),  # resnet50
        ("bottleneck", (3, 4, 23, 3), 44_549_160 - 11_776),  # resnet101
        ("bottleneck", (3, 8, 36, 3), 60_192_808 - 11_776),  # resnet152
        ("basic", (2, 2, 2, 2), 11_689_512 - 2_816),  # resnet18
        ("basic", (3, 4, 6, 3), 21_797_672 - 2_816),  # resnet34
    ],
)
def test_imagenet_nets_have_the_parameters_of_the_known_ones(block, sections, parameters):
    # 11,776 = 128 + (1280 - 384) + 12 (128 + 256 + 512): the norms of a first bottleneck block of width w
    # have 2 (in + w + w) numbers here and 2 (w + w + 4w + 4w) there; `in` is 64, and 2w after section 1
    # 2,816 = 128 + 3 (128 + 256 + 512): 2 (w / 2 + w) here and 2 (w + w + w) there, but for section 1
    params = shapes(ResNet(sections, 64, 1000, (3,), block=block, stem="imagenet"), 224, 224, 3)
    assert count(params) == parameters
    axes = partition.resolve_axes(params, ResNet(sections, 64, 1000, (3,), block=block).unit_axes())
    units = [axes[path][0] for path in axes if path.startswith("section3/blocks/")]
    assert set(units) == {"section3"}
    assert sum(names[0] is not None for names in axes.values()) == len(units)


def plain_bottleneck_net(params, x):
    """The ImageNet net of bottleneck blocks in a few lines of lax."""

    def conv(x, kernel, strides=1):
        pads = [(size // 2, size // 2) for size in kernel.shape[:2]]
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (strides, strides), pads, dimension_numbers=dims)

    def activate(x, norm):
        x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
        return jnp.maximum(x * norm["scale"] + norm["bias"], 0)

    def block(x, p, strides):
        y = activate(x, p["norm1"])
        skip = conv(y, p["shortcut"]["kernel"], strides) if "shortcut" in p else x
        y = activate(conv(y, p["conv1"]["kernel"]), p["norm2"])
        y = activate(conv(y, p["conv2"]["kernel"], strides), p["norm3"])
        return skip + conv(y, p["conv3"]["kernel"])

    x = conv(x, params["stem"]["kernel"], 2)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    size = x.shape[1] - 2  # windows at -1, 1, 3, ..., of 3
    corners = [x[:, i : i + size : 2, j : j + size : 2] for i in range(3) for j in range(3)]
    x = jnp.max(jnp.stack(corners), 0)
    for number in (1, 2):
        section = params[f"section{number}"]
        x = block(x, section["first"], number)
        for i in range(2 if "blocks" in section else 0):
            x = block(x, jax.tree.map(lambda leaf, i=i: leaf[i], section["blocks"]), 1)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.slow
def test_the_imagenet_net_and_its_gradients_are_the_plain_ones():
    model = ResNet((1, 3), 4, 10, (2,), block="bottleneck", stem="imagenet")
    x = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
    params = plainly(model.init)(jax.random.key(0), x)["params"]

    def step(apply, total, part):
        value, grads = jax.value_and_grad(lambda p: (apply(p, part) ** 2).sum())(params)
        return total + value, grads

    # in a loop, as in the local steps: there XLA:CPU treats gradients of convolutions differently
    ours = partial(step, lambda p, x: model.apply({"params": p}, x))
    got = jax.jit(lambda parts: lax.scan(ours, 0.0, parts))(x[None])
    total, grads = plainly(partial(step, plain_bottleneck_net))(0.0, x)
    wanted = total, jax.tree.map(lambda leaf: leaf[None], grads)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * float(jnp.abs(b).max()))


def test_mlp_of_the_paper_has_no_biases_and_a_norm_per_layer():
    params = shapes(MLP((8, 6), 3), 5)
    sizes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    assert sizes == {
        "layer1/dense/kernel": (5, 8), "layer1/norm/scale": (8,), "layer1/norm/bias": (8,),
        "layer2/dense/kernel": (8, 6), "layer2/norm/scale": (6,), "layer2/norm/bias": (6,),
        "output/dense/kernel": (6, 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (ResNet((1, 1, 5, 1), 4, 10), {"section3": 2}),
        (ResNet((1, 4), 4, 10, (2,), block="bottleneck", stem="imagenet"), {"section2": 1}),
        (MLP((8, 6), 10), {"hidden1": 3, "hidden2": 2}),
        (INNER, {"section1_first_inner1": 2, "section2_first_inner1": 3, "section2_inner1": 4}),
        (VGG((6, 7), 1, (8,), 10), {"layer1": 2, "layer2": 3, "layer3": 4}),
    ],
)
def test_a_subnet_is_the_same_class_with_fewer_units(model, sizes):
    params, small = shapes(model, 8, 8, 1), shapes(model.subnet(sizes), 8, 8, 1)
    axes = partition.resolve_axes(params, model.unit_axes())
    for path, leaf in traverse_util.flatten_dict(small, sep="/").items():
        whole = traverse_util.flatten_dict(params, sep="/")[path]
        units = [along and partition.as_blocks(along).name for along in axes[path]]
        assert leaf.shape == tuple(sizes.get(n, s) for n, s in zip(units, whole.shape, strict=True))


def of_channels(model):
    """(parameters, images, axes, groups of 2 workers) of a model whose units are channels."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0.5, 0.5, leaf.shape).astype("f"), shapes(model, 8, 8, 1))
    axes = partition.resolve_axes(params, model.unit_axes())
    return params, rng.normal(size=(4, 8, 8, 1)).astype("f"), axes, partition.make_groups(params, axes, 2)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(INNER, marks=pytest.mark.slow),
        INNER.clone(channels="all"),
        pytest.param(
            INNER.clone(channels="all", partitioned=(2,), block="bottleneck"), marks=pytest.mark.slow
        ),
        VGG((6, 7), 1, (8,), 10),
    ],
)
def test_a_worker_computes_what_the_model_does_without_the_other_channels(model):
    params, x, axes, groups = of_channels(model)
    draw = partition.draw(0, 0, groups, random)
    subnet = model.subnet({name: group.slots for name, group in groups.items()})

    @plainly
    def outputs(params):
        own = masking.gather(params, axes, draw, 1)
        held = jax.tree.map(lambda mask, leaf: mask * leaf, masking.masks(params, axes, draw, 1), params)
        nets = ((subnet, own), (model, held), (model, params))
        return [net.apply({"params": of_net}, x) for net, of_net in nets]

    got, wanted, whole = outputs(params)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(wanted - whole).max() > 0.1


def test_sums_over_dealt_channels_are_scaled_where_they_join_others():
    model = INNER.clone(channels="all")
    params, x, _, groups = of_channels(model)
    scale = {name: 0.3 + 0.1 * i for i, name in enumerate(groups)}
    scaled = jax.tree.map(np.copy, params)
    scaled["head"]["kernel"] *= scale["section2_stream"]
    scaled["section2"]["first"]["shortcut"]["kernel"] *= scale["section1_stream"]
    for place in (("section1", "first"), ("section2", "first"), ("section2", "blocks")):
        name = "_".join(place).removesuffix("_blocks")
        scaled[place[0]][place[1]]["conv2"]["kernel"] *= scale[f"{name}_inner1"]

    @plainly
    def outputs(params, scaled):
        return model.apply({"params": params}, x, scale=scale), model.apply({"params": scaled}, x)

    got, wanted = outputs(params, scaled)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_nets_of_the_cnn_config_have_the_parameters_of_the_known_ones():
    resnet18 = build_model(get_config("cnn", "resnet18"), 10)
    assert count(shapes(resnet18, 32, 32, 3)) == 11_171_146  # PreActResNet18 of kuangliu/pytorch-cifar
    # VGG13's convolutions without biases, norms, 512 x 4096 with its norm, and 4096 x 1000 with biases
    wanted = 9_402_048 + 2 * 2_944 + 512 * 4096 + 2 * 4096 + 4096 * 1000 + 1000
    assert count(shapes(build_model(get_config("cnn", "vgg12"), 1000), 224, 224, 3)) == wanted


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("resnet", {"partition.channels": "inner", "partition.deal_strided": True}, "deals out blocks"),
        ("resnet", {"partition.channels": "outer"}, "partition.channels='outer'"),
        ("cnn", {"partition.sections": (3,)}, r"section 3 of model.sections=\(1, 2\) is not there"),
        ("cnn", {"num_workers": 5}, "leaves a worker without a channel of the 4 of section1_first_inner1"),
        ("cnn:vgg12", {"data.name": "digits"}, "8 x 8 pixels cannot be halved by each of the 5 sections"),
    ],
)
def test_what_makes_no_sense_of_channels_is_refused(config, changes, message):
    name, _, mode = config.partition(":")
    with pytest.raises(ValueError, match=message):
        plan.predict(get_config(name, mode or "smoke", **changes), data.facts("digits"))


@pytest.mark.parametrize(
    ("model", "group"),
    [
        (ResNet((1, 3), 4, 10, (2,)), "section2"),
        (MLP((6,), 10), "hidden1"),
    ],
)
def test_an_empty_slot_is_as_if_it_were_not_there(model, group):
    size = 2 if group == "section2" else 6
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    params = plainly(model.init)(jax.random.key(0), x)["params"]
    axes = partition.resolve_axes(params, model.unit_axes())
    keep = np.arange(size) != 1
    cut = {
        path: np.compress(keep, leaf, axes[path].index(group)) if group in axes[path] else leaf
        for path, leaf in traverse_util.flatten_dict(params, sep="/").items()
    }
    small = model.subnet({group: size - 1})
    wanted = plainly(lambda p: small.apply({"params": p}, x))(traverse_util.unflatten_dict(cut, sep="/"))
    got = jax.jit(lambda p: model.apply({"params": p}, x, gates={group: jnp.asarray(keep)}))(params)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    grads = jax.jit(
        jax.grad(lambda p: model.apply({"params": p}, x, gates={group: jnp.asarray(keep)}).sum())
    )(params)
    for path, leaf in traverse_util.flatten_dict(grads, sep="/").items():
        if group in axes[path] and not path.startswith("output"):
            assert (np.take(np.asarray(leaf), 1, axes[path].index(group)) == 0).all(), path


@pytest.mark.slow
def test_a_dealt_strided_block_is_the_shared_one():
    dealt = ResNet((1, 2), 4, 10, (2,), deal_strided=True)
    x = jax.random.normal(jax.random.key(1), (4, 9, 8, 1))
    params = plainly(dealt.init)(jax.random.key(0), x)["params"]
    axes = partition.resolve_axes(params, dealt.unit_axes())
    assert {path.split("/", 2)[1]: names[0] for path, names in axes.items() if "section" in path} == {
        "first": "section2_first", "blocks": "section2",
    }  # fmt: skip
    assert {names[0] for path, names in axes.items() if path.startswith("section1")} == {None}
    first = jax.tree.map(lambda p: p[0], params["section2"]["first"])
    shared = params | {"section2": params["section2"] | {"first": first}}

    def apply(model, params, gates=None):
        mutable = [] if gates else ["batch_stats"]
        return plainly(lambda p: model.apply({"params": p}, x, gates, mutable=mutable))(params)

    wanted, stats = apply(dealt.clone(deal_strided=False), shared)
    got, got_stats = apply(dealt, params)
    gated, _ = apply(dealt, params, {"section2_first": jnp.ones(1, bool)})
    for a, b in zip(
        jax.tree.leaves((got, got_stats, gated)), jax.tree.leaves((wanted, stats, wanted)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    # at evaluation, a block that one of two workers held is the mean of the block and of what skips it
    at = plainly(lambda s: dealt.apply({"params": params}, x, scale={"section2": 0.0, "section2_first": s}))
    nobody = {name: jnp.zeros(1, bool) for name in ("section2", "section2_first")}
    skipped, _ = apply(dealt, params, nobody)
    np.testing.assert_allclose(at(0.0), skipped, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(at(0.5), (at(0.0) + at(1.0)) / 2, rtol=1e-4, atol=1e-5)
    assert np.abs(at(0.0) - at(1.0)).max() > 0.01


@pytest.mark.parametrize("block", BLOCKS.values())
def test_who_holds_no_strided_block_passes_on_every_second_pixel(block):
    module = block(block.widths(8), strides=2, project=True)
    x = jax.random.normal(jax.random.key(1), (4, 9, 8, 5))
    params = plainly(module.init)(jax.random.key(0), x)
    run = plainly(lambda p, gate: module.apply(p, x, gate)[0])
    got = run(params, False)
    assert got.shape == run(params, True).shape == (4, 5, 4, 8 * block.expansion)
    assert np.array_equal(got[..., :5], x[:, ::2, ::2])
    assert not np.any(got[..., 5:])
    grads = jax.jit(jax.grad(lambda p, gate: module.apply(p, x, gate)[0].sum()))(params, False)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_scale_multiplies_the_residual_branches():
    model = ResNet((1, 3), 4, 10, (2,))
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    params = plainly(model.init)(jax.random.key(0), x)["params"]
    apply = jax.jit(lambda p, scale: model.apply({"params": p}, x, scale={"section2": scale}))
    for scale in (0.0, 0.5):
        scaled = jax.tree.map(lambda p: p, params)
        scaled["section2"]["blocks"]["conv2"]["kernel"] *= scale
        np.testing.assert_allclose(apply(params, scale), apply(scaled, 1.0), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", [ResNet((1, 3), 4, 10, (2,)), MLP((6, 5), 10)])
def test_bfloat16_is_of_the_layers_alone(model):
    x = jax.random.normal(jax.random.key(1), (16, 8, 8, 1))
    narrow = model.clone(dtype=jnp.bfloat16)
    params = plainly(narrow.init)(jax.random.key(0), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    jaxprs = [str(jax.make_jaxpr(lambda p, m=m: m.apply({"params": p}, x))(params)) for m in (model, narrow)]
    layers = [re.findall(r":(\w+)\[\S* = (?:conv_general_dilated|dot_general)\[", text) for text in jaxprs]
    assert set(layers[0]) == {"f32"}
    assert set(layers[1]) == {"bf16"}
    apply = jax.jit(lambda p, m: m.apply({"params": p}, x, mutable=["batch_stats"]), static_argnums=1)
    (wanted, _), (logits, stats) = apply(params, model), apply(params, narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, stats))} == {np.dtype(np.float32)}
    difference = np.abs(logits - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < difference < 0.05  # bfloat16 has 8 bits


@pytest.mark.parametrize("sections", [(1, 1, 1, 1), (1, 1)])
def test_a_section_without_partitionable_blocks_is_refused(sections):
    with pytest.raises(ValueError, match=r"section 3 .* has no partitionable block"):
        ResNet(sections, 4, 10).unit_axes()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3), (7, 7)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 1), (1, 1)), ((2, 0), (1, 3))])
def test_convolution_and_its_gradients_equal_xla(strides, kernel, padding, large, monkeypatch):
    monkeypatch.setattr(conv_module, "_LARGE", 0 if large else 2**17)

    def native(x, w):
        return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def ours(x, w):
        return conv_general_dilated(x, w, strides, padding, feature_group_count=1)

    @plainly
    def both(x, w, dy):
        results = [jax.vjp(conv, x, w) for conv in (ours, native)]
        return [(y, *backward(dy)) for y, backward in results]

    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, w = jnp.asarray(rng.normal(size=(2, 7, 8, 3))), jnp.asarray(rng.normal(size=(*kernel, 3, 5)))
        dy = jnp.asarray(rng.normal(size=jax.eval_shape(native, x, w).shape))
        for a, b in zip(*both(x, w, dy), strict=True):
            assert a.dtype == b.dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-14), (np.float32, 2e-6)])
def test_a_convolution_by_tiles_and_its_gradients_equal_xla(dtype, bound, monkeypatch):
    monkeypatch.setattr(conv_module, "_LARGE", 0)
    monkeypatch.setattr(conv_module, "_CHANNELS", 64)
    monkeypatch.setattr(conv_module, "_CHANNELS_OF_GRADIENT", 64)

    def run(x, w, dy):
        y, back = jax.vjp(lambda x, w: conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1))), x, w)
        return y, *back(dy)

    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=size) for size in ((2, 6, 4, 64), (3, 3, 64, 80), (2, 6, 4, 80)))
    with jax.enable_x64(True):
        narrow = [jnp.asarray(a, dtype) for a in (x, w, dy)]
        assert "conv_general_dilated[" not in str(jax.make_jaxpr(run)(*narrow))
        with conv_module.by_definition():
            assert "conv_general_dilated[" in str(jax.make_jaxpr(lambda *args: run(*args))(*narrow))
        got = run(*narrow)
        monkeypatch.setattr(conv_module, "_CHANNELS", 128)
        monkeypatch.setattr(conv_module, "_CHANNELS_OF_GRADIENT", 128)
        wanted = run(*map(jnp.asarray, (x, w, dy)))
    for a, b in zip(map(np.asarray, got), map(np.asarray, wanted), strict=True):
        assert a.dtype == dtype
        assert np.abs(a - b).max() < bound * np.abs(b).max()


def test_a_convolution_by_pairs_and_its_gradients_equal_xla():
    def run(x, w, dy):
        y, back = jax.vjp(lambda x, w: conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1))), x, w)
        return y, *back(dy)

    rng = np.random.default_rng(0)
    sizes = (2, 5, 6, 3), (3, 3, 3, 8), (2, 5, 6, 8)
    with jax.enable_x64(True):
        operands = [jnp.asarray(rng.normal(size=size)) for size in sizes]
        assert "f64[3,2,6,16]" in str(jax.make_jaxpr(run)(*operands))  # of kernels: pairs in, pairs out
        got = run(*operands)
        with conv_module.by_definition():
            assert "f64[3,2,6,16]" not in str(jax.make_jaxpr(lambda *args: run(*args))(*operands))
        native = partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y, back = jax.vjp(lambda x, w: native(x, w, (1, 1), ((1, 1), (1, 1))), *operands[:2])
        for a, b in zip(got, (y, *back(operands[2])), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-14 * np.abs(b).max())


@pytest.mark.parametrize(
    ("size", "channels", "forward", "gradients"),
    [((32, 8, 8), 256, True, True), ((64, 8, 8), 64, True, False), ((64, 32, 32), 16, False, False),
     ((64, 8, 8), 16, False, False), ((32, 7, 8), 256, False, False)],
)  # fmt: skip
def test_large_images_of_many_channels_go_by_tiles(size, channels, forward, gradients):
    x, w = jax.ShapeDtypeStruct((*size, channels), np.float32), jnp.zeros((3, 3, channels, channels))

    def conv(x, w):
        return conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1)))

    def products(fn):
        return str(jax.make_jaxpr(fn)(x, w)).count("dot_general[")

    # both gradients are traced; that of the kernel in another form is a product for each row of taps, or none
    assert products(conv) == 16 * forward
    assert (products(jax.grad(lambda x, w: conv(x, w).sum(), 1)) == 48) == gradients


def test_batch_norm_uses_the_batch_or_what_it_is_given():
    x = jax.random.normal(jax.random.key(0), (64, 3)) * 3 + 1
    norm = BatchNorm()
    params = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
    y = norm.apply(params, x)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(0), 1, rtol=1e-4)
    _, stats = norm.apply(params, x, mutable=["batch_stats"])
    single = norm.apply(params | stats, x[:1])
    np.testing.assert_allclose(single, y[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "kernel", "strides", "pad"), [(2, 3, 1, 1), (2, 3, 2, 1), (1, 3, 1, 1), (4, 7, 1, 3)]
)
def test_an_image_that_its_kernel_covers_is_one_matrix_product(size, kernel, strides, pad):
    def ours(x, w):
        return conv_general_dilated(x, w, (strides, strides), ((pad, pad), (pad, pad)))

    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, size, size, 5)), rng.normal(size=(kernel, kernel, 5, 6))
    wanted = lax.conv_general_dilated(
        x, w, (strides, strides), ((pad, pad), (pad, pad)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(ours(x, w), wanted, rtol=1e-5, atol=1e-5)
    text = str(jax.make_jaxpr(jax.grad(lambda w: ours(x, w).sum()))(w))
    assert "dot_general" in text and "conv" not in text


def plain_norm(x, scale, bias, relu):
    """By the definition, differentiated by JAX."""
    mean, var = x.mean(range(x.ndim - 1)), x.var(range(x.ndim - 1))
    y = (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias
    return nn.relu(y) if relu else y


@pytest.mark.parametrize("relu", [False, True])
def test_a_norm_and_its_gradient_are_those_of_the_definition(relu):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, dy = (jnp.asarray(rng.normal(size=(2, 4, 5, 6, 3))) for _ in range(2))  # of two workers
        scale, bias = (jnp.asarray(rng.normal(size=(2, 3))) for _ in range(2))

        def norm(x, scale, bias):
            return BatchNorm(relu=relu).apply({"params": {"scale": scale, "bias": bias}}, x)

        got, back = jax.vjp(jax.vmap(norm), x, scale, bias)
        wanted, plain_back = jax.vjp(jax.vmap(partial(plain_norm, relu=relu)), x, scale, bias)
        for a, b in zip((got, *back(dy)), (wanted, *plain_back(dy)), strict=True):
            assert a.dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_a_norm_does_not_cancel_where_the_mean_is_large():
    x = np.random.default_rng(0).normal(size=(4096, 3)).astype(np.float32) + np.float32([0, 1e3, -1e3])
    params = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
    got, stats = BatchNorm().apply(params, x, mutable=["batch_stats"])
    wide = x.astype(np.float64)
    np.testing.assert_allclose(got, (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5), atol=2e-4)
    np.testing.assert_allclose(stats["batch_stats"]["mean"], wide.mean(0), rtol=1e-6, atol=1e-6)


def test_a_norm_of_bfloat16_has_statistics_and_gradients_of_float32():
    x = jax.random.normal(jax.random.key(0), (512, 3)).astype(jnp.bfloat16)
    params = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
    y, back = jax.vjp(lambda p, x: BatchNorm(relu=True).apply(p, x), params, x)
    grads, dx = back(y)
    assert (y.dtype, dx.dtype, grads["params"]["scale"].dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    wanted = plain_norm(x.astype(jnp.float32), 1.0, 0.0, True)
    np.testing.assert_allclose(y.astype(jnp.float32), wanted, atol=2e-2)


@pytest.mark.parametrize(("num_workers", "blocks"), [(2, 11), (4, 10)])
def test_the_imagenet_config_deals_out_the_blocks_of_section_3(num_workers, blocks):
    config = get_config("resnet", "imagenet", num_workers=num_workers)
    model = build_model(config, 1000)
    params = shapes(model, config.data.size, config.data.size, 3)
    assert count(params) == 44_549_160 - 11_776  # ResNet101, as above
    task = image_task(config.data.size, config.data.size, 3, classes=1000)
    (group,) = setup.make_recipe(config, model, task, num_workers).layout.groups.values()
    assert (group.size, group.counts) == (22, (blocks,) * num_workers)
    config.rounds = 90
    rates = setup.make_schedule(config, 1_281_167).learning_rates
    assert rates[[0, 29, 30, 59, 60, 89], 0] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
