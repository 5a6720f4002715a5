"""The notebooks run from top to bottom, on tiny models (`make notebook` runs them on the embedded one and keeps their outputs)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import emosteer
from tests.conftest import SIZES, TEMPLATE
from tests.helpers.tiny_project import EMOTIONS, write_tiny_project

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def executed(name: str, folder: Path) -> str:
    """Runs a notebook in a folder; what it printed, pictures as "image/png"."""
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    done = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return printed(done)


def printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "\n".join(part for output in outputs for part in (output.get("text", ""), *output.get("data", {})))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its circuit."""
    root = tmp_path_factory.mktemp("notebooks")
    write_tiny_project(root)
    model = emosteer.load(str(root / "tiny"))
    data = dict(scenarios=root / "sev.jsonl", replies=root / "bank.jsonl")
    directions = emosteer.extract(model, emotions=EMOTIONS, holdout=0.2, **data)
    emosteer.assemble(model, directions, gain_steps=0, head_share=0.25, strength=3.0, tune=False, **data).save(root / "circuit.safetensors")
    return root


@pytest.fixture
def environment(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Has notebooks take the tiny model and this package."""
    monkeypatch.setenv("EMOSTEER_NOTEBOOK_MODEL", str(project / "tiny"))
    monkeypatch.setenv("EMOSTEER_NOTEBOOK_CIRCUIT", str(project / "circuit.safetensors"))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    return project


def test_the_quickstart_runs(environment: Path) -> None:
    out = executed("quickstart", environment)
    assert "the same as m.generate: True" in out and "image/png" in out


def test_inside_a_circuit_runs(environment: Path) -> None:
    out = executed("inside_a_circuit", environment)
    assert "image/png" in out and "shared heads" in out and "without its 1 strongest heads:" in out


def test_evaluate_a_model_runs(environment: Path) -> None:
    from emosteer.base.errors import ModelError
    from emosteer.judges.embedded import ENCODER
    from emosteer.models.weights.resolve import packaged_folder

    try:
        packaged_folder(ENCODER)
    except ModelError as error:
        pytest.skip(f"the judges' encoder is not here: {error}")
    out = executed("evaluate_a_model", environment)
    assert re.search(r"reads as \w+ \d", out) and re.search(r"^circuit +\d+ +\d+ +\d+ +\d+$", out, re.M) and "image/png" in out


def test_your_own_emotions_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model that knows the notebook's words."""
    text = " ".join(cell.source for cell in nbformat.read(FOLDER / "your_own_emotions.ipynb", as_version=4).cells)
    special = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*special, *re.findall(r"\w+|[^\w\s]", text)]))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\|\w+\|>|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": len(vocabulary)})).save_pretrained(tmp_path / "wordy")
    tokenizer.save_pretrained(tmp_path / "wordy")
    monkeypatch.setenv("EMOSTEER_NOTEBOOK_MODEL", str(tmp_path / "wordy"))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    out = executed("your_own_emotions", tmp_path)
    assert "8 situations, 2 of them held out" in out and out.count("pride:") == out.count("envy:") == 2


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_kept_outputs_are_those_of_the_embedded_model(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count == number for number, cell in enumerate(code, 1)), "run `make notebook`"
    out = printed(notebook)
    assert out.strip() and "Traceback" not in out
    if name == "quickstart":
        assert "the same as m.generate: True" in out
        assert any("smollm2-135m" in str(output.get("data", {}).get("text/plain", "")) for output in code[0].outputs)
