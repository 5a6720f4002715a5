"""Does a reply answer its prompt? A linear head on what the frozen sentence encoder makes of both, on all its layers for the reply, and on
what their words show (`pair_words`).

Fitted on replies that models wrote and readers read, and on prompts with their own replies against replies to other events, to other
prompts, and replies that only repeat the prompt's words; told nothing of emotions. It is set so that it passes as many replies as readers
do. docs/JUDGES.md has its error rates, beside those of what it replaced.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from emosteer.base.errors import ArtifactError, DataError
from emosteer.judges.embedded import ASSET, LinearHead, SentenceEncoder, shared_encoder
from emosteer.judges.pair_words import pair_words
from emosteer.judges.storage import load_heads
from emosteer.scenarios.contamination import content_words

ANSWERS, NOT = "answers", "does not"
PAIR_LABELS = (ANSWERS, NOT)
Pair = tuple[str, str]
#: The fit of the head holds the cosine and the words back less than the thousands of features of the encoder, by this factor of their size.
WORDS_WEIGH = 4.0


def pair_features(pairs: Sequence[Pair], encoder: SentenceEncoder) -> Tensor:
    """What is read of each (prompt, reply): all layers of the encoder for the reply (`SentenceEncoder.features`), product and distance of
    the embeddings of both, their cosine, and `pair_words`. Shape [pair, feature]."""
    prompts, replies = (list(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1))
    asked = dict(zip(prompts, encoder(prompts), strict=True))
    layers = dict(zip(replies, encoder.features(replies), strict=True))
    rows = []
    for prompt, reply in pairs:
        one, read = asked[prompt], layers[reply]
        other = embedding_in(read, len(one))
        words = torch.tensor([float(one @ other), *pair_words(prompt, reply)])
        rows.append(torch.cat([read, one * other, (one - other).abs(), words]))
    return torch.stack(rows)


def embedding_in(features: Tensor, width: int) -> Tensor:
    """The sentence embedding inside a text's features: the mean over the tokens of the last layer, which is the last of the means.

    Args:
        features: [2 * layers * width], of one text.
    """
    half = len(features) // 2
    return features[half - width : half]


def feature_count(encoder: SentenceEncoder) -> int:
    """How many features `pair_features` gives with an encoder."""
    config = encoder.model.config
    return int(2 * config.hidden_size * (config.num_hidden_layers + 2) + 1 + len(pair_words("", "")))


def feature_weights(features: int) -> Tensor:
    """For `fit_head`: how much each of the features of a pair may weigh. Shape [feature]."""
    words = 1 + len(pair_words("", ""))
    return torch.cat([torch.ones(features - words), torch.full((words,), WORDS_WEIGH)])


@dataclass(frozen=True, eq=False)
class AnswerCheck:
    """The encoder and the head."""

    encoder: SentenceEncoder
    head: LinearHead

    @classmethod
    def load(cls, path: Path = ASSET, encoder: SentenceEncoder | None = None) -> AnswerCheck:
        """The shipped check; give the judges' encoder so that it is loaded once.

        Raises:
            ArtifactError: if the file is missing or damaged, or holds no such check, or one that reads other features.
        """
        head = load_heads(path).get("answers")
        if head is None:
            raise ArtifactError(f"{path} holds no check of answers; run `make judge`")
        reader = encoder or shared_encoder()
        found, expected = head.weight.shape[1], feature_count(reader)
        if found != expected:
            raise ArtifactError(f"{path} holds a check of answers on {found} features, expected {expected}; run `make judge`")
        return cls(reader, head)

    @property
    def key(self) -> str:
        """A hash of the head."""
        return f"answers-{self.head.key}"

    def probabilities(self, pairs: Sequence[Pair]) -> list[float]:
        """Per (prompt, reply) the probability that the reply answers the prompt."""
        if not pairs:
            return []
        return [float(share) for share in self.head.probabilities(pair_features(pairs, self.encoder))[:, PAIR_LABELS.index(ANSWERS)]]


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


def labelled_pairs(answered: Sequence[Answered], per_reply: int, seed: int) -> list[tuple[Pair, str]]:
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
    pairs: list[tuple[Pair, str]] = []
    for one in answered:
        elsewhere = [other for other in by_tone[one.tone] if other.prompt != one.prompt and other.reply != one.reply]
        siblings = [reply for reply in one.siblings if reply != one.reply]
        if not elsewhere:
            raise DataError(f"expected replies of '{one.tone}' to at least two prompts, found one: '{one.prompt[:60]}'; give more replies")
        for _ in range(per_reply):
            pairs.append(((one.prompt, one.reply), ANSWERS))
            other = rng.choice(elsewhere)
            way = rng.random()
            if way < 0.4 and siblings:
                reply = rng.choice(siblings)
            else:
                reply = other.reply if way < 0.75 else rambling(one.prompt, other.reply, rng)
            pairs.append(((one.prompt, reply), NOT))
    return pairs
