"""How a circuit is put together: settings, presets and rankings. No torch, so that the command line can show the defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emosteer.base.errors import UsageError, suggest

PRESETS = ("auto", "paper")
#: What gradients are taken in.
READ_IN = ("auto", "bfloat16", "float32")
#: What is learned of every head: its whole output, or one number that scales its contrast.
LEARNED = ("outputs", "gains")
#: How the units of a circuit with a budget are chosen, and which kinds of units it may have.
SELECTIONS = ("gradual", "gates", "contrast", "patch", "integrated")
UNITS = ("both", "heads", "neurons")
#: Steps that learning may take; a hundred are usual.
MAX_STEPS = 10_000
RANKINGS = ("contrast", "raw", "effect")


@dataclass(frozen=True)
class CircuitSettings:
    """How a circuit is put together.

    ranking: contrast (mean contrastive contribution at the unit's own layer), raw (the paper's form), effect (first-order effect of
    injecting the unit's contrast on the final score). head_share, neuron_share: of all units; None lets the preset decide.
    share: what `auto` must keep of the whole-model effect. spare_names: take the direct effect on the emotion's own name out of what
    the circuit adds (see `name_sparing.py`). n_prompts: emotion-free prompts that effects are measured on.
    """

    preset: str = "auto"
    ranking: str = "contrast"
    head_share: float | None = None
    neuron_share: float | None = None
    share: float = 0.95
    spare_names: bool = True
    n_prompts: int = 6
    n_random: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("preset", self.preset, PRESETS), ("ranking", self.ranking, RANKINGS)):
            if value not in known:
                raise UsageError(f"unknown {name} '{value}'{suggest(value, known)}; expected {', '.join(known)}")
        for name, number in (("--heads", self.head_share), ("--neurons", self.neuron_share), ("--share", self.share)):
            if number is not None and not 0 <= number <= 1:
                raise UsageError(f"{name} must be a share between 0 and 1, found {number}")


@dataclass(frozen=True)
class GainSettings:
    """What is learned of the circuit's heads, and how.

    learn: "outputs", d_head numbers per head and emotion (`circuits.head_outputs`), or "gains", one (`circuits.gains`). steps: of Adam,
    each on `groups` scenario-events. start: every gain at first; rate: Adam's, in units of strength. output_start: how often an output is
    the head's contrast at first; output_rate: Adam's for every coordinate, in units of that contrast. preference: weight of telling
    replies apart against making the wanted one likely; content: weight of keeping to the prompt, 0 leaves it out; sharpness: of both, per
    nat; others: replies to the same prompt that each step compares with, the neutral one among them where the bank has it. keep: share of
    heads left after half of the steps, unless there is a budget. budget: share of the heads, and of the neurons, that the circuit may have,
    each with an output of its own (`circuits.unit_outputs`); None keeps heads alone, by `keep`. units: of which kinds; select: by what they
    are chosen (`circuits.selection`); neuron_rate: Adam's for every neuron, in units of its contrast. dtype: what a float32 model is read
    in meanwhile: "bfloat16" (a copy; half the time where the processor has units for it), "float32" (no copy), or "auto", the faster of the
    two as measured (`circuits.precision`).
    """

    steps: int = 100
    groups: int = 2
    rate: float = 0.3
    start: float = 2.0
    output_rate: float = 0.4
    output_start: float = 1.0
    preference: float = 3.0
    content: float = 0.0
    sharpness: float = 3.0
    others: int = 2
    keep: float = 0.5
    seed: int = 0
    dtype: str = "auto"
    learn: str = "outputs"
    budget: float | None = None
    units: str = "both"
    select: str = "gradual"
    neuron_rate: float = 0.4

    def __post_init__(self) -> None:
        named = (("learn", self.learn, LEARNED), ("select", self.select, SELECTIONS), ("units", self.units, UNITS))
        for name, value, known in named:
            if value not in known:
                raise UsageError(f"unknown --{name} '{value}'{suggest(value, known)}; expected {', '.join(known)}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise UsageError(f"expected --budget to be a share of the units above 0 and up to 1, found {self.budget}")
        if self.budget is not None and self.learn != "outputs":
            raise UsageError(f"with --budget the units' outputs are learned, found --learn {self.learn}; leave one of the two out")
        if not 0 <= self.content < math.inf:
            raise UsageError(f"expected --content to be a number of at least 0, found {self.content}")
        for rate in (self.output_rate, self.neuron_rate):
            if not 0 < rate < math.inf:
                raise UsageError(f"expected a rate above 0, found {rate}")
        if self.dtype not in READ_IN:
            raise UsageError(f"unknown dtype '{self.dtype}'{suggest(self.dtype, READ_IN)}; expected {', '.join(READ_IN)}")
        if not 0 <= self.steps <= MAX_STEPS or not 0 < self.keep <= 1:
            raise UsageError(
                f"expected --gain-steps from 0 to {MAX_STEPS} and --keep above 0 and up to 1, found {self.steps} and {self.keep}"
            )


@dataclass(frozen=True)
class VectorSettings:
    """What learned residual vectors have of their own; everything else is `GainSettings`.

    rate: how far one step of Adam moves a vector, about, in units of strength (rms). With this one the margin between the wanted and
    the other emotions' replies rises about as fast as under gains (docs/CIRCUITS.md).
    """

    rate: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise UsageError(f"expected a rate above 0, found {self.rate}")


def learned_of(metrics: Mapping[str, Any]) -> str | None:
    """What was learned of a circuit's heads, "outputs" or "gains", by its metrics; None where nothing was. Circuits from before outputs
    could be learned do not say."""
    return str(metrics["gains"].get("learn", "gains")) if "gains" in metrics else None
