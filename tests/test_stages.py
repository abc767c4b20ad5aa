"""Stages: methods one after another in a run; and local steps by schedule, rounds of several lengths.

Of stages: each round is that of its method alone, from the parameters that the stage before it left, on any
number of devices, and a run that was stopped in any of them goes on to the same bits.
"""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, get_config
from rounds import assert_same_bits, copied, run_all, set_up, train_and_look, whole
from test_distributed import finish, free_port

from ist_jax import cli, compare, data, evaluate, main, plan, train
from ist_jax.config import check, restore
from ist_jax.costs.link import Link
from ist_jax.data import batches
from ist_jax.exchange.kinds import from_params, to_params
from ist_jax.methods import METHODS
from ist_jax.report import page
from ist_jax.runtime import devices, programs, setup
from ist_jax.runtime.schedule import MOST, Progress, quadratic
from ist_jax.workdir import checkpoint, files

ROUND = 2 * 2 * 8 / 1437  # passes over the digits of the workers of a smoke config in a round
MLP = f"--config={ROOT}/configs/mlp.py"
FOUR = ("data_parallel", "ist", "local_sgd", "ist")
STAGED = [name for name, entry in METHODS.items() if not entry.members]
SWEPT = {  # methods, a round each, and what else is set
    "four": (FOUR, {}),
    "carry": (("local_sgd", "data_parallel", "ist"), {"optimizer_state": "carry"}),
    "keep": (("data_parallel", "local_sgd", "ist"), {"optimizer_state": "keep"}),
    "few bits": (FOUR, {"exchange.gather_bits": 8, "exchange.merge_bits": 8}),
    "largest": (("ist", "local_sgd", "ist"), {"exchange.keep": 0.25, "exchange.error_feedback": True}),
    "power": (("power_sgd", "ist", "power_sgd", "local_sgd", "power_sgd", "data_parallel", "power_sgd"), {}),
    "deal": (("ist", "data_parallel"), {"partition.deal": "rolling", "participation": 0.7, "num_devices": 1}),
    "resnet": (FOUR, {"optimizer_state": "reset"}),
}


def stages(*methods, rounds=1, each=ROUND):
    return tuple((method, rounds * each) for method in methods)


def staged(methods, rounds=1, **overrides):
    """What a smoke config sets for so many rounds of each method."""
    per_round = ROUND * overrides.get("num_workers", 2) / 2
    return {"rounds": None, "stages": stages(*methods, rounds=rounds, each=per_round)} | overrides


def test_every_change_of_method_is_swept():
    swept = {pair for methods, _ in SWEPT.values() for pair in itertools.pairwise(methods)}
    assert swept >= set(itertools.permutations(STAGED, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEPT)
def test_a_stage_is_its_method_from_where_the_one_before_it_ended(name):
    (methods, overrides), config = SWEPT[name], "resnet" if name == "resnet" else "mlp"
    if name == "resnet":
        overrides = overrides | {"partition.scale_at_evaluation": False}  # else the others train other losses
    run = set_up(config, **staged(methods, **overrides))
    assert [(stage.name, stage.first, stage.until) for stage in run.stages] == [
        (method, index, index + 1) for index, method in enumerate(methods)
    ]
    plain = {m: set_up(config, method=m, rounds=len(methods), **_possible(m, overrides)) for m in methods}
    for number in range(1, len(methods)):
        before, own = copied(run_all(run, number), run), plain[methods[number]]
        layout, stage = run.stages[number - 1].layout, run.stages[number]
        params = jax.tree.map(np.copy, to_params(layout, jax.tree.map(np.asarray, before.params)))
        shards = devices.put(from_params(own.layout, params), own.devices)
        fresh = programs.init_state(own.stages[0].method, shards, own.devices)
        assert_same_bits(stage.enter.program(before), fresh)
        found, entry = train.train_round(run, copied(before, run), number)
        wanted, alone = train.train_round(own, fresh, number)
        assert_same_bits(found, wanted)
        same = ("train_loss", "bytes_per_worker", "lr", "partition")
        assert [entry[key] for key in same] == [alone[key] for key in same]
        gathers = methods[number - 1] == "ist" and run.layout.num_devices > 1
        assert (entry["wire_bytes_per_device"] > alone["wire_bytes_per_device"]) == gathers
        scores = [train.score(run, found, "test", stage), train.score(own, wanted)]
        assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6)


