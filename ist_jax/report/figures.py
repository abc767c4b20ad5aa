"""The figures of a report, with Bokeh: each an independent item that the page embeds.

A colour means one thing: Okabe and Ito's are methods, greys are phases, purples and yellows are workers;
colour-blind readers can tell each set apart. Curves differ in dash and marker too, stacked phases in
hatching. Colours of the frame are left to the page's style sheet (light and dark).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from bokeh.models import BasicTicker, CDSView, ColumnDataSource, HoverTool, IndexFilter, LinearAxis
from bokeh.models import NumeralTickFormatter as Numerals
from bokeh.models.annotations import Label, Span
from bokeh.palettes import interp_palette
from bokeh.plotting import figure

from ist_jax.costs.link import Link, modelled_seconds
from ist_jax.report.runs import Curve, RunFiles, Series, UnitMap

Columns = dict[str, np.ndarray]
Styles = dict[str, tuple[str, str]]  # colour and hatching, by phase
METHODS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
WORKERS = ("#7b4fa3", "#e3d26f", "#b89bd0", "#8a8420", "#dcd0ea", "#b5ad3b", "#5a3280", "#f1eab8")
PHASES = (("#6e7781", "/"), ("#c3c9cf", " "), ("#8c959f", "\\"), ("#aab2ba", "-"), ("#7d8690", "|"))
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "12 4", "4 2 1 2 1 2")
_MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex")
_LEGEND = """:host { background-color: color-mix(in srgb, var(--ground) 75%, transparent) !important; }
.bk-label { color: var(--text) !important; }"""
_REST = "rest"  # of a round, beside its phases
_LAST = {"evaluate": ("#9aa3ac", "."), _REST: ("#dde1e5", "x")}
_BAR = "method, settings"  # a column's name, which no phase has
_MARKS = 20  # markers per curve, at most
_POINTS = 400  # of a curve over the rounds, at most
_BARS = 60  # at most
_NUMBERS = {"million examples": 1e6, "thousand examples": 1e3, "examples": 1.0}
_TALL = 380  # pixels, of a chart with a legend above its frame
_GAP = 0.08  # between the units of a map, of a row
_STACKED_WORKERS = 16  # more are one bar


def metric_figures(series: Sequence[Series], link: Link) -> dict[str, figure]:
    """The metric on the test set against exchanged bytes, modelled time and examples.

    The page's script redraws modelled time.

    A thin line per run; a thick one with markers for their mean, in a band of one standard error, which the
    frame is never lower than. No mean where runs share no evaluated round.
    """
    largest = max(curve.examples[-1] for s in series for curve in s.curves())
    many, number = next(((name, n) for name, n in _NUMBERS.items() if largest >= n), ("examples", 1.0))
    metric = series[0].runs[0].metric
    what, unit = metric.name.replace("_", " "), " %" if metric.percent else ""
    titles = {
        "exchanged": (f"{what.capitalize()} against bytes exchanged", "exchanged by a worker (MB)"),
        "time": (f"{what.capitalize()} against modelled time", "modelled time (s)"),
        "examples": (f"{what.capitalize()} against examples", f"seen by all workers ({many})"),
    }
    label = f"test {what}{unit and ' (%)'}"
    figures = {name: _figure(*text, label) for name, text in titles.items()}
    for index, one in enumerate(series):
        means = [mean] if len((mean := one.mean()).round) else []
        for curve, seed in _curves(one, one.curves(), means):
            time = modelled_seconds(curve.seconds_local, curve.bytes_sent, curve.messages, link)
            places = {"exchanged": curve.exchanged / 1e6, "time": time, "examples": curve.examples / number}
            for name, x in places.items():
                columns = {
                    "x": x,
                    "y": curve.value,
                    "round": curve.round,
                    "stage": _stage_of(one, curve.round),
                }
                columns |= {} if seed else _band(curve)
                if name == "time":  # made of these, for the page's script
                    columns |= {"seconds_local": curve.seconds_local, "bytes_sent": curve.bytes_sent}
                    columns |= {"messages": curve.messages}
                _add_curve(figures[name], columns, index, one.label, seed)
        seen = np.concatenate([[0], one.runs[0].column("examples")[:-1]]) / number
        _mark_stages(figures["examples"], one.runs[0], seen, METHODS[index % len(METHODS)])
    form, corner = (
        ("0.00" if unit else "0.[0000]"),
        "bottom_right" if metric.higher_is_better else "top_right",
    )
    for name, fig in figures.items():
        tooltips = [
            ("round", "@round{0,0} (@stage)"),
            (titles[name][1], "@x{0,0.[00]}"),
            (what, f"@y{{{form}}}{unit}"),
        ]
        _finish_curves(fig, tooltips, corner, len(series))
        fig.x_range.start = 0  # type: ignore[attr-defined]
    return figures


def training_figures(series: Sequence[Series]) -> dict[str, figure]:
    """The training loss and the learning rate of every round; in long runs a point is a mean of several."""
    figures = {
        "loss": _figure("Training loss", "round", "loss, mean of workers"),
        "lr": _figure("Learning rate", "round", "learning rate"),
    }
    for index, one in enumerate(series):
        losses = [run.column("train_loss") for run in one.runs]
        common = np.mean([loss[: min(map(len, losses))] for loss in losses], 0)
        rates = one.runs[0].column("lr")
        drawn = [("loss", *curve) for curve in _curves(one, losses, [common])] + [("lr", rates, "")]
        for name, values, seed in drawn:
            middles, means, _ = _windows(values, _POINTS)
            columns = {"x": middles, "y": means, "stage": _stage_of(one, middles)}
            _add_curve(figures[name], columns, index, one.label, seed)
        for fig in figures.values():
            _mark_stages(fig, one.runs[0], 0.5 + np.arange(len(rates)), METHODS[index % len(METHODS)])
    for fig, place in zip(figures.values(), ("top_right", "bottom_left"), strict=True):
        tooltips = [("round", "@x{0,0.[0]} (@stage)"), (str(fig.yaxis.axis_label), "@y{0.[00000]}")]
        _finish_curves(fig, tooltips, place, len(series))
        _count_rounds(fig)
    figures["lr"].y_range.start = 0  # type: ignore[attr-defined]
    return figures


def _stage_of(one: Series, rounds: np.ndarray) -> np.ndarray:
    """The names of the stages of a series' first run, by rounds counted from 1, which may lie between two."""
    return one.runs[0].stages()[np.minimum(rounds.astype(int), len(one.runs[0].records)) - 1]


