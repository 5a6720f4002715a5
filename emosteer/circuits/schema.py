"""What a circuit file must hold to be taken."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from emosteer.base import schema
from emosteer.base.artifacts import Artifact
from emosteer.base.errors import ArtifactError
from emosteer.base.schema import MISSING, Count, Fields, Layers, Names, Record, Share, Text
from emosteer.circuits.dial import MAX_STRENGTH
from emosteer.scenarios.examples import MAX_EXAMPLES

#: Name -> type and dimensions of every tensor (`Circuit`).
TENSORS = {
    "heads": "bool emotion n_layers n_heads",
    "z_delta": "float emotion n_layers width",
    "neuron_index": "int neuron 3",
    "neuron_delta": "float neuron",
    "strength": "float emotion",
    "importance": "float emotion n_layers 2",
    "vectors": "float emotion n_layers d_model",
    "rms": "float n_layers",
    "learned_residual": "float? emotion residual d_model",
}
Strength = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
_Strengths = Annotated[list[Annotated[float, Field(ge=0, le=MAX_STRENGTH)]], Field(min_length=1, max_length=10_000)]
_Ratio = Annotated[float, Field(gt=0, le=1e9)]


class Points(Record):
    """What was measured at some strengths of one emotion: one entry for each, of everything."""

    strength: Annotated[list[Annotated[float, Field(ge=0, le=MAX_STRENGTH)]], Field(max_length=10_000)]
    judged: list[Share]
    n: list[Count]
    error: list[Annotated[float, Field(ge=0, le=1e6)] | None]
    ratio: list[_Ratio]
    sound: list[Share]
    names: list[Share]

    def lengths(self) -> set[int]:
        """How many entries there are; one number where they agree."""
        return {len(values) for values in (self.strength, self.judged, self.n, self.error, self.ratio, self.sound, self.names)}


class Checked(Points):
    """The points of one emotion at several places of the dial, on other prompts."""

    intensity: list[Annotated[float, Field(ge=0, le=100)]]

    def lengths(self) -> set[int]:
        return super().lengths() | {len(self.intensity)}


class Tested(Record):
    """What a check was made on."""

    n_groups: Count


class Check(Record):
    """What `calibrate --check` writes (`calibration-check.json`)."""

    kind: Literal["calibration-check"]
    emotions: dict[Text, Checked]
    test: Tested


def check_of_dial(raw: object, path: Path) -> None:
    """Refuses a check of the dial that is malformed.

    Raises:
        ArtifactError: naming file, field, what was expected and what was found.
    """
    found = schema.check_fields(Check, raw, path)
    for emotion, row in found.emotions.items():
        if len(row.lengths()) > 1:
            raise ArtifactError(f"{path}: expected the lists of 'emotions.{emotion}' to be equally long, found them unequal; make it again")


class Broke(Points):
    """The strengths at which the text broke, and why."""

    why: list[list[Text]]

    def lengths(self) -> set[int]:
        return super().lengths() | {len(self.why)}


class Curve(Points):
    """The dial of one emotion."""

    strength: _Strengths
    fitted: list[Share]
    broke: Broke

    def lengths(self) -> set[int]:
        return super().lengths() | {len(self.fitted)}


class Calibration(Record):
    """What `calibrate` stores (`metrics.calibration`)."""

    judge: Text
    groups: Count
    rule: Text
    default_intensity: Annotated[float, Field(ge=0, le=100)] | None
    before: dict[str, Strength]
    emotions: dict[str, Curve]
    cap: dict[str, float] = {}
    data: dict[str, str] = {}
    joint_ratio: _Ratio = 1.0


class Alone(Record):
    """What holds without the circuit's examples: default strengths, and the dial."""

    strength: dict[str, Strength]
    calibration: Calibration


class Faithfulness(Record):
    """What was measured of the circuit of one emotion."""

    heads: Count
    neurons: Count
    faithfulness: float
    left: float
    without_weakest: float
    random_mean: float
    random_max: float


class Learned(Record):
    """The record of learning."""

    margin: list[float] = []
    curve: list[float] = []
    learn: Text = ""
    steps: Count = 0
    keep: Share = 1.0


class Tuning(Record):
    """Method -> strength -> nats per token, and the rule of choice."""

    rule: Text
    __pydantic_extra__: dict[str, dict[str, float]]


class Metrics(Fields):
    """What `circuit` and `calibrate` measured; whether a part is there says what the circuit is."""

    band: Layers = []
    emotions: dict[str, Faithfulness] = {}
    overlap: dict[str, dict[str, Share]] = {}
    tuning: Tuning = MISSING
    gains: Learned = MISSING
    learned_residual: Learned = MISSING
    calibration: Calibration = MISSING
    alone: Alone = MISSING


class Shown(Fields):
    """An example: what somebody says, and a reply to it."""

    said: Annotated[Text, Field(min_length=1)]
    reply: Annotated[Text, Field(min_length=1)]


