"""The report: its numbers are those of the run's files, and a browser draws them."""

import csv
import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from bokeh.document import Document
from bokeh.models import Legend, Segment
from conftest import get_config

from ist_jax import data, partition, plan, train
from ist_jax.costs.link import LINKS, Link, modelled, modelled_seconds
from ist_jax.deals import DEALS
from ist_jax.report import figures
from ist_jax.report.__main__ import main as report_main
from ist_jax.report.page import DRAWN, render, write_report
from ist_jax.report.runs import RunFiles, draw_maps, group_by_config, read_run
from ist_jax.runtime import setup as experiment

ROUNDS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of IST with two seeds and of local SGD, evaluated every second round; the first was trained.

    Its workers have all 8 units of the one group, and 20 of the 32 of the other.
    """
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("ist-0", "ist-1", "local_sgd-0")]
    dealt = {"model.hidden": (8, 32), "partition.min_units": 20}
    train.train(get_config("mlp", rounds=ROUNDS, **dealt), folders[0])
    write_like(folders[0], folders[1], {"seed": 1}, factor=1.5)
    write_like(folders[0], folders[2], {"method": "local_sgd", "units": {}}, factor=2.5)
    return folders


def write_like(folder, other, changes, *, factor):
    """The files of another run: with changes in config and summary, and other figures."""
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("params", "checkpoints"))
    for name in ("config", "summary"):
        content = json.loads((folder / f"{name}.json").read_text())
        content |= {key: value for key, value in changes.items() if key in content}
        (other / f"{name}.json").write_text(json.dumps(content))
    records = read_records(folder)
    for record in records:
        for key in ("seconds_local", "bytes_sent", "messages_sent", "bytes_per_worker", "test_accuracy"):
            if key in record:
                record[key] *= factor if key != "test_accuracy" else 1 / factor
    (other / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def page(runs):
    """The comparison of the runs."""
    out = runs[0].parent / "comparison.html"
    write_report(runs, out)
    return out


def synthetic(*, rounds, units, workers, **changes):
    """The files of a run that was never trained."""
    config = {"method": "ist", "seed": 0, "data.name": "digits", "participation": 1.0}
    config |= {"partition.min_units": 0, "partition.shares": []} | changes
    groups = make_groups(units, workers, config["partition.min_units"])
    same = {f"seconds_{p}": 0.01 for p in ("gather", "local", "merge", "evaluate", "round")}
    same |= {
        "test_accuracy": 0.5,
        "bytes_sent": 1e9,
        "messages_sent": 3,
        "bytes_per_worker": 2e9,
        "workers_absent": 0,
        "workers_left_out": 0,
    }
    same |= {"left_out": [], "partition": partition.fingerprint(tuple(groups.values()), "random")}
    summary = {
        "units": {name: group.to_dict() for name, group in groups.items()},
        "num_workers": workers, "num_devices": 1, "device_kind": "cpu", "custom_model": None,
        "rounds": rounds, "test_accuracy": 0.5, "examples": 64 * rounds, "parameters": 10,
        "parameters_per_worker": 5, "seconds_total": 1.0, "data": "digits", "seed": 0, "method": "ist",
        "versions": {"jax": "0"}, "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    records = [{"round": r, "examples": 64 * r, **same} for r in range(1, rounds + 1)]
    return RunFiles(Path("synthetic"), config, summary, records, None)


def make_groups(units, workers, min_units=0):
    return {
        name: partition.Group(name, u["size"], workers, u["strips"], min_units, layers=u.get("layers", 0))
        for name, u in sorted(units.items())
    }


def read_figures(page):
    """What a page draws: by figure, the columns of each glyph."""
    text = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    items = json.loads(text.group(1))
    documents = {name: Document.from_json(item["doc"]) for name, item in items.items()}
    return {
        name: [renderer.data_source.data for renderer in document.roots[0].renderers]
        for name, document in documents.items()
    }


def read_records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_modelled_time_of_two_rounds_by_hand():
    # 0.5 s and 0.25 s of local steps; 1 MB and 2 MB over 100 Mb/s take 0.08 s and 0.16 s; 3 and 1 messages
    local, sent, messages = np.array([0.5, 0.25]), np.array([1e6, 2e6]), np.array([3, 1])
    seconds = modelled_seconds(local, sent, messages, Link(1e8, 0.01))
    np.testing.assert_allclose(seconds, [0.61, 0.42], rtol=1e-15)


def test_the_curves_are_those_of_the_metrics_files(runs, page):
    drawn = read_figures(page.read_text())
    for index, folder in ((0, runs[0]), (1, runs[1]), (5, runs[2])):  # 2 to 4: the mean's band, line, markers
        records = read_records(folder)
        evaluated = [r for r in records if "test_accuracy" in r]
        assert len(evaluated) == 2
        accuracy = [100 * r["test_accuracy"] for r in evaluated]
        examples, exchanged, modelled = (drawn[name][index] for name in ("examples", "exchanged", "time"))
        np.testing.assert_array_equal(examples["x"], [r["examples"] for r in evaluated])
        for curve in (examples, exchanged, modelled):
            np.testing.assert_array_equal(curve["y"], accuracy)
            np.testing.assert_array_equal(curve["round"], [2, 4])
        local, sent, messages, total = (
            np.cumsum([r[key] for r in records])[[1, 3]]
            for key in ("seconds_local", "bytes_sent", "messages_sent", "bytes_per_worker")
        )
        assert messages.all()
        np.testing.assert_allclose(exchanged["x"], total / 1e6)  # MB, as the papers count
        np.testing.assert_allclose(modelled["x"], local + 1e-3 * messages + sent * 8 / 1e9)
    for index, (folder, seed) in enumerate(zip(runs[:2], (", seed 0", ", seed 1"), strict=True)):
        loss, records = drawn["loss"][index], read_records(folder)
        np.testing.assert_array_equal(loss["x"], [1, 2, 3, 4])
        np.testing.assert_allclose(loss["y"], [r["train_loss"] for r in records])
        assert set(loss["label"]) == {"ist" + seed}
    np.testing.assert_allclose(drawn["lr"][0]["y"], [r["lr"] for r in read_records(runs[0])])


def test_a_band_is_one_standard_error_of_an_accuracy_on_the_test_set(runs):
    trained = read_run(runs[0])
    examples = trained.summary["test_examples"]
    assert examples == 360  # a fifth of the 1,797 digits
    text = render([trained])
    band = read_figures(text)["exchanged"][0]
    p = np.array([r["test_accuracy"] for r in trained.records if "test_accuracy" in r])
    error = 100 * np.sqrt(p * (1 - p) / 360)
    np.testing.assert_allclose(band["upper"] - band["y"], error)
    np.testing.assert_allclose(band["y"] - band["lower"], error)
    assert f"{100 * p[-1]:.2f} ± {error[-1]:.2f}" in text
    once = trained._replace(
        records=[r | {"test_accuracy": None} for r in trained.records[:-1]] + trained.records[-1:]
    )
    glyphs = [renderer.glyph for renderer in read_models(render([once]))["exchanged"].renderers]
    assert isinstance(glyphs[0], Segment)  # a band of one point would not be seen
    earlier = trained._replace(summary={k: v for k, v in trained.summary.items() if k != "test_examples"})
    text = render([earlier])
    assert "lower" not in read_figures(text)["exchanged"][0]
    assert "one standard error" not in text


def test_bytes_and_time_to_a_target_and_their_ratios():
    """Local SGD has 60 % after its second round; the other 80 % after its third, with less bytes."""

    def trained(method, accuracies, exchanged):
        one = synthetic(rounds=len(accuracies), units={}, workers=1, method=method)
        for record, accuracy in zip(one.records, accuracies, strict=True):
            record |= {"test_accuracy": accuracy, "bytes_per_worker": exchanged, "bytes_sent": exchanged / 2}
            record |= {"seconds_round": 2.0, "seconds_local": 1.0}
        return one

    text = render([trained("ist", [0.2, 0.5, 0.8], 1e9), trained("local_sgd", [0.5, 0.6, 0.6], 4e9)])
    table = text[text.index("to reach") : text.index("At the first evaluation")]
    rows = re.findall(r"<tr><th.*?>(.*?)</th>(.*?)</tr>", table)
    cell = re.compile(r"<td.*?>([^<]+?) ?(?:<small>(.*?)&times;</small>)?</td>")
    assert [(name, cell.findall(cells)) for name, cells in rows] == [
        ("80 % test accuracy", []),
        ("exchanged, MB", [("3,000.0", ""), ("-", "")]),
        ("measured s", [("6.0", ""), ("-", "")]),
        ("modelled s", [("15.01", ""), ("-", "")]),  # 3 s, 3 x 0.5 GB at 1 Gb/s, 3 x 3 messages of 1 ms
        ("60 % test accuracy", []),
        ("exchanged, MB", [("3,000.0", "0.375"), ("8,000.0", "")]),
        ("measured s", [("6.0", "1.5"), ("4.0", "")]),
        ("modelled s", [("15.01", "0.441"), ("34.01", "")]),  # 2 s, 2 x 2 GB, 2 x 3 messages
    ]  # nine tenths of it, 54 %, was reached with 60 %


def test_both_counts_of_bytes_are_in_the_result_each_by_its_name(runs):
    trained = read_run(runs[0])
    text = render([trained])
    for name, key in (("exchanged, MB", "bytes_per_worker"), ("sent on the wire, MB", "bytes_sent")):
        total = sum(record[key] for record in trained.records) / 1e6
        assert f'<th>{name}</th><td class="number">{total:,.1f}</td>' in text


def test_a_colour_is_a_method_s_or_a_phase_s_or_a_worker_s():
    phases = [color for color, _ in [*figures.PHASES, *figures.phase_styles([]).values()]]
    for workers in (2, 8, 9, 300):
        kinds = [set(figures.METHODS), set(phases), set(figures.worker_colors(workers))]
        assert len(set.union(*kinds)) == sum(map(len, kinds))
    assert len(set(phases)) == len(phases) == 7


def read_models(page):
    """The figures of a page as Bokeh's models."""
    items = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.S).group(1))
    return {name: Document.from_json(item["doc"]).roots[0] for name, item in items.items()}


