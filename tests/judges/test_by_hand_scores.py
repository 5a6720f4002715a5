"""Scores against labels by hand, on seven texts whose figures are worked out in the comments."""

from __future__ import annotations

import json

import pytest

from emosteer.base.errors import DataError
from emosteer.base.files import sha256_text
from emosteer.judges.by_hand import NOT_TEXT, HandLabel, sheet_of
from emosteer.judges.by_hand_scores import compare, score
from emosteer.judges.protocol import LABELS, Opinion, Soundness

#: text -> what the person, judge A, judge B and judge C say; None: the judge failed.
SAID = {
    "t1": ("anger", "anger", "anger", "fear"),
    "t2": ("anger", "fear", "anger", "fear"),
    "t3": ("fear", "fear", "anger", "fear"),
    "t4": ("neutral", "surprise", "neutral", "fear"),
    "t5": (NOT_TEXT, "anger", "fear", "fear"),
    "t6": ("fear", "neutral", "fear", "fear"),
    "t7": ("happiness", None, "happiness", "fear"),
}
LINES = [
    *(("t1", "anger", "circuit"), ("t2", "anger", "circuit"), ("t7", "happiness", "circuit")),
    *(("t3", "anger", "residual"), ("t5", "fear", "residual"), ("t6", "fear", "residual"), ("t1", "fear", "residual")),
    *(("t4", "none", "plain"), ("t8", "fear", "circuit")),  # no emotion was asked for; nobody labelled it
]
SHEET = sheet_of([(text, {"emotion": target, "method": method}) for text, target, method in LINES])


def says(label: str | None) -> Opinion:
    """A neutral opinion leans to fear, which is then its six-way label."""
    if label is None:
        return Opinion(None, "failed")
    return Opinion({one: 0.6 if one == label else 0.2 if one == "fear" else 0.2 / 6 for one in LABELS})


LABELLED = {sha256_text(text): HandLabel(said[0]) for text, said in SAID.items()}
OPINIONS = {name: {sha256_text(text): says(said[i]) for text, said in SAID.items()} for i, name in enumerate("ABC", 1)}
VERDICTS = {sha256_text(text): Soundness(text not in ("t3", "t5"), (), 0.5) for text in SAID}
FOUND = score(SHEET, LABELLED, OPINIONS, VERDICTS)


def test_agreement_is_over_what_the_person_read_as_text() -> None:
    a, b, c = (FOUND["judges"][name] for name in "ABC")
    # A: t1 and t3 of t1 t2 t3 t4 t6; t7 is missing, t5 no text. six-way: t1, t3 and t6 (neutral leans to fear) of t1 t2 t3 t6
    assert (a["n"], a["missing"], a["agreement"], a["n_emotional"], a["six_way"]) == (5, 1, 2 / 5, 4, 3 / 4)
    assert (b["n"], b["missing"], b["agreement"], b["n_emotional"], b["six_way"]) == (6, 0, 5 / 6, 5, 4 / 5)
    assert (c["agreement"], c["six_way"]) == (2 / 6, 2 / 5)
    # pairs aa, af, ff, ns, fn: of 10 labels 3 anger, 4 fear, 2 neutral, 1 surprise; 3 pairs differ: 1 - 9 * 6 / (21 + 24 + 16 + 9)
    assert a["alpha"] == pytest.approx(16 / 70)


def test_recall_and_precision_of_each_label() -> None:
    a = FOUND["judges"]["A"]["emotions"]
    assert a["fear"] == {"person": 2, "judge": 2, "recall": 0.5, "precision": 0.5}
    assert a["anger"] == {"person": 2, "judge": 1, "recall": 0.5, "precision": 1.0}
    assert a["surprise"] == {"person": 0, "judge": 1, "recall": None, "precision": 0.0}
    assert a["neutral"] == {"person": 1, "judge": 1, "recall": 0.0, "precision": 0.0}
    assert a["happiness"] == {"person": 0, "judge": 0, "recall": None, "precision": None}  # t7 is missing
    assert FOUND["judges"]["C"]["emotions"]["fear"] == {"person": 2, "judge": 6, "recall": 1.0, "precision": 2 / 6}


def test_the_panel_says_what_is_likeliest_by_the_mean_of_the_judges_that_spoke() -> None:
    # t1 anger; t2, t3 and t6 fear; so are t4, where three labels have one vote each and all lean to it, and t7, where A failed
    assert FOUND["panel"]["agreement"] == 3 / 6
    given = {label: {name: n for name, n in row.items() if n} for label, row in FOUND["panel"]["confusion"].items()}
    assert given == {"anger": {"anger": 1, "fear": 1}, "fear": {"fear": 2}, "neutral": {"fear": 1}, "happiness": {"fear": 1}}