def _possible(method, overrides):
    """What the method can have."""
    return {key: x for key, x in overrides.items() if METHODS[method].exchanges or "exchange." not in key}


@pytest.mark.slow
def test_what_both_methods_keep_goes_on():
    methods = ("local_sgd", "ist", "local_sgd")
    own = {"optimizer_state": "carry", "outer.name": "adam", "num_workers": 4, "num_devices": 2}
    run = set_up("mlp", **staged(methods, **own))
    for number in (1, 2):
        before, stage = copied(run_all(run, number), run), run.stages[number]
        after = stage.enter.program(before)
        for field in ("params", "travels", "stays"):
            old, new = (
                whole(run._replace(stages=(s,)), getattr(state, field))
                for s, state in ((run.stages[number - 1], before), (stage, after))
            )
            assert jax.tree.leaves(old)
            assert_same_bits(old, new)
        assert max(np.abs(x).max() for x in jax.tree.leaves(new)) > 0


@pytest.mark.slow
def test_equal_stages_are_one_run_of_the_method_and_one_set_of_programs():
    run, plain = set_up("mlp", **staged(("ist", "ist", "ist"))), set_up("mlp")
    assert len({id(stage.programs["local"]) for stage in run.stages}) == 1
    assert [stage.enter for stage in run.stages] == [None] * 3
    assert_same_bits(run_all(run, 3), run_all(plain, 3))


# --- whole runs -----------------------------------------------------------------------------------


def assert_alike(records, others):
    """All but times, and what depends on the devices; sums over them in another order are nearly the same."""
    for one, other in zip(records, others, strict=True):
        for key in (one.keys() | other.keys()) - {"wire_bytes_per_device"}:
            if "second" not in key:
                close = pytest.approx(other[key], rel=1e-5) if isinstance(one[key], float) else other[key]
                assert one[key] == close, key


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, summary) of a run of two rounds of each of three stages, on a device per worker."""
    folder = tmp_path_factory.mktemp("finished")
    config = get_config("mlp", **staged(FOUR[:3], 2, num_workers=4), eval_every=1)
    config.checkpoint.keep = 10
    return folder, train.train(config, folder)


def stop_after(finished, number, folder):
    """What the run's folder held after a round."""
    shutil.copytree(finished, folder)
    for name in ("summary.json", "ledger.json"):
        (folder / name).unlink()
    files.write_records(folder, files.read_records(folder)[:number])
    for later in checkpoint.rounds(folder):
        if later > number:
            shutil.rmtree(folder / checkpoint.FOLDER / str(later))


@pytest.mark.parametrize(
    "number",
    [
        *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)),
        3,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 5)),
    ],
)
def test_a_run_that_stopped_in_any_stage_goes_on_to_the_same_bits_on_other_devices(
    finished, number, tmp_path
):
    first, summary = finished
    stop_after(first, number, tmp_path / "run")
    config = get_config("mlp", **staged(FOUR[:3], 2, num_workers=4), eval_every=1)
    config.num_devices = (4, 1, 2, 1, 2)[number - 1]  # sums of data-parallel SGD depend on them
    config.checkpoint.keep = 10
    again = train.train(config, tmp_path / "run")
    assert again["params_sha256"] == summary["params_sha256"]
    assert_alike(*map(files.read_records, (first, tmp_path / "run")))
    for key in ("bytes_sent_per_worker", "bytes_local_sgd_per_worker", "parameters_per_worker", "units"):
        assert again[key] == summary[key]


@pytest.mark.slow
def test_fewer_workers_go_on_in_the_stage_that_the_examples_say(finished, tmp_path):
    stop_after(finished[0], 3, tmp_path / "run")  # 3 rounds of 64 examples, of 32 each from now on
    config = get_config("mlp", **staged(FOUR[:3], 2, num_workers=4) | {"num_workers": 2})
    train.train(config, tmp_path / "run")
    names = [record["stage"] for record in files.read_records(tmp_path / "run")]
    assert names == ["data_parallel"] * 2 + ["ist"] * 3 + ["local_sgd"] * 4


