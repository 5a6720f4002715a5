"""What each judge of the panel says of a reply, as the lines of the test replies hold it. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emosteer.report.wording import finite


@dataclass(frozen=True)
class Vote:
    """What one judge says. label: None where it said nothing; share: its probability; target: that of the emotion asked for."""

    judge: str
    label: str | None
    share: float | None
    target: float | None


def votes(row: Mapping[str, Any]) -> list[Vote]:
    """What each judge says of a reply."""
    target, found = row.get("emotion"), []
    for judge, shares in opinions_of(row).items():
        seen = max(shares, key=lambda name: shares[name]) if shares else None
        wanted = finite(shares.get(target)) if shares and isinstance(target, str) else None
        found.append(Vote(judge, seen, shares[seen] if shares and seen is not None else None, wanted))
    return found


def opinions_of(row: Mapping[str, Any]) -> dict[str, dict[str, float] | None]:
    """Judge -> label -> probability; None where it said nothing, or nothing that can be read."""
    opinions = row.get("opinions")
    found: dict[str, dict[str, float] | None] = {}
    for judge, shares in opinions.items() if isinstance(opinions, Mapping) else ():
        known = (
            {name: value for name, share in shares.items() if (value := finite(share)) is not None} if isinstance(shares, Mapping) else {}
        )
        found[str(judge)] = known or None
    return found
