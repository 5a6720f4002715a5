"""Groups that lack emotions: contrasts are what they would be if nothing were missing, and complete data give the same bits as ever."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from emosteer.base.artifacts import Provenance
from emosteer.base.errors import DegenerateDirection
from emosteer.directions.activations import Sample
from emosteer.directions.contrast import HALVES, HELDOUT, SHUFFLED, Contrasts, Plan, make_plan, unlinked
from emosteer.directions.directions import Directions, from_contrasts
from emosteer.models.sites import MLP_POST, Z
from emosteer.scenarios.scenarios import VALENCES, GroupKey
from tests.directions.test_contrast import all_sites

N, D, EVERY = 5, 8, (*HALVES, HELDOUT)
NAMES = tuple(f"e{number}" for number in range(N))


def keys(scenarios: int) -> list[GroupKey]:
    return [GroupKey(f"s{number}", valence) for number in range(scenarios) for valence in VALENCES]


def plan_of(scenarios: int, holdout: float = 0.2) -> Plan:
    return make_plan([(f"s{number}", "t") for number in range(scenarios)], NAMES, holdout, seed=0)


def streamed(plan: Plan, groups: dict[GroupKey, dict[int, Tensor]], order: list[GroupKey] | None = None) -> Contrasts:
    """Contrasts of a one-layer model whose every site holds the states that are given, group by group, held-out ones last."""
    found = Contrasts(plan, 1, D, D, D)
    for key in sorted(order or groups, key=lambda key: key.scenario in plan.heldout):
        held = groups[key]
        numbers = tuple(held) if len(held) < N else ()
        sample = Sample(key, "t", ((1,),) * len(held), ((),) * len(held), numbers)
        found.update([sample], {site: torch.stack(list(held.values()))[None] for site in all_sites(1)})
    return found


def directions(contrasts: Contrasts) -> Directions:
    return from_contrasts(contrasts, elicitation="reply", instruction="", dropped={}, provenance=Provenance("", "", "", ""), incomplete=1)


def world(scenarios: int, noise: float, seed: int = 0) -> tuple[Tensor, dict[GroupKey, dict[int, Tensor]]]:
    """A known answer: the group's own part, three times as large as the emotions' contrasts, which sum to zero, and noise. Which replies
    are missing depends on the emotion, the valence and the group's own part."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randn(N, D, generator=draw, dtype=torch.float64)
    truth -= truth.mean(0)
    groups = {}
    for key in keys(scenarios):
        own = 3 * torch.randn(D, generator=draw, dtype=torch.float64)
        states = {e: own + truth[e] + noise * torch.randn(D, generator=draw, dtype=torch.float64) for e in range(N)}
        gone = {0, 1} if own[0] > 2 else {4} if key.valence == "positive" else {1, 2, 3} if own[1] > 3 else set()
        groups[key] = {e: state for e, state in states.items() if e not in gone}
    return truth, groups


