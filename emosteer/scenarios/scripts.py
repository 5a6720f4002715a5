"""Words of texts in any script. No torch here.

Most scripts put white space between words, and there a word is what stands between white space. Others do not: Chinese, Japanese, Thai,
Lao, Khmer, Burmese, Tibetan and their relatives (what the Unicode line breaking rules, UAX 14, call ideographs and scripts of complex
context). Which kind a letter is of decides, so that texts may mix them. Where no white space ends a word, its length is taken for what it
is on average: two letters of Han or kana, four of the others, marks not counted; a run of such letters is rounded up to whole words. Where
words are compared one by one (near-duplicates, phrases), every such letter stands for itself.

Texts in scripts with white space, English among them, are counted as they always were.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

#: Han with its iteration marks, hiragana and katakana, Bopomofo, Yi; as ranges of a character class.
_IDEOGRAPHS = (
    "\u3005\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001b000-\U0001b16f"
    "\u3105-\u312f\u31a0-\u31bf\ua000-\ua48c"
)
#: Blocks whose letters are of complex context: Thai, Lao, Tibetan, Myanmar, Khmer, Tai Le, New Tai Lue, Tai Tham, Tai Viet.
_COMPLEX_BLOCKS = (
    *((0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF)),
    *((0x1A20, 0x1AAF), (0xA9E0, 0xA9FF), (0xAA60, 0xAADF)),
)
#: Letters that make a word on average.
_SIZES = {"ideographs": 2, "complex": 4}


@lru_cache
def _complex_letters() -> str:
    """The letters of `_COMPLEX_BLOCKS`, as a character class."""
    codes = (code for first, last in _COMPLEX_BLOCKS for code in range(first, last + 1))
    return "".join(chr(code) for code in codes if unicodedata.category(chr(code))[0] == "L")


@lru_cache
def marks() -> str:
    r"""Combining marks and joiners, as ranges of a character class: they are part of a word and no `\w` to Python."""
    ranges: list[list[int]] = []
    for code in range(0x0300, 0x1E950):
        if unicodedata.category(chr(code)) in ("Mn", "Mc") and not 0xFE00 <= code <= 0xFE0F:  # a variation selector spells nothing
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges) + "\u200c\u200d"


@lru_cache
def unspaced_letters() -> str:
    """Letters of scripts without white space between words, as a character class."""
    return _IDEOGRAPHS + _complex_letters()


@lru_cache
def _unspaced() -> re.Pattern[str]:
    return re.compile(f"[{unspaced_letters()}]")


def is_unspaced(text: str) -> bool:
    """Whether a text holds a letter of a script without white space between words."""
    return not text.isascii() and _unspaced().search(text) is not None


@lru_cache
def _runs() -> re.Pattern[str]:
    """Runs of letters of one kind, with their marks."""
    other = rf"(?:(?![{unspaced_letters()}])\w[{marks()}]*)+"
    return re.compile(
        f"(?P<ideographs>[{_IDEOGRAPHS}][{_IDEOGRAPHS}{marks()}]*)|(?P<complex>[{_complex_letters()}][{_complex_letters()}{marks()}]*)|{other}"
    )


def word_count(text: str) -> int:
    """How many words a text has."""
    pieces = text.split()
    return sum(_words_in(piece) if is_unspaced(piece) else 1 for piece in pieces)


def _words_in(piece: str) -> int:
    """Words of what stands between white space, if it holds letters of a script without it."""
    return sum(-(-len(_unspaced().findall(run[0])) // _SIZES[run.lastgroup]) if run.lastgroup else 1 for run in _runs().finditer(piece))


@lru_cache
def _word_by_word(inside: str, word: str) -> re.Pattern[str]:
    """Single unspaced letters with their marks, else what `word` matches, with marks allowed wherever `inside` is."""
    marked = word.replace(inside, rf"(?:(?![{unspaced_letters()}]){inside}[{marks()}]*)")
    return re.compile(f"[{unspaced_letters()}][{marks()}]*|{marked}")


def words(text: str, inside: str = r"\w", word: str = r"\w+") -> list[str]:
    r"""The words of a text one by one, in lower case, without punctuation; every unspaced letter is one.

    Args:
        inside, word: what a word of the other scripts is, as a pattern whose letters are matched by `inside`.
    """
    text = text.lower()
    return re.findall(word, text) if text.isascii() else _word_by_word(inside, word).findall(text)


def spaced_out(text: str) -> str:
    """The text with white space round its runs of unspaced letters, so that words of other scripts among them have ends."""
    return re.sub(f"[{unspaced_letters()}{marks()}]+", lambda run: f" {run[0]} " if is_unspaced(run[0]) else run[0], text)


def joined(first: str, second: str) -> str:
    """Two sentences as one text. A first one that ends without punctuation gets the full stop of its script: "." or, after Han and kana,
    "\u3002"; scripts of complex context have white space there."""
    last = next((c for c in reversed(first) if unicodedata.category(c)[0] != "M"), "")
    if not last or unicodedata.category(last)[0] not in "LN":
        return f"{first} {second}"
    if re.match(f"[{_IDEOGRAPHS}]", last):
        return f"{first}\u3002{second}"
    return f"{first} {second}" if is_unspaced(last) else f"{first}. {second}"
