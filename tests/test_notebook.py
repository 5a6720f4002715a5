"""The notebooks run from top to bottom, on tiny models (`make notebook` runs them on the embedded one and keeps their outputs)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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


def executed(name: str, folder: Path, model: Path, circuit: Path | None = None) -> str:
    """Runs a notebook in a folder, with this package; what it printed, and the kinds of what it showed."""
    from nbclient import NotebookClient

    given = {"EMOSTEER_NOTEBOOK_MODEL": str(model), "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    given |= {"EMOSTEER_NOTEBOOK_CIRCUIT": str(circuit)} if circuit else {}
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    return printed(client.execute(env={**os.environ, **given}))


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
    tiny = dict(gain_steps=0, head_share=0.25, strength=3.0, tune=False, examples="none")  # whose context is short
    emosteer.assemble(model, directions, **tiny, **data).save(root / "circuit.safetensors")
    return root


@pytest.fixture(scope="module")
def running(project: Path) -> Iterator[dict[str, Future[str]]]:
    """The notebooks, two at a time: most of each is its start."""
    wordy_model(project / "wordy")
    circuit = project / "circuit.safetensors"
    with ThreadPoolExecutor(2) as pool:
        named = ["quickstart", "inside_a_circuit", "evaluate_a_model"]
        found = {name: pool.submit(executed, name, project, project / "tiny", circuit) for name in named}
        yield found | {"your_own_emotions": pool.submit(executed, "your_own_emotions", project, project / "wordy")}


def wordy_model(folder: Path) -> None:
    """Writes a tiny model that knows the words of the notebook with replies of its own."""
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
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": len(vocabulary)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_the_quickstart_runs(running: dict[str, Future[str]]) -> None:
    out = running["quickstart"].result()
    assert "the same as m.generate: True" in out and "image/png" in out


def test_inside_a_circuit_runs(running: dict[str, Future[str]]) -> None:
    out = running["inside_a_circuit"].result()
    assert "image/png" in out and "shared heads" in out and "without its 1 strongest heads:" in out


def test_evaluate_a_model_runs(running: dict[str, Future[str]]) -> None:
    from emosteer.base.errors import ModelError
    from emosteer.judges.embedded import ENCODER
    from emosteer.models.weights.resolve import packaged_folder

    try:
        packaged_folder(ENCODER)
    except ModelError as error:
        pytest.skip(f"the judges' encoder is not here: {error}")
    out = running["evaluate_a_model"].result()
    assert re.search(r"reads as \w+ \d", out) and re.search(r"^circuit +\d+ +\d+ +\d+ +\d+$", out, re.M) and "image/png" in out


def test_your_own_emotions_runs(running: dict[str, Future[str]]) -> None:
    out = running["your_own_emotions"].result()
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
