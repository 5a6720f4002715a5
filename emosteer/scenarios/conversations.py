"""Conversations: what was said before the reply that is wanted. No torch here."""

from __future__ import annotations

import json
from typing import Any

from emosteer.base.errors import DataError
from emosteer.scenarios.scenarios import Message, text_field


def parse_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Checks a conversation that waits for its next reply: at most one system line, at the head, then user and assistant in turn, a user
    turn last. Contents are stripped.

    Args:
        value: a list of objects with 'role' and 'content'; where: file and line, what errors start with.

    Raises:
        DataError: naming the message, what was expected and what was found.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{where}: expected 'messages' to be a list of objects with 'role' and 'content', found {_shown(value)}")
    messages: list[Message] = []
    for number, item in enumerate(value, 1):
        here = f"{where}: message {number}"
        if not isinstance(item, dict):
            raise DataError(f"{here}: expected an object with 'role' and 'content', found {_shown(item)}")
        role, before = item.get("role"), messages[-1].role if messages else ""
        expected = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[before]
        if role not in expected:
            after = f" after {before}" if before else ""
            raise DataError(f"{here}: expected 'role' to be {' or '.join(expected)}{after}, found {_shown(role)}")
        messages.append(Message(str(role), text_field(item.get("content"), "content", here)))
    if messages[-1].role != "user":
        raise DataError(f"{where}: expected the last message to be the user's, found one of role '{messages[-1].role}'")
    return tuple(messages)


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)[:40]
