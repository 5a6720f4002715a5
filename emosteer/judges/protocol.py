"""What a judge is: blind, independent of the steered model, and allowed to say nothing. No torch here.

Two separate questions are asked of a text. *Which emotion does it express?* is answered by an `EmotionJudge`, as probabilities over the
emotions and "neutral"; it is never told the target. *Is it sound text at all?* is answered by `soundness`, without any emotion. A call that
failed is an `Opinion` without probabilities: missing, never "no match".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from emosteer.scenarios.scenarios import EMOTIONS, NEUTRAL

if TYPE_CHECKING:
    from torch import Tensor

#: What every judge answers in: the emotions, then neutral.
LABELS = (*EMOTIONS, NEUTRAL)
#: A reply answers its prompt from this probability on.
ANSWERED = 0.5


@dataclass(frozen=True)
class Opinion:
    """One text, judged blind. probabilities: label -> share, summing to 1, or None if the call failed; problem: why it failed (of a panel:
    why one of its judges did); label: what is said where that is not simply the likeliest one (a panel that is undecided)."""

    probabilities: Mapping[str, float] | None
    problem: str = ""
    label: str | None = None

    def emotion(self, among: Sequence[str] | None = None) -> str | None:
        """The likeliest label (of `among`, so that six-way leaves neutral out); None where the opinion is missing."""
        if self.probabilities is None:
            return None
        if among is None and self.label is not None:
            return self.label
        return max(among or tuple(self.probabilities), key=lambda label: self.probabilities[label])  # type: ignore[index]


class EmotionJudge(Protocol):
    """Judges texts blind. name: for people; key: a hash or version of everything that shapes an opinion, for caches."""

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str: ...

    def opinions(self, texts: Sequence[str], done: Callable[[int, Opinion], None] | None = None) -> list[Opinion]:
        """One opinion per text, in order; `done` is called with each as it arrives, so that nothing paid for is lost."""
        ...


@dataclass(frozen=True)
class Soundness:
    """Whether a text is sound. reasons: why not ("order", "repetition", "symbols", "language", "sense", "empty"), and remarks that alone do
    not make it unsound ("unfinished"); score: the estimated probability that it makes no sense, or that it is broken
    where it is."""

    sound: bool
    reasons: tuple[str, ...]
    score: float


class SoundnessJudge(Protocol):
    """Says of texts whether they are sound. key: a hash or version of everything that shapes a verdict."""

    @property
    def key(self) -> str: ...

    def check(self, texts: Sequence[str]) -> list[Soundness]:
        """One verdict per text, in order."""
        ...


class AnswerJudge(Protocol):
    """Says whether replies answer their prompts. key: a hash or version of everything that shapes what it says."""

    @property
    def key(self) -> str: ...

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Per (prompt, reply) the probability that the reply answers the prompt."""
        ...


class Encoder(Protocol):
    """Sentence embeddings of unit length."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[text, width]."""
        ...
