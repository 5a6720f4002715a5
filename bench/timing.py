"""Timing side by side: every round runs every contender once, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

#: What is timed; what it returns is dropped.
Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """A quotient of times, round by round. value: the median; low, high: the smallest and the largest round."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}"


def interleaved(
    work: Mapping[str, Work], repeats: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, tuple[float, ...]]:
    """Seconds of every contender in every round. Each round starts with another contender, so that none always follows the same one.

    Args:
        work: name -> what to time.
        repeats: rounds that count; warmup: rounds before them that do not.

    Returns:
        name -> [round].
    """
    names = list(work)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            gc.collect(1)  # what the one before left behind is not charged to the next; a whole collection would take longer than a round
            start = clock()
            work[name]()
            spent = clock() - start
            if turn >= 0:
                seconds[name].append(spent)
    return {name: tuple(times) for name, times in seconds.items()}


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def ratio(numerator: Sequence[float], denominator: Sequence[float], factor: float = 1.0) -> Ratio:
    """The median of the quotients of the same round, and their range; `factor` scales them (work per run, where it differs)."""
    quotients = [factor * a / b for a, b in zip(numerator, denominator, strict=True)]
    return Ratio(median(quotients), min(quotients), max(quotients))
