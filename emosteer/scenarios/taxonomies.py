"""Sets of emotions as data: Ekman's six, Plutchik's eight, Parrott's tree in three tiers, the 27 of GoEmotions. No torch here.

An emotion has the name that a reply bank uses ("happiness", also where a set calls it joy), a parent where the set has one, words that a
text names it with, and its place on the axes valence, arousal and dominance, each -1 to 1. The places of Ekman's six are the means that
Russell and Mehrabian (1977) published; all others are our own judgement, and no word list was copied (docs/TAXONOMIES.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from emosteer.base.errors import DataError, UsageError, suggest
from emosteer.base.files import read_text
from emosteer.base.strict_json import loads
from emosteer.scenarios.data_files import data_path

#: The sets that are shipped.
TAXONOMIES = ("ekman6", "plutchik8", "parrott", "goemotions27")
AXES = ("valence", "arousal", "dominance")
#: Where a place is from: means that were published, or our judgement.
PLACED = ("published", "judgement")

Place = tuple[float, float, float]


@dataclass(frozen=True)
class Emotion:
    """One emotion of a set. name: as banks have it; called: as the set has it; parent: the name of the emotion above it, if any; place:
    valence, arousal and dominance; placed: one of `PLACED`; stems, names: its own name in its forms, and its close synonyms with them
    (a trailing * stands for any ending), empty where data/emotion_words.json has them."""

    name: str
    called: str
    parent: str | None
    place: Place
    placed: str
    stems: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Taxonomy:
    """A set. tiers: name of a tier -> its emotions, the coarsest first; parents: the set that the parents of the first tier are from."""

    name: str
    title: str
    source: str
    tiers: Mapping[str, tuple[Emotion, ...]]
    parents: str | None = None

    def tier(self, name: str | None = None) -> tuple[Emotion, ...]:
        """The emotions of a tier; a set of one tier need not say which.

        Raises:
            UsageError: for an unknown tier, or none where there are several.
        """
        chosen = next(iter(self.tiers)) if name is None and len(self.tiers) == 1 else name
        if chosen is None or chosen not in self.tiers:
            choices = " or ".join(f"{self.name}:{tier}" for tier in self.tiers)
            found = f"'{self.name}'" if name is None else f"'{self.name}:{name}'{suggest(name, self.tiers)}"
            raise UsageError(f"expected {choices}, found {found}")
        return self.tiers[chosen]


@lru_cache
def taxonomy(name: str) -> Taxonomy:
    """A shipped set.

    Raises:
        UsageError: for an unknown name. DataError: if its file is missing or not what it has to be.
    """
    if name not in TAXONOMIES:
        raise UsageError(f"unknown set of emotions '{name[:60]}'{suggest(name[:60], TAXONOMIES)}; expected {', '.join(TAXONOMIES)}")
    file = data_path(f"taxonomies/{name}.json")
    row: dict[str, Any] = loads(read_text(file, "set of emotions"))
    try:
        tiers = {tier: tuple(_emotion(entry) for entry in entries) for tier, entries in row["tiers"].items()}
        return Taxonomy(name, row["title"], row["source"], tiers, row.get("parents"))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is no set of emotions: {type(error).__name__} {error}; install emosteer again") from None


def _emotion(row: Mapping[str, Any]) -> Emotion:
    valence, arousal, dominance = (float(value) for value in row["vad"])
    words = (tuple(row.get(kind, ())) for kind in ("stems", "names"))
    return Emotion(row["name"], row.get("called", row["name"]), row.get("parent"), (valence, arousal, dominance), row["placed"], *words)


def emotions_of(text: str) -> tuple[str, ...] | None:
    """The names that "plutchik8" or "parrott:secondary" stands for, None for what is no set's name.

    Raises:
        UsageError: for a tier that the set lacks, or none where it has several, or an unknown set with a tier.
    """
    name, colon, tier = (part.strip() for part in text.strip().casefold().partition(":"))
    if not colon and name not in TAXONOMIES:
        return None
    return tuple(emotion.name for emotion in taxonomy(name).tier(tier if colon else None))


@lru_cache
def known_emotions() -> Mapping[str, Emotion]:
    """Every emotion of the shipped sets by its name in banks; where several sets hold it, as the first of them has it."""
    found: dict[str, Emotion] = {}
    for name in TAXONOMIES:
        for members in taxonomy(name).tiers.values():
            for emotion in members:
                found.setdefault(emotion.name, emotion)
    return found


def place_of(name: str) -> Place | None:
    """Valence, arousal and dominance of an emotion, None where no set holds it."""
    emotion = known_emotions().get(name)
    return None if emotion is None else emotion.place


def families_in(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The parents among some emotions with their children among them: parent -> children, by the set that finds the most of them (love is a
    parent to Parrott and a child to GoEmotions). A name that is in several tiers (Parrott's surprise, rage's anger) counts in the first."""
    best: dict[str, list[str]] = {}
    for name in TAXONOMIES:
        found: dict[str, list[str]] = {}
        parents = taxonomy(name).parents
        above = set() if parents is None else {emotion.name for emotion in taxonomy(parents).tier()}
        for members in taxonomy(name).tiers.values():
            for emotion in members:
                if emotion.parent is not None and {emotion.parent, emotion.name} <= set(names) and emotion.name not in above:
                    found.setdefault(emotion.parent, []).append(emotion.name)
            above |= {emotion.name for emotion in members}
        best = max(best, found, key=lambda families: sum(map(len, families.values())))
    return {parent: tuple(dict.fromkeys(children)) for parent, children in best.items()}
