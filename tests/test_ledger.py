"""What a round costs: by hand, by its trace, by the compiled programs and on the wire."""

import math
import socket
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import get_config
from jax import lax
from rounds import image_task

from ist_jax import partition
from ist_jax.config import build_model
from ist_jax.costs import compiled as hlo
from ist_jax.costs import formula, ledger, traced
from ist_jax.costs import sockets as wire
from ist_jax.costs.traffic import round_traffic
from ist_jax.exchange.kinds import shard_shapes
from ist_jax.exchange.layout import AXIS, make_layout
from ist_jax.exchange.streaming import Streamed
from ist_jax.methods import METHODS
from ist_jax.methods.method import Recipe
from ist_jax.methods.steps import POLICIES
from ist_jax.models.mlp import MLP
from ist_jax.models.resnet import ResNet
from ist_jax.runtime import record, setup, stages

LEAVES = {"shared": np.zeros(5), "rows": np.zeros((4, 3)), "pairs": np.zeros((8, 4))}
LEAVES = {path: x.astype(np.float32) for path, x in LEAVES.items()}


def traffic_of(method, *, num_devices=2, local_steps=1, tx=None):
    """(bytes of a round of the three leaves by two workers, the layout)."""
    axes = {"shared": (None,), "rows": ("u", None), "pairs": ("v", "u")}
    groups = partition.make_groups(LEAVES, axes, 2) if METHODS[method].deals_units else {}
    layout = make_layout(LEAVES, axes, groups, 2, num_devices)
    recipe = Recipe(
        layout, tx or optax.identity(),
        loss_fn=lambda params, *_: (sum(x.sum() for x in params.values()), jnp.float32(0)),
        batch_fn=lambda data, indices, key: (data, data), score_fn=None, score_members=None,
        init_params=lambda key: jax.tree.map(jnp.asarray, LEAVES),
        policy=POLICIES["carry" if tx else "reset"],
    )  # fmt: skip
    data = jax.ShapeDtypeStruct((1,), np.float32)
    phases = stages.trace_round(METHODS[method], recipe, data, local_steps, 1)
    return round_traffic(phases, layout), layout


def test_bytes_of_three_leaves_by_hand():
    # S = D = 2 workers, 4 units u, 8 units v (all dealt evenly, v within 2 strips), float32:
    #   shared [5]      on both devices
    #   rows   [4, 3]   u: 3 numbers a unit, padded to 2 slices of 2
    #   pairs  [8, 4]   v x u: 2 strips of 4 rows
    traffic, layout = traffic_of("ist")
    # a worker: 5 shared + 2 units x 3 + (4 x 2) pairs = 19 parameters of 5 + 12 + 32 = 49
    assert formula.largest_subnet(layout) == formula.slot_parameters(layout) == 19
    assert formula.model_parameters(layout) == 49
    assert formula.subnet_parameters(layout) == 2 * 19
    # papers: 14 unit numbers down and up, 5 shared ones both ways, each 4 B, of 2 workers
    assert traffic.paper == {"gather": 112, "merge_units": 112, "merge_shared": 80}
    # a device sends the other worker its 2 rows' slices (2 x 2) and its strip's 2 x 2 pairs: 8 numbers, 32 B.
    # Shared: 5 padded to 6: a slice of 3 to the other, 1 flag, and after the mean its own 3 again: 28 B
    assert traffic.sent == {"gather": 32, "merge_units": 32, "merge_shared": 28}
    # momentum that travels along: as much again
    carried, _ = traffic_of("ist", tx=optax.trace(0.9))
    assert carried.sent == {cause: 2 * size for cause, size in traffic.sent.items()}
    assert carried.paper == {cause: 2 * size for cause, size in traffic.paper.items()}
    # local SGD: 49 numbers, padded to 50: 25 and a flag to the other, and the mean of 25
    whole, _ = traffic_of("local_sgd")
    assert whole.sent == {"merge_shared": 4 * (25 + 1 + 25)}
    assert whole.paper == {"merge_shared": 2 * 2 * 4 * 49}
    # data-parallel: 49 gradients and a count, 4 B each, in each of 10 steps; a ring sends 2 x 1/2 of them
    gradients, _ = traffic_of("data_parallel", local_steps=10)
    assert gradients.sent == {"gradients": 10 * 200}
    assert gradients.paper == {"gradients": 10 * 2 * 4 * 49 * 2}


