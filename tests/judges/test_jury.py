"""The jury: who is asked what, what is kept of it, and what a killed run leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from emosteer.base.jsonl import JsonlLog, KeyedLog
from emosteer.judges import jury as module
from emosteer.judges.jury import Jury, pair_text
from emosteer.judges.protocol import LABELS, Opinion
from tests.helpers.contest_setup import BagEncoder, WordAnswers, WordCheck, WordJudge, kill_after

TEXTS = [f"cry slam number {n}" for n in range(10)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)


def jury_of(folder: Path, *judges: WordJudge, paid: Sequence[str] = ()) -> Jury:
    return Jury(judges, WordCheck(), WordAnswers(), BagEncoder(), KeyedLog(folder / "opinions.jsonl"), frozenset(paid))


def judge(name: str, neighbours: bool = False, fails: Callable[[str], bool] = lambda text: False) -> WordJudge:
    return WordJudge(fails=fails, neighbours=neighbours, name=name, key=f"{name}-1")


# ---- opinions ------------------------------------------------------------------------------------------------------


def test_every_judge_is_asked_each_text_once_and_kept_by_its_own_key(tmp_path: Path) -> None:
    one, two = judge("one"), judge("two")
    jury = jury_of(tmp_path, one, two)
    readings = jury.readings([*TEXTS, *TEXTS[:3]], "test")
    assert one.asked == two.asked == TEXTS and (jury.name, jury.key) == ("one, two", "mean of one-1, two-1")
    assert list(readings) == ["", *TEXTS] and all(list(reading.opinions) == ["one", "two"] for reading in readings.values())
    rows = jury.kept.rows.values()
    assert [row["judge"] for row in rows].count("one-1") == [row["judge"] for row in rows].count("two-1") == 10
    # another judge beside the first: nobody who has spoken is asked again
    again, three = judge("one"), judge("three")
    more = jury_of(tmp_path, again, three).readings(TEXTS, "test")
    assert again.asked == [] and three.asked == TEXTS
    assert all(more[text].opinions["one"] == readings[text].opinions["one"] for text in TEXTS)
    assert list(more[TEXTS[0]].opinions) == ["one", "three"]


def test_an_empty_text_is_neutral_and_shown_to_nobody(tmp_path: Path) -> None:
    one, two = judge("one"), judge("two")
    readings = jury_of(tmp_path, one, two).readings(["", "cry"], "test")
    assert one.asked == two.asked == ["cry"] and readings[""].label == "neutral"
    assert readings[""].probabilities == {label: float(label == "neutral") for label in LABELS}


def test_a_local_judge_reads_a_chunk_whole_or_again(tmp_path: Path) -> None:
    """What it says depends on the texts beside; a rerun with one missing reads the chunk again and keeps what was said first."""
    shy = judge("shy", neighbours=True, fails=lambda text: text == TEXTS[5])
    jury = jury_of(tmp_path, shy)
    first = jury.readings(TEXTS, "test")
    assert first[TEXTS[5]].label is None and first[TEXTS[5]].problem == "HTTP 500"
    assert shy.asked == TEXTS
    bold = judge("shy", neighbours=True)
    second = jury_of(tmp_path, bold).readings(TEXTS, "test")
    assert bold.asked == TEXTS[4:8], "the chunk with the missing one, and no other"
    assert all(second[text] == first[text] for text in TEXTS if text != TEXTS[5]) and second[TEXTS[5]].label is not None


def test_a_paid_judge_is_asked_for_what_is_missing_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shy = judge("shy", fails=lambda text: text in TEXTS[5:7])
    jury_of(tmp_path, shy, paid=["shy-1"]).readings(TEXTS, "test")
    assert "test: 2 of 10 opinions of shy are missing (HTTP 500); the same command asks again" in capsys.readouterr().err
    bold, free = judge("shy"), judge("free")
    jury_of(tmp_path, bold, free, paid=["shy-1"]).readings(TEXTS, "test")
    assert bold.asked == TEXTS[5:7] and free.asked == TEXTS


@pytest.mark.parametrize(("paid", "kept"), [((), 0), (("one-1",), 3)])
def test_paid_opinions_are_kept_one_by_one(tmp_path: Path, paid: tuple[str, ...], kept: int) -> None:
    def dies(text: str) -> bool:
        if text == TEXTS[3]:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        jury_of(tmp_path, judge("one", fails=dies), paid=paid).readings(TEXTS, "test")
    assert len(JsonlLog(tmp_path / "opinions.jsonl").rows) == kept


def test_kept_and_fresh_opinions_are_the_same(tmp_path: Path) -> None:
    """Six digits are kept; who reads them at once must not see more."""
    fresh = jury_of(tmp_path, judge("one")).readings(TEXTS, "test")
    assert jury_of(tmp_path, judge("one")).readings(TEXTS, "test") == fresh
    shares = fresh[TEXTS[0]].opinions["one"].probabilities
    assert shares is not None and all(share == round(share, 6) for share in shares.values())


# ---- checks --------------------------------------------------------------------------------------------------------


def test_replies_are_checked_against_their_own_prompts(tmp_path: Path) -> None:
    jury = jury_of(tmp_path, judge("one"))
    pairs = [("why", "cry"), ("why", "never cry"), ("what", "cry"), ("why", ""), ("why", " \n"), ("why", "cry")]
    found = jury.answering(pairs, "test")
    assert found == {pairs[0]: 0.9, pairs[1]: 0.1, pairs[2]: 0.9, pairs[3]: 0.0, pairs[4]: 0.0}
    asked = jury.answers.asked  # type: ignore[attr-defined]
    assert asked == pairs[:3], "each pair once, and an empty reply answers nothing"
    again = jury_of(tmp_path, judge("one"))
    assert again.answering(pairs, "test") == found and again.answers.asked == []  # type: ignore[attr-defined]
    other = replace(again, answers=WordAnswers(key="answers-2"))
    assert other.answering(pairs[:1], "test") and other.answers.asked == pairs[:1]  # type: ignore[attr-defined]
    assert pair_text("a", "b c") != pair_text("a b", "c")


def test_verdicts_are_kept_by_the_check(tmp_path: Path) -> None:
    jury = jury_of(tmp_path, judge("one"))
    found = jury.verdicts(["cry", "no no no no", "cry"], "test")
    assert [found[text].sound for text in ("cry", "no no no no")] == [True, False] and len(found) == 2
    again = jury_of(tmp_path, judge("one"))
    assert again.verdicts(["no no no no", "cry"], "test") == found and again.soundness.asked == []  # type: ignore[attr-defined]
    assert {row["check"] for row in again.kept.rows.values()} == {"check-1"}


# ---- killed --------------------------------------------------------------------------------------------------------


def everything(jury: Jury) -> tuple[object, ...]:
    pairs = [(f"prompt {n}", text) for n, text in enumerate(TEXTS)]
    return jury.readings(TEXTS, "test"), jury.verdicts(TEXTS, "test"), jury.answering(pairs, "test")


@pytest.mark.parametrize("rows", [0, 3, 7, 13, 22, 34, 39])
def test_a_killed_run_ends_in_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Local judges whose bits depend on their neighbours, a paid one, and both checks; killed after so many rows."""

    def made(folder: Path) -> Jury:
        return jury_of(folder, judge("local", neighbours=True), judge("paid"), paid=["paid-1"])

    whole = everything(made(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        kill_after(patch, rows)
        with pytest.raises(KeyboardInterrupt):
            everything(made(tmp_path / "killed"))
    assert len(JsonlLog(tmp_path / "killed" / "opinions.jsonl").rows) == rows
    assert everything(made(tmp_path / "killed")) == whole
    files = [tmp_path / name / "opinions.jsonl" for name in ("whole", "killed")]
    assert sorted(files[0].read_text().splitlines()) == sorted(files[1].read_text().splitlines())
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_missing_opinion_is_not_kept(tmp_path: Path) -> None:
    readings = jury_of(tmp_path, judge("one", fails=lambda text: True)).readings(TEXTS, "test")
    assert not JsonlLog(tmp_path / "opinions.jsonl").rows
    assert all(reading.opinions["one"] == Opinion(None, "HTTP 500") for text, reading in readings.items() if text)
