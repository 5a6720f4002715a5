"""Topic contamination: how far the *subject* of texts gives their emotion away, once every emotion word is taken out. No torch here.

Replies that stand for anger because they are about refunds, and for sadness because they are about a mother's room, teach a circuit and a
judge scripts instead of emotions. Three figures show it: how often content words alone name the emotion of texts whose prompt was held out
(naive Bayes on which words occur), the words that each emotion uses more than all others (log odds with an informative Dirichlet prior,
Monroe, Colaresi and Quinn 2008, "Fightin' Words"), and the share of an emotion's texts that repeat a five-word phrase of another one.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from emosteer.base.errors import DataError
from emosteer.base.files import read_text
from emosteer.base.strict_json import loads
from emosteer.scenarios.scenarios import Bank, data_path
from emosteer.scenarios.scripts import is_unspaced, words
from emosteer.scenarios.splits import stable_share
from emosteer.scenarios.words import feeling_pattern

FOLDS = 5
#: Words of a phrase that no two texts of an emotion should share.
PHRASE = 5
#: Over-used words that are listed for each emotion, and the z-score from which one counts: of thousands of words some reach 2 by chance.
LISTED, OVERUSED = 8, 3.0
#: A word in fewer texts of the fitted folds says nothing that would carry over.
LEAST_TEXTS = 2
#: Weight of the Dirichlet prior (the words of all emotions together), in words per vocabulary entry.
PRIOR = 1.0


@dataclass(frozen=True)
class Text:
    """One text. group: its prompt; texts of one prompt are never fitted on and tested with at the same time."""

    text: str
    emotion: str
    group: str


@dataclass(frozen=True)
class Overused:
    """A word that an emotion uses more than the others. z: of the log odds ratio; share, elsewhere: shares of the texts that hold it."""

    word: str
    z: float
    share: float
    elsewhere: float


@dataclass(frozen=True)
class Contamination:
    """What the subject gives away.

    accuracy: share of held-out texts whose emotion content words alone name; subject: the same by subject words; chance: of naming it
    without looking; by_emotion: accuracy per emotion; overused: emotion -> its most over-used subject words, worst first; phrases:
    emotion -> share of its texts that share a five-word phrase with a text of the same emotion to another prompt; n: texts.
    """

    accuracy: float
    subject: float
    chance: float
    by_emotion: Mapping[str, float]
    overused: Mapping[str, tuple[Overused, ...]]
    phrases: Mapping[str, float]
    n: int


@lru_cache
def word_list(name: str) -> frozenset[str]:
    """The words of a committed list: "function_words", which have no subject, or "evaluative_words", which judge it."""
    lists: dict[str, str] = loads(read_text(data_path(f"{name}.json"), "word list"))
    return frozenset(word for words in lists.values() for word in words.split())


def content_words(text: str) -> list[str]:
    """A text's content words: lower case, without function words, emotion words and their synonyms, and numbers. In scripts without white
    space between words, pairs of neighbouring letters."""
    without = re.sub(r"\w+", lambda word: " " if _names_a_feeling(word[0]) else word[0], text.replace("\u2019", "'"))
    found, little = words(without, r"[^\W\d_]", r"[^\W\d_]+(?:'[^\W\d_]+)?"), word_list("function_words")
    return [word for word in _paired(found) if len(word) > 1 and word not in little and word.split("'")[0] not in little]


def _paired(found: Sequence[str]) -> list[str]:
    """Words with single letters of a script without white space between words made pairs of neighbours, which stand for its words."""
    if not any(map(is_unspaced, found)):
        return list(found)
    pairs = [a + b for a, b in zip(found, found[1:], strict=False) if is_unspaced(a) and is_unspaced(b)]
    return [word for word in found if not is_unspaced(word)] + pairs


@lru_cache(maxsize=100_000)
def _names_a_feeling(word: str) -> bool:
    """Whether a whole word is of the list of feelings, which holds single words only: word by word it is read a hundred times faster."""
    return feeling_pattern().fullmatch(word) is not None


def subject_words(text: str) -> list[str]:
    """Its content words without those that judge ("unfair", "lovely", "filthy"): what the text is about."""
    return _subjects(content_words(text))


def _subjects(words: Sequence[str]) -> list[str]:
    return [word for word in words if word not in word_list("evaluative_words")]


def contamination(texts: Sequence[Text], seed: int = 0) -> Contamination:
    """Measures all three.

    Raises:
        DataError: if there are fewer than two emotions, or fewer prompts than folds.
    """
    emotions = sorted({text.emotion for text in texts})
    groups = {text.group for text in texts}
    if len(emotions) < 2 or len(groups) < FOLDS:
        raise DataError(
            f"expected texts of at least two emotions to at least {FOLDS} prompts, found {len(emotions)} and {len(groups)}; give more texts"
        )
    contents = [content_words(text.text) for text in texts]
    subjects = [_subjects(words) for words in contents]
    right = _held_out_hits(texts, [frozenset(words) for words in contents], emotions, seed)
    by_emotion = {e: _mean([hit for hit, text in zip(right, texts, strict=True) if text.emotion == e]) for e in emotions}
    counts = Counter(text.emotion for text in texts)
    return Contamination(
        accuracy=_mean(right),
        subject=_mean(_held_out_hits(texts, [frozenset(words) for words in subjects], emotions, seed)),
        chance=max(counts.values()) / len(texts),
        by_emotion=by_emotion,
        overused=overused_words(texts, subjects),
        phrases=shared_phrases(texts),
        n=len(texts),
    )


def contamination_of_bank(bank: Bank, emotions: Sequence[str]) -> Contamination | None:
    """The same of a reply bank, over the replies of some emotions; all replies to one scenario count as replies to one prompt. None where
    the bank is too small to be measured."""
    rows = [Text(text, emotion, key.scenario) for key, replies in bank.items() for emotion, text in replies.items() if emotion in emotions]
    few = len({row.emotion for row in rows}) < 2 or len({row.group for row in rows}) < FOLDS
    return None if few else contamination(rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _held_out_hits(texts: Sequence[Text], words: Sequence[frozenset[str]], emotions: Sequence[str], seed: int) -> list[float]:
    """Per text 1 where naive Bayes, fitted on the other folds' prompts, names its emotion; ties share the point."""
    order = sorted({text.group for text in texts}, key=lambda group: stable_share(f"contamination/{group}", seed))
    fold = {group: place % FOLDS for place, group in enumerate(order)}
    hits = [0.0] * len(texts)
    for held in range(FOLDS):
        fitted = [i for i, text in enumerate(texts) if fold[text.group] != held]
        scores = log_shares([texts[i].emotion for i in fitted], [words[i] for i in fitted], emotions)
        for i, text in enumerate(texts):
            if fold[text.group] != held:
                continue
            best = likeliest(words[i], scores, len(emotions))
            hits[i] = (emotions.index(text.emotion) in best) / len(best)
    return hits


