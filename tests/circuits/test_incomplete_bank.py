"""Learning from prompts that lack replies: every emotion is told from every other one alike, whatever is missing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from emosteer.base.errors import DataError
from emosteer.circuits import learning
from emosteer.circuits.learning import MOST_WEIGHT, Compared, Comparisons
from emosteer.circuits.settings import GainSettings
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import NEUTRAL, Bank, Group, GroupKey
from tests.circuits.test_gains import BANK, EMOTIONS, GROUPS, INSTRUCTION
from tests.circuits.test_learned_residual import free, made_directions

NAMES = ("anger", "sadness", "fear", "surprise")
SETTINGS = GainSettings(steps=4, groups=2, others=2, content=0.5, dtype="float32")


def made(count: int, gone: dict[int, tuple[str, ...]], neutral: bool = False) -> tuple[list[Group], Bank]:
    """Prompts of a cycle as long as `gone`, each of which lacks the emotions that stand there."""
    groups = [Group(GroupKey(f"p{number}", ""), "t", "why was it late") for number in range(count)]
    names = (*NAMES, NEUTRAL) if neutral else NAMES
    return groups, {
        group.key: {name: f"{name} {number}" for name in names if name not in gone[number % len(gone)]}
        for number, group in enumerate(groups)
    }


@pytest.mark.parametrize("neutral", [False, True])
@pytest.mark.parametrize("others", [2, 4])
def test_comparisons_weigh_the_same_for_all_whatever_is_missing(neutral: bool, others: int) -> None:
    """Drawn two thousand times: the weight with which an emotion is told from another, per prompt that it has a reply to."""
    groups, bank = made(8, {0: (), 1: ("fear",), 2: ("surprise", "fear"), 3: ("anger",)}, neutral)
    data, draw, settings = Comparisons.of(groups, bank, NAMES), random.Random(0), replace(SETTINGS, others=others, content=0.0)
    told, from_neutral, drawn = torch.zeros(4, 4), torch.zeros(4), torch.zeros(4)
    for _ in range(250):
        for group in groups:
            compared = Compared.draw(group, data, settings, draw)
            held, weights = compared.held or tuple(range(4)), compared.weights
            assert weights is not None and weights.shape == (len(compared.shifts) + len(compared.neutral), len(held))
            assert [*compared.wanted] == [bank[group.key][NAMES[e]] for e in held]
            for place, e in enumerate(held):
                drawn[e] += 1
                for row, shift in enumerate(compared.shifts):
                    told[e, held[(place + shift) % len(held)]] += weights[row, place] / len(weights)
                if neutral:
                    from_neutral[e] += weights[-1, place] / len(weights)
    full = min(others - neutral, 3)
    share = told / drawn[:, None]
    expected = torch.full((4, 4), full / (full + neutral) / 3).fill_diagonal_(0)
    torch.testing.assert_close(share, expected, rtol=0.09, atol=0)
    torch.testing.assert_close(from_neutral / drawn, torch.full((4,), neutral / (full + neutral)), rtol=1e-5, atol=1e-6)


def test_a_seldom_comparison_is_bounded_and_one_that_is_never_made_left_out() -> None:
    groups, bank = made(20, {number: (("fear",) if number else ("surprise",)) for number in range(20)})
    data = Comparisons.of(groups, bank, NAMES)
    assert data.weights[0, 2] == MOST_WEIGHT and data.weights[2, 3] == 0 and data.weights[0, 1] < 1
    assert data.incomplete == 20 and data.replies == {"anger": 20, "sadness": 20, "fear": 1, "surprise": 19}


def test_complete_prompts_are_drawn_as_ever() -> None:
    """No weights, and the same numbers from the seed: shifts first, then one other prompt for all emotions."""
    data = Comparisons.of(GROUPS, BANK, EMOTIONS)
    assert torch.equal(data.weights, torch.ones(3, 3).fill_diagonal_(0)) and not data.incomplete
    draw, again = random.Random(3), random.Random(3)
    for group in GROUPS:
        compared = Compared.draw(group, data, SETTINGS, draw)
        shifts = again.sample(range(1, 3), 2)
        other = again.choice([one for one in GROUPS if one is not group])
        expected = [[BANK[key][emotion] for emotion in EMOTIONS] for key in (group.key, other.key)]
        assert compared == Compared(group, expected[0], shifts, [], expected[1])


def test_what_a_prompt_lacks_is_not_learned_from_it(tiny: Model) -> None:
    """The loss of two emotions' replies is that of a circuit that knows these two alone, and the third one gets no slope."""
    what, group = free(tiny, made_directions(tiny)), GROUPS[1]
    values = what.start().requires_grad_()
    texts = [BANK[group.key][EMOTIONS[e]] for e in (0, 2)]
    compared = Compared(group, texts, (1,), (), texts[::-1], (0, 2), torch.tensor([[2.0, 0.5]]))
    lost, figures = learning.loss(tiny, compared, what.added(values), INSTRUCTION, SETTINGS)
    (slope,) = torch.autograd.grad(lost, values)
    assert slope[[0, 2]].flatten(1).any(1).all() and not slope[1].any()
    added = {site: value[[0, 2]] for site, value in what.added(values).items()}
    bare = Compared(group, texts, (1,), (), texts[::-1])
    alone, expected = learning.loss(tiny, bare, added, INSTRUCTION, SETTINGS)
    torch.testing.assert_close(figures, expected)
    costs = learning.reply_costs(tiny, group, texts, (1,), added, INSTRUCTION)
    preference = torch.nn.functional.softplus(SETTINGS.sharpness * (costs[0] - costs[1]))
    torch.testing.assert_close(lost - alone, SETTINGS.preference * (preference * torch.tensor([1.0, -0.5])).sum(), rtol=1e-3, atol=1e-3)


def test_another_prompt_s_reply_is_found_for_every_emotion() -> None:
    groups, bank = made(6, {0: ("fear",), 1: ("anger",)})
    data, draw = Comparisons.of(groups, bank, NAMES), random.Random(0)
    for group in groups * 5:
        compared = Compared.draw(group, data, SETTINGS, draw)
        assert [text.split()[0] for text in compared.elsewhere] == [NAMES[e] for e in compared.held]
        assert not set(compared.elsewhere) & set(bank[group.key].values())
    lone, sparse = made(4, {0: ("fear",), 1: ("fear",), 2: ("fear",), 3: ()})
    assert Compared.draw(lone[3], Comparisons.of(lone, sparse, NAMES), SETTINGS, draw).elsewhere == [], "fear is nowhere else"


def test_an_emotion_without_replies_is_refused_by_name() -> None:
    groups, bank = made(4, {0: ("fear",)})
    with pytest.raises(DataError, match="no scenario-event has bank replies in fear and in another emotion to learn from; give --replies"):
        Comparisons.of(groups, bank, NAMES)
