"""How a method's free parameters are chosen, one strength per emotion: the same rule, under the same budget, for every method.
Development split only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.base.errors import UsageError
from emosteer.evaluation.metrics import Table
from emosteer.evaluation.settings import Budget


@dataclass(frozen=True)
class DosePoint:
    """One method at one setting on the development split, for one emotion or all. good, emotion, probability, accuracy: as in
    `metrics.measure`, None without any opinion."""

    good: float | None
    emotion: float | None
    probability: float | None
    accuracy: float | None
    answers: float
    ratio: float
    names: float
    sound: float
    n: int

    @classmethod
    def of(cls, table: Table, base: Table, emotion: int | None = None) -> DosePoint:
        """The point of a table [group, emotion]; base: the unsteered replies to the same groups, and maybe more."""
        columns = slice(None) if emotion is None else slice(emotion, emotion + 1)
        mine = {name: values[:, columns] for name, values in table.items()}
        groups = len(mine["nll"])
        judged = {name: mine[name].nanmean().item() for name in ("good", "emotion", "probability", "accuracy")}
        known = {name: None if math.isnan(value) else round(value, 6) for name, value in judged.items()}
        ratio = math.exp((mine["nll"].mean() - base["nll"][:groups, columns].mean()).item())
        answers, names, sound = (round(mine[name].mean().item(), 6) for name in ("answers", "names", "sound"))
        return cls(**known, answers=answers, ratio=round(ratio, 6), names=names, sound=sound, n=mine["nll"].numel())


#: Allocations of doses to emotions that are looked through at most, all of them: six emotions at a dozen doses.
MOST = 5_000_000


@dataclass(frozen=True)
class Choice:
    """doses: emotion -> dose; fits: whether they keep to ratio and soundness; unsound: emotions that no dose leaves sound enough."""

    doses: dict[str, float]
    fits: bool
    unsound: tuple[str, ...] = ()


def choose(points: Mapping[str, Mapping[float, DosePoint]], unsteered: Mapping[str, DosePoint], budget: Budget) -> Choice:
    """The doses of a method, one per emotion: of all allocations that keep to the budget the one with the most good replies, and of
    those with as many the one with the highest mean P(target).

    Ratio, naming and soundness are those of all emotions' replies together: of one emotion alone there are too few to tell a share of
    2 % from one of 8 %. Where no allocation names the emotion little enough, those count that name it least; where none keeps to ratio
    and soundness, the one that exceeds them least is taken. Of equals, the weaker.

    Args:
        points: emotion -> dose -> what was measured; unsteered: emotion -> the same of the unsteered replies.

    Raises:
        UsageError: for more doses than can be looked through.
    """
    usable = {emotion: _usable(mine, unsteered[emotion], budget) for emotion, mine in points.items()}
    sizes = [len(doses) for doses, _ in usable.values()]
    if math.prod(sizes) > MOST:
        raise UsageError(f"{math.prod(sizes):,} allocations of doses to emotions are too many; give fewer --doses")
    weights = torch.tensor([next(iter(points[emotion].values())).n for emotion in points], dtype=torch.float64)

    def pooled(figure: Callable[[DosePoint], float]) -> Tensor:
        """Mean over all replies, for every allocation. Shape [doses of the first emotion, of the second, ...]."""
        total = torch.zeros(sizes, dtype=torch.float64)
        for axis, (emotion, (doses, _)) in enumerate(usable.items()):
            values = torch.tensor([figure(points[emotion][dose]) for dose in doses], dtype=torch.float64) * weights[axis] / weights.sum()
            total += values.view([-1 if i == axis else 1 for i in range(len(sizes))])
        return total

    plain = sum(unsteered[emotion].sound * float(weight) for emotion, weight in zip(points, weights, strict=True)) / float(weights.sum())
    excess = (pooled(lambda p: math.log(p.ratio)) - math.log(budget.ratio)).clamp_min(0)
    excess = excess + (min(budget.sound, plain) - pooled(lambda p: p.sound)).clamp_min(0)
    fits = excess.min().item() <= TINY and all(sound for _, sound in usable.values())
    possible = excess <= excess.min() + TINY
    names = pooled(lambda p: p.names).masked_fill(~possible, math.inf)
    possible &= names <= max(budget.names, names.min().item()) + TINY
    for figure in (lambda p: p.good or 0.0, lambda p: p.probability or 0.0):  # the second where the first is as high
        gain = pooled(figure).masked_fill(~possible, -math.inf)
        possible &= gain >= gain.max() - TINY
    best = possible.flatten().nonzero()[:, 0]
    place = [torch.unravel_index(index, sizes) for index in best]
    found = [{e: usable[e][0][int(i)] for e, i in zip(usable, indices, strict=True)} for indices in place]
    return Choice(min(found, key=lambda doses: sum(doses.values())), fits, tuple(e for e, (_, sound) in usable.items() if not sound))


#: Sums of rounded shares differ in their last bits.
TINY = 1e-6


def _usable(points: Mapping[float, DosePoint], unsteered: DosePoint, budget: Budget) -> tuple[list[float], bool]:
    """The doses that leave one emotion sound enough and that a judge had an opinion of, weakest first; the weakest of all where there
    is none, and False."""

    def unsound(point: DosePoint) -> int:
        return round((1 - point.sound) * point.n)

    def fine(point: DosePoint) -> bool:
        allowed = max(math.floor((1 - budget.each_sound) * point.n + 1e-9), unsound(unsteered))
        return point.probability is not None and unsound(point) <= allowed

    found = [dose for dose, point in sorted(points.items()) if fine(point)]
    return (found, True) if found else ([min(points)], False)


def best_prompt(points: Mapping[str, DosePoint], budget: Budget) -> str:
    """The prompt with the most good replies within the ratio; where none is within, the one with the lowest ratio."""
    within = [name for name, point in points.items() if point.ratio <= budget.ratio]
    if not within:
        return min(points, key=lambda name: points[name].ratio)
    return max(within, key=lambda name: points[name].good or 0.0)