def test_the_plan_and_the_files_of_a_run_tell_each_stage(finished):
    folder, summary = finished
    records, stages_of = files.read_records(folder), ["data_parallel"] * 2 + ["ist"] * 2 + ["local_sgd"] * 2
    assert [record["stage"] for record in records] == stages_of
    assert summary["method"] == "data_parallel, then ist, then local_sgd"
    assert summary["units"].keys() == {"hidden1", "hidden2"}
    config = get_config("mlp", **staged(FOUR[:3], 2, num_workers=4))
    planned = plan.plan(config, data.facts("digits"), links=[Link(1e9)], flops=1e9)["run"]
    for number, name in enumerate(dict.fromkeys(stages_of)):
        total, rounds = plan.Total(**planned[f"{number + 1} {name}"]), records[2 * number : 2 * number + 2]
        assert total.exchanged_bytes_per_worker == sum(r["bytes_per_worker"] for r in rounds)
        assert total.wire_bytes_per_worker == sum(r["bytes_sent"] for r in rounds)
        assert rounds[0]["bytes_per_worker"] == rounds[1]["bytes_per_worker"]
        assert (rounds[0]["bytes_sent"] > rounds[1]["bytes_sent"]) == (name == "local_sgd")
    whole_run = plan.Total(**planned["stages"])
    assert whole_run.exchanged_bytes_per_worker == summary["bytes_exchanged_per_worker"]
    assert whole_run.wire_bytes_per_worker == summary["bytes_sent_per_worker"]
    ledger = files.read_json(folder / "ledger.json")
    rounds = {row["stage"]: row for row in ledger["rows"] if row["cause"] == "round"}
    assert [*rounds] == [*dict.fromkeys(stages_of)]
    for number, row in enumerate(rounds.values()):
        assert row["paper"] == records[2 * number]["bytes_per_worker"]
        assert row["expected"] == row["hlo"] == records[2 * number + 1]["wire_bytes_per_device"]
    page.write_report([folder], folder / "page.html")
    text = (folder / "page.html").read_text()
    for name in rounds:
        assert f"<summary>data_parallel, then ist, then local_sgd: {name}</summary>" in text


@pytest.mark.slow
def test_an_evaluation_and_the_parameters_are_those_of_the_last_stage(finished, capsys):
    folder, summary = finished
    assert evaluate.main(["evaluate", f"--workdir={folder}"]) == 0
    assert f"test accuracy {summary['test_accuracy']:.2%}" in capsys.readouterr().out
    images = data.open_data_set("digits", "").test.image
    assert checkpoint.load_model(folder)(images).shape == (360, 10)


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    methods = ("local_sgd", "ist", "local_sgd")  # data-parallel SGD adds up in another order
    settings = staged(methods, num_workers=4) | {"num_devices": 4, "eval_every": 1}
    lines = [
        "import importlib.util",
        f"spec = importlib.util.spec_from_file_location('mlp', {str(ROOT / 'configs' / 'mlp.py')!r})",
        "mlp = importlib.util.module_from_spec(spec)",
        "spec.loader.exec_module(mlp)",
        "def get_config():",
        "    config = mlp.get_config('smoke')",
        f"    config.update_from_flattened_dict({settings!r})",
        "    return config",
    ]
    (tmp_path / "config.py").write_text("\n".join(lines))
    meeting = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "ist_jax.main", f"--config={tmp_path / 'config.py'}", *meeting]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    results = finish([subprocess.Popen([*command, f"--process_id={n}"], **pipes) for n in range(2)])
    assert [code for code, _ in results] == [0, 0], results
    alone = train.train(get_config("mlp", **settings), tmp_path / "alone")
    assert files.read_summary(tmp_path / "run")["params_sha256"] == alone["params_sha256"]
    rows = files.read_json(tmp_path / "run" / "ledger.json")["rows"]
    assert [row["wire"] > 0 for row in rows if row["cause"] == "round"] == [True] * 2