def test_every_chart_has_a_title_its_own_legend_and_ticks_at_whole_rounds_and_units(runs):
    units = {"block": {"size": 64, "strips": 1}, "hidden": {"size": 65, "strips": 1}}
    dealt = synthetic(rounds=3, units=units, workers=2)
    other = synthetic(rounds=3, units={}, workers=2, method="local_sgd")
    found = read_models(render([dealt, other]))
    assert list(found) == ["exchanged", "time", "examples", "loss", "lr", "phases", "history0", "history1",
                           "map0", "counts0", "coverage1"]  # fmt: skip
    for name, chart in found.items():
        assert chart.title.text
        shown = [legend for legend in [*chart.center, *chart.above] if isinstance(legend, Legend)]
        assert len(shown) == 1 and shown[0].visible, name
    for name in ("loss", "lr", "history0", "map0", "counts0", "coverage1"):
        assert found[name].below[0].ticker.min_interval == 1
    for name in ("map0", "counts0", "coverage1"):
        assert found[name].left[0].ticker.min_interval == 1
    assert not any(legend.visible for legend in read_models(render([other]))["loss"].legend)


def test_seeds_of_a_method_are_one_curve_and_its_runs(runs, page):
    series = group_by_config([read_run(folder) for folder in runs])
    assert [(s.label, len(s.runs)) for s in series] == [("ist", 2), ("local_sgd", 1)]
    drawn = read_figures(page.read_text())["time"]
    assert len(drawn) == 2 + 3 + 3  # two runs; band, line and markers of two means
    for column in ("x", "y", "seconds_local"):
        np.testing.assert_allclose(drawn[2][column], (drawn[0][column] + drawn[1][column]) / 2)


