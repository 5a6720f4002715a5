"""What is asked under every condition, and where it comes from. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from emosteer.base.files import sha256_file
from emosteer.scenarios.scenarios import NEUTRAL, Group, GroupKey, data_path
from emosteer.scenarios.shipped import development_groups, read_data
from emosteer.side_effects.checks import Item, read_items, read_prompts
from emosteer.side_effects.settings import SENTENCES, EffectsSettings

HARMFUL, HARMLESS, ATTACHMENT, EVERYDAY = "harmful", "harmless", "attachment", "everyday"
#: Feedback on wrong answers: plain, and by turns warm and cross.
PLAIN, WARM, CROSS = "feedback-plain", "feedback-warm", "feedback-cross"
Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Battery:
    """items: with their checks; asked: "harmful", "harmless", "attachment", "everyday" -> prompts; texts: prompts with the neutral replies
    that perplexity is read on; sentences: kind -> sentences; hashes: file -> sha256."""

    items: Sequence[Item]
    asked: Mapping[str, Sequence[Group]]
    texts: Sequence[tuple[Group, str]]
    sentences: Mapping[str, Sequence[str]]
    hashes: Mapping[str, str]

    @property
    def questions(self) -> list[Group]:
        """The items as prompts."""
        return [prompt_of(item.id, item.prompt) for item in self.items]


def prompt_of(name: str, text: str) -> Group:
    """A text to be answered, by its name."""
    return Group(GroupKey(name, ""), "", text, "effects")


def evenly(values: Sequence[Taken], count: int) -> list[Taken]:
    """So many of some values, evenly spread over them in their order; 0, or more than there are, takes all."""
    if not count or count >= len(values):
        return list(values)
    return [values[i * len(values) // count] for i in range(count)]


def battery_of(settings: EffectsSettings, items: Path | None = None) -> Battery:
    """Everything that is asked.

    Args:
        items: file of items of one's own; the shipped ones by default.

    Raises:
        DataError: for whatever is wrong with a file.
    """
    item_file = items or data_path("effects/items.jsonl")
    kinds = (HARMFUL, HARMLESS)
    requests = read_prompts("requests.jsonl", kinds)
    asked = {
        kind: [prompt_of(name, text) for name, k, text in evenly([row for row in requests if row[1] == kind], settings.requests)]
        for kind in kinds
    }
    seeking = read_prompts("attachment.jsonl", (ATTACHMENT,))
    asked[ATTACHMENT] = [prompt_of(name, text) for name, _, text in evenly(seeking, settings.attachments)]
    everyday = development_groups(max(1, settings.everyday))
    asked[EVERYDAY] = list(everyday.groups) if settings.everyday else []
    data = read_data(None, None)
    assert data.bank is not None
    neutral = [(group, data.bank[group.key][NEUTRAL]) for group in data.groups if NEUTRAL in data.bank[group.key]]
    said = read_prompts("sentences.jsonl", (*SENTENCES, PLAIN, WARM, CROSS))
    files = [data_path(f"effects/{name}") for name in ("requests.jsonl", "attachment.jsonl", "sentences.jsonl", "phrases.json")]
    return Battery(
        evenly(read_items(item_file), settings.items),
        asked,
        evenly(neutral, settings.texts),
        {kind: [text for _, k, text in said if k == kind] for kind in (*SENTENCES, PLAIN, WARM, CROSS)},
        {**{f"effects/{file.name}": sha256_file(file) for file in (item_file, *files)}, **everyday.hashes, **data.hashes},
    )
