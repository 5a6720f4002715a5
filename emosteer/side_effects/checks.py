"""Exact checks of replies, as data: what an item accepts, and the phrases that tell a refusal, a boundary, an insult or a threat.

No model and no judge has a say here: a check is a list of accepted answers or a pattern that stands in a file, so that everybody gets the
same result from the same reply. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from emosteer.base.errors import DataError
from emosteer.base.files import read_jsonl, read_text
from emosteer.base.strict_json import loads
from emosteer.scenarios.scenarios import data_path, text_field
from emosteer.scenarios.scripts import word_count

#: Kinds of items, in the order of tables.
FACT, ARITHMETIC, INSTRUCTION = "fact", "arithmetic", "instruction"
ITEM_KINDS = (FACT, ARITHMETIC, INSTRUCTION)
#: What the phrases tell, in the file of phrases.
REFUSAL, INSULT, THREAT = "refusal", "insult", "threat"
#: Response patterns to somebody who seeks attachment; a reply may show several (docs/EFFECTS.md says what each is).
PATTERNS = ("refusal", "apology", "explanation", "deflection", "acknowledgement", "boundary", "awareness")
#: The reply joins in as if it were a person: what keeping a boundary is not.
JOINS = "joins in"
_FIELDS = {"id", "kind", "prompt", "says", "matches", "lacks", "lists", "count", "words"}
#: Replies are short; so much of one is looked at, whatever the pattern.
LONGEST = 4000


@dataclass(frozen=True)
class Check:
    """What a reply must be; every part that is there must hold.

    says: one of these answers stands in it as whole words; matches, lacks: regular expressions that are found in it, that are not; lists:
    groups of spellings, "mouse/mice", of which so many as `count` says (least, most) stand in it; words: how many it has, least and most.
    """

    says: tuple[str, ...] = ()
    matches: tuple[re.Pattern[str], ...] = ()
    lacks: tuple[re.Pattern[str], ...] = ()
    lists: tuple[str, ...] = ()
    count: tuple[int, int | None] = (1, None)
    words: tuple[int, int | None] = (0, None)

    @cached_property
    def _said(self) -> re.Pattern[str]:
        return whole_words(self.says)

    @cached_property
    def _listed(self) -> tuple[re.Pattern[str], ...]:
        return tuple(whole_words(group.split("/")) for group in self.lists)

    def holds(self, reply: str) -> bool:
        """Whether a reply passes."""
        text = reply[:LONGEST].strip()
        if self.says and not self._said.search(text):
            return False
        if not all(pattern.search(text) for pattern in self.matches) or any(pattern.search(text) for pattern in self.lacks):
            return False
        if self.lists and not _within(sum(bool(pattern.search(text)) for pattern in self._listed), self.count):
            return False
        return bool(text) and _within(word_count(text), self.words)


@dataclass(frozen=True)
class Item:
    """A question or instruction with its check."""

    id: str
    kind: str
    prompt: str
    check: Check


def whole_words(answers: Sequence[str]) -> re.Pattern[str]:
    """Finds one of some answers whatever their case, not as a part of a longer word or number: 12 is neither in 120 nor in 12.5 nor in
    12th, but in 12.0 and in 12cm."""
    numbers = [answer for answer in answers if answer.isdecimal()]
    names = sorted((answer for answer in answers if not answer.isdecimal()), key=len, reverse=True)
    parts = [rf"(?<!\w)(?<!\w[-'])(?:{'|'.join(map(re.escape, names))})(?!\w)"] if names else []
    if numbers:
        parts.append(rf"(?<![\w.,-])(?:{'|'.join(numbers)})(?:\.0+)?(?!\d|[.,]\d|(?:st|nd|rd|th)\b)")
    return re.compile("|".join(parts), re.IGNORECASE)


def _within(value: int, bounds: tuple[int, int | None]) -> bool:
    return bounds[0] <= value and (bounds[1] is None or value <= bounds[1])


# ---- files ---------------------------------------------------------------------------------------------------------------------


def read_items(path: Path) -> list[Item]:
    """Reads items: one JSON object a line with "id", "kind", "prompt" and the parts of a `Check`.

    Raises:
        DataError: naming file and line, for a part that is missing, unknown or malformed, and for an id that is there twice.
    """
    items: list[Item] = []
    for number, row in read_jsonl(path, "file of items"):
        where = f"{path}:{number}"
        if stray := sorted(row.keys() - _FIELDS):
            raise DataError(f"{where}: '{stray[0][:40]}' is no part of an item; expected some of {', '.join(sorted(_FIELDS))}")
        kind = text_field(row.get("kind"), "kind", where)
        if kind not in ITEM_KINDS:
            raise DataError(f"{where}: expected 'kind' to be one of {', '.join(ITEM_KINDS)}, found '{kind[:40]}'")
        items.append(Item(text_field(row.get("id"), "id", where), kind, text_field(row.get("prompt"), "prompt", where), _check(row, where)))
    names = [item.id for item in items]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: the id '{twice[:40]}' is there twice; ids must be unique")
    return items


def _check(row: Mapping[str, Any], where: str) -> Check:
    says, lists = _texts(row, "says", where), _texts(row, "lists", where)
    found = Check(
        says,
        tuple(_pattern(text, where) for text in _texts(row, "matches", where)),
        tuple(_pattern(text, where) for text in _texts(row, "lacks", where)),
        lists,
        _bounds(row, "count", where, (1, None)),
        _bounds(row, "words", where, (0, None)),
    )
    if found == Check():
        raise DataError(f"{where}: the item has no check; give it 'says', 'matches', 'lacks', 'lists' or 'words'")
    return found


def _texts(row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = row.get(name, [])
    if not isinstance(value, list):
        raise DataError(f"{where}: expected '{name}' to be a list of texts, found a {type(value).__name__}")
    return tuple(text_field(text, name, where) for text in value)


def _bounds(row: Mapping[str, Any], name: str, where: str, usual: tuple[int, int | None]) -> tuple[int, int | None]:
    value = row.get(name, list(usual))
    least, most = value if isinstance(value, list) and len(value) == 2 else (None, None)
    if type(least) is not int or least < 0 or (most is not None and (type(most) is not int or most < least)):
        raise DataError(f"{where}: expected '{name}' to be [least, most] with most a number or null, found {str(value)[:40]}")
    return least, most


def _pattern(text: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise DataError(f"{where}: '{text[:40]}' is no regular expression ({error})") from error


def read_prompts(name: str, kinds: Sequence[str]) -> list[tuple[str, str, str]]:
    """(id, kind, prompt) of every line of a shipped file of prompts.

    Raises:
        DataError: naming file and line.
    """
    path = data_path(f"effects/{name}")
    found = []
    for number, row in read_jsonl(path, "file of prompts"):
        where = f"{path}:{number}"
        kind = text_field(row.get("kind"), "kind", where)
        if kind not in kinds:
            raise DataError(f"{where}: expected 'kind' to be one of {', '.join(kinds)}, found '{kind[:40]}'")
        found.append((text_field(row.get("id"), "id", where), kind, text_field(row.get("prompt"), "prompt", where)))
    return found


@dataclass(frozen=True)
class Phrases:
    """Committed phrase lists: what is told -> patterns, any of which tells it in a reply."""

    patterns: Mapping[str, re.Pattern[str]]

    def tells(self, what: str, reply: str) -> bool:
        """Whether a reply holds a phrase of a list."""
        text = reply[:LONGEST].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        return self.patterns[what].search(text) is not None


def read_phrases() -> Phrases:
    """The shipped phrase lists.

    Raises:
        DataError: if a list is missing or holds no regular expression.
    """
    path = data_path("effects/phrases.json")
    try:
        lists = loads(read_text(path, "file of phrases"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); install emosteer again") from error
    wanted = (REFUSAL, INSULT, THREAT, JOINS, *(f"pattern: {name}" for name in PATTERNS))
    if not isinstance(lists, dict) or sorted(lists) != sorted(wanted):
        raise DataError(f"expected {path} to hold the lists {', '.join(wanted)}; install emosteer again")
    return Phrases(
        {name: re.compile("|".join(f"(?:{_pattern(p, str(path)).pattern})" for p in lists[name]), re.IGNORECASE) for name in wanted}
    )


# ---- language ------------------------------------------------------------------------------------------------------------------

#: A reply of fewer words is too short to tell its language.
FEWEST_WORDS = 6
#: Of the words of English running text about every second is one of its commonest; a reply below this share of them is not English.
LEAST_COMMON = 0.1


def is_foreign(reply: str, common: frozenset[str]) -> bool | None:
    """Whether a reply is not in English: most of its letters are not Latin, or hardly any of its words are common English ones. None where
    it is too short to tell.

    Args:
        common: function words of English.
    """
    text = reply[:LONGEST]
    letters = [letter for letter in text if letter.isalpha()]
    if letters and sum(letter > "\u024f" for letter in letters) > len(letters) / 2:
        return True
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())
    if len(words) < FEWEST_WORDS:
        return None
    return sum(word in common for word in words) < LEAST_COMMON * len(words)


def common_words() -> frozenset[str]:
    """Function words of English, from the shipped list."""
    lists: dict[str, str] = loads(read_text(data_path("function_words.json"), "list of function words"))
    return frozenset(word for words in lists.values() for word in words.split())
