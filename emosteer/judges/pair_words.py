"""What the words of a prompt and a reply show of whether the one answers the other: what is copied, what is new, who speaks of whom, and
what kind of answer was asked for. For English; none of it knows emotions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emosteer.judges.soundness import repetition, words_of
from emosteer.scenarios.contamination import content_words

#: Longest prompt and reply, in words, that lengths are told apart to; most new content words that are counted.
LONGEST, MOST_NEW = 60, 10
#: Letters by which a word counts as the same as another form of it.
STEM = 5


def _set(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


_SELF = _set("i i'm i've i'd i'll me my mine myself we we're we've us our ours")
_OTHER = _set("you you're you've you'd you'll your yours yourself")
_OWN, _YOURS = _set("my our"), _set("your")
_ASKING = _set("what what's which who who's how how's why when where")
_WHETHER = _set("is are am was were do does did can could should would will have has may")
_REQUESTS = _set(
    "compose create describe design do draft draw explain fill find finish give help imagine invent let list make name offer pick plan",
    "please prepare propose put recommend rewrite say send set show sketch sort suggest sum teach tell think translate turn word write",
)
#: A reply that speaks of replies, texts and chatbots has usually taken its instructions for the subject.
_ABOUT_ITSELF = re.compile(
    r"\b(sentences?|repl(?:y|ies)|respon\w+|message|text|chat\w*|ai|assist\w*|concise|(?:re)?phrase\w*|words|conversation|language|prompt|tone|"
    r"clarif\w+|example|narrative|story)\b",
    re.IGNORECASE,
)
_CHATBOT = re.compile(r"\b(as an? (?:\w+ )?(?:ai|chatbot|assistant)|i don't have (?:personal|the cap))", re.IGNORECASE)
_LIST = re.compile(r"^\s*(?:\d+[.)]|[*-]) ", re.MULTILINE)
_ENDS = re.compile(r"[.!?]+")


def pair_words(prompt: str, reply: str) -> list[float]:
    """The figures of one pair, each between 0 and about 1, always in the same order and equally many."""
    asked, said = words_of(prompt), words_of(reply)
    kind = _kind(prompt)
    copied, new = _copied(prompt, reply, asked, said)
    people, addressed = _people(asked, said)
    question, request, statement = kind[0], kind[3], kind[4]
    together = [
        *(statement * value for value in (new, copied[1], addressed[0])),
        *(question * value for value in (new, addressed[0])),
        *(request * value for value in (new, addressed[0])),
    ]
    return [*copied, *_form(reply, said, asked), *people, *kind, *together]


def _copied(prompt: str, reply: str, asked: Sequence[str], said: Sequence[str]) -> tuple[list[float], float]:
    """How much of the reply is the prompt's: words, the longest run of them, the beginning, content words either way, those that are new
    in every form, those of the prompt's last sentence; and how many content words are new."""
    heard, subject, content = {*asked}, {*content_words(prompt)}, {*content_words(reply)}
    forms = {word[:STEM] for word in subject}
    last = {*content_words(_sentences(prompt)[-1])} if asked else set()
    new = min(MOST_NEW, len(content - subject)) / MOST_NEW
    shares = [
        sum(word in heard for word in said) / max(1, len(said)),
        longest_run(asked, said) / max(1, len(said)),
        float(bool(said) and said[:2] == asked[:2]),
        len(subject & content) / max(1, len(subject)),
        len(subject & content) / max(1, len(content)),
        sum(word[:STEM] not in forms for word in content) / max(1, len(content)),
        len(last & content) / max(1, len(last)),
        new,
    ]
    return shares, new


def _form(reply: str, said: Sequence[str], asked: Sequence[str]) -> list[float]:
    """Shape of the reply: length, repetition, how much of it is content, questions and exclamations a sentence, yes or no, an apology, talk
    of itself, numbers that nobody named, a list, a quotation."""
    content, count = content_words(reply), max(1, len(said))
    sentences = max(1, len(_ENDS.findall(reply)))
    return [
        min(LONGEST, len(said)) / LONGEST,
        repetition(said, 2),
        1 - len({*said}) / count,
        len({*content}) / max(1, len(content)),
        len(content) / count,
        min(1.0, reply.count("?") / sentences),
        min(1.0, reply.count("!") / sentences),
        float(bool(said) and said[0] in ("yes", "no")),
        float("sorry" in said),
        min(3, len(_ABOUT_ITSELF.findall(reply))) / 3,
        float(bool(_CHATBOT.search(reply))),
        min(1.0, 5 * len({word for word in said if word.isdigit()} - {*asked}) / count),
        float(bool(_LIST.search(reply))),
        float('"' in reply),
    ]


def _people(asked: Sequence[str], said: Sequence[str]) -> tuple[list[float], tuple[float, float]]:
    """Who speaks of whom: a reply to "my bus" that says "your bus" has changed sides, one that says "my bus" has not; and whether the reply
    speaks of its own speaker, and of the prompt's."""
    mine, yours = float(not _SELF.isdisjoint(said)), float(not _OTHER.isdisjoint(said))
    spoken, spoken_to = float(not _SELF.isdisjoint(asked)), float(not _OTHER.isdisjoint(asked))
    owned = _owned(asked, _OWN)
    figures = [
        sum(word in _SELF for word in asked) / max(1, len(asked)),
        sum(word in _SELF for word in said) / max(1, len(said)),
        sum(word in _OTHER for word in said) / max(1, len(said)),
        *(mine, yours, spoken_to, spoken * mine, spoken * yours, spoken_to * mine),
        float(bool(owned & _owned(said, _YOURS))),
        float(bool(owned & _owned(said, _OWN))),
    ]
    return figures, (mine, yours)


def _owned(words: Sequence[str], owners: frozenset[str]) -> set[str]:
    """What is called somebody's own."""
    return {thing for owner, thing in zip(words, words[1:], strict=False) if owner in owners}


def _kind(prompt: str) -> list[float]:
    """What was asked for, by the prompt's last sentence: a question, one for a fact, one for yes or no, a request, nothing; the length."""
    sentences = _sentences(prompt)
    words = words_of(sentences[-1]) if sentences else []
    first = words[0] if words else ""
    question = prompt.rstrip().endswith("?")
    request = first in _REQUESTS and not question
    length = len(words_of(prompt))
    return [
        *map(float, (question, question and first in _ASKING, question and first in _WHETHER, request, not question and not request)),
        min(LONGEST, length) / LONGEST,
    ]


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]


def longest_run(first: Sequence[str], second: Sequence[str]) -> int:
    """The longest run of words that both have."""
    best, before = 0, [0] * (len(second) + 1)
    for word in first:
        row = [0] * (len(second) + 1)
        for place, other in enumerate(second, 1):
            if word == other:
                row[place] = before[place - 1] + 1
                best = max(best, row[place])
        before = row
    return best
