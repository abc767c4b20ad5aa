"""Costs before anything runs: the papers' tables, the largest nets, the command."""

import json
import resource
import subprocess
import sys

import flax.linen as nn
import pytest
from conftest import ROOT, get_config

from ist_jax import data, plan, train
from ist_jax.costs.link import Link, modelled, parse
from ist_jax.methods import METHODS
from ist_jax.models import conv
from ist_jax.runtime import inputs, record, setup

RESNET = f"--config={ROOT}/configs/resnet.py:cifar100"
MLP = f"--config={ROOT}/configs/mlp.py:smoke"
IMAGENET = f"--config={ROOT}/configs/resnet.py:imagenet"


@pytest.mark.slow  # that of 4 workers is in the table below
@pytest.mark.parametrize(
    ("num_workers", "min_units", "local_sgd", "resist"),
    [(2, 11, 0.662, 0.455), (8, 4, 2.649, 1.289)],
)
def test_gigabytes_of_the_papers_table(num_workers, min_units, local_sgd, resist):
    config = get_config("resnet", "cifar100", num_workers=num_workers)
    config.partition.min_units = min_units
    for method, gigabytes in (("local_sgd", local_sgd), ("ist", resist)):
        config.method = method
        cost = plan.predict(config, data.facts("cifar100"))
        assert cost.paper_gigabytes_per_round == pytest.approx(gigabytes, abs=1e-3)
    # 41,396,900 parameters; a block of section 3 has two 3x3x256x256 kernels and two norms
    block = 2 * (9 * 256 * 256 + 2 * 256)
    assert cost.params_per_worker == 41_396_900 - (22 - min_units) * block


def test_costs_of_an_mlp_by_hand():
    config = get_config("mlp")  # 64-32-32-10, 2 workers, 2 steps of 8 examples, momentum
    costs = {}
    for config.method in METHODS:
        costs[config.method] = plan.predict(config, data.facts("digits"))
    # half of each layer: 64 x 16, 16 x 16 and 16 x 10 weights, 2 x 2 x 16 norms; 2 of the 4 strips' rows
    ist = costs["ist"]
    assert ist.params_per_worker == 64 * 16 + 16 * 16 + 16 * 10 + 4 * 16
    assert ist.paper_gigabytes_per_round == 2 * 2 * 4 * ist.params_per_worker / 1e9
    assert ist.flops_per_worker_per_step == 2 * 8 * (2 * 64 * 16 + 3 * 16 * 16 + 3 * 16 * 10)
    # the store's half (each of 4 norm leaves has rows of 1 number, kept as a whole), the subnet, its momentum
    assert ist.state_bytes_per_worker == 4 * ((64 * 32 + 32 * 32 + 32 * 10) / 2 + 4 * 32 + 2 * 1504)
    full = 64 * 32 + 32 * 32 + 32 * 10 + 4 * 32
    # momentum stays with its worker: as it was before the round, and as it is after
    assert costs["local_sgd"].state_bytes_per_worker == 4 * 4 * full
    assert costs["local_sgd"].wire_bytes_per_worker_per_round == 4 * (full / 2 + 1 + full / 2)
    assert costs["data_parallel"].state_bytes_per_worker == 4 * 2 * full
    assert costs["data_parallel"].wire_bytes_per_worker_per_round == 2 * 4 * (full + 1)
    ensemble = costs["ensemble"]
    assert ensemble.wire_bytes_per_worker_per_round == ensemble.exchanged_bytes_per_worker_per_round == 0
    assert ensemble.params_per_worker == costs["ist"].params_per_worker
    assert ensemble.state_bytes_per_worker == 4 * 2 * ensemble.params_per_worker  # and its momentum


def run(capsys, *flags):
    assert plan.main(["plan", *flags]) == 0
    return capsys.readouterr().out