def test_seeds_that_stop_after_different_rounds_have_points_and_no_mean():
    def stopped(rounds, accuracy, seed, **changes):
        one = synthetic(rounds=rounds, units={}, workers=1, seed=seed, **changes)
        for record in one.records[:-1]:  # the others were evaluated on the validation split
            del record["test_accuracy"]
        one.records[-1]["test_accuracy"] = one.summary["test_accuracy"] = accuracy
        return one

    seeds = [stopped(rounds, accuracy, seed) for seed, (rounds, accuracy) in enumerate([(3, 0.5), (5, 0.7)])]
    page = render(seeds)
    drawn = read_figures(page)["exchanged"]
    assert [(d["x"].tolist(), d["y"].tolist(), d["round"].tolist()) for d in drawn[::2]] == [
        ([6000], [50], [3]), ([10000], [70], [5]),
    ]  # fmt: skip
    assert len(drawn) == 4  # of each seed a line, which one point does not make, and a marker
    assert '<th>test accuracy, %</th><td class="number">60.00</td>' in page
    assert '<th>each seed</th><td class="number">50.00, 70.00</td>' in page
    assert '<th>rounds</th><td class="number">4</td>' in page
    beside = [stopped(2, 0.4, 0, method="local_sgd"), stopped(2, 0.6, 1, method="local_sgd")]
    means = [
        d for d in read_figures(render(seeds + beside))["examples"] if d["y"] == [50] and d["x"] == [128]
    ]
    assert len(means) == 2  # the line and the marker of those that stopped together