def likeliest(words: Iterable[str], scores: Mapping[str, Sequence[float]], n_emotions: int) -> list[int]:
    """The numbers of the emotions that naive Bayes finds likeliest, all equally frequent: several where they tie.

    Args:
        scores: as `log_shares` gives them.
    """
    known = sorted(word for word in words if word in scores)
    totals = [math.fsum(scores[word][e] for word in known) for e in range(n_emotions)]
    return [e for e, total in enumerate(totals) if total >= max(totals) - 1e-9]


def log_shares(labels: Sequence[str], words: Sequence[frozenset[str]], emotions: Sequence[str]) -> dict[str, list[float]]:
    """Word -> per emotion the logarithm of the (smoothed) share of its texts that hold the word.

    An emotion with fewer texts than the one with the most is filled up with texts like all the others: words that it was not seen to use
    would speak for it otherwise, because of so few texts none is rare.
    """
    texts = Counter(labels)
    most = max(texts.values(), default=0)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for label, some in zip(labels, words, strict=True):
        for word in some:
            counts[word][label] += 1
    return {
        word: [math.log((count[e] + 0.5 + (most - texts[e]) * count.total() / len(labels)) / (most + 1)) for e in emotions]
        for word, count in counts.items()
        if count.total() >= LEAST_TEXTS
    }


def overused_words(texts: Sequence[Text], words: Sequence[Sequence[str]]) -> dict[str, tuple[Overused, ...]]:
    """Emotion -> the content words that it uses more than all the other emotions, by z-score of the log odds ratio, highest first.

    Args:
        words: the content words of each text.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    holding: dict[str, Counter[str]] = defaultdict(Counter)
    size = Counter(text.emotion for text in texts)
    for text, some in zip(texts, words, strict=True):
        counts[text.emotion].update(some)
        holding[text.emotion].update(set(some))
    everywhere: Counter[str] = sum(counts.values(), Counter())
    present: Counter[str] = sum(holding.values(), Counter())
    total = everywhere.total()
    prior = {word: PRIOR * len(everywhere) * count / max(total, 1) for word, count in everywhere.items()}
    weight = sum(prior.values()) + 1  # and one word more, for all that was not said
    listed: dict[str, tuple[Overused, ...]] = {}
    for emotion, here in counts.items():
        n, others = here.total(), total - here.total()
        rows = []
        for word, count in here.items():
            a, b = count + prior[word], everywhere[word] - count + prior[word]
            odds = math.log(a / (n + weight - a)) - math.log(b / (others + weight - b))
            z = odds / math.sqrt(1 / a + 1 / b)
            if z > OVERUSED and holding[emotion][word] > 1:
                elsewhere = (present[word] - holding[emotion][word]) / max(1, len(texts) - size[emotion])
                rows.append(Overused(word, round(z, 3), holding[emotion][word] / size[emotion], elsewhere))
        listed[emotion] = tuple(sorted(rows, key=lambda row: (-row.z, row.word))[:LISTED])
    return listed


def shared_phrases(texts: Sequence[Text]) -> dict[str, float]:
    """Emotion -> share of its texts that hold a five-word phrase which a text of the same emotion to another prompt holds too."""
    where: dict[tuple[str, tuple[str, ...]], set[str]] = defaultdict(set)
    phrases = [set(phrases_of(text.text)) for text in texts]
    for text, some in zip(texts, phrases, strict=True):
        for phrase in some:
            where[text.emotion, phrase].add(text.group)
    found: dict[str, list[float]] = defaultdict(list)
    for text, some in zip(texts, phrases, strict=True):
        found[text.emotion].append(float(any(len(where[text.emotion, phrase]) > 1 for phrase in some)))
    return {emotion: _mean(shares) for emotion, shares in sorted(found.items())}


def phrases_of(text: str) -> list[tuple[str, ...]]:
    """Every run of five words, lower case, punctuation left out."""
    said = words(text.replace("\u2019", "'"), r"[\w']", r"[\w']+")
    return [tuple(said[i : i + PHRASE]) for i in range(len(said) - PHRASE + 1)]
