"""SEV scenarios and reply banks: read, validate, lint, split. No torch here.

A scenario is one neutral first-person situation; its three events (positive, neutral, negative) say what happened next
(paper section 3.1). A group is one (scenario, valence) pair; the emotions are compared inside a group, never across.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from emosteer.errors import DataError, UsageError, suggest
from emosteer.files import read_jsonl, read_text

VALENCES = ("positive", "neutral", "negative")
#: The paper's six. The set is data, not code: every stage takes any list of names.
EMOTIONS = ("anger", "sadness", "happiness", "fear", "surprise", "disgust")


@dataclass(frozen=True)
class Scenario:
    """One scenario. events: valence -> what happened next."""

    id: str
    theme: str
    text: str
    events: Mapping[str, str]

    def to_row(self) -> dict[str, Any]:
        """The JSON object of the paper's file format."""
        return {"skeleton_id": self.id, "theme": self.theme, "scenario": self.text, "event": dict(self.events)}


@dataclass(frozen=True, order=True)
class GroupKey:
    """(scenario, valence). Keying by the scenario alone would overwrite two valences out of three."""

    scenario: str
    valence: str

    def __str__(self) -> str:
        return f"{self.scenario}/{self.valence}"


@dataclass(frozen=True)
class Group:
    """One scenario-event as a prompt's text."""

    key: GroupKey
    theme: str
    text: str


@dataclass(frozen=True)
class Problem:
    """One thing that a lint found. where: an id or file:line; rule: a short name; message: what was found."""

    where: str
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}: {self.message}"


# ---- where the shipped data is -------------------------------------------------------------------------------------


def data_path(name: str) -> Path:
    """Path of a file of the shipped data (``sev/train.jsonl``): inside an installed package or beside it in a checkout.

    Raises:
        DataError: if it is in neither place.
    """
    here = Path(__file__).parent
    for root in (here / "data", here.parent / "data"):
        if (root / name).exists():
            return root / name
    raise DataError(f"the shipped data file {name} is missing; install emosteer again")


# ---- reading -------------------------------------------------------------------------------------------------------


def read_scenarios(path: Path | str) -> list[Scenario]:
    """Reads a SEV file: `{"skeleton_id", "theme", "scenario", "event": {"positive", "neutral", "negative"}}` a line.

    Raises:
        DataError: naming file and line, for whatever is missing, empty, of the wrong type or there twice.
    """
    scenarios: list[Scenario] = []
    seen: dict[str, int] = {}
    for number, row in read_jsonl(Path(path), "scenario file"):
        scenario = parse_scenario(row, f"{path}:{number}")
        if scenario.id in seen:
            raise DataError(f"{path}:{number}: skeleton_id '{scenario.id}' was used on line {seen[scenario.id]}; ids must be unique")
        seen[scenario.id] = number
        scenarios.append(scenario)
    return scenarios


