"""What a heads file must hold to be taken."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from emosteer.base import schema
from emosteer.base.artifacts import Artifact
from emosteer.base.errors import ArtifactError
from emosteer.base.schema import Count, Fields, Layer, Names, Share, Text

#: Name -> type and dimensions of every tensor (`HeadStudy`).
TENSORS = {
    "length": "float emotion n_layers n_heads",
    "contrast": "float emotion n_layers n_heads",
    "told": "float emotion n_layers n_heads",
    "attention": "float label n_layers n_heads class",
    "at_start": "float n_layers n_heads class",
    "even": "float class",
    "even_at_start": "float class",
    "edge_index": "int edge 5",
    "edge_weight": "float edge",
}
#: Classes of tokens (`reading.CLASSES`).
N_CLASSES = 6
_Head = Annotated[int, Field(ge=0, lt=schema.MAX_WIDTH)]
_Cosine = Annotated[float, Field(ge=-1.001, le=1.001)]
#: A row of JSON: a list there, of these types in this order.
_Loose = Field(strict=False)
_Token = Annotated[tuple[Text, float, bool], _Loose]
_Fired = Annotated[tuple[Count, float, list[_Cosine]], _Loose]


class Ends(Fields):
    """Tokens that a vector promotes and suppresses most: text, standard deviations, whether it is the emotion's name."""

    promoted: list[_Token]
    suppressed: list[_Token]


class Lifts(Fields):
    """Standard deviations by which the words of each emotion are raised; random: those of this emotion, by random outputs of the head."""

    added: list[float]
    own: list[float]
    random: float
    random_high: float


class Fires(Fields):
    """Texts at both ends: number of the text, contribution, and its course over the read positions, as shares of the peak."""

    most: list[_Fired]
    least: list[_Fired]
    peak: Annotated[float, Field(ge=0)]


class Sources(Fields):
    """Where a head's contrast comes from directly."""

    embeddings: float
    circuit: float
    heads: float
    mlps: float


class Page(Fields):
    """One head of one emotion."""

    emotion: Text
    layer: Layer
    head: _Head
    rank: Annotated[int, Field(ge=1, le=2**20)]
    length: Annotated[float, Field(ge=0)]
    contribution: float
    told: Share
    cosine: _Cosine
    along: _Cosine
    added: Ends
    own: Ends
    words: Lifts
    bank: Lifts
    looks: list[Annotated[tuple[Text, Share, Count], _Loose]]
    fires: Fires
    sources: Sources | None
    reads: list[Annotated[tuple[Layer, _Head, float, bool], _Loose]]


class FiredOn(Fields):
    """A reply behind its prompt. start: what a head adds before the first token is the first entry of a course."""

    label: Text
    prompt: Text
    tokens: list[Text]


class Checks(Fields):
    """Edges patched for real."""

    n: Count
    correlation: float
    correlation_kept: float
    correlation_random: float
    slope: float
    same_sign: Share


class HeadsFields(Fields):
    """The plain fields of a heads file."""

    emotions: Names
    labels: Names
    n_groups: Count
    pages: Annotated[list[Page], Field(min_length=1)]
    texts: list[FiredOn]
    checks: Checks | dict[str, None]
    edge_floor: dict[Text, float]
    notes: list[Text]


def check(found: Artifact) -> None:
    """Refuses a heads file whose parts are not what they must be, or do not fit each other.

    Raises:
        ArtifactError: naming file, field, what was expected and what was found.
    """
    path = found.path
    fields = schema.check_fields(HeadsFields, found.fields, path)
    known = {"emotion": len(fields.emotions), "label": len(fields.labels), "class": N_CLASSES}
    sizes = schema.check_tensors(found.tensors, TENSORS, known, path)
    for column, size in enumerate((len(fields.emotions), *(sizes["n_layers"], sizes["n_heads"]) * 2)):
        schema.check_within(found.tensors["edge_index"][:, column], 0, size - 1, "edge_index", path)
    for name in ("attention", "at_start", "told"):
        schema.check_within(found.tensors[name], -1e-3, 1.001, name, path)
    if fields.labels[: len(fields.emotions)] != fields.emotions:
        raise ArtifactError(f"{path}: expected 'labels' to begin with the emotions, found others; make it again")
    schema.check_members([page.layer for page in fields.pages], sizes["n_layers"], "pages.layer", path)
    schema.check_members([row[0] for page in fields.pages for row in page.reads], sizes["n_layers"], "pages.reads", path)
    for page in fields.pages:
        lifts = {len(values) for part in (page.words, page.bank) for values in (part.added, part.own)}
        fired = [number for number, _, _ in (*page.fires.most, *page.fires.least)]
        if page.emotion not in fields.emotions or page.head >= sizes["n_heads"] or lifts != {len(fields.emotions)}:
            raise ArtifactError(f"{path}: expected the page of L{page.layer}H{page.head} to fit the tensors, found another; make it again")
        if any(number >= len(fields.texts) for number in fired):
            raise ArtifactError(f"{path}: expected a page to name texts that are there, found {max(fired)}; make it again")
    if {page.emotion for page in fields.pages} != set(fields.emotions):
        raise ArtifactError(f"{path}: expected a page for a head of each emotion, found some without; make it again")
