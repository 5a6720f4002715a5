"""`models check`: what it says is what the model does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emosteer.api.checking import checked, memory_of
from emosteer.cli.main import main
from emosteer.models.model import Model
from tests.conftest import build, tiny_tokenizer
from tests.helpers.families import MODELS


def saved(path: Path, family: str = "llama", **template: str) -> str:
    model = build(family)
    model.hf.save_pretrained(path)
    tokenizer = tiny_tokenizer()
    for name, value in template.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(path)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["models", "check", *arguments])
    return int(ended.value.code or 0), *capsys.readouterr()


def test_one_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, saved(tmp_path / "mine"))
    assert code == 0 and len(out.splitlines()) <= 40 and max(map(len, out.splitlines())) <= 200
    for text in (
        "mine, sha256",
        "row llama",
        "3 of 4 heads of 8 (2 for keys and values), 48 neurons, width 32",
        "context of 256",
        "float32 on cpu",
    ):
        assert text in out
    assert "every tensor is read, used and finite" in out and "TransformerBridge" in out and "the fast pass writes the same logits" in out


def test_json_holds_what_the_model_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thinker = "{% for m in messages %}{{ m['content'] }} {% endfor %}<think>"
    reference = saved(tmp_path / "gemma", "gemma3", chat_template=thinker)
    code, out, _ = run(capsys, reference, "--json", "--dtype", "bfloat16")
    found, model = json.loads(out), Model.load(reference, dtype="bfloat16")
    assert code == 0 and found["family"] == "gemma3" and found["precision"] == "bfloat16" and found["sha256"] == model.sha256
    assert found["template"] == {"kind": "one", "system": "kept", "dated": False, "thinking": "closed", "turns": True}
    assert found["sizes"]["d_head"] == 16 and found["parameters"] == sum(p.numel() for p in model.hf.parameters())
    assert not found["stages"]["generate, fast"]["works"] and found["stages"]["extract"]["works"]
    assert (
        not found["stages"]["export checkpoint"]["works"] and "no place for the biases" in found["stages"]["export checkpoint"]["notes"][0]
    )
    assert not any("fast pass" in proof for proof in found["proofs"])


def test_what_is_refused_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = saved(tmp_path / "mine", chat_template="hello")
    code, out, error = run(capsys, reference)
    assert code == 1 and out == "" and len(error.strip().splitlines()) == 1 and "leaves out what the user says" in error


def test_experts_have_no_neurons(tmp_path: Path) -> None:
    found = checked(Model.from_hf(MODELS["mixtral"].make(), tiny_tokenizer(), "experts"))
    assert found.sizes["d_mlp"] == 0 and "heads only" in found.stages["ablate"].notes[0]
    assert not any("TransformerBridge" in proof for proof in found.proofs)


def test_memory_grows_with_what_it_is_reckoned_from() -> None:
    """The weights exactly; the rest by arithmetic, which counts a tied head once."""
    model = build("llama")
    held = memory_of(model)
    own = {weight.data_ptr(): weight.nbytes for weight in model.hf.parameters()}
    assert held["weights"] == sum(own.values())
    assert all(n > held["weights"] for stage, n in held.items() if stage != "weights")
    half = Model.from_hf(build("llama").hf.bfloat16(), model.tokenizer, "half")
    assert memory_of(half)["weights"] * 2 == held["weights"]
