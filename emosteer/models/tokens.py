"""Conversations and texts as token ids, and the tokens that end a reply: what a tokenizer knows, without the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from emosteer.base.errors import DataError, first_line
from emosteer.models.chat_templates import Turn, rendered, served, template_of

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
#: Marks where a text is cut. The first private character that nobody used is taken.
_MARKS = [chr(code) for code in range(0xE000, 0xF8FF)]

#: Bytes that stand for themselves in byte-level vocabularies; the others are moved behind the first 256 characters, in their order.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_MOVED = [byte for byte in range(0x100) if byte not in _PRINTABLE]
_BYTE_OF = {**{chr(byte): byte for byte in _PRINTABLE}, **{chr(0x100 + place): byte for place, byte in enumerate(_MOVED)}}
#: Stands for bytes that are no character, or not one yet.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
#: Stands for a space in vocabularies of words.
SPACE = "\u2581"
#: A token that is one byte, in vocabularies that fall back to bytes.
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def prompt_ids(tokenizer: Any, messages: Sequence[Turn], *, control: bool = False) -> list[int]:
    """Token ids of a conversation, ending where the reply begins. The template's text already holds its BOS.

    Models without a system role get the system line at the head of the user turn; base models without a chat
    template get the turns as plain paragraphs.

    Args:
        control: whether control tokens that somebody typed become control tokens; else they stay the characters that they are.

    Raises:
        DataError: if they cannot, or if the template refuses the conversation.
    """
    if not template_of(tokenizer):
        text = "".join(message["content"] + "\n\n" for message in messages)
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        return bos + text_ids(tokenizer, text, control=control)
    turns = served(tokenizer, messages)
    typed = control_pattern(tokenizer)
    if control or not any(typed.search(turn["content"]) for turn in turns):
        return _ids(tokenizer, _rendered(tokenizer, turns))
    mark = _unused_mark("".join(turn["content"] for turn in turns))
    cut = [{**turn, "content": _cut(typed, turn["content"], mark)} for turn in turns]
    bare = [{**turn, "content": typed.sub("", turn["content"])} for turn in turns]
    return _joined(tokenizer, _rendered(tokenizer, cut).split(mark), _rendered(tokenizer, bare))


def _rendered(tokenizer: Any, turns: Sequence[Turn]) -> str:
    try:
        return rendered(tokenizer, turns)
    except Exception as error:  # a program that came with the weights: anything can come
        raise DataError(f"the chat template of this model refuses the conversation: {first_line(error)}") from error


def text_ids(tokenizer: Any, text: str, *, control: bool = False) -> list[int]:
    """Token ids of a text that somebody wrote, no special tokens added. Argument and errors as for `prompt_ids`."""
    typed = control_pattern(tokenizer)
    if control or not typed.search(text):
        return _ids(tokenizer, text)
    mark = _unused_mark(text)
    return _joined(tokenizer, _cut(typed, text, mark).split(mark), typed.sub("", text))


@lru_cache(maxsize=4)
def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches whatever a tokenizer takes for a control token wherever it stands: tokens that it calls special, those that end a turn, and
    added ones that the chat template writes."""
    template = template_of(tokenizer)
    found = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content.strip() and (token.special or token.content in _END_OF_TURN or token.content in template)
    } - {tokenizer.unk_token}  # which says nothing to a model, whoever writes it
    longest_first = sorted(found, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) if found else r"(?!)")


def _cut(typed: re.Pattern[str], text: str, mark: str) -> str:
    """The text with a mark inside each control token: either part alone is none."""
    return typed.sub(lambda found: found[0][0] + mark + found[0][1:], text)


def _joined(tokenizer: Any, parts: Sequence[str], bare: str) -> list[int]:
    """Token ids of a text in parts, once it is sure that they hold no control token but those of the text without the typed ones."""
    ids, typed = [token for part in parts for token in _ids(tokenizer, part)], control_pattern(tokenizer)
    controls = {token for token, added in tokenizer.added_tokens_decoder.items() if typed.fullmatch(added.content)}
    if [token for token in ids if token in controls] != [token for token in _ids(tokenizer, bare) if token in controls]:
        raise DataError(
            "the text holds a control token of this model that its tokenizer cannot write as plain characters; leave it out, or let it act "
            "with --control-tokens"
        )
    return ids


def _unused_mark(text: str) -> str:
    return next(mark for mark in _MARKS if mark not in text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, control tokens read as such."""
    try:
        text.encode()
    except UnicodeEncodeError:  # the tokenizer would call it no text at all
        raise DataError("the text holds half of a character (a lone surrogate); write the character in full") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def reply_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a reply's tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def raw_text(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """The text of tokens that go on from another text: white space at its ends is part of it.

    Args:
        before: `lead_in` of the tokens before them.
    """
    known = len(tokenizer.decode(before, skip_special_tokens=True)) if before else 0
    return str(tokenizer.decode([*before, *ids], skip_special_tokens=True))[known:]


def lead_in(tokenizer: Any, ids: Sequence[int]) -> tuple[int, ...]:
    """A token behind which others read as they do behind `ids`; none where these are no text yet. Decoders that write a space before each
    word take it from the first one that they are given (Llama 2)."""
    for token in reversed(ids):
        text = tokenizer.decode([token], skip_special_tokens=True)
        # a part of a character would read otherwise, once another part follows it
        if text.strip() and INCOMPLETE not in text and not BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(token))):
            return (token,)
    return ()


def text_prefix(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer itself puts before a text: that it has a BOS does not mean that its model has ever seen one there."""
    ids = list(tokenizer("")["input_ids"])
    ends = ids[-1:] == [tokenizer.eos_token_id] and ids != [tokenizer.bos_token_id]
    return ids[:-1] if ends else ids


def token_bytes(tokenizer: Any, token: int) -> bytes | None:
    """What a token stands for, byte by byte: of some characters a token holds a part only. None where the vocabulary does not tell."""
    added = tokenizer.added_tokens_decoder.get(token)
    if added is not None:
        return str(added.content).encode()
    written = str(tokenizer.convert_ids_to_tokens(token) or "")
    if _is_byte_level(tokenizer):
        return bytes(_BYTE_OF[character] for character in written) if all(character in _BYTE_OF for character in written) else None
    if BYTE.fullmatch(written):
        return bytes([int(written[3:5], 16)])
    text = str(tokenizer.decode([token]))
    if written.startswith(SPACE) and not text.startswith(SPACE):  # decoders may take a text's first space
        return written.replace(SPACE, " ").encode()
    return None if INCOMPLETE in text else text.encode()


def token_text(tokenizer: Any, token: int) -> str:
    """What a token reads as by itself in the middle of a text."""
    known = token_bytes(tokenizer, token)
    return str(tokenizer.decode([token])) if known is None else known.decode(errors="replace")


@lru_cache(maxsize=4)
def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the vocabulary writes each byte as a printable character of its own."""
    return "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))


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