def _mark_stages(fig: figure, run: RunFiles, starts: np.ndarray, color: str) -> None:
    """Where a stage of a run begins, if it has several: a line with its name. `starts`: by round, where."""
    names = run.stages()
    begins = np.flatnonzero(names[1:] != names[:-1]) + 1
    for number, begin in enumerate([0, *begins] if len(begins) else ()):
        if number:
            fig.add_layout(
                Span(location=starts[begin], dimension="height", line_color=color, line_dash="dotted")
            )
        place: dict[str, Any] = {"x": starts[begin], "y": 2 + 14 * (number % 3), "y_units": "screen"}
        fig.add_layout(Label(text=names[begin], text_color=color, text_font_size="12px", x_offset=3, **place))


def _curves(one: Series, runs: Sequence[Any], means: Sequence[Any]) -> list[tuple[Any, str]]:
    """What is drawn of a series: of each run, if there are several, with its seed in words; and the mean."""
    seeds = [f", seed {run.config['seed']}" for run in one.runs]
    return [*(zip(runs, seeds, strict=True) if len(runs) > 1 else []), *((mean, "") for mean in means)]


def _band(curve: Curve) -> Columns:
    if not np.isfinite(curve.standard_error).all():  # the size of the test set is not known
        return {}
    return {
        "lower": curve.value - curve.standard_error,
        "upper": curve.value + curve.standard_error,
    }


