"""A cost in numbers and in words. No torch at import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

#: Bytes of a reply with what is said of it, as it is kept.
REPLY_BYTES = 1500
#: Bytes of what a panel says of a text.
VERDICT_BYTES = 500


@dataclass(frozen=True)
class Part:
    """One kind of work. what: in the plural ("replies"); count; tokens: read or written, where they are known; seconds: here,
    None where nobody can tell; at_most: whether the work may end earlier."""

    what: str
    count: int
    tokens: int = 0
    seconds: float | None = None
    at_most: bool = False

    @property
    def said(self) -> str:
        """In words: "at most 960 replies (46,080 tokens)"."""
        bound = "at most " if self.at_most else ""
        return f"{bound}{self.count:,} {self.what}" + (f" ({self.tokens:,} tokens)" if self.tokens else "")


@dataclass(frozen=True)
class Cost:
    """What a command does. memory: bytes that it takes in all; disk: bytes that it writes; kept: what of it an earlier run has done, in
    words, which the parts leave out; notes: what else is good to know before."""

    command: str
    parts: tuple[Part, ...]
    memory: int = 0
    disk: int = 0
    kept: str = ""
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def together(cls, command: str, costs: Sequence[Cost]) -> Cost:
        """Several stages that follow each other, as one command."""
        parts = tuple(part for cost in costs for part in cost.parts)
        kept = ", ".join(cost.kept for cost in costs if cost.kept)
        notes = tuple(note for cost in costs for note in cost.notes)
        return cls(command, parts, max(cost.memory for cost in costs), sum(cost.disk for cost in costs), kept, notes)

    @property
    def seconds(self) -> float | None:
        """All in all; None where the time of a part is not known."""
        times = [part.seconds for part in self.parts if part.count]
        return None if any(time is None for time in times) else float(sum(time or 0.0 for time in times))

    @property
    def line(self) -> str:
        """One line for people."""
        work = ", ".join(part.said for part in self.parts if part.count) or "nothing left to do"
        at_most = any(part.at_most and part.count for part in self.parts)
        time = (
            "how long is not known before the first of them"
            if self.seconds is None
            else f"{'up to ' if at_most else ''}about {spoken(self.seconds)} here"
        )
        sizes = [f"{amount(self.memory)} of memory"] * bool(self.memory) + [f"writes {amount(self.disk)}"] * bool(self.disk)
        return "; ".join([f"{self.command}: {work}", time, *sizes, *([self.kept] if self.kept else []), *self.notes])

    def as_json(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {**asdict(self), "parts": [asdict(part) for part in self.parts], "seconds": self.seconds}


def spoken(seconds: float) -> str:
    """A time as one says it: no more digits than an estimate has."""
    if seconds < 1:
        return "a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def amount(size: int) -> str:
    """Bytes as one says them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(1, round(size / 2**20))} MiB"


def of_author(count: int, held: int, attempts: int, tokens: int, endpoint: bool) -> Cost:
    """Scenarios still to be written. tokens: of an answer, at most."""
    left = max(0, count - held)
    note = f"each up to {attempts} answers of at most {tokens} tokens"
    where = "asked of the endpoint, which may cost money" if endpoint else "written here"
    kept = f"{held:,} of {count:,} are kept" if held else ""
    return Cost("build --author", (Part("scenarios", left, 0, None if left else 0.0),), 0, left * REPLY_BYTES, kept, (note, where))
