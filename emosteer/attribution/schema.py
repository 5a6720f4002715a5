"""What a scores file must hold to be taken."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from emosteer.base import schema
from emosteer.base.artifacts import Artifact
from emosteer.base.errors import ArtifactError
from emosteer.base.schema import MISSING, Count, Fields, Layers, Names, Record, Share, Text

_Error = Annotated[float, Field(ge=0)]


class Checked(Record):
    """Errors of one kind of unit against real ablation."""

    units: Count
    median_relative_error: _Error
    max_relative_error: _Error
    max_error_to_largest: _Error
    within: Annotated[Share, Field(alias="share_within_1e-4")]


class Verification(Record):
    """The check by real ablation, or why it was left out."""

    prompts: Count = 0
    skipped: Text = ""
    heads: Checked = MISSING
    neurons: Checked = MISSING


class Patches(Record):
    """Units that were really patched, beside the estimates."""

    emotion: Text
    units: list[Text]
    estimate: list[float]
    truth: list[float]
    correlation: float
    correlation_random: float


class CurvePoint(Record):
    """One emotion's score at one point of a curve."""

    kind: Text
    unit: Text
    share: Share
    who: Text
    emotion: Text
    score: float


class ScoresFields(Fields):
    """The plain fields of scores."""

    emotions: Names
    forms: Annotated[list[Literal["contrast", "raw", "patch", "effect"]], Field(min_length=1)]
    band: Layers
    verification: Verification
    patches: Patches | dict[str, None]
    curves: list[CurvePoint]


def check(found: Artifact) -> dict[str, int]:
    """Refuses scores whose parts are not what they must be, or do not fit each other.

    Returns:
        The sizes: n_layers, n_heads and d_mlp.

    Raises:
        ArtifactError: naming file, field, what was expected and what was found.
    """
    path = found.path
    fields = schema.check_fields(ScoresFields, found.fields, path)
    if len(set(fields.forms)) < len(fields.forms):
        raise ArtifactError(f"{path}: expected 'forms' to differ from each other, found {', '.join(fields.forms)}; make it again")
    wanted = {"importance": "float emotion n_layers 2"}
    for form in fields.forms:
        wanted |= {f"{form}.heads": "float emotion n_layers n_heads", f"{form}.neurons": "float emotion n_layers d_mlp"}
    sizes = schema.check_tensors(found.tensors, wanted, {"emotion": len(fields.emotions)}, path)
    verified = fields.verification.model_fields_set
    if verified & {"heads", "neurons"} and "prompts" not in verified:
        raise ArtifactError(f"{path} lacks 'verification.prompts'; make it again")
    schema.check_members(fields.band, sizes["n_layers"], "band", path)
    if isinstance(fields.patches, Patches):
        lengths = {len(fields.patches.units), len(fields.patches.estimate), len(fields.patches.truth)}
        if len(lengths) > 1:
            raise ArtifactError(f"{path}: expected the lists of 'patches' to be equally long, found them unequal; make it again")
    for name in [*(point.emotion for point in fields.curves), *([fields.patches.emotion] if isinstance(fields.patches, Patches) else [])]:
        if name not in fields.emotions:
            raise ArtifactError(f"{path}: expected emotions of {', '.join(fields.emotions)[:60]}, found '{name[:60]}'; make it again")
    return sizes
