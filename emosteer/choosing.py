"""How a method's free parameter is chosen: the same rule, under the same budget, for every method. Development split only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from emosteer.measures import Table


@dataclass(frozen=True)
class Budget:
    """What a setting must keep to. ratio: perplexity against the unsteered replies; names: share of replies that name the emotion;
    sound: share of sound replies, rounded to whole replies, and never asked to be above the unsteered share."""

    ratio: float = 1.10
    names: float = 0.02
    sound: float = 0.95


@dataclass(frozen=True)
class Point:
    """One method at one setting on the development split, for one emotion or all. probability, accuracy: None without any opinion."""

    probability: float | None
    accuracy: float | None
    ratio: float
    names: float
    sound: float
    n: int

    @classmethod
    def of(cls, table: Table, base: Table, emotion: int | None = None) -> Point:
        """The point of a table [group, emotion]; base: the unsteered replies to the same groups, and maybe more."""
        columns = slice(None) if emotion is None else slice(emotion, emotion + 1)
        mine = {name: values[:, columns] for name, values in table.items()}
        groups = len(mine["nll"])
        judged = {name: mine[name].nanmean().item() for name in ("probability", "accuracy")}
        known = {name: None if math.isnan(value) else round(value, 6) for name, value in judged.items()}
        ratio = math.exp((mine["nll"].mean() - base["nll"][:groups, columns].mean()).item())
        shares = [round(mine[name].mean().item(), 6) for name in ("names", "sound")]
        return cls(known["probability"], known["accuracy"], round(ratio, 6), shares[0], shares[1], mine["nll"].numel())


def within(points: Mapping[float, Point], unsteered: Point, budget: Budget) -> dict[float, Point]:
    """The doses that keep to ratio and soundness, weakest first. A point without any opinion cannot be chosen either."""

    def unsound(point: Point) -> int:
        return round((1 - point.sound) * point.n)

    def fits(point: Point) -> bool:
        allowed = max(math.ceil((1 - budget.sound) * point.n - 1e-9), unsound(unsteered))
        return point.probability is not None and point.ratio <= budget.ratio and unsound(point) <= allowed

    return {dose: point for dose, point in sorted(points.items()) if fits(point)}


def choose(points: Mapping[float, Point], unsteered: Point, budget: Budget) -> float:
    """The dose of a method for one emotion: the highest mean P(target) within the budget.

    Of the doses within ratio and soundness those count that name the emotion little enough or, where none does, the least. Where
    nothing fits, the weakest dose is taken. Of equals, the weaker.
    """
    fitting = within(points, unsteered, budget)
    if not fitting:
        return min(points)
    most = max(budget.names, min(point.names for point in fitting.values()))
    return max((dose for dose, point in fitting.items() if point.names <= most), key=lambda dose: fitting[dose].probability or 0.0)


def best_prompt(points: Mapping[str, Point], budget: Budget) -> str:
    """The prompt with the highest accuracy within the ratio; where none is within, the one with the lowest ratio."""
    within = [name for name, point in points.items() if point.ratio <= budget.ratio]
    if not within:
        return min(points, key=lambda name: points[name].ratio)
    return max(within, key=lambda name: points[name].accuracy or 0.0)
