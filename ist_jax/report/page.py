"""One self-contained HTML page about a finished run, or a comparison of several; needs no network."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.plotting import figure
from bokeh.resources import Resources

from ist_jax.costs.link import LINKS, modelled
from ist_jax.report import figures
from ist_jax.report.runs import (
    RunFiles,
    Series,
    UnitMap,
    draw_maps,
    group_by_config,
    read_run,
)
from ist_jax.tasks.task import ACCURACY
from ist_jax.workdir.files import Json

Row = tuple[str, list[dict[str, Json]]]  # of a table: its name, and by series what the template fills in
_LINK = LINKS[1]  # chosen when the page opens
_COLUMNS = 64  # of a partition map
DRAWN = 10_000_000  # workers x units x rounds to draw again; about 0.3 s
_MODELLED = {  # by field of `Modelled`, the row's name and how it is written
    "seconds": ("modelled s", "{:,.2f}"),
    "utilisation": ("computing, of that", "{:.1%}"),
    "overlap_saves": ("overlap would save, modelled s", "{:,.2f}"),
}
_MOST = 4  # groups of units, and histories of rounds, on a page


def write_report(folders: Sequence[Path] | Mapping[Path, str], out: Path) -> None:
    """Writes the report of the finished runs in `folders` as one HTML file.

    Args:
      folders: one run, or several to compare; those that differ in the seed alone are drawn as one, under
        the name that a mapping has for them.
      out: the file.

    Raises:
      ValueError: a folder holds no finished run.
      OSError: the file cannot be written.
    """
    page = render([read_run(Path(folder)) for folder in folders], _names(folders))
    try:
        Path(out).write_text(page, encoding="utf-8")
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror}") from None


def _names(folders: Sequence[Path] | Mapping[Path, str]) -> Mapping[Path, str]:
    return folders if isinstance(folders, Mapping) else {}


def render(runs: Sequence[RunFiles], names: Mapping[Path, str] | None = None) -> str:
    """The page as text; names: of what is compared, by the runs' folders."""
    if len(metrics := {run.metric.name for run in runs}) > 1:
        raise ValueError(f"the runs are compared by {' and '.join(sorted(metrics))}; give runs of one task")
    series, styles = group_by_config(runs, names), figures.phase_styles(runs)
    charts = figures.metric_figures(series, _LINK) | figures.training_figures(series)
    charts["phases"] = figures.phase_figure(series)
    for index, one in enumerate(series[:_MOST]):
        label = f"{one.label}, seed {one.runs[0].config['seed']}"
        charts[f"history{index}"] = figures.phase_history_figure(one.runs[0], label, styles)
    partition, maps = _partition(series)
    charts |= maps
    items = {name: json_item(chart, ID(name)) for name, chart in charts.items()}
    settings = _settings(series)
    loader = jinja2.PackageLoader("ist_jax.report")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    folder = Path(__file__).parent / "templates"
    return environment.get_template("report.html").render(
        title=f"ist_jax: {', '.join(s.label for s in series)} on {runs[0].config['data.name']}",
        data=runs[0].summary["data"],
        workers=", ".join(sorted({_workers(run) for run in runs})),
        charts=charts,
        several=any(len(s.runs) > 1 for s in series),
        labels=[s.label for s in series],
        base=series[_base(series)].label,
        logarithmic=len(series) > 1 and all(s.runs[0].column("bytes_per_worker").any() for s in series),
        test_examples=runs[0].summary.get("test_examples") if runs[0].metric == ACCURACY else None,
        link=_LINK,
        links=LINKS,
        messages_unknown=any(np.isnan(run.column("messages_sent")).any() for run in runs),
        results=_results(series),
        targets=_targets(series),
        ledgers=[table for s in series if s.runs[0].ledger for table in _ledgers(s)],
        differing=[row for row in settings if len(set(row[1])) > 1],
        common=[(key, values[:1]) for key, values in settings if len(set(values)) == 1],
        runs=runs,
        made_with=sorted({_made_with(run) for run in runs}),
        figures=json.dumps(items).replace("</", "<\\/"),
        bokeh=Resources(mode="inline", components=["bokeh"]).render_js(),
        css=(folder / "report.css").read_text(),
        javascript=(folder / "report.js").read_text(),
        **partition,
    )  # fmt: skip