def test_bytes_of_an_evaluation_by_hand():
    _, layout = traffic_of("ist")
    shards, streamed = shard_shapes(layout), Streamed(layout)

    def costs(fn, path, *args):
        trace = jax.make_jaxpr(partial(fn, path), axis_env=[(AXIS, 2)])(*args, shards[path])
        found = traced.collectives_of(trace, 2)
        return [(c.kind, c.sent) for c in found]

    # a device gathers 4 rows of slices of 2 and a strip of 4 x 4 from the other
    assert costs(streamed, "rows") == [("all-gather", 4 * 8)]
    assert costs(streamed, "pairs") == [("all-gather", 4 * 16)]
    assert costs(streamed, "shared") == []
    # or the pairs stay, and 6 examples travel: 6 x 8 inputs, then 6 x 4 results of its strip
    x = jax.ShapeDtypeStruct((6, 8), np.float32)
    assert costs(streamed.product, "pairs", x) == [("all-gather", 4 * 48), ("all-to-all", 4 * 24)]
    x = jax.ShapeDtypeStruct((6, 4), np.float32)
    assert costs(streamed.product, "rows", x) == [("all-gather", 4 * 24), ("all-to-all", 4 * 12)]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_sent_on_one_device(method):
    traffic, _ = traffic_of(method, num_devices=1)
    assert sum(traffic.sent.values()) == 0


def layout_of(num_workers, **overrides):
    config = get_config("mlp", num_workers=num_workers, **overrides)
    task = image_task(8, 8, 1)
    return setup.make_recipe(config, build_model(config, 10), task, num_workers).layout


def test_the_largest_subnet_is_of_the_worker_with_the_largest_share():
    # 32 neurons a layer dealt 24 and 8: 64 inputs, 2 norms of 2 numbers, 10 classes
    layout = layout_of(2, **{"partition.shares": (3.0, 1.0)})
    assert formula.largest_subnet(layout) == 24 * 64 + 2 * 24 + 24 * 24 + 2 * 24 + 24 * 10
    layout = layout_of(3)  # 11, 11 and 10, drawn for each layer: 11 x 11 is possible
    assert formula.largest_subnet(layout) == 11 * 64 + 2 * 11 + 11 * 11 + 2 * 11 + 11 * 10


@pytest.fixture(scope="module")
def table():
    run = setup.set_up(get_config("mlp", method="data_parallel", num_workers=4, num_devices=2))
    return record.make_ledgers(run)["data_parallel"]


def rows(table):
    return {row["cause"]: row for row in table["rows"]}


def test_ledger_of_data_parallel_counts_every_step(table):
    gradients = rows(table)["gradients"]
    # 3,520 parameters; l = 2; ring of 2 devices, 2 workers on each: 2 x (14,080 + 4) / 2 bytes a worker
    assert gradients["expected"] == gradients["hlo"] == 2 * (4 * 3520 + 4) / 2
    assert gradients["paper"] == 2 * 2 * 4 * 3520
    store_row = rows(table)["store"]
    assert store_row["expected"] == store_row["hlo"] == 2 * 4 * 3520  # momentum stays with the parameters


class Whole:
    """A model that cannot be streamed."""

    def __init__(self, model):
        self.init, self.apply, self.subnet = model.init, model.apply, model.subnet
        self.unit_axes = model.unit_axes

    def __call__(self, x, gates=None, scale=None):
        """What `init` and `apply` call."""


