"""Runs docs/evening.ipynb and writes what comes out back into it.

python scripts/run_notebook.py           after the tiny checkpoint, or what the notebook calls has changed (a minute)
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "evening.ipynb"


def executed(path: Path = NOTEBOOK) -> nbformat.NotebookNode:
    """The notebook with fresh outputs.  Raises CellExecutionError, with the cell and its traceback."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)  # when it ran
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/jpeg", None)  # a picture a second time
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
    print(NOTEBOOK)
