"""Examples: a few exchanges that stand before a prompt, in which somebody says something and is answered in the wanted emotion.

A small model that is told nothing answers seldom, steered or not. Shown how one replies in this mood, it goes on so, and less steering
suffices (docs/CIRCUITS.md, "Examples, and the words of the prompt"). An exchange has the same first turn for every emotion, so that what is
shown differs in the replies alone. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emosteer.base.errors import DataError
from emosteer.base.files import read_jsonl
from emosteer.base.strict_json import UNPRINTABLE
from emosteer.scenarios.data_files import data_path
from emosteer.scenarios.emotions import label_of
from emosteer.scenarios.scenarios import Message, text_field

#: The file that circuits take their examples from unless told otherwise, and what stands for "none" in its place.
EXAMPLES, NO_EXAMPLES = "examples.jsonl", "none"
#: Examples that an emotion may have; more would fill a model's context.
MAX_EXAMPLES = 100


@dataclass(frozen=True)
class Exchange:
    """What somebody says, and a reply to it."""

    said: str
    reply: str


#: Emotion -> the exchanges that are shown for it, in their order.
Examples = Mapping[str, tuple[Exchange, ...]]


def read_examples(path: Path | str) -> dict[str, tuple[Exchange, ...]]:
    """Reads `{"prompt": "...", "replies": {emotion: "..."}}` a line.

    Raises:
        DataError: naming file and line, for whatever is missing, empty or of the wrong type, and for what no circuit's file may hold:
            control characters, and too many for an emotion.
    """
    found: dict[str, list[Exchange]] = {}
    for number, row in read_jsonl(Path(path), "file of examples"):
        where = f"{path}:{number}"
        said, replies = text_field(row.get("prompt"), "prompt", where), row.get("replies")
        if not isinstance(replies, Mapping) or not replies:
            raise DataError(f"{where}: expected 'replies' to be an object of emotions and texts, found {str(replies)[:40]}")
        for name, text in replies.items():
            exchange, own = Exchange(said, text_field(text, f"replies.{name}", where)), found.setdefault(label_of(name, where), [])
            if UNPRINTABLE.search(exchange.said + exchange.reply):
                raise DataError(f"{where}: expected texts without control characters, found one in the exchange for {name[:60]}")
            if len(own) == MAX_EXAMPLES:
                raise DataError(f"{where}: expected at most {MAX_EXAMPLES} examples for {name[:60]}, found more")
            own.append(exchange)
    return {emotion: tuple(some) for emotion, some in found.items()}


def examples_of(given: Path | str | None, emotions: Sequence[str]) -> dict[str, tuple[Exchange, ...]]:
    """The examples of some emotions: from a file, none, or the shipped ones, which may lack some of them or all.

    Args:
        given: a file, or `NO_EXAMPLES`; None takes the shipped ones.

    Raises:
        DataError: as `read_examples`, or if a file that was named has replies in none of the emotions.
    """
    if given is not None and str(given) == NO_EXAMPLES:
        return {}
    path = data_path(EXAMPLES) if given is None else Path(given)
    found = read_examples(path)
    kept = {emotion: found[emotion] for emotion in emotions if emotion in found}
    if given is not None and not kept:
        raise DataError(f"{path}: expected replies in some of {', '.join(emotions)}, found {', '.join(found)}")
    return kept


def shown(examples: Examples, emotions: Sequence[str], instruction: str) -> tuple[Message, ...]:
    """The turns that stand before a conversation, each first turn with the instruction as a prompt has it; none for emotions without any.

    Args:
        emotions: that are felt; where there are several, the exchanges are of each in turn.
    """
    felt = [emotion for emotion in emotions if examples.get(emotion)]
    longest = max((len(examples[emotion]) for emotion in felt), default=0)
    turns: list[Message] = []
    for place in range(longest):
        exchanges = examples[felt[place % len(felt)]]
        if place < len(exchanges):
            exchange = exchanges[place]
            turns += [Message("user", f"{exchange.said}\n{instruction}".strip()), Message("assistant", exchange.reply)]
    return tuple(turns)


def preceded(earlier: Sequence[Message], turns: Sequence[Message]) -> tuple[Message, ...]:
    """A conversation with examples before its first turn, behind its system line."""
    head = [message for message in earlier if message.role == "system"]
    return (*head, *turns, *(message for message in earlier if message.role != "system"))


def as_fields(examples: Examples) -> dict[str, list[dict[str, str]]]:
    """As a circuit's file holds them."""
    return {emotion: [vars(exchange) for exchange in some] for emotion, some in examples.items()}


def of_fields(fields: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, tuple[Exchange, ...]]:
    """Back from that."""
    return {emotion: tuple(Exchange(row["said"], row["reply"]) for row in some) for emotion, some in fields.items()}
