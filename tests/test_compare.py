"""Comparisons of variants, and what looks on while a run goes round by round."""

import errno
import json
import logging
import os
import struct
from collections import namedtuple

import jax
import pytest
from conftest import ROOT, get_config
from tensorboardX.proto.event_pb2 import Event

from ist_jax import compare, data, main, train
from ist_jax.costs.link import LINKS, modelled
from ist_jax.runtime import observers
from ist_jax.workdir import files

Run, Length = namedtuple("Run", "schedule"), namedtuple("Length", "first rounds")
MLP = f"--config={ROOT}/configs/mlp.py:smoke"
METHODS = compare.of_methods(["ist", "local_sgd"])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compared")
    return workdir, compare.compare(get_config("mlp"), workdir, variants=METHODS, seeds=1)


def test_a_comparison_leaves_a_folder_for_each_run_and_its_figures(compared):
    workdir, result = compared
    assert json.loads((workdir / "compare.json").read_text()) == result
    assert "<html" in (workdir / "report.html").read_text()
    assert result.keys() == {"metric", "variants", "start"}
    for method in ("ist", "local_sgd"):
        figures = result["variants"][method]
        costs = {"seconds", "bytes", "bytes_local_sgd", "bytes_sent"}
        assert figures.keys() == {"overrides", "accuracy", *costs, "modelled", "runs"}
        assert figures["overrides"] == {"method": method}
        assert figures["runs"] == [f"{method}-0"]
        summary = json.loads((workdir / f"{method}-0" / "summary.json").read_text())
        assert summary["method"] == method
        for name, key in (("accuracy", "test_accuracy"), ("seconds", "seconds_total")):
            assert figures[name] == dict.fromkeys(("mean", "min", "max"), summary[key])
        assert figures["bytes"]["mean"] == summary["bytes_exchanged_per_worker"]
        records = files.read_records(workdir / f"{method}-0")
        assert figures["bytes_sent"]["mean"] == sum(record["bytes_sent"] for record in records)
        keys = ("seconds_local", "bytes_sent", "messages_sent")
        totals = [sum(record[key] for record in records) for key in keys]
        assert all(totals)
        wanted = [link._asdict() | modelled(*totals, link)._asdict() for link in LINKS]
        assert figures["modelled"] == [pytest.approx(own) for own in wanted]


def test_finished_runs_are_not_repeated_and_seeds_give_a_spread(compared, capsys):
    workdir, first = compared
    before = (workdir / "ist-0" / "summary.json").stat().st_mtime_ns
    assert compare.main(["compare", MLP, "--methods=ist", "--seeds=2", f"--workdir={workdir}"]) == 0
    assert (workdir / "ist-0" / "summary.json").stat().st_mtime_ns == before
    result = json.loads((workdir / "compare.json").read_text())
    runs = [json.loads((workdir / f"ist-{seed}" / "summary.json").read_text()) for seed in (0, 1)]
    low, high = sorted(run["test_accuracy"] for run in runs)
    assert low < high
    assert result["variants"]["ist"]["accuracy"] == {"mean": (low + high) / 2, "min": low, "max": high}
    assert result["start"]["0"] == first["start"]["0"]
    assert len({start["params_sha256"] for start in result["start"].values()}) == 2
    assert len({start["examples_sha256"] for start in result["start"].values()}) == 2
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert f"({100 * low:.2f} to {100 * high:.2f})" in next(line for line in lines if line.startswith("ist "))
    assert lines[-1] == f"report: {workdir}/report.html"


def test_the_table_has_one_headline_and_no_share_of_local_sgd_in_itself(compared):
    _, result = compared
    lines = compare.table(result).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[2 : lines.index("")]}
    # accuracy, seconds, MB exchanged, share, MB sent; one seed has no spread
    assert [len(rows[method]) for method in ("ist", "local_sgd")] == [5, 4]
    whole = 3 * 2 * 4 * (64 * 32 + 32 * 32 + 32 * 10 + 4 * 32)  # 3 rounds, both ways
    part = 3 * 2 * 4 * (64 * 16 + 16 * 16 + 16 * 10 + 4 * 16)
    assert rows["ist"][2:4] == [f"{part / 1e6:.3g}", f"{part / whole:.1%}"]
    assert rows["local_sgd"][2] == f"{whole / 1e6:.3g}"
    old = dict(result["variants"]["ist"], bytes_sent=None, modelled=None)
    assert [line[-2:] for line in compare.table({"variants": {"ist": old}}).splitlines()[2:7:4]] == [
        " -",
        " -",
    ]


