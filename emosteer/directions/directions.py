"""Statistics -> Directions: `v[e] = m[e] / |m[e]|` per site, and the evidence that they carry emotion and not context."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import DegenerateDirection
from emosteer.base.schema import check_sizes
from emosteer.directions import schema
from emosteer.directions.contrast import HALVES, HELDOUT, SHUFFLED, Contrasts, unit_vectors
from emosteer.models.architecture import Shape
from emosteer.models.sites import MLP_POST, RESID_POST, Site, Z, parse_site
from emosteer.scenarios.emotions import find_emotion

KIND = "directions"


@dataclass(frozen=True, eq=False)
class UnitStats:
    """Mean contrast and its variance over groups [emotion, layer, width], and the mean activation [layer, width]."""

    mean: Tensor
    variance: Tensor
    base: Tensor


@dataclass(frozen=True, eq=False)
class Evidence:
    """What backs the directions, per residual site; accuracy and halves with their control of shuffled labels.

    accuracy, accuracy_shuffled: [site, emotion], share of held-out groups whose emotion is named right by the largest
    projection (chance 1 / emotions). halves, halves_shuffled, themes, valences: [emotion, site], cosine between the
    directions of disjoint halves, and the mean cosine over pairs of themes and of valences; 1 throughout where there was no pair, which
    `across` knows.
    """

    accuracy: Tensor
    accuracy_shuffled: Tensor
    halves: Tensor
    halves_shuffled: Tensor
    themes: Tensor
    valences: Tensor

    @property
    def across(self) -> dict[str, Tensor]:
        """Themes and valences, where there were two of them to compare. Shape [emotion, site] each."""
        return {name: values for name in ("themes", "valences") if not bool(((values := getattr(self, name)) == 1).all())}


@dataclass(frozen=True, eq=False)
class Directions:
    """The product of `extract`.

    vectors: [emotion, site, d_model], unit length; norms: [emotion, site], length before scaling; rms: [site], root mean
    square of the residual stream's entries at the read positions; base: [site, d_model], mean residual over emotions and
    groups; variance: [emotion, site, d_model], of the contrast over groups; z, mlp: statistics of heads and neurons; incomplete: how many
    of the groups lack an emotion; replies: emotion -> how many groups hold it, empty in files that are older than the figure.
    """

    emotions: tuple[str, ...]
    sites: tuple[Site, ...]
    vectors: Tensor
    norms: Tensor
    rms: Tensor
    base: Tensor
    variance: Tensor
    z: UnitStats
    mlp: UnitStats
    evidence: Evidence | None
    elicitation: str
    instruction: str
    n_groups: int
    n_heldout: int
    dropped: Mapping[str, int]
    provenance: Provenance
    incomplete: int = 0
    replies: Mapping[str, int] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return self.z.mean.shape[1]

    def index(self, emotion: str) -> int:
        """Position of an emotion.

        Raises:
            UsageError: if there is no direction for it.
        """
        return self.emotions.index(find_emotion(emotion, self.emotions, "this file holds"))

    def require_sizes(self, shape: Shape, model_name: str, path: Path) -> None:
        """Refuses directions of other sizes than the model's, whatever their file says of the weights.

        Raises:
            ArtifactError: naming the first size that differs.
        """
        found = {"n_layers": self.n_layers, "d_model": self.vectors.shape[-1], "d_mlp": self.mlp.mean.shape[-1]}
        wanted = {**vars(shape), "width": shape.n_heads * shape.d_head}
        check_sizes({**found, "width": self.z.mean.shape[-1]}, wanted, model_name, path)

    def at(self, kind: str) -> Tensor:
        """Directions of one residual kind. Shape [emotion, layer, d_model]."""
        return self.vectors[:, [i for i, site in enumerate(self.sites) if site.kind == kind]]

    def save(self, path: Path) -> None:
        """Writes the artefact."""
        tensors = {"vectors": self.vectors, "norms": self.norms, "rms": self.rms, "base": self.base, "variance": self.variance}
        for kind, stats in ((Z, self.z), (MLP_POST, self.mlp)):
            tensors |= {f"{kind}.mean": stats.mean, f"{kind}.variance": stats.variance, f"{kind}.base": stats.base}
        if self.evidence:
            tensors |= {f"evidence.{name}": value for name, value in vars(self.evidence).items()}
        fields = {
            "emotions": list(self.emotions),
            "sites": [str(site) for site in self.sites],
            "elicitation": self.elicitation,
            "instruction": self.instruction,
            "n_groups": self.n_groups,
            "n_heldout": self.n_heldout,
            "dropped": dict(self.dropped),
            "incomplete": self.incomplete,
            "replies": dict(self.replies),
        }
        artifacts.save(path, KIND, fields, tensors, self.provenance)

    @classmethod
    def load(cls, path: Path) -> Directions:
        """Reads the artefact back.

        Raises:
            ArtifactError: if it is not one.
        """
        return cls.from_artifact(artifacts.load(path, KIND))

    @classmethod
    def from_artifact(cls, artifact: artifacts.Artifact) -> Directions:
        """Makes the value from a loaded artefact of kind "directions".

        Raises:
            ArtifactError: if a part is missing, nonsense, or does not fit the others.
        """
        schema.check(artifact)
        fields, tensors = artifact.fields, artifact.tensors
        names = Evidence.__dataclass_fields__
        evidence = Evidence(**{n: tensors[f"evidence.{n}"] for n in names}) if "evidence.halves" in tensors else None
        return cls(
            emotions=tuple(fields["emotions"]),
            sites=tuple(parse_site(text) for text in fields["sites"]),
            vectors=tensors["vectors"],
            norms=tensors["norms"],
            rms=tensors["rms"],
            base=tensors["base"],
            variance=tensors["variance"],
            z=UnitStats(tensors["z.mean"], tensors["z.variance"], tensors["z.base"]),
            mlp=UnitStats(tensors["mlp_post.mean"], tensors["mlp_post.variance"], tensors["mlp_post.base"]),
            evidence=evidence,
            elicitation=fields["elicitation"],
            instruction=fields["instruction"],
            n_groups=fields["n_groups"],
            n_heldout=fields["n_heldout"],
            dropped=fields["dropped"],
            provenance=artifact.provenance,
            incomplete=fields.get("incomplete", 0),
            replies=fields.get("replies", {}),
        )


def from_contrasts(
    contrasts: Contrasts,
    *,
    elicitation: str,
    instruction: str,
    dropped: Mapping[str, int],
    provenance: Provenance,
    incomplete: int = 0,
) -> Directions:
    """Directions over all counted groups, held-out ones included; the evidence uses the held-out split.

    Args:
        incomplete: how many of the groups lack an emotion.

    Raises:
        DegenerateDirection: if an emotion has no direction at some site.
    """
    counts = dict(zip(contrasts.plan.strata, contrasts.sums["count"].tolist(), strict=True))
    vectors = unit_vectors(contrasts.mean(*HALVES, HELDOUT))
    means, variance, base = contrasts.moments("resid")
    n_states = contrasts.n_groups
    units = {kind: UnitStats(*(t.float() for t in contrasts.moments(kind))) for kind in (Z, MLP_POST)}
    return Directions(
        emotions=contrasts.plan.emotions,
        sites=contrasts.sites,
        vectors=vectors.float(),
        norms=means.norm(dim=-1).float(),
        rms=(contrasts.sums["resid_rms"] / n_states).sqrt().float(),
        base=base.float(),
        variance=variance.float(),
        z=units[Z],
        mlp=units[MLP_POST],
        evidence=_evidence(contrasts, counts) if _measurable(contrasts, counts) else None,
        elicitation=elicitation,
        instruction=instruction,
        n_groups=n_states,
        n_heldout=int(counts[HELDOUT]),
        dropped=dropped,
        provenance=provenance,
        incomplete=incomplete,
        replies=dict(zip(contrasts.plan.emotions, contrasts.replies, strict=True)),
    )


def _measurable(contrasts: Contrasts, counts: Mapping[str, float]) -> bool:
    """Whether both halves compare all emotions, and every emotion has a held-out reply."""
    held = contrasts.sums["held"][contrasts.plan.strata.index(HELDOUT)]
    return bool((held > 0).all()) and all(counts[half] and not contrasts.apart(half) for half in HALVES)


def _evidence(contrasts: Contrasts, counts: Mapping[str, float]) -> Evidence:
    right = contrasts.sums["correct"] / contrasts.sums["held"][contrasts.plan.strata.index(HELDOUT)]

    def pairwise(prefix: str) -> Tensor:
        """Mean cosine over pairs of the strata with this prefix whose groups compare all emotions; 1 where there is no pair."""
        names = [name for name in contrasts.plan.strata if name.startswith(prefix) and counts[name] and not contrasts.apart(name)]
        vectors = [unit_vectors(contrasts.mean(name)) for name in names]
        cosines = [(a * b).sum(-1) for a, b in itertools.combinations(vectors, 2)]
        return torch.stack(cosines).mean(0).float() if cosines else torch.ones(contrasts.sums["resid"].shape[1:3])

    return Evidence(
        accuracy=right[0].float(),
        accuracy_shuffled=right[1].float(),
        halves=pairwise("half:"),
        halves_shuffled=pairwise(SHUFFLED[0].split(":")[0] + ":"),
        themes=pairwise("theme:"),
        valences=pairwise("valence:"),
    )


#: Adjacent layers whose directions agree more than this are one stable band (docs/METHOD.md section 5).
BAND_COSINE = 0.9


def stable_band(directions: Directions, threshold: float = BAND_COSINE) -> tuple[int, ...]:
    """The late layers over which the directions keep still: the longest run of adjacent `resid_post` cosines above the threshold
    that ends in the last third of the model; found, not hard-coded. Falls back to the single stillest late pair.
    """
    vectors = directions.at(RESID_POST)
    n_layers = vectors.shape[1]
    cosines = (vectors[:, 1:] * vectors[:, :-1]).sum(-1).mean(0)
    best: range | None = None
    start = 0
    for layer in range(1, n_layers + 1):
        if layer < n_layers and cosines[layer - 1] > threshold:
            continue
        run = range(start, layer)
        if run.stop > 2 * n_layers // 3 and (best is None or len(run) > len(best)):
            best = run
        start = layer
    if best is None or len(best) < 2:
        late = n_layers // 2
        pair = late + int(cosines[late:].argmax()) if n_layers - 1 > late else max(n_layers - 2, 0)
        best = range(pair, min(pair + 2, n_layers))
    return tuple(best)


def reference_directions(directions: Directions, band: Sequence[int]) -> Tensor:
    """`v_ref[e]`: normalised mean of `v_post[e]` over the stable band. Shape [emotion, d_model].

    Raises:
        DegenerateDirection: if the band's directions cancel out.
    """
    return band_mean(directions.at(RESID_POST), band)


def band_mean(vectors: Tensor, band: Sequence[int]) -> Tensor:
    """The same of vectors. Shape [emotion, layer, d_model] -> [emotion, d_model]."""
    mean = vectors[:, list(band)].mean(1)
    norms = mean.norm(dim=-1, keepdim=True)
    if not (norms > 1e-3).all():
        raise DegenerateDirection(f"the directions of layers {band[0]} to {band[-1]} cancel out; choose a narrower band")
    return mean / norms
