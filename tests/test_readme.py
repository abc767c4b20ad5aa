"""README, CONTRIBUTING and the claims name what is there, and show what is recorded."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT, get_config

from ist_jax import cli, main
from ist_jax.workdir import files

PAGES = ("README.md", "CONTRIBUTING.md", "docs/claims.md")
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
README = TEXTS["README.md"]


def code(text):
    """What stands in backticks, and every line of a block but of a Python one."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


CODE = {(page, piece) for page, text in TEXTS.items() for piece in code(text)}
COMMANDS = sorted({piece.split("  ")[0] for _, piece in CODE if re.match(r"(python|make) ", piece)})


def anchors(path):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.fixture
def picture(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import picture

    return picture


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", TEXTS[page])
    links = ["".join(pair) for pair in links if not "".join(pair).startswith("https://")]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_the_picture_and_the_table_are_what_is_recorded(picture):
    results = picture.read()
    for name, theme in picture.THEMES.items():
        assert (ROOT / f"benchmarks/picture-{name}.svg").read_text() == picture.draw(results, theme)
    assert picture.table(results) in README
    for result in results.values():
        assert {"command", "hardware", "date", "version"} <= result.keys()
        for figures in result["methods"].values():
            each = figures["each"]
            assert len(each) == figures["runs"]
            assert sum(each) / len(each) == pytest.approx(figures["accuracy"], abs=0.05)


def test_the_picture_moves_with_a_result(picture):
    results, theme = picture.read(), picture.THEMES["dark"]
    before = picture.draw(results, theme)
    points = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', before)
    assert len(points) == 3 * len(picture.PANELS)
    for x, y in points:  # in the frame
        assert picture.LEFT <= float(x) <= picture.WIDTH - picture.RIGHT
        assert picture.TOP <= float(y) <= picture.HEIGHT - picture.BOTTOM
    results["cifar10"]["methods"]["ist"]["accuracy"] += 1
    (_, moved), *others = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', picture.draw(results, theme))
    height = picture.HEIGHT - picture.TOP - picture.BOTTOM
    assert float(points[0][1]) - float(moved) == pytest.approx(height / picture.SPAN, abs=0.11)  # higher up
    assert others == points[1:]


def test_what_is_recorded_is_what_was_measured(picture):
    measured = [
        line for line in (ROOT / "benchmarks/RESULTS.md").read_text().splitlines() if line[0:1] == "|"
    ]
    for name in ("cifar10", "delicious", "speech"):
        for figures in picture.read()[name]["methods"].values():
            accuracy = f"{figures['accuracy']:.{1 if figures['runs'] == 1 else 2}f}"
            cells = (accuracy, f"{figures['megabytes']:,}")
            assert any(all(cell in line for cell in cells) for line in measured), (name, figures)


@pytest.mark.parametrize("page", ["README.md", "docs/claims.md"])
def test_the_honest_figures_are_told(page, picture):
    for figures in picture.read()["cifar10"]["methods"].values():
        assert str(figures["accuracy"]) in README.split("## Two commands")[0]
        assert str(figures["accuracy"]) in TEXTS[page]


class Parsed(Exception):
    """The flags of a command are right."""


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_real(command, monkeypatch):
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    if words[:2] == ["-m", "pytest"]:
        path, option, name = words[2:]
        assert option == "-k"
        assert re.search(rf"^def test_\w*{name}", (ROOT / path).read_text(), re.M)
        return
    if words[0] == "-m":
        module, given = importlib.import_module(words[1]), words[2:]
    else:
        path = ROOT / words[0]
        module, given = importlib.import_module(path.stem), words[1:]
        assert path.samefile(module.__file__)
    if not hasattr(module, "main"):
        assert given == []
        return
    parse = cli.parse

    def parse_alone(*args, **kwargs):
        parse(*args, **kwargs | {"required": []})  # a document may name a command alone
        raise Parsed

    monkeypatch.setattr(cli, "parse", parse_alone)
    with pytest.raises(Parsed):
        module.main([words[0], *(word for word in given if word != "--help")])


def test_commands_are_found():
    assert {"make run", "make test", "python benchmarks/digits.py"} <= set(COMMANDS)
    assert sum(command.startswith("python -m ist_jax.") for command in COMMANDS) >= 5


def test_keys_and_files_that_are_named_exist():
    keys = set(get_config("resnet").to_dict()) | set(get_config("mlp").to_dict())
    experiments = [get_config("resnet"), get_config("mlp")]
    named = {key for _, piece in CODE for key in re.findall(r"--config\.([a-z_.]+)", piece)}
    assert len(named) >= 3
    for key in named:
        levels = key.split(".")
        assert levels[0] in keys
        assert any(len(levels) == 1 or levels[1] in config.get(levels[0], ()) for config in experiments), key
    paths = {piece for _, piece in CODE if re.fullmatch(r"\.?[\w/]*(/|\.py|\.json|\.md|\.ci/run)", piece)}
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "ist_jax" / path).exists(), path


def test_the_model_of_the_readme_trains(tmp_path, monkeypatch):
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(block.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(block)
    flags = [f"--config={ROOT}/configs/mlp.py:smoke", "--config.model.name=own.py:Net", "--workdir=run"]
    assert main.main(["main", *flags, "--config.local_steps=20"]) == 0
    records = files.read_records(tmp_path / "run")
    assert records[-1]["train_loss"] < 0.8 * records[0]["train_loss"]


def test_the_citation_names_both_papers():
    citation = (ROOT / "CITATION.cff").read_text()
    for paper in ("1910.02120", "2107.00961"):
        assert paper in citation
        assert paper in README
    for title in re.findall(r"^  title = \{(.*)\}", README, re.M):
        assert re.sub("[{}]", "", title) in citation
    assert README.count("  title = ") == 2
