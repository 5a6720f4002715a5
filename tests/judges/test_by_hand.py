"""Reading by hand without a terminal: who is shown what in which order, labels that survive everything, and going back."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from emosteer.base.errors import DataError, UsageError
from emosteer.base.files import sha256_text
from emosteer.judges.by_hand import (
    ANSWERS,
    BACK,
    EMOTION,
    END,
    HAND_LABELS,
    KEYS,
    NO,
    NOT_TEXT,
    STOP,
    YES,
    Card,
    HandLabel,
    LabelLog,
    Question,
    draw,
    labels_path,
    meaning,
    parse_labels,
    read_cards,
    read_labels,
    sheet_of,
)
from emosteer.scenarios.scenarios import EMOTIONS

ROWS = [(f"reply {n}", {"id": f"s{n}/{EMOTIONS[n % 6]}", "emotion": EMOTIONS[n % 6], "method": "circuit"}) for n in range(4)]
SHEET = sheet_of(ROWS)
EXTRA = Card("extra", sha256_text("extra"), None)


class Script:
    """A reader who gives a list of answers, and then stops; keeps what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = iter(answers), []  # type: ignore[var-annotated]

    def __call__(self, question: Question) -> str:
        self.asked.append(question)
        return next(self.answers, STOP)

    @property
    def texts(self) -> list[str]:
        return [question.card.text for question in self.asked if question.kind != END]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels.jsonl"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- what is shown, and in which order ---------------------------------------------------------------------------------------------


def test_a_question_has_nothing_to_give_away() -> None:
    assert [field.name for field in dataclasses.fields(Card)] == ["text", "sha256", "prompt"]
    script = Script(*["fear"] * 4)
    read_cards(draw(SHEET), _Memory(), script)  # type: ignore[arg-type]
    assert len(script.asked) == 5
    assert not [word for question in script.asked for word in (*EMOTIONS, "circuit", "/") if word in repr(question.card)]


class _Memory:
    """Labels that are kept nowhere."""

    def __init__(self) -> None:
        self.labels: dict[str, HandLabel] = {}

    def add(self, card: Card, label: str, answers: bool | None) -> None:
        self.labels[card.sha256] = HandLabel(label, answers)


def test_the_order_follows_from_the_seed_and_the_texts_alone() -> None:
    rows = [(f"reply {n}", {"emotion": EMOTIONS[n % 6], "method": f"m{n % 5}", "id": n, "prompt": f"p{n}"}) for n in range(60)]
    order = [card.text for card in draw(sheet_of(rows))]
    other = [(text, {"emotion": "fear", "method": "x"}) for text, _ in reversed(rows)]
    assert order == [card.text for card in draw(sheet_of(other))] and sorted(order) == sorted(text for text, _ in rows)
    assert order != [card.text for card in draw(sheet_of(rows), seed=1)] and order != [text for text, _ in rows]


def test_a_draw_is_balanced_over_targets_and_methods_and_grows() -> None:
    """Targets of unequal size: 40 of anger, 20 of fear, 12 of disgust, each by two methods of unequal size."""
    counts = {"anger": 40, "fear": 20, "disgust": 12}
    rows = [(f"{e} {n}", {"emotion": e, "method": "rare" if n < 5 else "common"}) for e, count in counts.items() for n in range(count)]
    sheet, hidden = sheet_of(rows), {text: (row["emotion"], row["method"]) for text, row in rows}
    for seed in range(3):
        drawn = [card.text for card in draw(sheet, seed, 24)]
        assert Counter(hidden[text][0] for text in drawn) == {"anger": 8, "fear": 8, "disgust": 8}
        assert Counter(hidden[text] for text in drawn) == {(e, m): 4 for e in counts for m in ("rare", "common")}
        assert set(drawn) < {card.text for card in draw(sheet, seed, 50)} and len(draw(sheet, seed, 500)) == 72
    # three methods for one target take nothing from the other, which has a single one
    uneven = [(f"a {n}", {"emotion": "anger", "method": f"m{n % 3}"}) for n in range(30)] + [
        (f"f {n}", {"emotion": "fear"}) for n in range(30)
    ]
    assert Counter(card.text[0] for card in draw(sheet_of(uneven), 0, 12)) == {"a": 6, "f": 6}
    # without targets it is a plain draw
    assert len(draw(sheet_of([(text, {}) for text, _ in rows]), 0, 7)) == 7


