"""Is it sound text? A verdict that knows nothing of emotions and shares no weights with the model that wrote it.

Two linear heads on the layers of the embedded judge's encoder: one tells running text from text with its words out of order, loops, symbol
noise and other languages; the other tells what makes sense from what readers of models' replies called no sense. Three plain rules catch
what needs no model. A reply that is merely cut off by the token limit is sound, with
the remark "unfinished": the limit is the same for every method, and `evaluate` reports it on its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from emosteer.base.errors import ArtifactError
from emosteer.judges.embedded import ASSET, LinearHead, SentenceEncoder
from emosteer.judges.protocol import Soundness
from emosteer.judges.storage import load_heads

SOUND = "sound"
#: How a text can be broken, as the first head names it.
FAULTS = ("order", "repetition", "symbols", "language")
#: What is missing where the second head finds that a text makes no sense.
SENSE = "sense"
#: A text is unsound when its probability of making no sense exceeds this, or
THRESHOLD = 0.35
#: when that of being broken exceeds this: what is broken is so beyond doubt, and what the first head merely doubts is mostly sound.
BROKEN = 0.7
#: Version of the rules below, for caches of verdicts.
RULES = 4
#: Longest run of one word, and largest share of word 3-grams that occurred before, that plain text may have.
LONGEST_RUN, REPEATED = 4, 0.4
#: Two to six words three times in a row.
_THRICE = re.compile(r"(?<!\S)(\S+(?: \S+){1,5})(?: \1(?!\S)){2,}")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; an apostrophe inside a word is part of it."""
    return re.findall(r"\w+(?:'\w+)?", text.lower())


def repetition(words: Sequence[str], n: int = 3) -> float:
    """The share of word n-grams that occur earlier in the same text: 0 for text without loops."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repeats(text: str) -> bool:
    """Whether anything at all is said twice: a word twice in a row, or a pair of words again."""
    words = words_of(text)
    return any(a == b for a, b in zip(words, words[1:], strict=False)) or repetition(words, 2) > 0.08


def unfinished(text: str) -> bool:
    """Whether a text stops without an ending: neither closing punctuation nor an emoji."""
    end = text.rstrip().rstrip("\"'”’)]*_ ")
    return bool(end) and (end[-1].isalnum() or end[-1] in ",;:-–—(&/")


def plain_faults(text: str) -> list[str]:
    """What is wrong with a text by rule alone: nothing there, one thing over and over, hardly any letters."""
    if not re.search(r"\w", text):
        return ["empty"]
    faults = []
    words = words_of(text)
    runs, longest = 1, 1
    for before, word in zip(words, words[1:], strict=False):
        runs = runs + 1 if word == before else 1
        longest = max(longest, runs)
    counts = Counter(words)
    half = len(words) >= 12 and counts.most_common(1)[0][1] > len(words) / 2
    if longest > LONGEST_RUN or repetition(words) > REPEATED or half or _THRICE.search(" ".join(words)):
        faults.append("repetition")
    visible = [character for character in text if not character.isspace()]
    if sum(character.isalnum() for character in visible) < 0.6 * len(visible) and len(visible) > 12:
        faults.append("symbols")
    return faults


@dataclass(frozen=True, eq=False)
class SoundnessHeads:
    """broken: of `SOUND` and `FAULTS`, fitted on texts that are broken on purpose; sense: of `SOUND` and `SENSE`, fitted on replies that
    were read."""

    broken: LinearHead
    sense: LinearHead

    @classmethod
    def load(cls, path: Path) -> SoundnessHeads:
        """Of a judges' file.

        Raises:
            ArtifactError: if the file is missing or damaged, or holds no such heads.
        """
        heads = load_heads(path)
        missing = [name for name in ("soundness", SENSE) if name not in heads]
        if missing:
            raise ArtifactError(f"{path} holds no head '{missing[0]}' for the check of soundness; run `make judge`")
        return cls(heads["soundness"], heads[SENSE])

    def stored(self) -> dict[str, LinearHead]:
        """By the names that they have in a judges' file."""
        return {"soundness": self.broken, SENSE: self.sense}

    @property
    def key(self) -> str:
        """A hash of both."""
        return f"{self.broken.key}-{self.sense.key}"


def verdicts_of(heads: SoundnessHeads, features: Tensor, texts: Sequence[str]) -> list[Soundness]:
    """Heads and rules together; the score is the probability that the text makes no sense, or that it is broken where it is.

    Args:
        features: [text, feature], of the encoder.
    """
    faults, sense = heads.broken.probabilities(features), heads.sense.probabilities(features)
    place, other = heads.broken.labels.index(SOUND), heads.sense.labels.index(SOUND)
    verdicts = []
    for text, row, senses in zip(texts, faults, sense, strict=True):
        broken, senseless = 1 - row[place].item(), 1 - senses[other].item()
        reasons, named = plain_faults(text), False
        if broken > BROKEN and not reasons:
            rest = row.clone()
            rest[place] = 0
            fault = heads.broken.labels[int(rest.argmax())]
            # dry official prose looks a little like a loop to the head; a loop can be counted, so it has to be there
            reasons = [fault] if fault != "repetition" or repeats(text) else []
            named = bool(reasons)
        if senseless > THRESHOLD and not reasons:
            reasons = [SENSE]
        remarks = ["unfinished"] if unfinished(text) else []
        score = max(broken, senseless) if named else senseless
        verdicts.append(Soundness(not reasons, (*reasons, *remarks), round(score, 6)))
    return verdicts


@dataclass(frozen=True, eq=False)
class SoundnessCheck:
    """The heads and the rules, with the encoder that the heads read."""

    encoder: SentenceEncoder
    heads: SoundnessHeads
    key: str

    @classmethod
    def load(cls, path: Path = ASSET, encoder: SentenceEncoder | None = None) -> SoundnessCheck:
        """The shipped check; give the judge's encoder so that it is loaded once.

        Raises:
            ArtifactError: if the file is missing or damaged, or holds no such check.
        """
        heads = SoundnessHeads.load(path)
        return cls(encoder or SentenceEncoder(), heads, f"soundness-{RULES}-{heads.key}")

    def check(self, texts: Sequence[str]) -> list[Soundness]:
        """One verdict per text, in order."""
        return verdicts_of(self.heads, self.encoder.features(texts), texts) if texts else []
