"""Scores: what `ablate` found about every head and neuron, as an artefact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from emosteer.attribution import schema
from emosteer.attribution.unit_scores import UnitScores
from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance

KIND = "scores"
SCORE_FORMS = ("contrast", "raw", "patch", "effect")


@dataclass(frozen=True, eq=False)
class Scores:
    """The product of `ablate`.

    forms: name -> scores of every unit (contrast, raw, patch, effect); importance: [emotion, layer, 2]; band: the stable late layers;
    verification: errors of one-pass contributions against real ablation; patches: estimate and truth per really patched unit;
    curves: one row per point and emotion.
    """

    emotions: tuple[str, ...]
    forms: Mapping[str, UnitScores]
    importance: Tensor
    band: tuple[int, ...]
    verification: Mapping[str, Any]
    patches: Mapping[str, Any]
    curves: Sequence[Mapping[str, Any]]
    provenance: Provenance

    def save(self, path: Path) -> None:
        """Writes the artefact."""
        tensors = {"importance": self.importance}
        for name, scores in self.forms.items():
            tensors |= {f"{name}.heads": scores.heads, f"{name}.neurons": scores.neurons}
        fields = {
            "emotions": list(self.emotions),
            "forms": list(self.forms),
            "band": list(self.band),
            "verification": dict(self.verification),
            "patches": dict(self.patches),
            "curves": [dict(row) for row in self.curves],
        }
        artifacts.save(path, KIND, fields, tensors, self.provenance)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Reads the artefact back.

        Raises:
            ArtifactError: if it is not one.
        """
        return cls.from_artifact(artifacts.load(path, KIND))

    @classmethod
    def from_artifact(cls, found: artifacts.Artifact) -> Scores:
        """Makes the value from a loaded artefact of kind "scores".

        Raises:
            ArtifactError: if a part is missing, nonsense, or does not fit the others.
        """
        schema.check(found)
        f, t = found.fields, found.tensors
        forms = {name: UnitScores(t[f"{name}.heads"], t[f"{name}.neurons"]) for name in f["forms"]}
        emotions, band = tuple(f["emotions"]), tuple(f["band"])
        return cls(emotions, forms, t["importance"], band, f["verification"], f["patches"], f["curves"], found.provenance)
