"""Measures against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from emosteer.probing.measures import calibration_error, confusion, difference, macro_f1, measured, share


def test_the_interval_of_a_share_counts_groups_and_not_texts() -> None:
    hits = [1.0, 0.0, 1.0, 1.0]
    alone = share(hits, ["a", "b", "c", "d"])
    error = math.sqrt((3 * 0.25**2 + 0.75**2) * 4 / 3) / 4
    assert alone == {"value": 0.75, "low": pytest.approx(0.75 - 1.96 * error, abs=1e-6), "high": 1.0}
    doubled = share(hits * 2, ["a", "b", "c", "d"] * 2)
    assert doubled["low"] == pytest.approx(alone["low"]), "the same texts twice are no more evidence"
    assert share([1.0] * 10, list("abcdefghij")) == {"value": 1.0, "low": 0.7, "high": 1.0}
    assert share([1.0, 0.0], ["a", "a"]) == {"value": 0.5, "low": 0.0, "high": 1.0}, "one group tells nothing of others"
    assert share([0.0] * 100, list(map(str, range(100)))) == {"value": 0.0, "low": 0.0, "high": 0.03}


def test_groups_that_all_have_the_same_mean_are_no_proof_of_certainty() -> None:
    assert share([1, 0, 1, 0, 1, 0], list("aabbcc")) == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert share([1, 0] * 100, [str(n // 2) for n in range(200)]) == {"value": 0.5, "low": 0.47, "high": 0.53}


def test_a_paired_difference_is_zero_for_equals_and_signed_otherwise() -> None:
    groups = list("abcd")
    assert difference([1, 0, 1, 0], [1, 0, 1, 0], groups)["value"] == 0
    found = difference([0, 0, 0, 1], [1, 1, 0, 1], groups)
    assert found["value"] == -0.5 and -1 <= found["low"] < -0.5 < found["high"]


def test_confusion_f1_and_calibration() -> None:
    labels, read = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0])
    counts = confusion(read, labels, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert macro_f1(counts) == pytest.approx((0.5 + 0.8 + 0) / 3, abs=1e-6)
    shares = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.35, 0.65]])
    assert calibration_error(shares, torch.tensor([0, 0, 1, 0])) == pytest.approx((2 * 0.05 + 2 * 0.15) / 4, abs=1e-6)
    sure = torch.eye(2)[[0, 1, 0, 1]]
    told = measured(sure, torch.tensor([0, 1, 0, 1]), list("abcd"))
    assert told["accuracy"]["value"] == told["f1"] == 1 and told["calibration"] == told["loss"] == 0
