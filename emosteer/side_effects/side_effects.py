"""`SideEffects`: what a circuit, residual steering, prompts and sentences do besides, as an artefact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.side_effects import schema

KIND = "effects"
Row = Mapping[str, Any]
_PLAIN = ("circuit_sha256", "conditions", "rows", "unsteered", "patterns", "feedback", "after", "after_intensity", "limits")


@dataclass(frozen=True, eq=False)
class SideEffects:
    """outcomes: by prompt, the raw material of every figure: measure -> [condition, prompt], 0 where "tried.SET" [condition, prompt] says
    that the condition was not tried; and "unsteered_felt" [emotion, prompt], whether the unsteered reply is read as the emotion.

    circuit_sha256: of the circuit's file; conditions: {"method", "emotion", "intensity", "strength"} of each row of the outcomes, the
    unsteered model first; rows: figures of every method, intensity and emotion ("all" is all of them together), see `figures.rows_of`;
    unsteered: the same of the unsteered model; patterns, feedback, after: see `figures`; after_intensity: of the circuit in `after`;
    limits: what the run was held against; notes: what was left out and why.
    """

    emotions: tuple[str, ...]
    outcomes: Mapping[str, Tensor]
    circuit_sha256: str
    conditions: Sequence[Row]
    rows: Sequence[Row]
    unsteered: Row
    patterns: Sequence[Row]
    feedback: Sequence[Row]
    after: Sequence[Row]
    after_intensity: float
    limits: Mapping[str, float]
    notes: tuple[str, ...]
    provenance: Provenance

    def save(self, path: Path) -> None:
        """Writes the artefact."""
        fields = {name: getattr(self, name) for name in _PLAIN}
        artifacts.save(path, KIND, {**fields, "emotions": list(self.emotions), "notes": list(self.notes)}, self.outcomes, self.provenance)

    @classmethod
    def load(cls, path: Path) -> SideEffects:
        """Reads the artefact back.

        Raises:
            ArtifactError: if it is not one.
        """
        return cls.from_artifact(artifacts.load(path, KIND))

    @classmethod
    def from_artifact(cls, found: artifacts.Artifact) -> SideEffects:
        """Makes the value from a loaded artefact of kind "effects".

        Raises:
            ArtifactError: if a part is missing, nonsense, or does not fit the others.
        """
        schema.check(found)
        fields = found.fields
        return cls(
            emotions=tuple(fields["emotions"]),
            outcomes=found.tensors,
            notes=tuple(fields["notes"]),
            provenance=found.provenance,
            **{name: fields[name] for name in _PLAIN},
        )
