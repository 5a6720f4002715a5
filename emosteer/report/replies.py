"""Replies for the page: whole prompts with all their methods, as many as fit, chosen evenly. The text is untrusted. No torch here."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emosteer.base.files import sha256_text
from emosteer.report.wording import finite, label, ordered

#: P(target) from which a reply matches the emotion asked for, as in the evaluation.
MATCH = 0.5


@dataclass(frozen=True)
class Browser:
    """What the page embeds. data: plain JSON for the script; shown, total: replies; prompts: shown and all of them."""

    data: Mapping[str, Any]
    shown: int
    total: int
    prompts_shown: int
    prompts_total: int


def browser(rows: Sequence[Mapping[str, Any]], emotions: Sequence[str], budget: int) -> Browser:
    """Chooses prompts evenly over valences, themes and scenarios until the budget is used, each with every emotion and method.

    Args:
        budget: bytes of JSON that may be embedded.
    """
    groups: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[_text(row, "valence"), _text(row, "theme"), _text(row, "skeleton_id"), _text(row, "prompt")].append(row)
    keys = sorted(groups)  # so that evenly spaced ones are spread over valences, themes and scenarios
    lists = _Lists(
        ordered(list({_text(row, "method") for row in rows})),
        [*emotions, *sorted({_text(row, "emotion") for row in rows} - set(emotions))],
        list(dict.fromkeys(label for row in rows for label in _judged(row))),
        len(emotions),
    )
    packed = {key: lists.pack(groups[key]) for key in keys}
    sizes = [len(json.dumps([*key, *packed[key]], ensure_ascii=False).encode("utf-8", "replace")) for key in keys]
    chosen = sorted((keys[i] for i in evenly(sizes, budget)), key=lambda key: sha256_text("/".join(key)))  # neighbours differ
    data = {
        "methods": [[method, label(method)] for method in lists.methods],
        "emotions": lists.emotions,
        "asked": len(emotions),
        "match": MATCH,
        "judged": lists.judged,
        "prompts": [[prompt, valence, theme, scenario] for valence, theme, scenario, prompt in chosen],
        "replies": [packed[key] for key in chosen],
    }
    return Browser(data, sum(len(groups[key]) for key in chosen), len(rows), len(chosen), len(keys))


def evenly(sizes: Sequence[int], budget: int) -> list[int]:
    """Indices of as many items as fit the budget, evenly spaced over the list."""
    count = len(sizes)
    while count:
        picked = [i * len(sizes) // count for i in range(count)]
        used = sum(sizes[i] for i in picked)
        if used <= budget:
            return picked
        count = min(count - 1, int(count * budget / used))
    return []


@dataclass(frozen=True)
class _Lists:
    """Names that rows refer to by index."""

    methods: list[str]
    emotions: list[str]
    judged: list[str]
    asked: int

    def pack(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
        """Rows as [emotion, method, text, judged or -1, P(target) or P per emotion, sound, reasons, strength, tokens]; match is left to
        the reader, who knows which emotion an unsteered reply is held against."""
        packed = [self._row(row) for row in rows]
        return sorted(packed, key=lambda row: (row[0], row[1]))

    def _row(self, row: Mapping[str, Any]) -> list[Any]:
        emotion, judged, shares = _text(row, "emotion"), _judged(row), row.get("probabilities")
        wanted = [emotion] if emotion in self.emotions[: self.asked] else self.emotions[: self.asked]
        probabilities = [finite(shares.get(name)) for name in wanted] if isinstance(shares, Mapping) else []
        sound = row.get("sound")
        return [
            self.emotions.index(emotion),
            self.methods.index(_text(row, "method")),
            clean(_text(row, "text")),
            self.judged.index(judged[0]) if judged else -1,
            [None if share is None else rounded(share) for share in probabilities],
            int(sound) if isinstance(sound, bool) else None,
            ", ".join(str(reason) for reason in row.get("reasons") or ()),
            finite(row.get("strength")),
            row.get("n_tokens") if isinstance(row.get("n_tokens"), int) else None,
        ]


def rounded(share: float) -> float:
    """Two digits, but never across the line that decides a match."""
    short = round(share, 2)
    return share if (short >= MATCH) != (share >= MATCH) else short


def _judged(row: Mapping[str, Any]) -> list[str]:
    judged = row.get("judged")
    return [judged] if isinstance(judged, str) else []


def _text(row: Mapping[str, Any], name: str) -> str:
    text = row.get(name)
    return clean(text) if isinstance(text, str) else ""


def clean(text: str) -> str:
    """Text that can be written as UTF-8: half characters, which JSON can hold, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
