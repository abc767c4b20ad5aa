"""A user's own methods, deals, codecs, models, tasks and data, from files, in every command.

Each is at most 25 lines. Nothing but its name stands in the command.
"""

import json
import re

import numpy as np
import optax
import pytest
import reference
from conftest import ROOT, get_config

from ist_jax import compare, data, evaluate, main, plan, train
from ist_jax.report.__main__ import main as report
from ist_jax.runtime.setup import set_up
from ist_jax.workdir import files

# The examples of the docs, by what they define.
NAMES = {"own_method.py": "def slowmo", "own_deal.py": "def rolling", "own_codec.py": "half = Codec"}
NAMES |= {"own_model.py": "class ResidualMLP"}
NAMES |= {"own_regression.py": "regression = Task", "own_denoising.py": "denoising = Task"}
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "bring_your_own.md").read_text(), re.S)
FILES = {file: next(block for block in BLOCKS if name in block) for file, name in NAMES.items()}
OWN = {
    "method": "own_method.py:slowmo",
    "partition.deal": "own_deal.py:rolling",
    "exchange.codec": "own_codec.py:half",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def command(workdir, **overrides):
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    return ["main", f"--config={ROOT}/configs/mlp.py:smoke", f"--workdir={workdir}", *flags]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_an_example_has_at_most_25_lines(block):
    assert 0 < len(block.strip().splitlines()) <= 25


@pytest.mark.slow
def test_own_things_work_in_main_report_and_on_resume(folder, capsys):
    whole, cut = folder / "whole", folder / "cut"
    assert main.main(command(whole, **OWN)) == 0
    assert main.main(command(cut, **OWN, rounds=1)) == 0
    assert main.main(command(cut, **OWN)) == 0  # goes on
    summaries = [json.loads((f / "summary.json").read_text()) for f in (whole, cut)]
    assert summaries[0]["params_sha256"] == summaries[1]["params_sha256"]
    rows = {row["cause"]: row for row in json.loads((whole / "ledger.json").read_text())["rows"]}
    for cause in ("gather", "merge_units", "merge_shared", "round", "store", "parameters held"):
        assert rows[cause]["expected"] == rows[cause]["hlo"], cause
    # 64-32-32-10 for 2 workers: half of each layer and its norms, both ways, 2 bytes a number; 3 rounds
    assert summaries[0]["bytes_exchanged_per_worker"] == 3 * 2 * 2 * (64 * 16 + 16 * 16 + 16 * 10 + 4 * 16)
    assert report(["report", f"--workdir={whole}"]) == 0
    assert "map0" in (whole / "report.html").read_text()
    for key, named in OWN.items():  # another file under the same name
        name = named.split(":")[0]
        (folder / name).write_text(FILES[name] + "\n# changed\n")
        capsys.readouterr()
        with pytest.raises(SystemExit) as refused:
            main.main(command(cut, **OWN, rounds=4))
        assert refused.value.code == 2
        assert f"{key}={named} is not the file that it was begun with" in capsys.readouterr().err
        (folder / name).write_text(FILES[name])


def test_plan_and_compare_know_them(folder, capsys):
    flags = [f"--config={ROOT}/configs/mlp.py:smoke", *(f"--config.{k}={v}" for k, v in OWN.items())]
    assert plan.main(["plan", *flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    own, ist = planned[OWN["method"]], planned["ist"]
    assert own["wire_bytes_per_worker_per_round"] == ist["wire_bytes_per_worker_per_round"]
    assert own["state_bytes_per_worker"] > ist["state_bytes_per_worker"]  # the momentum of the owner
    methods = f"--methods=ist,{OWN['method']}"
    assert compare.main(["compare", *flags, methods, "--seeds=1", f"--workdir={folder / 'c'}"]) == 0
    compared = json.loads((folder / "c" / "compare.json").read_text())["variants"]
    assert compared.keys() == {"ist", OWN["method"]}


ENSEMBLE = '''\
"""S nets that are never merged, each worker's its own; scored one by one."""

import jax
from flax import traverse_util

from ist_jax.methods import Entry
from ist_jax.methods.method import Method, State
from ist_jax.methods.steps import each_worker, train_worker, worker_numbers


def make(recipe):
    def fresh(worker):
        key = jax.random.fold_in(jax.random.key(recipe.seed), worker)
        return traverse_util.flatten_dict(recipe.init_params(key), sep="/")

    def init(params):
        return State(params, own=jax.lax.map(fresh, worker_numbers(recipe.layout)))

    def local(state, _, turn):
        def train(args):
            worker, params, indices = args
            own = turn._replace(gates={}, indices=indices)
            params, _, told = train_worker(recipe, params, recipe.tx.init(params), own, worker)
            return params, told

        args = (worker_numbers(recipe.layout), state.own, turn.indices)
        members, told = each_worker(recipe, train, args)
        return state._replace(own=members), told

    def score(state, batches):
        return jax.lax.map(lambda params: recipe.score_fn(params, batches), state.own).mean(0)

    return Method(init, {"local": local}, score)


ensemble = Entry(make)
'''


def test_what_workers_keep_is_saved_scored_and_gone_on_with(folder, capsys):
    (folder / "own.py").write_text(ENSEMBLE)
    own, size = {"method": "own.py:ensemble"}, {"rounds": 12, "local_steps": 10}
    assert main.main(command(folder / "whole", **own, **size)) == 0
    assert main.main(command(folder / "cut", **own, **size | {"rounds": 2})) == 0
    assert main.main(command(folder / "cut", **own, **size)) == 0  # goes on
    records = [files.read_records(folder / name) for name in ("whole", "cut")]
    assert [r["train_loss"] for r in records[0]] == [r["train_loss"] for r in records[1]]
    assert records[0][-1]["train_loss"] < 0.7 * records[0][0]["train_loss"]
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    assert summary["bytes_exchanged_per_worker"] == 0
    capsys.readouterr()
    assert evaluate.main(["evaluate", f"--workdir={folder / 'whole'}"]) == 0
    assert f"test accuracy {summary['test_accuracy']:.2%}, loss" in capsys.readouterr().out


def test_what_is_scored_by_more_than_parameters_needs_its_own_optimizer(folder):
    (folder / "own.py").write_text(ENSEMBLE)
    config = get_config("mlp", method="own.py:ensemble", optimizer_state="carry", rounds=1)
    train.train(config, folder / "run", optimizer=optax.adam(0.01))
    with pytest.raises(ValueError, match=r"an optimizer of your own.*evaluate it from Python"):
        evaluate.evaluate_workdir(folder / "run", [])


def test_an_outer_optimizer_is_refused_where_a_method_does_not_say_that_it_has_one(folder, capsys):
    (folder / "said.py").write_text(
        "from ist_jax.methods import Entry, subnets\nown = Entry(subnets.make, has_outer=True)\n"
    )
    facts, outer = data.facts("digits"), {"outer.name": "nesterov"}
    with pytest.raises(SystemExit) as refused:
        main.main(command(folder / "run", method=OWN["method"], **outer))
    assert refused.value.code == 2
    message = "has none; set config.outer.name to 'none', or give its"
    assert message in capsys.readouterr().err
    cost = plan.predict(get_config("mlp", method="said.py:own", **outer), facts)
    plain = plan.predict(get_config("mlp", method="said.py:own"), facts)
    assert cost.state_bytes_per_worker > plain.state_bytes_per_worker


ODD = {
    "method": ("is a int, and no function", "x = 3"),
    "partition.deal": ("is a int, and no function", "x = 3"),
    "exchange.codec": ("is no ist_jax.exchange.codec.Codec", "def x(): pass"),
}


@pytest.mark.parametrize("key", ODD)
def test_what_is_no_method_deal_or_codec_is_one_line(key, folder, capsys):
    message, text = ODD[key]
    (folder / "odd.py").write_text(text)
    with pytest.raises(SystemExit) as refused:
        main.main(command(folder / "run", **{key: "odd.py:x"}))
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_a_codec_is_refused_where_nothing_is_exchanged(folder, capsys):
    with pytest.raises(SystemExit) as refused:
        main.main(
            command(folder / "run", method="data_parallel", **{"exchange.codec": OWN["exchange.codec"]})
        )
    assert refused.value.code == 2
    assert "set config.exchange.codec to 'none'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "data_parallel", "exchange.merge_bits": 8},
            "method='data_parallel' has none; set config.exchange.merge_bits to 32",
        ),
        (
            {"method": "ensemble", "exchange.keep": 0.5, "exchange.error_feedback": True},
            "set config.exchange.keep to 1.0 and config.exchange.error_feedback to False",
        ),
        (
            {"exchange.codec": OWN["exchange.codec"], "exchange.keep": 0.5},
            "one way alone; set config.exchange.keep to 1.0",
        ),
        (
            {"exchange.gather_bits": 4, "exchange.error_feedback": True},
            "set config.exchange.merge_bits below 32, config.exchange.keep below 1",
        ),
        (
            {"exchange.codec": OWN["exchange.codec"], "exchange.gather_bits": 4},
            "one way alone; set config.exchange.gather_bits to 32",
        ),
        ({"exchange.gather_bits": 7}, "set config.exchange.gather_bits to one of 32, 16, 8, 6, 5, 4"),
    ],
)
def test_few_bits_are_refused_where_they_cannot_be_sent(settings, message, folder, capsys):
    with pytest.raises(SystemExit) as refused:
        main.main(command(folder / "run", **settings))
    assert refused.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_in_a_warmup_no_deal_is_asked(folder):
    overrides = {"partition.deal": OWN["partition.deal"], "partition.warmup_epochs": 0.02}
    run = set_up(get_config("mlp", **overrides))
    assert run.turn(run.stages[0], 0).draw["hidden1"].gates.all()


