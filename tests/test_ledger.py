"""What a round costs: by hand, by formula, by the compiled programs and on the wire."""

import json
import math
import socket
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config
from flax import traverse_util
from jax import lax
from test_distributed import finish, launch

from ist_jax import deals, partition
from ist_jax.costs import compiled as hlo
from ist_jax.costs import formula as ledger
from ist_jax.costs import ledger as audit
from ist_jax.costs import sockets as wire
from ist_jax.costs import traced as flops
from ist_jax.exchange import store
from ist_jax.exchange import streaming as fetch
from ist_jax.exchange.layout import from_params, make_layout
from ist_jax.models.resnet import ResNet
from ist_jax.runtime import devices, settings
from ist_jax.runtime import setup as experiment


def layout_of(name, num_workers, **overrides):
    config = get_config(name, num_workers=num_workers, **overrides)
    model = settings.build_model(config, 10)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))["params"]
    axes = partition.resolve_axes(shapes, model.unit_axes())
    groups = settings.make_groups(config, model, shapes, axes)
    return make_layout(shapes, axes, groups, num_workers, config.num_devices or num_workers)


def test_bytes_of_three_leaves_by_hand():
    # S = D = 2 workers, 4 units u, 8 units v (all dealt evenly, v within 2 strips), float32:
    #   shared [5]      on both devices
    #   rows   [4, 3]   u: 3 numbers a unit, padded to 2 slices of 2
    #   pairs  [8, 4]   v x u: 2 strips of 4 rows
    params = {"shared": np.zeros(5), "rows": np.zeros((4, 3)), "pairs": np.zeros((8, 4))}
    params = {path: x.astype(np.float32) for path, x in params.items()}
    axes = {"shared": (None,), "rows": ("u", None), "pairs": ("v", "u")}
    layout = make_layout(params, axes, partition.make_groups(params, axes, 2), 2, 2)
    # a worker: 5 shared + 2 units x 3 + (4 x 2) pairs = 19 parameters of 5 + 12 + 32 = 49
    assert ledger.largest_subnet(layout) == ledger.slot_parameters(layout) == 19
    assert ledger.model_parameters(layout) == 49
    assert ledger.subnet_parameters(layout) == 2 * 19
    # papers: 14 unit numbers down and up, 5 shared ones both ways, each 4 B, of 2 workers
    assert ledger.paper_bytes(layout) == {"gather": 112, "merge_units": 112, "merge_shared": 80}
    # a device sends the other worker its 2 rows' slices (2 x 2) and its strip's 2 x 2 pairs: 8 numbers, 32 B.
    # Shared: 5 padded to 6: a slice of 3 to the other, 1 flag, and after the mean its own 3 again: 28 B
    assert ledger.round_bytes(layout) == {"gather": 32, "merge_units": 32, "merge_shared": 28}
    assert ledger.wire_bytes(layout, trees=2) == 2 * (32 + 32 + 28)
    # an evaluation gathers 4 rows of slices of 2 and a strip of 4 x 4 from the other device, for each batch
    assert ledger.evaluation_bytes(layout, 3, streamed=True, products={}) == 3 * 4 * (8 + 16)
    assert ledger.evaluation_bytes(layout, 3, streamed=False, products={}) == 4 * (8 + 16)
    # or the pairs stay, and 6 examples travel: 6 x 8 inputs, then 6 x 4 results of its strip
    operands = {"pairs": fetch.operands(layout, "pairs", np.zeros((6, 8), np.float32))}
    assert operands == {"pairs": (4 * 6 * 8, 4 * 2 * 6 * 4)}
    assert ledger.evaluation_bytes(layout, 3, streamed=True, products=operands) == 3 * 4 * (8 + 48 + 24)
    assert fetch.operands(layout, "rows", np.zeros((6, 4), np.float32)) == (4 * 6 * 4, 4 * 2 * 6 * 2)
    # data-parallel: 49 gradients and a count, 4 B each, in each of 10 steps; a ring sends 2 x 1/2 of them
    assert ledger.round_bytes(layout, averaged_steps=10) == {"gradients": 10 * 200}
    assert ledger.paper_bytes(layout, averaged_steps=10) == {"gradients": 10 * 2 * 4 * 49 * 2}


