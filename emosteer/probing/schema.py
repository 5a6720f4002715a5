"""What a probes file must hold to be taken."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from emosteer.base import schema
from emosteer.base.artifacts import Artifact
from emosteer.base.errors import ArtifactError
from emosteer.base.schema import Count, Fields, Layer, Names, Share, Text

Kind = Literal["resid_mid", "resid_post", "heads", "mlp_out"]
Form = Literal["linear", "non-linear"]
_Rise = Annotated[float, Field(ge=-1, le=1)]
_Loss = Annotated[float, Field(ge=0)]


class Estimate(Fields):
    """A value with the ends of its interval."""

    value: _Rise
    low: _Rise
    high: _Rise


class Place(Fields):
    """A layer, and a head in it."""

    layer: Layer
    unit: Count


class Point(Fields):
    """One probe."""

    kind: Kind
    layer: Layer
    unit: Count
    form: Form
    decay: _Loss
    held_out_loss: _Loss
    accuracy: Estimate
    f1: Share
    calibration: Share
    loss: _Loss
    shuffled: Share
    selectivity: _Rise


class Counts(Fields):
    """Texts of a run."""

    train: Count
    test: Count


class Asked(Fields):
    """One way of asking the model."""

    accuracy: Estimate
    f1: Share
    calibration: Share
    loss: _Loss
    probe_less: Estimate


class Prompting(Fields):
    """The model's answers beside the probe on the same texts."""

    texts: Count
    probe: Estimate
    shots: Count
    asked: dict[Text, Asked]


class After(Fields):
    """Accuracy at one distance."""

    distance: Count
    fitted: Estimate
    transferred: Estimate
    shuffled: Estimate
    lexical: Estimate


class Persistence(Fields):
    """Accuracy by distance."""

    texts: Count
    window: Count
    site: Text
    longest: int
    points: Annotated[list[After], Field(min_length=1)]


class Moved(Fields):
    """What became of one label's reading."""

    how: Text
    dose: float | None
    label: Text
    before: Share
    after: Share
    rise: Estimate
    rise_shuffled: _Rise
    read_before: Share
    read_after: Share


class Malleability(Fields):
    """What moves the probe."""

    texts: Count
    site: Text
    rows: list[Moved]


class ProbesFields(Fields):
    """The plain fields of probes."""

    labels: Names
    kinds: Annotated[list[Kind], Field(min_length=1)]
    read: Literal["mean", "last"]
    texts: Counts
    left_out: dict[Text, Count]
    points: Annotated[list[Point], Field(min_length=1)]
    best: dict[Kind, Place]
    chosen: Kind
    lexical: Estimate
    prompting: Prompting | dict[str, None]
    persistence: Persistence | dict[str, None]
    malleability: Malleability | dict[str, None]
    notes: list[Text]


def check(found: Artifact) -> None:
    """Refuses probes whose parts are not what they must be, or do not fit each other.

    Raises:
        ArtifactError: naming file, field, what was expected and what was found.
    """
    path = found.path
    fields = schema.check_fields(ProbesFields, found.fields, path)
    wanted = {"confusion": "int label label"}
    for kind in fields.kinds:
        wanted |= {
            f"{kind}.weight": f"float n_layers {kind}.units label {kind}.width",
            f"{kind}.bias": f"float n_layers {kind}.units label",
        }
    sizes = schema.check_tensors(found.tensors, wanted, {"label": len(fields.labels)}, path)
    schema.check_keys(fields.best, fields.kinds, "best", path)
    schema.check_keys([fields.chosen, *fields.kinds], fields.kinds, "chosen", path)
    schema.check_members(
        [*(row.layer for row in fields.points), *(row.layer for row in fields.best.values())], sizes["n_layers"], "layer", path
    )
    there = {(row.kind, row.layer, row.unit) for row in fields.points if row.form == "linear"}
    places = {(kind, layer, unit) for kind in fields.kinds for layer in range(sizes["n_layers"]) for unit in range(sizes[f"{kind}.units"])}
    best = {(kind, place.layer, place.unit) for kind, place in fields.best.items()}
    if there != places or not best <= places:
        raise ArtifactError(
            f"{path}: expected 'points' and 'best' to be of the {len(places)} probes of its tensors, found others; make it again"
        )
