"""Conversations and texts as token ids, and the tokens that end a reply: what a tokenizer knows, without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emosteer.base.errors import ModelError

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
#: Chat templates that print today's date (Llama 3.2) would make results depend on the day: the date is fixed.
_TEMPLATE_VARIABLES = {"date_string": "26 Jul 2024", "enable_thinking": False}


def prompt_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation, ending where the reply begins. The template's text already holds its BOS.

    Models without a system role get the system line at the head of the user turn; base models without a chat
    template get the turns as plain paragraphs.
    """
    turns = [dict(message) for message in messages]
    if not template_of(tokenizer):
        text = "".join(turn["content"] + "\n\n" for turn in turns)
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        return bos + text_ids(tokenizer, text)
    if turns[0]["role"] != "system" or len(turns) < 2:
        return text_ids(tokenizer, _rendered(tokenizer, turns))
    system, rest = turns[0]["content"].strip(), turns[1:]
    try:
        text = _rendered(tokenizer, turns)
        lost = bool(system) and text == _rendered(tokenizer, rest)  # some templates leave the system line out without a word
    except Exception:
        lost = True
    if lost:
        merged = {"role": "user", "content": f"{system}\n\n{rest[0]['content']}".lstrip("\n")}
        text = _rendered(tokenizer, [merged, *rest[1:]])
    return text_ids(tokenizer, text)


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


def _rendered(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> str:
    text: str = tokenizer.apply_chat_template(
        list(turns), chat_template=template_of(tokenizer), tokenize=False, add_generation_prompt=True, **_TEMPLATE_VARIABLES
    )
    return text


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, no special tokens added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def reply_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a reply's tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def raw_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens that go on from another text: white space at its ends is part of it."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def stop_ids(tokenizer: Any, declared: int | Sequence[int] | None) -> frozenset[int]:
    """Tokens that end a reply: the declared ones and the usual end-of-turn tokens that the vocabulary holds.

    Args:
        declared: `eos_token_id` of the model's generation settings.
    """
    ids: set[Any] = set()
    for item in (declared, tokenizer.eos_token_id):
        if item is not None:
            ids.update(item if isinstance(item, (list, tuple)) else [item])
    vocabulary = tokenizer.get_vocab()
    return frozenset(ids | {vocabulary[token] for token in _END_OF_TURN if token in vocabulary})