@pytest.mark.parametrize("make", [lambda model: model, Whole])
def test_an_evaluation_sends_what_its_trace_says(make):
    run = setup.set_up(get_config("mlp", num_workers=3), make(MLP((24, 18), 10)), evaluation_only=True)
    chunks, program, trace = run.splits["test"]
    by_trace = sum(c.sent for c in traced.collectives_of(trace, 3))
    by_hlo = sum(traced.sent(kind, x, n) for (kind, n), x in hlo.read(program.as_text()).operands.items())
    batches = chunks.spec["weight"].shape[1]
    # norms are gathered once for all batches, by the compiler's wit; without streaming all is, by ours
    norms = 4 * 2 * (24 + 18) * 2
    assert by_trace == by_hlo + (0 if make is Whole else (batches - 1) * norms) > 0


def test_step_flops_by_hand_and_by_the_compiler(table):
    step = rows(table)["training step"]
    # 64-32-32-10, batch 8: every layer forward and by its kernel, the last two by their inputs too
    assert step["expected"] == step["hlo"] == 2 * 8 * (2 * 64 * 32 + 3 * 32 * 32 + 3 * 32 * 10)


def test_the_wire_column_is_filled_by_cause(table):
    assert {row["wire"] for row in table["rows"]} == {None}
    meter = wire.Meter()
    for received in (100_000, 60_000):  # two rounds
        meter.add("gradients", received)
        meter.add("merge", 3 * received)
    meter.add("evaluate", 500)
    filled = rows(ledger.with_wire(table, meter, phases=["gradients", "merge"], workers=4))
    assert filled["gradients"]["wire"] == 160_000 / 2 / 4
    assert filled["round"]["wire"] == 4 * 160_000 / 2 / 4
    assert filled["evaluation"]["wire"] == 500 / 4
    assert filled["store"]["wire"] is None
    assert filled["round"]["expected"] == rows(table)["round"]["expected"]


def convolution(stride, dilation, groups):
    def fn(params, x):
        return lax.conv_general_dilated(
            x, params, (stride, 1), "SAME", rhs_dilation=(1, dilation), feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ).sum()  # fmt: skip

    return fn


