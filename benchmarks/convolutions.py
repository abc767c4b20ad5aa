"""Every convolution of a net of `peers.py` on one core: ours, XLA's own and PyTorch's, in ms.

    python benchmarks/convolutions.py [--work=NAME ...] [--native] [--repeats=10]

Ours runs in `lax.scan`, as it does in training: forward, and both gradients (by its input and its kernel).
With --native so does XLA's own, whose gradients in a loop were 35 to 100 times slower (JAX issue 12868): when
it comes near ours, XLA is mended and `models/conv.py` can go. PyTorch's eager one is shown where it is
installed (`pip install -e '.[peers]'`), in the better of NCHW and channels_last. The least of the repeats, in
turn.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peers
from absl import flags
from jax import lax

from ist_jax import cli
from ist_jax.config import build_model
from ist_jax.models.conv import conv_general_dilated
from ist_jax.runtime import devices, inputs, setup

_LOOPS = 2
_native = partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Shape(NamedTuple):
    """x [N, H, W, C_in], kernel [h, w, C_in, C_out], its strides, and pixels of padding on each side."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, int]
    pad: int

    @property
    def output(self) -> tuple[int, ...]:
        pairs = zip(self.x[1:3], self.kernel[:2], self.strides, strict=True)
        return self.x[0], *((i + 2 * self.pad - k) // s + 1 for i, k, s in pairs), self.kernel[3]

    @property
    def flops(self) -> int:
        return 2 * int(np.prod(self.output)) * int(np.prod(self.kernel[:3]))


def shapes_of(model: nn.Module, example: jax.Array, batch_size: int) -> list[Shape]:
    """Of the convolutions of a model on a batch, each shape once, in the order of the net."""
    found: dict[Shape, None] = {}

    def look(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        module = context.module
        if isinstance(module, nn.Conv) and context.method_name == "__call__":
            x, strides = args[0].shape, np.broadcast_to(module.strides or 1, 2).tolist()
            kernel = (*module.kernel_size, x[-1], module.features)
            found[Shape(x, kernel, tuple(strides), module.kernel_size[0] // 2)] = None
        return call(*args, **kwargs)

    x = jnp.zeros((batch_size, *example.shape[1:]))
    with nn.intercept_methods(look):
        jax.eval_shape(model.init, jax.random.key(0), x)
    return list(found)


def ours(conv: Callable, shape: Shape) -> tuple[Callable, Callable]:
    """(forward, gradients), each a call without arguments that does `_LOOPS` of them in a loop."""
    rng = np.random.default_rng(0)
    x, w, dy = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((_LOOPS, *shape.x), shape.kernel, (_LOOPS, *shape.output))
    )
    run = partial(conv, window_strides=shape.strides, padding=((shape.pad, shape.pad),) * 2)

    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.scan(lambda total, x: (total + run(x, w), None), jnp.zeros(shape.output), x)[0]

    def gradients(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        def add(
            total: tuple[jax.Array, ...], xs: tuple[jax.Array, ...]
        ) -> tuple[tuple[jax.Array, ...], None]:
            x, dy = xs
            return jax.tree.map(jnp.add, total, jax.vjp(run, x, w)[1](dy)), None

        return lax.scan(add, (jnp.zeros(shape.x), jnp.zeros(shape.kernel)), (x, dy))[0]

    options = {"xla_cpu_multi_thread_eigen": False}
    compiled = [
        jax.jit(fn).lower(*args).compile(options) for fn, args in ((forward, (x, w)), (gradients, (x, w, dy)))
    ]
    return (
        lambda: jax.block_until_ready(compiled[0](x, w)),
        lambda: jax.block_until_ready(compiled[1](x, w, dy)),
    )


def theirs(shape: Shape) -> dict[str, tuple[Callable, Callable]]:
    """By memory format (forward, gradients), which do `_LOOPS` of them."""
    import torch

    torch.set_num_threads(1)
    (n, *size, channels), (*taps, _, features) = shape.x, shape.kernel
    found = {}
    for name in ("contiguous_format", "channels_last"):
        memory = {"memory_format": getattr(torch, name)}
        x = torch.randn(n, channels, *size).to(**memory).requires_grad_()
        w = torch.randn(features, channels, *taps).to(**memory).requires_grad_()
        run = partial(torch.nn.functional.conv2d, x, w, None, shape.strides, shape.pad)
        y = run()
        back = partial(torch.autograd.grad, y, (x, w), torch.ones_like(y), retain_graph=True)
        found[name] = tuple((lambda fn=fn: [fn() for _ in range(_LOOPS)]) for fn in (run, back))
    return found


def measure(shape: Shape, repeats: int, native: bool) -> dict[str, tuple[float, float]]:
    """(ms forward, ms of the gradients) of one convolution, by whose it is."""
    calls = {"ours": ours(conv_general_dilated, shape)}
    if native:
        calls["native"] = ours(_native, shape)
    if importlib.util.find_spec("torch"):
        calls |= theirs(shape)
    times: dict[str, list[list[float]]] = {name: [[], []] for name in calls}
    for repeat in range(repeats + 1):
        for name, pair in calls.items():
            for call, seconds in zip(pair, times[name], strict=True):
                started = time.perf_counter()
                call()
                if repeat:  # the first warms up
                    seconds.append(time.perf_counter() - started)
    best = {name: tuple(min(x) / _LOOPS * 1e3 for x in pair) for name, pair in times.items()}
    formats = [best.pop(name) for name in ("contiguous_format", "channels_last") if name in best]
    return best | ({"PyTorch": tuple(map(min, *formats))} if formats else {})


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    nets = [name for name, (path, _) in peers.WORKS.items() if path == peers.RESNET]
    flags.DEFINE_multi_enum("work", ["wide", "cifar10_small", "digits"], nets, "whose", flag_values=values)
    flags.DEFINE_boolean("native", False, "XLA's own as well, which may take minutes", flag_values=values)
    flags.DEFINE_integer("repeats", 10, "to take the least of", lower_bound=1, flag_values=values)
    cli.parse(values, argv, "python benchmarks/convolutions.py [--work=NAME] [--native]", required=[])
    devices.prepare(1)
    for work in values.work:
        config = peers.make_config(*peers.WORKS[work])
        opened = inputs.open_inputs(setup.wanted_data(config))
        model = build_model(config, len(opened.dataset.classes))
        print(f"{work}: input, kernel, stride, GFLOP; forward, gradients in ms (GFLOP/s)")
        for shape in shapes_of(model, opened.task.example[0], config.batch_size):
            size, kernel = ("x".join(map(str, part)) for part in (shape.x, shape.kernel))
            row = [f"{size:>14} {kernel:>12} {shape.strides[0]} {shape.flops / 1e9:6.3f}"]
            for name, (forward, gradients) in measure(shape, values.repeats, values.native).items():
                rates = (f * shape.flops / ms / 1e6 for f, ms in ((1, forward), (2, gradients)))
                row.append(f"{name} {forward:.2f}, {gradients:.2f} ({', '.join(f'{r:.0f}' for r in rates)})")
            print("  ".join(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