def test_the_order_of_a_draw_says_nothing_of_the_target() -> None:
    """A rare target is as likely early as late: over many seeds, its mean place is the middle."""
    rows = [(f"a {n}", {"emotion": "anger"}) for n in range(90)] + [(f"f {n}", {"emotion": "fear"}) for n in range(10)]
    sheet = sheet_of(rows)
    places = [i for seed in range(100) for i, card in enumerate(draw(sheet, seed, 20)) if card.text[0] == "f"]
    assert len(places) == 1000 and abs(sum(places) / len(places) - 9.5) < 0.6  # 3 standard errors: 5.8 / sqrt(1000) * 3


def test_one_text_is_read_once_whatever_its_lines() -> None:
    rows = [("same", {"emotion": "Fear ", "prompt": "b"}), ("same", {"emotion": "anger", "prompt": "a"}), ("same", {"emotion": 3})]
    for order in (rows, rows[::-1]):
        sheet = sheet_of(order)
        assert sheet.cards == (Card("same", sha256_text("same"), "a"),)
        assert sorted(str(source.target) for source in sheet.sources) == ["None", "anger", "fear"]


# ---- keys --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "kind", "expected"),
    [
        *((label[0], EMOTION, label) for label in ("anger", "sadness", "happiness", "fear", "disgust", "neutral")),
        *((label, EMOTION, label) for label in HAND_LABELS),
        *[("u", EMOTION, "surprise"), ("x", EMOTION, NOT_TEXT), (" A\n", EMOTION, "anger"), ("Fear\r", EMOTION, "fear")],
        *[("b", EMOTION, BACK), ("?", EMOTION, KEYS), ("q", EMOTION, STOP), ("back", EMOTION, BACK), ("stop", END, STOP)],
        *[("afraid", EMOTION, None), ("", EMOTION, None), ("y", EMOTION, None), ("z", EMOTION, None), ("\x1b[A", EMOTION, None)],
        *[("y", ANSWERS, YES), ("n", ANSWERS, NO), ("no", ANSWERS, NO), ("a", ANSWERS, None), ("\r", END, STOP), ("b", END, BACK)],
    ],
)
def test_keys_and_words(said: str, kind: str, expected: str | None) -> None:
    assert meaning(said, kind) == expected


# ---- labels ------------------------------------------------------------------------------------------------------------------------


def test_labels_are_on_disk_at_once_and_say_nothing_of_the_target(path: Path) -> None:
    log, seen = LabelLog(path, SHEET, "anna"), []

    def ask(question: Question) -> str:
        seen.append(len(path.read_text().splitlines()))
        return NOT_TEXT if question.number == 2 else "neutral"

    assert read_cards(draw(SHEET), log, ask) and seen == [0, 1, 2, 3, 4]
    rows = rows_of(path)
    assert [set(row) for row in rows] == [{"id", "text", "text_sha256", "label", "reader"}] * 4
    assert [row["label"] for row in rows] == ["neutral", NOT_TEXT, "neutral", "neutral"]
    assert all(sha256_text(row["text"]) == row["text_sha256"] and row["text_sha256"].startswith(row["id"]) for row in rows)
    assert not [word for word in (*EMOTIONS, "circuit", "s0", "s1") if word in path.read_text()]


