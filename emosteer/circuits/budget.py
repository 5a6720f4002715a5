"""A circuit within a budget: a share of the heads, and of the neurons, chosen and learned together (docs/CIRCUITS.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from emosteer.circuits.gates import learn_gates
from emosteer.circuits.learning import Choice, Learned, learn
from emosteer.circuits.schedule import Schedule
from emosteer.circuits.selection import Ranked, Worth, ranking
from emosteer.circuits.settings import GainSettings
from emosteer.circuits.unit_outputs import UnitOutputs, unit_outputs
from emosteer.directions.directions import Directions
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import Bank, Group


def learn_within_budget(
    model: Model, directions: Directions, z_delta: Tensor, spare: bool, groups: Sequence[Group], bank: Bank, settings: GainSettings
) -> tuple[Tensor, Tensor, Learned]:
    """Fits the outputs of heads and neurons while units are dropped until the budget is met. Everything else is as for
    `head_outputs.learn_outputs`. With the selection "gates", the first half of the steps learns gates and the second the outputs.

    Args:
        z_delta: [emotion, layer, n_heads * d_head], the heads' contrasts, names already taken out if they are to be spared.

    Returns:
        What is added at strength 1, 0 for what is left out: to `z` [emotion, layer, n_heads * d_head] and to the neurons [emotion, layer,
        d_mlp]; how learning went.

    Raises:
        DataError: as `learning.learn`. UsageError: if neurons are wanted of a model that has none.
    """
    assert settings.budget is not None
    what = unit_outputs(model, z_delta, directions.mlp.mean, directions.emotions, spare, settings)
    steps = settings.steps
    if settings.select == "gates":
        steps = max(1, settings.steps // 2)
    choice = choice_of(model, what, groups, bank, directions, replace(settings, steps=settings.steps - steps or 1))
    schedule = Schedule.gradual(steps, settings.budget)
    context = (groups, bank, directions.emotions, directions.instruction, settings)
    learned = learn(model, what, *context, schedule=schedule, choice=choice)
    z, neurons = what.outputs(learned.values)
    return z, neurons, learned


def choice_of(
    model: Model, what: UnitOutputs, groups: Sequence[Group], bank: Bank, directions: Directions, settings: GainSettings
) -> Choice:
    """By which units are left when some are dropped (`settings.select`). Gates are learned for `settings.steps`, towards the budget."""
    if settings.select == "gradual":
        return Worth(what)
    if settings.select == "gates":
        budget = 1.0 if settings.budget is None else settings.budget
        found = learn_gates(model, what, groups, bank, directions.emotions, directions.instruction, settings, budget)
    else:
        found = ranking(settings.select, model, directions, what, groups, bank, settings)
    return Ranked(what, what.row(found))
