"""What a validation file must hold to be taken."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from emosteer.base import schema
from emosteer.base.artifacts import Artifact
from emosteer.base.errors import ArtifactError
from emosteer.base.schema import MISSING, Count, Fields, Layers, Names, Record, Share, Text

#: A figure and the ends of its interval.
_Interval = Annotated[list[float], Field(min_length=3, max_length=3)]
_Dose = Annotated[float, Field(ge=0, le=1)]


class Tried(Record):
    """One trial (`trials.Trial`)."""

    emotion: Text
    asked: Text
    elicitation: Text
    size: Text
    who: Text
    action: Text
    kind: Text
    dose: float


class Point(Record):
    """How much a set of units takes away, or carries, of one emotion, beside random sets."""

    emotion: Text
    figure: Text
    elicitation: Text
    size: Text
    kind: Text
    dose: _Dose
    whole: _Interval
    moved: _Interval
    share: _Interval
    random: _Interval = MISSING
    random_share: _Interval = MISSING
    above: _Interval = MISSING
    ratio: float = MISSING
    effect_size: float = MISSING
    p: Share = MISSING
    sized: _Interval = MISSING
    others: _Interval = MISSING
    units: Count = MISSING
    taken: float = MISSING
    random_taken: float = MISSING


class Figure(Record):
    """One figure of reading."""

    clean: float
    moved: _Interval
    share: _Interval
    random: _Interval
    p: Share


class Read(Record):
    """What is read from text under a circuit's ablation."""

    emotion: Text
    size: Text
    reading: Figure
    cost: Figure
    answer: Figure


class Swap(Record):
    """What contrasts do that other heads add."""

    emotion: Text
    size: Text
    own: _Interval
    random: _Interval
    lent: dict[Text, _Interval]


class Claim(Record):
    """Which emotions show what was asked for."""

    figure: Text
    elicitation: Text
    size: Text
    kind: Text
    larger: list[Text]
    apart: list[Text]
    specific: list[Text]
    emotions: Count
    holds: bool


class Overlap(Record):
    """Common heads of two emotions."""

    size: Text
    first: Text
    second: Text
    common: Count
    expected: float
    p: Share
    jaccard: Share


class Shared(Record):
    """Heads that emotions share. at_least: how many emotions; heads: how many heads; expected: by chance."""

    size: Text
    at_least: Count
    heads: Count
    expected: float
    names: list[Text]


class Stable(Record):
    """How much of a ranking is always in it. heads: of the ranking; always: in nine of ten bootstraps; circuit: heads of the circuit's set
    of the size; held: of them, always in the ranking; halves: overlap of the two halves' rankings, of as many heads."""

    emotion: Text
    size: Text
    heads: Count
    always: Count
    circuit: Count
    held: Count
    names: list[Text]
    halves: Share | None
    halves_expected: float | None


class Written(Record):
    """How replies that are written under an ablation are read. who: "clean", "circuit" or "random"; size: of the circuit; replies: per
    emotion; emotion: share that is read as what was asked for; answers, sound: shares of all replies."""

    who: Text
    size: Text
    replies: Count
    emotion: _Interval
    answers: _Interval
    sound: _Interval
    by_emotion: dict[Text, Share]


class ValidationFields(Fields):
    """The plain fields of a validation."""

    emotions: Names
    prompts: Annotated[list[Text], Field(min_length=1, max_length=10_000)]
    band: Layers
    followed: list[Tried]
    read: list[Tried]
    necessary: list[Point]
    sufficient: list[Point]
    reading: list[Read]
    swaps: list[Swap]
    claims: list[Claim]
    overlaps: list[Overlap]
    shared: list[Shared]
    stable: list[Stable]
    written: list[Written]
    notes: list[Text]


def check(found: Artifact) -> None:
    """Refuses a validation whose parts are not what they must be, or do not fit each other.

    Raises:
        ArtifactError: naming file, field, what was expected and what was found.
    """
    path = found.path
    fields = schema.check_fields(ValidationFields, found.fields, path)
    known = {"emotion": len(fields.emotions), "prompt": len(fields.prompts), "followed": len(fields.followed), "read": len(fields.read)}
    wanted = {
        "followed": "float followed prompt 2",
        "read": "float read prompt 4",
        "inclusion": "float emotion n_layers n_heads",
        "removed": "float emotion n_layers n_heads",
    }
    schema.check_tensors(found.tensors, wanted, known, path)
    schema.check_within(found.tensors["inclusion"], 0, 1, "inclusion", path)
    rows = [*fields.followed, *fields.read, *fields.necessary, *fields.sufficient, *fields.reading, *fields.swaps, *fields.stable]
    for name in (str(vars(row)["emotion"]) for row in rows):
        if name not in (*fields.emotions, "all"):
            raise ArtifactError(f"{path}: expected emotions of {', '.join(fields.emotions)[:60]}, found '{name[:60]}'; make it again")
