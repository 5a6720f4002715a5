"""Texts read by a person, blind, one after the other: the order, the questions, and the labels on disk. No torch here.

A reader is shown a `Card`, which has no target, method or id to show. A label belongs to a text, by its hash: lines with the same text are
read once, and count as often as they are there where their targets matter.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emosteer.base.errors import DataError, UsageError
from emosteer.base.files import sha256_text
from emosteer.base.jsonl import JsonlLog, whole_rows
from emosteer.base.strict_json import loads
from emosteer.judges.protocol import LABELS
from emosteer.scenarios.emotions import NEUTRAL, emotion_key

#: The label of what is no text at all, and every label that a reader can give.
NOT_TEXT = "not text"
HAND_LABELS = (*LABELS, NOT_TEXT)
BACK, KEYS, STOP, YES, NO = "back", "keys", "stop", "yes", "no"
#: What a reader is asked: which emotion, whether the reply answers its prompt, and, after the last text, whether that is all.
EMOTION, ANSWERS, END = "emotion", "answers", "end"
#: Question -> key -> what it means there; the moves are understood at every question.
LETTERS = {"a": "anger", "s": "sadness", "h": "happiness", "f": "fear", "u": "surprise", "d": "disgust", "n": NEUTRAL, "x": NOT_TEXT}
CHOICES = {EMOTION: LETTERS, ANSWERS: {"y": YES, "n": NO}, END: {"": STOP}}
MOVES = {"b": BACK, "?": KEYS, "q": STOP}

Row = dict[str, Any]


# ---- what is read --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """All that a reader may see. prompt: what the text replies to, None where the input does not say; sha256: of the text."""

    text: str
    sha256: str
    prompt: str | None


@dataclass(frozen=True)
class Source:
    """Where a text comes from, which no reader is shown. target: the emotion that was asked for; method: how it was written."""

    sha256: str
    target: str | None
    method: str | None


@dataclass(frozen=True)
class Sheet:
    """The texts of a file, each once, and its lines."""

    cards: tuple[Card, ...]
    sources: tuple[Source, ...]

    @property
    def hashes(self) -> frozenset[str]:
        """Of all its texts."""
        return frozenset(card.sha256 for card in self.cards)


def sheet_of(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Sheet:
    """Keeps what is shown apart from what is hidden. Of several prompts of one text the first in the alphabet is shown.

    Args:
        rows: the text and the other fields of every line: `prompt`, `emotion` (the target) and `method`, where they are there.
    """
    cards: dict[str, Card] = {}
    sources = []
    for text, row in rows:
        prompt, target, method = (row.get(name) if isinstance(row.get(name), str) else None for name in ("prompt", "emotion", "method"))
        card = Card(text, sha256_text(text), prompt)
        sources.append(Source(card.sha256, emotion_key(target) if target else None, method))
        cards[card.sha256] = min(card, cards.get(card.sha256, card), key=lambda one: (one.prompt is None, one.prompt))
    return Sheet(tuple(cards.values()), tuple(sources))


def draw(sheet: Sheet, seed: int = 0, count: int | None = None) -> list[Card]:
    """The texts in the order in which they are read, which follows from the seed and the texts alone.

    Args:
        count: draw that many, evenly over the targets and, for each target, over the methods; a larger draw contains every smaller one.
    """
    cells: dict[str, tuple[str, str]] = {}
    for source in sheet.sources:
        cell = source.target or "", source.method or ""
        cells[source.sha256] = min(cell, cells.get(source.sha256, cell))
    drawn = sorted(sheet.cards, key=lambda card: sha256_text(f"draw {seed} {card.sha256}"))
    drawn = _dealt(drawn, [cells[card.sha256] for card in drawn])
    drawn = _dealt(drawn, [cells[card.sha256][0] for card in drawn])
    # another shuffle: in the order of the draw, the rarer targets would come late
    return sorted(drawn[:count], key=lambda card: sha256_text(f"order {seed} {card.sha256}"))


def _dealt(cards: Sequence[Card], piles: Sequence[object]) -> list[Card]:
    """The first card of every pile, then the second of every pile, and so on; otherwise the order stays."""
    counted: Counter[object] = Counter()
    ranks = []
    for pile in piles:
        ranks.append(counted[pile])
        counted[pile] += 1
    return [cards[i] for i in sorted(range(len(cards)), key=ranks.__getitem__)]


# ---- labels on disk ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HandLabel:
    """What a reader says of a text. answers: whether it answers its prompt, None if that was not asked; reader: who, if they said so."""

    label: str
    answers: bool | None = None
    reader: str | None = None


def labels_path(file: Path) -> Path:
    """Where the labels of a file are kept if nobody says otherwise: replies.jsonl -> replies.labels.jsonl."""
    return file.with_suffix(".labels.jsonl")


def parse_labels(rows: Sequence[Mapping[str, Any]], path: Path, sheet: Sheet) -> dict[str, HandLabel]:
    """Hash of a text -> its label, in the order in which texts were first labelled; the last label of a text counts.

    Raises:
        DataError: if a row is no hand label, or if labels are of texts that the sheet does not have.
    """
    labels: dict[str, HandLabel] = {}
    for number, row in enumerate(rows, 1):
        label, answers, reader = row.get("label"), row.get("answers"), row.get("reader")
        if label not in HAND_LABELS or not isinstance(row.get("text_sha256"), str):
            problem = f"a row with {', '.join(row)[:60] or 'no field'}" if "label" not in row else f"the label {json.dumps(label)[:60]}"
            raise DataError(f"{path}, row {number}: expected a text_sha256 and a label of {', '.join(HAND_LABELS)}, found {problem}")
        if not isinstance(answers, (bool, type(None))) or not isinstance(reader, (str, type(None))):
            raise DataError(f"{path}, row {number}: expected answers to be true or false and reader to be a text; correct the row")
        labels[row["text_sha256"]] = HandLabel(label, answers, reader)
    strange = labels.keys() - sheet.hashes
    if strange:
        raise DataError(f"{path} has labels of another file: {len(strange)} of its {len(labels)} texts are not there; name their own file")
    return labels


def read_labels(path: Path, sheet: Sheet) -> dict[str, HandLabel]:
    """The labels of a file that somebody may be writing: a torn last line is ignored, and the file is not changed.

    Raises:
        DataError: if there is none yet, or as `parse_labels`.
    """
    if not path.exists():
        raise DataError(f"there is no label yet: {path} does not exist; label texts first, with --by-hand alone")
    rows = whole_rows(path)
    try:  # an editor may have left out the last line break
        last = loads(path.read_bytes().rpartition(b"\n")[2])
    except ValueError:
        last = None
    labels = parse_labels([*rows, last] if isinstance(last, dict) else rows, path, sheet)
    if not labels:
        raise DataError(f"there is no label yet in {path}; label texts first, with --by-hand alone")
    return labels


class LabelLog:
    """The file that labels are added to, each on disk before `add` returns.

    labels: hash of a text -> its label, those added since included.
    """

    def __init__(self, path: Path, sheet: Sheet, reader: str | None = None) -> None:
        """Opens or creates the file.

        Raises:
            DataError, EmosteerError: as `JsonlLog` and `parse_labels`. UsageError: if it has the labels of another reader.
        """
        self.path, self._reader = path, reader
        self._log = JsonlLog(path, first_key="id")
        self.labels = parse_labels(self._log.rows, path, sheet)
        others = {label.reader for label in self.labels.values()} - {reader, None}
        if reader is not None and others:
            raise UsageError(f"{path} has the labels of {', '.join(sorted(map(str, others)))}, not of {reader}; name another --out")

    def add(self, card: Card, label: str, answers: bool | None) -> None:
        """Keeps a label. The id is made from the text: that of the input may name the target.

        Raises:
            EmosteerError: if it cannot be written, or somebody else wrote to the file.
        """
        known = self.labels.get(card.sha256)
        given = HandLabel(label, answers, self._reader or (known.reader if known else None))
        if given != known:
            row: Row = {"id": card.sha256[:12], "text": card.text, "text_sha256": card.sha256, "label": label}
            optional = {"answers": answers, "reader": given.reader}
            self._log.append(row | {name: value for name, value in optional.items() if value is not None})
            self.labels[card.sha256] = given

    def close(self) -> None:
        """Removes the file if it was created here and nobody labelled anything."""
        self._log.close()


# ---- one text after the other --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What is asked next. number: of the text, from 1; label: the reader's own, where it can be changed; back: whether any is before it."""

    kind: str
    card: Card
    number: int
    total: int
    label: str | None = None
    back: bool = True