def test_configs_that_differ_are_told_apart_by_what_differs(runs):
    first = read_run(runs[0])
    other = first._replace(config=first.config | {"local_steps": 7})
    own = first._replace(summary=first.summary | {"custom_model": "Own()"}, folder=runs[1])
    labels = [s.label for s in group_by_config([first, other])]
    assert labels == ["ist, local_steps=2", "ist, local_steps=7"]
    assert [s.label for s in group_by_config([first, own])] == ["ist (ist-0)", "ist (ist-1)"]


def test_the_phases_add_up_to_the_rounds(runs):
    drawn = read_figures(render([read_run(runs[0])]))
    records = read_records(runs[0])
    for phase in ("gather", "local", "merge", "evaluate"):
        expected = [1000 * r[f"seconds_{phase}"] for r in records]
        np.testing.assert_allclose(drawn["history0"][0][phase], expected)
        np.testing.assert_allclose(drawn["phases"][0][phase], np.mean(expected))
    total = sum(drawn["history0"][0][phase] for phase in ("gather", "local", "merge", "evaluate", "rest"))
    np.testing.assert_allclose(total, [1000 * r["seconds_round"] for r in records])


def test_phases_are_those_of_the_records_whatever_a_method_calls_them():
    """One method's rounds begin with other phases than the other's, and one has no local steps."""
    usual = synthetic(rounds=4, units={}, workers=1)
    other = synthetic(rounds=4, units={}, workers=1, method="FILE.py:other")
    for record in other.records:
        for phase in ("gather", "local", "merge"):
            del record[f"seconds_{phase}"]
        record |= {
            "seconds_label": 0.002,
            "seconds_x": 0.003,
            "seconds_evaluate": 0.001,
            "seconds_round": 0.01,
        }
    bars = read_figures(render([usual, other]))["phases"][0]
    names = ("gather", "local", "merge", "label", "x", "evaluate", "rest")
    assert [name for name in bars if name in names] == list(names)
    # the last series is the lowest bar, so the first in a column; ms
    np.testing.assert_allclose([bars[name][0] for name in names], [0, 0, 0, 2, 3, 1, 4], atol=1e-9)
    drawn = read_figures(render([other]))
    assert "gather" not in drawn["history0"][0]
    np.testing.assert_allclose(drawn["history0"][0]["x"], [3] * 4)
    each = 8 + 3 * 1e-3  # 1 GB a round at 1 Gb/s and 3 messages of 1 ms, no more
    np.testing.assert_allclose(drawn["time"][0]["x"], each * np.arange(1, 5))


def test_the_map_is_the_partition_that_was_trained(runs, page):
    trained = read_run(runs[0])
    maps = draw_maps(trained, columns=64, budget=10**6)
    assert [m.group.name for m in maps] == ["hidden1", "hidden2"]
    model = partition.make_groups(
        {"a": {"w": np.zeros((8, 32))}}, {"a/w": ("hidden1", "hidden2")}, 2, min_units=20
    )
    assert [m.group for m in maps] == [model["hidden1"], model["hidden2"]]
    assert [set(m.trained.sum(2).ravel()) for m in maps] == [{8}, {20}]
    drawn = read_figures(page.read_text())
    for index, name in enumerate(("hidden1", "hidden2")):
        cells = drawn[f"map{index}"][0]
        shown = set(zip(cells["round"], cells["worker"], cells["unit"], strict=True))
        expected = set()
        for number in range(1, ROUNDS + 1):
            held = partition.draw(0, number - 1, model, DEALS["random"])[name]
            expected |= {(number, w, u) for w in range(2) for u in held.indices[w][held.gates[w]]}
        assert shown == expected
        bars = drawn[f"counts{index}"][0]
        counts = {(w, u): c for w, u, c in zip(bars["worker"], bars["unit"], bars["count"], strict=True)}
        for worker, unit in counts:
            assert counts[worker, unit] == sum((n, worker, unit) in expected for n in range(1, ROUNDS + 1))
        assert sum(counts.values()) == len(expected)


def test_a_folder_of_an_earlier_version_has_a_page_without_a_map(runs):
    """Its summary does not say all that was dealt."""
    trained = read_run(runs[0])
    sizes = {
        name: {key: unit[key] for key in ("size", "strips")}
        for name, unit in trained.summary["units"].items()
    }
    assert "There is no map" in render([trained._replace(summary=trained.summary | {"units": sizes})])
    assert "There is no map" not in render([trained])