def test_nothing_is_sent_on_one_device():
    layout = layout_of("mlp", 2, num_devices=1)
    assert ledger.wire_bytes(layout) == ledger.evaluation_bytes(layout, 5, streamed=True, products={}) == 0
    assert ledger.round_bytes(layout, averaged_steps=3) == {"gradients": 0}


def test_the_largest_subnet_is_of_the_worker_with_the_largest_share():
    # 32 neurons a layer dealt 24 and 8: 64 inputs, 2 norms of 2 numbers, 10 classes
    layout = layout_of("mlp", 2, **{"partition.shares": (3.0, 1.0)})
    assert ledger.largest_subnet(layout) == 24 * 64 + 2 * 24 + 24 * 24 + 2 * 24 + 24 * 10
    layout = layout_of("mlp", 3)  # 11, 11 and 10, drawn for each layer: 11 x 11 is possible
    assert ledger.largest_subnet(layout) == 11 * 64 + 2 * 11 + 11 * 11 + 2 * 11 + 11 * 10


@pytest.mark.parametrize(
    ("name", "num_workers", "overrides"),
    [
        ("resnet", 2, {"model.sections": (1, 6), "partition.min_units": 4}),
        ("resnet", 4, {"model.sections": (1, 6), "partition.min_units": 2}),
        ("resnet", 8, {"model.sections": (1, 24), "partition.min_units": 4}),
        ("mlp", 2, {"partition.min_units": 20}),
        ("mlp", 4, {}),
        ("mlp", 8, {"partition.min_units": 6, "num_devices": 4}),
    ],
)
def test_formula_and_hlo_agree_to_the_byte(name, num_workers, overrides):
    layout = layout_of(name, num_workers, **overrides)
    grid = (layout.num_devices, layout.workers_per_device)
    shapes = {path: leaf.shape for path, leaf in layout.leaves.items()}
    params = traverse_util.unflatten_dict({p: np.zeros(s, np.float32) for p, s in shapes.items()}, sep="/")
    shards = from_params(layout, params)
    subnets = {path: np.zeros((*grid, *x.shape), x.dtype) for path, x in ledger.subnet_shapes(layout).items()}
    assignment = partition.draw(0, 0, layout.groups, deals.random)
    build = partial(devices.compile_program, devices=jax.devices()[: layout.num_devices])
    programs = {
        "gather": build(partial(store.gather, layout), (shards, assignment), in_axes=[0, None]),
        "merge": build(
            partial(store.merge, layout),
            (shards, subnets, assignment, np.ones(grid, bool)),
            in_axes=[0, 0, None, 0],
        ),
    }
    found = audit.sent_bytes(layout, {n: hlo.read(p.as_text()) for n, p in programs.items()}, trees=1)
    expected = ledger.round_bytes(layout)
    assert {cause: found[cause] for cause in expected} == expected
    assert expected["gather"] > 0
    overlap = any(not group.disjoint for group in layout.groups.values())
    assert overlap == ("partition.min_units" in overrides)


@pytest.fixture(scope="module")
def table():
    run = experiment.set_up(get_config("mlp", method="data_parallel", num_workers=4, num_devices=2))
    return audit.ledger_of(run)


def rows(table):
    return {row["cause"]: row for row in table["rows"]}


def test_ledger_of_data_parallel_counts_every_step(table):
    gradients = rows(table)["gradients"]
    # 3,520 parameters; l = 2; ring of 2 devices, 2 workers on each: 2 x (14,080 + 4) / 2 bytes a worker
    assert gradients["formula"] == gradients["hlo"] == 2 * (4 * 3520 + 4) / 2
    assert gradients["paper"] == 2 * 2 * 4 * 3520
    store_row = rows(table)["store"]
    assert store_row["formula"] == store_row["hlo"] == 2 * 4 * 3520  # momentum stays with the parameters


