"""Runs the notebooks from top to bottom and stores them with their outputs: `make notebooks`.

python notebooks/renew.py [--to=DIR] [NOTEBOOK ...]

Two runs on one machine store the same bytes. The notebooks run on CPU, where their figures are functions of
their seeds, and are stored without progress lines (shown here instead), times and versions. A notebook that
fails stays as it was.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
SECONDS = 1800  # for a cell, at most


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """Of the code cells; it is stored with the outputs and tells when they are of other code."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def run(notebook: nbformat.NotebookNode) -> None:
    """Executes a notebook in an empty folder; shows its progress.

    Raises:
      CellExecutionError: a cell failed.
    """

    def show(cell, cell_index, execute_reply):
        for output in cell.outputs:
            if output.output_type == "stream":
                sys.stderr.write(output.text)

    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
            on_cell_executed=show,
        ).execute()


def strip(notebook: nbformat.NotebookNode) -> None:
    """Leaves what code and seeds make: no progress, no versions, no stream cut into parts by the clock."""
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["source_sha256"] = source_hash(notebook)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept = [output for output in cell.outputs if output.get("name") != "stderr"]
        cell.outputs = kept[:1]
        for output in kept[1:]:
            last = cell.outputs[-1]
            if output.output_type == last.output_type == "stream":
                last.text += output.text
            else:
                cell.outputs.append(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    parser.add_argument(
        "--to", type=Path, help="folder for the results; without it they replace the notebooks"
    )
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    for path in options.notebooks:
        print(f"{path.name} runs", file=sys.stderr)
        notebook = nbformat.read(path, as_version=4)
        try:
            run(notebook)
        except CellExecutionError as error:
            sys.exit(f"{path.name} failed and stays as it was: {error}")
        strip(notebook)
        nbformat.write(notebook, options.to / path.name if options.to else path)


if __name__ == "__main__":
    main()
