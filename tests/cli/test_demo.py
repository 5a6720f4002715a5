"""`make demo`, the whole way on a tiny model: directions, circuits, replies; a second run reads what the first made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emosteer.circuits.circuit import Circuit
from emosteer.cli import demo
from emosteer.cli import options as cli_options
from emosteer.scenarios import shipped
from emosteer.scenarios.scenarios import EMOTIONS
from tests.helpers.tiny_project import write_tiny_project

#: How the emotions speak that the tiny project's bank leaves out.
MORE = {"happiness": "laugh home sing", "surprise": "what how why", "disgust": "spit foul no"}


def test_it_goes_the_whole_way_and_reads_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_project(tmp_path)
    bank = [json.loads(line) for line in (tmp_path / "bank.jsonl").read_text().splitlines()]
    for emotion, words in MORE.items():
        spoken = [{**row, "emotion": emotion, "text": f"{row['text'].split()[1]} {words}"} for row in bank if row["emotion"] == "anger"]
        with (tmp_path / "bank.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in spoken)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_options, "DEFAULT_MODEL", str(tmp_path / "tiny"))
    monkeypatch.setattr(shipped, "TRAIN", str(tmp_path / "sev.jsonl"))
    monkeypatch.setattr(shipped, "BANK", str(tmp_path / "bank.jsonl"))
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "TEXTS", ("the train was late",))
    demo.main()
    out = capsys.readouterr()
    assert "> the train was late" in out.out and all(f"\n  {name}" in out.out for name in ("unsteered", *EMOTIONS))
    assert "learning the circuits" in out.err and "done; now try" in out.err
    made = tmp_path / "artifacts" / "demo" / "tiny" / "circuit.safetensors"
    assert Circuit.load(made).strength.tolist() == pytest.approx([demo.STRENGTH] * len(EMOTIONS))
    written = made.stat().st_mtime_ns
    demo.main()
    again = capsys.readouterr()
    assert again.out.splitlines()[-5:] == out.out.splitlines()[-5:] and "learning the circuits" not in again.err
    assert made.stat().st_mtime_ns == written
