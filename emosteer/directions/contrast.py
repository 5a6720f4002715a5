"""Streaming contrast statistics: running sums of `delta[g,e] = h[g,e] - mean_e' h[g,e']`, per site and stratum.

Memory is O(sites x d_model), independent of the number of groups. Sums are kept in float64 with the rounding error of every
addition beside them (twice the precision): neither the order of batches shows, nor how they were divided among processes, not even in
the last bit. A stratum is a set of groups whose mean is wanted by itself: each half, each theme, each valence, the held-out groups,
and both halves again with the emotions' labels shuffled inside each group (the control for every claim).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emosteer.base.errors import DegenerateDirection
from emosteer.directions.activations import Sample
from emosteer.models.sites import MLP_POST, Site, Z, residual_sites
from emosteer.scenarios.scenarios import VALENCES
from emosteer.scenarios.splits import stable_share

HALVES = ("half:0", "half:1")
SHUFFLED = ("shuffled:0", "shuffled:1")
HELDOUT = "heldout"
#: Sums of whole numbers: float64 holds them exactly.
COUNTS = ("count", "correct")
#: Themes with a mean of their own; more would cost memory and be too small to compare.
MAX_THEMES = 12


@dataclass(frozen=True)
class Plan:
    """Which group goes where. All of it depends on the data and the seed alone.

    heldout: scenarios whose groups are only used to measure separability; themes: those with a stratum.
    """

    emotions: tuple[str, ...]
    themes: tuple[str, ...]
    heldout: frozenset[str]
    seed: int

    @property
    def strata(self) -> tuple[str, ...]:
        """Names of all strata, in storage order."""
        return (*HALVES, HELDOUT, *SHUFFLED, *(f"theme:{t}" for t in self.themes), *(f"valence:{v}" for v in VALENCES))

    def strata_of(self, sample: Sample) -> list[str]:
        """The strata that a group counts in with its true labels."""
        half = HALVES[stable_share(f"half/{sample.key.scenario}", self.seed) < 0.5]
        strata = [HELDOUT if sample.key.scenario in self.heldout else half]
        strata += [f"valence:{sample.key.valence}"] if sample.key.valence else []  # a prompt that is no scenario-event has none
        return strata + ([f"theme:{sample.theme}"] if sample.theme in self.themes else [])

    def shuffle(self, sample: Sample) -> list[int]:
        """A permutation of the emotions for the control, drawn per group."""
        order = list(range(len(self.emotions)))
        random.Random(f"{self.seed}/shuffle/{sample.key}").shuffle(order)
        return order


class Contrasts:
    """The running sums of one extraction; `state`/`restore` move them to and from a checkpoint, `merge` adds another process's.

    sums: by name, rounded to float64; rest: what rounding took off them; readers: directions that held-out groups are read with,
    [halves or shuffled halves] -> [emotion, site, d_model]; their own, as far as they have come, where none are given.
    """

    def __init__(self, plan: Plan, n_layers: int, d_model: int, z_width: int, d_mlp: int) -> None:
        """Starts at zero. Memory: strata x emotions x sites x d_model numbers, and two per emotion and unit."""
        n, sites = len(plan.emotions), residual_sites(n_layers)
        self.plan, self.sites, self.n_layers = plan, sites, n_layers
        self.sizes = plan, n_layers, d_model, z_width, d_mlp  # what another one of the same shape is made from
        kinds = {Z: z_width, MLP_POST: d_mlp}
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64)  # noqa: E731
        self.sums: dict[str, Tensor] = {
            "resid": zeros(len(plan.strata), n, len(sites), d_model),
            "resid_sq": zeros(n, len(sites), d_model),
            "resid_base": zeros(len(sites), d_model),
            "resid_rms": zeros(len(sites)),
            "count": zeros(len(plan.strata)),
            "correct": zeros(2, len(sites), n),
            **{f"{kind}_sum": zeros(n, n_layers, width) for kind, width in kinds.items()},
            **{f"{kind}_sq": zeros(n, n_layers, width) for kind, width in kinds.items()},
            **{f"{kind}_base": zeros(n_layers, width) for kind, width in kinds.items()},
        }
        self.rest = {name: torch.zeros_like(value) for name, value in self.sums.items() if name not in COUNTS}
        self.readers: tuple[Tensor, ...] | None = None

    def state(self) -> dict[str, Tensor]:
        """The sums and what rounding took off them, by name."""
        return {**self.sums, **{f"rest.{name}": value for name, value in self.rest.items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        for name in self.sums:
            self.sums[name] = tensors[name].clone()
        for name in self.rest:
            self.rest[name] = tensors[f"rest.{name}"].clone()

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Adds the `state` of other groups."""
        for name in self.sums:
            if name in COUNTS:
                self.sums[name] += tensors[name]
            else:
                self._add(name, tensors[name])
                self._add(name, tensors[f"rest.{name}"])

    def _add(self, name: str, value: Tensor, index: int | slice = slice(None)) -> None:
        """Adds to a sum and keeps what rounding takes off it."""
        high, low = self.sums[name][index], self.rest[name][index]
        total = high + value
        back = total - high
        error = (high - (total - back)) + (value - back) + low  # exact: what total lacks, and what was owed before
        high.copy_(total + error)
        low.copy_(error - (high - total))

    def directions(self) -> tuple[Tensor, ...]:
        """What held-out groups are read with: directions of the groups counted so far, with true and with shuffled labels."""
        return tuple(unit_vectors(self.mean(*strata)) for strata in (HALVES, SHUFFLED))

    @property
    def n_groups(self) -> int:
        """Groups counted so far, held-out ones included."""
        wanted = [self.plan.strata.index(name) for name in (*HALVES, HELDOUT)]
        return int(self.sums["count"][wanted].sum())

    def update(self, samples: Sequence[Sample], states: Mapping[Site, Tensor]) -> None:
        """Adds whole groups. states: site -> [group, emotion, width]; held-out groups must come after all others.

        Strata are added to in place, group by group: a copy of the sums costs as much as a good part of a forward pass.
        """
        delta, base = _centred([states[site] for site in self.sites])  # [group, emotion, site, d_model]
        self._classify(samples, delta)
        for sample, mine in zip(samples, delta, strict=True):
            self._add_strata(sample, mine)
        squares = _sum_of_squares(delta)
        self._add("resid_sq", squares)
        self._add("resid_base", base.sum(0))
        # the mean over emotions of (base + delta)^2: the products in between cancel, as deltas sum to zero
        self._add("resid_rms", squares.mean(0).mean(-1) + base.square().mean(-1).sum(0))
        for kind in (Z, MLP_POST):
            delta, base = _centred([states[Site(layer, kind)] for layer in range(self.n_layers)])
            self._add(f"{kind}_base", base.sum(0))
            self._add(f"{kind}_sum", delta.sum(0))
            self._add(f"{kind}_sq", _sum_of_squares(delta))

    def _add_strata(self, sample: Sample, delta: Tensor) -> None:
        """Adds one group's contrasts [emotion, site, d_model] to its strata, and to its half's control with the labels shuffled."""
        strata = self.plan.strata
        counted = self.plan.strata_of(sample)
        for name in counted:
            self._add("resid", delta, strata.index(name))
        order = self.plan.shuffle(sample)
        controls = [strata.index(SHUFFLED[HALVES.index(name)]) for name in counted if name in HALVES]
        for index in controls:
            self._add("resid", delta[order], index)
        for index in (*map(strata.index, counted), *controls):
            self.sums["count"][index] += 1

    def _classify(self, samples: Sequence[Sample], delta: Tensor) -> None:
        """Names the emotion of held-out groups by the largest projection, with the true and the shuffled directions."""
        mine = [i for i, sample in enumerate(samples) if sample.key.scenario in self.plan.heldout]
        if not mine:
            return
        wanted = torch.arange(len(self.plan.emotions))
        for index, vectors in enumerate(self.readers or self.directions()):
            scores = torch.einsum("gend,fnd->gnef", delta[mine], vectors)
            self.sums["correct"][index] += (scores.argmax(-1) == wanted).double().sum(0)

    def mean(self, *strata: str) -> Tensor:
        """Mean contrast over the union of strata. Shape [emotion, site, d_model].

        Raises:
            DegenerateDirection: if the strata hold no group.
        """
        wanted = [self.plan.strata.index(name) for name in strata]
        count = self.sums["count"][wanted].sum()
        if count == 0:
            raise DegenerateDirection(f"no group falls into {' + '.join(strata)}; more scenarios are needed")
        return self.sums["resid"][wanted].sum(0) / count

    def unit_moments(self, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """Mean contrast, its variance over groups [emotion, layer, width], and the mean activation [layer, width]."""
        n = max(self.n_groups, 1)
        mean = self.sums[f"{kind}_sum"] / n
        return mean, (self.sums[f"{kind}_sq"] / n - mean.square()).clamp_min(0), self.sums[f"{kind}_base"] / n


def _centred(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacks sites' states [group, emotion, width] and takes each group's mean over emotions away.

    Returns:
        Contrasts [group, emotion, site, width] and means [group, site, width], float64 in host memory.
    """
    stacked = torch.stack(list(states), dim=2).cpu().double()
    base = stacked.mean(1)
    stacked -= base[:, None]
    return stacked, base


def _sum_of_squares(delta: Tensor) -> Tensor:
    """The squares summed over the first dimension, without a copy of them all."""
    total = torch.zeros_like(delta[0])
    for mine in delta:
        total.addcmul_(mine, mine)
    return total


def unit_vectors(means: Tensor) -> Tensor:
    """Scales mean contrasts [..., d_model] to length one.

    Raises:
        DegenerateDirection: if one has no length; a missing signal must not become a plausible vector.
    """
    norms = means.norm(dim=-1, keepdim=True)
    if not (norms > 0).all():
        raise DegenerateDirection(
            "an emotion equals the mean of all emotions at some site: the data do not tell them apart; check the replies or the prompts"
        )
    return means / norms


def make_plan(samples_themes: Sequence[tuple[str, str]], emotions: Sequence[str], holdout: float, seed: int) -> Plan:
    """Draws the held-out scenarios (a share of all, whole scenarios) and picks the themes.

    Args:
        samples_themes: (scenario id, theme) of every group.
    """
    ids = sorted({scenario for scenario, _ in samples_themes})
    ranked = sorted(ids, key=lambda scenario: stable_share(f"holdout/{scenario}", seed))
    counts: dict[str, int] = {}
    for _, theme in samples_themes:
        counts[theme] = counts.get(theme, 0) + 1
    themes = sorted(sorted(counts), key=lambda theme: -counts[theme])[:MAX_THEMES]
    return Plan(tuple(emotions), tuple(sorted(themes)), frozenset(ranked[: round(len(ids) * holdout)]), seed)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON, for headers."""
    return {"emotions": list(plan.emotions), "themes": list(plan.themes), "heldout": sorted(plan.heldout), "seed": plan.seed}