def test_variants_by_flag_and_by_file_make_one_table_and_one_page(tmp_path, capsys):
    (tmp_path / "mine.py").write_text('VARIANTS = {"outer": {"outer.name": "nesterov"}}')
    flags = [
        MLP,
        "--seeds=1",
        "--methods=ist",
        f"--variants={tmp_path}/mine.py",
        f"--workdir={tmp_path}/runs",
    ]
    often = "--variant=often:local_steps=1,rounds=6,model.hidden=(32,32)"  # 3 x 2 steps otherwise
    assert compare.main(["compare", *flags, often]) == 0
    names = ["ist", "outer", "often"]
    result = json.loads((tmp_path / "runs" / "compare.json").read_text())
    assert list(result["variants"]) == names
    assert [own["runs"] for own in result["variants"].values()] == [[f"{name}-0"] for name in names]
    assert result["variants"]["often"]["overrides"] == {
        "local_steps": 1,
        "rounds": 6,
        "model.hidden": [32, 32],
    }
    starts = {(tmp_path / "runs" / f"{name}-0" / "start.json").read_text() for name in names}
    assert len(starts) == 1
    assert (
        json.loads((tmp_path / "runs" / "outer-0" / "config.json").read_text())["outer"]["name"] == "nesterov"
    )
    assert len({own["accuracy"]["mean"] for own in result["variants"].values()}) > 1
    lines = capsys.readouterr().out.splitlines()
    for head in (2, lines.index("") + 3):  # what was measured, and what is modelled
        assert [line.split()[0] for line in lines[head : head + 3]] == names
    assert max(map(len, lines)) <= 100
    page = (tmp_path / "runs" / "report.html").read_text()
    assert f"<title>ist_jax: {', '.join(names)} on digits</title>" in page


def test_variants_of_unlike_steps_are_refused_before_any_trains(tmp_path):
    variants = {"ist": {}, "once": {"local_steps": 1}}
    with pytest.raises(ValueError, match=r"the same number of steps .*: ist 3 x 2, once 3 x 1\)"):
        compare.compare(get_config("mlp"), tmp_path, variants=variants, seeds=1)
    assert not files.read_records(tmp_path / "ist-0")


@pytest.mark.slow
def test_a_variant_of_other_parameters_is_refused_before_it_trains(tmp_path):
    variants = {"ist": {}, "wide": {"model.hidden": (64, 32)}}
    with pytest.raises(ValueError, match="wide-0 did not begin as ist-0 did"):
        compare.compare(get_config("mlp"), tmp_path, variants=variants, seeds=1)
    assert not files.read_records(tmp_path / "wide-0")


