"""The evening's notebook: what is on its page is what its cells give."""

from __future__ import annotations

import re

import pytest
from run_notebook import NOTEBOOK, executed

nbformat = pytest.importorskip("nbformat")
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]\d+)?")


def outputs(notebook) -> list[tuple[str, int]]:
    """Of each cell of code: its text, and how many pictures it shows."""
    found = []
    for cell in (each.outputs for each in notebook.cells if each.cell_type == "code"):
        text = "".join(each.get("text", "") for each in cell)
        found.append((text, sum("image/png" in each.get("data", {}) for each in cell)))
    return found


def test_it_is_small_and_has_run():
    assert NOTEBOOK.stat().st_size < 3 << 20
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    runs = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert runs == [*range(1, len(runs) + 1)]
    assert sum(pictures for _, pictures in outputs(notebook)) >= 7


@pytest.mark.slow
def test_it_runs_and_says_what_stands_in_it():
    """Numbers agree but for what another CPU rounds otherwise; a checkpoint that was trained anew would be far off."""
    for (now, shown), (then, pictures) in zip(outputs(executed()), outputs(nbformat.read(NOTEBOOK, as_version=4)), strict=True):
        assert shown == pictures
        assert NUMBER.sub("#", now) == NUMBER.sub("#", then)
        numbers = [[float(each) for each in NUMBER.findall(text)] for text in (now, then)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.05)
