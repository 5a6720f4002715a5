"""Learned gates over heads and neurons: which units a circuit needs, found by gradient descent.

Every unit's output is multiplied by a hard-concrete gate (Louizos, Welling and Kingma 2018, "Learning sparse neural networks through L0
regularization"): a random number between 0 and 1 that is exactly 0 or 1 most of the time, and that gradients flow through. What is
minimised is the objective of `learning.py` plus a price on every gate that is expected to be open. Louizos et al. fix the price; here it
is raised while more gates are open than wanted and lowered while fewer are, for the heads and the neurons of every emotion alone, so that
the budget is met. The wanted share falls from all units to the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from emosteer.attribution.unit_scores import UnitScores
from emosteer.base.seeds import torch_seed
from emosteer.circuits.learning import learn
from emosteer.circuits.schedule import Schedule
from emosteer.circuits.settings import GainSettings
from emosteer.circuits.unit_outputs import UnitOutputs
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.scenarios.scenarios import Bank, Group

#: Temperature of the gates, and how far they are stretched beyond 0 and 1 before they are clamped (as in the paper).
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1


def sampled(logits: Tensor, noise: Tensor) -> Tensor:
    """Hard-concrete gates. noise: uniform between 0 and 1, of the logits' shape."""
    soft = torch.sigmoid((noise.logit(1e-6) + logits) / TEMPERATURE)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def chance_open(logits: Tensor) -> Tensor:
    """The probability that a gate is not 0."""
    return torch.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH))


@dataclass(frozen=True)
class GateSettings:
    """How gates are learned. start: every logit at first, nearly always open; rate: Adam's for a logit; warmup: share of the steps before
    anything is gated, since a neuron that adds nothing yet would be worth nothing; done: share of the steps after which the wanted share
    is the budget; pressure: how fast the price follows what is open."""

    start: float = 2.0
    rate: float = 0.3
    warmup: float = 0.2
    done: float = 0.8
    pressure: float = 0.3


@dataclass(eq=False)
class Gated:
    """A parametrisation whose units pass through gates: the values of `what`, then one logit per unit, in units of the gates' rate.

    steps: of the whole run; price: [emotion, kind of unit], per gate that is expected to be open.
    """

    what: UnitOutputs
    budget: float
    steps: int
    settings: GateSettings
    draw: torch.Generator
    label: str = "gates"
    price: Tensor | None = None
    _felt: Tensor | None = field(default=None, repr=False)
    _step: int = 0

    @property
    def rate(self) -> float:
        """Of what is gated; the logits have their own, by their units."""
        return self.what.rate

    @property
    def warm(self) -> int:
        """Steps before anything is gated."""
        return round(self.settings.warmup * self.steps)

    def start(self) -> Tensor:
        """What is gated, and gates that are nearly always open."""
        values = self.what.start()
        return torch.cat([values, values.new_full((len(values), self.what.n_units), self.settings.start / self._unit)], 1)

    @property
    def _unit(self) -> float:
        return self.settings.rate / self.what.rate

    def parts(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is gated [emotion, value], and the logits [emotion, unit]."""
        free, logits = values.split([values.shape[1] - self.what.n_units, self.what.n_units], 1)
        return free, logits * self._unit

    def kept(self, values: Tensor, share: float) -> Tensor:
        """All: gates close, nothing is dropped."""
        return torch.ones_like(values)

    def added(self, values: Tensor) -> Mapping[Site, Tensor]:
        """What is gated, with gates drawn anew."""
        free, logits = self.parts(values)
        if self._step < self.warm:
            return self.what.added(free)
        noise = torch.rand(logits.shape, generator=self.draw).to(logits)
        return self.what.added(free * self.what.by_value(sampled(logits, noise)))

    def wanted(self, step: int) -> float:
        """The share of gates that should be open at a step: all at first, falling by the same factor at every step."""
        end = max(self.warm + 1, round(self.settings.done * self.steps))
        return self.budget ** min(1.0, max(0, step - self.warm) / (end - self.warm))

    def penalty(self, values: Tensor, step: int) -> Tensor:
        """The price of the gates that are expected to be open."""
        self._step = step
        logits = self.parts(values)[1]
        if step < self.warm:
            return 0 * logits.sum()
        chances = self._by_kind(chance_open(logits))
        shares = torch.stack([part.mean(1) for part in chances], 1)
        if self.price is None:
            self.price = self._first_price(values)
        else:
            self.price = self.price * (shares.detach() / self.wanted(step)).pow(self.settings.pressure)
        return torch.stack([(self.price[:, kind, None] * part).sum() for kind, part in enumerate(chances)]).sum()

    def _by_kind(self, units: Tensor) -> list[Tensor]:
        """Heads and neurons [emotion, unit], a kind that the circuit may not have left out."""
        return [part for part in units.split([self.what.n_heads, units.shape[1] - self.what.n_heads], 1) if part.shape[1]]

    def see(self, values: Tensor, gradient: Tensor) -> None:
        """What closing a gate would change, while nothing is gated yet: the scale that a price has to have."""
        if self._step < self.warm:
            change = self.what.by_unit(self.parts(values * gradient)[0]).abs()
            self._felt = change if self._felt is None else self._felt + (change - self._felt) / (self._step + 1)

    def _first_price(self, values: Tensor) -> Tensor:
        if self._felt is None:
            return torch.ones(len(values), len(self._by_kind(self.parts(values)[1])), device=values.device)
        return torch.stack([part.mean(1) for part in self._by_kind(self._felt)], 1)


def learn_gates(
    model: Model,
    what: UnitOutputs,
    groups: Sequence[Group],
    bank: Bank,
    emotions: Sequence[str],
    instruction: str,
    settings: GainSettings,
    budget: float,
    gates: GateSettings | None = None,
) -> UnitScores:
    """The logit of every unit's gate, learned towards a budget; what is learned of the units beside is dropped.

    Args:
        settings: `steps` of them; budget: share of the heads, and of the neurons, of every emotion.

    Raises:
        DataError: as `learning.learn`.
    """
    gated = Gated(what, budget, settings.steps, gates or GateSettings(), torch.Generator().manual_seed(torch_seed(settings.seed)))
    schedule = Schedule(settings.steps, {}, (settings.steps,))
    found = learn(model, gated, groups, bank, emotions, instruction, settings, schedule=schedule, choice=gated, penalty=gated.penalty)
    return what.table(gated.parts(found.values.to(what.heads.first))[1])
