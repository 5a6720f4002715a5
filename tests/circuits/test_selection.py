"""What a unit is worth while a circuit is learned, by hand, and the numbers that docs/METHOD.md states of the objective."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emosteer.circuits.selection import Worth
from emosteer.circuits.settings import GainSettings
from emosteer.circuits.unit_outputs import UnitOutputs
from emosteer.models.model import Model
from tests.circuits.test_budget import N_HEADS, N_NEURONS, outputs

D_HEAD = 8
#: A head whose numbers pull against each other, and one whose numbers pull together; both of emotion 1.
TORN, AGREED = 5, 7


@pytest.fixture(scope="module")
def what(tiny: Model) -> UnitOutputs:
    return outputs(tiny)


@pytest.fixture(scope="module")
def steps() -> list[tuple[Tensor, Tensor]]:
    """Values and gradients [emotion, value] of two steps, made up, heads first."""
    draw, width = torch.Generator().manual_seed(0), N_HEADS * D_HEAD + N_NEURONS
    made = [(torch.randn(3, width, generator=draw), torch.randn(3, width, generator=draw)) for _ in range(2)]
    for values, gradient in made:
        for head, signs in ((TORN, (1.0, -1.0)), (AGREED, (1.0, 1.0))):
            own = slice(head * D_HEAD, (head + 1) * D_HEAD)
            values[1, own], gradient[1, own] = 0.0, 1.0
            values[1, own.start : own.start + 2] = torch.tensor(signs)
    return made


def test_the_worth_of_a_unit_is_the_running_mean_of_the_squared_sum_over_its_numbers(
    what: UnitOutputs, steps: list[tuple[Tensor, Tensor]]
) -> None:
    choice = Worth(what)
    wanted = [[0.0] * (N_HEADS + N_NEURONS) for _ in range(3)]
    for values, gradient in steps:
        choice.see(values, gradient)
        for e in range(3):
            for unit in range(N_HEADS + N_NEURONS):
                first = unit * D_HEAD if unit < N_HEADS else N_HEADS * D_HEAD + unit - N_HEADS
                summed = sum(float(values[e, n] * gradient[e, n]) for n in range(first, first + (D_HEAD if unit < N_HEADS else 1)))
                wanted[e][unit] = 0.9 * wanted[e][unit] + 0.1 * summed**2
    assert isinstance(choice.worth, Tensor)
    torch.testing.assert_close(choice.worth, torch.tensor(wanted), atol=1e-5, rtol=1e-4)
    assert choice.worth[1, TORN] == 0, "its numbers are taken out together: nothing would change"
    assert float(choice.worth[1, AGREED]) == pytest.approx(0.9 * 0.1 * 2**2 + 0.1 * 2**2)


def test_what_is_left_is_worth_most_and_what_was_dropped_stays_out(what: UnitOutputs, steps: list[tuple[Tensor, Tensor]]) -> None:
    choice = Worth(what)
    for values, gradient in steps:
        choice.see(values, gradient)
    assert isinstance(choice.worth, Tensor)
    values, best = steps[-1][0].clone(), int(choice.worth[0, :N_HEADS].argmax())
    values[0, best * D_HEAD : (best + 1) * D_HEAD] = 0.0
    kept = what.by_unit(choice.kept(values, 0.25))[:, :N_HEADS] > 0
    order = choice.worth[:, :N_HEADS].argsort(1, descending=True).tolist()
    assert [set(row.nonzero().flatten().tolist()) for row in kept] == [set(order[0][1:4]), set(order[1][:3]), set(order[2][:3])]


def test_the_weight_and_the_sharpness_of_the_preference_are_those_of_the_method() -> None:
    """docs/METHOD.md section 5: w = k = 3."""
    assert (GainSettings().preference, GainSettings().sharpness) == (3, 3)