@pytest.mark.parametrize("num_workers", [2, 3])
def test_an_evaluation_sends_what_the_formula_says(num_workers):
    config = get_config("mlp", num_workers=num_workers, **{"model.hidden": (24, 18)})
    run = experiment.set_up(config)
    evaluation = rows(audit.ledger_of(run))["evaluation"]
    norms = 4 * 2 * (24 + 18) * (num_workers - 1)  # gathered once for all batches, by the compiler's wit
    batches = run.test_batches.spec["weight"].shape[1]
    assert evaluation["formula"] == evaluation["hlo"] + (batches - 1) * norms


def test_step_flops_by_hand_and_by_the_compiler(table):
    step = rows(table)["training step"]
    # 64-32-32-10, batch 8: every layer forward and by its kernel, the last two by their inputs too
    assert step["formula"] == step["hlo"] == 2 * 8 * (2 * 64 * 32 + 3 * 32 * 32 + 3 * 32 * 10)


def test_the_wire_column_is_filled_by_cause(table):
    assert {row["wire"] for row in table["rows"]} == {None}
    meter = wire.Meter()
    for received in (100_000, 60_000):  # two rounds
        meter.add("gather", received)
        meter.add("round", received)
        meter.add("round", 3 * received)
    meter.add("evaluation", 500)
    filled = rows(audit.with_wire(table, meter, workers=4))
    assert filled["round"]["wire"] == 4 * 160_000 / 2 / 4
    assert filled["evaluation"]["wire"] == 500 / 4
    assert filled["gradients"]["wire"] is None
    assert filled["round"]["formula"] == rows(table)["round"]["formula"]


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
    assert flops.step_flops(convolution(1, 1, 1), *shapes) == 2 * (2 * 10 * 10 * 2 * 5 * 7)


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 1, 2)])
def test_flops_are_those_of_xlas_own_analysis(stride, dilation, groups):
    fn = convolution(stride, dilation, groups)
    kernel, image = np.zeros((3, 3, 4 // groups, 6), np.float32), np.zeros((5, 9, 8, 4), np.float32)
    lowered = jax.jit(jax.grad(fn, (0, 1))).lower(kernel, image)  # forward is dropped: the sum needs none
    backward = flops.step_flops(lambda both: fn(*both), (kernel, image)) * 2 / 3
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
    assert flops.step_flops(step, params, x) == wanted
    compiled = jax.jit(jax.value_and_grad(step)).lower(params, x).compile()
    assert hlo.read(compiled.as_text()).flops == wanted


def test_a_scanned_resnet_has_the_flops_of_an_unrolled_one():
    found = {}
    for unroll in (1, 3):
        model = ResNet((1, 4), 8, 10, partitioned=(2,), unroll=unroll)
        image = jnp.zeros((8, 8, 8, 1))
        params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
        loss = jax.value_and_grad(lambda p, x, model=model: model.apply({"params": p}, x).sum())
        compiled = jax.jit(loss).lower(params, image).compile({"xla_backend_optimization_level": "0"})
        found[unroll] = hlo.read(compiled.as_text()).flops
        by_xla = compiled.cost_analysis()["flops"]  # with all that is no product, but a loop's body once
        assert found[unroll] > by_xla if unroll == 1 else found[unroll] < by_xla < 1.5 * found[unroll]
    assert found[1] == found[3]
    by_formula = flops.step_flops(lambda p, x: model.apply({"params": p}, x).sum(), params, image)
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
    assert hlo.read(text).arguments == [16]


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
    assert kind == "all-to-all" and math.isnan(ledger.sent(kind, 128, size))


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


def test_two_processes_exchange_what_the_formula_says(tmp_path):
    size = {"num_workers": 2, "rounds": 2, "eval_every": 1, "model.hidden": "(512,512)"}
    for code, error in finish(launch(tmp_path, 2, **size)):
        assert code == 0, error
    measured = rows(json.loads((tmp_path / "ledger.json").read_text()))
    for cause in ("gather", "round", "evaluation"):
        assert measured[cause]["wire"] == pytest.approx(measured[cause]["hlo"], rel=0.05)
    assert measured["round"]["wire"] == pytest.approx(measured["round"]["formula"], rel=0.05)