def _add_curve(fig: figure, columns: Columns, index: int, label: str, seed: str) -> None:
    """A line, thin where it is of a seed; else, or where it is one point, markers; and its band."""
    size, color = len(columns["x"]), METHODS[index % len(METHODS)]
    source = ColumnDataSource(columns | {"label": [label + seed] * size})
    looks: dict[str, Any] = {"source": source, "color": color, "legend_label": label}
    if "lower" in columns:
        if size > 1:
            fig.varea("x", "lower", "upper", alpha=0.15, **looks)
        else:
            fig.segment("x", "lower", "x", "upper", alpha=0.4, line_width=6, **looks)
    width, alpha = (1.2, 0.75) if seed else (2.5, 1)
    dash = _DASHES[index % len(_DASHES)]
    fig.line("x", "y", line_dash=dash, line_width=width, alpha=alpha, **looks)
    if not seed or size == 1:  # a line through one point would not be seen
        marked = range(size - 1, -1, -max(1, -(-size // _MARKS)))  # the last point always
        view = CDSView(filter=IndexFilter(indices=sorted(marked)))
        marker = _MARKERS[index % len(_MARKERS)]
        fig.scatter("x", "y", view=view, marker=marker, size=5 if seed else 8, name="points", **looks)


def _finish_curves(fig: figure, tooltips: list[tuple[str, str]], place: Any, many: int) -> None:
    points = [renderer for renderer in fig.renderers if renderer.name == "points"]
    fig.add_tools(HoverTool(tooltips=[("", "@label"), *tooltips], renderers=points))  # type: ignore[arg-type]
    fig.legend.location, fig.legend.click_policy = place, "hide"
    fig.legend.visible = many > 1
    _plain(fig)


def _plain(fig: figure) -> None:
    """Makes a legend take little room, in the page's colours."""
    fig.legend.update(
        stylesheets=[_LEGEND], label_text_font_size="12px", label_height=14, glyph_height=14,
        spacing=2, padding=5, margin=5, background_fill_alpha=0.7,
    )  # fmt: skip


def phase_styles(runs: Sequence[RunFiles]) -> Styles:
    """Colour and hatching of every phase that a run had, in order; then of the evaluation and the rest."""
    names = dict.fromkeys(phase for run in runs for phase in run.phases if phase not in _LAST)
    return dict(zip(names, itertools.cycle(PHASES), strict=False)) | _LAST


def phase_figure(series: Sequence[Series]) -> figure:
    """Mean time of a round per series, split into its phases; one bar each."""
    styles = phase_styles([run for one in series for run in one.runs])
    labels = [one.label for one in series][::-1]
    height = 140 + 34 * len(labels)
    fig = _figure("Time of a round by phase", "mean over rounds (ms)", "", y_range=labels, height=height)
    means = [1000 * np.mean([_split_rounds(run, styles).mean(1) for run in s.runs], 0) for s in series[::-1]]
    columns = dict(zip(styles, np.transpose(means), strict=True))
    _stack(fig, fig.hbar_stack, ColumnDataSource({_BAR: labels} | columns), styles, y=_BAR, height=0.7)
    fig.x_range.start = 0  # type: ignore[attr-defined]
    fig.ygrid.visible = False
    return fig


def phase_history_figure(run: RunFiles, label: str, styles: Styles) -> figure:
    """The same over the rounds of a run; in long runs a bar is the mean of several rounds."""
    middles, means, width = _windows(1000 * _split_rounds(run, styles), _BARS)
    source = ColumnDataSource({"round": middles} | dict(zip(styles, means, strict=True)))
    where = "round" if width == 1 else f"round (a bar: the mean of {width})"
    fig = _figure(f"{label}: rounds by phase", where, "time (ms)", height=_TALL)
    _stack(fig, fig.vbar_stack, source, styles, x="round", width=0.8 * width)
    _mark_stages(fig, run, 0.5 + np.arange(len(run.records)), PHASES[0][0])
    fig.y_range.start = 0  # type: ignore[attr-defined]
    fig.xgrid.visible = False
    _count_rounds(fig)
    return fig


def _count_rounds(fig: figure) -> None:
    """Whole numbers from 1 along the axis."""
    fig.x_range.start = 0.5  # type: ignore[attr-defined]
    fig.xaxis.ticker = BasicTicker(min_interval=1, desired_num_ticks=5)


def _split_rounds(run: RunFiles, names: Iterable[str]) -> np.ndarray:
    """Seconds [names, rounds] of a run's phases; the rest is the host's work between them."""
    seconds = {name: run.seconds(name) for name in names if name != _REST}
    seconds[_REST] = np.maximum(0, run.column("seconds_round") - sum(seconds.values()))
    return np.array([seconds[name] for name in names])


def _windows(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Windows of the last axis, rounds: their middles, counted from 1, the means, and how wide they are."""
    total = values.shape[-1]
    width = -(-total // most)
    starts = np.arange(0, total, width)
    sizes = np.diff([*starts, total])
    return starts + (1 + sizes) / 2, np.add.reduceat(values, starts, axis=-1) / sizes, width


def _stack(fig: figure, stack: Callable, source: ColumnDataSource, styles: Styles, **where: Any) -> None:
    colors, hatches = zip(*styles.values(), strict=True)
    stack(list(styles), source=source, fill_color=list(colors), hatch_pattern=list(hatches),
          hatch_color="black", hatch_alpha=0.5, hatch_scale=6, line_color=None,
          legend_label=list(styles), **where)  # fmt: skip
    fig.add_tools(HoverTool(tooltips=[("phase", "$name"), ("ms", "@$name{0,0.00}")]))
    _legend_above(fig, columns=3)


def _legend_above(fig: figure, columns: int) -> None:
    """Moves the legend of what fills its frame to above the frame."""
    fig.add_layout(fig.legend[0], "above")
    fig.legend.update(orientation="horizontal", ncols=columns, border_line_color=None)
    _plain(fig)


def map_figures(units: UnitMap) -> dict[str, figure]:
    """Who trained which unit in which round and how often; of more than `MAPPED` units how many how often."""
    if len(units.columns):
        return {"map": _map_figure(units), "counts": _counts_figure(units)}
    return {"coverage": _coverage_figure(units)}


def worker_colors(num_workers: int) -> list[str]:
    """A colour per worker."""
    if num_workers <= len(WORKERS):
        return list(WORKERS[:num_workers])
    return list(interp_palette(("#5a3280", "#dcd0ea", "#f1eab8", "#8a8420"), min(256, num_workers)))


def _map_figure(units: UnitMap) -> figure:
    wide = int(units.columns[1] - units.columns[0]) if len(units.columns) > 1 else 1
    column, worker, unit = np.nonzero(units.trained)
    share = units.trained.sum(1)[column, unit]  # a unit of several workers: its cell is divided among them
    place = (units.trained.cumsum(1) - 1)[column, worker, unit]
    tall = 1 - _GAP
    left, top = units.columns[column] - 0.5, unit - 0.5 + place / share * tall
    x_range = (units.columns[0] - 0.5, units.columns[-1] - 0.5 + wide)
    where = "round" if wide == 1 else f"round (one in {wide} shown)"
    fig = _figure(f"{units.group.name}: who trained what, by worker", where, _unit_label(units), height=_TALL,
                  x_range=x_range, y_range=(units.group.total - 0.5, -0.5))  # fmt: skip
    columns = {"left": left, "right": left + wide, "top": top, "bottom": top + tall / share}
    columns |= {"round": units.columns[column], "unit": unit, "worker": worker}
    _add_cells(fig, columns, units, [("round", "@round"), ("unit", "@unit"), ("worker", "@worker")])
    fig.grid.visible = False
    return fig


def _counts_figure(units: UnitMap) -> figure:
    title = f"{units.group.name}: how often, by worker"
    fig = _figure(title, _unit_label(units), f"times in {len(units.rounds):,} rounds", height=_TALL)
    tooltips = [("unit", "@unit"), ("worker", "@worker"), ("times", "@count")]
    _add_bars(fig, "unit", np.arange(units.group.total + 1), _by_worker(units.counts), units, tooltips)
    return fig


def _coverage_figure(units: UnitMap) -> figure:
    least, most = units.counts.min(), units.counts.max()
    edges = np.arange(least, most + 2 * (width := 1 + (most - least) // _BARS), width)
    bars = _by_worker(np.stack([np.histogram(own, edges)[0] for own in units.counts]))
    label = f"times that a worker trained a unit, in {len(units.rounds):,} rounds"
    label += f" (a bar: {width} values)" if width > 1 else ""
    fig = _figure(f"{units.group.name}: coverage, by worker", label, "units, all workers", height=_TALL)
    tooltips = [("times", "@times"), ("worker", "@worker"), ("units", "@count{0,0}")]
    _add_bars(fig, "times", edges, bars, units, tooltips)
    return fig


def _unit_label(units: UnitMap) -> str:
    return f"unit, {units.group.size:,} in each layer" if units.group.layers else "unit"


def _by_worker(counts: np.ndarray) -> np.ndarray:
    return counts if len(counts) <= _STACKED_WORKERS else counts.sum(0, keepdims=True)


def _add_bars(
    fig: figure, name: str, edges: np.ndarray, bars: np.ndarray, units: UnitMap, tips: list[tuple[str, str]]
) -> None:
    """Bars [S, n] of the workers, stacked, between n + 1 edges."""
    worker, bar = np.nonzero(bars)
    top = bars.cumsum(0)[worker, bar]
    columns = {"left": edges[bar] - 0.5, "right": edges[bar + 1] - 0.5, "bottom": top - bars[worker, bar]}
    columns |= {"top": top, name: edges[bar], "count": bars[worker, bar], "worker": worker}
    _add_cells(fig, columns, units, tips)
    fig.y_range.start = 0  # type: ignore[attr-defined]
    fig.xgrid.visible = False


def _add_cells(fig: figure, columns: Columns, units: UnitMap, tooltips: list[tuple[str, str]]) -> None:
    """Rectangles in the workers' colours; the page's script fades all but a chosen worker's."""
    colors, worker = worker_colors(units.group.num_workers), columns["worker"]
    looks = {"color": [colors[w % len(colors)] for w in worker], "alpha": np.ones(len(worker))}
    few = 1 < len(np.unique(worker)) <= _STACKED_WORKERS
    legend: Any = {"legend_group": "worker"} if few else {}
    cells = fig.quad("left", "right", "top", "bottom", source=ColumnDataSource(columns | looks),
                     fill_color="color", fill_alpha="alpha", line_color=None, **legend)  # fmt: skip
    fig.add_tools(HoverTool(tooltips=tooltips, renderers=[cells]))
    fig.axis.ticker = BasicTicker(min_interval=1, desired_num_ticks=5)
    if few:
        _legend_above(fig, columns=8)


def _figure(title: str, x_label: str, y_label: str, *, height: int = 320, **ranges: Any) -> figure:
    fig: Any = figure(
        title=title, height=height, sizing_mode="stretch_both", toolbar_location=None, tools="",
        x_axis_label=x_label, y_axis_label=y_label, min_border_right=14, **ranges,
    )  # fmt: skip
    fig.title.text_font_size = "14px"
    fig.axis.axis_label_text_font_style = "normal"
    fig.axis.axis_label_text_font_size = fig.axis.major_label_text_font_size = "13px"
    fig.select(LinearAxis).formatter = Numerals(format="0,0.[0000]")
    fig.select(LinearAxis).ticker.desired_num_ticks = 5
    return fig