def _partition(series: Sequence[Series]) -> tuple[dict[str, object], dict[str, figure]]:
    """What the template needs for the maps of the first run that was partitioned, and their figures."""
    parted = [s for s in series if s.runs[0].summary["units"]]
    draws = ((s, draw_maps(s.runs[0], columns=_COLUMNS, budget=DRAWN)) for s in parted)
    drawn = next(((s, maps) for s, maps in draws if maps), None)
    if drawn is None:
        return {"maps": [], "never_dealt": bool(parted)}, {}
    shown, maps = drawn
    first = shown.runs[0]
    charts: dict[str, figure] = {}
    for index, units in enumerate(maps[:_MOST]):
        charts |= {f"{kind}{index}": chart for kind, chart in figures.map_figures(units).items()}
    others = [f"the groups {', '.join(m.group.name for m in maps[_MOST:])}"] if maps[_MOST:] else []
    others += [f"the partitions of {s.label}" for s in parted if s is not shown]
    context = {
        "maps": [_told(units) for units in maps[:_MOST]],
        "map_rounds": (len(maps[0].rounds), len(first.records)),
        "deal": first.config.get("partition.deal", "random"),
        "map_label": f"{shown.label}, seed {first.config['seed']}" if len(series) > 1 else "",
        "map_figures": list(charts),
        "map_workers": range(first.summary["num_workers"]),
        "maps_left_out": "; ".join(others),
        "absent": any(r["workers_absent"] + r["workers_left_out"] for r in first.records),
        "overlap": any(not units.group.disjoint for units in maps),
    }
    return context, charts


def _told(units: UnitMap) -> str:
    """What a group's charts come to, in a sentence."""
    counts, name, rounds = units.counts, units.group.name, len(units.rounds)
    least, most = counts.sum(0).min(), counts.sum(0).max()
    times = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    met = "each worker trained each unit" if counts.all() else (
        f"of {counts.size:,} pairs of a worker and a unit {(counts == 0).sum():,} never met"
    )  # fmt: skip
    if units.group.independent:
        met = f"about {units.group.coverage:.0%} of them are trained in each; {met}"
    of_layers = f" in {units.group.layers:,} layers" if units.group.layers else ""
    total = f"{units.group.total:,} units{of_layers}"
    return f"{name}: {total}, each trained {times} times in {rounds:,} rounds; {met}."


def _base(series: Sequence[Series]) -> int:
    """Which one the others are compared with: local SGD or, without it, the first."""
    methods = [s.runs[0].method for s in series]
    return methods.index("local_sgd") if "local_sgd" in methods else 0


def _row(name: str, series: Sequence[Series], values: Sequence[float | None], form: str) -> Row:
    """A row of costs; each but the one to compare with has its ratio to that."""
    base, cells = _base(series), []
    for index, value in enumerate(values):
        cell: Json = {"text": "-" if value is None else form.format(value), "ratio": "", "data": {}}
        if value is not None and index != base and (reference := values[base]):
            cell["ratio"] = f"{value / reference:.3g}"
        cells.append(cell)
    return name, cells


def _modelled_rows(series: Sequence[Series], costs: Sequence[Mapping[str, float] | None]) -> list[Row]:
    """The same of what is modelled, with what it is made of for the page's script."""
    keys = ("seconds_local", "bytes_sent", "messages")
    parts = [None if cost is None else [cost[key] for key in keys] for cost in costs]
    found = [None if part is None else modelled(part[0], part[1], part[2], _LINK) for part in parts]
    rows = []
    for field, (title, form) in _MODELLED.items():
        name, cells = _row(title, series, [None if x is None else getattr(x, field) for x in found], form)
        for index, (cell, part) in enumerate(zip(cells, parts, strict=True)):
            if part is not None:
                names = [f"data-{key.replace('_', '-')}" for key in keys]
                cell["data"] = dict(zip(names, part, strict=True)) | {"data-modelled": field}
                cell["data"] |= {"data-base": ""} if index == _base(series) else {}
                cell["ratio"] = cell["ratio"] if field == "seconds" else ""
        rows.append((name, cells))
    return rows


