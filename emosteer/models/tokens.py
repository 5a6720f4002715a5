"""Conversations and texts as token ids, and the tokens that end a reply: what a tokenizer knows, without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
#: Chat templates that print today's date (Llama 3.2) would make results depend on the day: the date is fixed.
_TEMPLATE_VARIABLES = {"date_string": "26 Jul 2024", "enable_thinking": False}


def prompt_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation, ending where the reply begins. The template's text already holds its BOS.

    Models without a system role get the system line at the head of the user turn; base models without a chat
    template get the turns as plain paragraphs.
    """
    turns = [dict(message) for message in messages]
    if not tokenizer.chat_template:
        text = "".join(turn["content"] + "\n\n" for turn in turns)
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        return bos + text_ids(tokenizer, text)
    render = {"tokenize": False, "add_generation_prompt": True, **_TEMPLATE_VARIABLES}
    try:
        text = tokenizer.apply_chat_template(turns, **render)
    except Exception:
        if turns[0]["role"] != "system" or len(turns) < 2:
            raise
        merged = {"role": "user", "content": turns[0]["content"] + "\n\n" + turns[1]["content"]}
        text = tokenizer.apply_chat_template([merged, *turns[2:]], **render)
    return text_ids(tokenizer, text)


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, no special tokens added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def reply_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a reply's tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


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
