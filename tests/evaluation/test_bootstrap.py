"""Bootstrap and permutation tests against brute force, enumeration and the binomial distribution."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from emosteer.evaluation.bootstrap import Draws, estimate, mean, median, paired, sign_flip_p

NAN = float("nan")


def table(n_groups: int = 7, n_items: int = 3, seed: int = 0, missing: bool = True) -> Tensor:
    """Random values; two of them missing, and one group without any."""
    values = torch.randn(n_groups, n_items, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if missing:
        values[1, 0] = values[4, 2] = NAN
        values[5] = NAN
    return values


def resampled(values: Tensor, draws: Draws) -> list[list[float]]:
    """The values of every draw, written out: each group as often as it was drawn."""
    found = []
    for counts in draws.counts.long().tolist():
        whole = [v for g, times in enumerate(counts) for _ in range(times) for v in values[g].tolist()]
        found.append([v for v in whole if not math.isnan(v)])
    return found


def test_draws_are_whole_groups_seeded_and_of_full_size() -> None:
    draws = Draws.make(5, 200, seed=3)
    assert draws.counts.shape == (201, 5)
    assert draws.counts[0].tolist() == [1.0] * 5 and (draws.counts.sum(1) == 5).all()
    assert torch.equal(draws.counts, Draws.make(5, 200, seed=3).counts)
    assert not torch.equal(draws.counts, Draws.make(5, 200, seed=4).counts)
    # a count in a draw of n out of n is binomial with mean 1 and variance 1 - 1/n
    big = Draws.make(10, 20_000).counts[1:]
    assert big.mean(0).tolist() == pytest.approx([1.0] * 10, abs=0.03)
    assert big.var(0).tolist() == pytest.approx([0.9] * 10, abs=0.05)


@pytest.mark.parametrize("missing", [False, True])
def test_mean_and_median_equal_those_of_the_resampled_values(missing: bool) -> None:
    values, draws = table(missing=missing), Draws.make(7, 150)
    wanted = resampled(values, draws)
    assert min(map(len, wanted)) > 0
    assert mean(values, draws).tolist() == pytest.approx([statistics.fmean(v) for v in wanted])
    assert median(values, draws).tolist() == pytest.approx([statistics.median(v) for v in wanted])


def test_draws_of_some_groups_are_the_same_draws() -> None:
    values, draws = table(missing=False), Draws.make(7, 300)
    lines = [0, 2, 6]
    wanted = resampled(torch.where(torch.tensor([g in lines for g in range(7)])[:, None], values, NAN), draws)
    there = [i for i, v in enumerate(wanted) if v]
    assert len(there) < len(wanted), "some draw holds none of the three"
    for statistic, by_hand in ((mean, statistics.fmean), (median, statistics.median)):
        found = statistic(values[lines], draws.of(lines))
        assert found[there].tolist() == pytest.approx([by_hand(wanted[i]) for i in there])
        assert found.isnan().sum() == len(wanted) - len(there)
        assert estimate(found)["low"] is not None, "draws without a value are left out of the interval"


def test_the_interval_is_the_percentile_interval() -> None:
    drawn = torch.arange(1, 1001, dtype=torch.float64)[torch.randperm(1000)]
    found = estimate(torch.cat([torch.tensor([7.0], dtype=torch.float64), drawn]))
    low, high = np.percentile(drawn.numpy(), [2.5, 97.5])
    assert found == {"value": 7.0, "low": pytest.approx(low), "high": pytest.approx(high)}


def test_nothing_measured_is_none() -> None:
    draws = Draws.make(3, 50)
    nothing = torch.full((3, 2), NAN)
    assert estimate(mean(nothing, draws)) == estimate(median(nothing, draws)) == {"value": None, "low": None, "high": None}


def test_the_interval_of_independent_groups_has_the_textbook_width_and_dependence_widens_it() -> None:
    """Six replies that always agree are one observation, not six: the interval must know."""
    noise = torch.Generator().manual_seed(0)
    groups = (torch.rand(200, 1, generator=noise) < 0.3).double()
    draws = Draws.make(200)

    def width(values: Tensor) -> float:
        found = estimate(mean(values, draws))
        return float(found["high"] or 0) - float(found["low"] or 0)

    p = groups.mean().item()
    assert width(groups) == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 200), rel=0.1)
    assert width(groups.expand(200, 6)) == pytest.approx(width(groups), rel=1e-6)
    shuffled = groups.expand(200, 6).reshape(-1)[torch.randperm(1200, generator=noise)].reshape(200, 6)
    assert width(shuffled) < 0.55 * width(groups)


def test_the_same_draws_pair_differences() -> None:
    """Two methods that differ by a constant have a difference without any spread, though each has plenty."""
    values, draws = table(missing=False), Draws.make(7)
    found = estimate(mean(values + 0.25, draws) - mean(values, draws))
    assert found == {"value": 0.25, "low": 0.25, "high": 0.25}
    own = estimate(mean(values, draws))
    assert float(own["high"] or 0) - float(own["low"] or 0) > 0.3


def test_pairs_are_what_both_have() -> None:
    a, b = paired(torch.tensor([[1.0, NAN], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [NAN, 8.0]]))
    assert a.nan_to_num(-1).tolist() == [[1, -1], [-1, 4]] and b.nan_to_num(-1).tolist() == [[5, -1], [-1, 8]]


# ---- tests of "no difference" ------------------------------------------------------------------------------------------


def brute_force_p(sums: list[float]) -> float:
    """The share of all sign flips that are as far from zero."""
    flips = [abs(sum(s * d for s, d in zip(signs, sums, strict=True))) for signs in itertools.product((1, -1), repeat=len(sums))]
    return sum(f >= abs(sum(sums)) - 1e-9 for f in flips) / len(flips)


@pytest.mark.parametrize("seed", range(6))
def test_whole_numbers_are_tested_exactly(seed: int) -> None:
    differences = torch.randint(-1, 2, (10, 3), generator=torch.Generator().manual_seed(seed)).double()
    differences[2, 1] = NAN
    assert sign_flip_p(differences) == pytest.approx(brute_force_p(differences.nan_to_num(0.0).sum(1).tolist()), abs=1e-12)


@pytest.mark.parametrize(("b", "c"), [(9, 2), (5, 5), (1, 0), (0, 14), (40, 22)])
def test_one_item_a_group_is_mcnemars_exact_test(b: int, c: int) -> None:
    """b and c: replies that only the one and only the other method has right; the 30 that agree do not matter."""
    differences = torch.tensor([1.0] * b + [-1.0] * c + [0.0] * 30)[:, None]
    n, k = b + c, max(b, c)
    tail = sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n
    assert sign_flip_p(differences) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_few_real_differences_are_tested_exactly(seed: int) -> None:
    differences = torch.randn(9, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3
    assert sign_flip_p(differences) == pytest.approx(brute_force_p(differences.sum(1).tolist()), abs=1e-12)


def test_many_real_differences_are_drawn_with_a_seed_and_near_the_exact_value() -> None:
    differences = torch.randn(16, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.4
    exact = brute_force_p(differences[:, 0].tolist())
    assert 0.01 < exact < 0.6
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.012)
    assert sign_flip_p(differences) == sign_flip_p(differences)
    clear = torch.rand(60, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 1.0
    assert 0 < sign_flip_p(clear) < 1e-4, "never 0: the data are one of the flips"


def test_no_difference_has_p_one_and_agreement_inside_groups_is_no_evidence() -> None:
    assert sign_flip_p(torch.zeros(5, 3)) == 1.0
    assert sign_flip_p(torch.full((4, 2), NAN)) == 1.0
    agreeing = torch.tensor([[1.0] * 6, [1.0] * 6, [-1.0] * 6])  # three observations, not eighteen
    assert sign_flip_p(agreeing) == 1.0
    assert sign_flip_p(torch.ones(2, 6)) == 0.5
    assert sign_flip_p(torch.ones(160, 6)) == pytest.approx(2.0**-159)