class CircuitFields(Fields):
    """The plain fields of a circuit."""

    emotions: Names
    residual_layers: Layers
    residual_strength: Strength
    d_mlp: Annotated[int, Field(ge=0, le=schema.MAX_WIDTH)]  # 0: experts, which have no neurons here
    preset: Text
    instruction: Text
    metrics: Metrics
    examples: dict[Text, Annotated[list[Shown], Field(min_length=1, max_length=MAX_EXAMPLES)]] = {}


def check(found: Artifact) -> dict[str, int]:
    """Refuses a circuit whose parts are not what they must be, or do not fit each other.

    Returns:
        The sizes: n_layers, n_heads, d_model, d_mlp and width (n_heads * d_head).

    Raises:
        ArtifactError: naming file, field, what was expected and what was found.
    """
    path, tensors = found.path, found.tensors
    fields = schema.check_fields(CircuitFields, found.fields, path)
    known = {"emotion": len(fields.emotions), "residual": len(fields.residual_layers)}
    sizes = schema.check_tensors(tensors, TENSORS, known, path)
    n_layers, n_heads = sizes["n_layers"], sizes["n_heads"]
    if not n_layers or not n_heads or not sizes["width"] or sizes["width"] % n_heads or not sizes["d_model"]:
        raise ArtifactError(f"{path}: expected 'z_delta' as wide as {n_heads} heads of one size, found {sizes['width']}; make it again")
    schema.check_members(fields.residual_layers, n_layers, "residual_layers", path)
    schema.check_members(fields.metrics.band, n_layers, "metrics.band", path)
    schema.check_within(tensors["strength"], -MAX_STRENGTH, MAX_STRENGTH, "strength", path)
    schema.check_within(tensors["rms"], 0, float("inf"), "rms", path)
    for column, (name, size) in enumerate({"emotion": sizes["emotion"], "layer": n_layers, "neuron": fields.d_mlp}.items()):
        schema.check_within(tensors["neuron_index"][:, column], 0, size - 1, f"neuron_index ({name})", path)
    if len(tensors["neuron_index"].unique(dim=0)) < sizes["neuron"]:
        raise ArtifactError(f"{path}: expected 'neuron_index' to name each neuron once, found one twice; make it again")
    outside = tensors["z_delta"].unflatten(-1, (n_heads, -1)).ne(0).any(-1) & ~tensors["heads"]
    if outside.any():
        e, layer, head = outside.nonzero()[0].tolist()
        raise ArtifactError(
            f"{path}: expected 'z_delta' to be 0 outside the circuit's heads, found more at L{layer}H{head} "
            f"of {fields.emotions[e]}; make it again"
        )
    if strange := [emotion for emotion in fields.examples if emotion not in fields.emotions]:
        raise ArtifactError(f"{path}: expected 'examples' of {', '.join(fields.emotions)}, found some of {strange[0][:60]}; make it again")
    _check_metrics(fields, found)
    return {**sizes, "d_mlp": fields.d_mlp}


def _check_metrics(fields: CircuitFields, found: Artifact) -> None:
    metrics, path = fields.metrics, found.path
    if metrics.emotions:
        schema.check_keys(metrics.emotions, fields.emotions, "metrics.emotions", path)
    if metrics.overlap:
        schema.check_keys(metrics.overlap, fields.emotions, "metrics.overlap", path)
        for emotion, row in metrics.overlap.items():
            schema.check_keys(row, fields.emotions, f"metrics.overlap.{emotion}", path)
    if metrics.calibration is not MISSING:
        _check_dial(metrics.calibration, fields, path)
    if metrics.alone is not MISSING:
        schema.check_keys(metrics.alone.strength, fields.emotions, "metrics.alone.strength", path)
        _check_dial(metrics.alone.calibration, fields, path, "metrics.alone.calibration")


def _check_dial(dial: Calibration, fields: CircuitFields, path: Any, part: str = "metrics.calibration") -> None:
    """Every emotion has a curve, from strength 0 upwards, that never falls."""
    schema.check_keys(dial.emotions, fields.emotions, f"{part}.emotions", path)
    schema.check_keys(dial.before, fields.emotions, f"{part}.before", path)
    for emotion, curve in dial.emotions.items():
        place = f"{part}.emotions.{emotion}"
        for name, points in ((place, curve), (f"{place}.broke", curve.broke)):
            if len(points.lengths()) > 1:
                raise ArtifactError(f"{path}: expected the lists of '{name}' to be equally long, found them unequal; make it again")
        rising = all(a < b for a, b in zip(curve.strength, curve.strength[1:], strict=False))
        if curve.strength[0] != 0 or not rising:
            raise ArtifactError(f"{path}: expected '{place}.strength' to rise from 0, found {str(curve.strength)[:60]}; make it again")
        if any(a > b for a, b in zip(curve.fitted, curve.fitted[1:], strict=False)):
            raise ArtifactError(f"{path}: expected '{place}.fitted' never to fall, found {str(curve.fitted)[:60]}; make it again")
