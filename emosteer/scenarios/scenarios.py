"""SEV scenarios and reply banks: read, validate, lint, split. No torch here.

A scenario is one neutral first-person situation; its three events (positive, neutral, negative) say what happened next
(paper section 3.1). A group is one (scenario, valence) pair; the emotions are compared inside a group, never across.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from emosteer.base.errors import DataError, suggest
from emosteer.base.files import read_jsonl
from emosteer.scenarios.data_files import data_path as data_path
from emosteer.scenarios.emotions import EMOTIONS as EMOTIONS
from emosteer.scenarios.emotions import NEUTRAL as NEUTRAL
from emosteer.scenarios.emotions import label_of
from emosteer.scenarios.emotions import parse_emotions as parse_emotions
from emosteer.scenarios.scripts import joined

#: The kind of prompt that a SEV file holds.
SEV_KIND = "sev-vivid"
VALENCES = ("positive", "neutral", "negative")
#: Fields that the text of a reply may stand under; the paper's own files have the second.
REPLY_FIELDS = ("text", "gen_text")


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
        return f"{self.scenario}/{self.valence}" if self.valence else self.scenario


class Message(NamedTuple):
    """One turn of a conversation. role: "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Group:
    """One scenario-event, or a prompt of another kind (`prompt_sets`), as the user's last turn. earlier: what was said before it."""

    key: GroupKey
    theme: str
    text: str
    kind: str = SEV_KIND
    earlier: tuple[Message, ...] = ()

    @property
    def said(self) -> str:
        """The whole conversation as one text."""
        return " ".join([*(message.content for message in self.earlier), self.text])


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
            raise DataError(f"{path}:{number}: skeleton_id '{scenario.id[:60]}' was used on line {seen[scenario.id]}; ids must be unique")
        seen[scenario.id] = number
        scenarios.append(scenario)
    return scenarios


def parse_scenario(row: Mapping[str, Any], where: str) -> Scenario:
    """Checks one JSON object and makes it a Scenario.

    Raises:
        DataError: starting with `where`, if a field is missing or of the wrong type.
    """
    text = identity_field(row.get("skeleton_id"), where), text_field(row.get("scenario"), "scenario", where)
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


def identity_field(value: Any, where: str) -> str:
    """A scenario's id, which may be written as a number; otherwise a DataError starting with `where`."""
    number = isinstance(value, int) and not isinstance(value, bool)
    return text_field(str(value) if number else value, "skeleton_id", where)


def _found(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {json.dumps(value, ensure_ascii=False)[:40]}"


def groups_of(scenarios: Iterable[Scenario]) -> list[Group]:
    """Every scenario-event, in file order and valence order."""
    return [Group(GroupKey(s.id, v), s.theme, joined(s.text, s.events[v])) for s in scenarios for v in VALENCES]


Bank = dict[GroupKey, dict[str, str]]


def read_bank(path: Path | str) -> Bank:
    """Reads a reply bank: `{"skeleton_id", "valence", "emotion", "text"}` a line (what `generate --out` writes is one); the text may be
    called `gen_text`, as in the paper's files, and other fields are passed over. Replies to prompts that are no scenario-events have no
    valence. Groups need not have a reply in every emotion.

    Returns:
        group -> emotion, in its one spelling (`emotions.emotion_key`), or "neutral" -> reply.

    Raises:
        DataError: naming file and line, for a missing field, an unknown valence, a name that is no emotion's or a reply given twice.
    """
    bank: Bank = {}
    for number, row in read_jsonl(Path(path), "reply bank"):
        where = f"{path}:{number}"
        scenario = identity_field(row.get("skeleton_id"), where)
        emotion = label_of(text_field(row.get("emotion"), "emotion", where), where)
        name = next((field for field in REPLY_FIELDS if row.get(field) is not None), REPLY_FIELDS[0])
        text = text_field(row.get(name), name, where)
        valence = "" if row.get("valence") is None else text_field(row["valence"], "valence", where).lower()
        if valence and valence not in VALENCES:
            raise DataError(f"{where}: unknown valence '{valence[:40]}'{suggest(valence[:40], VALENCES)}; expected {', '.join(VALENCES)}")
        key = GroupKey(scenario, valence)
        replies = bank.setdefault(key, {})
        if emotion in replies:
            raise DataError(f"{where}: {key} already has a reply for '{emotion}'; one reply per group and emotion")
        replies[emotion] = text
    return bank


def replies_of(bank: Bank | None, group: Group, emotions: Iterable[str]) -> dict[str, str]:
    """The replies to a group in some emotions, those that are there, in the emotions' order."""
    replies = (bank or {}).get(group.key, {})
    return {emotion: replies[emotion] for emotion in emotions if emotion in replies}
