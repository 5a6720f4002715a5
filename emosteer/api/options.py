"""What the functions take by name beside their data: the fields of the settings classes, each optional. Defaults stand in those classes.

A type checker and an editor know the names from here; tests/test_api.py holds them against the classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from emosteer.attribution.settings import CurveSettings
    from emosteer.calibration.settings import Guard
    from emosteer.circuits.arcs import Arc


class DecodingOptions(TypedDict, total=False):
    """How tokens are chosen (`Decoding`)."""

    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    penalise_prompt: bool
    seed: int
    guidance: float
    best_of: int


#: One strength or intensity for all prompts, or one per prompt.
Amount = float | Sequence[float | None] | None


class SteeringOptions(TypedDict, total=False):
    """How a model is steered (see `SteeredModel.generate`)."""

    strength: Amount
    intensity: Amount
    method: str
    positions: str


class FeelingOptions(TypedDict, total=False):
    """Mixtures, arcs, and what changes over turns (see `SteeredModel.generate`)."""

    mix: str | Mapping[str, float] | None
    arc: str | Arc | None
    arc_tokens: int | None
    fade: float | None
    personality: str | Mapping[str, float] | None
    vad: str | Sequence[float] | None


class WritingOptions(SteeringOptions, FeelingOptions, DecodingOptions, total=False):
    """How replies are written (see `SteeredModel.generate`)."""

    instruction: str
    examples: bool
    batch_size: int


class ExtractOptions(TypedDict, total=False):
    """`directions.settings.Settings`."""

    emotions: Sequence[str]
    elicitation: str
    instruction: str
    holdout: float
    seed: int
    batch_tokens: int
    packed: bool


class AblateOptions(TypedDict, total=False):
    """`attribution.settings.AblateSettings`."""

    patch_groups: int
    true_groups: int
    true_units: int
    verify_prompts: int
    verify_neurons: int
    effect_prompts: int
    seed: int
    curves: CurveSettings | None


class AssembleOptions(TypedDict, total=False):
    """`circuits.settings.CircuitSettings`."""

    preset: str
    ranking: str
    head_share: float | None
    neuron_share: float | None
    share: float
    spare_names: bool
    n_prompts: int
    n_random: int
    seed: int


class CalibrateOptions(TypedDict, total=False):
    """`calibration.settings.CalibrateSettings`."""

    top: float
    points: int
    refine: int
    default_intensity: float | None
    guard: Guard
    ratio: float
    good_cap: bool


class HeadOptions(TypedDict, total=False):
    """`circuits.heads.settings.HeadSettings`."""

    described: int
    nodes: int
    edges: int
    groups: int
    texts: int
    tokens: int
    checked: int
    random: int
    seed: int


class ProbeOptions(TypedDict, total=False):
    """`probing.settings.ProbeSettings`."""

    kinds: Sequence[str]
    read: str
    per_label: int
    test_share: float
    folds: int
    decays: Sequence[float]
    hidden: int
    shuffles: int
    epochs: int
    longest: int
    batch_tokens: int
    distances: Sequence[int]
    followed: int
    prompted: int
    shots: int
    moved: int
    seed: int


class EffectsOptions(TypedDict, total=False):
    """`side_effects.settings.EffectsSettings`."""

    methods: Sequence[str]
    intensities: Sequence[float]
    per_prompt: int
    items: int
    requests: int
    attachments: int
    everyday: int
    texts: int
    item_tokens: int
    reply_tokens: int
    rounds: int
    distances: Sequence[int]
    followed: int
    followed_intensity: float
    guidance: float
    seed: int


class ValidateOptions(TypedDict, total=False):
    """`circuits.validation.settings.ValidateSettings`."""

    prompts: int
    randoms: int
    sizes: Sequence[float]
    focus: float
    doses: Sequence[float]
    kinds: Sequence[str]
    held: Sequence[str]
    elicitations: Sequence[str]
    others: int
    reply_tokens: int
    references: int
    bank_groups: int
    bootstraps: int
    written: int
    row_tokens: int
    seed: int
    parts: Sequence[str]
