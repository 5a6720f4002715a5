"""How a judge of emotions does on labelled texts: accuracy, macro-F1, recall, calibration and confusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emosteer.judges.protocol import LABELS
from emosteer.judges.sources import Labelled
from emosteer.scenarios.splits import stable_share


def measure(probabilities: Tensor, answers: Tensor) -> dict[str, Any]:
    """Accuracy with neutral and six-way (on the emotional texts, neutral left out), macro-F1 over the labels that occur, recall by label,
    calibration error and the reliability curve (bins of a tenth: mean confidence, accuracy, texts).

    Args:
        probabilities: [text, label]; answers: [text], indices of `LABELS`.
    """
    guessed = probabilities.argmax(-1)
    right = (guessed == answers).float()
    emotional = answers < len(LABELS) - 1
    confusion = torch.zeros(len(LABELS), len(LABELS), dtype=torch.long)
    confusion.index_put_((answers, guessed), torch.ones_like(answers), accumulate=True)
    hits, given = confusion.diag(), confusion.sum(1)
    f1 = (2 * hits / (confusion.sum(0) + given).clamp_min(1))[given > 0]
    sure = probabilities.amax(-1)
    bins = [(sure > low / 10) & (sure <= (low + 1) / 10) for low in range(10)]
    curve = [(round(sure[b].mean().item(), 4), round(right[b].mean().item(), 4), int(b.sum())) for b in bins if b.any()]
    gap = sum(abs(confidence - accuracy) * n for confidence, accuracy, n in curve) / len(answers)
    six = (probabilities[emotional][:, :-1].argmax(-1) == answers[emotional]).float()
    return {
        "n": len(answers),
        "accuracy": round(right.mean().item(), 4),
        "accuracy_six_way": round(six.mean().item(), 4) if len(six) else None,
        "macro_f1": round(f1.mean().item(), 4),
        "recall": {label: round(hits[i].item() / given[i].item(), 4) for i, label in enumerate(LABELS) if given[i]},
        "expected_calibration_error": round(gap, 4),
        "reliability": curve,
        "confusion": {label: dict(zip(LABELS, row.tolist(), strict=True)) for label, row in zip(LABELS, confusion, strict=True)},
    }


def some_of(texts: Sequence[Labelled], most: int) -> list[Labelled]:
    """At most so many of the texts, drawn by their own hash."""
    return sorted(texts, key=lambda labelled: stable_share(f"drawn/{labelled[0]}", 0))[:most]


def measured(judge: Any, tests: Mapping[str, Sequence[Labelled]]) -> dict[str, Any]:
    """A judge on each source's held-out texts."""
    results = {}
    for name, texts in tests.items():
        answers = torch.tensor([LABELS.index(label) for _, label in texts])
        results[name] = measure(judge.probabilities([text for text, _ in texts]), answers)
    return results
