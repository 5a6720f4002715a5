"""The intensity dial: judged intensity measured over strength, made monotone and turned round. Plain numbers, no torch here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from emosteer.base.errors import UsageError

#: The dead zone at weak strengths gets at most this share of the dial.
DEAD_ZONE = 0.05
#: The last share of the whole rise counts as reached: where a judge is as good as sure, more strength only spoils the text.
SATURATED = 0.02
#: A negative intensity takes the strength of this share of it, with the sign turned: on prompts that ask for the emotion half of the dial
#: takes it away, and more of it spoils the text (docs/SERVING.md).
LESS = 0.5
#: The intensities of a mixture add up: 50 and 50 are read, and spoil the text, like one of 100 (docs/SERVING.md), so that their sum has
#: the dial's end, too.
MOST_TOGETHER = 100.0

#: The largest strength, either way, that can be asked for or stored; text breaks far below.
MAX_STRENGTH = 1000.0


def check_intensity(value: float, name: str = "--intensity", *, signed: bool = False) -> float:
    """Refuses what is no intensity.

    Args:
        signed: whether it may be negative, which asks for less of an emotion.

    Raises:
        UsageError: unless it lies between 0, or -100 where it is signed, and 100.
    """
    least = -100 if signed else 0
    if not least <= value <= 100:
        raise UsageError(f"expected {name} between {least} and 100, found {value:g}")
    return value


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to the values in weighted least squares (pool adjacent violators).

    Args:
        weights: positive, one per value.
    """
    blocks: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            mean, heavy, length = blocks.pop()
            last = blocks[-1]
            last[0] = (last[0] * last[1] + mean * heavy) / (last[1] + heavy)
            last[1] += heavy
            last[2] += length
    return [mean for mean, _, length in blocks for _ in range(int(length))]


def flattened(fitted: Sequence[float]) -> list[float]:
    """A rising curve cut off at `SATURATED` below its whole rise, so that its end is where hardly anything is left to gain."""
    bound = fitted[-1] - SATURATED * (fitted[-1] - fitted[0])
    return [min(value, bound) for value in fitted]


def dial(strengths: Sequence[float], fitted: Sequence[float]) -> tuple[list[float], list[float]]:
    """The dial as a strictly increasing broken line: shares of the rise (0 to 1) and the strengths that reach them.

    One point per block of equal fitted values, at its centre, so that noise does not make steps. The last block counts from where it
    begins: stronger than that gains nothing. The first begins at strength 0; where it is longer (weak steering does nothing yet), its
    end is a second point just above it, so that the dial is not spent on strengths without effect. A curve that never rises gives a
    straight line.

    Args:
        strengths: rising, 0 first; fitted: what `isotonic` gave for them.
    """
    blocks = [(value, [strength for strength, _ in run]) for value, run in groupby(zip(strengths, fitted, strict=True), lambda p: p[1])]
    low, high = blocks[0][0], blocks[-1][0]
    if len(blocks) == 1:
        return [0.0, 1.0], [strengths[0], strengths[-1]]
    shares, at = [0.0], [blocks[0][1][0]]
    if len(blocks[0][1]) > 1:
        shares.append(min(DEAD_ZONE, (blocks[1][0] - low) / (high - low) / 2))
        at.append(blocks[0][1][-1])
    for value, members in blocks[1:-1]:
        shares.append((value - low) / (high - low))
        at.append(sum(members) / len(members))
    return [*shares, 1.0], [*at, blocks[-1][1][0]]


def strength_for(strengths: Sequence[float], fitted: Sequence[float], intensity: float) -> float:
    """The strength at which the fitted judged intensity has risen by `intensity` per cent of its whole rise. 0 gives strength 0.

    Raises:
        UsageError: for an intensity outside 0 to 100.
    """
    share = check_intensity(intensity) / 100
    shares, at = dial(strengths, fitted)
    for left, right, start, end in zip(shares, shares[1:], at, at[1:], strict=False):
        if share <= right:
            return start + (end - start) * (share - left) / (right - left)
    return at[-1]
