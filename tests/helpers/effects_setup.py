"""A battery in the words of the tiny tokenizer, and a reader that goes by a word."""

from __future__ import annotations

import random
from collections.abc import Sequence

from emosteer.scenarios.scenarios import Group
from emosteer.side_effects.battery import ATTACHMENT, CROSS, EVERYDAY, HARMFUL, HARMLESS, PLAIN, WARM, Battery, prompt_of
from emosteer.side_effects.checks import Check, Item
from tests.conftest import WORDS

_PLAIN_WORDS = [word for word in WORDS if word.isalpha()]


def small_battery(items: int = 12, others: int = 6) -> Battery:
    """Random words; an item is right where a word that is drawn for it is written."""
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(draw.choice(_PLAIN_WORDS) for _ in range(count))

    def groups(kind: str) -> list[Group]:
        return [prompt_of(f"{kind}-{i}", text(5)) for i in range(others)]

    kinds = ("fact", "arithmetic", "instruction")
    checks = [Item(f"i{i}", kinds[i % 3], text(4), Check(says=tuple(draw.sample(_PLAIN_WORDS, 30)))) for i in range(items)]
    return Battery(
        checks,
        {kind: groups(kind) for kind in (HARMFUL, HARMLESS, ATTACHMENT, EVERYDAY)},
        [(group, text(4)) for group in groups("text")],
        {
            "encouraging": ["keep going please", "yes really"],
            "discouraging": ["stop never", "no not you"],
            PLAIN: ["no please"] * 2,
            WARM: ["yes please"] * 2,
            CROSS: ["stop please"] * 2,
        },
        {"battery": "0" * 64},
    )


def read_by_words(texts: Sequence[str]) -> list[str | None]:
    """What a text is read as: the emotion of the first of some words in it, which are about as frequent in what a tiny model writes."""
    marks = {"anger": ("slam", "boss", "stop"), "fear": ("hide", "run", "door"), "sadness": ("cry", "alone", "home")}
    return [next((e for e, words in marks.items() if any(word in text.split() for word in words)), "neutral") for text in texts]
