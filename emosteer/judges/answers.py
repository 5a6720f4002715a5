"""Does a reply answer its prompt? A pair classifier: the sentence encoder, fine-tuned (`adapters`) on prompts with their own replies
against replies to other events, to other prompts, and replies that only repeat words of the prompt. It is told nothing of emotions.

docs/JUDGES.md has its error rates on pairs that were written by hand for this, beside those of what it replaced.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emosteer.base.errors import DataError
from emosteer.judges.adapters import TunedJudge
from emosteer.judges.embedded import ASSET, SentenceEncoder
from emosteer.judges.storage import load_adapter
from emosteer.scenarios.contamination import content_words

ANSWERS, NOT = "answers", "does not"
PAIR_LABELS = (ANSWERS, NOT)
#: What the encoder was taught to read as the border between two texts.
_BORDER = " [SEP] "


def pair_of(prompt: str, reply: str) -> str:
    """Both as one text for the encoder."""
    return f"{prompt}{_BORDER}{reply}"


@dataclass(frozen=True, eq=False)
class AnswerCheck:
    """The fine-tuned classifier."""

    judge: TunedJudge

    @classmethod
    def load(cls, path: Path = ASSET, encoder: SentenceEncoder | None = None) -> AnswerCheck:
        """The shipped check; give the judges' encoder so that it is loaded once.

        Raises:
            ArtifactError: if the file is missing or damaged.
        """
        adapter = load_adapter(path, "answers")
        return cls(TunedJudge.of(encoder or SentenceEncoder(), adapter, "answers"))

    @property
    def key(self) -> str:
        """A hash of the adapter."""
        return self.judge.key

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Per (prompt, reply) the probability that the reply answers the prompt."""
        column = self.judge.labels.index(ANSWERS)
        return [float(row[column]) for row in self.judge.probabilities([pair_of(*pair) for pair in pairs])]


# ---- texts to fit it on ------------------------------------------------------------------------------------------------------------


def rambling(prompt: str, reply: str, rng: random.Random) -> str:
    """A text that holds the prompt's words and says nothing to it: shuffled, put into another prompt's reply, or strung together.

    Args:
        reply: to another prompt.
    """
    words = content_words(prompt) or prompt.split()
    way = rng.random()
    if way < 0.35:
        shuffled = prompt.split()
        rng.shuffle(shuffled)
        return " ".join(shuffled + [rng.choice(words) for _ in range(rng.randint(2, 8))])
    if way < 0.7:
        replaced = set(content_words(reply))
        return " ".join(
            rng.choice(words) if re.sub(r"\W", "", word).lower() in replaced and rng.random() < 0.8 else word for word in reply.split()
        )
    return " ".join(
        f"{rng.choice(_STARTS)} {rng.choice(words)}{rng.choice(_JOINS)}{rng.choice(words)}{rng.choice(_ENDS)}"
        for _ in range(rng.randint(2, 4))
    )


_STARTS = ("And the", "So the", "About the", "The", "Yes, the", "It is the")
_JOINS = (" and ", ", ", "; ", " is ", " of ")
_ENDS = (" again.", " as it is.", " then.", " and so on.", " or not.")


@dataclass(frozen=True)
class Answered:
    """A reply that answers its prompt. tone: its emotion; siblings: replies in the same tone to other events of the same scenario."""

    prompt: str
    reply: str
    tone: str
    siblings: tuple[str, ...] = ()


def pair_texts(answered: Sequence[Answered], per_reply: int, seed: int) -> list[tuple[str, str]]:
    """(pair, label): every reply with its own prompt as often as with what does not answer it, so that tone tells nothing.

    Args:
        per_reply: pairs of each kind for every reply.

    Raises:
        DataError: if no other prompt has a reply in the same tone.
    """
    rng = random.Random(seed)
    by_tone: dict[str, list[Answered]] = {}
    for one in answered:
        by_tone.setdefault(one.tone, []).append(one)
    pairs: list[tuple[str, str]] = []
    for one in answered:
        elsewhere = [other for other in by_tone[one.tone] if other.prompt != one.prompt and other.reply != one.reply]
        siblings = [reply for reply in one.siblings if reply != one.reply]
        if not elsewhere:
            raise DataError(f"expected replies of '{one.tone}' to at least two prompts, found one: '{one.prompt[:60]}'; give more replies")
        for _ in range(per_reply):
            pairs.append((pair_of(one.prompt, one.reply), ANSWERS))
            other = rng.choice(elsewhere)
            way = rng.random()
            if way < 0.4 and siblings:
                reply = rng.choice(siblings)
            else:
                reply = other.reply if way < 0.75 else rambling(one.prompt, other.reply, rng)
            pairs.append((pair_of(one.prompt, reply), NOT))
    return pairs