def test_a_reader_who_goes_back_changes_what_was_said(path: Path) -> None:
    log = LabelLog(path, SHEET)
    first, second, third, fourth = (card.text for card in draw(SHEET))
    script = Script("fear", "anger", BACK, BACK, BACK, "disgust", "neutral", "surprise", BACK, "sadness", STOP)
    assert read_cards(draw(SHEET), log, script)
    # at the first one, b asks again; afterwards it goes on with what has no label yet
    assert script.texts == [first, second, third, second, first, first, third, fourth, fourth]
    assert [question.number for question in script.asked] == [1, 2, 3, 2, 1, 1, 3, 4, 4, 4, 4]
    assert [question.label for question in script.asked[3:7]] == ["anger", "fear", "fear", None]
    assert [question.back for question in script.asked[:5]] == [False, True, True, True, False]
    assert [question.kind for question in script.asked[8:]] == [END, EMOTION, END]
    assert [(row["text"], row["label"]) for row in rows_of(path)] == [
        *((first, "fear"), (second, "anger"), (first, "disgust"), (third, "neutral"), (fourth, "surprise"), (fourth, "sadness"))
    ]
    labels = read_labels(path, SHEET)
    assert {card.text: labels[card.sha256].label for card in draw(SHEET)} == {
        **{first: "disgust", second: "anger", third: "neutral", fourth: "sadness"}
    }


def test_the_same_label_again_is_not_written_again(path: Path) -> None:
    log = LabelLog(path, SHEET)
    read_cards(draw(SHEET), log, Script("fear", BACK, "fear"))
    assert len(rows_of(path)) == 1


def test_going_back_reaches_what_was_labelled_in_an_earlier_session(path: Path) -> None:
    read_cards(draw(SHEET), LabelLog(path, SHEET), Script("fear", "anger"))
    script = Script(BACK, "neutral")
    read_cards(draw(SHEET), LabelLog(path, SHEET), script)
    texts = [card.text for card in draw(SHEET)]
    assert script.texts == [texts[2], texts[1], texts[2]] and rows_of(path)[-1]["label"] == "neutral"


def test_a_kill_at_any_byte_costs_at_most_the_label_that_was_being_written(path: Path) -> None:
    cards, labels = draw(SHEET, count=2), ["fear", NOT_TEXT]
    read_cards(cards, LabelLog(path, SHEET, "jürgen"), Script(*labels))
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        there = sum(len(whole[: whole.index(b"\n", at) + 1]) - 1 <= size for at in _starts(whole))  # a line may lack its break
        script = Script(*labels[there:])
        assert read_cards(cards, LabelLog(path, SHEET, "jürgen"), script)
        assert script.texts == [card.text for card in cards[there:]] and path.read_bytes() == whole