def test_json_has_the_documented_keys(capsys):
    planned = json.loads(run(capsys, MLP, "--json", "--bandwidth=1e9,2e9@3ms", "--flops=1e6"))
    modelled = {"seconds_per_round", "utilisation", "overlap_saves_per_round"}
    others = {*modelled, "run", "setting", "notes"}
    assert planned.keys() == {*METHODS, *others}
    for method in METHODS:
        assert planned[method].keys() == set(plan.Cost._fields)
        cost, (slow, fast) = plan.Cost(**planned[method]), planned["seconds_per_round"][method]
        computing = 2 * cost.flops_per_worker_per_step / 1e6  # l = 2
        assert slow == pytest.approx(computing + 8 * cost.wire_bytes_per_worker_per_round / 1e9)
        waiting = 3e-3 * cost.messages_per_device_per_round
        assert fast == pytest.approx(computing + waiting + 8 * cost.wire_bytes_per_worker_per_round / 2e9)
        assert planned["utilisation"][method] == pytest.approx([computing / slow, computing / fast])
        saved = [min(computing, slow - computing), min(computing, fast - computing)]
        assert planned["overlap_saves_per_round"][method] == pytest.approx(saved)
        total = plan.Total(**planned["run"][method])
        assert total.hours == pytest.approx([3 * slow / 3600, 3 * fast / 3600])
        assert total.paper_gigabytes == pytest.approx(3 * cost.paper_gigabytes_per_round)
    assert planned["setting"]["rounds"] == 3
    assert planned["setting"]["links"] == [
        {"bits_per_second": 1e9, "latency": 0},
        {"bits_per_second": 2e9, "latency": 0.003},
    ]


def test_messages_of_an_mlp_by_hand():
    # of 4 workers: 3 messages in an all-to-all or an all-gather, 6 in the ring of an all-reduce. A round
    # of IST is two all-to-alls, one of local SGD an all-to-all and an all-gather; each of 2 steps of
    # data-parallel SGD is an all-reduce of all gradients.
    config = get_config("mlp", num_workers=4)
    messages = {}
    for config.method in ("ist", "local_sgd", "data_parallel"):
        messages[config.method] = plan.predict(config, data.facts("digits")).messages_per_device_per_round
    assert messages == {"ist": 2 * 3, "local_sgd": 2 * 3, "data_parallel": 2 * 6}
    config.num_workers = 1
    assert plan.predict(config, data.facts("digits")).messages_per_device_per_round == 0


def test_what_is_modelled_by_hand():
    # 3 s of steps; 4 messages of 0.5 s and 1 GB over 1 Gb/s take 2 + 8 s
    found = modelled(3.0, 1e9, 4, Link(1e9, 0.5))
    assert found == (13.0, 3 / 13, 3.0)
    assert modelled(30.0, 1e9, 4, Link(1e9, 0.5)) == (40.0, 0.75, 10.0)
    assert parse(["1e9@1ms", "2e9@3us", "5@0.5s", "7"]) == [
        pytest.approx(own) for own in ((1e9, 1e-3), (2e9, 3e-6), (5.0, 0.5), (7.0, 0.0))
    ]


def test_several_workers_on_a_device_take_turns_and_share_its_link():
    config, facts = get_config("mlp", num_workers=4), data.facts("digits")
    alone = plan.plan(config, facts, links=[Link(1e99)], flops=1e9)["seconds_per_round"]
    config.num_devices = 2
    shared = plan.plan(config, facts, links=[Link(1e99)], flops=1e9)["seconds_per_round"]
    for method, (seconds,) in alone.items():
        assert shared[method] == [pytest.approx(2 * seconds)]


