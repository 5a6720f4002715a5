"""Replies on which the judges disagree, for a person to read: drawn by their text's hash, so that nobody chose them. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from emosteer.base.files import sha256_text
from emosteer.judges.panel import UNDECIDED, Reading
from emosteer.judges.protocol import Opinion
from emosteer.report.replies import clean
from emosteer.report.votes import Vote, opinions_of, votes
from emosteer.report.wording import kind_label, label

#: So many are listed.
MOST = 40


@dataclass(frozen=True)
class Dispute:
    """A reply that judges read differently. target: the emotion asked for, "none" for an unsteered reply; judged: the panel's label."""

    prompt: str
    text: str
    target: str
    method: str
    kind: str
    judged: str
    votes: Sequence[Vote]


@dataclass(frozen=True)
class Disputes:
    """What is listed. total: replies whose judges give different labels; undecided: those of them without a majority."""

    listed: Sequence[Dispute]
    total: int
    undecided: int


def disputes(rows: Iterable[Mapping[str, Any]], most: int = MOST) -> Disputes:
    """Replies without a majority, drawn by the hash of their text; where these are fewer than may be listed, then those with a majority
    whose judges are furthest apart. In the order of their hashes, so that methods are mixed; equal texts count once."""
    texts: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        labels = {vote.label for vote in votes(row) if vote.label is not None}
        if isinstance(text := row.get("text"), str) and (len(labels) > 1 or _split(row)):
            texts.setdefault(text, row)
    ranked = sorted(texts, key=lambda text: (*_rank(texts[text]), sha256_text(clean(text))))
    chosen = sorted(ranked[:most], key=lambda text: sha256_text(clean(text)))
    undecided = sum(map(_split, texts.values()))
    return Disputes([_dispute(texts[text]) for text in chosen], len(texts), undecided)


def _rank(row: Mapping[str, Any]) -> tuple[bool, float]:
    """Without a majority first, all alike; then by distance, the furthest apart first."""
    decided = not _split(row)
    return decided, -round(distance(opinions_of(row).values()), 6) if decided else 0.0


def _split(row: Mapping[str, Any]) -> bool:
    """Whether no label has more than half of the votes."""
    return Reading({judge: Opinion(shares) for judge, shares in opinions_of(row).items()}).majority == UNDECIDED


def distance(opinions: Iterable[Mapping[str, float] | None]) -> float:
    """How far the two judges who differ most are apart: half the sum of the differences of their probabilities, 0 to 1."""
    given = [shares for shares in opinions if shares]
    return max((sum(abs(a.get(k, 0.0) - b.get(k, 0.0)) for k in sorted({*a, *b})) / 2 for a, b in combinations(given, 2)), default=0.0)


def _dispute(row: Mapping[str, Any]) -> Dispute:
    kind, method = (str(row.get(name) or "") for name in ("kind", "method"))
    prompt, target, judged = (str(row.get(name) or "") for name in ("prompt", "emotion", "judged"))
    return Dispute(prompt, str(row["text"]), target, label(method), kind_label(kind), judged, votes(row))
