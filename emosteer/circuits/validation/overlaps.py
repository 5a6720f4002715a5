"""How much the circuits of two emotions overlap, against what chance gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def common_by_chance(first: Tensor, second: Tensor) -> Tensor:
    """Distribution of the number of common heads of two sets drawn at random, each with as many heads in every layer as it has: the sum of
    one hypergeometric variable per layer, exactly.

    Args:
        first, second: [layer, head], bool.

    Returns:
        [number], probabilities of 0, 1, ... common heads.
    """
    whole = torch.ones(1, dtype=torch.float64)
    size = first.shape[1]
    for a, b in zip(first.sum(1).tolist(), second.sum(1).tolist(), strict=True):
        ways = [math.comb(a, k) * math.comb(size - a, b - k) if b - k <= size - a else 0 for k in range(min(a, b) + 1)]
        layer = torch.tensor(ways, dtype=torch.float64) / math.comb(size, b)
        whole = _convolved(whole, layer)
    return whole


def _convolved(first: Tensor, second: Tensor) -> Tensor:
    out = torch.zeros(len(first) + len(second) - 1, dtype=torch.float64)
    for shift, weight in enumerate(second.tolist()):
        out[shift : shift + len(first)] += weight * first
    return out


def overlap_of(first: Tensor, second: Tensor) -> dict[str, float]:
    """common: heads in both sets; expected: by chance, within layers; p: of as many or more by chance; jaccard: common of all in either."""
    chance = common_by_chance(first, second)
    common, either = int((first & second).sum()), int((first | second).sum())
    expected = float((chance * torch.arange(len(chance))).sum())
    return {"common": common, "expected": expected, "p": min(1.0, float(chance[common:].sum())), "jaccard": common / max(1, either)}


def overlaps(sets: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One row for every pair of emotions. sets: emotion -> heads [layer, head]."""
    names = list(sets)
    pairs = [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
    return [{"first": a, "second": b, **overlap_of(sets[a], sets[b])} for a, b in pairs]


def shared_by_chance(sets: Sequence[Tensor], least: int) -> float:
    """How many heads at least `least` of the sets share by chance, each drawn at random within layers.

    Args:
        sets: of heads [layer, head].
    """
    total = 0.0
    for layer in range(sets[0].shape[0]):
        numbers = torch.ones(1, dtype=torch.float64)  # of the sets that hold one head of the layer
        for heads in sets:
            share = heads[layer].double().mean().item()
            numbers = _convolved(numbers, torch.tensor([1 - share, share], dtype=torch.float64))
        total += sets[0].shape[1] * float(numbers[least:].sum())
    return total
