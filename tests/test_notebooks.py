"""The notebooks run from top to bottom, bring no algorithm of their own and are stored with their outputs."""

import ast
import os
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_are_four():
    names = ["01_ist_mlp", "02_resist_resnet", "03_bring_your_own_model", "04_transformer"]
    assert [path.stem for path in NOTEBOOKS] == names


def outputs(path):
    return [output for cell in code_cells(path) for output in cell.outputs]


def texts(path):
    """What a reader sees, but for pictures."""
    return [output.get("text") or output.data["text/plain"] for output in outputs(path)]


def pictures(path):
    return [output for output in outputs(path) if "image/png" in output.get("data", {})]


def check_stored(path):
    """Of one run from top to bottom, without failures, progress or anything of the machine that it ran on."""
    assert path.stat().st_size < 1e6
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.metadata == {} for cell in cells)
    assert {output.output_type for output in outputs(path)} <= {"stream", "display_data", "execute_result"}
    assert {output.get("name", "stdout") for output in outputs(path)} == {"stdout"}
    assert len(pictures(path)) >= 2
    for text in texts(path):
        assert not re.search(r"""(^|[\s"'(=:])(/|[A-Z]:\\)\w""", text), f"an absolute path in {text!r}"
    assert nbformat.read(path, as_version=4).metadata.language_info == {"name": "python"}


@each_notebook
def test_it_is_stored_with_the_outputs_of_its_code(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    from renew import source_hash

    check_stored(path)
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.source_sha256 == source_hash(notebook), "the code has changed: make notebooks"


@each_notebook
def test_the_method_is_imported_and_not_defined(path):
    text = "\n".join(cell.source for cell in code_cells(path))
    tree = ast.parse(text)
    modules = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "ist_jax" in modules
    assert "optax" not in text
    calls = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not calls & {"grad", "value_and_grad", "vjp", "pmap", "shard_map", "permutation"}
    assert "lax" not in calls


@each_notebook
def test_the_first_cell_installs_where_nothing_is_installed(path, tmp_path):
    """In an interpreter without ist_jax the cell asks for an address; in this one it does nothing."""
    first = code_cells(path)[0].source
    for place, flags in ((ROOT, []), (tmp_path, ["-I", "-S"])):
        done = subprocess.run(
            [sys.executable, *flags, "-c", first], cwd=place, capture_output=True, text=True
        )
        assert (done.returncode == 0) == (place == ROOT)
    assert "set REPOSITORY to the address" in done.stderr
    assert not list(tmp_path.iterdir())


def renew(path, folder):
    """Runs a notebook as `make notebooks` does, but for smoke runs, and stores it in a folder."""
    environment = os.environ | {"IST_JAX_SMOKE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "notebooks" / "renew.py", f"--to={folder}", path]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@each_notebook
@pytest.mark.slow
def test_it_runs_from_top_to_bottom(path, tmp_path):
    done = renew(path, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    check_stored(tmp_path / path.name)
    text = "".join(texts(tmp_path / path.name))
    assert re.search(r"^local_sgd: test (accuracy \d|\d\.\d+ bits per byte)", text, re.M)
    assert "examples/s" in done.stderr
    assert f"runs/{path.stem}.html" in text
    assert len(pictures(tmp_path / path.name)) == len(pictures(path))


@pytest.mark.slow
def test_a_second_run_stores_the_same_bytes(tmp_path):
    path, stored = NOTEBOOKS[2], []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        assert renew(path, folder).returncode == 0
        stored.append((folder / path.name).read_bytes())
    assert stored[0] == stored[1]


def small_notebook(folder, *sources):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbformat.write(notebook, folder / "small.ipynb")
    return folder / "small.ipynb"


def test_what_the_clock_decides_is_not_stored(tmp_path):
    loud = "import sys\nfor _ in range(2):\n    print('a', flush=True)\n    print('b', file=sys.stderr)"
    path = small_notebook(tmp_path, loud, "1 + 1")
    (tmp_path / "out").mkdir()
    done = renew(path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "out" / path.name) == ["a\na\n", "2"]
    assert "b\n" in done.stderr


def test_a_notebook_that_fails_stays_as_it_was(tmp_path):
    path = small_notebook(tmp_path, "1 / 0")
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, ROOT / "notebooks" / "renew.py", path], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "small.ipynb failed and stays as it was" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert path.read_bytes() == before
