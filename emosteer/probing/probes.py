"""`Probes`: fitted linear probes and what was measured with them, as an artefact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.probing import schema

KIND = "probes"
LINEAR, NONLINEAR = "linear", "non-linear"
Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Probes:
    """weights: kind of site -> [layer, unit, label, width] and biases: [layer, unit, label], of the linear probes: the logits of the labels
    are `weights @ state + bias`. A unit is a head where heads are probed; otherwise there is one.

    read: which positions of a text are read; texts: how many are fitted on and tested; left_out: reason -> texts; points: one row per
    probe, {"kind", "layer", "unit", "form", "decay", "held_out_loss", "accuracy", "f1", "calibration", "loss", "shuffled",
    "selectivity"}; best: kind -> the linear probe with the least held-out loss, {"layer", "unit"}; chosen: the kind whose best probe the
    other parts are read with; confusion: [label, label], its test texts; lexical: accuracy of words alone; prompting, persistence,
    malleability: what those measured, empty where they were left out; notes: what was left out and why.
    """

    labels: tuple[str, ...]
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    read: str
    texts: Mapping[str, int]
    left_out: Mapping[str, int]
    points: Sequence[Row]
    best: Mapping[str, Mapping[str, int]]
    chosen: str
    confusion: Tensor
    lexical: Mapping[str, float]
    prompting: Mapping[str, Any]
    persistence: Mapping[str, Any]
    malleability: Mapping[str, Any]
    notes: tuple[str, ...]
    provenance: Provenance

    def point(self, kind: str, form: str = LINEAR) -> Row:
        """The row of a kind's best linear probe, or of the non-linear probe at the same place."""
        place = self.best[kind]
        return next(
            row
            for row in self.points
            if (row["kind"], row["form"], row["layer"], row["unit"]) == (kind, form, place["layer"], place["unit"])
        )

    def save(self, path: Path) -> None:
        """Writes the artefact."""
        tensors = {"confusion": self.confusion}
        for kind in self.weights:
            tensors |= {f"{kind}.weight": self.weights[kind], f"{kind}.bias": self.biases[kind]}
        fields = {
            "labels": list(self.labels),
            "kinds": list(self.weights),
            "read": self.read,
            "texts": dict(self.texts),
            "left_out": dict(self.left_out),
            "points": [dict(row) for row in self.points],
            "best": {kind: dict(place) for kind, place in self.best.items()},
            "chosen": self.chosen,
            "lexical": dict(self.lexical),
            "prompting": dict(self.prompting),
            "persistence": dict(self.persistence),
            "malleability": dict(self.malleability),
            "notes": list(self.notes),
        }
        artifacts.save(path, KIND, fields, tensors, self.provenance)

    @classmethod
    def load(cls, path: Path) -> Probes:
        """Reads the artefact back.

        Raises:
            ArtifactError: if it is not one.
        """
        return cls.from_artifact(artifacts.load(path, KIND))

    @classmethod
    def from_artifact(cls, found: artifacts.Artifact) -> Probes:
        """Makes the value from a loaded artefact of kind "probes".

        Raises:
            ArtifactError: if a part is missing, nonsense, or does not fit the others.
        """
        schema.check(found)
        f, t = found.fields, found.tensors
        plain = {name: f[name] for name in _PLAIN} | {"best": {kind: f["best"][kind] for kind in f["kinds"]}}
        return cls(
            labels=tuple(f["labels"]),
            weights={kind: t[f"{kind}.weight"] for kind in f["kinds"]},
            biases={kind: t[f"{kind}.bias"] for kind in f["kinds"]},
            confusion=t["confusion"],
            notes=tuple(f["notes"]),
            provenance=found.provenance,
            **plain,
        )


_PLAIN = ("read", "texts", "left_out", "points", "best", "chosen", "lexical", "prompting", "persistence", "malleability")
