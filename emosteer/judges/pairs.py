"""A prompt answered twice, unsteered and with an emotion, and what the judges say of both replies. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emosteer.scenarios.scenarios import Message


@dataclass(frozen=True)
class Marked:
    """A reply and what is said of it. label: what the panel reads, neutral and undecided among the labels, None where no judge spoke;
    names: whether it says the emotion's own name; good: whether it does all that was wanted (`evaluation.metrics.measure`)."""

    text: str
    label: str | None
    sound: bool
    answers: bool
    names: bool
    good: bool


@dataclass(frozen=True)
class Pair:
    """Both replies to a prompt. turns: the conversation that they answer; strength: of the steering; plain: the unsteered reply, marked as
    if the emotion had been asked for."""

    id: str
    kind: str
    turns: tuple[Message, ...]
    emotion: str
    strength: float
    plain: Marked
    steered: Marked


@dataclass(frozen=True)
class Tally:
    """Counts over pairs, as people read them: how many of the replies are read as the emotion, and how many are good."""

    total: int
    read: int
    good: int


def tally(pairs: Sequence[Pair], *, plain: bool = False) -> Tally:
    """Counts of the steered replies, or of the unsteered ones."""
    replies = [(pair.emotion, pair.plain if plain else pair.steered) for pair in pairs]
    return Tally(len(replies), sum(reply.label == emotion for emotion, reply in replies), sum(reply.good for _, reply in replies))
