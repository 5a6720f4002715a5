"""How good predictions are: accuracy with its interval, macro-F1, calibration, confusion."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Equally wide bins of confidence that calibration is measured in.
BINS = 10
_Z = 1.96


def share(hits: Sequence[float], groups: Sequence[str], lowest: float = 0.0) -> dict[str, float]:
    """A mean as {"value", "low", "high"} with its 95 % interval. Texts of one group are not independent: the standard error is that of
    groups (Liang and Zeger 1986); where it is 0, since all groups have the same mean, or there is but one, the interval reaches
    3 / groups (the rule of three), up to 1.

    Args:
        hits: a number up to 1 per text; groups: its group; lowest: the least that a number can be.
    """
    mean = sum(hits) / len(hits)
    residuals: dict[str, float] = defaultdict(float)
    for hit, group in zip(hits, groups, strict=True):
        residuals[group] += hit - mean
    n = len(residuals)
    error = math.sqrt(sum(r * r for r in residuals.values()) * n / max(n - 1, 1)) / len(hits)
    reach = _Z * error if n > 1 and error > 1e-9 else min(3 / n, 1.0)
    return {"value": _short(mean), "low": _short(max(mean - reach, lowest)), "high": _short(min(mean + reach, 1.0))}


def difference(first: Sequence[float], second: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """What the first has more than the second, text by text: the mean with its 95 % interval."""
    return share([a - b for a, b in zip(first, second, strict=True)], groups, -1.0)


def confusion(predicted: Tensor, labels: Tensor, n_labels: int) -> Tensor:
    """How many texts of each label (rows) are read as which (columns). Shape [label, label]."""
    counts = torch.zeros(n_labels * n_labels, dtype=torch.int64)
    counts.index_add_(0, labels * n_labels + predicted, torch.ones_like(labels))
    return counts.view(n_labels, n_labels)


def macro_f1(counts: Tensor) -> float:
    """The mean over labels of 2 TP / (2 TP + FP + FN), 0 for a label that is neither there nor read.

    Args:
        counts: confusion [label, label].
    """
    hits = counts.diagonal().double()
    return _short(float((2 * hits / (counts.sum(0) + counts.sum(1)).clamp_min(1)).mean()))


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error: how far the confidence in the likeliest label is from how often it is right, averaged over bins of
    confidence by their texts (Naeini et al. 2015).

    Args:
        probabilities: [text, label]; labels: [text].
    """
    confidence, predicted = probabilities.max(-1)
    right = (predicted == labels).double()
    place = (confidence * BINS).long().clamp_max(BINS - 1)
    apart = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, confidence.double() - right)
    return _short(float(apart.abs().sum() / len(labels)))


def measured(probabilities: Tensor, labels: Tensor, groups: Sequence[str]) -> dict[str, Any]:
    """Accuracy with its interval, macro-F1, calibration error and loss of probabilities [text, label]."""
    predicted = probabilities.argmax(-1)
    counts = confusion(predicted, labels, probabilities.shape[1])
    loss = -probabilities.gather(1, labels[:, None]).clamp_min(1e-12).log().mean()
    return {
        "accuracy": share((predicted == labels).double().tolist(), groups),
        "f1": macro_f1(counts),
        "calibration": calibration_error(probabilities, labels),
        "loss": _short(float(loss)),
    }


def _short(value: float) -> float:
    return round(value, 6)
