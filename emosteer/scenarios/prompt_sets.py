"""Prompts of many kinds: what is said to the model beside SEV scenario-events. No torch here.

A file holds JSON lines `{"id", "kind", "messages"}`; the user's last turn is what is answered. Whatever reads scenario-events reads such a
file as well (`read_groups`), and either can be narrowed to some kinds or kept without some.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from emosteer.base.errors import DataError, UsageError, suggest
from emosteer.base.files import read_jsonl
from emosteer.scenarios.conversations import parse_messages
from emosteer.scenarios.scenarios import SEV_KIND, Group, GroupKey, Scenario, groups_of, parse_scenario, text_field
from emosteer.scenarios.splits import spread

#: Kinds of prompt: SEV scenario-events, vivid (a SEV file) or plain and office-like; one statement; questions; requests for a text or a
#: piece of help; small talk; impersonal facts; the last turn of a short chat.
KINDS = (SEV_KIND, "sev-plain", "one-liner", "question", "request", "small-talk", "bare-fact", "chat")


def read_groups(path: Path) -> list[Group]:
    """The prompts of a file: scenario-events of a SEV file, or prompts of any kinds; lines of both may stand together.

    Raises:
        DataError: naming file and line, for whatever is missing, of the wrong type or there twice.
    """
    return [group for item in _items(path) for group in ([item] if isinstance(item, Group) else groups_of([item]))]


def read_events(path: Path) -> list[Scenario]:
    """The scenarios among the lines of a prompt file; errors as for `read_groups`."""
    return [item for item in _items(path) if isinstance(item, Scenario)]


def _items(path: Path) -> Iterator[Scenario | Group]:
    seen: dict[str, int] = {}
    for number, row in read_jsonl(path, "prompt file"):
        where = f"{path}:{number}"
        item = parse_prompt(row, where) if "messages" in row else parse_scenario(row, where)
        name = item.key.scenario if isinstance(item, Group) else item.id
        if name in seen:
            raise DataError(f"{where}: the id '{name[:60]}' was used on line {seen[name]}; ids must be unique")
        seen[name] = number
        yield item


def parse_prompt(row: dict[str, Any], where: str) -> Group:
    """Checks one JSON object and makes it a Group, whose theme is its kind.

    Raises:
        DataError: starting with `where`.
    """
    kind = text_field(row.get("kind"), "kind", where)
    if kind not in KINDS:
        raise DataError(f"{where}: unknown kind '{kind[:60]}'{suggest(kind[:60], KINDS)}; expected {', '.join(KINDS)}")
    messages = parse_messages(row.get("messages"), where)
    return Group(GroupKey(text_field(row.get("id"), "id", where), ""), kind, messages[-1].content, kind, messages[:-1])


def parse_kinds(text: str) -> tuple[str, ...]:
    """Reads "all" or a list of kinds with commas; "-chat" is all but chat.

    Raises:
        UsageError: for a kind that there is not.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name != "all" and name.removeprefix("-") not in KINDS:
            raise UsageError(f"unknown kind '{name}'{suggest(name.removeprefix('-'), KINDS)}; expected all, or some of {', '.join(KINDS)}")
    named = {name for name in names if not name.startswith("-")}
    left_out = {name.removeprefix("-") for name in names if name.startswith("-")}
    kept = tuple(kind for kind in KINDS if (not named or "all" in named or kind in named) and kind not in left_out)
    if not kept:
        raise UsageError(f"'{text}' leaves no kind of prompt; expected all, or some of {', '.join(KINDS)}")
    return kept


def of_kinds(groups: Sequence[Group], kinds: Sequence[str], count: int) -> list[Group]:
    """Prompts of some kinds, evenly drawn: as many of each kind as `count` has room for, at least one; 0 is all. The kinds take turns, so
    that a beginning of the list is of all kinds as well."""
    by_kind = [[group for group in groups if group.kind == kind] for kind in kinds]
    present = [members for members in by_kind if members]
    each = max(1, count // max(1, len(present))) if count else 0
    drawn = [spread(members, each) if each else members for members in present]
    return [group for group in chain.from_iterable(zip_longest(*drawn)) if group is not None]