def test_units_of_several_workers_share_their_cells():
    units = {"block": {"size": 3, "strips": 1}}
    one = synthetic(rounds=5, units=units, workers=2, **{"partition.min_units": 2})
    cells = read_figures(render([one]))["map0"][0]
    held = partition.draw(0, 0, make_groups(units, 2, 2), DEALS["random"])["block"].indices
    holders = np.bincount(held.ravel(), minlength=3)
    assert holders.max() == 2
    for unit, count in enumerate(holders):
        here = (cells["round"] == 1) & (cells["unit"] == unit)
        assert here.sum() == count
        np.testing.assert_allclose((cells["bottom"] - cells["top"])[here] * count, 0.92)
        np.testing.assert_allclose(
            [cells["top"][here].min(), cells["bottom"][here].max()], [unit - 0.5, unit + 0.42]
        )


def test_the_map_of_a_stack_shows_its_layers_one_after_another():
    units = {"hidden": {"size": 5, "strips": 1, "layers": 3}}
    one = synthetic(rounds=4, units=units, workers=2)
    page = render([one])
    cells, bars = (read_figures(page)[name][0] for name in ("map0", "counts0"))
    assert "hidden: 15 units in 3 layers, each trained 4 times in 4 rounds" in page
    shown = set(zip(cells["round"], cells["worker"], cells["unit"], strict=True))
    expected = set()
    for number in range(1, 5):
        indices, gates = partition.draw(0, number - 1, make_groups(units, 2), DEALS["random"])["hidden"]
        expected |= {(number, w, 5 * layer + indices[w, layer, k]) for w, layer, k in np.argwhere(gates)}
    assert shown == expected and len(shown) == 60
    assert bars["count"].sum() == 60 and set(bars["unit"]) == set(range(15))


def test_workers_that_were_absent_or_left_out_have_trained_nothing():
    one = synthetic(rounds=40, units={"block": {"size": 8, "strips": 1}}, workers=2, participation=0.5)
    one.records[3]["left_out"] = [0, 1]
    (units,) = draw_maps(one, columns=40, budget=10**6)
    present = np.array([partition.draw_present(0, r, 2, 0.5) for r in range(40)])
    present[3] = False
    assert 20 < present.sum() < 60
    np.testing.assert_array_equal(units.trained.sum(2), 4 * present)
    np.testing.assert_array_equal(units.counts.sum(1), 4 * present.sum(0))


def test_rounds_of_another_number_of_workers_are_not_drawn_as_if_they_were_of_this():
    units = {"block": {"size": 8, "strips": 1}}
    before, after = (synthetic(rounds=6, units=units, workers=n) for n in (4, 2))
    resumed = after._replace(records=before.records[:2] + after.records[2:])
    (units,) = draw_maps(resumed, columns=40, budget=10**6)
    assert units.rounds.tolist() == [3, 4, 5, 6]


def test_a_run_that_was_never_dealt_out_has_a_page_without_a_map():
    dealt = synthetic(rounds=3, units={"a": {"size": 4, "strips": 1}}, workers=2)
    warm = dealt._replace(config=dealt.config | {"partition.warmup_epochs": 9.0})
    warm = warm._replace(
        records=[r | {"partition": partition.fingerprint((), "random")} for r in dealt.records]
    )
    page = render([warm])
    assert "There is no map: all rounds belonged to the warm-up" in page
    assert not any(name.startswith(("map", "counts")) for name in read_figures(page))
    both = render([warm, dealt])  # the first that has one
    assert "There is no map" not in both
    assert set(read_figures(both)["map0"][0]["round"]) == {1, 2, 3}


def test_a_long_run_of_a_wide_net_is_a_small_page():
    units = {f"hidden{k}": {"size": 8192, "strips": 8} for k in (1, 2)}
    one = synthetic(rounds=2000, units=units, workers=8)
    page = render([one])
    assert len(page) < 2_000_000
    drawn = read_figures(page)
    assert len(drawn["history0"][0]["local"]) <= 60
    assert len(drawn["loss"][0]["x"]) == 400  # each the mean of five
    bars = drawn["coverage1"][0]
    maps = draw_maps(one, columns=64, budget=DRAWN)
    assert 50 < len(maps[0].rounds) < 100  # 10 million / (8 workers x 16384 units) allows 76
    for worker, counts in enumerate(maps[1].counts):
        times, units = np.unique(counts, return_counts=True)
        own = bars["worker"] == worker
        np.testing.assert_array_equal(bars["times"][own], times)
        np.testing.assert_array_equal(bars["count"][own], units)
        assert units.sum() == 8192
    assert f"{len(maps[0].rounds)} of 2,000 rounds" in page


