"""The pages of docs/: their code runs, their commands name what is there, and what is generated is whole."""

import importlib.util
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, get_config
from test_bring_your_own import NAMES
from test_pytorch import make_state_dict

from ist_jax import config, data, models, train
from ist_jax.deals import DEALS
from ist_jax.key import Key
from ist_jax.methods import METHODS
from ist_jax.workdir import files

spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)

DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
KEYS = (
    config.COMMON | data.options() | {n: key for m in models.MODELS.values() for n, key in m.options.items()}
)


def fenced(text, *languages):
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.S | re.M)
    return [block for language, block in blocks if language in languages]


# --- code -----------------------------------------------------------------------------------------

BLOCKS = [block for text in DOCS.values() for block in fenced(text, "python")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(data, "SETS", dict(data.SETS))
    return tmp_path


def run(block, **known):
    exec(compile(block, "docs", "exec"), known)
    return known


def small(block):
    return block.replace("mlp.get_config()", 'mlp.get_config("smoke")')


def run_a_draw(block, capsys):
    run(block)
    printed = [
        [int(unit) for unit in re.findall(r"\d+", line.split("holds")[1])]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert printed == generate.held(generate.drawn(generate.APART, 0))  # what the pictures show


def run_a_merge(block, capsys):
    known = run(block)
    assert np.array_equal(known["merged"]["head"]["kernel"], known["params"]["head"]["kernel"])


def run_a_trained_model(block, capsys):
    Path("own_model.py").write_text(next(b for b in BLOCKS if NAMES["own_model.py"] in b))
    known = run(small(block))
    right = np.asarray(known["classes"]) == data.open_data_set("digits", "").test.label
    summary = files.read_summary(Path("runs/residual"))
    assert right.mean() == pytest.approx(summary["test_accuracy"], abs=1e-6)
    assert summary["parameters_per_worker"] < summary["parameters"]


def run_own_data(block, capsys):
    images = np.random.default_rng(0).integers(0, 256, (2, 60, 5, 5, 1), dtype=np.uint8)
    labels = np.arange(60) % 2
    run(small(block), x_train=images[0], y_train=labels, x_test=images[1], y_test=labels)
    summary = json.loads(Path("runs/mine/summary.json").read_text())
    assert summary["data"] == "mine"
    assert summary["rounds"] == 3


def run_own_optimizer(block, capsys):
    run(small(block))
    rates = [record["lr"] for record in files.read_records(Path("runs/adamw"))]
    assert 0.0029 < rates[-1] < rates[0] < 0.0031


def run_loaded_parameters(block, capsys):
    summary = train.train(get_config("mlp", **{"model.hidden": (1024, 1024), "rounds": 1}), "runs/mlp")
    known = run(block)
    np.testing.assert_allclose(known["logits"], known["same"], atol=1e-4)
    right = np.asarray(known["logits"]).argmax(1) == data.open_data_set("digits", "").test.label
    assert right.mean() == pytest.approx(summary["test_accuracy"], abs=0.1)  # other batches' statistics


def run_from_torch(block, capsys):
    class Tensor(np.ndarray):
        def cpu(self):
            return self

        def numpy(self):
            return np.asarray(self)

    class Net:
        def state_dict(self):
            return {name: x.view(Tensor) for name, x in make_state_dict((1, 2), 4, "basic", "small").items()}

    cut = block.replace("(3, 4, 23, 3), width=64, num_classes=100", "(1, 2), width=4, num_classes=5")
    assert cut != block
    known = run(cut, net=Net())
    assert known["params"]["head"]["kernel"].shape == (8, 5)


RUNS = {  # by what stands in the block
    "partition.Group(": run_a_draw,
    "masking.merge(": run_a_merge,
    'load_model("runs/residual"': run_a_trained_model,
    "data.SETS[": run_own_data,
    "optax.adamw(": run_own_optimizer,
    'load_model("runs/mlp")': run_loaded_parameters,
    "from_torch(": run_from_torch,
}


@pytest.mark.parametrize("sign", RUNS)
def test_code_of_the_docs_runs(sign, place, capsys):
    (block,) = [block for block in BLOCKS if sign in block]
    RUNS[sign](block, capsys)


def test_every_block_of_code_is_run_by_a_test():
    signs = [*RUNS, *NAMES.values()]
    assert len(BLOCKS) == len(signs)
    for block in BLOCKS:
        assert len([sign for sign in signs if sign in block]) == 1, block


# --- commands -------------------------------------------------------------------------------------


def flags_of(path):
    """The flags that a program defines, by its source."""
    source = path.read_text()
    found = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)) | {"help"}
    return found | ({"config"} if "define_config(" in source else set())


