"""Replies as the protocol writes them: whole, and in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from emosteer.generation.running_batch import Written
from emosteer.models.tokens import token_bytes, token_text
from emosteer.serving.asking import Wanted
from emosteer.serving.writer_thread import Part


@dataclass
class Choice:
    """One reply so far. told: characters of the tokens that a stream has told with their log-probabilities."""

    text: str = ""
    tokens: list[Written] = field(default_factory=list)
    n_tokens: int = 0
    told: int = 0
    ended: str | None = None

    def add(self, part: Part) -> None:
        """Takes a part in."""
        self.text += part.text
        self.tokens += part.tokens
        self.n_tokens += len(part.tokens)
        self.ended = part.ended


class Answer:
    """What is sent for one request: `whole`, or `first`, the `piece`s and `last`."""

    def __init__(self, tokenizer: Any, model: str, wanted: Wanted, *, chat: bool) -> None:
        self.tokenizer, self.wanted, self.chat = tokenizer, wanted, chat
        self.choices = [Choice() for _ in wanted.asks]
        self.written = [ask.likeliest is not None for ask in wanted.asks]
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "emosteer": {"felt": wanted.felt, "strength": wanted.strength},
        }

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and of all replies."""
        n_prompt = sum(len(ask.request.ids) for ask in self.wanted.asks[:: self.wanted.n])
        n_written = sum(choice.n_tokens for choice in self.choices)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_written, "total_tokens": n_prompt + n_written}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(index, choice.text, choice.tokens, choice.ended, "message", 0) for index, choice in enumerate(self.choices)]
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage}

    def first(self) -> Iterator[dict[str, Any]]:
        """What comes before any text: in a chat, who speaks."""
        if self.chat:
            for index in range(len(self.choices)):
                yield self._chunk(
                    [{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]
                )

    def piece(self, index: int, part: Part) -> dict[str, Any] | None:
        """One part of one reply; None where it holds nothing for the client."""
        choice = self.choices[index]
        choice.add(part)
        if not (part.text or part.ended or (part.tokens and self.written[index])):
            return None
        said = self._choice(index, part.text, part.tokens, part.ended, "delta", choice.told)
        if self.written[index]:
            choice.told += sum(len(self._text(one)) for one in part.tokens)
        return self._chunk([said])

    def last(self) -> dict[str, Any]:
        """What a stream ends with where the client wants to know what was used."""
        return {**self._chunk([]), "usage": self.usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion", "choices": choices}

    def _choice(self, index: int, text: str, tokens: Sequence[Written], ended: str | None, key: str, offset: int) -> dict[str, Any]:
        logprobs = None
        if self.written[index]:
            logprobs = {"content": [self._chat_token(one) for one in tokens]} if self.chat else self._text_tokens(tokens, offset)
        said: dict[str, Any] = {"text": text}
        if self.chat:
            said = {key: {"role": "assistant", "content": text, "refusal": None} if key == "message" else {"content": text} if text else {}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": ended}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        known = token_bytes(self.tokenizer, token)
        return {"token": token_text(self.tokenizer, token), "logprob": logprob, "bytes": None if known is None else list(known)}

    def _chat_token(self, one: Written) -> dict[str, Any]:
        assert one.token is not None  # the one that ends a reply is no part of it
        return {**self._token(one.token, one.logprob), "top_logprobs": [self._token(*pair) for pair in one.likeliest]}

    def _text_tokens(self, tokens: Sequence[Written], offset: int) -> dict[str, Any]:
        """offset: characters of the tokens before them. Not of the text before them, which may wait while its tokens are told."""
        texts = [self._text(one) for one in tokens]
        starts = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
        top = [{token_text(self.tokenizer, token): value for token, value in one.likeliest} for one in tokens]
        return {"tokens": texts, "token_logprobs": [one.logprob for one in tokens], "top_logprobs": top, "text_offset": starts}

    def _text(self, one: Written) -> str:
        assert one.token is not None  # the one that ends a reply is no part of it
        return token_text(self.tokenizer, one.token)
