"""Sets of emotions from end to end on a tiny model: the commands take them by name, and say what a bank lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import emosteer
from emosteer.base.errors import DataError
from emosteer.cli import main as cli
from emosteer.directions.directions import Directions
from emosteer.scenarios.emotions import parse_emotions
from tests.helpers.tiny_project import write_tiny_project

EIGHT = parse_emotions("plutchik8", closed=False)
DATA = ("-m", "./tiny", "--scenarios", "sev.jsonl", "--replies", "bank.jsonl")
MADE = "artifacts/tiny/directions.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project whose bank holds Plutchik's eight, each with a word of its own."""
    root = tmp_path_factory.mktemp("sets")
    write_tiny_project(root)
    words = dict(zip(EIGHT, ("home", "boss", "hide", "door", "cry", "slam", "never", "train"), strict=True))
    rows = [json.loads(line) for line in (root / "bank.jsonl").read_text().splitlines() if '"anger"' in line]
    new = [{**row, "emotion": e, "text": f"{row['text'].split()[1]} {words[e]} {words[e]}"} for row in rows for e in EIGHT]
    (root / "bank.jsonl").write_text("\n".join(map(json.dumps, new)))
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


def test_a_set_from_end_to_end(run: Callable[..., Any]) -> None:
    assert run("extract", *DATA, "--emotions", "plutchik8", "--holdout", "0.3")[0] == 0
    assert Directions.load(Path(MADE)).emotions == EIGHT
    code, out, _ = run("geometry", MADE)
    assert code == 0 and "8 emotions; the first two components hold" in out and "places dealt at random" in out
    found = json.loads(run("geometry", MADE, "--layers", "0,1", "--json")[1])
    assert found["layers"] == [0, 1] and found["tree"] is None
    assert set(found["error"]["arousal"]) == {"value", "null", "p"} and found["circumplex"]["emotions"] == list(EIGHT)
    assert run("circuit", *DATA, "--gain-steps", "1", "--no-tune", "--no-learn-residual", "--strength", "1")[0] == 0
    of_circuit = json.loads(run("geometry", "artifacts/tiny/circuit.safetensors", "--layers", "0,1", "--json")[1])
    assert {**of_circuit, "file": MADE} == found, "a circuit keeps the directions that it was made from"
    code, out, _ = run("generate", "the boss", "-m", "./tiny", "--emotion", "plutchik8", "--max-new-tokens", "3", "--json")
    assert code == 0 and [json.loads(line)["emotion"] for line in out.splitlines()] == list(EIGHT)
    assert "'parrott:primary' holds love, which is not known here" in run("generate", "it", "-m", "./tiny", "-e", "parrott:primary")[2]
    code, _, err = run("generate", "it", "-m", "./tiny", "--vad", "0.1,0.2,0.3")
    assert code == 1 and "is not calibrated" in err
    assert "'parrott:primary' holds love" in run("build", "sev.jsonl", "--replies", "bank.jsonl", "--emotions", "parrott:primary")[2]


def test_what_the_bank_lacks_is_named(run: Callable[..., Any], folder: Path) -> None:
    code, _, err = run("extract", *DATA, "--emotions", "parrott:primary")
    assert code == 1 and "no reply in love: the bank's replies to these events are in happiness (18), trust (18)" in err
    code, _, err = run("extract", *DATA, "--emotions", "parrott")
    assert code == 2 and "expected parrott:primary or parrott:secondary or parrott:tertiary, found 'parrott'" in err
    code, _, err = run("geometry", MADE, "--layers", "two")
    assert code == 2 and "expected --layers to be numbers with commas" in err
    loaded = emosteer.load(str(folder / "tiny"), circuit=None)
    with pytest.raises(DataError, match="no reply in love"):
        emosteer.extract(loaded, scenarios=folder / "sev.jsonl", replies=folder / "bank.jsonl", emotions="parrott:primary")


def test_a_tree_needs_no_bank_where_the_prompt_asks(run: Callable[..., Any]) -> None:
    asks = ("extract", "-m", "./tiny", "--scenarios", "sev.jsonl", "--elicitation", "tone", "--limit", "2", "--out", "tree.safetensors")
    assert run(*asks, "--emotions", "parrott:primary,parrott:secondary", "--holdout", "0.5")[0] == 0
    tree = json.loads(run("geometry", "tree.safetensors", "--json")[1])["tree"]
    assert {family["parent"] for family in tree["families"]} == {"love", "happiness", "anger", "sadness", "fear"}
    assert "children nearest to their own parent" in run("geometry", "tree.safetensors")[1]


def test_every_stage_reads_both_shipped_banks_where_an_emotion_needs_them(folder: Path, run: Callable[..., Any]) -> None:
    """Trust and anticipation are in the second bank alone: whoever read the first one only would find no reply in them."""
    shipped = ("-m", "./tiny", "--artifacts", "more")
    code, out, _ = run("extract", *shipped, "--emotions", "plutchik8", "--limit", "16", "--holdout", "0.3")
    assert code == 0 and "valences" not in out, "no prompt has one: nothing was compared"
    small = ("--prompts", "1", "--randoms", "1", "--kinds", "zero", "--shares", "0.5", "--neuron-shares", "", "--verify-prompts", "0")
    for dry in ((), ("--dry-run",)):
        code, _, err = run("ablate", *shipped, *small, "--patch-groups", "8", *dry)
        assert code == 0, err
    assert run("circuit", *shipped, "--gain-steps", "0", "--heads", "0.5", "--no-tune", "--strength", "1")[0] == 0
    for command in (("heads", "--groups", "8"), ("validate", "--quick", "--prompts", "2", "--randoms", "2", "--bank-groups", "16")):
        code, out, err = run(*command, *shipped, "--dry-run")
        assert code == 0 and "nothing" not in err, err
