"""Names of emotions: any name in any script, in one spelling everywhere, and the words that cannot be one. No torch here.

Two names are the same if they differ only in case, in how Unicode writes the same letters (composed or not, full or half width), in white
space or in the shape of an apostrophe or hyphen. What is kept, shown and put into prompts is the one spelling of them all.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from emosteer.base.errors import DataError, UsageError, suggest
from emosteer.scenarios.taxonomies import emotions_of

#: The paper's six. The set is data, not code: every stage takes any list of names.
EMOTIONS = ("anger", "sadness", "happiness", "fear", "surprise", "disgust")
#: What a reply without any of them is called.
NEUTRAL = "neutral"
#: Words that mean something else wherever an emotion is named.
RESERVED = {
    "all": "every emotion",
    "none": "a reply that nothing steers (--method none)",
    NEUTRAL: "a reply without emotion, which a bank may hold beside the emotions",
}
#: Commas of the scripts that have one of their own; all of them separate names.
_COMMAS = re.compile("[,\u060c\u3001\uff0c]")
_ONE_SHAPE = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u2010": "-", "\u2011": "-"})
#: Joiners that some scripts spell words with; every other invisible character goes.
_JOINERS = "\u200c\u200d"


def emotion_key(text: str) -> str:
    """The one spelling of a name: NFKC, case folded, single spaces, without invisible characters. It refuses nothing."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_ONE_SHAPE)
    seen = "".join(c for c in folded if c in _JOINERS or unicodedata.category(c) != "Cf")
    return re.sub(r"(?<=\w)σ(?!\w)", "ς", " ".join(seen.split()))  # folding took the final sigma, which a prompt needs


def emotion_name(text: str) -> str:
    """The one spelling of a name that may be an emotion's.

    Raises:
        UsageError: for a reserved word, and for what is no name.
    """
    if fault := _fault(emotion_key(text), text):
        raise UsageError(fault)
    return emotion_key(text)


def label_of(text: str, where: str) -> str:
    """The emotion of a line of a bank: a name, or "neutral".

    Raises:
        DataError: starting with `where`.
    """
    key = emotion_key(text)
    if key != NEUTRAL and (fault := _fault(key, text)):
        raise DataError(f"{where}: {fault}")
    return key


def _fault(key: str, text: str) -> str | None:
    """What keeps a spelling from being an emotion's name."""
    if key in RESERVED:
        return f"'{key}' is no emotion's name: it stands for {RESERVED[key]}; choose another name"
    allowed = all(c in " -'_·" or c in _JOINERS or unicodedata.category(c)[0] in "LMN" for c in key)
    if not allowed or not any(c.isalpha() for c in key):
        found = text.encode("utf-8", "replace").decode("utf-8").strip()
        return f"expected an emotion's name in letters (spaces, digits, hyphens and apostrophes among them), found '{found}'"
    return None


def emotion_names(names: Sequence[str]) -> tuple[str, ...]:
    """Several names, each in its one spelling.

    Raises:
        UsageError: as `emotion_name`, and for one that is there twice.
    """
    found = tuple(emotion_name(name) for name in names)
    if twice := [name for name in found if found.count(name) > 1]:
        raise UsageError(f"the emotion '{twice[0]}' is named twice in '{', '.join(names)}'")
    return found


def find_emotion(name: str, known: Sequence[str], who: str) -> str:
    """A name as it stands among those that are known.

    Args:
        who: what knows them, for the error ("this circuit knows").

    Raises:
        UsageError: if it is none of them.
    """
    key = emotion_key(name)
    for one in known:
        if emotion_key(one) == key:
            return one
    if key in RESERVED:
        raise UsageError(f"{_fault(key, name)}; {who} {', '.join(known)}")
    raise UsageError(f"unknown emotion '{name.strip()}'{suggest(key, known)}; {who} {', '.join(known)}")


def parse_emotions(text: str, known: Sequence[str] = EMOTIONS, *, closed: bool = True) -> tuple[str, ...]:
    """Reads "all" or a comma-separated list of emotions and sets of them ("plutchik8", "parrott:secondary"). What sets share counts once.

    Args:
        closed: refuse names that are not in `known` (with the nearest as a hint).

    Raises:
        UsageError: for an unknown, repeated, reserved or missing name, and for a set that holds what is not in `known`.
    """
    if emotion_key(text) == "all":
        return tuple(known)
    parts = [part for part in _COMMAS.split(text) if part.strip()]
    if not parts:
        raise UsageError("expected an emotion or 'all', found nothing")
    names: list[str] = []
    from_sets: list[str] = []
    for part in parts:
        members = emotions_of(part)
        if members is None:
            names.append(_read(part, known, closed))
        else:
            from_sets += _members(part, members, known, closed)
    if len(set(names)) != len(names):
        raise UsageError(f"an emotion is named twice in '{text}'")
    return tuple(dict.fromkeys([*names, *from_sets]))


def _read(part: str, known: Sequence[str], closed: bool) -> str:
    try:
        return find_emotion(part, known, "known:")
    except UsageError:
        if closed:
            raise
        return emotion_name(part)


def _members(part: str, members: Sequence[str], known: Sequence[str], closed: bool) -> Sequence[str]:
    """The emotions of a set.

    Raises:
        UsageError: naming those that are not known, where only those count.
    """
    lacking = [name for name in members if closed and name not in {emotion_key(one) for one in known}]
    if lacking:
        raise UsageError(
            f"'{part.strip()}' holds {', '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not known here; "
            f"known: {', '.join(known)}"
        )
    return members
