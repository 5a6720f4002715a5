"""`make reproduce`: each stage once, whatever stops it; again where something before it has changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer

from bench import reproduce
from emosteer.base.errors import EmosteerError
from emosteer.cli.main import app

#: Notes what it was called with, holds 64 MiB for a moment, and ends badly where a file `broken` names its stage.
PROGRAM = """
import pathlib, sys
held = bytearray(2**26)
held[::4096] = bytes([1]) * len(held[::4096])
broken = pathlib.Path("broken")
if broken.exists() and broken.read_text() == sys.argv[1]:
    sys.exit(3)
with open("calls", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text(PROGRAM)
    return [sys.executable, "program.py"]


def calls() -> list[str]:
    found = Path("calls").read_text().splitlines() if Path("calls").exists() else []
    Path("calls").unlink(missing_ok=True)
    return found


def test_every_stage_is_a_command_with_its_options() -> None:
    stages = reproduce.commands("m", ["--dtype", "float32"], ["--groups", "8"], ["--skip", "6"], ["--doses", "1"])
    assert [stage[0] for stage in stages] == ["extract", "ablate", "circuit", "calibrate", "heads", "calibrate", "evaluate", "report"]
    assert {stage[0] for stage in stages} <= set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert stages[5] == ["calibrate", "--check", "--skip", "6", "--model", "m", "--dtype", "float32"] and stages[-1] == [
        "report",
        "--model",
        "m",
    ]
    assert all("--dtype" in stage for stage in stages[:-1]) and stages[6][1:3] == ["--doses", "1"] and "8" in stages[3]


def test_what_is_finished_is_not_run_again_and_what_failed_is(program: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    stages, file = [["one"], ["two", "--x", "1"], ["three"]], Path("done.json")
    Path("broken").write_text("two")
    with pytest.raises(EmosteerError, match="two ended with 3"):
        reproduce.run(stages, file, "code", program)
    assert calls() == ["one"] and [row["stage"] for row in json.loads(file.read_text())] == ["one"]
    Path("broken").unlink()
    rows = reproduce.run(stages, file, "code", program)
    assert calls() == ["two --x 1", "three"] and [row["before"] for row in rows] == [True, False, False]
    assert all(2**26 < row["peak_bytes"] < 2**36 and row["seconds"] >= 0 for row in rows), "bytes, perhaps of the parent's, too"
    assert [row["before"] for row in reproduce.run(stages, file, "code", program)] == [True] * 3 and calls() == []
    reproduce.show(rows)
    out = capsys.readouterr().out
    assert "three" in out and "all" in out.splitlines()[-1]


def test_a_change_runs_its_stage_again_and_all_behind_it(program: list[str]) -> None:
    file = Path("done.json")
    reproduce.run([["one"], ["two"], ["three"]], file, "code", program)
    calls()
    reproduce.run([["one"], ["two", "--more"], ["three"]], file, "code", program)
    assert calls() == ["two --more", "three"], "three was made from another two"
    reproduce.run([["one"], ["two", "--more"], ["three"]], file, "other code", program)
    assert len(calls()) == 3
    file.write_text("{")
    reproduce.run([["one"], ["two", "--more"], ["three"]], file, "other code", program)
    assert len(calls()) == 3, "a damaged list is no list"


def test_the_code_is_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "emosteer").mkdir()
    source = tmp_path / "emosteer" / "a.py"
    source.write_text("x = 1")
    first = reproduce.fingerprint(tmp_path)
    source.write_text("x = 2")
    assert reproduce.fingerprint(tmp_path) != first
    source.write_text("x = 1")
    assert reproduce.fingerprint(tmp_path) == first
    for file in ("data/words.json", "data/prompts/a.jsonl", "emosteer/report/page.html"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
        assert (before := first) != (first := reproduce.fingerprint(tmp_path)), (file, before)