def test_a_panel_of_which_most_failed_is_undecided() -> None:
    failing = {**OPINIONS, "B": {sha256: Opinion(None, "failed") for sha256 in LABELLED}}
    given = score(SHEET, LABELLED, failing, VERDICTS)["panel"]["confusion"]
    assert given["happiness"]["undecided"] == 1, "of t7 C alone said something"
    assert given["anger"]["undecided"] == 0, "A and C are two of three"


def test_what_is_no_text_is_compared_with_the_soundness_verdict() -> None:
    assert FOUND["soundness"] == {"not_text": 1, "unsound_of_not_text": 1, "text": 6, "sound_of_text": 5}
    assert FOUND["labels"] == {**dict.fromkeys(LABELS, 0), "anger": 2, "fear": 2, "neutral": 1, "happiness": 1, NOT_TEXT: 1}
    assert (FOUND["texts"], FOUND["labelled"]) == (8, 7)


def test_the_share_that_is_read_as_the_target_is_over_lines() -> None:
    circuit, residual, both = FOUND["targets"]
    assert [line["method"] for line in FOUND["targets"]] == ["circuit", "residual", None]
    assert (circuit["n"], circuit["person"]) == (3, 1.0)
    assert circuit["judges"]["A"] == {"n": 2, "share": 0.5, "difference": -0.5}  # against the person on the two that A read
    # the person reads t6 alone as its target; B t3, t5 (which is no text) and t6; A none
    assert (residual["n"], residual["person"]) == (4, 1 / 4)
    assert residual["judges"]["B"] == {"n": 4, "share": 3 / 4, "difference": 0.5}
    assert residual["judges"]["A"] == {"n": 4, "share": 0.0, "difference": -0.25}
    assert residual["judges"]["panel"]["share"] == 2 / 4  # t5 and t6
    assert (both["n"], both["person"]) == (7, 4 / 7)
    assert both["judges"]["A"] == {"n": 6, "share": 1 / 6, "difference": pytest.approx(1 / 6 - 3 / 6)}


def test_one_judge_is_its_own_panel_and_one_method_has_one_line() -> None:
    sheet = sheet_of([(text, {"emotion": "fear"}) for text in SAID])
    alone = score(sheet, LABELLED, {"C": OPINIONS["C"]}, VERDICTS)
    assert alone["panel"]["agreement"] == alone["judges"]["C"]["agreement"]
    [line] = alone["targets"]
    assert line == {"method": None, "n": 7, "person": 2 / 7, "judges": {"C": {"n": 7, "share": 1.0, "difference": 5 / 7}}}
    assert score(sheet_of([(text, {}) for text in SAID]), LABELLED, OPINIONS, VERDICTS)["targets"] == []


def test_nothing_but_broken_texts() -> None:
    only = {sha256_text("t5"): HandLabel(NOT_TEXT)}
    found = score(SHEET, only, OPINIONS, VERDICTS)
    a = found["judges"]["A"]
    assert (a["n"], a["agreement"], a["six_way"], a["alpha"]) == (0, None, None, None) and found["panel"]["agreement"] is None
    json.dumps(found, allow_nan=False)


def test_answers_are_counted() -> None:
    labels = {
        sha: HandLabel(one.label, answers) for (sha, one), answers in zip(LABELLED.items(), [True, False, True, None] * 2, strict=False)
    }
    assert score(SHEET, labels, OPINIONS, VERDICTS)["answers"] == {"asked": 6, "yes": 4}


def test_two_readers() -> None:
    first = {"1": HandLabel("anger", True), "2": HandLabel("fear", True), "3": HandLabel(NOT_TEXT), "4": HandLabel("fear", False)}
    second = {"1": HandLabel("anger", True), "2": HandLabel("anger", False), "3": HandLabel(NOT_TEXT), "5": HandLabel("fear")}
    found = compare(first, second)
    assert (found["n"], found["only_first"], found["only_second"], found["agreement"]) == (3, 1, 1, 2 / 3)
    # pairs aa, fa, xx: of 6 labels 3 anger, 1 fear, 2 not text; 1 pair differs: 1 - 5 * 2 / (9 + 5 + 8)
    assert found["alpha"] == pytest.approx(1 - 10 / 22) and found["answers"] == {"n": 2, "agreement": 0.5}
    assert found["confusion"]["fear"]["anger"] == found["confusion"][NOT_TEXT][NOT_TEXT] == 1 and "sadness" not in found["confusion"]
    with pytest.raises(DataError, match="no text in common"):
        compare({"1": HandLabel("fear")}, {"2": HandLabel("fear")})