def _results(series: Sequence[Series]) -> list[Row]:
    """The rows of the table of results; a column per series, means over its runs."""

    def mean(key: str, scale: float = 1.0) -> list[float]:
        return [float(scale * np.mean([run.summary[key] for run in s.runs])) for s in series]

    def total(key: str) -> list[float]:
        return [float(np.mean([np.nansum(run.column(key)) for run in s.runs])) for s in series]

    def plain(name: str, texts: Iterable[str]) -> Row:
        return name, [{"text": text, "ratio": "", "data": {}} for text in texts]

    metric = series[0].runs[0].metric
    key, what = f"test_{metric.name}", f"test {metric.name.replace('_', ' ')}"
    scale, form = (100, "{:.2f}") if metric.percent else (1, "{:.4g}")
    errors = [np.mean([run.curve().standard_error[-1] for run in s.runs]) for s in series]
    every = [", ".join(form.format(scale * run.summary[key]) for run in s.runs) for s in series]
    sent = total("bytes_sent")
    parts = {"seconds_local": total("seconds_local"), "bytes_sent": sent, "messages": total("messages_sent")}
    costs = [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]
    return [
        plain(what + ", %" * metric.percent, (
            form.format(value) + (f" ± {error:.2f}" if np.isfinite(error) else "")
            for value, error in zip(mean(key, scale), errors, strict=True)
        )),
        *([plain("each seed", every)] if any(len(s.runs) > 1 for s in series) else []),
        _row("exchanged, MB", series, [x / 1e6 for x in total("bytes_per_worker")], "{:,.1f}"),
        _row("sent on the wire, MB", series, [x / 1e6 for x in sent], "{:,.1f}"),
        _row("measured s", series, mean("seconds_total"), "{:,.1f}"),
        *_modelled_rows(series, costs),
        _row("parameters per worker", series, mean("parameters_per_worker"), "{:,.0f}"),
        plain("parameters", (f"{x:,.0f}" for x in mean("parameters"))),
        plain("rounds", (f"{x:,.0f}" for x in mean("rounds"))),
        plain("examples", (f"{x:,.0f}" for x in mean("examples"))),
    ]  # fmt: skip


def _targets(series: Sequence[Series]) -> list[tuple[str, list[Row]]]:
    """What it took to reach some values of the metric: any's best and all's.

    Accuracies are in whole percent, and nine tenths of all's best is one more.
    """
    metric, means = series[0].runs[0].metric, [s.mean() for s in series]
    best = sorted(
        (mean.value[metric.better(mean.value).argmax()] for mean in means if len(mean.round)),
        key=metric.better,
    )
    wanted: list[float] = list(dict.fromkeys([best[-1], best[0]])) if best else []
    if metric.percent and best:
        wanted = sorted({int(best[-1]), int(best[0]), int(0.9 * best[0])}, reverse=True)
    what = metric.name.replace("_", " ")
    rows: list[tuple[str, list[Row]]] = []
    before = None
    for target in wanted:
        costs = [mean.first(target, metric) for mean in means]
        if (rounds := [cost and cost["round"] for cost in costs]) == before:
            continue
        before = rounds
        exchanged = [None if cost is None else cost["exchanged"] / 1e6 for cost in costs]
        measured = [None if cost is None else cost["seconds"] for cost in costs]
        name = f"{target} % test {what}" if metric.percent else f"test {what} {target:.4g}"
        rows.append((name, [
            _row("exchanged, MB", series, exchanged, "{:,.1f}"),
            _row("measured s", series, measured, "{:,.1f}"),
            _modelled_rows(series, costs)[0],
        ]))  # fmt: skip
    return rows


def _settings(series: Sequence[Series]) -> list[tuple[str, list[str]]]:
    """Every key of the configs with its value in each series; the seeds are in the table of runs."""
    configs = [s.runs[0].config for s in series]
    keys = sorted(set().union(*configs) - {"seed"})
    return [(key, [json.dumps(config.get(key)) for config in configs]) for key in keys]


def _ledgers(series: Series) -> list[dict[str, object]]:
    """The tables of a ledger.json, one per stage; columns of which nothing is known are left out."""
    every, columns = (series.runs[0].ledger[key] for key in ("rows", "columns"))
    tables: list[dict[str, object]] = []
    for stage in dict.fromkeys(row.get("stage", "") for row in every):
        rows = [row for row in every if row.get("stage", "") == stage]
        known = {name: text for name, text in columns.items() if any(row[name] is not None for row in rows)}
        label = f"{series.label}: {stage}" if stage else series.label
        tables.append({"label": label, "columns": known, "rows": rows})
    return tables


def _made_with(run: RunFiles) -> str:
    """Hardware and versions in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in run.summary["versions"].items())
    return f"{_workers(run)}; {versions}."


def _workers(run: RunFiles) -> str:
    summary = run.summary
    kind = "virtual CPU" if summary["device_kind"] == "cpu" else summary["device_kind"]
    devices = _count(summary["num_devices"], f"{kind} device")
    return f"{_count(summary['num_workers'], 'worker')} on {devices}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
