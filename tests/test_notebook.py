"""The quickstart notebook runs from top to bottom, on a tiny model (`make notebook` runs it on the embedded one and keeps its outputs)."""

from __future__ import annotations

from pathlib import Path

import pytest

import emosteer
from tests.helpers.tiny_project import EMOTIONS, write_tiny_project

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def test_it_runs_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    write_tiny_project(tmp_path)
    model = emosteer.load(str(tmp_path / "tiny"))
    data = dict(scenarios=tmp_path / "sev.jsonl", replies=tmp_path / "bank.jsonl")
    directions = emosteer.extract(model, emotions=EMOTIONS, holdout=0.2, **data)
    emosteer.assemble(model, directions, gain_steps=0, head_share=0.25, strength=3.0, tune=False, **data).save(
        tmp_path / "circuit.safetensors"
    )
    monkeypatch.setenv("EMOSTEER_NOTEBOOK_MODEL", str(tmp_path / "tiny"))
    monkeypatch.setenv("EMOSTEER_NOTEBOOK_CIRCUIT", str(tmp_path / "circuit.safetensors"))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    done = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [output for cell in done.cells for output in cell.get("outputs", ())]
    assert any("the same as m.generate: True" in output.get("text", "") for output in printed)
    assert any("image/png" in output.get("data", {}) for output in printed)


def test_its_kept_outputs_are_those_of_the_embedded_model() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count == number for number, cell in enumerate(code, 1)), "run `make notebook`"
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "the same as m.generate: True" in printed and "Traceback" not in printed
    assert any("smollm2-135m" in str(output.get("data", {}).get("text/plain", "")) for output in code[0].outputs)