def test_what_is_given_in_a_variant_can_be_of_every_kind():
    config = get_config("mlp")
    (found,) = compare.of_texts(
        config, ["x:partition.shares=(1,3),optimizer.nesterov=true,optimizer.name=adam,rounds=7"]
    ).values()
    assert found == {
        "partition.shares": (1, 3),
        "optimizer.nesterov": True,
        "optimizer.name": "adam",
        "rounds": 7,
    }
    assert compare.of_texts(config, ["plain", "also:"]) == {"plain": {}, "also": {}}


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (
            ["x:local_step=2"],
            "variant x: unknown key config.local_step; did you mean 'local_steps'? keys there",
        ),
        (["x:optimizer.rate=2"], "variant x: unknown key config.optimizer.rate; "),
        (["x:local_steps=many"], "variant x: flag --config.local_steps=many: a whole number is needed"),
        (["x:local_steps=0"], "variant x: local_steps=0; set config.local_steps to 1 or more"),
        (["x:model=3"], "variant x: "),
        (["x:method=sgd"], "variant x: method=sgd: 'sgd' is not there"),
        (["x:local_steps"], "--variant x:local_steps: 'local_steps' is no key=value; give NAME:"),
        (["x:seed=1,seed=2"], "--variant x:seed=1,seed=2: seed is given twice"),
        (["x", "x:method=local_sgd"], "--variant x is given twice; give one of them another name"),
        (
            ["x:seed=1"],
            "variant x: with another seed a run sees other examples, which is no comparison;",
        ),
        (["x:data.flip=True"], "variant x: with another data.flip a run sees other examples"),
        (["x:epochs=2"], "for all of them, --config.epochs=2"),
        (["x", "y:method=ist"], "variant y: it has the settings of variant x; leave one of them out"),
        (["x/y"], "variant 'x/y': a name has letters"),
        ([""], "variant '': a name has letters"),
    ],
)
def test_a_mistake_in_a_variant_is_one_line_and_exit_2(variants, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        compare.main(["compare", MLP, f"--workdir={tmp_path}", *(f"--variant={text}" for text in variants)])
    assert stop.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read "),
        ("VARIANT = {}", "has no name 'VARIANTS'; did you mean 'VARIANT'?"),
        ("VARIANTS = {}", "there is no variant to compare; VARIANTS is empty"),
        ("VARIANTS = [1]", "must be a dict of dicts, such as"),
        ("VARIANTS = {'x': 1}", "must be a dict of dicts, such as"),
        ("VARIANTS = {1: {}}", "must be a dict of dicts, such as"),
        ("VARIANTS = {'x': {'local_steps': 'many'}}", "variant x: Could not override field 'local_steps'"),
        ("VARIANTS = {'plain': {}}", "variant plain is given twice; give one of them another name"),
        ("1 / 0", "mine.py fails: division by zero"),
    ],
)
def test_a_mistake_in_a_file_of_variants_is_one_line_and_exit_2(text, message, capsys, tmp_path):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    flags = ["--variant=plain"] if "plain" in (text or "") else []
    with pytest.raises(SystemExit) as stop:
        compare.main(["compare", MLP, f"--workdir={tmp_path}/runs", f"--variants={tmp_path}/mine.py", *flags])
    assert stop.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line


def test_one_line_of_progress_over_all_runs_with_the_time_left(compared, capsys, monkeypatch, tmp_path):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(observers.time, "monotonic", lambda: next(clock))
    with observers.show_runs(2) as show:
        place = compare.Place(show, 2)
        place.enter("ist, seed 0")  # after 10 s
        place.start(Run(Length(first=2, rounds=4)))
        place.go_on({"round": 3})  # a quarter of a run in 20 s; 1 1/4 are left
        place.go_on({"round": 4})
        place.leave()
        place.enter("local_sgd, seed 0")
        place.leave()
    assert capsys.readouterr().err.splitlines() == [
        "run 1 of 2: ist, seed 0",
        "run 1 of 2: ist, seed 0, round 3 of 4, about 100 s left",
        "run 1 of 2: ist, seed 0, round 4 of 4, about 60 s left",
    ]
    with observers.show_runs(400) as show:
        for done in range(1, 401):
            show(done, 0, "text")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20
    assert lines[0].endswith("min left")


def test_a_folder_with_anything_else_is_no_comparisons(compared, capsys, tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "ist-0").mkdir()  # of a comparison that was killed early
    with pytest.raises(SystemExit) as stop:
        compare.main(["compare", MLP, "--methods=ist", f"--workdir={tmp_path}"])
    assert stop.value.code == 2
    assert f"error: {tmp_path} holds notes.txt, but no comparison" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"config.json, .* but no comparison"):
        compare.compare(
            get_config("mlp"), compared[0] / "ist-0", variants=compare.of_methods(["ist"]), seeds=1
        )
    with pytest.raises(ValueError, match=r"holds compare.json, ist-0, .* but no run"):
        train.train(get_config("mlp"), compared[0])