def test_many_workers_and_the_baselines_have_a_page():
    many = synthetic(rounds=3, units={"a": {"size": 200, "strips": 1}}, workers=100)
    assert set(read_figures(render([many]))["coverage0"][0]["worker"]) == {0}  # one bar for all
    alone = synthetic(rounds=1, units={}, workers=1, method="local_sgd")
    assert not any(name.startswith("map") for name in read_figures(render([alone])))


def test_the_page_refers_to_nothing_outside_and_quotes_what_it_is_given(runs, tmp_path):
    nasty = read_run(runs[0])
    nasty.config["data.dir"] = "</script><b>bold</b>"  # is in a label, and so in the figures

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("b", "link", "img", "iframe")
            assert not {"src", "href"} & {name for name, _ in attrs}

    other = read_run(runs[1])
    text = render([nasty, other])
    Parser().feed(text)
    assert "&lt;b&gt;bold" in text
    assert read_figures(text)["time"]


def test_the_ledger_is_shown_with_the_columns_that_are_known(runs):
    trained = read_run(runs[0])
    rows = trained.ledger["rows"]
    rows[-1]["hlo"] = 1.25 * rows[-1]["expected"]
    text = render([trained])
    cell = r"<td class=\"number\">(.*?)</td>"
    shown = re.findall(rf"<tr><th>([\w ]+)<br><small>([\w ]+)</small></th>{3 * cell}</tr>", text)
    assert len(shown) == len(rows) > 5
    for row, (cause, unit, *cells) in zip(rows, shown, strict=True):
        size = row["unit"] == "bytes"
        assert (cause, unit) == (
            row["cause"].replace("_", " "),
            f"{'MB' if size else row['unit']} per {row['per']}",
        )
        for name, cell in zip(("paper", "expected", "hlo"), cells, strict=True):
            number = row[name]
            if number is None:
                assert cell == "-"
            elif size:
                assert f'<span title="{number:,.0f} bytes">{number / 1e6:,.3f}</span>' in cell
            else:
                assert cell.startswith(f"{number:,.0f}")
    assert cells[-1].endswith("<br><small>+25 %</small>")
    known = [row for row in rows if None not in (row["expected"], row["hlo"])]
    assert text.count(" %</small>") == sum(row["hlo"] != row["expected"] for row in known) < len(known) / 2
    assert "over a process&#39;s TCP connections" not in text  # one process: nothing on a wire
    assert "the papers&#39; count" in text


@pytest.mark.parametrize("method", ["ist", "local_sgd", "data_parallel"])
def test_the_bytes_sent_are_those_of_the_plan(method):
    """On one device nothing is sent; the model is of workers with a device each, as the plan's."""
    config = get_config("mlp", method=method, num_workers=4, num_devices=1)
    (stage,) = experiment.set_up(config).stages
    config.num_devices = 4
    planned = plan.predict(config, data.facts("digits"))
    assert sum(stage.apart.sent.values()) == planned.wire_bytes_per_worker_per_round > 0
    assert not sum(stage.traffic.sent.values())


