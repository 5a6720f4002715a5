"""Labelled texts: what is read, what is left out and said, and that groups are never fitted on and tested with at once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from emosteer.base.errors import DataError, UsageError
from emosteer.base.files import write_jsonl
from emosteer.probing.settings import ProbeSettings
from emosteer.probing.texts import NOT_DRAWN, REPEATED, SEVERAL, TEST, LabelledText, arranged, own_texts, read_texts


def test_both_forms_are_read_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [
        {"text": "stop it", "label": "Anger"},
        {"text": "hide  now", "labels": ["fear"]},
        {"text": "Hide now", "labels": ["fear"]},
        {"text": "well", "labels": ["fear", "anger"]},
        {"text": "fine", "labels": ["neutral"]},
    ]
    write_jsonl(tmp_path / "t.jsonl", rows)
    found, left_out = read_texts(tmp_path / "t.jsonl")
    assert [(text.text, text.label) for text in found] == [("stop it", "anger"), ("hide  now", "fear"), ("fine", "neutral")]
    assert left_out == {REPEATED: 1, SEVERAL: 1}


@pytest.mark.parametrize("row", [{"text": "a"}, {"text": "", "label": "anger"}, {"text": "a", "labels": []}, {"text": "a", "label": "all"}])
def test_a_line_that_is_none_is_named(tmp_path: Path, row: dict[str, object]) -> None:
    write_jsonl(tmp_path / "t.jsonl", [{"text": "x", "label": "fear"}, row])
    with pytest.raises(DataError, match=r"t\.jsonl:2"):
        read_texts(tmp_path / "t.jsonl")


def made(groups: int) -> list[LabelledText]:
    return [LabelledText(f"{label} {group}", label, f"g{group}") for group in range(groups) for label in ("anger", "fear", "joy")]


def test_groups_stay_together_and_labels_are_drawn_evenly() -> None:
    texts = arranged([*made(60), *(LabelledText(f"more {i}", "joy", f"m{i}") for i in range(50))], 60, 0.25, 3, 0)
    assert Counter(text.label for text in texts.texts) == {"anger": 60, "fear": 60, "joy": 60} and texts.left_out == {NOT_DRAWN: 50}
    places: dict[str, set[int]] = {}
    for text, fold in zip(texts.texts, texts.folds, strict=True):
        places.setdefault(text.group, set()).add(fold)
    assert all(len(folds) == 1 for folds in places.values()) and set(texts.folds) == {TEST, 0, 1, 2}
    assert sorted([*texts.test, *texts.train]) == list(range(180)) and 20 < len(texts.test) < 70
    assert len({text.label for text in texts.texts[:12]}) == 3, "labels are mixed, as shards are"
    again = arranged(list(reversed(made(60))), 60, 0.25, 3, 0)
    assert again.texts == arranged(made(60), 60, 0.25, 3, 0).texts and again.texts != arranged(made(60), 60, 0.25, 3, 1).texts
    some = texts.some(texts.test, 2)
    assert Counter(texts.texts[i].label for i in some) == {"anger": 2, "fear": 2, "joy": 2}


def test_too_little_is_refused() -> None:
    with pytest.raises(DataError, match="at least two labels, found anger"):
        arranged([LabelledText("a", "anger", "a")], 10, 0.25, 3, 0)
    with pytest.raises(DataError, match="the label 'anger' has 2 texts and none"):
        arranged(made(2), 10, 0.25, 3, 0)


def test_the_shipped_bank_s_replies_are_grouped_by_their_prompt() -> None:
    texts, hashes = own_texts()
    groups = Counter(text.group for text in texts)
    assert len(hashes) == 2 and {text.label for text in texts} >= {"anger", "neutral"} and max(groups.values()) >= 7


@pytest.mark.parametrize(
    "wrong",
    [
        {"kinds": ("resid",)},
        {"kinds": ()},
        {"read": "first"},
        {"distances": (2000,)},
        {"distances": ()},
        {"decays": (-1.0,)},
        {"folds": 1},
        {"test_share": 1.0},
        {"epochs": 10**9},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="expected"):
        ProbeSettings(**wrong)  # type: ignore[arg-type]
