"""Replies as text that grows: the pieces of every row of a batch, while `generate.steps` writes it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request, steps
from emosteer.generation.steering import SteeringPlan
from emosteer.models.model import Model
from emosteer.models.tokens import BYTE, INCOMPLETE, reply_text


@dataclass(frozen=True)
class Piece:
    """A row's next piece of text. finish_reason: None but in a row's last piece ("stop" or "length"), whose text may be empty."""

    row: int
    text: str
    finish_reason: str | None = None


def stream(
    model: Model, requests: Sequence[Request], plan: SteeringPlan | None = None, decoding: Decoding | None = None
) -> Generator[Piece, None, None]:
    """Writes one batch and yields its text as it comes; the pieces of a row join to the text of its reply. Closing it early ends the
    generation. Arguments and errors as for `generate.steps`."""
    texts = [RowText(model.tokenizer) for _ in requests]
    with contextlib.closing(steps(model, requests, plan, decoding)) as columns:
        for step in columns:
            for row in sorted(step.tokens.keys() | step.ended.keys()):
                text = texts[row].push(step.tokens[row]) if row in step.tokens else ""
                if row in step.ended:
                    yield Piece(row, text + texts[row].rest(), step.ended[row])
                elif text:
                    yield Piece(row, text)


class RowText:
    """One row's text while it is written. A character that is not complete waits, and so does white space at the end: the reply's text
    may end before it."""

    def __init__(self, tokenizer: Any, read: Callable[[Any, Sequence[int]], str] = reply_text) -> None:
        """read: (tokenizer, tokens) -> text."""
        self.tokenizer, self.read = tokenizer, read
        self.ids: list[int] = []
        self.n_sent = 0

    def push(self, token: int) -> str:
        """The text that can be sent now that a token is there."""
        self.ids.append(token)
        text = self.read(self.tokenizer, self.ids)
        # A run of byte tokens is read as a whole: one more byte can make all of it no text.
        if text.endswith(INCOMPLETE) or BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(token) or ""):
            return ""
        return self._new(text)

    def rest(self) -> str:
        """What was held back, once the row has ended."""
        return self._new(self.read(self.tokenizer, self.ids))

    def _new(self, text: str) -> str:
        sent, self.n_sent = self.n_sent, max(self.n_sent, len(text))
        return text[sent:]
