"""Sound texts broken on purpose, in all the ways that steered replies break: what the soundness head is fitted on, so that no broken text
has to be collected."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from emosteer.judges.soundness import SOUND

#: Share of the texts that are broken in each way; the classes are then about as large as the sound one.
SHARE_BROKEN = 0.4


def _shuffled(words: list[str], rng: random.Random) -> str:
    rng.shuffle(words)
    return " ".join(words)


def _shuffled_nearby(words: list[str], rng: random.Random) -> str:
    size = rng.randint(3, 6)
    parts = [words[i : i + size] for i in range(0, len(words), size)]
    for part in parts:
        rng.shuffle(part)
    return " ".join(word for part in parts for word in part)


def _half_shuffled(words: list[str], rng: random.Random) -> str:
    middle = len(words) // 3
    rest = words[middle:]
    rng.shuffle(rest)
    return " ".join(words[:middle] + rest)


def _content_only(words: list[str], rng: random.Random) -> str:
    content = [word.strip(".,!?;:\"'") for word in words if len(word) > 4] or words
    return " ".join(rng.choice(content) for _ in range(max(8, len(words))))


def _one_word_again(words: list[str], rng: random.Random) -> str:
    at = rng.randrange(len(words))
    return " ".join(words[:at] + [words[at]] * rng.randint(5, 25) + (words[at + 1 :] if rng.random() < 0.3 else []))


def _loop(words: list[str], rng: random.Random) -> str:
    size = rng.randint(2, 6)
    at = rng.randrange(max(1, len(words) - size))
    return " ".join(words[:at] + words[at : at + size] * rng.randint(3, 8))


def _doubled(words: list[str], rng: random.Random) -> str:
    return " ".join(word for word in words for _ in range(rng.choice((1, 2, 2, 3))))


def _hyphens(words: list[str], rng: random.Random) -> str:
    at, size = rng.randrange(max(1, len(words) // 2)), rng.randint(5, 16)
    chain = "-".join(word.strip(".,!?;:").lower() for word in words[at : at + size])
    return " ".join([*words[:at], chain[: max(8, len(chain) - rng.randint(0, 4))]]) + "-"


def _noise(words: list[str], rng: random.Random) -> str:
    marks = ["!!", "??", "**", "##", "//", "...", "@", "|", "<|", "|>", "&&", "~~", "=="]
    return " ".join(word if rng.random() < 0.5 else word + "".join(rng.choice(marks) for _ in range(rng.randint(1, 3))) for word in words)


def _letters(words: list[str], rng: random.Random) -> str:
    def bent(word: str) -> str:
        inner = list(word)
        rng.shuffle(inner)
        return "".join(inner)

    return " ".join(bent(word) if rng.random() < 0.6 else word for word in words)


def _glued(words: list[str], rng: random.Random) -> str:
    return "".join(word.strip(".,!?").capitalize() + (" " if rng.random() < 0.15 else "") for word in words)


Breaker = Callable[[list[str], random.Random], str]
#: fault -> ways of breaking a text.
BREAKERS: dict[str, tuple[Breaker, ...]] = {
    "order": (_shuffled, _shuffled_nearby, _half_shuffled, _content_only),
    "repetition": (_one_word_again, _loop, _doubled),
    "symbols": (_hyphens, _noise, _letters, _glued),
}


def broken(text: str, fault: str, rng: random.Random) -> str | None:
    """The text, broken in a way of that fault; None where the text is too short to be broken or came out unbroken."""
    words = text.split()
    if len(words) < 6:
        return None
    made = rng.choice(BREAKERS[fault])(list(words), rng)
    return made if made != text and made.split() != words else None


def still_sound(texts: Sequence[str], rng: random.Random) -> list[str]:
    """Other shapes that sound text comes in: two replies in a row, and cut off at a word."""
    longer = [f"{text} {rng.choice(texts)}" for text in texts if rng.random() < 0.5]
    cut = [" ".join(words[: rng.randint(len(words) // 2, len(words) - 1)]) for words in map(str.split, texts) if len(words) > 9]
    return longer + rng.sample(cut, len(cut) // 2)


def soundness_examples(texts: Sequence[str], foreign: Sequence[str], seed: int) -> list[tuple[str, str]]:
    """(label, text) for the soundness head, from sound English texts and texts in other languages."""
    rng = random.Random(seed)
    examples = [(SOUND, text) for text in texts]
    examples += [(SOUND, text) for text in still_sound(texts, rng)]
    for fault in BREAKERS:
        made = ((fault, broken(text, fault, rng)) for text in texts if rng.random() < SHARE_BROKEN)
        examples += [(label, text) for label, text in made if text is not None]
    return examples + [("language", text) for text in foreign]
