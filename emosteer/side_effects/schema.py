"""What a file of effects must hold to be taken."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from emosteer.base import schema
from emosteer.base.artifacts import Artifact
from emosteer.base.errors import ArtifactError
from emosteer.base.schema import Count, Fields, Names, Share, Text
from emosteer.circuits.methods import CIRCUIT
from emosteer.side_effects.battery import EVERYDAY
from emosteer.side_effects.outcomes import ASKED, ITEMS, MEASURES, REPLIES, TEXTS

_Intensity = Annotated[float, Field(ge=0, le=100)]
_Strength = Annotated[float, Field(ge=0, le=1000)]
_Rounds = Annotated[int, Field(ge=1, le=100)]


class Estimate(Fields):
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


class Level(Fields):
    """A figure of the unsteered model."""

    value: Estimate
    n: Count


class Figure(Fields):
    """A figure beside the unsteered model's."""

    value: Estimate
    change: Estimate
    p: Share
    n: Count


class Row(Fields):
    """What a method does."""

    method: Text
    emotion: Text
    intensity: _Intensity | None
    strength: _Strength | None
    figures: dict[Text, Figure]
    kinds: dict[Text, Figure]


class Unsteered(Fields):
    """What the model does without it."""

    figures: dict[Text, Level]
    kinds: dict[Text, Level]


class Tried(Fields):
    """One condition: a row of the tensors."""

    method: Text
    emotion: Text
    intensity: _Intensity | None
    strength: _Strength | None


class Pattern(Fields):
    """Response patterns of a method."""

    method: Text
    intensity: _Intensity | None
    shares: dict[Text, Share]


class Feedback(Fields):
    """Accuracy after feedback."""

    arm: Text
    round: _Rounds
    accuracy: Estimate
    gain: Estimate
    more: Estimate
    p: Share


class After(Fields):
    """An emotion after a long conversation."""

    how: Text
    distance: Count
    felt: Estimate
    n: Count


class EffectsFields(Fields):
    """The plain fields of effects."""

    emotions: Names
    circuit_sha256: Text
    conditions: Annotated[list[Tried], Field(min_length=1)]
    rows: list[Row]
    unsteered: Unsteered
    patterns: list[Pattern]
    feedback: list[Feedback]
    after: list[After]
    after_intensity: _Intensity
    limits: dict[Text, float]
    notes: list[Text]


def check(found: Artifact) -> None:
    """Refuses effects whose parts are not what they must be, or do not fit each other.

    Raises:
        ArtifactError: naming file, field, what was expected and what was found.
    """
    path = found.path
    fields = schema.check_fields(EffectsFields, found.fields, path)
    wanted = {f"tried.{name}": f"bool condition {name}" for name in (TEXTS, ITEMS, *ASKED, REPLIES)}
    wanted |= {measure: f"float condition {name}" for measure, name in MEASURES.items()}
    wanted["unsteered_felt"] = f"float emotion {EVERYDAY}"
    schema.check_tensors(found.tensors, wanted, {"condition": len(fields.conditions), "emotion": len(fields.emotions)}, path)
    known = (*fields.emotions, "none", "all")
    tried = {(one.method, one.intensity) for one in fields.conditions}
    for row in fields.rows:
        if row.emotion not in known or (row.method, row.intensity) not in tried:
            raise ArtifactError(f"{path}: a row of '{row.method}' for '{row.emotion[:60]}' is of no condition; make it again")
        if stray := sorted(row.figures.keys() - MEASURES.keys()):
            raise ArtifactError(f"{path}: expected figures of {', '.join(MEASURES)}, found '{stray[0][:60]}'; make it again")
        if row.method == CIRCUIT and (row.intensity is None or (row.strength is None) != (row.emotion == "all")):
            raise ArtifactError(f"{path}: a row of the circuit for '{row.emotion[:60]}' lacks its place on the dial; make it again")
