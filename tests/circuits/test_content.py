"""The objective's term that keeps replies to their prompt: against single passes by hand, its slope, and what learning with it does."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emosteer.base.errors import UsageError
from emosteer.circuits import learning
from emosteer.circuits.learned_residual import learn_residual
from emosteer.circuits.learning import Compared
from emosteer.circuits.settings import GainSettings
from emosteer.directions.directions import Directions
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import Group
from tests.attribution.test_unit_scores import double
from tests.circuits.test_gains import BANK, EMOTIONS, GROUPS, INSTRUCTION, loss_by_hand
from tests.circuits.test_learned_residual import cost_by_hand, free, made_directions

SETTINGS = GainSettings(steps=60, groups=3, others=1, preference=2.0, sharpness=1.5, content=30.0, dtype="float32")


@pytest.fixture(scope="module")
def directions(tiny: Model) -> Directions:
    return made_directions(tiny)


def replies(group: Group) -> list[str]:
    return [BANK[group.key][emotion] for emotion in EMOTIONS]


def kept_by_hand(model: Model, group: Group, other: Group, vectors: Tensor, e: int) -> float:
    """How many more nats per token than without steering another prompt's reply costs beyond the own one."""
    dearer = [
        cost_by_hand(model, group, replies(other)[e], added) - cost_by_hand(model, group, replies(group)[e], added)
        for added in (vectors[e], 0 * vectors[e])
    ]
    return dearer[0] - dearer[1]


def test_the_loss_and_its_slope_are_those_of_single_passes_by_hand() -> None:
    model = double("llama")
    what = free(model, made_directions(model))
    group, other = GROUPS[1], GROUPS[4]
    compared = Compared(group, replies(group), (1, 2), (), replies(other))

    def by_hand(values: Tensor) -> float:
        vectors, total = what.vectors(values).detach(), 0.0
        for e in range(3):
            costs = [cost_by_hand(model, group, replies(group)[(e + shift) % 3], vectors[e]) for shift in (0, 1, 2)]
            kept = torch.tensor(kept_by_hand(model, group, other, vectors, e))
            total += loss_by_hand(costs, 2.0, 1.5) + 30.0 * torch.nn.functional.softplus(-1.5 * kept).item()
        return total

    values = what.start().double().requires_grad_()
    lost, figures = learning.loss(model, compared, what.added(values), INSTRUCTION, SETTINGS)
    assert lost.item() == pytest.approx(by_hand(values), abs=1e-4)
    kept = [kept_by_hand(model, group, other, what.vectors(values).detach(), e) for e in range(3)]
    assert figures[2].item() == pytest.approx(sum(kept) / 3, abs=1e-5) and max(map(abs, kept)) > 1e-3
    lost.backward()
    assert values.grad is not None
    draw, dose = random.Random(0), 1e-3
    for _ in range(6):
        place = draw.randrange(3), draw.randrange(2), draw.randrange(32)
        sides = []
        for sign in (1, -1):
            moved = values.detach().clone()
            moved[place] += sign * dose
            sides.append(by_hand(moved))
        assert values.grad[place].item() == pytest.approx((sides[0] - sides[1]) / (2 * dose), rel=0.01, abs=2e-3)


def test_learning_with_it_keeps_the_prompt_in_what_is_written(tiny: Model, directions: Directions) -> None:
    """On all pairs of prompts, by hand: steered by what was learned with the term, the prompt matters more than by what was not."""
    found = {}
    for content in (0.0, SETTINGS.content):
        vectors, learned = learn_residual(tiny, free(tiny, directions), GROUPS, BANK, directions, replace(SETTINGS, content=content))
        pairs = [(group, GROUPS[(n + 3) % len(GROUPS)]) for n, group in enumerate(GROUPS)]
        kept = [kept_by_hand(tiny, group, other, vectors, e) for group, other in pairs for e in range(3)]
        found[content] = sum(kept) / len(kept)
        assert len(learned.kept) == (60 if content else 0) and ("kept" in learned.trace) is bool(content)
    assert found[SETTINGS.content] > max(0.0, found[0.0]) + 0.15


def test_without_it_no_other_prompt_is_drawn_or_read(tiny: Model, directions: Directions, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, calls = learning.reply_costs, 0

    def watched(*arguments: object, **named: object) -> Tensor:
        nonlocal calls
        calls += 1
        assert not arguments[-1], "no replies to another prompt"
        return usual(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(learning, "reply_costs", watched)
    learn_residual(tiny, free(tiny, directions), GROUPS, BANK, directions, replace(SETTINGS, steps=2, content=0.0))
    assert calls == 6


def test_one_prompt_alone_has_no_other_to_be_told_from(tiny: Model, directions: Directions) -> None:
    _, learned = learn_residual(tiny, free(tiny, directions), GROUPS[:1], BANK, directions, replace(SETTINGS, steps=1))
    assert learned.kept == (0.0,)


def test_a_weight_that_makes_no_sense_is_refused() -> None:
    for weight in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="--content"):
            GainSettings(content=weight)