@pytest.mark.slow
def test_stages_and_lengths_are_variants_of_a_comparison(tmp_path):
    texts = [
        f"post:stages=(('local_sgd',{ROUND}),('ist',{2 * ROUND}))",
        "grow:local_steps_schedule=qsr,local_steps_alpha=0.2",
        "plain",
    ]
    config = get_config("mlp", rounds=None, epochs=3 * ROUND, **{"optimizer.learning_rate": 0.05})
    result = compare.compare(config, tmp_path, variants=compare.of_texts(config, texts), seeds=1)
    assert result["variants"].keys() == {"post", "grow", "plain"}
    summaries = [files.read_summary(tmp_path / f"{name}-0") for name in ("post", "grow", "plain")]
    assert [s["method"] for s in summaries] == ["local_sgd, then ist", "ist", "ist"]
    assert [s["rounds"] for s in summaries] == [3, 2, 3]
    assert len({s["examples"] for s in summaries}) == 1


def test_a_method_of_a_comparison_is_as_long_as_the_stages():
    config = get_config("mlp", **staged(("local_sgd", "ist"), 2))
    alone = setup.for_method(config, "data_parallel")
    assert setup.make_schedule(alone, 1437).rounds == setup.make_schedule(config, 1437).rounds == 4


@pytest.mark.slow
def test_an_ensemble_may_be_the_only_method():
    run, plain = set_up("mlp", **staged(("ensemble", "ensemble"))), set_up("mlp", method="ensemble")
    assert_same_bits(run_all(run, 2), run_all(plain, 2))


# --- local steps by schedule ----------------------------------------------------------------------


def quadratic_config(**overrides):
    own = {"rounds": None, "epochs": 200 * ROUND, "local_steps_schedule": "qsr", "local_steps_alpha": 0.051}
    return get_config("mlp", **own | {"optimizer.schedule": "cosine", "optimizer.warmup": 0.1} | overrides)


def test_rounds_are_as_long_as_the_learning_rate_says():
    for rate, wanted in (
        (1.0, 1),
        (0.1, 1),
        (0.05, 2),
        (0.049, 2),
        (0.036, 2),
        (0.035, 4),
        (1e-9, MOST),
        (0.0, MOST),
    ):
        # (0.1 / rate)^2 steps, of which 2 are a base round: 4 at 0.05, 7.7 at 0.036, 8.2 at 0.035
        assert quadratic(0.1, rate, 2, 1000) == wanted
    assert quadratic(0.1, 1e-9, 2, 9) == 8  # no longer than the run
    config = quadratic_config()
    schedule = setup.make_schedule(config, 1437)
    constant = setup.make_schedule(quadratic_config(local_steps_schedule="constant"), 1437)
    assert np.array_equal(schedule.learning_rates, constant.learning_rates)
    sizes = np.diff(schedule.starts)
    assert schedule.starts[0] == 0 and schedule.starts[-1] == constant.rounds == 200
    assert {*sizes.tolist()} == {1, 2, 4, 8, 16, 32}
    assert schedule.steps_before(schedule.rounds) == 400
    for index, size in enumerate(sizes.tolist()):
        start = max(schedule.starts[index], 20)  # in the warm-up, a tenth: as if it were over
        exact = (0.051 / schedule.learning_rates[start, 0]) ** 2  # steps
        left = 200 - schedule.starts[index]
        assert size == min(MOST, 2 ** int(np.log2(max(1, exact / 2))), 2 ** int(np.log2(left)))
        assert schedule.rates(index).shape == (2 * size,)
        assert schedule.examples_in(index) == 32 * size
        assert schedule.examples_after(index) == 32 * schedule.starts[index + 1]
    lengths = [(s.local_steps, s.until) for s in schedule.segments]
    assert [until for _, until in lengths] == sorted({until for _, until in lengths})
    assert all(a != b for (a, _), (b, _) in itertools.pairwise(lengths))
    done = Progress(30, int(32 * schedule.starts[30]), int(schedule.starts[30]))
    later = setup.make_schedule(config, 1437, done)
    assert np.array_equal(later.starts[30:], schedule.starts[30:])
    assert np.array_equal(
        later.learning_rates[later.starts[30] :], schedule.learning_rates[later.starts[30] :]
    )


def test_only_stages_with_an_exchange_have_longer_rounds():
    own = stages("data_parallel", "ist", rounds=20)
    schedule = setup.make_schedule(quadratic_config(stages=own, **{"optimizer.learning_rate": 0.02}), 1437)
    assert {s.local_steps for s in schedule.segments if s.part == 0} == {2}
    assert [s.until for s in schedule.segments if s.part == 0] == [20]
    assert max(s.local_steps for s in schedule.segments if s.part == 1) > 2
    assert schedule.steps_before(schedule.rounds) == 80


