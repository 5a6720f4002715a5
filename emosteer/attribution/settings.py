"""How much `ablate` measures. No torch, so that the command line can show the defaults."""

from __future__ import annotations

from dataclasses import dataclass

ABLATIONS = ("zero", "mean", "resample")
ENHANCE = "enhance"


@dataclass(frozen=True)
class CurveSettings:
    """What is measured. shares: of the heads; neuron_shares: of the neurons; strength: of the enhancement."""

    shares: tuple[float, ...] = (0.02, 0.05, 0.1, 0.25)
    neuron_shares: tuple[float, ...] = (0.01,)
    kinds: tuple[str, ...] = (*ABLATIONS, ENHANCE)
    n_random: int = 3
    n_prompts: int = 4
    strength: float = 2.0
    max_new_tokens: int = 32
    seed: int = 0
    batch_size: int = 96


@dataclass(frozen=True)
class AblateSettings:
    """How much is measured. patch_groups: groups for attribution patching; true_groups, true_units: how many of them and how many
    units (half the best, half random) are patched for real; verify_prompts, verify_neurons: the one-pass check; 0 leaves a part out."""

    patch_groups: int = 6
    true_groups: int = 2
    true_units: int = 32
    verify_prompts: int = 1
    verify_neurons: int = 100
    effect_prompts: int = 8
    seed: int = 0
    curves: CurveSettings | None = CurveSettings()
