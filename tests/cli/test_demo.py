"""`make demo` on a tiny model: pairs, readings, a small extraction and the page, within a hundred columns."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import pytest

import emosteer
from emosteer.api.pairs import in_turn
from emosteer.cli import demo
from emosteer.judges import jury as juries
from emosteer.judges.pairs import Marked, Pair, tally
from emosteer.scenarios import shipped
from emosteer.scenarios.prompt_sets import read_groups
from emosteer.scenarios.scenarios import EMOTIONS, Message, data_path
from tests.helpers.contest_setup import jury
from tests.helpers.dialled import dialled_model
from tests.helpers.tiny_project import write_tiny_project

GOOD = Marked("stop it", "anger", sound=True, answers=True, names=False, good=True)
NAMING = Marked("i am angry", "anger", sound=True, answers=False, names=True, good=False)
PLAIN = Marked("the train", "neutral", sound=True, answers=True, names=False, good=False)


def test_the_prompts_are_the_fixed_draw_of_all_kinds_and_emotions() -> None:
    groups = demo.drawn_prompts()
    assert len({group.key for group in groups}) == demo.PROMPTS == 12
    known = {group.key: group for group in read_groups(data_path("prompts/dev.jsonl"))}
    assert all(known[group.key] == group for group in groups)
    assert {group.kind for group in groups} == {group.kind for group in known.values()}
    assert Counter(emotion for _, emotion in in_turn(groups, EMOTIONS)) == dict.fromkeys(EMOTIONS, 2)


def test_counts_are_of_what_was_asked_for() -> None:
    pairs = [Pair("a", "chat", (), "anger", 1.0, PLAIN, GOOD), Pair("b", "chat", (), "anger", 1.0, PLAIN, NAMING)]
    pairs.append(Pair("c", "chat", (), "fear", 1.0, PLAIN, NAMING))
    assert vars(tally(pairs)) == {"total": 3, "read": 2, "good": 1} and vars(tally(pairs, plain=True)) == {"total": 3, "read": 0, "good": 0}


def test_what_is_read_stands_below_each_reply(capsys: pytest.CaptureFixture[str]) -> None:
    turns = (Message("user", "hello"), Message("assistant", "yes?"), Message("user", "the train [bold]was[/] late"))
    demo.stage(100).print(demo.shown(Pair("a", "chat", turns, "anger", 0.5, PLAIN, NAMING), "1/1"))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1].split() == ["1/1", "anger", "chat"] and lines[4].strip() == "> the train [bold]was[/] late"
    column = lines[5].index("steered, strength 0.50")
    assert lines[6][column:] == "i am angry" and lines[7][column:] == "reads anger  sound ✓  answers ✗  names it"
    assert lines[7][:column].strip() == "reads neutral  sound ✓  answers ✓"


def test_it_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emosteer, "load", lambda *_, **__: dialled_model(), raising=False)
    monkeypatch.setattr(juries, "make_jury", lambda _: lambda kept: jury(tmp_path))
    monkeypatch.setattr(shipped, "TRAIN", str(tmp_path / "sev.jsonl"))
    monkeypatch.setattr(shipped, "BANK", str(tmp_path / "bank.jsonl"))
    monkeypatch.setattr(demo, "TOKENS", 4)
    monkeypatch.setattr("emosteer.scenarios.scenarios.EMOTIONS", ("anger", "sadness", "fear"))
    with warnings.catch_warnings():  # the demo silences them for the rest of its process
        demo.main()
    out = capsys.readouterr()
    assert max(map(len, out.out.splitlines())) <= 100 and "Warning" not in out.out + out.err
    assert "12/12" in out.out and "13/12" not in out.out and out.out.count("steered, strength 0.70") == 12
    assert out.out.rstrip().endswith("make serve")
    page = (tmp_path / "artifacts/demo/demo.html").read_text()
    assert page.count('class="case"') == 12 and page.count("<svg") == len(EMOTIONS)
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
