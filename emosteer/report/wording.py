"""Numbers and names as a reader meets them: percentages with intervals, methods by their labels. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emosteer.circuits.methods import METHODS

#: A narrow no-break space: between a number and its unit.
THIN = "\u202f"
#: A no-break space: an interval stays on one line with its value.
TIED = "\u00a0"
MINUS = "\u2212"
DASH = "\u2013"


def label(method: str) -> str:
    """A method's name for people."""
    return METHODS[method].label if method in METHODS else method


def in_sentence(method: str) -> str:
    """A method's name inside a sentence: lower case, with its article."""
    return METHODS[method].phrase if method in METHODS else method.lower()


def asked_by(prompt: str) -> str:
    """How a prompt asks: `tone`; a prompt that is not in the table goes by its name."""
    return (METHODS[prompt].elicitation if prompt in METHODS else None) or prompt


#: Measures of the contest as headings; in tables of shares "%" is added.
MEASURES = {
    "good": "Good",
    "emotion": "Emotion",
    "sound": "Sound",
    "answers": "Answers",
    "names": "Names it",
    "synonyms": "Names it or a synonym",
    "probability": "P(target)",
    "ratio": "Perplexity ratio",
    "median_ratio": "Median ratio",
    "kept": "Content kept",
    "repetition": "Repetition",
    "unfinished": "Unfinished",
    "n_tokens": "Tokens",
    "accuracy": "Six-way",
}
#: Kinds of prompt (`scenarios.prompt_sets.KINDS`) as a reader meets them.
KINDS = {
    "sev-vivid": "vivid event",
    "sev-plain": "plain event",
    "one-liner": "one-liner",
    "question": "question",
    "request": "request",
    "small-talk": "small talk",
    "bare-fact": "bare fact",
    "chat": "chat",
}


def measure(name: str) -> str:
    """A measure's heading; one that is not in the table goes by its name."""
    return MEASURES.get(name, name)


def kind_label(kind: str) -> str:
    """A kind of prompt for people."""
    return KINDS.get(kind, kind)


def kind_counts(kinds: Any) -> str:
    """`vivid event 20, question 20`; empty for what is no table of counts."""
    return ", ".join(f"{kind_label(str(kind))} {count}" for kind, count in kinds.items()) if isinstance(kinds, Mapping) else ""


def place(method: str) -> tuple[int, str]:
    """Sort key: the page's order of methods, unknown ones last."""
    return (list(METHODS).index(method) if method in METHODS else len(METHODS), method)


def ordered(methods: Iterable[str]) -> list[str]:
    """Methods in the page's order."""
    return sorted(methods, key=place)


@dataclass(frozen=True)
class Interval:
    """A measured value and the ends of its 95 % interval; None where nothing was measured."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, found: Any) -> Interval:
        """Reads {"value", "low", "high"}, a plain number or None; what is not finite counts as not measured."""
        if isinstance(found, Mapping):
            return cls(finite(found.get("value")), finite(found.get("low")), finite(found.get("high")))
        return cls(finite(found))

    def negated(self) -> Interval:
        """The interval of the difference taken the other way round."""
        value, low, high = (None if end is None else -end for end in (self.value, self.low, self.high))
        return Interval(value, high, low)


def finite(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """A number with a true minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{abs(value):,.{digits}f}"
    negative = value < 0 and float(text.replace(",", "")) != 0
    return (MINUS if negative else "+" if signed and value > 0 else "") + text


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return DASH if share is None else f"{number(100 * share, digits)}{THIN}%"


def ends(low: float, high: float, digits: int, signed: bool = False) -> str:
    """An interval's ends in brackets, not to be broken over lines."""
    return f"[{number(low, digits, signed)},{TIED}{number(high, digits, signed)}]"


def share_range(found: Interval, digits: int = 1) -> str:
    """A share in percent without the sign, for columns that have it in their heading: `82.3 [79.9, 84.6]`."""
    return percent_range(found, digits).replace(f"{THIN}%", "")


def percent_range(found: Interval, digits: int = 1) -> str:
    """`82.3 % [79.9, 84.6]`."""
    if found.low is None or found.high is None or found.value is None:
        return percent(found.value, digits)
    return f"{percent(found.value, digits)}{TIED}{ends(100 * found.low, 100 * found.high, digits)}"


def number_range(found: Interval, digits: int = 2) -> str:
    """`1.07 [1.05, 1.09]`."""
    if found.low is None or found.high is None or found.value is None:
        return number(found.value, digits)
    return f"{number(found.value, digits)}{TIED}{ends(found.low, found.high, digits)}"


def points_range(found: Interval) -> str:
    """A difference of shares: `+21.4 points [18.0, 24.7]`."""
    if found.value is None:
        return DASH
    text = f"{number(100 * found.value, 1, signed=True)} points"
    if found.low is None or found.high is None:
        return text
    return f"{text}{TIED}{ends(100 * found.low, 100 * found.high, 1, signed=True)}"


def p_value(p: float | None) -> str:
    """`< 0.001` or three digits."""
    return DASH if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def words(items: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {last} {items[-1]}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 head`, `68 heads`, with thousands separated."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def shortened(names: Sequence[str], length: int = 5) -> dict[str, str]:
    """Names -> cut to fit above narrow columns, and each only so far that it still differs from the others: equal ones would be drawn as
    one column."""

    def cut(name: str, size: int) -> str:
        return name if len(name) <= size + 1 else name[: size - 1] + "."

    def told_apart(name: str, size: int) -> bool:
        return all(cut(other, size) != cut(name, size) for other in names if other != name)

    return {name: cut(name, next((n for n in range(length, len(name)) if told_apart(name, n)), len(name))) for name in names}