def _starts(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        yield at
        at = data.index(b"\n", at) + 1


def test_texts_with_labels_are_not_asked_again_whatever_the_draw(path: Path) -> None:
    assert read_cards(draw(SHEET, 3, 2), LabelLog(path, SHEET), Script("fear", "fear"))
    script = Script("anger", "anger")
    assert read_cards(draw(SHEET, 4), LabelLog(path, SHEET), script) and len(set(script.texts)) == 2
    nobody = Script()
    assert read_cards(draw(SHEET, 5), LabelLog(path, SHEET), nobody) and nobody.asked == []


def test_a_file_in_which_nobody_labelled_anything_is_not_left_behind(path: Path) -> None:
    log = LabelLog(path, SHEET)
    assert not read_cards(draw(SHEET), log, Script())
    log.close()
    assert not path.exists()


# ---- whether it answers its prompt -------------------------------------------------------------------------------------------------


def test_the_second_question(path: Path) -> None:
    script = Script("fear", YES, "anger", BACK, "sadness", NO, NOT_TEXT, "neutral", STOP)
    assert not read_cards(draw(SHEET), LabelLog(path, SHEET), script, with_answers=True)
    # what is no text cannot answer; a text is kept when both were answered
    kinds = [EMOTION, ANSWERS, EMOTION, ANSWERS, EMOTION, ANSWERS, EMOTION, EMOTION, ANSWERS]
    assert [question.kind for question in script.asked] == kinds
    assert [(row["label"], row.get("answers")) for row in rows_of(path)] == [("fear", True), ("sadness", False), (NOT_TEXT, None)]


def test_the_second_question_alone_for_texts_that_have_a_label(path: Path) -> None:
    read_cards(draw(SHEET), LabelLog(path, SHEET), Script("fear", NOT_TEXT, "anger", "neutral"))
    script = Script(YES, NO, YES)
    assert read_cards(draw(SHEET), LabelLog(path, SHEET), script, with_answers=True)
    assert [(question.kind, question.label) for question in script.asked[:-1]] == [
        (ANSWERS, "fear"),
        (ANSWERS, "anger"),
        (ANSWERS, "neutral"),
    ]
    again = Script()  # and a session without it forgets no answer
    assert read_cards(draw(SHEET), LabelLog(path, SHEET), again)
    assert [label.answers for label in read_labels(path, SHEET).values()] == [True, None, False, True]
    read_cards([*draw(SHEET), EXTRA], LabelLog(path, sheet_of([*ROWS, ("extra", {})])), Script(BACK, "surprise"))
    assert (rows_of(path)[-1]["label"], rows_of(path)[-1]["answers"]) == ("surprise", True)


# ---- files that are something else -------------------------------------------------------------------------------------------------


def row(text: str = "reply 0", **fields: Any) -> dict[str, Any]:
    return {"id": "x", "text": text, "text_sha256": sha256_text(text), "label": "fear", **fields}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(), row("other"), row("another")], "has labels of another file: 2 of its 3 texts are not there"),
        ([row(), row(label="joy")], 'l.jsonl, row 2: expected a text_sha256 and a label of anger, .*, not text, found the label "joy"'),
        ([{"id": "1", "emotion": "fear"}], "row 1: .*, found a row with id, emotion"),
        ([row(answers="yes")], "expected answers to be true or false"),
        ([row(reader=3)], "reader to be a text"),
    ],
)
def test_what_is_no_label_file_of_these_texts(rows: Sequence[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_labels(rows, Path("l.jsonl"), SHEET)


def test_before_any_label(path: Path) -> None:
    with pytest.raises(DataError, match="there is no label yet: .* does not exist"):
        read_labels(path, SHEET)
    path.write_text('{"id": "torn')
    with pytest.raises(DataError, match="there is no label yet in"):
        read_labels(path, SHEET)
    path.write_text(json.dumps(row()))  # no line break at its end, as editors leave it
    assert len(read_labels(path, SHEET)) == 1
    path.write_text(json.dumps(row()) + "\n" + json.dumps(row("reply 1"))[:-9])  # somebody is writing
    assert len(read_labels(path, SHEET)) == 1 and not path.read_text().endswith("\n")


def test_two_readers_do_not_share_a_file(path: Path) -> None:
    read_cards(draw(SHEET), LabelLog(path, SHEET, "anna"), Script("fear"))
    with pytest.raises(UsageError, match="has the labels of anna, not of ben; name another --out"):
        LabelLog(path, SHEET, "ben")
    log = LabelLog(path, SHEET)  # whoever says no name goes on; the label of another text has none
    read_cards(draw(SHEET), log, Script(BACK, "anger", "fear"))
    assert [(row["label"], row.get("reader")) for row in rows_of(path)] == [("fear", "anna"), ("anger", "anna"), ("fear", None)]


def test_where_labels_are_kept() -> None:
    assert [str(labels_path(Path(name))) for name in ("a/test-replies.jsonl", "x", "x.y.jsonl")] == [
        *("a/test-replies.labels.jsonl", "x.labels.jsonl", "x.y.labels.jsonl")
    ]
