"""The command that an artefact keeps: run again in a fresh folder it gives the same bytes."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.files import write_jsonl
from emosteer.circuits.circuit import Circuit
from emosteer.cli import main as cli
from emosteer.cli.command_line import command_line, followed_by
from emosteer.report.commands import made_by
from tests.conftest import build, small_data

Call = Callable[..., str]


def inputs(folder: Path) -> None:
    """A tiny model, scenarios and replies as files."""
    model = build("llama")
    model.hf.save_pretrained(folder / "tiny")
    model.tokenizer.save_pretrained(folder / "tiny")
    groups, bank = small_data(4)
    scenarios: dict[str, dict[str, Any]] = {}
    for group in groups:
        row = {"skeleton_id": group.key.scenario, "theme": group.theme, "scenario": "we wait", "event": {}}
        scenarios.setdefault(group.key.scenario, row)["event"][group.key.valence] = group.text
    write_jsonl(folder / "sev lines.jsonl", [*scenarios.values()])
    rows = [
        {"skeleton_id": key.scenario, "valence": key.valence, "emotion": emotion, "text": text}
        for key, replies in bank.items()
        for emotion, text in replies.items()
    ]
    write_jsonl(folder / "bank.jsonl", rows)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command that must succeed, in a folder; returns its stdout."""

    def run(folder: Path, arguments: list[str]) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("EMOSTEER_CACHE", str(folder / "cache"))
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        out, err = capsys.readouterr()
        assert not stop.value.code, err
        return out

    return run


DATA = ["--scenarios", "sev lines.jsonl", "--replies", "bank.jsonl"]
COMMANDS = (
    ["extract", "-m", "./tiny", *DATA, "--emotions", "fear,anger", "--holdout", "0.25", "--instruction", ""],
    ["ablate", "-m", "./tiny", *DATA, "--no-curves", "--true-units", "2", "--patch-groups", "2", "--verify-prompts", "0", "--seed", "3"],
    ["circuit", "-m", "./tiny", *DATA, "--gain-steps", "2", "--keep", "0.25", "--no-tune", "--out", "made/circuit.safetensors"],
)
PLACES = ("artifacts/tiny/directions.safetensors", "artifacts/tiny/scores.safetensors", "made/circuit.safetensors")


def test_a_kept_command_run_again_in_a_fresh_folder_gives_the_same_bytes(call: Call, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    inputs(first)
    shutil.copytree(first, second)
    for command in COMMANDS:
        call(first, [*command, "--json"])
    export = ["export", "-m", "./tiny", "-e", "fear", "--circuit", PLACES[2], "--strength", "-0.5", "-o", "folder of it"]
    call(first, export)
    kept = [str(artifacts.load(first / place).provenance.command) for place in PLACES]
    kept.append(json.loads((first / "folder of it/emosteer_export.json").read_text())["command"])
    for text, command in zip(kept, (*COMMANDS, export), strict=True):
        words = shlex.split(text)
        assert words[:2] == ["emosteer", command[0]] and "--json" not in words and set(command[1:]) - set(words) <= {"-m", "-e", "-o"}
        call(second, words[1:])
    for place in (*PLACES, "folder of it/emosteer_export.json", "folder of it/model.safetensors"):
        assert (second / place).read_bytes() == (first / place).read_bytes(), place
    shown = json.loads(call(first, ["inspect", PLACES[2], "--json"]))
    assert shown["command"] == shown["provenance"]["command"] == kept[2] and kept[2] in call(first, ["inspect", PLACES[2]]).replace(
        "\n", ""
    )

    old = replace(Circuit.load(first / PLACES[2]), provenance=replace(Circuit.load(first / PLACES[2]).provenance, command=None))
    old.save(first / "old.safetensors")
    shown = json.loads(call(first, ["inspect", "old.safetensors", "--json"]))
    assert "command" not in shown["provenance"] and shown["command"] == "emosteer circuit --model tiny --gain-steps 2 --keep 0.25"
    unlearned = replace(old, learned_residual=None)
    assert made_by("circuit", unlearned, "m") == "emosteer circuit --model m --gain-steps 2 --keep 0.25 --no-learn-residual"
    plain = replace(old, metrics={name: value for name, value in old.metrics.items() if name != "gains"})
    assert made_by("circuit", plain, "m") == "emosteer circuit --model m --gain-steps 0", "gains were not learned, as was asked for"
    dialled = replace(old, provenance=replace(old.provenance, command="emosteer calibrate --top 3.0"))
    assert made_by("circuit", dialled, "m") == "emosteer circuit --model m --gain-steps 2 --keep 0.25 && emosteer calibrate --top 3.0"


def test_only_what_differs_from_the_defaults_and_shapes_the_result_is_kept() -> None:
    texts: list[str] = []
    app = typer.Typer()

    @app.command("stage")
    def stage(
        context: typer.Context,
        number: Annotated[float, typer.Option("--number", "-n")] = 0.5,
        place: Annotated[Path, typer.Option()] = Path("artifacts"),
        note: Annotated[str | None, typer.Option()] = None,
        on: Annotated[bool, typer.Option()] = True,
        off: Annotated[bool, typer.Option("--off")] = False,
        fresh: Annotated[bool, typer.Option("--fresh")] = False,
        force: Annotated[bool, typer.Option("--force")] = False,
        as_json: Annotated[bool, typer.Option("--json")] = False,
    ) -> None:
        texts.append(command_line(context))

    group = typer.main.get_command(app)
    cases = {
        (): "emosteer stage",
        ("-n", "0.50", "--place", "artifacts", "--on", "--fresh", "--force", "--json"): "emosteer stage",
        ("-n", "-2", "--no-on", "--off", "--place", "../a b"): "emosteer stage --number -2.0 --place '../a b' --no-on --off",
        ("--note", ""): "emosteer stage --note ''",
        ("--note", "it's; $x"): "emosteer stage --note 'it'\"'\"'s; $x'",
    }
    for arguments, expected in cases.items():
        group(list(arguments), standalone_mode=False)
        assert texts[-1] == expected
        group(shlex.split(texts[-1])[2:], standalone_mode=False)
        assert texts[-1] == expected, "the kept command keeps itself"


def test_a_calibration_is_kept_after_the_command_that_made_the_circuit_and_replaces_an_earlier_one() -> None:
    once = followed_by("emosteer circuit --out 'a && b'", "emosteer calibrate --top 3.0")
    assert once == "emosteer circuit --out 'a && b' && emosteer calibrate --top 3.0"
    assert followed_by(once, "emosteer calibrate") == "emosteer circuit --out 'a && b' && emosteer calibrate"
    assert (
        followed_by(None, "emosteer calibrate") == followed_by("emosteer calibrate --top 3.0", "emosteer calibrate") == "emosteer calibrate"
    )


def test_a_command_enters_no_key_of_kept_progress_and_no_file_that_has_none() -> None:
    bare = Provenance("m", "", "", "by a test", {"a": 1}, versions={"torch": "2"})
    known = replace(bare, command="emosteer extract")
    assert known.origin() == bare.origin() and known.origin()["versions"] is None and "command" not in known.origin()
    assert "command" not in bare.record() and known.record() == {**bare.record(), "command": "emosteer extract"}
