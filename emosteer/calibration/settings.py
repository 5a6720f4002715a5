"""How the default strength and the dial are found. No torch, so that the command line can show the defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emosteer.base.errors import UsageError
from emosteer.circuits.dial import check_intensity

if TYPE_CHECKING:
    from emosteer.calibration.trials import StrengthPoint

#: Prompts that `calibrate` writes to, all kinds together.
GROUPS = 48


@dataclass(frozen=True)
class TuneSettings:
    """strengths: tried in rising order; learned_strengths: those of a circuit with learned gains, never above 1, which they were learned
    at (learned outputs are not tuned); residual_strengths: the same for the comparison method; tolerance: nats per token."""

    strengths: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0)
    learned_strengths: tuple[float, ...] = (0.5, 0.75, 1.0)
    residual_strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    tolerance: float = 0.08
    n_prompts: int = 8
    max_new_tokens: int = 32
    batch_size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Guard:
    """What the replies of one emotion at a strength must hold. Unsteered replies that are worse move the bound: that is not the
    steering's fault. The check of soundness is set by strict readers, so that its bound is low: it ends a dial where hardly a reply makes
    sense. The ratio alone would end one where replies only grow loud (of 32 angry ones it was 3.3 with an error of .3 where 62 % were sound
    by a laxer check)."""

    ratio: float = 4.0
    sound: float = 0.05
    names: float = 0.1

    def __post_init__(self) -> None:
        checks = (
            (1 <= self.ratio < float("inf"), f"--each-ratio must be at least 1, found {self.ratio}"),
            (0 <= self.sound <= 1, f"--sound must lie between 0 and 1, found {self.sound}"),
            (0 <= self.names <= 1, f"--names must lie between 0 and 1, found {self.names}"),
        )
        for fine, message in checks:
            if not fine:
                raise UsageError(message)

    def faults(self, point: StrengthPoint, unsteered: StrengthPoint, slack: float = 0.0) -> list[str]:
        """What a strength does not hold: some of "ratio", "sound", "names".

        Args:
            slack: standard errors that a figure may miss its bound by; two dozen prompts leave room for chance.
        """
        sound, names = min(self.sound, unsteered.sound), max(self.names, unsteered.names)
        held = {
            "ratio": point.ratio <= self.ratio * math.exp(slack * (point.ratio_error or 0.0)),
            "sound": point.sound >= sound - slack * _share_error(sound, point),
            "names": point.names <= names + slack * _share_error(names, point),
        }
        return [name for name, holds in held.items() if not holds]


def _share_error(share: float, point: StrengthPoint) -> float:
    return math.sqrt(share * (1 - share) / len(point.judged))


#: Strengths of the grid, and halvings between two of them: more would tell apart what no judge can.
MAX_POINTS, MAX_HALVINGS = 100, 20


@dataclass(frozen=True)
class CalibrateSettings:
    """top: strongest tried, as a multiple of the circuit's default strength; points: of the grid, 0 included; refine: halvings between
    the last strength that holds and the first that does not; default_intensity: what the default strengths are set to, None for the
    strength with the most *good* replies (which takes many prompts where few replies are good); ratio: bound of the perplexity ratio at
    intensity 100, all emotions together; good_cap: whether strengths are left out beyond which good replies get fewer."""

    top: float = 2.0
    points: int = 7
    refine: int = 2
    default_intensity: float | None = 75.0
    guard: Guard = field(default_factory=Guard)
    ratio: float = 1.75
    good_cap: bool = True

    def __post_init__(self) -> None:
        if self.default_intensity is not None:
            check_intensity(self.default_intensity, "--default-intensity")
        checks = (
            (0 < self.top < float("inf"), f"--top must be above 0, found {self.top}"),
            (2 <= self.points <= MAX_POINTS, f"--points must lie between 2 and {MAX_POINTS}, found {self.points}"),
            (0 <= self.refine <= MAX_HALVINGS, f"--refine must lie between 0 and {MAX_HALVINGS}, found {self.refine}"),
            (1 <= self.ratio < float("inf"), f"--ratio must be at least 1, found {self.ratio}"),
        )
        for fine, message in checks:
            if not fine:
                raise UsageError(message)

    @property
    def rule(self) -> str:
        """The rule in words, kept with the circuit."""
        g, usual = self.guard, self.default_intensity
        worth = "strengths beyond which good replies get fewer by more than two standard errors are left out; " if self.good_cap else ""
        return (
            f"cap: the largest strength with perplexity ratio <= {g.ratio:g}, sound >= {g.sound:g} and naming <= {g.names:g} (or what "
            f"unsteered replies have, where that is worse) such that no weaker one misses a bound by more than a standard error, of "
            f"{self.points} up to {self.top:g} times the default and {self.refine} halvings; then the caps with the highest ratios are "
            f"lowered until the ratio of all emotions together is <= {self.ratio:g}; {worth}"
            "dial: isotonic regression of judged intensity, even in its rise; default: "
            f"{'the most good replies, as a mean over neighbouring strengths' if usual is None else f'intensity {usual:g}'}"
        )