def test_what_is_missing_does_not_show_in_the_contrasts() -> None:
    truth, groups = world(30, noise=0)
    sizes = [len(held) for held in groups.values()]
    assert {2, 3, 4, 5} >= set(sizes) >= {3, 4, 5} and sizes.count(5) < len(sizes) / 2
    plain = [{e: state - torch.stack([*held.values()]).mean(0) for e, state in held.items()} for held in groups.values()]
    naive = torch.stack([torch.stack([row[e] for row in plain if e in row]).mean(0) for e in range(N)])
    assert (naive - truth).abs().max() > 0.1, "an average of what is there would be wrong"
    found = streamed(plan_of(30), groups)
    for strata in (EVERY, HALVES, *((half,) for half in HALVES), (HELDOUT,)):
        torch.testing.assert_close(found.mean(*strata), truth[:, None].expand(-1, 2, -1), rtol=1e-10, atol=1e-10)
    owns = torch.stack([next(iter(held.values())) - truth[next(iter(held))] for held in groups.values()])
    for kind in ("resid", Z, MLP_POST):
        mean, variance, base = found.moments(kind)
        torch.testing.assert_close(mean[:, 0], truth, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(base[0], owns.mean(0), rtol=1e-10, atol=1e-10)
        assert variance.abs().max() < 1e-10, "groups that hold different emotions differ, and it is no noise"
    assert found.replies == [sum(e in held for held in groups.values()) for e in range(N)] and len(set(found.replies)) > 2
    made = directions(found)
    assert made.replies == dict(zip(NAMES, found.replies, strict=True)) and made.incomplete == 1
    assert made.evidence is not None
    assert made.evidence.accuracy.tolist() == [[1.0] * N] * 2 and made.evidence.accuracy_shuffled.mean() < 0.7
    torch.testing.assert_close(made.evidence.halves, torch.ones(N, 2), rtol=1e-6, atol=1e-6)


def test_rms_is_over_all_states_each_group_weighing_the_same() -> None:
    """The mean over groups of the mean over the states that a group holds; groups that lack emotions are three times as large here."""
    _, groups = world(30, noise=0.5)
    groups = {key: {e: (1 if len(held) == N else 3) * state for e, state in held.items()} for key, held in groups.items()}
    states = [torch.stack([*held.values()]) for held in groups.values()]
    wanted = torch.stack([own.square().mean() for own in states]).mean().sqrt()
    assert torch.cat(states).square().mean().sqrt() < 0.97 * wanted, "each state weighing the same would be something else"
    torch.testing.assert_close(directions(streamed(plan_of(30), groups)).rms, wanted.float().expand(2), rtol=1e-6, atol=0)


def test_noise_is_told_from_what_is_missing() -> None:
    """The variance is that of a complete group's contrast, (1 - 1/n) of the noise's; the mean is as near as its standard error."""
    truth, groups = world(200, noise=0.5)
    mean, variance, _ = streamed(plan_of(200), groups).moments(Z)
    assert (mean[:, 0] - truth).abs().max() < 5 * 0.5 / math.sqrt(250)
    torch.testing.assert_close(variance.mean(), torch.tensor(0.25 * (1 - 1 / N), dtype=torch.float64), rtol=0.05, atol=0)
    torch.testing.assert_close(variance.mean((1, 2)), torch.full((N,), 0.2, dtype=torch.float64), rtol=0.15, atol=0)


def test_order_and_shares_of_the_work_do_not_show() -> None:
    _, groups = world(8, noise=0.3, seed=2)
    plan, order = plan_of(8, holdout=0.0), list(groups)
    whole = streamed(plan, groups)
    random.Random(1).shuffle(order)
    other = streamed(plan, groups, order)
    parts = streamed(plan, groups, order[:11])
    parts.merge(streamed(plan, groups, order[11:]).state())
    restored = Contrasts(*whole.sizes)
    restored.restore(whole.state())
    for found in (other, parts, restored):
        for kind in ("resid", Z, MLP_POST):
            assert all(torch.equal(a, b) for a, b in zip(found.moments(kind), whole.moments(kind), strict=True))


def test_shuffled_labels_stay_among_the_emotions_that_are_there() -> None:
    plan = plan_of(4)
    orders = [plan.shuffle(Sample(key, "t", ((1,),) * 3, ((),) * 3, (0, 2, 3))) for key in keys(4)]
    assert all(sorted(order) == list(range(N)) and (order[1], order[4]) == (1, 4) for order in orders) and len(set(map(tuple, orders))) > 3
    _, groups = world(30, noise=0)
    found = streamed(plan_of(30), groups)
    for half, shuffled in zip(HALVES, SHUFFLED, strict=True):
        rows = [found.plan.strata.index(name) for name in (half, shuffled)]
        assert all(torch.equal(*found.sums[name][rows]) for name in ("count", "held", "together"))


def test_complete_groups_give_the_bits_of_a_plain_average() -> None:
    """Against contrasts by torch and sums that are rounded once, as `math.fsum` does."""
    draw = torch.Generator().manual_seed(5)
    groups = {key: dict(enumerate(torch.randn(N, D, generator=draw))) for key in keys(7)}
    plan = plan_of(7)
    found = streamed(plan, groups)
    deltas = torch.stack([torch.stack([*held.values()]).double() for held in groups.values()])
    base = deltas.mean(1)
    deltas -= base[:, None]

    def summed(rows: Tensor) -> Tensor:
        return torch.tensor(np.vectorize(math.fsum, signature="(n)->()")(rows.movedim(0, -1).numpy()))

    mean, variance, mean_base = found.moments(Z)
    assert torch.equal(mean[:, 0], summed(deltas) / 21) and torch.equal(mean_base[0], summed(base) / 21)
    assert torch.equal(variance[:, 0], (found.sums["z_sq"][:, 0] / 21 - mean[:, 0].square()).clamp_min(0))
    halves = [summed(deltas[[name in plan.strata_of(Sample(key, "t", (), ())) for key in groups]]) for name in EVERY]
    assert torch.equal(found.mean(*EVERY)[:, 0], torch.stack(halves).sum(0) / 21)


def test_emotions_that_nothing_compares_are_refused_by_name() -> None:
    pairs = {key: {e: torch.ones(D) * (e + 1) for e in ((0, 1, 2), (3, 4))[number % 2]} for number, key in enumerate(keys(6))}
    found = streamed(plan_of(6, holdout=0.0), pairs)
    assert found.apart(*EVERY) == ("e3", "e4") and found.references() == ()
    with pytest.raises(DegenerateDirection, match="no group of .* compares e3, e4 with the other emotions; more replies are needed"):
        directions(found)
    linked = {**pairs, keys(6)[0]: {e: torch.ones(D) * (e + 1) for e in (2, 3)}}
    assert streamed(plan_of(6, holdout=0.0), linked).apart(*EVERY) == ()


def test_a_chain_of_groups_links_emotions() -> None:
    together = torch.eye(5, dtype=torch.bool)
    assert unlinked(together) == [1, 2, 3, 4]
    for a, b in ((0, 3), (3, 1), (4, 2)):
        together[a, b] = together[b, a] = True
    assert unlinked(together) == [2, 4]
    together[2, 1] = together[1, 2] = True
    assert unlinked(together) == []
