"""When units are dropped while learning, and how the rate comes down. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Parts of the steps before the first and after the last cut of a gradual schedule: the last third is left for fitting on.
BEFORE, AFTER = 0.2, 0.35


@dataclass(frozen=True)
class Schedule:
    """A course of learning. steps: of the optimiser; cuts: step -> share of the units that is left from this step on; ends: steps, counted
    from 1, after which the values are taken, the last of them the last step. The rate is whole at first and falls over the second half of
    what leads to an end, then starts anew."""

    steps: int
    cuts: Mapping[int, float]
    ends: tuple[int, ...]

    def rate(self, step: int) -> float:
        """The share of the whole rate that a step, counted from 0, has."""
        begin = max((end for end in self.ends if end <= step), default=0)
        end = min(end for end in self.ends if end > step)
        return min(1.0, 2 * (end - step) / (end - begin))

    @classmethod
    def halfway(cls, steps: int, keep: float) -> Schedule:
        """One cut, after half of the steps."""
        return cls(steps, {steps // 2: keep}, (steps,))

    @classmethod
    def gradual(cls, steps: int, budget: float) -> Schedule:
        """From all units to the budget, a cut at every step, the first ones the largest (the cubic schedule of Zhu and Gupta 2017)."""
        first = round(steps * BEFORE)
        last = max(first, steps - 1 - round(steps * AFTER))
        cuts = {}
        for step in range(first, last + 1):
            left = 1 - (step - first) / (last - first) if last > first else 0.0
            cuts[step] = budget + (1 - budget) * left**3
        return cls(steps, cuts, (steps,))

    @classmethod
    def descent(cls, sizes: Sequence[float], first: int, each: int) -> Schedule:
        """From all units down over several sizes, with fitting on between them: `first` steps with all units, `each` with every size, and
        an end at every size."""
        starts = [first + number * each for number in range(len(sizes))]
        return cls(first + each * len(sizes), dict(zip(starts, sizes, strict=True)), tuple(start + each for start in starts))