def test_flops_of_a_convolution_by_hand():
    # 3x3 on 4x4, SAME: along an axis 2 + 3 + 3 + 2 = 10 products that meet no padding; one gradient, by the
    # kernel, as the image is data
    shapes = (np.zeros((3, 3, 2, 5), np.float32), np.zeros((7, 4, 4, 2), np.float32))
    assert traced.step_flops(convolution(1, 1, 1), *shapes) == 2 * (2 * 10 * 10 * 2 * 5 * 7)


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 1, 2)])
def test_flops_are_those_of_xlas_own_analysis(stride, dilation, groups):
    fn = convolution(stride, dilation, groups)
    kernel, image = np.zeros((3, 3, 4 // groups, 6), np.float32), np.zeros((5, 9, 8, 4), np.float32)
    lowered = jax.jit(jax.grad(fn, (0, 1))).lower(kernel, image)  # forward is dropped: the sum needs none
    backward = traced.step_flops(lambda both: fn(*both), (kernel, image)) * 2 / 3
    by_xla = lowered.cost_analysis()["flops"]
    assert backward <= by_xla <= 1.02 * backward


def test_a_loop_counts_as_often_as_it_runs():
    def step(params, x):
        def body(x, kernel):
            return jnp.tanh(x @ kernel), None

        x, _ = lax.scan(body, x, params, unroll=1)
        return lax.cond(x.sum() > 0, lambda x: (x @ x.T).sum(), lambda x: x.sum(), x)

    params, x = np.zeros((6, 8, 8), np.float32), np.zeros((4, 8), np.float32)
    # 6 products of [4, 8] by [8, 8]: forward and by the kernel, 5 by the input too, which the first has as
    # data; but a loop's body is one program, so all 6. The dearer branch: [4, 8] by [8, 4], by both factors
    wanted = 6 * 3 * (2 * 4 * 8 * 8) + 3 * (2 * 4 * 8 * 4)
    assert traced.step_flops(step, params, x) == wanted
    compiled = jax.jit(jax.value_and_grad(step)).lower(params, x).compile()
    assert hlo.read(compiled.as_text()).flops == wanted


def test_a_scanned_resnet_has_the_flops_of_an_unrolled_one():
    found = {}
    for unroll in (1, 3):
        model = ResNet((1, 4), 24, 10, partitioned=(2,), unroll=unroll)
        image = jnp.zeros((8, 8, 8, 1))
        params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
        loss = jax.value_and_grad(lambda p, x, model=model: model.apply({"params": p}, x).sum())
        compiled = jax.jit(loss).lower(params, image).compile({"xla_backend_optimization_level": "0"})
        found[unroll] = hlo.read(compiled.as_text()).flops
        by_xla = compiled.cost_analysis()["flops"]  # with all that is no product, but a loop's body once
        assert found[unroll] > by_xla if unroll == 1 else found[unroll] < by_xla < 1.5 * found[unroll]
    assert found[1] == found[3]
    by_formula = traced.step_flops(lambda p, x: model.apply({"params": p}, x).sum(), params, image)
    assert by_formula < found[1] < 1.3 * by_formula  # zeros between the elements of strided gradients


def test_what_the_text_does_not_say_is_not_a_number():
    call = 'custom-call(%a), custom_call_target="__cublas$gemm"'
    text = f"""HloModule m

ENTRY %main (a: f32[4]) -> f32[4] {{
  %a = f32[4]{{0}} parameter(0)
  ROOT %c = f32[4]{{0}} {call}
}}
"""
    assert math.isnan(hlo.read(text).flops)
    assert hlo.read(text.replace("__cublas$gemm", "topk")).flops == 0


def test_asynchronous_collectives_and_all_forms_of_groups_are_read():
    text = """HloModule m

ENTRY %main (a: bf16[8,2]) -> bf16[32,2] {
  %a = bf16[8,2]{1,0} parameter(0)
  %s = (bf16[8,2]{1,0}, bf16[32,2]{1,0:T(8,128)}) all-gather-start(%a), replica_groups=[2,4]<=[8]
  %d = bf16[32,2]{1,0} all-gather-done(%s)
  %r = bf16[32,2]{1,0} all-reduce(%d), replica_groups={{0,1},{2,3}}
  %m = bf16[32,2]{1,0} all-to-all(%r), replica_groups=mesh['a'=2,'b'=3] {'a','b'}, dimensions={0}
  %o = bf16[32,2]{1,0} all-to-all(%m), replica_groups=mesh['a'=16,'b'=3] {'a':(2)8}, dimensions={0}
  ROOT %p = bf16[32,2]{1,0} collective-permute(%o), source_target_pairs={{0,1},{1,2},{2,0}}
}
"""
    found = hlo.read(text).operands
    whole = {("all-reduce", 2), ("all-to-all", 6), ("all-to-all", 8), ("collective-permute", 3)}
    assert found == {("all-gather", 4): 32} | dict.fromkeys(whole, 128)
    unknown = text.replace("mesh['a'=2,'b'=3] {'a','b'}", "of_another_form")
    ((kind, size),) = hlo.read(unknown).operands.keys() - found.keys()
    assert kind == "all-to-all" and math.isnan(traced.sent(kind, 128, size))


def test_a_meter_counts_what_arrives_by_cause():
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        with client, other:
            meter = wire.open_meter(2)
            for size, causes in ((100_000, ("gather", "round")), (7, ()), (1_000, ("round",))):
                with wire.metered(meter, *causes), wire.metered(None, "nothing"):
                    client.sendall(bytes(size))
                    while size:
                        size -= len(other.recv(size))
    assert meter.bytes == {"gather": 100_000, "round": 101_000}
    assert meter.times == {"gather": 1, "round": 2}
    assert wire.open_meter(1) is None


@pytest.mark.parametrize("answer", [OSError(95, "Operation not supported"), b"short"])
def test_a_stream_that_is_not_tcp_counts_nothing(answer, monkeypatch):
    class Other(socket.socket):
        def getsockopt(self, *_):
            if isinstance(answer, OSError):
                raise answer
            return answer

    with socket.create_server(("127.0.0.1", 0)):
        monkeypatch.setattr(socket, "socket", Other)
        assert wire.received_bytes() == 0