@pytest.mark.slow
def test_the_rolling_window_is_dealt_and_slowmo_is_slow(folder):
    run = set_up(get_config("mlp", **{"partition.deal": OWN["partition.deal"]}))
    for index in (0, 2):
        draw = run.turn(run.stages[-1], index).draw["hidden1"].indices
        deck = run.layout.groups["hidden1"].deck
        wanted = np.sort((np.arange(32) // 16 * 16 + (np.arange(32) % 16 - index) % 16)[deck == 0])
        assert np.array_equal(draw[0], wanted)
    own = set_up(get_config("mlp", method=OWN["method"]))
    ist = set_up(get_config("mlp"))
    half = set_up(get_config("mlp", **{"exchange.codec": OWN["exchange.codec"]}))
    moved = []
    for run in (own, ist, half):
        before = {p: np.array(x) for p, x in run.state.params.items()}
        state, _ = train.train_round(run, run.state, 0)
        moved.append({p: np.asarray(x) - before[p] for p, x in state.params.items()})
    assert reference.max_difference(*moved[:2]) < 1e-6  # the first round: no momentum yet
    assert 1e-6 < reference.max_difference(*moved[1:]) < 1e-2  # numbers of 8 bits of precision


BAD = {
    "unsorted": "return Assignment(indices[:, ::-1].copy(), gates)",
    "out of range": "return Assignment(indices + 1, gates)",
    "a strip too full": "return assign(np.arange(group.size) // group.slots == np.arange(2)[:, None], group)",
}


@pytest.mark.parametrize("fault", BAD)
def test_a_deal_that_breaks_the_contract_is_refused_by_name(fault, folder, capsys):
    text = f"""\
import numpy as np
from ist_jax.deals import DEALS
from ist_jax.partition import Assignment, assign

def crooked(rng, group, round_index):
    indices, gates = DEALS["random"](rng, group, round_index)
    {BAD[fault]}
"""
    (folder / "crooked.py").write_text(text)
    with pytest.raises(SystemExit) as refused:
        main.main(command(folder / "run", **{"partition.deal": "crooked.py:crooked"}))
    assert refused.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "crooked" in message and "hidden1" in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", "nowhere.py:own", "nowhere.py"),
        ("method", "own_method.py:slomo", "slowmo"),
        ("partition.deal", "rolled", "rolling"),
        ("exchange.codec", "own_codec.py:CODEC", "half"),
    ],
)
def test_what_is_not_there_is_one_line(key, value, message, folder, capsys):
    with pytest.raises(SystemExit) as refused:
        main.main(command(folder / "run", **{key: value}))
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


