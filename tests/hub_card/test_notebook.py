"""The example notebook runs from its first cell to its last on the quickstart's model."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "hub_card" / "quickstart.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Runs a cell; returns the value of its last line where that is an expression, which a notebook shows."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.parametrize("folder", [".", "hub_card"])
def test_every_cell_runs_wherever_the_notebook_is_opened(folder, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    names: dict[str, Any] = {}
    shown = [run_cell(source, names) for source in CODE]
    as_html = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    assert len(as_html) >= 3, "two replies and a candidate show themselves"
    assert all('<img src="data:image/png' in html for html in as_html)
    assert "monkey" in names["reply"].text
    assert names["first"].best_image.id.startswith("duck in a purple hat")
    assert names["again"].best_image is None or names["again"].best_image.id != names["first"].best_image.id


def test_the_notebook_is_clean_and_well_formed():
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["nbformat_minor"] >= 5
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