def program(command):
    """The file that a command line runs; None: nothing of this project."""
    if found := re.search(r"python -m (ist_jax[\w.]*)", command):
        path = ROOT / found[1].replace(".", "/")
        return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    found = re.search(r"python (benchmarks/\w+\.py)", command)
    return ROOT / found[1] if found else None


def commands(text):
    """Command lines in blocks without a language and in inline code."""
    lines = "\n".join(fenced(text, "", "bash", "console", "sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    return [line.split("#")[0].strip() for line in lines]


def flags_in(command):
    return re.findall(r"(?<!\S)--(?:no)?([\w.]+)", command)


EVERY = {
    flag for path in [*ROOT.glob("ist_jax/**/*.py"), *ROOT.glob("benchmarks/*.py")] for flag in flags_of(path)
}


@pytest.mark.parametrize("page", DOCS)
def test_commands_name_programs_flags_keys_and_modes_that_are_there(page):
    for command in commands(DOCS[page]):
        path = program(command)
        known = EVERY if path is None else flags_of(path)
        own = path is not None or command.startswith("--")
        for flag in flags_in(command.partition("python ")[2] or command) if own else ():
            if flag.startswith("config."):
                assert flag.removeprefix("config.") in KEYS, command
            else:
                assert flag in known, command
        for target in re.findall(r"^make ([a-z-]+)", command):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(), command
    for name, mode in re.findall(r"configs/(\w+)\.py(?::(\w+))?", DOCS[page]):
        assert mode == "" or mode in generate.load(ROOT / "configs" / f"{name}.py").MODES, f"{name}:{mode}"


def test_the_commands_of_the_docs_are_found():
    found = [command for text in DOCS.values() for command in commands(text) if program(command)]
    assert {program(command).stem for command in found} >= {
        "main",
        "evaluate",
        "compare",
        "prepare",
        "__main__",
    }
    flags = [flag for command in found for flag in flags_in(command)]
    assert {"config", "workdir", "process_id", "config.method", "peak", "out"} <= set(flags)


@pytest.mark.parametrize("page", DOCS)
def test_keys_in_the_text_are_keys(page):
    prefixes = "|".join({name.split(".")[0] for name in KEYS if "." in name})
    for name in re.findall(rf"(?<![`}}])`((?:{prefixes})\.(?!py`)\w+)(?:=[^`]*)?`", DOCS[page]):
        assert name in KEYS, name


def test_methods_and_deals_are_named():
    for name in METHODS:
        assert f"| `{name}`" in DOCS["methods.md"]
    for name in DEALS:
        assert f"| `{name}`" in DOCS["methods.md"]


# --- what is generated ----------------------------------------------------------------------------


def entries():
    """The text under each key's heading."""
    parts = re.split(r"^### `(.*)`\n", generate.keys_page(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True)), parts[1::2]


def test_every_key_is_on_the_page_of_configs_once():
    texts, names = entries()
    assert len(names) == len(set(names))
    assert texts.keys() == KEYS.keys()
    for name, key in KEYS.items():
        assert key.help in texts[name], name
        assert key.allowed() in texts[name], name
        assert (f"`{key.default!r}`" if key.default is not None else "unset") in texts[name], name
        assert ("may change on resume" in texts[name]) == key.resume == config.may_change(name), name
    assert "{include} generated/keys.md" in DOCS["configs.md"]


def test_a_new_key_comes_onto_the_page_by_itself(monkeypatch):
    monkeypatch.setitem(config.COMMON, "optimizer.own", Key(3, "a thing of my own", least=2, resume=True))
    assert entries()[0]["optimizer.own"].startswith(
        "\na thing of my own\n\n(default: `3`; 2 or more; **may change on resume**)\n"
    )
    assert "`optimizer.own`" in generate.resume_list()


def test_every_mode_is_listed_with_what_it_sets():
    page = generate.modes_page()
    for name, mode in [("mlp", "smoke"), ("mlp", "speech3"), ("resnet", "imagenet")]:
        (line,) = re.findall(rf"^### `configs/{name}\.py:{mode}`\n\n(.*)$", page, re.M)
        made = get_config(name, mode)
        assert f"`local_steps={made.local_steps}`" in line and f"`batch_size={made.batch_size}`" in line
        assert "seed=" not in line  # the default
    assert page.count("### ") == sum(len(generate.load(p).MODES) for p in (ROOT / "configs").glob("*.py"))


def test_every_data_set_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", generate.sets_table(), re.M)
    assert dict(rows).keys() == data.SETS.keys()
    assert dict(rows)["cifar10"] == "32 x 32 x 3 | 10 | 50,000"


PICTURES = generate.pictures()
SVG = "{http://www.w3.org/2000/svg}"


def groups_of(name):
    """(title, colours of the filled boxes, texts) of each group of a picture."""
    for group in ElementTree.fromstring(PICTURES[name]).iter(f"{SVG}g"):
        fills = [box.get("fill") for box in group.iter(f"{SVG}rect") if box.get("fill") != "none"]
        yield group.find(f"{SVG}title").text, fills, [text.text for text in group.iter(f"{SVG}text")]


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_legible_in_light_and_dark_and_on_a_phone(name):
    root = ElementTree.fromstring(PICTURES[name])
    width, height = map(float, root.get("viewBox").split()[2:])
    texts = list(root.iter(f"{SVG}text"))
    for text in texts:
        assert text.get("fill") == "currentColor"
        assert float(text.get("font-size")) * 358 / width >= 12  # pixels, where a page is 390 wide
        assert 0 < float(text.get("y")) < height
        if text.get("text-anchor") is None:  # a letter takes 9.3 on average, in bold
            assert float(text.get("x")) + 10 * len(text.text) <= width, text.text
    for box in root.iter(f"{SVG}rect"):
        assert float(box.get("x")) + float(box.get("width")) <= width
        assert float(box.get("y")) + float(box.get("height")) <= height
    assert len(texts) > 10
    assert f"{{raw}} html\n:file: generated/{name}.svg" in DOCS["round.md"] + DOCS["units.md"]


def test_the_pictures_show_the_draws_of_the_package():
    apart, overlap = (generate.drawn(groups, 0) for groups in (generate.APART, generate.OVERLAP))
    rows = list(groups_of("partition"))
    for number, (assignment, first) in enumerate([(apart, 0), (overlap, 6)]):
        for worker, (title, fills, texts) in enumerate(rows[first : first + 3]):
            letters = [
                "abcdef"[unit] for unit in np.flatnonzero(np.isin(range(6), assignment.indices[worker]))
            ]
            assert len(letters) == 2 + number
            assert texts == [f"worker {worker}", *letters]
            assert set(fills) == {generate.COLORS[worker]}
            assert title.endswith(", ".join(letters))
    for worker, (_, fills, texts) in enumerate(list(groups_of("gather"))[3:]):
        letters = ["abcdef"[unit] for unit in apart.indices[worker]]
        assert texts == [
            f"worker {worker}",
            "shared",
            *(f"{x}{device}" for x in letters for device in range(3)),
        ]
        assert set(fills) == {generate.COLORS[worker]}
    for unit, (_, fills, texts) in enumerate(list(groups_of("merge"))[3:]):
        holders = [worker for worker in range(3) if unit in overlap.indices[worker]]
        assert fills == [generate.COLORS[worker] for worker in holders]
        assert texts == ["abcdef"[unit], "mean" if len(holders) > 1 else "copy"]


def test_the_pictures_of_units_show_the_same_draws():
    held = generate.held(generate.drawn(generate.APART, 0))
    colours = [generate.COLORS[w] for unit in range(6) for w in range(3) if unit in held[w]]
    for kind, rows in generate.KINDS.items():
        found = {texts[0]: fills for _, fills, texts in groups_of(kind)}
        assert found == {name: colours if dealt else [] for name, dealt in rows.items()}
    inputs, outputs = (generate.held(generate.drawn(generate.PAIR, 0, name)) for name in ("in", "out"))
    mine = [f"{a}{b}" for w in range(3) for a in inputs[w] for b in outputs[w]]
    shown = [text for _, _, texts in groups_of("pairs") for text in texts[1:]]
    assert sorted(shown) == sorted("abcdef"[int(a)] + "abcdef"[int(b)] for a, b in mine)
    assert len(shown) == 12  # 1 / 3 of 36


def test_what_would_not_change_is_not_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "plan_block", lambda: "plan")
    generate.write(tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert {"keys.md", "partition.svg", "notebooks/01_ist_mlp.ipynb"} <= names
    (tmp_path / "sets.md").write_text("old")
    for path in tmp_path.rglob("*.*"):
        os.utime(path, (1, 1))
    generate.write(tmp_path)
    assert [p.name for p in tmp_path.rglob("*.*") if p.stat().st_mtime != 1] == ["sets.md"]


@pytest.mark.slow
def test_the_plan_of_the_docs_is_printed_by_the_command():
    block = generate.plan_block()
    assert block.startswith("```\n$ python -m ist_jax.plan --config=configs/resnet.py:cifar100\n")
    assert "\nlocal_sgd " in block