def test_the_table_is_legible_at_100_columns(capsys):
    lines = run(capsys, RESNET, "--bandwidth=1e8@10ms,1e9@1ms,1e10,1e11,4e11").splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == f"{ROOT}/configs/resnet.py:cifar100"
    assert lines[1] == "4 workers on 4 devices, 313 rounds of 50 local steps on 128 examples each"
    # 16 of the 22 blocks of section 3 are elsewhere: two 3x3x256x256 kernels and two norms each
    assert 41_396_900 - 16 * 2 * (9 * 256 * 256 + 2 * 256) == 22_506_148
    rows = {(line.split() or [""])[0]: line.split() for line in reversed(lines)}  # the first table's
    assert (rows["ist"][1], rows["ist"][4]) == ("22,506,148", "0.720")  # arXiv:2107.00961
    assert (rows["local_sgd"][1], rows["local_sgd"][4]) == ("41,396,900", "1.325")
    assert rows["ist"][2] == f"{2 * 4 * 22_506_148 / 1e6:.1f}"
    whole = lines[next(i for i, line in enumerate(lines) if line.startswith("the whole run")) :]
    assert "GB exchanged" in whole[0]
    assert whole[3].split()[:2] == ["ist", f"{313 * 2 * 4 * 22_506_148 / 1e9:.1f}"]
    assert any(line.startswith("hours the whole run") for line in whole)
    assert "note: " not in "".join(lines)


@pytest.mark.parametrize(  # 1,437 examples, 32 a round: a warm-up of 2 of the 3 rounds
    ("method", "warmup"), [("ist", 0.03), ("local_sgd", 0.0), ("data_parallel", 0.0)]
)
def test_the_plan_and_the_run_have_one_headline(method, warmup, tmp_path, capsys):
    flags = [MLP, f"--config.method={method}", f"--config.partition.warmup_epochs={warmup}"]
    total = plan.Total(**json.loads(run(capsys, *flags, "--json"))["run"][method])
    config = get_config("mlp", method=method, **{"partition.warmup_epochs": warmup})
    summary = train.train(config, tmp_path)
    assert total.exchanged_bytes_per_worker == summary["bytes_exchanged_per_worker"]
    assert total.wire_bytes_per_worker == summary["bytes_sent_per_worker"]
    headline = f"{total.exchanged_bytes_per_worker / 1e6:.3g}"
    assert f"each worker exchanged {headline} MB" in record.last_line(summary)
    lines = run(capsys, *flags).splitlines()
    whole = lines[next(i for i, line in enumerate(lines) if line.startswith("the whole run")) :]
    assert [headline] == [line.split()[1] for line in whole[:6] if line.startswith(f"{method} ")]


@pytest.mark.parametrize(
    ("flags", "notes"),
    [
        (
            [RESNET, "--config.num_workers=1024", "--config.rounds=1"],
            ["1,024 workers for the 22 units of section3: each", "the whole run is one round: units hardly"],
        ),
        ([RESNET, "--config.num_workers=1"], ["one worker holds all units of section3"]),
        ([RESNET, "--config.partition.min_units=22"], ["every worker holds all 22 units of section3"]),
        (
            [RESNET, "--config.num_workers=32", "--config.partition.min_units=0"],
            ["10 of 32 workers get none of the 22 units of section3"],
        ),
        ([RESNET, "--config.partition.warmup_epochs=999"], ["the warm-up is the whole run"]),
        (
            [RESNET, "--config.method=local_sgd", "--config.rounds=4"],
            ["the whole run is 4 rounds; take fewer"],
        ),
        ([RESNET, "--config.rounds=5"], []),
    ],
)
def test_a_setting_that_makes_no_sense_is_told(flags, notes, capsys, monkeypatch):
    none = plan.Cost(**dict.fromkeys(plan.Cost._fields, 0))  # what is told does not depend on it
    monkeypatch.setattr(plan, "_cost", lambda *_: none)
    small = ["--config.model.width=4", "--config.model.sections=(1,1,23,1)"]
    lines = [line for line in run(capsys, *flags, *small).splitlines() if line.startswith("note: ")]
    assert len(lines) == len(notes)
    for line, note in zip(lines, notes, strict=True):
        assert line.startswith(f"note: {note}")


