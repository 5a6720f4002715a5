"""What the contest is held with. No torch, so that the command line can show the defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from emosteer.base.errors import UsageError, suggest
from emosteer.circuits.methods import CONTEST, NONE, source_of


@dataclass(frozen=True)
class Budget:
    """What a method's settings must keep to, all emotions together. ratio: perplexity against the unsteered replies; names: share of
    replies that name the emotion; sound: share of sound replies. each_sound: the share no single emotion may fall below; looser, since
    one emotion has few replies. Soundness is never asked to be above that of the unsteered replies, and is there to stop text that breaks
    altogether: strict readers, by whom the check is set, find sense in 21 to 30 % of the shipped circuit's greedy replies, and *good*
    counts it anyway. So does the ratio: an angry or a startled reply is less predictable than an assistant's courtesies, and good replies
    decide below the bound."""

    ratio: float = 1.75
    names: float = 0.02
    sound: float = 0.15
    each_sound: float = 0.0


#: Strengths that may be tried for each method, and the largest, in default strengths.
MAX_DOSES, MAX_DOSE = 100, 100.0


@dataclass(frozen=True)
class EvaluationSettings:
    """methods: who takes part; doses: strengths tried on the development split, as multiples of the method's default; control_groups:
    development scenario-events that random controls write to at every dose (for the frontier only)."""

    methods: tuple[str, ...] = CONTEST
    doses: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
    control_groups: int = 8
    budget: Budget = field(default_factory=Budget)
    seed: int = 0

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in CONTEST:
                raise UsageError(f"unknown method '{method}'{suggest(method, CONTEST)}; expected {', '.join(CONTEST)}")
            if (source := source_of(method)) not in self.methods:
                raise UsageError(f"{method} takes the strengths of {source}; add {source} to --methods")
        if NONE not in self.methods:
            raise UsageError(f"every ratio refers to the unsteered replies; add {NONE} to --methods")
        if not self.doses or not all(0 < dose < math.inf for dose in self.doses):
            raise UsageError("expected --doses to be numbers above 0")
        if len(self.doses) > MAX_DOSES or max(self.doses) > MAX_DOSE:
            raise UsageError(
                f"expected at most {MAX_DOSES} --doses of at most {MAX_DOSE:g}, found {len(self.doses)} up to {max(self.doses):g}"
            )
        if not self.budget.ratio > 0:
            raise UsageError(f"expected --budget above 0, found {self.budget.ratio}")