def test_longer_rounds_see_the_examples_of_a_constant_length(tmp_path):
    own = {"epochs": 5 * ROUND, "optimizer.schedule": "constant", "optimizer.warmup": 0.0}
    config = quadratic_config(**own, local_steps_alpha=0.15, eval_every=1)  # (0.15 / 0.05)^2 = 9: 8 steps
    summary, run, _ = train_and_look(config, tmp_path / "run")
    records = files.read_records(tmp_path / "run")
    assert [(r["local_steps"], r["examples"]) for r in records] == [(8, 4 * 32), (2, 5 * 32)]
    found = np.concatenate([run.feed(index).indices for index in range(2)], axis=2)[:, 0]
    drawn = [batches.train_indices(0, index, run.feed.shards, 2, 8) for index in range(5)]
    assert np.array_equal(found, np.concatenate(drawn, axis=1))
    about = checkpoint.open_round(tmp_path / "run", 1).about
    assert (about["steps"], about["stage"], about["examples"]) == (8, 0, 128)
    shutil.rmtree(tmp_path / "run" / checkpoint.FOLDER / "2")
    files.write_records(tmp_path / "run", records[:1])
    (tmp_path / "run" / "summary.json").unlink()
    assert train.train(config, tmp_path / "run")["params_sha256"] == summary["params_sha256"]


# --- settings -------------------------------------------------------------------------------------


def test_stages_are_a_flag():
    config = get_config("mlp", "digits")
    found = cli.parse_value(config, "stages", "(('data_parallel',1.0),('ist',3))")
    assert found == (("data_parallel", 1.0), ("ist", 3))
    config.stages = found
    check(config)
    recorded = json.loads(json.dumps(setup.record(config)))
    check(restore(recorded))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["stages=('ist',1.0)"], "stages=('ist', 1.0); set config.stages to a tuple of pairs"),
        (["stages=(('ist',),)"], "('ist',) is no method with its passes over the training set, above 0"),
        (["stages=(('ist',0),)"], "('ist', 0) is no method with its passes"),
        (["stages=(('ist','x'),)"], "('ist', 'x') is no method with its passes"),
        (["stages=(('sgd',1.0),)"], "there is no method 'sgd'; set config.stages to one of 'ist'"),
        (["stages=(('no.py:x',1.0),)"], "cannot read no.py of 'no.py:x'"),
        (["stages=(('ist',1.0),)", "rounds=3"], "rounds=3 beside stages"),
        (
            ["stages=(('ist',1.0),)", "partition.warmup_epochs=2.0"],
            "partition.warmup_epochs=2.0 beside stages",
        ),
        (["stages=(('ist',1.0),('ensemble',1.0))"], "the nets of 'ensemble' are never merged"),
        (
            ["stages=(('data_parallel',1.0),)", "outer.name=sgd"],
            "outer.name='sgd' is for what a merge brings",
        ),
        (
            ["stages=(('data_parallel',1.0),)", "exchange.merge_bits=8"],
            "exchange.merge_bits=8: for exchanges",
        ),
        (
            ["local_steps_schedule=qsr"],
            "local_steps_schedule='qsr' needs an alpha; set config.local_steps_alpha",
        ),
        (
            ["local_steps_schedule=qsr", "local_steps_alpha=0"],
            "local_steps_alpha=0.0; set config.local_steps_alpha to a number above 0",
        ),
        (
            ["local_steps_schedule=qsr", "local_steps_alpha=0.1", "rounds=3"],
            "rounds=3 beside local_steps_schedule='qsr'",
        ),
        (
            ["local_steps_schedule=qsr", "local_steps_alpha=0.1", "method=data_parallel"],
            "local_steps_schedule='qsr' is for exchanges of parameters, and method='data_parallel' has none",
        ),
        (
            ["local_steps_schedule=cubic"],
            "local_steps_schedule='cubic'; set config.local_steps_schedule to one of",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(flags, message, tmp_path, capsys):
    command = ["main", MLP, f"--workdir={tmp_path / 'run'}", *(f"--config.{flag}" for flag in flags)]
    with pytest.raises(SystemExit) as stop:
        main.main(command)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not Path(tmp_path / "run").exists()
