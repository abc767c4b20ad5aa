"""The figures of a report, with Bokeh: each an independent item that the page embeds.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; curves differ in dash and marker
too, stacked parts in hatching. Colours of the frame are left to the page's style sheet (light and dark).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from bokeh.models import CDSView, ColumnDataSource, HoverTool, IndexFilter, LinearAxis, NumeralTickFormatter
from bokeh.palettes import viridis
from bokeh.plotting import figure

from ist_jax.report.runs import Curve, RunFiles, Series, UnitMap, modelled_seconds

Columns = dict[str, np.ndarray]
Styles = dict[str, tuple[str, str]]  # colour and hatching, by phase
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442", "#999999")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "12 4", "4 2 1 2 1 2")
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex")
_REST = "rest"  # of a round, beside its phases
_LAST = {"evaluate": ("#CC79A7", "."), _REST: ("#999999", "x")}  # colour and hatching
_PHASES = (("#0072B2", "/"), ("#E69F00", " "), ("#009E73", "\\"), ("#56B4E9", "-"), ("#D55E00", "|"))
_BAR = "where a bar stands"  # a column's name, which no phase has
_MARKS = 20  # markers per curve, at most
_BARS = 60  # bars over the rounds, at most
_UNITS = 64  # bars over the units, at most
_NUMBERS = {"million examples": 1e6, "thousand examples": 1e3, "examples": 1.0}
_BYTES = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1.0}
_GAP = 0.08  # between the units of a map, of a row
_STACKED_WORKERS = 16  # more are one bar


def style(index: int) -> dict[str, str]:
    """Colour, dash and marker of the i-th series."""
    return {name: values[index % len(values)] for name, values in
            (("color", COLORS[:6]), ("dash", DASHES), ("marker", MARKERS))}  # fmt: skip


def accuracy_figures(series: Sequence[Series], bits_per_second: float) -> dict[str, figure]:
    """Test accuracy against examples, bytes and modelled time; the page's script redraws the last.

    A thin line per run, a thick one with markers for their mean; none where runs share no evaluated round.
    """
    curves = [curve for s in series for curve in s.curves()]
    number, many = _unit(max(curve.examples[-1] for curve in curves), _NUMBERS)
    size, unit = _unit(max(curve.bytes_sent[-1] for curve in curves), _BYTES)

    def places(curve: Curve) -> Columns:
        modelled = modelled_seconds(curve.seconds_local, curve.bytes_sent, bits_per_second)
        return {"examples": curve.examples / number, "bytes": curve.bytes_sent / size, "time": modelled}

    labels = {"examples": f"seen by all workers ({many})", "bytes": f"sent by a worker ({unit})"}
    labels["time"] = "modelled time (s)"
    figures = {name: _figure(label, "test accuracy (%)") for name, label in labels.items()}
    for index, one in enumerate(series):
        runs = [(curve, True) for curve in one.curves()] if len(one.runs) > 1 else []
        means = [(mean, False)] if len((mean := one.mean()).round) else []
        for curve, thin in runs + means:
            for name, x in places(curve).items():
                columns = {"x": x, "y": curve.accuracy, "round": curve.round, "label": [one.label] * len(x)}
                if name == "time":  # made of these, for the page's script
                    columns |= {"seconds_local": curve.seconds_local, "bytes_sent": curve.bytes_sent}
                _add_curve(figures[name], ColumnDataSource(columns), style(index), thin)
    for name, fig in figures.items():
        fig.x_range.start = 0  # type: ignore[attr-defined]
        tooltips = [("", "@label"), ("round", "@round{0,0}"), (labels[name], "@x{0,0.[00]}")]
        points = [renderer for renderer in fig.renderers if renderer.name == "points"]
        fig.add_tools(HoverTool(tooltips=[*tooltips, ("test accuracy", "@y{0.00} %")], renderers=points))  # type: ignore[arg-type]
    return figures


def _unit(largest: float, units: dict[str, float]) -> tuple[float, str]:
    """How many there are in the unit that suits a largest value, and the unit."""
    return next(((size, name) for name, size in units.items() if largest >= size), (1.0, list(units)[-1]))


def _add_curve(fig: figure, source: ColumnDataSource, style: dict[str, str], thin: bool) -> None:
    color, size = style["color"], len(source.data["x"])
    width, alpha = (1.2, 0.75) if thin else (2.5, 1)
    fig.line("x", "y", source=source, color=color, line_dash=style["dash"], line_width=width, alpha=alpha)
    if not thin or size == 1:  # a line through one point would not be seen
        marked = range(size - 1, -1, -max(1, -(-size // _MARKS)))  # the last point always
        view = CDSView(filter=IndexFilter(indices=sorted(marked)))
        fig.scatter("x", "y", source=source, view=view, marker=style["marker"],
                    size=5 if thin else 8, color=color, name="points")  # fmt: skip


def phase_styles(runs: Sequence[RunFiles]) -> Styles:
    """Colour and hatching of every phase that a run had, in order; then of the evaluation and the rest."""
    names = dict.fromkeys(phase for run in runs for phase in run.phases if phase not in _LAST)
    return dict(zip(names, itertools.cycle(_PHASES), strict=False)) | _LAST


def phase_figure(series: Sequence[Series]) -> figure:
    """Mean time of a round per series, split into its phases; one bar each."""
    styles = phase_styles([run for one in series for run in one.runs])
    labels = [one.label for one in series][::-1]
    fig = _figure("time of a round, mean over rounds (ms)", "", y_range=labels, height=80 + 34 * len(labels))
    means = [1000 * np.mean([_split_rounds(run, styles).mean(1) for run in s.runs], 0) for s in series[::-1]]
    columns = dict(zip(styles, np.transpose(means), strict=True))
    _stack(fig, fig.hbar_stack, ColumnDataSource({_BAR: labels} | columns), styles, y=_BAR, height=0.7)
    fig.x_range.start = 0  # type: ignore[attr-defined]
    fig.ygrid.visible = False
    return fig


def phase_history_figure(run: RunFiles) -> figure:
    """The same over the rounds of a run; in long runs a bar is the mean of several rounds."""
    styles = phase_styles([run])
    seconds = _split_rounds(run, styles)
    total = seconds.shape[1]
    width = -(-total // _BARS)
    starts = np.arange(0, total, width)
    middle = [(start + 1 + min(start + width, total)) / 2 for start in starts]
    means = 1000 * np.add.reduceat(seconds, starts, axis=1) / np.diff([*starts, total])
    source = ColumnDataSource({_BAR: middle} | dict(zip(styles, means, strict=True)))
    label = "round" if width == 1 else f"round (a bar: the mean of {width})"
    fig = _figure(label, "time of a round (ms)")
    _stack(fig, fig.vbar_stack, source, styles, x=_BAR, width=0.8 * width)
    fig.y_range.start = 0  # type: ignore[attr-defined]
    fig.xgrid.visible = False
    return fig


def _split_rounds(run: RunFiles, names: Iterable[str]) -> np.ndarray:
    """Seconds [names, rounds] of a run's phases; the rest is the host's work between them."""
    seconds = {name: run.seconds(name) for name in names if name != _REST}
    seconds[_REST] = np.maximum(0, run.column("seconds_round") - sum(seconds.values()))
    return np.array([seconds[name] for name in names])


def _stack(fig: figure, stack: Callable, source: ColumnDataSource, styles: Styles, **where: Any) -> None:
    colors, hatches = zip(*styles.values(), strict=True)
    stack(list(styles), source=source, fill_color=list(colors), hatch_pattern=list(hatches),
          hatch_color="black", hatch_alpha=0.5, hatch_scale=6, line_color=None, **where)  # fmt: skip
    fig.add_tools(HoverTool(tooltips=[("phase", "$name"), ("ms", "@$name{0,0.00}")]))


def map_figures(units: UnitMap) -> dict[str, figure]:
    """Who trained which unit in which round; and in how many rounds each worker trained each unit."""
    return {"map": _map_figure(units), "counts": _counts_figure(units)}


def worker_colors(num_workers: int) -> list[str]:
    """A colour per worker."""
    return list(COLORS[:num_workers]) if num_workers <= len(COLORS) else list(viridis(min(256, num_workers)))


def _map_figure(units: UnitMap) -> figure:
    wide = int(units.columns[1] - units.columns[0]) if len(units.columns) > 1 else 1
    high = int(units.rows[1]) if len(units.rows) > 1 else units.group.size
    column, worker, row = np.nonzero(units.trained)
    share = units.trained.sum(1)[column, row]  # a unit of several workers: its cell is divided among them
    place = (units.trained.cumsum(1) - 1)[column, worker, row]
    tall = high * (1 - _GAP)
    left, top = units.columns[column] - 0.5, units.rows[row] - 0.5 + place / share * tall
    x_range = (units.columns[0] - 0.5, units.columns[-1] - 0.5 + wide)
    y_range = (units.rows[-1] - 0.5 + high, -0.5)
    label = f"unit of {units.group.name}" + _every(high)
    fig = _figure("round" + _every(wide), label, height=320, x_range=x_range, y_range=y_range)
    columns = {"left": left, "right": left + wide, "top": top, "bottom": top + tall / share}
    columns |= {"round": units.columns[column], "unit": units.rows[row], "worker": worker}
    _add_cells(fig, columns, units, [("round", "@round"), ("unit", "@unit"), ("worker", "@worker")])
    fig.grid.visible = False
    return fig


def _counts_figure(units: UnitMap) -> figure:
    size = units.group.size
    width = -(-size // _UNITS)
    starts = np.arange(0, size, width)
    widths = np.diff([*starts, size])
    counts = units.counts if len(units.counts) <= _STACKED_WORKERS else units.counts.sum(0, keepdims=True)
    bars = np.add.reduceat(counts, starts, axis=1) / widths
    worker, bar = np.nonzero(bars)
    top = bars.cumsum(0)[worker, bar]
    left = starts[bar] - 0.5
    label = f"unit of {units.group.name}" + (f" (a bar: the mean of {width})" if width > 1 else "")
    fig = _figure(label, f"trained (times in {len(units.rounds):,} rounds)", height=320)
    columns = {"left": left, "right": left + widths[bar], "bottom": top - bars[worker, bar], "top": top}
    columns |= {"unit": starts[bar], "count": bars[worker, bar], "worker": worker}
    _add_cells(fig, columns, units, [("unit", "@unit"), ("worker", "@worker"), ("rounds", "@count{0,0.[0]}")])
    fig.y_range.start = 0  # type: ignore[attr-defined]
    fig.xgrid.visible = False
    return fig


def _add_cells(fig: figure, columns: Columns, units: UnitMap, tooltips: list[tuple[str, str]]) -> None:
    """Rectangles in the workers' colours; the page's script fades all but a chosen worker's."""
    colors, worker = worker_colors(units.group.num_workers), columns["worker"]
    looks = {"color": [colors[w % len(colors)] for w in worker], "alpha": np.ones(len(worker))}
    cells = fig.quad("left", "right", "top", "bottom", source=ColumnDataSource(columns | looks),
                     fill_color="color", fill_alpha="alpha", line_color=None, name="cells")  # fmt: skip
    fig.add_tools(HoverTool(tooltips=tooltips, renderers=[cells]))


def _every(pitch: int) -> str:
    return "" if pitch == 1 else f" (one in {pitch} shown)"


def _figure(x_label: str, y_label: str, *, height: int = 300, **ranges: Any) -> figure:
    fig: Any = figure(
        height=height, sizing_mode="stretch_width", toolbar_location=None, tools="",
        x_axis_label=x_label, y_axis_label=y_label, min_border_right=14, **ranges,
    )  # fmt: skip
    fig.axis.axis_label_text_font_style = "normal"
    fig.axis.axis_label_text_font_size = fig.axis.major_label_text_font_size = "13px"
    fig.select(LinearAxis).formatter = NumeralTickFormatter(format="0,0.[000]")
    fig.xaxis.ticker.desired_num_ticks = 5
    return fig
