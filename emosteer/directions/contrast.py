"""Streaming contrast statistics: running sums of `delta[g,e] = h[g,e] - mean_e' h[g,e']`, per site and stratum.

Memory is O(sites x d_model), independent of the number of groups. Sums are kept in float64 with the rounding error of every
addition beside them (twice the precision): neither the order of batches shows, nor how they were divided among processes, not even in
the last bit. A stratum is a set of groups whose mean is wanted by itself: each half, each theme, each valence, the held-out groups,
and both halves again with the emotions' labels shuffled inside each group (the control for the agreement of the halves and for what is
read from held-out groups; themes and valences have none).

A group may lack emotions. Its own mean is then not the mean of all emotions, and a plain average of contrasts would depend on what is
missing. What is averaged instead are the parts of `h[g,e] = b[g] + m[e]` (docs/METHOD.md section 2): each group is centred on the emotions
that it holds, and the sums are solved for `m` with the counts of which emotions stood together.
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
COUNTS = ("count", "correct", "held")
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
        """A permutation of the emotions for the control, drawn per group; those that the group lacks stay where they are."""
        order, held = list(range(len(self.emotions))), list(sample.held)
        random.Random(f"{self.seed}/shuffle/{sample.key}").shuffle(held)
        for place, number in zip(sample.held, held, strict=True):
            order[place] = number
        return order


class Contrasts:
    """The running sums of one extraction; `state`/`restore` move them to and from a checkpoint, `merge` adds another process's.

    sums: by name, rounded to float64; rest: what rounding took off them; readers: mean contrasts that held-out groups are read with,
    [halves or shuffled halves] -> [emotion, site, d_model]; their own, as far as they have come, where none are given.

    Of which emotions stood together the sums over groups say, S being the emotions of a group: held [stratum, e], how many hold e;
    together [stratum, e, f], of 1/|S| where S holds both; three [e, f, h], of 1/|S|^2 where it holds all three.
    """

    def __init__(self, plan: Plan, n_layers: int, d_model: int, z_width: int, d_mlp: int, device: torch.device | str = "cpu") -> None:
        """Starts at zero. Memory: strata x emotions x sites x d_model numbers, and two per emotion and unit.

        Args:
            device: where states come from and are summed; counts are kept in host memory.
        """
        n, sites = len(plan.emotions), residual_sites(n_layers)
        self.plan, self.sites, self.n_layers = plan, sites, n_layers
        self.sizes = plan, n_layers, d_model, z_width, d_mlp  # what another one of the same shape is made from
        kinds = {Z: z_width, MLP_POST: d_mlp}
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64)  # noqa: E731
        wide = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)  # noqa: E731
        self.sums: dict[str, Tensor] = {
            "resid": wide(len(plan.strata), n, len(sites), d_model),
            "resid_sq": wide(n, len(sites), d_model),
            "resid_base": wide(len(sites), d_model),
            "resid_rms": wide(len(sites)),
            "count": zeros(len(plan.strata)),
            "held": zeros(len(plan.strata), n),
            "together": zeros(len(plan.strata), n, n),
            "three": zeros(n, n, n),
            "correct": zeros(2, len(sites), n),
            **{f"{kind}_sum": wide(n, n_layers, width) for kind, width in kinds.items()},
            **{f"{kind}_sq": wide(n, n_layers, width) for kind, width in kinds.items()},
            **{f"{kind}_base": wide(n_layers, width) for kind, width in kinds.items()},
        }
        self.rest = {name: torch.zeros_like(value) for name, value in self.sums.items() if name not in COUNTS}
        self.readers: tuple[Tensor, ...] | None = None

    def state(self) -> dict[str, Tensor]:
        """The sums and what rounding took off them, by name, in host memory."""
        everything = {**self.sums, **{f"rest.{name}": value for name, value in self.rest.items()}}
        return {name: value.cpu() for name, value in everything.items()}

    def settle(self) -> None:
        """Moves all sums to host memory, once nothing more is added."""
        self.sums = {name: value.cpu() for name, value in self.sums.items()}
        self.rest = {name: value.cpu() for name, value in self.rest.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        for name in self.sums:
            self.sums[name].copy_(tensors[name])
        for name in self.rest:
            self.rest[name].copy_(tensors[f"rest.{name}"])

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Adds the `state` of other groups."""
        for name in self.sums:
            if name in COUNTS:
                self.sums[name] += tensors[name]
            else:
                device = self.sums[name].device
                self._add(name, tensors[name].to(device))
                self._add(name, tensors[f"rest.{name}"].to(device))

    def _add(self, name: str, value: Tensor, index: int | slice = slice(None)) -> None:
        """Adds to a sum and keeps what rounding takes off it."""
        high, low = self.sums[name][index], self.rest[name][index]
        total = high + value
        back = total - high
        error = (high - (total - back)) + (value - back) + low  # exact: what total lacks, and what was owed before
        high.copy_(total + error)
        low.copy_(error - (high - total))

    def references(self) -> tuple[Tensor, ...]:
        """What held-out groups are read with: mean contrasts of the groups counted so far, with true and with shuffled labels. None where
        these groups do not compare all emotions."""
        apart = self._count(HALVES) and self.apart(*HALVES)
        return () if apart else tuple(self.mean(*strata) for strata in (HALVES, SHUFFLED))

    @property
    def n_groups(self) -> int:
        """Groups counted so far, held-out ones included."""
        wanted = [self.plan.strata.index(name) for name in (*HALVES, HELDOUT)]
        return int(self.sums["count"][wanted].sum())

    @property
    def replies(self) -> list[int]:
        """How many of the counted groups hold each emotion."""
        return [int(number) for number in self._of("held", (*HALVES, HELDOUT))]

    def update(self, samples: Sequence[Sample], states: Mapping[Site, Tensor]) -> None:
        """Adds groups. states: site -> [group, emotion that they hold, width], equally many for all; held-out groups must come after all
        others.

        Strata are added to in place, group by group: a copy of the sums costs as much as a good part of a forward pass.
        """
        size = len(samples[0].held)
        delta, base = _centred([states[site] for site in self.sites])  # [group, emotion, site, d_model]
        delta = self._placed(samples, delta)
        self._classify(samples, delta)
        for sample, mine in zip(samples, delta, strict=True):
            self._add_strata(sample, mine)
        squares = _sum_of_squares(delta)
        self._add("resid_sq", squares)
        self._add("resid_base", base.sum(0))
        # the mean over emotions of (base + delta)^2: the products in between cancel, as deltas sum to zero
        self._add("resid_rms", (squares.sum(0) / size).mean(-1) + base.square().mean(-1).sum(0))
        for kind in (Z, MLP_POST):
            delta, base = _centred([states[Site(layer, kind)] for layer in range(self.n_layers)])
            delta = self._placed(samples, delta)
            self._add(f"{kind}_base", base.sum(0))
            self._add(f"{kind}_sum", delta.sum(0))
            self._add(f"{kind}_sq", _sum_of_squares(delta))

    def _placed(self, samples: Sequence[Sample], delta: Tensor) -> Tensor:
        """Contrasts of the emotions that groups hold, each at its emotion's place among all of them; zero for the others."""
        n = len(self.plan.emotions)
        if delta.shape[1] == n:
            return delta
        placed = delta.new_zeros(len(samples), n, *delta.shape[2:])
        for row, sample in enumerate(samples):
            placed[row, list(sample.held)] = delta[row]
        return placed

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
        held = torch.zeros(len(self.plan.emotions), dtype=torch.float64)
        held[list(sample.held)] = 1
        together = held.outer(held) / held.sum()
        for index in (*map(strata.index, counted), *controls):
            self.sums["count"][index] += 1
            self.sums["held"][index] += held
            self._add("together", together, index)
        self._add("three", together[:, :, None] * held / held.sum())

    def _classify(self, samples: Sequence[Sample], delta: Tensor) -> None:
        """Names the emotion of held-out groups by the largest projection, with the true and the shuffled directions. A group that lacks
        emotions is first put where the mean of all emotions would be."""
        mine = [i for i, sample in enumerate(samples) if sample.key.scenario in self.plan.heldout]
        if not mine:
            return
        wanted = torch.arange(len(self.plan.emotions))
        held = torch.zeros(len(mine), 1, len(wanted), dtype=torch.bool)
        for row, i in enumerate(mine):
            held[row, 0, list(samples[i].held)] = True
        for index, reference in enumerate(self.references() if self.readers is None else self.readers):
            seen, means = delta[mine], reference.to(delta.device)
            if not held.all():
                seen = torch.stack([delta[i] + means[list(samples[i].held)].mean(0) for i in mine])
            scores = torch.einsum("gend,fnd->gnef", seen, unit_vectors(means))
            self.sums["correct"][index] += ((scores.argmax(-1).cpu() == wanted) & held).double().sum(0)

    def mean(self, *strata: str) -> Tensor:
        """Mean contrast over the union of strata. Shape [emotion, site, d_model].

        Raises:
            DegenerateDirection: if the strata hold no group, or emotions that no group compares.
        """
        if not self._count(strata):
            raise DegenerateDirection(f"no group falls into {' + '.join(strata)}; more scenarios are needed")
        if apart := self.apart(*strata):
            names = ", ".join(apart)
            raise DegenerateDirection(f"no group of {' + '.join(strata)} compares {names} with the other emotions; more replies are needed")
        return self._solved(self._of("resid", strata), strata)

    def apart(self, *strata: str) -> tuple[str, ...]:
        """Emotions that no chain of groups links to the others, each holding two of them or more; empty where all can be compared."""
        return tuple(self.plan.emotions[number] for number in unlinked(self._of("together", strata) > 0))

    def moments(self, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """Mean contrast and its variance over groups [emotion, site or layer, width], and the mean activation over groups and emotions
        [site or layer, width].

        The variance is that of a complete group's contrast; where groups lack emotions it is taken to be the same in all of them.

        Args:
            kind: "resid", which is every residual site, or that of heads or neurons.
        """
        every = (*HALVES, HELDOUT)
        n = max(self.n_groups, 1)
        total = self._of("resid", every) if kind == "resid" else self.sums[f"{kind}_sum"]
        mean, squares, base = self._solved(total, every), self.sums[f"{kind}_sq"], self.sums[f"{kind}_base"]
        if self._whole(every):
            return mean, (squares / n - mean.square()).clamp_min(0), base / n
        held, together = self._of("held", every), self._of("together", every)
        flat, shares = mean.flatten(1), together.diag()
        # what contrasts differ by in groups that hold different emotions is no noise: the sum of (m[e] - mean of m over S)^2
        between = torch.stack([held[e] * flat[e].square() - 2 * flat[e] * (together[e] @ flat) for e in range(len(flat))])
        between += torch.stack([((three @ flat) * flat).sum(0) for three in self.sums["three"]])
        weights = (held - shares) / (1 - 1 / len(flat))  # a contrast with fewer others is less noisy
        variance = (squares.flatten(1) - between) / weights[:, None]
        return mean, variance.clamp_min(0).view_as(mean), (base - (shares @ flat).view_as(base)) / n

    def _of(self, name: str, strata: Sequence[str]) -> Tensor:
        """A sum over the union of strata."""
        return self.sums[name][[self.plan.strata.index(stratum) for stratum in strata]].sum(0)

    def _count(self, strata: Sequence[str]) -> int:
        return int(self._of("count", strata))

    def _whole(self, strata: Sequence[str]) -> bool:
        """Whether every group of the strata holds all emotions."""
        return bool((self._of("held", strata) == self._of("count", strata)).all())

    def _solved(self, total: Tensor, strata: Sequence[str]) -> Tensor:
        """Mean contrasts, from the sums of centred states: the least squares fit of `h[g,e] = b[g] + m[e]`, which for complete groups is
        the average."""
        count = self._of("count", strata)
        if self._whole(strata):
            return total / count.clamp_min(1)
        n = len(self.plan.emotions)
        laplacian = self._of("held", strata).diag() - self._of("together", strata)
        # contrasts sum to zero: added to it in their one free direction, count / n^2 fixes that and leaves the rest as it is
        return torch.linalg.solve((laplacian + count / n**2).to(total.device), total.flatten(1)).view_as(total)


def unlinked(together: Tensor) -> list[int]:
    """The numbers of the emotions outside the largest set that groups compare, directly or through others; empty where it is all.

    Args:
        together: [emotion, emotion], whether a group holds both.
    """
    linked: list[list[bool]] = together.tolist()
    left, sets = set(range(len(linked))), list[set[int]]()
    while left:
        found, grown = {min(left)}, True
        while grown:
            more = {f for e in found for f in left if linked[e][f]} - found
            found, grown = found | more, bool(more)
        sets.append(found)
        left -= found
    return sorted(set(range(len(linked))) - max(sets, key=len)) if sets else []


def _centred(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacks sites' states [group, emotion, width] and takes each group's mean over emotions away.

    Returns:
        Contrasts [group, emotion, site, width] and means [group, site, width], float64, where the states are.
    """
    stacked = torch.stack(list(states), dim=2).double()
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
