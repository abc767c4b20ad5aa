"""The picture and the table of README.md, from the results that benchmarks/results.json records.

    python benchmarks/picture.py

Writes benchmarks/picture-light.svg and picture-dark.svg, and prints the table. Every panel has the same axes:
20 points of accuracy, and the bytes that a worker exchanges in a run by the papers' count, on a log axis. The
pale bar around a point is two standard errors each way, from the number of test examples.
"""

import json
import math
from pathlib import Path

HERE = Path(__file__).parent
THEMES = {
    "light": {"ink": "#1f2328", "faint": "#59636e", "line": "#d1d9e0",
              "ist": "#0067a5", "local_sgd": "#b54f00", "data_parallel": "#007a5a"},
    "dark": {"ink": "#f0f6fc", "faint": "#9ea7b0", "line": "#3d444d",
             "ist": "#58b4f0", "local_sgd": "#f4975a", "data_parallel": "#3ccb9c"},
}  # fmt: skip
NAMES = {"ist": "{subnets}", "local_sgd": "local SGD", "data_parallel": "data-parallel"}
# result: lowest accuracy shown; where a method's label stands, above (-1) or below (1), and how aligned
PANELS = {
    "cifar10": (60, {"ist": (1, "start"), "local_sgd": (-1, "start"), "data_parallel": (1, "end")}),
    "delicious": (55, {"ist": (-1, "start"), "local_sgd": (1, "middle"), "data_parallel": (-1, "end")}),
    "speech": (45, {"ist": (-1, "middle"), "local_sgd": (-1, "start"), "data_parallel": (1, "end")}),
    "digits_mlp": (83, {"ist": (1, "start"), "local_sgd": (-1, "middle"), "data_parallel": (1, "end")}),
}
FONTS = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
SPAN = 20  # points of accuracy
MEGABYTES = (15, 60_000)
TICKS = {100: "100 MB", 1_000: "1 GB", 10_000: "10 GB"}
WIDTH, HEIGHT = 400, 312  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 48, 20, 66, 46  # around its frame


def read() -> dict[str, dict]:
    """The recorded results, by name."""
    return json.loads((HERE / "results.json").read_text())


def panel(result: dict, lowest: float, sides: dict, theme: dict[str, str]) -> list[str]:
    """The elements of a panel whose corner is at 0, 0."""

    def x(megabytes: float) -> float:
        low, high = map(math.log10, MEGABYTES)
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(megabytes) - low) / (high - low)

    def y(accuracy: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (accuracy - lowest) / SPAN

    def text(at_x: float, at_y: float, words: str, color: str, anchor: str = "middle", more: str = "") -> str:
        color = theme[color]
        return (
            f'<text x="{at_x:.1f}" y="{at_y:.1f}" fill="{color}" text-anchor="{anchor}"{more}>{words}</text>'
        )

    runs = max(figures["runs"] for figures in result["methods"].values())
    about = f"{result['measure']} %, {runs} run{'s' * (runs > 1)} each"
    lines = [
        text(LEFT, 24, f"{result['data']} · {result['model']}", "ink", "start", ' class="title"'),
        text(LEFT, 48, about, "faint", "start"),
    ]
    for accuracy in range(math.ceil(lowest / 5) * 5, min(100, lowest + SPAN) + 1, 5):
        at = f'y1="{y(accuracy):.1f}" y2="{y(accuracy):.1f}"'
        lines += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" {at} stroke="{theme["line"]}"/>',
            text(LEFT - 8, y(accuracy) + 6, str(accuracy), "faint", "end"),
        ]
    for megabytes, words in TICKS.items():
        at = f'x1="{x(megabytes):.1f}" x2="{x(megabytes):.1f}"'
        lines += [
            f'<line {at} y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{theme["line"]}" stroke-dasharray="2 4"/>',
            text(x(megabytes), HEIGHT - BOTTOM + 24, words, "faint"),
        ]
    for method, (side, anchor) in sides.items():
        accuracy, at = result["methods"][method]["accuracy"], x(result["methods"][method]["megabytes"])
        error = 200 * math.sqrt(accuracy / 100 * (1 - accuracy / 100) / result["test_examples"])
        low, high = y(accuracy - error), y(min(100, accuracy + error))
        label = f"{NAMES[method].format_map(result)} {accuracy:.1f}"
        place = {"start": at - 10, "middle": at, "end": WIDTH - RIGHT + 8}[anchor]
        lines += [
            f'<rect x="{at - 6:.1f}" y="{high:.1f}" width="12" height="{low - high:.1f}" rx="6" '
            f'fill="{theme[method]}" opacity="0.25"/>',
            f'<circle cx="{at:.1f}" cy="{y(accuracy):.1f}" r="7" fill="{theme[method]}"/>',
            text(place, y(accuracy) + 6 + 24 * side, label, method, anchor, ' class="label"'),
        ]
    return lines


def draw(results: dict[str, dict], theme: dict[str, str]) -> str:
    """The SVG: the panels in two columns, under one line that names the axes."""
    head = 40
    width, height = 2 * WIDTH, head + HEIGHT * math.ceil(len(PANELS) / 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="{FONTS}" font-size="19">',
        "<title>Accuracy against the bytes that a worker exchanges in a run</title>",
        "<style>.title, .label { font-weight: 600 } "
        ".title { font-size: 21px } .label { font-size: 20px }</style>",
        f'<text x="{LEFT}" y="24" fill="{theme["faint"]}">'
        "accuracy against what a worker exchanges in a run (log axis)</text>",
    ]
    for place, (name, (lowest, sides)) in enumerate(PANELS.items()):
        lines += [
            f'<g transform="translate({place % 2 * WIDTH} {head + place // 2 * HEIGHT})">',
            *panel(results[name], lowest, sides, theme),
            "</g>",
        ]
    return "\n".join([*lines, "</svg>\n"])


def table(results: dict[str, dict]) -> str:
    """The markdown table of README.md."""
    lines = ["| config | method | accuracy % (each run) | exchanged MB | seconds |", "|---|---|---|---|---|"]
    for result in results.values():
        config = f"`{result['config']}`" + ", P@1" * (result["measure"] == "P@1")
        for method, figures in result["methods"].items():
            each = f" ({', '.join(map(str, figures['each']))})" if figures["runs"] > 1 else ""
            accuracy = f"{figures['accuracy']:.{2 if each else 1}f}{each}"
            name = f"`{method}`" + f" ({result['subnets']})" * (method == "ist")
            lines.append(
                f"| {config} | {name} | {accuracy} | {figures['megabytes']:,} | {figures['seconds']} |"
            )
            config = ""
    return "\n".join(lines).replace("|  |", "| |")


if __name__ == "__main__":
    for name, theme in THEMES.items():
        (HERE / f"picture-{name}.svg").write_text(draw(read(), theme))
    print(table(read()))
