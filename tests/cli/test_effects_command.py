"""The command `effects`, and the warning of `generate` that follows from it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from emosteer.api.effects import reader_of
from emosteer.base.errors import DataError
from emosteer.cli import main as cli
from emosteer.judges.protocol import Opinion
from emosteer.side_effects.side_effects import SideEffects
from tests.conftest import build, tiny_tokenizer
from tests.helpers.dialled import TOP, dialled_circuit
from tests.helpers.effects_setup import read_by_words, small_battery

SMALL = "--methods circuit,prompt-tone --intensities 50,100 --item-tokens 4 --reply-tokens 4 --rounds 0 --followed 0"


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in a folder with a tiny model and its calibrated circuit; returns (exit code, stdout, stderr)."""
    model = build("llama")
    model.hf.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    from emosteer.models.model import Model

    dialled_circuit(Model.load("./tiny"), ("anger", "fear")).save(tmp_path / "artifacts/tiny/circuit.safetensors")
    monkeypatch.setattr("emosteer.api.effects.battery_of", lambda settings, items=None: small_battery(6, 4))
    monkeypatch.setattr("emosteer.api.effects.reader_of", lambda judge: read_by_words)

    def run(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        out = capsys.readouterr()
        return ended.value.code, out.out, out.err

    return run


def test_the_command_writes_prints_and_can_be_made_again_and_generate_warns(said: Any, tmp_path: Path, monkeypatch: Any) -> None:
    code, out, err = said("effects", "-m", "./tiny", *SMALL.split(), "--json")
    assert not code, err
    told, file = json.loads(out), tmp_path / "artifacts/tiny/effects.safetensors"
    assert told["file"] == "artifacts/tiny/effects.safetensors" and not file.with_name(file.name + ".partial").exists()
    assert [row["limit"] for row in told["limits"]][:4] == ["perplexity"] * 3 + ["accuracy"]
    first, command = file.read_bytes(), str(SideEffects.load(file).provenance.command)
    assert command.startswith("emosteer effects") and "--intensities 50,100" in command
    assert not said(*shlex.split(command)[1:])[0] and file.read_bytes() == first
    shown = " ".join(said("inspect", str(file))[1].split())
    for part in ("all emotions", "the circuit by emotion", "up to which each limit holds", "accuracy by kind of item", "response patterns"):
        assert part in shown
    worse, beyond = "anger", ["--strength", str(2 * TOP)]  # beyond what was measured: whatever a random model does
    ask = ["generate", "we cry", "-m", "./tiny", "-e", worse, "--max-new-tokens", "2"]
    for arguments, warns in (
        (["--intensity", "100"], False),
        ([*beyond, "--max-harm", "accuracy=10"], True),
        (["--strength", str(2 * TOP), "--max-harm", "perplexity=1000"], True),
        (["--intensity", "50", "--max-harm", "perplexity=1000"], False),
        ([*beyond, "--method", "residual", "--max-harm", "perplexity=1"], False),
    ):
        code, _, err = said(*ask, *arguments)
        assert not code and (f"warning: {worse} at strength" in err) is warns, (arguments, err)
    monkeypatch.setenv("EMOSTEER_MAX_HARM", "perplexity=1")
    assert f"warning: {worse}" in said(*ask, *beyond)[2]
    file.unlink()
    assert "nobody has measured what artifacts/tiny/circuit.safetensors does besides" in said(*ask, "--intensity", "100")[2]


class Half:
    """Reads every second text, and says nothing of the others."""

    name = "half"

    def opinions(self, texts: Any, done: Any = None) -> list[Opinion]:
        return [Opinion(None, "no answer") if n % 2 else Opinion({"fear": 0.6, "anger": 0.4}) for n, _ in enumerate(texts)]


def test_a_judge_that_says_nothing_of_a_reply_is_not_one_that_finds_no_emotion() -> None:
    read = reader_of(Half())  # type: ignore[arg-type]
    assert read(["one"]) == ["fear"] and read([]) == []
    with pytest.raises(DataError, match=r"the judge half said nothing of 2 of 4 replies \(no answer\); the replies are kept: run the same"):
        read(["one", "two", "three", "four"])


@pytest.mark.parametrize(
    ("judge", "told"),
    [("embeded", "unknown judge"), ("openai:large", "--base-url"), ("lm:./tiny", "has the weights of the steered model itself")],
)
def test_a_judge_that_cannot_be_had_is_refused_before_anything_is_written(
    said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: str, told: str
) -> None:
    monkeypatch.setattr("emosteer.side_effects.measure.outcomes.write_all", lambda *_: pytest.fail("replies were written"))
    code, _, err = said("effects", "-m", "./tiny", *SMALL.split(), "--judge", judge)
    assert code and told in err and not (tmp_path / "artifacts/tiny/effects.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--methods", "circuits"], "unknown method 'circuits'"),
        (["--intensities", "50,x"], "expected --intensities to be numbers with commas"),
        (["--intensities", "75,50"], "rising numbers"),
        (["--max-harm", "perplexety=2"], "did you mean 'perplexity'"),
        (["--distances", "1.5"], "expected --distances to be whole numbers"),
    ],
)
def test_what_makes_no_sense_is_one_line_before_the_model_is_loaded(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["effects", "-m", "./nothing-here", *arguments])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and told in err and err.count("\n") == 1
