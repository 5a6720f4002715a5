"""Replies for the page: whole prompts with all their methods, as many as fit, chosen evenly. The text is untrusted. No torch here."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emosteer.base.files import sha256_text
from emosteer.judges.protocol import ANSWERED
from emosteer.report.votes import votes
from emosteer.report.wording import finite, kind_label, label, ordered
from emosteer.scenarios.words import stem_pattern


@dataclass(frozen=True)
class Browser:
    """What the page embeds. data: plain JSON for the script; shown, total: replies; prompts: shown and all of them."""

    data: Mapping[str, Any]
    shown: int
    total: int
    prompts_shown: int
    prompts_total: int


def browser(rows: Sequence[Mapping[str, Any]], emotions: Sequence[str], budget: int) -> Browser:
    """Chooses prompts evenly over kinds, valences, themes and scenarios until the budget is used, each with every emotion and method.

    Args:
        budget: bytes of JSON that may be embedded.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(_text(row, name) for name in ("kind", "valence", "theme", "skeleton_id", "prompt"))].append(row)
    keys = sorted(groups)  # so that evenly spaced ones are spread over kinds, valences, themes and scenarios
    lists = _Lists(
        ordered(list({_text(row, "method") for row in rows})),
        [*emotions, *sorted({_text(row, "emotion") for row in rows} - set(emotions))],
        list(dict.fromkeys(label for row in rows for label in _labels(row))),
        list(dict.fromkeys(vote.judge for row in rows for vote in votes(row))),
        len(emotions),
    )
    packed = {key: lists.pack(groups[key]) for key in keys}
    sizes = [len(json.dumps([*key, *packed[key]], ensure_ascii=False).encode("utf-8", "replace")) for key in keys]
    chosen = sorted((keys[i] for i in evenly(sizes, budget)), key=lambda key: sha256_text("/".join(key)))  # neighbours differ
    data = {
        "methods": [[method, label(method)] for method in lists.methods],
        "emotions": lists.emotions,
        "asked": len(emotions),
        "answered": ANSWERED,
        "judged": lists.judged,
        "judges": lists.judges,
        "prompts": [_prompt(*key) for key in chosen],
        "replies": [packed[key] for key in chosen],
    }
    return Browser(data, sum(len(groups[key]) for key in chosen), len(rows), len(chosen), len(keys))


def _prompt(kind: str, valence: str, theme: str, scenario: str, prompt: str) -> list[str]:
    """A prompt as the script reads it; one that is no scenario-event has its kind for a theme, which is said once."""
    return [prompt, valence, "" if theme == kind else theme, scenario, kind_label(kind)]


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
    judges: list[str]
    asked: int

    def pack(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
        """Rows as [emotion, method, text, judged or -1, P(target) or P per emotion, sound, reasons, strength, tokens, votes, P(answers),
        emotions it names]; a vote is [label, its probability] by judge, or None. Whether a reply is good is left to the reader, who knows
        which emotion an unsteered one is held against."""
        packed = [self._row(row) for row in rows]
        return sorted(packed, key=lambda row: (row[0], row[1]))

    def _row(self, row: Mapping[str, Any]) -> list[Any]:
        emotion, judged, shares = _text(row, "emotion"), _judged(row), row.get("probabilities")
        wanted = [emotion] if emotion in self.emotions[: self.asked] else self.emotions[: self.asked]
        probabilities = [finite(shares.get(name)) for name in wanted] if isinstance(shares, Mapping) else []
        sound, answers, text = row.get("sound"), finite(row.get("answers")), clean(_text(row, "text"))
        said = {vote.judge: [self.judged.index(vote.label), round(vote.share, 2)] for vote in votes(row) if vote.label and vote.share}
        return [
            self.emotions.index(emotion),
            self.methods.index(_text(row, "method")),
            text,
            self.judged.index(judged[0]) if judged else -1,
            [None if share is None else round(share, 2) for share in probabilities],
            int(sound) if isinstance(sound, bool) else None,
            ", ".join(str(reason) for reason in row.get("reasons") or ()),
            finite(row.get("strength")),
            row.get("n_tokens") if isinstance(row.get("n_tokens"), int) else None,
            [said.get(judge) for judge in self.judges],
            None if answers is None else rounded(answers),
            [self.emotions.index(name) for name in wanted if stem_pattern(name).search(text)],
        ]


def rounded(share: float) -> float:
    """Two digits, but never across the line from which a reply answers its prompt."""
    short = round(share, 2)
    return share if (short >= ANSWERED) != (share >= ANSWERED) else short


def _labels(row: Mapping[str, Any]) -> list[str]:
    """The panel's label, then the judges'."""
    return [*_judged(row), *(vote.label for vote in votes(row) if vote.label is not None)]


def _judged(row: Mapping[str, Any]) -> list[str]:
    judged = row.get("judged")
    return [judged] if isinstance(judged, str) else []


def _text(row: Mapping[str, Any], name: str) -> str:
    text = row.get(name)
    return clean(text) if isinstance(text, str) else ""


def clean(text: str) -> str:
    """Text that can be written as UTF-8: half characters, which JSON can hold, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
