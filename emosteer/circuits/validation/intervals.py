"""Estimates with bootstrap intervals: over prompts, and over random sets where there are some."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.base.seeds import torch_seed

#: Resamples, and what an interval covers.
RESAMPLES, COVERED = 2000, 0.95
#: Means of the same figures differ by less, whichever way they are added up: relative, from 1 on.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def record(self) -> list[float]:
        """As files hold it."""
        return [self.value, self.low, self.high]


@dataclass(frozen=True, eq=False)
class Resampled:
    """Draws of prompts, the same for everything that is compared. weights: [draw, prompt], how often each was drawn over their number; the
    first draw is the sample itself."""

    weights: Tensor
    generator: torch.Generator

    @classmethod
    def of(cls, n: int, seed: int = 0) -> Resampled:
        """n: prompts."""
        generator = torch.Generator().manual_seed(torch_seed(seed))
        drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
        counts = torch.zeros(RESAMPLES, n).scatter_add_(1, drawn, torch.ones(RESAMPLES, n))
        return cls(torch.cat([torch.ones(1, n), counts]) / n, generator)

    def means(self, values: Tensor) -> Tensor:
        """Mean over prompts in every draw. values: [..., prompt] -> [draw, ...]."""
        return torch.einsum("bg,...g->b...", self.weights, values.float())

    def set_means(self, values: Tensor) -> Tensor:
        """Mean over random sets and prompts, both drawn again. values: [set, prompt] -> [draw]."""
        means = self.means(values)
        drawn = torch.randint(means.shape[1], means.shape, generator=self.generator)
        drawn[0] = torch.arange(means.shape[1])
        return means.gather(1, drawn).mean(1)


def estimate(draws: Tensor) -> Estimate:
    """The first of the draws, and the interval of the others. draws: [draw]."""
    tail = (1 - COVERED) / 2
    low, high = torch.quantile(draws[1:], torch.tensor([tail, 1 - tail])).tolist()
    return Estimate(draws[0].item(), low, high)


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Quotients, 0 where the whole is nothing."""
    return torch.where(whole.abs() > 1e-9, part / torch.where(whole.abs() > 1e-9, whole, 1.0), 0.0)


def quotient(own: float, random: float) -> float | None:
    """How many times what random sets do; None where they do nothing, or the opposite."""
    return own / random if random > 1e-9 else None


def effect_size(own: float, sets: Tensor) -> float:
    """By how many standard deviations of the random sets the circuit differs from their mean; 0 where they do not differ. sets: [set]."""
    spread = sets.std().item() if len(sets) > 1 else 0.0
    return (own - sets.mean().item()) / spread if spread > _rounding(own) else 0.0


def chance(own: float, sets: Tensor) -> float:
    """How likely a random set is to reach the circuit's figure, itself counted among them. sets: [set]."""
    return (1 + int((sets >= own - _rounding(own)).sum())) / (1 + len(sets))


def _rounding(value: float) -> float:
    return ROUNDING * max(1.0, abs(value))
