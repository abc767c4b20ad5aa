"""The notebooks run from top to bottom, bring no algorithm of their own, and are kept without outputs."""

import ast
import os
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN = """
import sys
import nbformat
from nbclient import NotebookClient

path, folder = sys.argv[1:]
notebook = nbformat.read(path, as_version=4)
where = {"metadata": {"path": folder}}
NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
nbformat.write(notebook, f"{folder}/executed.ipynb")
"""


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_are_three():
    names = ["01_ist_mlp", "02_resist_resnet", "03_bring_your_own_model"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_kept(path):
    for cell in code_cells(path):
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_method_is_imported_and_not_defined(path):
    text = "\n".join(cell.source for cell in code_cells(path))
    tree = ast.parse(text)
    modules = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "ist_jax" in modules
    assert "optax" not in text
    calls = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not calls & {"grad", "value_and_grad", "vjp", "pmap", "shard_map", "permutation"}
    assert "lax" not in calls


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
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


@pytest.mark.parametrize(
    "path",
    NOTEBOOKS,
    ids=lambda path: path.stem,
)
@pytest.mark.slow
def test_it_runs_from_top_to_bottom(path, tmp_path):
    environment = os.environ | {"IST_JAX_SMOKE": "1", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = code_cells(tmp_path / "executed.ipynb")
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    text = "".join(output.get("text", "") for output in outputs)
    assert "local_sgd: test accuracy " in text
    (report,) = re.findall(r"as a page.*: (\S+report\.html)", text)
    assert os.path.getsize(report) > 1e6
