"""Labelled texts whose label a tiny model's states hold: their words differ, and the words' embeddings with them."""

from __future__ import annotations

import random

from emosteer.probing.texts import LabelledText, Texts, arranged
from tests.conftest import WORDS

MARKS = {"anger": "slam", "fear": "hide", "sadness": "cry"}
_OTHERS = [word for word in WORDS if word.isalpha() and word not in (*MARKS, *MARKS.values())]


def marked_texts(count: int, seed: int = 0) -> list[LabelledText]:
    """So many texts of each label: random words, about half of them the label's."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        for label, mark in MARKS.items():
            said = [draw.choice(_OTHERS) for _ in range(draw.randint(3, 5))] + [mark] * 3
            draw.shuffle(said)
            text = " ".join(said)
            found.append(LabelledText(text, label, f"{number}"))
    return found


def small_texts(count: int = 36) -> Texts:
    """The same, arranged with two folds."""
    return arranged(marked_texts(count), count, 0.3, 2, 0)