# --- a model, a task and data of one's own ------------------------------------------------------------------

OWN_FILE = '''\
"""Whether two numbers add up to more than nothing, and by how much."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ist_jax.tasks import Metric, Task


def load():
    def split(seed, n):
        x = np.random.default_rng(seed).normal(size=(n, 2))
        return {"x": x, "y": x.sum(1)}

    return split(0, 64), split(1, 32)


class Net(nn.Module):
    width: int = 16

    def unit_axes(self):
        return {"in/kernel": (None, "hidden"), "in/bias": ("hidden",), "out/kernel": ("hidden", None)}

    def subnet(self, sizes):
        return self.clone(width=sizes["hidden"])

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="out")(nn.relu(nn.Dense(self.width, name="in")(x)))[:, 0]


def squares(y, label, key):
    return jnp.square(y - label)


task = Task("sums", squares, scores={"sign": lambda y, label: (y * label > 0) * 1.0}, metric=Metric("loss"))
model = Net()
'''
OWN_THREE = {"model.name": "own.py:model", "task": "own.py:task", "data.name": "own.py:load"}


def test_an_own_model_task_and_data_file_work_in_every_command(folder, capsys):
    (folder / "own.py").write_text(OWN_FILE)
    overrides = OWN_THREE | {"rounds": 2}
    assert main.main(command(folder / "run", **overrides)) == 0
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["task"] == "sums" and 0 < summary["test_sign"] <= 1
    assert main.main(command(folder / "run", **overrides | {"rounds": 3})) == 0  # goes on
    assert evaluate.main(["evaluate", f"--workdir={folder / 'run'}"]) == 0
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert f"test loss {summary['test_loss']:.4g} (sign" in capsys.readouterr().out
    assert report(["report", f"--workdir={folder / 'run'}"]) == 0
    own = [flag for flag in command(folder, **overrides)[1:] if "workdir" not in flag]
    capsys.readouterr()
    assert plan.main(["plan", *own, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["ist"]
    rows = {r["cause"]: r for r in json.loads((folder / "run" / "ledger.json").read_text())["rows"]}
    assert planned["wire_bytes_per_worker_per_round"] == rows["round"]["expected"] > 0
    (folder / "own.py").write_text(OWN_FILE + "\n# changed\n")
    for key, named in OWN_THREE.items():
        with pytest.raises(SystemExit) as refused:
            main.main(command(folder / "run", **overrides | {"rounds": 4}))
        assert refused.value.code == 2
        assert f"{key}={named} is not the file that it was begun with" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        evaluate.main(["evaluate", f"--workdir={folder / 'run'}"])
    assert refused.value.code == 2
    assert "the file is not the one that the run was made with" in capsys.readouterr().err


@pytest.mark.slow
def test_methods_are_compared_on_them(folder, capsys):
    (folder / "own.py").write_text(OWN_FILE)
    flags = command(folder / "compared", **OWN_THREE)[1:]
    assert compare.main(["compare", *flags, "--methods=ist,local_sgd", "--seeds=1"]) == 0
    assert "test loss" in capsys.readouterr().out


DOCUMENTED = {  # of the docs' tasks: the other keys of their commands, and the metric
    "own_regression.py:regression": (
        {"model.name": "own_regression.py:Net", "data.name": "own_regression.py:load", "method": "local_sgd"},
        "test_mae",
    ),
    "own_denoising.py:denoising": ({"model.name": "own_denoising.py:net"}, "test_psnr"),
}


@pytest.mark.parametrize("task", DOCUMENTED)
def test_a_task_of_the_docs_is_learned(task, folder):
    overrides, metric = DOCUMENTED[task]
    overrides |= {"task": task, "local_steps": 20, "rounds": 4, "optimizer.learning_rate": 0.02}
    assert main.main(command(folder / "run", **overrides)) == 0
    records = files.read_records(folder / "run")
    assert records[-1]["train_loss"] < 0.7 * records[0]["train_loss"]
    assert np.isfinite(records[-1][metric])


def test_the_model_of_the_docs_is_dealt_out_in_blocks(folder):
    overrides = {"model.name": "own_model.py:ResidualMLP", "local_steps": 20}
    assert main.main(command(folder / "run", **overrides)) == 0
    records = files.read_records(folder / "run")
    assert records[-1]["train_loss"] < 0.7 * records[0]["train_loss"]
    per_block = 64 * 64 + 3 * 64  # half of the eight blocks, stem and head
    wanted = 4 * per_block + 64 * 64 + 64 + 64 * 10 + 10
    assert files.read_summary(folder / "run")["parameters_per_worker"] == wanted


NO_SUCH_THING = {
    "model.name": "is a int; a flax.linen.Module is needed",
    "task": "is a int, no ist_jax.tasks.Task and no function",
    "data.name": "is a int; an ist_jax.data.DataSet is needed",
}


@pytest.mark.parametrize("key", NO_SUCH_THING)
def test_what_is_no_model_task_or_data_set_is_one_line(key, folder, capsys):
    (folder / "odd.py").write_text("x = 3")
    for name, message in (("x", NO_SUCH_THING[key]), ("y", "odd.py has no name 'y'; names there: x")):
        with pytest.raises(SystemExit) as refused:
            main.main(command(folder / "run", **{key: f"odd.py:{name}"}))
        assert refused.value.code == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
        assert f"{key}=odd.py:{name}" in line and message in line


def test_a_run_that_learned_nothing_exits_with_1(folder, capsys):
    (folder / "own.py").write_text(OWN_FILE.replace("jnp.square(y - label)", "jnp.nan * (y - label)"))
    assert main.main(command(folder / "run", **OWN_THREE)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: all workers were left out of all 3 rounds")
