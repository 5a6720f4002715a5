"""Emotion words: the committed list, and patterns that match names and feelings. No torch here."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from emosteer.base.files import read_text
from emosteer.base.strict_json import loads
from emosteer.scenarios.scenarios import data_path


@lru_cache
def lexicon(path: Path | None = None) -> dict[str, Any]:
    """The committed word list: `stems` (an emotion's own name), `names` (with close synonyms), `affect` (other feeling words)."""
    words: dict[str, Any] = loads(read_text(path or data_path("emotion_words.json"), "emotion word list"))
    return words


@lru_cache
def word_pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """A case-insensitive pattern for whole words; a trailing * stands for any ending."""
    parts = (re.escape(p[:-1]) + r"\w*" if p.endswith("*") else re.escape(p) for p in patterns)
    return re.compile(r"\b(?:" + "|".join(parts) + r")\b", re.IGNORECASE)


def name_pattern(emotion: str | None = None) -> re.Pattern[str]:
    """Matches the names and close synonyms of one emotion, or of every emotion of the list.

    An emotion that the list does not hold is matched by its own name as a stem.
    """
    names: dict[str, list[str]] = lexicon()["names"]
    if emotion is None:
        return word_pattern(tuple(p for patterns in names.values() for p in patterns))
    return word_pattern(tuple(names.get(emotion, [f"{emotion}*"])))


def stem_pattern(emotion: str) -> re.Pattern[str]:
    """Matches the emotion's own name in its forms ("happy", "happier"), not its synonyms."""
    stems: dict[str, list[str]] = lexicon()["stems"]
    return word_pattern(tuple(stems.get(emotion, [f"{emotion}*"])))


def feeling_pattern() -> re.Pattern[str]:
    """Matches every emotion name and feeling word: none may occur in a scenario or an event."""
    return word_pattern(tuple(p for patterns in lexicon()["names"].values() for p in patterns) + tuple(lexicon()["affect"]))
