"""Emotion words: the committed list, and patterns that match names and feelings. No torch here."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from emosteer.base.files import read_text
from emosteer.base.strict_json import loads
from emosteer.scenarios.emotions import emotion_key
from emosteer.scenarios.scenarios import data_path
from emosteer.scenarios.scripts import is_unspaced, marks, spaced_out
from emosteer.scenarios.taxonomies import known_emotions


@lru_cache
def lexicon(path: Path | None = None) -> dict[str, Any]:
    """The committed word list: `stems` (an emotion's own name), `names` (with close synonyms), `affect` (other feeling words)."""
    words: dict[str, Any] = loads(read_text(path or data_path("emotion_words.json"), "emotion word list"))
    return words


@dataclass(frozen=True)
class WordPattern:
    """Words to look for, whatever the text's case and Unicode form. unspaced: they are of a script without white space between words,
    and are found inside a run of letters; those of other scripts end where words end, or where such a run begins."""

    regex: re.Pattern[str]
    unspaced: bool = False

    def search(self, text: str) -> re.Match[str] | None:
        """The first of the words, None if there is none. Places refer to the text as it is compared, which may be longer."""
        return self.regex.search(self._compared(text))

    def findall(self, text: str) -> list[str]:
        """Every one of the words, as written."""
        return [found[0] for found in self.regex.finditer(self._compared(text))]

    def fullmatch(self, text: str) -> re.Match[str] | None:
        """The text itself, if it is one of the words."""
        return self.regex.fullmatch(self._compared(text).strip())

    def _compared(self, text: str) -> str:
        if text.isascii():
            return text
        whole = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
        return whole if self.unspaced or not is_unspaced(whole) else spaced_out(whole)


@lru_cache
def word_pattern(patterns: tuple[str, ...]) -> WordPattern:
    """A case-insensitive pattern for whole words; a trailing * stands for any ending."""
    parts = (re.escape(p[:-1]) + r"\w*" if p.endswith("*") else re.escape(p) for p in patterns)
    return WordPattern(re.compile(r"\b(?:" + "|".join(parts) + r")\b", re.IGNORECASE))


@lru_cache
def _own_name(name: str) -> WordPattern:
    """Matches a name that the list does not hold, as a stem: with any ending, and in a script without white space wherever it stands."""
    body = re.escape(name).replace(r"\ ", r"\s+").replace("ss", "(?:ss|\u00df)")  # folding made the one of the other
    body = body.replace("i\u0307", "(?:i\u0307|\u0130)")  # and this of the Turkish capital
    if name.isascii():
        return WordPattern(re.compile(rf"\b{body}\w*\b" if name[-1].isalnum() else rf"\b{body}", re.IGNORECASE))
    letter = rf"[\w{marks()}]"
    start = "" if is_unspaced(name[0]) else rf"(?<!{letter})"
    last = next((c for c in reversed(name) if unicodedata.category(c)[0] != "M"), "")
    end = "" if is_unspaced(last) else f"{letter}*"
    return WordPattern(re.compile(start + body + end, re.IGNORECASE), unspaced=is_unspaced(name))


def _listed(emotion: str, kind: str) -> WordPattern:
    """The words of one emotion in the list, else those that a set of emotions has for it, else its own name."""
    words: dict[str, list[str]] = lexicon()[kind]
    name = emotion_key(emotion)
    if name in words:
        return word_pattern(tuple(words[name]))
    shipped = known_emotions().get(name)
    found = () if shipped is None else shipped.stems if kind == "stems" else shipped.names
    return word_pattern(found) if found else _own_name(name)


def name_pattern(emotion: str | None = None) -> WordPattern:
    """Matches the names and close synonyms of one emotion, or of every emotion of the list.

    An emotion that the list does not hold is matched by the words of the set that holds it (`taxonomies`), else by its own name as a stem.
    """
    if emotion is None:
        names: dict[str, list[str]] = lexicon()["names"]
        return word_pattern(tuple(p for patterns in names.values() for p in patterns))
    return _listed(emotion, "names")


def stem_pattern(emotion: str) -> WordPattern:
    """Matches the emotion's own name in its forms ("happy", "happier"), not its synonyms."""
    return _listed(emotion, "stems")


def feeling_pattern() -> WordPattern:
    """Matches every emotion name and feeling word: none may occur in a scenario or an event."""
    return word_pattern(tuple(p for patterns in lexicon()["names"].values() for p in patterns) + tuple(lexicon()["affect"]))
