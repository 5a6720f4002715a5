"""Stop sequences in a text that comes in pieces. No torch here."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes a text on up to the first of some sequences, which is left out. What may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: not empty each."""
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """What can be passed on now that a piece is there; `stopped` says whether it was the last."""
        text = self.held + piece
        found = min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.held, self.stopped = "", True
            return text[:found]
        longest = max(map(len, self.stops), default=1) - 1
        size = next((n for n in range(min(longest, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
        self.held = text[len(text) - size :]
        return text[: len(text) - size]

    def rest(self) -> str:
        """What was held back, once the text has ended."""
        held, self.held = self.held, ""
        return held
