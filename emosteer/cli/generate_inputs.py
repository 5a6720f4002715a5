"""What `emosteer generate` is given to answer: a text, stdin, or the lines of a file. No torch at import."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from emosteer.base.errors import DataError, UsageError
from emosteer.scenarios.conversations import parse_messages
from emosteer.scenarios.prompt_sets import KINDS, parse_prompt
from emosteer.scenarios.scenarios import VALENCES, Group, GroupKey, Message, parse_scenario, text_field
from emosteer.scenarios.scripts import joined


@dataclass(frozen=True)
class Input:
    """What is to be answered. group: a scenario-event or prompt, or a text under an empty key; earlier: what was said before it."""

    id: str
    group: Group
    earlier: tuple[Message, ...] = ()

    @classmethod
    def of(cls, name: str, text: str, earlier: tuple[Message, ...] = ()) -> Input:
        """A text of the user's own."""
        return cls(name, Group(GroupKey("", ""), "", text), earlier)


def inputs_of(text: str | None, source: Path | None) -> list[Input]:
    """Everything to be answered.

    Raises:
        UsageError: if there is nothing, or both a text and a file. DataError: naming file and line, for a malformed file.
    """
    if source is not None:
        if text is not None:
            raise UsageError("expected a text or --input, found both")
        return _read(source)
    if text is None or text == "-":
        if text is None and sys.stdin.isatty():
            raise UsageError("expected a text to answer, --input FILE.jsonl, or text on stdin")
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise DataError("stdin is not UTF-8 text; convert it first") from error
    if not text.strip():
        raise UsageError("the text to answer is empty")
    return [Input.of("text", text.strip())]


def _read(source: Path) -> list[Input]:
    from emosteer.base.files import read_jsonl

    inputs: list[Input] = []
    for number, row in read_jsonl(source, "input file"):
        where = f"{source}:{number}"
        if "event" in row or "scenario" in row:
            scenario = parse_scenario(row, where)
            for valence in VALENCES:
                key = GroupKey(scenario.id, valence)
                inputs.append(Input(str(key), Group(key, scenario.theme, joined(scenario.text, scenario.events[valence]))))
            continue
        name = str(row.get("id", f"line-{number}"))
        if "text" in row and "messages" in row:
            raise DataError(f"{where}: expected a 'text' or 'messages', found both")
        if "messages" in row and row.get("kind") in KINDS and "id" in row:  # a prompt file's: its reply belongs to it
            inputs.append(Input(name, parse_prompt(row, where)))
        elif "messages" in row:
            *earlier, last = parse_messages(row["messages"], where)
            inputs.append(Input.of(name, last.content, tuple(earlier)))
        elif "text" in row:
            inputs.append(Input.of(name, text_field(row["text"], "text", where)))
        else:
            raise DataError(f"{where}: expected a SEV scenario (skeleton_id, scenario, event) or an object with a 'text' or 'messages'")
    names = [each.id for each in inputs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{source}: the id '{twice}' is there twice; ids must be unique")
    return inputs
