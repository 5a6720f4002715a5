"""A bank as it may come: the text under `gen_text`, names in capitals, with spaces and of other scripts, and replies that are missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import emosteer
from emosteer.base.errors import UsageError
from emosteer.cli import main as cli
from emosteer.directions.directions import Directions
from tests.helpers.tiny_project import write_tiny_project

NAMES = {"anger": "Anger", "sadness": "Quiet  Joy", "fear": "恐れ"}
KNOWN = ("anger", "quiet joy", "恐れ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, scenarios without full stops, and such a bank: every seventh reply is missing."""
    root = tmp_path_factory.mktemp("names")
    write_tiny_project(root)
    rows = [json.loads(line) for line in (root / "bank.jsonl").read_text().splitlines()]
    kept = [
        {"skeleton_id": row["skeleton_id"], "valence": row["valence"], "emotion": NAMES[row["emotion"]], "gen_text": row["text"]}
        for number, row in enumerate(rows)
        if number % 7 != 3
    ]
    (root / "bank.jsonl").write_text("\n".join(json.dumps(row) for row in kept))
    return root


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in the folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(folder)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


DATA = ("-m", "./tiny", "--scenarios", "sev.jsonl", "--replies", "bank.jsonl")


def test_the_stages_take_such_a_bank(run: Callable[..., Any], folder: Path) -> None:
    code, out, err = run("extract", *DATA)
    assert (
        code == 1
        and "no reply in sadness, happiness, fear, surprise, disgust: the bank's replies to these events are in 恐れ (16), " in err
    )
    code, out, err = run("extract", *DATA, "--emotions", "ANGER, quiet JOY、恐れ", "--holdout", "0.3")
    assert code == 0 and "8 of 18 groups lack an emotion; replies: anger 15, quiet joy 15, 恐れ 16" in out
    made = Directions.load(folder / "artifacts/tiny/directions.safetensors")
    assert (made.emotions, made.incomplete, made.n_groups) == (KNOWN, 8, 18) and made.replies["quiet joy"] == 15
    strength = "Anger=2,QUIET joy=1,恐れ=1.5"
    code, out, err = run("circuit", *DATA, "--gain-steps", "1", "--no-learn-residual", "--strength", strength, "--json")
    found = json.loads(out)
    assert code == 0 and found["strength"] == dict(zip(KNOWN, (2.0, 1.0, 1.5), strict=True))
    learned_from = found["gains"]["learned_from"]
    assert learned_from["incomplete"] == 7 and set(learned_from["replies"]) == set(KNOWN) and learned_from["groups"] == 15
    assert "two strengths" in run("circuit", *DATA, "--strength", "anger=2,ANGER=3")[2]


def test_generate_and_the_api_know_a_name_in_any_spelling(run: Callable[..., Any], folder: Path) -> None:
    if not (folder / "artifacts/tiny/circuit.safetensors").exists():
        test_the_stages_take_such_a_bank(run, folder)
    asked = ("generate", "the train was late", "-m", "./tiny", "--max-new-tokens", "4", "--json", "-e")
    rows = [json.loads(run(*asked, name)[1]) for name in ("quiet joy", "Quiet   JOY", "QUIET\u00a0JOY")]
    assert rows[0] == rows[1] == rows[2] and rows[0]["emotion"] == "quiet joy"
    model = emosteer.load("./tiny", artifacts="artifacts")
    for name in ("Quiet Joy", "quiet joy"):
        assert model.generate("the train was late", name, max_new_tokens=4).text == rows[0]["text"]
    assert model.circuit is not None and model.circuit.index("ANGER") == 0 and model.circuit.default_strength("恐れ") == 1.5
    for word in ("all", "none", "neutral"):
        with pytest.raises(UsageError, match=f"'{word}' is no emotion's name"):
            model.generate("the train was late", word)
        with pytest.raises(UsageError, match=f"'{word}' is no emotion's name"):
            model.generate("the train was late", word, method="prompt")
        with pytest.raises(UsageError, match=f"'{word}' is no emotion's name"):
            emosteer.extract(model, emotions=["anger", word])
