"""One self-contained HTML page about a finished run, or a comparison of several; needs no network."""

import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.plotting import figure
from bokeh.resources import Resources

from ist_jax import BANDWIDTHS
from ist_jax.report import figures
from ist_jax.report.runs import RunFiles, Series, draw_maps, group_by_config, modelled_seconds, read_run
from ist_jax.workdir.files import Json

_BANDWIDTH = 1e9  # chosen when the page opens
_COLUMNS, _UNITS = 64, 48  # of a partition map
DRAWN = 10_000_000  # workers x units x rounds to draw again; about 0.3 s
_COLORS_SHOWN = 16  # of workers, in the legend
_GROUPS = 4  # partition maps on a page


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Writes the report of the finished runs in `folders` as one HTML file.

    Args:
      folders: one run, or several to compare; those that differ in the seed alone are one method's.
      out: the file.

    Raises:
      ValueError: a folder holds no finished run.
      OSError: the file cannot be written.
    """
    page = render([read_run(Path(folder)) for folder in folders])
    try:
        Path(out).write_text(page, encoding="utf-8")
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror}") from None


def render(runs: Sequence[RunFiles]) -> str:
    """The page as text."""
    series = group_by_config(runs)
    charts = figures.accuracy_figures(series, _BANDWIDTH) | {"phases": figures.phase_figure(series)}
    if len(runs) == 1:
        charts["history"] = figures.phase_history_figure(runs[0])
    partition, maps = _partition(series)
    items = {name: json_item(chart, ID(name)) for name, chart in (charts | maps).items()}
    settings = _settings(series)
    loader = jinja2.PackageLoader("ist_jax.report")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    folder = Path(__file__).parent / "templates"
    return environment.get_template("report.html").render(
        title=f"ist_jax: {', '.join(s.label for s in series)} on {runs[0].config['data.name']}",
        data=runs[0].summary["data"],
        workers=", ".join(sorted({_workers(run) for run in runs})),
        several=any(len(s.runs) > 1 for s in series),
        history="history" in charts,
        phases=figures.phase_styles(runs),
        legend=[{"label": s.label, **figures.style(index)} for index, s in enumerate(series)],
        bandwidth=_BANDWIDTH,
        bandwidths=BANDWIDTHS,
        results=_results(series),
        modelled=[_modelled(s) for s in series],
        ledgers=[_ledger(s) for s in series if s.runs[0].ledger],
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
    draws = ((s, draw_maps(s.runs[0], columns=_COLUMNS, rows=_UNITS, budget=DRAWN)) for s in parted)
    drawn = next(((s, maps) for s, maps in draws if maps), None)
    if drawn is None:
        return {"maps": [], "never_dealt": bool(parted)}, {}
    shown, maps = drawn
    first = shown.runs[0]
    charts: dict[str, figure] = {}
    for index, units in enumerate(maps[:_GROUPS]):
        charts |= {f"{kind}{index}": chart for kind, chart in figures.map_figures(units).items()}
    others = [f"the groups {', '.join(m.group.name for m in maps[_GROUPS:])}"] if maps[_GROUPS:] else []
    others += [f"the partitions of {s.label}" for s in parted if s is not shown]
    context = {
        "maps": [f"{units.group.name}: {_count(units.group.size, 'unit')}" for units in maps[:_GROUPS]],
        "map_rounds": (len(maps[0].rounds), len(first.records)),
        "deal": first.config.get("partition.deal", "random"),
        "map_label": f"{shown.label}, seed {first.config['seed']}" if len(series) > 1 else "",
        "map_figures": " ".join(charts),
        "map_workers": range(first.summary["num_workers"]),
        "map_colors": figures.worker_colors(first.summary["num_workers"])[:_COLORS_SHOWN],
        "maps_left_out": "; ".join(others),
        "absent": any(r["workers_absent"] + r["workers_left_out"] for r in first.records),
        "overlap": any(not units.group.disjoint for units in maps),
    }
    return context, charts


def _results(series: Sequence[Series]) -> list[tuple[str, list[str]]]:
    """The rows of the table of results; a column per series, means over its runs."""

    def row(name: str, key: str, form: str, scale: float = 1.0) -> tuple[str, list[str]]:
        return name, [form.format(scale * np.mean([run.summary[key] for run in s.runs])) for s in series]

    every = [", ".join(f"{100 * run.summary['test_accuracy']:.2f}" for run in s.runs) for s in series]
    several = any(len(s.runs) > 1 for s in series)
    return [
        row("test accuracy, %", "test_accuracy", "{:.2f}", 100),
        *([("each seed", every)] if several else []),
        row("rounds", "rounds", "{:,.0f}"),
        row("examples", "examples", "{:,.0f}"),
        row("parameters", "parameters", "{:,.0f}"),
        row("parameters per worker", "parameters_per_worker", "{:,.0f}"),
        ("MB sent by a worker", [f"{_modelled(s)['bytes_sent'] / 1e6:,.1f}" for s in series]),
        row("measured s", "seconds_total", "{:,.1f}"),
    ]


def _modelled(series: Series) -> dict[str, Json]:
    """All rounds' modelled time, and what it is made of for the page's script; means over the runs."""
    seconds_local = float(np.mean([run.seconds("local").sum() for run in series.runs]))
    bytes_sent = float(np.mean([run.column("bytes_sent").sum() for run in series.runs]))
    seconds = modelled_seconds(np.array(seconds_local), np.array(bytes_sent), _BANDWIDTH)
    return {"seconds_local": seconds_local, "bytes_sent": bytes_sent, "text": f"{seconds:,.2f}"}


def _settings(series: Sequence[Series]) -> list[tuple[str, list[str]]]:
    """Every key of the configs with its value in each series; the seeds are in the table of runs."""
    configs = [s.runs[0].config for s in series]
    keys = sorted(set().union(*configs) - {"seed"})
    return [(key, [json.dumps(config.get(key)) for config in configs]) for key in keys]


def _ledger(series: Series) -> dict[str, object]:
    """The table of a ledger.json; columns of which nothing is known are left out."""
    rows, columns = (series.runs[0].ledger[key] for key in ("rows", "columns"))
    known = {name: text for name, text in columns.items() if any(row[name] is not None for row in rows)}
    return {"label": series.label, "columns": known, "rows": rows}


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