@pytest.mark.slow
def test_a_thousand_workers_take_less_than_ten_seconds():
    command = [sys.executable, "-m", "ist_jax.plan", RESNET, "--config.num_workers=1024", "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    planned = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of a core, whatever else the machine does
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert planned["setting"]["num_workers"] == planned["setting"]["num_devices"] == 1024


@pytest.mark.parametrize("width", [64, 16])
def test_a_convolution_counts_by_its_definition(width, monkeypatch):
    config = get_config("resnet", **{"data.name": "cifar10", "model.width": width})
    found = plan.predict(config, data.facts("cifar10"))
    for bound in ("_CHANNELS", "_CHANNELS_OF_GRADIENT"):  # no tiles at all
        monkeypatch.setattr(conv, bound, 10**6)
    monkeypatch.setattr(conv, "_FEW", 0)  # nor pairs
    assert plan.predict(config, data.facts("cifar10")) == found


def test_two_billion_weights_fit_a_laptop(capsys):
    planned = json.loads(run(capsys, f"--config={ROOT}/configs/mlp.py:amazon670k", "--json"))
    assert planned["setting"]["num_workers"] == 8
    assert planned["local_sgd"]["params_per_worker"] == (135_909 + 670_091) * 2560 + 2 * 2560
    assert planned["ist"]["params_per_worker"] == (135_909 + 670_091) * 320 + 2 * 320
    # an eighth, with momentum once in place of twice: local SGD's outlasts the round
    eighth = planned["local_sgd"]["state_bytes_per_worker"] / 8 * 3 / 4
    assert planned["ist"]["state_bytes_per_worker"] == pytest.approx(eighth, rel=1e-3)
    # the sparse layer multiplies no matrices; logits: forward and by both factors, 128 examples
    assert planned["ist"]["flops_per_worker_per_step"] == 3 * 2 * 128 * 320 * 670_091


def test_a_set_of_ones_own(capsys):
    own = ("--config.data.name=mine", "--example=4,4,3", "--classes=7")
    planned = json.loads(run(capsys, f"--config={ROOT}/configs/mlp.py", *own, "--json"))
    assert planned["local_sgd"]["params_per_worker"] == 48 * 1024 + 1024**2 + 1024 * 7 + 4 * 1024
    assert planned["setting"]["rounds"] is None  # 400 epochs of nobody knows how many examples
    assert planned["run"] is None
    assert "how long the whole run is, the data set tells" in run(
        capsys, f"--config={ROOT}/configs/mlp.py", *own
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config is missing"),
        ([MLP, "--jsn"], "jsn"),
        ([MLP, "stray"], "unexpected argument 'stray'"),
        ([MLP, "--bandwidth=fast"], "--bandwidth=fast: give bits per second above 0 and, after an @"),
        ([MLP, "--bandwidth=1e9,0"], "--bandwidth=1e9,0: give bits per second above 0"),
        ([MLP, "--bandwidth="], "--bandwidth=: give bits per second above 0"),
        ([MLP, "--bandwidth=1e9,"], "--bandwidth=1e9,: give"),
        ([MLP, "--bandwidth=1e9@"], "--bandwidth=1e9@: give"),
        ([MLP, "--bandwidth=1e9@1"], "a latency of 0 or more in s, ms or us: 1e8@10ms,1e9"),
        ([MLP, "--bandwidth=1e9@-1ms"], "--bandwidth=1e9@-1ms: give"),
        ([MLP, "--bandwidth=1e9@xms"], "--bandwidth=1e9@xms: give"),
        ([MLP, "--bandwidth=nan@1ms"], "--bandwidth=nan@1ms: give"),
        ([MLP, "--flops=-1"], "--flops=-1.0: numbers above 0"),
        ([MLP, "--flops=many"], "a number is needed, not 'many'"),
        ([MLP, "--config.num_workers=64"], "leaves a worker without a neuron"),
        ([MLP, "--config.num_workers=4", "--config.num_devices=3"], "one of [1, 2, 4]"),
        ([MLP, "--config.data.name=mine"], "give --example and --classes"),
        ([MLP, "--config.data.name=mine", "--example=28,28"], "give --classes"),
        ([MLP, "--config.data.name=image_folder"], "give --example and --classes"),
        ([MLP, "--config.data.name=image_folder", "--config.data.in_memory=0"], "give --classes"),
        ([MLP, "--config.data.name=extreme_classification"], "give --example and --classes"),
        ([IMAGENET, "--config.data.validation=0.1"], "data.validation=0.1 is not for streamed images"),
        ([IMAGENET, "--config.data.size=300"], "data.size=300 and data.resize=256"),
        (
            [RESNET, "--config.model.name=vit"],
            "set config.model.name to one of 'resnet', 'mlp', 'transformer', 'vgg', or FILE.py:NAME",
        ),
        ([RESNET, "--example=32,32", "--classes=10"], "give --example=HEIGHT,WIDTH,CHANNELS"),
        ([MLP, "--example=8,tall"], "--example=8,tall: numbers are needed"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        plan.main(["plan", *flags])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_squares_of_a_streamed_set_are_as_large_as_the_config_says():
    small = {"method": "local_sgd", "model.width": 4, "model.sections": (1, 1, 2), "model.block": "basic"}
    flops = {}
    for size in (112, 224):
        config = get_config("resnet", "imagenet", **small, **{"data.size": size})
        facts = data.facts("imagenet2012", {"data.size": size})
        flops[size] = plan.predict(config, facts).flops_per_worker_per_step
    assert flops[224] / flops[112] == pytest.approx(4, rel=0.1)
    assert setup.make_schedule(config, facts.num_train).rounds == 7507  # 90 epochs of 1,281,167


def test_the_chosen_words_are_the_classes(capsys):
    speech = [f"--config={ROOT}/configs/mlp.py:speech2", "--json"]
    some = json.loads(run(capsys, *speech, "--config.data.words=('yes','no','yes')"))
    every = json.loads(run(capsys, *speech, "--config.data.clip_length=pad"))
    whole = json.loads(run(capsys, *speech))
    difference = every["local_sgd"]["params_per_worker"] - some["local_sgd"]["params_per_worker"]
    assert difference == 4096 * (35 - 2)
    assert some["setting"]["rounds"] is None  # how many clips there are of them is not known
    assert every["setting"]["rounds"] == 1654  # 100 epochs of 84,663, 2 workers, 20 steps of 128
    assert whole["setting"]["rounds"] is None  # nor how many are one second long
    assert whole["local_sgd"] == every["local_sgd"]


@pytest.mark.parametrize("validation", [0.0, 0.02, 1 / 3])
def test_examples_that_are_held_out_are_not_trained_on(validation):
    config = get_config("mlp", local_steps=1, batch_size=1, num_workers=1, rounds=None, epochs=1.0)
    config.data.validation = validation
    planned = plan.plan(config, data.facts("digits"), links=[Link(1e9)], flops=1e9)
    assert planned["setting"]["rounds"] == inputs.count(inputs.open_inputs(setup.wanted_data(config)).train)


def test_what_is_known_of_a_set_is_what_it_holds():
    digits = data.open_data_set("digits", "")
    assert data.Facts(digits.train[0]["image"].shape, len(digits.classes), len(digits.train)) == data.facts(
        "digits"
    )


class Composite(nn.Module):
    """Stacked blocks, of whose neurons a worker has some in each: both axes are dealt."""

    blocks: int = 4
    neurons: int = 8

    def unit_axes(self):
        return {"up": ("block", None, "neuron"), "down": ("block", "neuron", None)}

    def subnet(self, sizes):
        return self.clone(blocks=sizes["block"], neurons=sizes["neuron"])

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(5, name="embed")(x.reshape(len(x), -1))
        up = self.param("up", nn.initializers.normal(0.1), (self.blocks, 5, self.neurons))
        down = self.param("down", nn.initializers.normal(0.1), (self.blocks, self.neurons, 5))
        for block in range(self.blocks):
            y = y + nn.relu(y @ up[block]) @ down[block]
        return nn.Dense(10, name="head")(y)


def test_blocks_and_neurons_dealt_at_once_are_seldom_trained():
    config = get_config("mlp", rounds=100)
    planned = plan.plan(config, data.facts("digits", {}), links=[Link(1e9)], flops=1e13, model=Composite())
    assert planned["notes"] == [
        f"of {path}, which is dealt by block and neuron at once, 50% is trained in a round"
        for path in ("down", "up")
    ]
