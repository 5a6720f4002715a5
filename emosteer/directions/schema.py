"""What a directions file must hold to be taken."""

from __future__ import annotations

from emosteer.base import schema
from emosteer.base.artifacts import Artifact
from emosteer.base.errors import ArtifactError
from emosteer.base.schema import Count, Fields, Names, Text
from emosteer.models.sites import MLP_POST, Z, residual_sites

#: Name -> type and dimensions of every tensor (`Directions`).
TENSORS = {
    "vectors": "float emotion site d_model",
    "norms": "float emotion site",
    "rms": "float site",
    "base": "float site d_model",
    "variance": "float emotion site d_model",
    f"{Z}.mean": "float emotion n_layers width",
    f"{Z}.variance": "float emotion n_layers width",
    f"{Z}.base": "float n_layers width",
    f"{MLP_POST}.mean": "float emotion n_layers d_mlp",
    f"{MLP_POST}.variance": "float emotion n_layers d_mlp",
    f"{MLP_POST}.base": "float n_layers d_mlp",
}
#: The same of the evidence, which is there whole or not at all.
EVIDENCE = {f"evidence.{name}": "float site emotion" for name in ("accuracy", "accuracy_shuffled")} | {
    f"evidence.{name}": "float emotion site" for name in ("halves", "halves_shuffled", "themes", "valences")
}
#: How far a unit vector's length may be from 1, and a cosine beyond it: rounding, also of half precision.
SLACK = 1e-2


class DirectionsFields(Fields):
    """The plain fields of directions."""

    emotions: Names
    sites: list[Text]
    elicitation: Text
    instruction: Text
    n_groups: Count
    n_heldout: Count
    dropped: dict[Text, Count]
    incomplete: Count = 0
    replies: dict[Text, Count] = {}


def check(found: Artifact) -> dict[str, int]:
    """Refuses directions whose parts are not what they must be, or do not fit each other.

    Returns:
        The sizes: n_layers, d_model, d_mlp and width (n_heads * d_head).

    Raises:
        ArtifactError: naming file, field, what was expected and what was found.
    """
    path, tensors = found.path, found.tensors
    fields = schema.check_fields(DirectionsFields, found.fields, path)
    known = {"emotion": len(fields.emotions), "site": len(fields.sites)}
    with_evidence = any(name.startswith("evidence.") for name in tensors)
    sizes = schema.check_tensors(tensors, TENSORS | EVIDENCE if with_evidence else TENSORS, known, path)
    if fields.sites != [str(site) for site in residual_sites(sizes["n_layers"])] or not fields.sites:
        raise ArtifactError(
            f"{path}: expected 'sites' to be resid_mid and resid_post of {sizes['n_layers']} layers in order, found "
            f"{', '.join(fields.sites)[:60]}; make it again"
        )
    if fields.n_heldout > fields.n_groups:
        raise ArtifactError(f"{path}: expected 'n_heldout' up to 'n_groups', found {fields.n_heldout} of {fields.n_groups}; make it again")
    schema.check_within(tensors["vectors"].float().norm(dim=-1), 1 - SLACK, 1 + SLACK, "length of vectors", path)
    for name in ("norms", "rms", "variance", f"{Z}.variance", f"{MLP_POST}.variance"):
        schema.check_within(tensors[name], 0, float("inf"), name, path)
    for name in EVIDENCE if with_evidence else ():
        low = 0.0 if name.startswith("evidence.accuracy") else -1 - SLACK
        schema.check_within(tensors[name], low, 1 + SLACK, name, path)
    return sizes
