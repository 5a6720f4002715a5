"""Chat templates as they are used here: one of several chosen, the date fixed, no thinking block left open, the system line kept.

A template is a program that came with the weights. transformers runs it in a sandbox; what it makes of a conversation is asked once, when
a model is loaded (`examined`), so that one that cannot serve is refused before any work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from emosteer.base.errors import ModelError, first_line

#: What templates that print today's date print instead: results must not depend on the day.
DATE = datetime(2024, 7, 26, 12)
_VARIABLES = {"date_string": DATE.strftime("%d %b %Y")}
_DIRECTIVES = "aAbBcdeHIjklmMpSuUwWxXyYZ"
_OPEN_BLOCK = re.compile(r"<((?:\w+:)?(?:think|thinking|thought|reasoning))>\s*$")

Turn = Mapping[str, str]


def template_of(tokenizer: Any) -> str:
    """The text of the chat template; the one called "default" where there are several, "" where there is none.

    Raises:
        ModelError: if there are several and none is called so.
    """
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        if "default" not in template:
            raise ModelError(
                f"expected a chat template called 'default', found {', '.join(template)}; keep the one to be used under this name"
            )
        template = template["default"]
    return str(template or "")


def rendered(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """A conversation as text, ending where the reply begins: behind the thinking block, where the template opens one."""
    text = _applied(tokenizer, turns)
    opened = _OPEN_BLOCK.search(text)
    return text if opened is None else f"{text[: opened.end(1) + 1]}\n\n</{opened[1]}>\n\n"


def _applied(tokenizer: Any, turns: Sequence[Turn], thinking: bool = False) -> str:
    """What the template itself makes of a conversation."""
    variables = {**_VARIABLES, "enable_thinking": thinking}
    template = _with_fixed_date(template_of(tokenizer))
    return str(tokenizer.apply_chat_template(list(turns), chat_template=template, tokenize=False, add_generation_prompt=True, **variables))


def served(tokenizer: Any, messages: Sequence[Turn]) -> list[dict[str, str]]:
    """The turns as the template takes them: a system line that it refuses, or leaves out without a word, joins the first turn."""
    turns = [dict(message) for message in messages]
    if turns[0]["role"] != "system" or len(turns) < 2:
        return turns
    system, rest = turns[0]["content"].strip(), turns[1:]
    try:
        text = rendered(tokenizer, turns)
        lost = bool(system) and text == rendered(tokenizer, rest)
    except Exception:
        lost = True
    if not lost:
        return turns
    return [{"role": "user", "content": f"{system}\n\n{rest[0]['content']}".lstrip("\n")}, *rest[1:]]


@lru_cache(maxsize=16)
def _with_fixed_date(template: str) -> str:
    """The template with its clock stopped: templates may ask for the time by `strftime_now(format)`."""
    if "strftime_now" not in template:
        return template
    told = "format" + "".join(f".replace('%{d}', '{DATE.strftime('%' + d)}').replace('%-{d}', '{_unpadded(d)}')" for d in _DIRECTIVES)
    return "{% macro strftime_now(format) %}{{ " + told + ".replace('%%', '%') }}{% endmacro %}" + template


def _unpadded(directive: str) -> str:
    return DATE.strftime("%" + directive).lstrip(" 0") or "0"


@dataclass(frozen=True)
class Template:
    """What a model's chat template does.

    kind: "none" (turns become paragraphs), "one", or "default of N"; system: "kept", "joins the first turn" or "no template"; dated:
    whether it prints a date, which is fixed; thinking: "none", "switched off" or "closed"; turns: whether earlier turns are taken.
    """

    kind: str
    system: str
    dated: bool
    thinking: str
    turns: bool


def examined(tokenizer: Any, name: str) -> Template:
    """Renders a few conversations and says what the template makes of them.

    Raises:
        ModelError: if it fails on a single question, or leaves the question out.
    """
    template, user = template_of(tokenizer), {"role": "user", "content": "Wednesday rhubarb"}
    if not template:
        return Template("none", "no template", False, "none", True)
    try:
        text = rendered(tokenizer, [user])
    except Exception as error:  # a program that came with the weights: anything can come
        raise ModelError(f"the chat template of {name} fails on a single question ({first_line(error)}); mend or replace it") from error
    if user["content"] not in text:
        raise ModelError(f"the chat template of {name} leaves out what the user says; expected 'Wednesday rhubarb' in {text[:60]!r}")
    several = isinstance(tokenizer.chat_template, Mapping)
    system = served(tokenizer, [{"role": "system", "content": "Answer briefly."}, user])[0]["role"] == "system"
    return Template(
        kind=f"default of {len(tokenizer.chat_template)}" if several else "one",
        system="kept" if system else "joins the first turn",
        dated="strftime_now" in template or "date_string" in template,
        thinking=_thinking(tokenizer, user),
        turns=_takes_turns(tokenizer, user),
    )


def _thinking(tokenizer: Any, user: Turn) -> str:
    """What keeps replies out of a thinking block: nothing needs to, the template's own switch, or a closing mark that is put behind it."""
    text = _applied(tokenizer, [user])
    if _OPEN_BLOCK.search(text):
        return "closed"
    return "none" if text == _applied(tokenizer, [user], thinking=True) else "switched off"


def _takes_turns(tokenizer: Any, user: Turn) -> bool:
    said = [{"role": "user", "content": "Tuesday parsnip"}, {"role": "assistant", "content": "Thursday quince"}, user]
    try:
        text = rendered(tokenizer, said)
    except Exception:
        return False
    return all(turn["content"] in text for turn in said)