def test_a_run_leaves_a_report_and_the_command_writes_it_again(runs, tmp_path, monkeypatch, capsys):
    assert 'id="figures"' in (runs[0] / "report.html").read_text()
    (runs[0] / "report.html").unlink()
    assert report_main(["report", f"--workdir={runs[0]}"]) == 0
    assert capsys.readouterr().out.strip() == str(runs[0] / "report.html")
    monkeypatch.chdir(tmp_path)
    assert report_main(["report", f"--workdir={runs[0]}", str(runs[1])]) == 0
    assert "a small marker: each seed" in Path("report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=nowhere"], "holds no config.json"),
        (["--workdir=unfinished"], "holds no summary.json"),
        (["--workdir=broken"], "cannot read the metrics"),
        (["--workdir=empty"], "holds no round"),
        (["--workdir=run", "nowhere"], "holds no config.json"),
        (["--workdir=run", "--out=no/where.html"], "cannot write no/where.html: No such file"),
        (["--wrokdir=run"], "wrokdir"),
    ],
)
def test_mistakes_are_one_line(runs, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "unfinished", "broken", "empty"):
        shutil.copytree(runs[0], name, ignore=shutil.ignore_patterns("params"))
    Path("unfinished/summary.json").unlink()
    Path("broken/metrics.jsonl").write_text('{"round": ')
    Path("empty/metrics.jsonl").write_text("")
    with pytest.raises(SystemExit) as stop:
        report_main(["report", *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


# --- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


def open_page(browser, page, *, width=1280, scheme="light"):
    """Opens a page in a window of that width and colour scheme, and waits until it has drawn."""
    from selenium.webdriver.support.wait import WebDriverWait

    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    ready = "return document.documentElement.dataset.ready === 'yes'"
    WebDriverWait(browser, 60).until(lambda b: b.execute_script(ready))


PIXELS = """
    const find = (root) => [...root.querySelectorAll("*")].flatMap(
        (e) => [...(e.tagName === "CANVAS" ? [e] : []), ...(e.shadowRoot ? find(e.shadowRoot) : [])]);
    const canvas = find(document.getElementById(arguments[0]))[0];
"""


def test_the_bandwidth_that_the_reader_chooses_moves_the_curve(runs, page, browser):
    open_page(browser, page)
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    expected = [group_by_config([read_run(folder)])[0].mean() for folder in runs]
    pictures, last = [], []
    for link in LINKS:
        value = f"{link.bits_per_second:.0f}"
        browser.execute_script(f"document.querySelector('input[value=\"{value}\"]').click()")
        drawn = browser.execute_script(
            "return [...sources(figures.time)].map((s) => [Array.from(s.data.x), Array.from(s.data.y)])"
        )
        for index, curve in ((0, expected[0]), (1, expected[1]), (3, expected[2])):  # 2: the mean
            x = modelled_seconds(curve.seconds_local, curve.bytes_sent, curve.messages, link)
            np.testing.assert_allclose(drawn[index], [x, curve.value], rtol=1e-12)
        cells = browser.execute_script(
            "return [...document.querySelectorAll('[data-seconds-local]')].map((e) => e.innerText.split(' '))"
        )
        last.append((drawn[3][0][-1], float(cells[1][0])))
        end = [
            column[-1] for column in (expected[2].seconds_local, expected[2].bytes_sent, expected[2].messages)
        ]
        _, share, saved = modelled(*end, link)
        assert [cells[3], cells[5]] == [[f"{share:.1%}"], [f"{saved:,.2f}"]]
        ratio = drawn[2][0][-1] / drawn[3][0][-1]  # of the totals, to local SGD's
        assert float(cells[0][1][:-1]) == pytest.approx(ratio, rel=0.006)
        pictures.append(browser.execute_async_script(
            PIXELS + "setTimeout(() => requestAnimationFrame(() => arguments[1](canvas.toDataURL())), 50)",
            "time",
        ))  # fmt: skip
    assert len(set(pictures)) == 3
    assert last[0][0] > last[1][0] > last[2][0]
    for curve_end, cell in last:  # the table's total is the curve's end
        assert cell == pytest.approx(curve_end, abs=0.006)


def test_the_script_and_python_model_the_same_time(page, browser):
    open_page(browser, page)
    rng = np.random.default_rng(0)
    parts = [rng.uniform(0, 100, 50), rng.integers(0, 10**12, 50), rng.integers(0, 1000, 50)]
    for link in (*LINKS, Link(12345.678, 0.3)):
        given = {"bitsPerSecond": link.bits_per_second, "latency": link.latency}
        found = browser.execute_script(
            "return modelledSeconds(...arguments)", *(part.tolist() for part in parts), given
        )
        np.testing.assert_allclose(found, modelled_seconds(*parts, link), rtol=1e-14)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_scrolls_sideways_and_the_charts_fill_the_page(page, browser, width):
    open_page(browser, page, width=width)
    wide, visible = browser.execute_script(
        "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]"
    )
    assert wide <= visible <= width
    for name in ("time", "phases", "map0"):
        box = browser.execute_script(
            "const box = document.getElementById(arguments[0]).getBoundingClientRect(); "
            "return [box.left, box.right]",
            name,
        )
        assert 0 <= box[0] < box[1] <= width
        assert box[1] - box[0] > min(360, 0.35 * width)


def test_the_page_follows_the_readers_colour_scheme(page, browser):
    grounds = {}
    for scheme in ("light", "dark"):
        open_page(browser, page, scheme=scheme)
        ground, text = browser.execute_script(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        )
        frame = browser.execute_script(
            PIXELS + "return Array.from(canvas.getContext('2d').getImageData(3, 3, 1, 1).data)", "time"
        )
        assert re.findall(r"\d+", ground) == [str(value) for value in frame[:3]]
        grounds[scheme] = np.array(frame[:3])
        assert contrast(grounds[scheme], [int(value) for value in re.findall(r"\d+", text)]) > 7
    assert grounds["light"].sum() > 700 > 100 > grounds["dark"].sum()


def contrast(one, other):
    """WCAG 2's contrast ratio of two sRGB colours."""

    def luminance(color):
        c = np.asarray(color) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_a_chosen_worker_stands_out_in_the_maps(page, browser):
    open_page(browser, page)
    browser.execute_script(
        "const s = document.querySelector('select'); s.value = '1'; s.dispatchEvent(new Event('change'))"
    )
    for name in ("map0", "counts1"):
        worker, alpha = browser.execute_script(
            "const { worker, alpha } = [...sources(figures[arguments[0]])][0].data;"
            "return [Array.from(worker), Array.from(alpha)]",
            name,
        )
        np.testing.assert_array_equal(np.array(alpha) == 1, np.array(worker) == 1)


def test_the_reader_chooses_a_log_or_a_linear_axis(page, browser):
    open_page(browser, page)
    assert browser.execute_script("return figures.exchanged.x_scale.type") == "LogScale"  # in a comparison
    pictures = []
    for kind in ("Linear", "Log"):
        browser.execute_script(f"document.querySelector('input[value={kind}]').click()")
        for name in ("exchanged", "time"):
            scale, first, least = browser.execute_async_script(
                "const figure = figures[arguments[0]], done = arguments[1];"
                "setTimeout(() => done([figure.x_scale.type, figure.x_range.start,"
                " Math.min(...[...sources(figure)].flatMap((s) => Array.from(s.data.x)))]), 100)",
                name,
            )
            assert scale == f"{kind}Scale"
            assert first == 0 if kind == "Linear" else 0 < first <= least, (name, kind, first, least)
        picture = "setTimeout(() => requestAnimationFrame(() => arguments[1](canvas.toDataURL())), 50)"
        pictures.append(browser.execute_async_script(PIXELS + picture, "exchanged"))
    assert pictures[0] != pictures[1]
    lower, upper, start, end = browser.execute_script(
        "const all = [...sources(figures.exchanged)], { start, end } = figures.exchanged.y_range;"
        "const column = (name) => all.flatMap((s) => Array.from(s.data[name] ?? []));"
        "return [Math.min(...column('lower')), Math.max(...column('upper')), start, end]"
    )
    assert start <= lower < upper <= end


def test_every_chart_is_saved_as_csv_and_png(page, browser):
    open_page(browser, page)
    browser.execute_script(
        "window.saved = {}; let last;"
        "HTMLAnchorElement.prototype.click = function () { saved[this.download] = last; };"
        "URL.createObjectURL = (blob) => { last = blob; return 'blob:none'; };"
    )
    names = browser.execute_script("return Object.keys(figures)")
    for name in names:
        for kind in ("PNG", "CSV"):
            button = f"button[data-chart={name}][data-kind={kind}]"
            browser.execute_script(f"document.querySelector('{button}').click()")
    texts = browser.execute_async_script(
        "const done = arguments[0]; setTimeout(async () => {"
        " const all = Object.entries(saved).map(async ([name, blob]) => [name, await blob.text()]);"
        " done(Object.fromEntries(await Promise.all(all))); }, 3000)"
    )
    assert set(texts) == {f"{name}.{kind}" for name in names for kind in ("png", "csv")}
    for name in names:
        assert texts[f"{name}.png"][1:4] == "PNG"
    head, first, *_ = csv.reader(texts["exchanged.csv"].splitlines())
    one = read_figures(page.read_text())["exchanged"][0]
    assert head[:3] == ["exchanged by a worker (MB)", "test accuracy (%)", "round"]
    assert [float(x) for x in first[:3]] == [one["x"][0], one["y"][0], 2]
    assert "ist, seed 0" in first
    assert texts["phases.csv"].startswith('"method, settings","gather","local"')


def test_on_a_phone_charts_are_half_as_high_and_later_parts_closed(page, browser):
    height = (
        "return [document.documentElement.scrollHeight, document.getElementById('exchanged').clientHeight]"
    )
    open_page(browser, page)
    whole, chart = browser.execute_script(height)
    assert browser.execute_script("return [...document.querySelectorAll('.section')].every((d) => d.open)")
    open_page(browser, page, width=390)
    short, low = browser.execute_script(height)
    assert low == chart / 2
    assert short < whole
    closed = browser.execute_script("return [...document.querySelectorAll('.section')].map((d) => d.open)")
    assert not any(closed) and len(closed) == 6
    painted = browser.execute_async_script(
        "document.getElementById('about-training').open = true; const done = arguments[1];"
        "setTimeout(() => {" + PIXELS.replace("arguments[0]", "'loss'") + "const { width, height } = canvas;"
        "done([width, new Set(canvas.getContext('2d').getImageData(0, 0, width, height).data).size]) }, 500)",
        "loss",
    )
    assert painted[0] > 300 and painted[1] > 20  # a chart that was closed is drawn when it is opened