@pytest.mark.parametrize("key", ["params_sha256", "examples_sha256"])
def test_runs_that_did_not_begin_alike_are_no_comparison(compared, key):
    workdir, _ = compared
    path = workdir / "local_sgd-0" / "start.json"
    before = path.read_text()
    try:
        files.write_json(path, json.loads(before) | {key: "another"})
        with pytest.raises(ValueError, match="local_sgd-0 did not begin as ist-0 did"):
            compare.compare(get_config("mlp"), workdir, variants=METHODS, seeds=1)
        path.unlink()
        with pytest.raises(ValueError, match="local_sgd-0 is of a run by itself"):
            compare.compare(get_config("mlp"), workdir, variants=METHODS, seeds=1)
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config is missing"),
        ([MLP, "--seed=3"], "seed"),
        ([MLP, "stray"], "unexpected argument 'stray'"),
        ([MLP, "--methods=ist,sgd"], "--methods=ist,sgd; give some of ist, local_sgd, data_parallel"),
        ([MLP, "--methods="], "--methods=; give some of"),
        ([MLP, "--seeds=0"], "seeds"),
        ([MLP, "--config.num_workers=64"], "leaves a worker without a neuron"),
        ([MLP, "--workdir=/proc/nowhere"], "cannot write to --workdir=/proc/nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        compare.main(["compare", *flags])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("full", ["write_json", "report"])
def test_a_result_that_cannot_be_written_is_one_line_and_no_mistake_in_the_command(
    compared, full, capsys, monkeypatch, tmp_path
):
    def no_space(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    if full == "report":
        monkeypatch.setattr("pathlib.Path.write_text", lambda path, *_, **__: no_space(path))
        monkeypatch.setattr(files, "write_json", lambda *_: None)
    else:
        monkeypatch.setattr(files, "write_json", no_space)
    flags = ["--methods=ist", "--seeds=1", f"--workdir={compared[0]}"]
    assert compare.main(["compare", MLP, *flags]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "No space left on device" in line


def test_data_that_cannot_be_read_are_the_users_mistake(capsys, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "data/train.txt")

    monkeypatch.setattr(data, "open_data_set", refuse)
    with pytest.raises(SystemExit) as stop:
        compare.main(["compare", MLP, "--methods=ist", "--seeds=1", f"--workdir={tmp_path}"])
    assert stop.value.code == 2
    assert "Permission denied: 'data/train.txt'" in capsys.readouterr().err


def read_events(folder):
    """(step, name, value) of all scalars; a record is its length, a checksum, the event and a checksum."""
    (path,) = folder.glob("events.out.tfevents.*")
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)
        at += 16 + length


def test_event_files_hold_the_scalars_of_the_metrics_and_a_trace_is_left(tmp_path):
    flags = ["--tensorboard", "--profile=1", f"--workdir={tmp_path}"]
    assert main.main(["main", MLP, *flags]) == 0
    events = {(step, name): value for step, name, value in read_events(tmp_path / "tensorboard")}
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    wanted = {
        (record["round"], name): value
        for record in records
        for name, value in record.items()
        if isinstance(value, int | float)
    }
    assert (3, "test_accuracy") in wanted
    assert events == pytest.approx(wanted, rel=1e-6)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_the_profiler_sees_the_rounds_after_the_first(tmp_path, monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with observers.open_observers(tmp_path, tensorboard=False, profile=2) as (observe,):
        for number, expected in ((5, 1), (6, 1), (7, 2), (8, 2)):
            observe({"round": number})
            assert len(calls) == expected
    assert calls == [tmp_path / "profile", "stop"]
    with (
        caplog.at_level(logging.WARNING),
        observers.open_observers(tmp_path, tensorboard=False, profile=2) as (observe,),
    ):
        observe({"round": 1})
        observe({"round": 2})
    assert calls[2:] == [tmp_path / "profile", "stop"]
    assert "profile: 1 rounds after the first were traced, not 2" in caplog.text
    with observers.open_observers(tmp_path, tensorboard=False, profile=0) as none:
        assert none == []
