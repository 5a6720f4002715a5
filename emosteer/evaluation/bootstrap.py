"""Intervals and tests over scenario-events: a paired bootstrap, and sign-flip permutation tests.

Replies to one scenario-event are not independent of each other, hence whole scenario-events are drawn and flipped, never single
replies. A metric of a method is a table [group, item] with NaN where there is no opinion; a statistic is a vector [1 + draw] whose
first entry is the estimate itself and whose others are its bootstrap draws, so that any function of statistics keeps its interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.base.seeds import torch_seed

N_DRAWS = 2000
#: Up to this many scenario-events that differ, real-valued differences are tested by all 2^n sign flips; above, by drawn ones.
EXACT_UP_TO, N_FLIPS = 13, 20_000


@dataclass(frozen=True, eq=False)
class Draws:
    """Bootstrap draws. counts: [1 + draw, group], how often each group is in a draw; the first row holds every group once."""

    counts: Tensor

    @classmethod
    def make(cls, n_groups: int, n_draws: int = N_DRAWS, seed: int = 0) -> Draws:
        """Draws that depend on the numbers and the seed alone: give the same to every method, and differences are paired."""
        picks = torch.randint(n_groups, (n_draws, n_groups), generator=torch.Generator().manual_seed(torch_seed(seed)))
        counts = torch.zeros(n_draws, n_groups, dtype=torch.float64).scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
        return cls(torch.cat([torch.ones(1, n_groups, dtype=torch.float64), counts]))

    def of(self, groups: Sequence[int]) -> Draws:
        """The same draws, looking at some of the groups only."""
        return Draws(self.counts[:, list(groups)])


def mean(table: Tensor, draws: Draws) -> Tensor:
    """Mean over all items that are there. Shape [1 + draw]; NaN for a draw without any.

    Args:
        table: [group, item], NaN where missing.
    """
    there = ~table.isnan()
    return draws.counts @ table.nan_to_num(0.0).sum(1).double() / (draws.counts @ there.sum(1).double())


def median(table: Tensor, draws: Draws) -> Tensor:
    """Median over all items that are there, the mean of the middle two where their number is even. Shape [1 + draw]."""
    there = ~table.isnan()
    values, order = table[there].double().sort()
    if not len(values):
        return torch.full((len(draws.counts),), float("nan"), dtype=torch.float64)
    group = there.nonzero()[:, 0][order]
    reached = draws.counts[:, group].cumsum(1)  # how many items of the draw are at most this one
    total = reached[:, -1:]
    low, high = ((total - 1) / 2).floor(), (total / 2).floor()
    last = len(values) - 1
    middle = [values[(reached <= rank).sum(1).clamp_max(last)] for rank in (low, high)]
    return torch.where(total[:, 0] > 0, (middle[0] + middle[1]) / 2, float("nan"))


def estimate(statistic: Tensor, level: float = 0.95) -> dict[str, float | None]:
    """A statistic as {"value", "low", "high"}: the estimate with its percentile interval; None where nothing was measured."""
    value, drawn = statistic[0], statistic[1:][~statistic[1:].isnan()]
    if value.isnan() or not len(drawn):
        return {"value": None if value.isnan() else _rounded(value), "low": None, "high": None}
    ends = torch.quantile(drawn, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=drawn.dtype))
    return {"value": _rounded(value), "low": _rounded(ends[0]), "high": _rounded(ends[1])}


def paired(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both tables with NaN wherever either has it: a difference is taken over the items that both have."""
    missing = a.isnan() | b.isnan()
    return a.masked_fill(missing, float("nan")), b.masked_fill(missing, float("nan"))


def sign_flip_p(differences: Tensor, seed: int = 0) -> float:
    """Two-sided p of "no difference": the share of sign flips of whole groups that give a sum at least as far from zero.

    Exact for whole numbers (yes/no metrics; with one item a group this is McNemar's exact test) and for few groups; otherwise from
    20,000 drawn flips, with the data as one of them.

    Args:
        differences: [group, item], a - b, NaN where missing.
    """
    sums = differences.double().nan_to_num(0.0).sum(1)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    if torch.equal(sums, sums.round()):
        return _exact(sums.long().abs(), abs(int(sums.sum())))
    if len(sums) <= EXACT_UP_TO:
        signs = 1 - 2 * (torch.arange(2 ** len(sums))[:, None] >> torch.arange(len(sums)) & 1).double()
        return float(_as_far(signs, sums).double().mean())
    signs = 1 - 2 * torch.randint(2, (N_FLIPS, len(sums)), generator=torch.Generator().manual_seed(torch_seed(seed))).double()
    return float((_as_far(signs, sums).sum() + 1) / (N_FLIPS + 1))


def _as_far(signs: Tensor, sums: Tensor) -> Tensor:
    """Which flips give a sum as far from zero; the slack is for rounding, so that the data count as far as themselves."""
    return (signs @ sums).abs() >= sums.sum().abs() - 1e-9 * sums.abs().sum()


def _exact(sizes: Tensor, found: int) -> float:
    """The share of sign flips of whole numbers whose sum is at least `found` from zero, by convolution."""
    reach = int(sizes.sum())
    share = torch.zeros(2 * reach + 1, dtype=torch.float64)
    share[reach] = 1.0
    for size in sizes.tolist():
        share = (share.roll(size) + share.roll(-size)) / 2  # nothing wraps round: the sum never exceeds `reach`
    return min(1.0, float(share[(torch.arange(-reach, reach + 1).abs() >= found)].sum()))


def _rounded(value: Tensor) -> float:
    """Six digits after the point, and no minus zero."""
    return round(float(value), 6) + 0.0