#: Asks a reader and returns a choice of the question's kind, `BACK` or `STOP`.
Ask = Callable[[Question], str]


def meaning(said: str, kind: str) -> str | None:
    """What a key, or a whole word, means at a question; None for one that is not known there."""
    said, known = said.strip().lower(), {**CHOICES[kind], **MOVES}
    return known.get(said) or (said if said in known.values() else None)


def read_cards(cards: Sequence[Card], log: LabelLog, ask: Ask, with_answers: bool = False) -> bool:
    """Asks for every text that has no label yet, and again for those to which the reader goes back. Returns whether all have one."""

    def is_done(card: Card) -> bool:
        known = log.labels.get(card.sha256)
        return known is not None and (not with_answers or known.label == NOT_TEXT or known.answers is not None)

    places = {card.sha256: card for card in cards}
    trail = [places[sha256] for sha256 in log.labels if sha256 in places and is_done(places[sha256])]
    todo = [card for card in cards if not is_done(card)]
    back, total = 0, len(cards)
    if not todo:
        return True
    while True:
        if not todo and not back:
            if ask(Question(END, trail[-1], total, total)) != BACK:
                return True
            back = 1
        card = trail[-back] if back else todo[0]
        given = _asked(card, len(trail) - back + 1 if back else len(trail) + 1, total, log, ask, with_answers, back)
        if given == STOP:
            return not todo
        if given == BACK:
            back = min(back + 1, len(trail))
            continue
        assert isinstance(given, HandLabel)
        log.add(card, given.label, given.answers)
        if not back:
            trail.append(todo.pop(0))
        back = 0


def _asked(card: Card, number: int, total: int, log: LabelLog, ask: Ask, with_answers: bool, back: int) -> HandLabel | str:
    """The label of one text, `BACK` or `STOP`; what is known of it is asked again only where the reader went back to it."""
    known = log.labels.get(card.sha256)
    label = known.label if known is not None and not back else None
    while True:
        if label is None:
            label = ask(Question(EMOTION, card, number, total, known.label if known else None, number > 1))
            if label in (BACK, STOP):
                return label
        if label == NOT_TEXT:
            return HandLabel(label)
        if not with_answers:
            return HandLabel(label, known.answers if known else None)
        answer = ask(Question(ANSWERS, card, number, total, label))
        if answer == STOP:
            return STOP
        if answer != BACK:
            return HandLabel(label, answer == YES)
        label = None
