"""What is made of the figures of trials: the verdict, p-values and denominators, on made-up figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from emosteer.circuits.validation.findings import ALL, findings
from emosteer.circuits.validation.intervals import Resampled, chance, effect_size
from emosteer.circuits.validation.settings import RESAMPLE
from emosteer.circuits.validation.trials import (
    ABLATE,
    HALVES,
    KEEP,
    NEUTRAL_ASKED,
    NOTHING,
    OTHER_HALF,
    OWN,
    SAME_HALF,
    WHOLE,
    Sets,
    Trial,
)
from emosteer.circuits.validation.unit_sets import UnitSet, taken

EMOTIONS = ("anger", "fear", "sadness", "surprise", "disgust")
N = 4


def units(*heads: tuple[int, int]) -> UnitSet:
    mask = torch.zeros(2, 4, dtype=torch.bool)
    for layer, head in heads:
        mask[layer, head] = True
    return UnitSet(mask, torch.zeros(2, 0, dtype=torch.bool))


def sets_of(**more: UnitSet) -> list[Sets]:
    own = {WHOLE: units((0, 0), (1, 1)), "5%": units((0, 0)), **more}
    return [Sets(emotion, own, torch.arange(8.0).view(2, 4), 0) for emotion in EMOTIONS]


def values_of(drops: Mapping[str, tuple[float, float]], size: str = WHOLE, how: str = "tone") -> dict[Trial, Tensor]:
    """Trials in which asking brings 1: the circuit takes the first figure of it, random sets the second, other emotions lose nothing."""
    found = dict[Trial, Tensor]()
    for emotion, (own, random) in drops.items():
        trial = Trial(emotion, emotion, how, size, OWN, ABLATE, RESAMPLE)
        found[Trial(emotion, emotion, how)] = torch.ones(2, N)
        found[Trial(emotion, emotion, how, who=NEUTRAL_ASKED)] = torch.full((2, N), 0.5)
        found[replace(trial, size=WHOLE, who=NOTHING, action=KEEP)] = torch.zeros(2, N)
        found[trial] = torch.full((2, N), 1 - own)
        for index in range(3):
            found[replace(trial, who=f"random:{index}")] = torch.full((2, N), 1 - random)
        for other in (other for other in EMOTIONS if other != emotion):
            found[Trial(emotion, other, how)] = found[replace(trial, asked=other)] = torch.ones(2, N)
    return found


def claim(drops: Mapping[str, tuple[float, float]], size: str = WHOLE) -> dict[str, Any]:
    """The verdict on the margin."""
    tables = findings(values_of(drops, size), sets_of(), [0] * N, 0)
    return next(row for row in tables["claims"] if row["figure"] == "margin")


@pytest.mark.parametrize("random", [-0.02, 0.0, 0.1])
def test_a_circuit_beside_random_sets_that_take_nothing_takes_more_than_three_times_as_much(random: float) -> None:
    drops = dict.fromkeys(EMOTIONS, (0.5, random))
    found = claim(drops)
    assert found["larger"] == list(EMOTIONS) and found["holds"]
    rows = [row for row in findings(values_of(drops), sets_of(), [0] * N, 0)["necessary"] if row["figure"] == "margin"]
    assert {row["emotion"] for row in rows} == {*EMOTIONS, ALL}
    for row in rows:  # "-25 times as much" says nothing
        assert row["ratio"] == pytest.approx(5.0) if random > 0 else "ratio" not in row


@pytest.mark.parametrize(("own", "random"), [(0.5, 0.2), (0.0, -0.02), (-0.1, -0.2)])
def test_a_circuit_that_takes_little_or_nothing_does_not(own: float, random: float) -> None:
    found = claim(dict.fromkeys(EMOTIONS, (own, random)))
    assert not found["larger"] and not found["holds"]


def test_the_verdict_asks_for_four_emotions_of_the_circuit_and_not_of_those_that_a_size_has() -> None:
    """Where circuits are of different sizes, few emotions have a share of the heads that is less than the whole."""
    assert not claim({"anger": (0.5, 0.1)}, "5%")["holds"]
    assert not claim(dict.fromkeys(EMOTIONS[:3], (0.5, 0.1)), "5%")["holds"]
    assert claim(dict.fromkeys(EMOTIONS[:4], (0.5, 0.1)), "5%")["holds"]


def test_shares_are_of_the_same_whole_however_the_emotion_is_asked_for() -> None:
    """And where what is left if nothing of the emotion were was not tried, nothing else stands in for it."""
    values = {**values_of({"anger": (0.5, 0.1)}), **values_of({"anger": (0.5, 0.1)}, how="system")}
    rows = findings(values, sets_of(), [0] * N, 0)["necessary"]
    assert {row["elicitation"]: row["share"][0] for row in rows} == pytest.approx({"tone": 0.5, "system": 0.5})
    del values[Trial("anger", "anger", "system", WHOLE, NOTHING, KEEP, RESAMPLE)]
    with pytest.raises(KeyError):
        findings(values, sets_of(), [0] * N, 0)


def test_what_the_rankings_of_halves_take_is_the_mean_over_the_prompts_of_each() -> None:
    """Heads of sizes 1 and 2 by one half, of 5 and 6 by the other; three prompts in four are of the first."""
    halves = dict(zip(HALVES, (units((0, 1), (0, 2)), units((1, 1), (1, 2))), strict=True))
    sets = sets_of(**halves)
    random = [sum(taken(sets[0].of(half, f"random:{i}"), sets[0].removed) for i in range(3)) / 3 for half in HALVES]
    assert random[0] != pytest.approx(random[1])
    for size, first, second in ((SAME_HALF, 3, 1), (OTHER_HALF, 1, 3)):
        (row, _) = findings(values_of({"anger": (0.5, 0.1)}, size), sets, [0, 0, 1, 0], 0)["necessary"]
        assert row["taken"] == pytest.approx((first * 5**0.5 + second * 61**0.5) / 4)
        assert row["random_taken"] == pytest.approx((first * random[0] + second * random[1]) / 4)


def test_equal_figures_are_ties_whatever_rounding_makes_of_them() -> None:
    """A circuit's mean and those of random sets are added up in different ways; sets that do exactly the same are no rarer than it."""
    for seed in range(50):
        n = 2 + seed % 9
        figures = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 3
        own, sets = Resampled.of(n).means(figures)[0].item(), figures.expand(20, -1).mean(1)
        assert chance(own, sets) == 1.0 and effect_size(own, sets) == 0.0
    assert chance(1.0, torch.full((20,), 0.999)) == pytest.approx(1 / 21)
    assert chance(100.0, torch.full((20,), 99.9)) == pytest.approx(1 / 21)
