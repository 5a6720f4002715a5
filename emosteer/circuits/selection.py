"""Which units a circuit with a budget keeps: by what they turn out to be worth while they are learned, or by a ranking made beforehand.

All selections are learned in the same way (`learning.py`): the same draws, steps, schedule and start. They differ in which units are left
at every cut:

- gradual: by what they are worth at that moment, cut by cut. The worth of a unit is the squared change of the loss that removing it would
  make to first order, averaged over the last steps: the criterion of Molchanov et al. 2019 ("Importance estimation for neural network
  pruning"), with a head or a neuron as the group.
- gates: by the chance that a learned gate is open (`gates.py`).
- contrast: by what they write along the emotion's direction at their own layer (`attribution.unit_scores`).
- patch: by attribution patching of the final score on the bank's replies (`attribution.gradients`).
- integrated: by integrated gradients of what is learned, from the unsteered run to the one in which every unit adds its mean contrast.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from emosteer.attribution.ablate import compared_groups
from emosteer.attribution.gradients import attribution_patching
from emosteer.attribution.unit_scores import UnitScores, contrast_scores
from emosteer.base.progress import bar
from emosteer.base.seeds import torch_seed
from emosteer.circuits.learning import Compared, Comparisons, margins
from emosteer.circuits.precision import reader
from emosteer.circuits.settings import GainSettings
from emosteer.circuits.unit_outputs import UnitOutputs
from emosteer.directions.directions import Directions, reference_directions, stable_band
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import Bank, Group
from emosteer.scenarios.splits import spread

#: Share of the running mean that the steps before keep.
MEMORY = 0.9
#: Prompts that attribution patching and integrated gradients are taken on, and points between the two runs of the latter.
PATCHED, INTEGRATED, POINTS = 6, 8, 4


@dataclass(eq=False)
class Worth:
    """The choice "gradual". worth: [emotion, unit], running mean of the squared first-order change of the loss without the unit."""

    what: UnitOutputs
    worth: Tensor | float = field(default=0.0)

    def see(self, values: Tensor, gradient: Tensor) -> None:
        """One step more."""
        self.worth = MEMORY * self.worth + (1 - MEMORY) * self.what.by_unit(values * gradient).square()

    def kept(self, values: Tensor, share: float) -> Tensor:
        """The most worth, among those that are left."""
        left = self.what.by_unit(values.abs()) > 0
        worth = torch.where(left, torch.as_tensor(self.worth).to(values), -1.0)
        return self.what.by_value(self.what.best(worth, share))


@dataclass(frozen=True, eq=False)
class Ranked:
    """The choice of a ranking made beforehand. scores: [emotion, unit]."""

    what: UnitOutputs
    scores: Tensor

    def see(self, values: Tensor, gradient: Tensor) -> None:
        """Nothing that is seen changes it."""

    def kept(self, values: Tensor, share: float) -> Tensor:
        """The best of the ranking."""
        return self.what.by_value(self.what.best(self.scores.to(values), share))


def shuffled(scores: UnitScores, seed: int) -> UnitScores:
    """A random ranking matched to another one: in every layer the same scores, dealt out to the layer's units at random. However many units
    are taken, each layer gives as many as by the other ranking."""
    draw = torch.Generator().manual_seed(torch_seed(seed))
    tables = []
    for table in (scores.heads, scores.neurons):
        order = torch.rand(table.shape, generator=draw).argsort(-1)
        tables.append(table.gather(-1, order))
    return UnitScores(*tables)


def ranking(
    name: str, model: Model, directions: Directions, what: UnitOutputs, groups: Sequence[Group], bank: Bank, settings: GainSettings
) -> UnitScores:
    """The scores of every unit by a ranking that needs no learning: "contrast", "patch" or "integrated".

    Raises:
        DataError: if the bank has nothing to compare.
    """
    if name == "contrast":
        return contrast_scores(model, directions)
    if name == "patch":
        v_ref = reference_directions(directions, stable_band(directions))
        return attribution_patching(model, compared_groups(model, directions, groups, bank, PATCHED), v_ref, directions)[0]
    return what.table(integrated_gradients(model, what, groups, bank, directions, settings).sum)


@dataclass(frozen=True, eq=False)
class Integrated:
    """Integrated gradients of the margin. sum: [emotion, unit]; start, end: [emotion], the margins of the two runs that it is taken
    between. The units' sums add up to their difference."""

    sum: Tensor
    start: Tensor
    end: Tensor


def integrated_gradients(
    model: Model,
    what: UnitOutputs,
    groups: Sequence[Group],
    bank: Bank,
    directions: Directions,
    settings: GainSettings,
    prompts: int = INTEGRATED,
    points: int = POINTS,
) -> Integrated:
    """How much of the margin, what the other emotions' replies cost more than the wanted one, each unit's mean contrast is responsible for.

    The gradient is averaged over runs between the unsteered one and the one in which every unit adds its mean contrast, and multiplied by
    the contrast: integrated gradients (Sundararajan et al. 2017) over nodes, as EAP-IG (Hanna et al. 2024) takes them over edges. Where
    EAP-IG moves the input between two prompts, here the units' contrast moves, since an emotional and a neutral reply have no tokens
    that belong together. Midpoints of equal steps.

    Args:
        groups: scenario-events of train; prompts: how many of them, evenly spread.
    """
    data = Comparisons.of(groups, bank, directions.emotions)
    chosen, draw = spread(data.usable, prompts), random.Random(settings.seed)
    reading, ends = reader(model, settings.dtype), what.contrasts()
    gradient, margin, counts = torch.zeros_like(ends), torch.zeros(2, len(ends)), torch.zeros(len(ends))
    with bar("integrated gradients (prompts)", len(chosen)) as advance:
        for group in chosen:
            compared, held = Compared.draw(group, data, replace(settings, content=0.0), draw), list(data.held(group))
            for point in range(points):
                values = (ends * (point + 0.5) / points).requires_grad_()
                margins(reading, compared, what.added(values), directions.instruction).sum().backward()
                assert values.grad is not None
                gradient += values.grad / points
            with torch.no_grad():
                for place in (0, 1):
                    margin[place, held] += margins(reading, compared, what.added(ends * place), directions.instruction).cpu()
            counts[held] += 1
            advance(1)
    counts = counts.clamp_min(1)
    return Integrated(what.by_unit(gradient * ends) / counts.to(ends)[:, None], margin[0] / counts, margin[1] / counts)
