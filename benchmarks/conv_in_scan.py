"""Convolutions in compiled loops on CPU: is the hand-written gradient still needed, and does it do?

    python benchmarks/conv_in_scan.py [--round]

First the gradient of four 3x3 convolutions, batch 32, native and ours, unrolled and in `lax.scan` (JAX
issue 12868: native in a loop was 35 to 100 times slower; when that column comes near the others, XLA is
mended and `models/conv.py` can go). With --round also a whole ResIST round: sections [2,2,9,2], width 64,
2 workers, batch 32, 10 local steps, 32x32 images, in loops against fully unrolled (several minutes).
"""

import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ist_jax import deals, partition
from ist_jax.data import augment
from ist_jax.exchange.kinds import from_params
from ist_jax.exchange.layout import make_layout
from ist_jax.methods import subnets
from ist_jax.methods.method import AXES, Recipe, State, Turn
from ist_jax.methods.steps import POLICIES
from ist_jax.models.conv import conv_general_dilated
from ist_jax.models.resnet import ResNet
from ist_jax.runtime import devices, scoring
from ist_jax.tasks.classification import classification

_DIMS = ("NHWC", "HWIO", "NHWC")
_LAYERS = 4


def gradient(conv, *, looped: bool):
    """Gradient of the sum of four convolutions' output with respect to kernels [4, 3, 3, C, C]."""

    def net(kernels, x):
        if looped:
            return lax.scan(lambda x, w: (conv(x, w), None), x, kernels)[0].sum()
        for kernel in kernels:
            x = conv(x, kernel)
        return x.sum()

    return jax.jit(jax.grad(net))


def median_ms(fn, *args, repeats: int) -> float:
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e3


def compare_gradients() -> None:
    native = partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=_DIMS)
    ours = partial(conv_general_dilated, window_strides=(1, 1), padding="SAME")
    print("gradient of four 3x3 convolutions, ms      native            ours")
    print("channels x size                        unrolled  scan  unrolled  scan")
    for channels, size in ((256, 8), (128, 16), (64, 32)):
        rng = np.random.default_rng(0)
        kernels = jnp.asarray(rng.normal(size=(_LAYERS, 3, 3, channels, channels)) * 0.02, jnp.float32)
        x = jnp.asarray(rng.normal(size=(32, size, size, channels)), jnp.float32)
        row = [
            median_ms(
                gradient(conv, looped=looped), kernels, x, repeats=1 if conv is native and looped else 5
            )
            for conv in (native, ours)
            for looped in (False, True)
        ]
        print(
            f"{channels:4d} x {size:2d}x{size:<2d}                          "
            + "  ".join(f"{t:7.0f}" for t in row)
        )


def round_program(unroll: bool, steps: int):
    """(program, its arguments): the local steps of a round, in loops or unrolled."""
    rng = np.random.default_rng(0)
    data = {
        "image": rng.integers(0, 256, (256, 32, 32, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, 256).astype(np.int32),
    }
    model = ResNet((2, 2, 9, 2), 64, 10, unroll=8 if unroll else 1)
    example = jnp.zeros((1, 32, 32, 3))
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0), example)["params"])
    axes = partition.resolve_axes(params, model.unit_axes())
    groups = partition.make_groups(params, axes, 2)
    layout = make_layout(params, axes, groups, 2, 2)
    normalize = augment.make_normalize(*augment.channel_statistics(data["image"]))
    task = classification(normalize, pad=4, flip=True, num_classes=10)
    subnet = model.subnet({name: group.slots for name, group in groups.items()})
    recipe = Recipe(
        layout,
        optax.chain(optax.add_decayed_weights(5e-4), optax.trace(0.9)),
        scoring.make_loss_fn(subnet, task),
        task.batch,
        score_fn=partial(scoring.score_shards, layout, model, task, {}),
        init_params=lambda key: model.init(key, example)["params"],
        policy=POLICIES["reset"],
        unroll=steps if unroll else 1,
    )
    chosen = devices.choose(2, 2)
    turn = Turn(
        draw=partition.draw(0, 0, groups, deals.random),
        gates={},
        present=np.ones((2, 1), bool),
        data=devices.replicate(data, chosen),
        indices=rng.integers(0, 256, (2, 1, steps, 32)).astype(np.int32),
        rates=np.full(steps, 0.01, np.float32),
        index=np.int32(0),
    )
    state = State(devices.put(from_params(layout, params), chosen))
    phases, build = subnets.make(recipe).phases, partial(devices.compile_program, in_axes=(0, 0, AXES))
    units = jax.block_until_ready(build(phases["gather"], (state, None, turn), chosen)(state, None, turn))
    args = (state, units, turn)
    started = time.perf_counter()
    program = build(phases["local"], args, chosen)
    print(
        f"compiled {'unrolled' if unroll else 'in loops'} in {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    return program, args


def compare_rounds(steps: int = 10, repeats: int = 2) -> None:
    programs = {unroll: round_program(unroll, steps) for unroll in (False, True)}
    times: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(repeats + 1):
        for unroll, (program, args) in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program(*args))
            if repeat:  # the first warms up
                times[unroll].append(time.perf_counter() - started)
    looped, unrolled = np.median(times[False]), np.median(times[True])
    print(f"round of [2,2,9,2], width 64, 2 workers, batch 32, {steps} steps: in loops {looped:.1f} s,")
    print(f"unrolled {unrolled:.1f} s, ratio {looped / unrolled:.3f} (at most 1.2)")


def main(argv: list[str]) -> int:
    if set(argv[1:]) - {"--round"}:
        print(__doc__)
        return 2
    devices.prepare(2)
    compare_gradients()
    if "--round" in argv:
        compare_rounds()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