def parse_scenario(row: Mapping[str, Any], where: str) -> Scenario:
    """Checks one JSON object and makes it a Scenario.

    Raises:
        DataError: starting with `where`, if a field is missing or of the wrong type.
    """
    identity = row.get("skeleton_id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    text = text_field(identity, "skeleton_id", where), text_field(row.get("scenario"), "scenario", where)
    theme = row.get("theme", "")
    if not isinstance(theme, str):
        raise DataError(f"{where}: expected 'theme' to be a text, found a {type(theme).__name__}")
    theme = text_field(theme, "theme", where) if theme.strip() else ""
    events = row.get("event")
    if not isinstance(events, Mapping):
        raise DataError(f"{where}: expected 'event' to be an object with {', '.join(VALENCES)}, found {_found(events)}")
    for valence in VALENCES:
        if valence not in events:
            raise DataError(f"{where}: the event '{valence}' is missing; each scenario needs {', '.join(VALENCES)}")
    return Scenario(text[0], theme, text[1], {v: text_field(events[v], f"event.{v}", where) for v in VALENCES})


def text_field(value: Any, name: str, where: str) -> str:
    """Checks that a value is a text that is not empty, and strips it; otherwise a DataError starting with `where`."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: expected '{name}' to be a text that is not empty, found {_found(value)}")
    if re.search("[\ud800-\udfff]", value):  # JSON can hold one as an escape; no file can be written with it
        raise DataError(f"{where}: '{name}' holds half of a character (a lone surrogate); write the character in full")
    return value.strip()


def _found(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {json.dumps(value, ensure_ascii=False)[:40]}"


def groups_of(scenarios: Iterable[Scenario]) -> list[Group]:
    """Every scenario-event, in file order and valence order."""
    return [Group(GroupKey(s.id, v), s.theme, f"{s.text} {s.events[v]}") for s in scenarios for v in VALENCES]


Bank = dict[GroupKey, dict[str, str]]


def read_bank(path: Path | str) -> Bank:
    """Reads a reply bank: `{"skeleton_id", "valence", "emotion", "text"}` a line (what `generate --out` writes is one).

    Returns:
        group -> emotion -> reply.

    Raises:
        DataError: naming file and line, for a missing field, an unknown valence or a reply given twice.
    """
    bank: Bank = {}
    for number, row in read_jsonl(Path(path), "reply bank"):
        where = f"{path}:{number}"
        scenario, valence, emotion, text = (text_field(row.get(k), k, where) for k in ("skeleton_id", "valence", "emotion", "text"))
        if valence not in VALENCES:
            raise DataError(f"{where}: unknown valence '{valence}'{suggest(valence, VALENCES)}; expected {', '.join(VALENCES)}")
        replies = bank.setdefault(GroupKey(scenario, valence), {})
        if emotion in replies:
            raise DataError(f"{where}: {scenario}/{valence} already has a reply for '{emotion}'; one reply per group and emotion")
        replies[emotion] = text
    return bank


def parse_emotions(text: str, known: Sequence[str] = EMOTIONS, *, closed: bool = True) -> tuple[str, ...]:
    """Reads "all" or a comma-separated list of emotions.

    Args:
        closed: refuse names that are not in `known` (with the nearest as a hint).

    Raises:
        UsageError: for an unknown, repeated or missing name.
    """
    if text.strip().lower() == "all":
        return tuple(known)
    names = tuple(name.strip().lower() for name in text.split(",") if name.strip())
    if not names:
        raise UsageError("expected an emotion or 'all', found nothing")
    for name in names:
        if closed and name not in known:
            raise UsageError(f"unknown emotion '{name}'{suggest(name, known)}; known: {', '.join(known)}")
        if not re.fullmatch(r"[\w-]+", name):
            raise UsageError(f"expected an emotion's name in letters, found '{name}'")
    if len(set(names)) != len(names):
        raise UsageError(f"an emotion is named twice in '{text}'")
    return names


# ---- splitting -----------------------------------------------------------------------------------------------------


def split(scenarios: Sequence[Scenario], test_share: float, seed: int) -> tuple[list[Scenario], list[Scenario]]:
    """Splits by whole scenarios, with each theme's share kept; the same seed gives the same split.

    Raises:
        UsageError: if the share is not between 0 and 1 or would leave a side empty.
    """
    if not 0 < test_share < 1:
        raise UsageError(f"expected a test share between 0 and 1, found {test_share}")
    themes: dict[str, list[Scenario]] = defaultdict(list)
    for scenario in scenarios:
        themes[scenario.theme].append(scenario)
    order = sorted(themes)
    random.Random(f"{seed}").shuffle(order)
    chosen: set[str] = set()
    wanted = 0.0
    for theme in order:
        members = sorted(themes[theme], key=lambda s: s.id)
        random.Random(f"{seed}/{theme}").shuffle(members)
        wanted += len(members) * test_share
        # What one theme rounds off goes to the next: themes of one scenario each are split too, and the total is right.
        chosen.update(s.id for s in members[: max(0, math.floor(wanted + 0.5) - len(chosen))])
    train, test = [s for s in scenarios if s.id not in chosen], [s for s in scenarios if s.id in chosen]
    if not train or not test:
        raise UsageError(f"a test share of {test_share} leaves one side of {len(scenarios)} scenarios empty")
    return train, test


def stable_share(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on the key and the seed alone: which half or fold something falls into."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def spread(groups: Sequence[Group], count: int, seed: int = 0) -> list[Group]:
    """Some of the groups, drawn evenly over scenarios and valences; the same seed gives the same draw, a larger count a superset.

    A fixed stride would not do: valences come in threes, and a stride of a multiple of three would pick one of them only.
    """
    return sorted(groups, key=lambda group: stable_share(f"spread/{group.key}/{group.text}", seed))[:count]


def unread(groups: Sequence[Group], count: int, skip: int = 0) -> list[Group]:
    """Test groups from the end of a fixed order (the first 40 of the shipped ones were looked at while the method was developed).

    Args:
        count: how many; 0 is all. skip: how many at the end are left out, because they were read before.

    Raises:
        UsageError: if nothing is left.
    """
    order = sorted(groups, key=lambda group: stable_share(str(group.key), 1))
    left = order[: len(order) - skip]
    if not left:
        raise UsageError(f"--skip {skip} leaves nothing of {len(order)} scenario-events")
    return left[-count:] if count else left


# ---- lints ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """Bounds that the lints hold a dataset to; words are counted by white space."""

    scenario_words: tuple[int, int] = (8, 60)
    event_words: tuple[int, int] = (6, 60)
    reply_words: tuple[int, int] = (5, 60)
    overlap: float = 0.5
    reply_overlap: float = 0.35


@lru_cache
def lexicon(path: Path | None = None) -> dict[str, Any]:
    """The committed word list: `stems` (an emotion's own name), `names` (with close synonyms), `affect` (other feeling words)."""
    words: dict[str, Any] = json.loads(read_text(path or data_path("emotion_words.json"), "emotion word list"))
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
    """Matches every emotion name and feeling word: none may stand in a scenario or an event."""
    return word_pattern(tuple(p for patterns in lexicon()["names"].values() for p in patterns) + tuple(lexicon()["affect"]))


def lint_scenario(scenario: Scenario, limits: Limits | None = None) -> list[Problem]:
    """Length and emotion words of one scenario and its events."""
    limits, problems = limits or Limits(), []
    parts = [("scenario", scenario.text, limits.scenario_words)]
    parts += [(f"event.{valence}", scenario.events[valence], limits.event_words) for valence in VALENCES]
    for name, text, (low, high) in parts:
        count = len(text.split())
        if not low <= count <= high:
            problems.append(Problem(scenario.id, "length", f"{name} has {count} words, expected {low} to {high}"))
        if found := feeling_pattern().findall(text):
            problems.append(Problem(scenario.id, "emotion word", f"{name} holds {', '.join(sorted(set(found)))}"))
    return problems


def lint_scenarios(scenarios: Sequence[Scenario], limits: Limits | None = None) -> list[Problem]:
    """Every lint of a scenario set: each item's own, duplicates and near-duplicates, balance of the themes."""
    limits = limits or Limits()
    problems = [problem for scenario in scenarios for problem in lint_scenario(scenario, limits)]
    problems += near_duplicates({s.id: " ".join([s.text, *s.events.values()]) for s in scenarios}, limits.overlap)
    for scenario in scenarios:
        if len({scenario.text, *scenario.events.values()}) < 4:
            problems.append(Problem(scenario.id, "duplicate", "two of its texts are the same"))
    counts = Counter(s.theme for s in scenarios)
    most, least = max(counts.values(), default=0), min(counts.values(), default=0)
    if most > 2 * least:
        problems.append(Problem("themes", "balance", f"the largest has {most} scenarios, the smallest {least}"))
    return problems


def lint_bank(bank: Bank, emotions: Sequence[str] = EMOTIONS, limits: Limits | None = None) -> list[Problem]:
    """Lints of a reply bank: every group complete, length, emotion names, near-duplicates, equal length over emotions."""
    limits, problems = limits or Limits(), []
    low, high = limits.reply_words
    lengths: dict[str, list[int]] = defaultdict(list)
    for key, replies in bank.items():
        missing = [emotion for emotion in emotions if emotion not in replies]
        if missing:
            problems.append(Problem(str(key), "balance", f"no reply for {', '.join(missing)}"))
        for emotion, text in replies.items():
            count = len(text.split())
            lengths[emotion].append(count)
            if not low <= count <= high:
                problems.append(Problem(f"{key}/{emotion}", "length", f"{count} words, expected {low} to {high}"))
            if found := sorted({*name_pattern().findall(text), *name_pattern(emotion).findall(text)}):
                problems.append(Problem(f"{key}/{emotion}", "emotion word", f"names a feeling: {', '.join(found)}"))
    texts = {f"{key}/{emotion}": text for key, replies in bank.items() for emotion, text in replies.items()}
    problems += near_duplicates(texts, limits.reply_overlap, size=4)
    means = {emotion: sum(counts) / len(counts) for emotion, counts in lengths.items()}
    if means and max(means.values()) > 1.5 * min(means.values()):
        longest, shortest = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        problems.append(Problem("replies", "balance", f"{longest} averages {means[longest]:.1f} words, {shortest} {means[shortest]:.1f}"))
    return problems


def _shingles(text: str, size: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)} or {tuple(words)}


def near_duplicates(texts: Mapping[str, str], overlap: float, size: int = 3) -> list[Problem]:
    """Pairs of texts that share more than `overlap` of the shorter one's word n-grams. Linear in the number of shared n-grams."""
    shingles = {key: _shingles(text, size) for key, text in texts.items()}
    where: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key, grams in shingles.items():
        for gram in grams:
            where[gram].append(key)
    shared: Counter[tuple[str, str]] = Counter()
    for keys in where.values():
        for i, first in enumerate(keys[:200]):  # an n-gram in hundreds of texts is a commonplace, and would cost its square
            for second in keys[i + 1 : 200]:
                shared[first, second] += 1
    found = []
    for (first, second), count in shared.items():
        share = count / min(len(shingles[first]), len(shingles[second]))
        if share > overlap:
            rule = "duplicate" if share == 1 else "near-duplicate"
            found.append(Problem(second, rule, f"shares {share:.0%} of its word {size}-grams with {first}"))
    return found


def overlap_between(first: Sequence[Scenario], second: Sequence[Scenario], limits: Limits | None = None) -> list[Problem]:
    """Scenarios of `second` that stand in `first` too, by id or by text: train and test must be disjoint."""
    limits = limits or Limits()
    known = {s.id for s in first}
    problems = [Problem(s.id, "not disjoint", "the same id is in both files") for s in second if s.id in known]
    texts = {f"first:{s.id}": " ".join([s.text, *s.events.values()]) for s in first}
    texts |= {f"second:{s.id}": " ".join([s.text, *s.events.values()]) for s in second}
    for problem in near_duplicates(texts, limits.overlap):
        if problem.where.startswith("second:") and "first:" in problem.message:
            problems.append(Problem(problem.where.removeprefix("second:"), "not disjoint", problem.message.replace("first:", "")))
    return problems
