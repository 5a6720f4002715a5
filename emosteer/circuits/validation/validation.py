"""`Validation`: what `validate` found about a circuit, as an artefact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.circuits.validation import schema
from emosteer.circuits.validation.trials import Trial

KIND = "validation"
Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Validation:
    """prompts: that were tried; band: layers whose stream was projected on the directions; followed, read: what was tried while the model
    follows an emotion and while it reads one, with followed_figures [trial, prompt, 2] and read_figures [trial, prompt, 4]
    (`bench.FOLLOWED`, `bench.READ`); inclusion: [emotion, layer, head], share of bootstraps of the bank that have a head in the ranking
    of the focus; removed: [emotion, layer, head], what a head's mean ablation takes out of the stream. The tables are made from these
    figures: necessary, sufficient, reading, swaps, claims (`findings`), overlaps and shared (`overlaps`), stable (`validate`), written
    (`written_replies`), each a list of rows; notes: what was left out and why."""

    emotions: tuple[str, ...]
    prompts: tuple[str, ...]
    band: tuple[int, ...]
    followed: tuple[Trial, ...]
    read: tuple[Trial, ...]
    followed_figures: Tensor
    read_figures: Tensor
    inclusion: Tensor
    removed: Tensor
    tables: Mapping[str, Sequence[Row]]
    notes: tuple[str, ...]
    provenance: Provenance

    def save(self, path: Path) -> None:
        """Writes the artefact."""
        fields = {
            "emotions": list(self.emotions),
            "prompts": list(self.prompts),
            "band": list(self.band),
            "followed": [vars(trial) for trial in self.followed],
            "read": [vars(trial) for trial in self.read],
            **{name: [dict(row) for row in self.tables[name]] for name in TABLES},
            "notes": list(self.notes),
        }
        tensors = {"followed": self.followed_figures, "read": self.read_figures, "inclusion": self.inclusion, "removed": self.removed}
        artifacts.save(path, KIND, fields, tensors, self.provenance)

    @classmethod
    def load(cls, path: Path) -> Validation:
        """Reads the artefact back.

        Raises:
            ArtifactError: if it is not one.
        """
        return cls.from_artifact(artifacts.load(path, KIND))

    @classmethod
    def from_artifact(cls, found: artifacts.Artifact) -> Validation:
        """Makes the value from a loaded artefact of kind "validation".

        Raises:
            ArtifactError: if a part is missing, nonsense, or does not fit the others.
        """
        schema.check(found)
        f, t = found.fields, found.tensors
        trials = {name: tuple(Trial(**row) for row in f[name]) for name in ("followed", "read")}
        return cls(
            tuple(f["emotions"]),
            tuple(f["prompts"]),
            tuple(f["band"]),
            **trials,
            followed_figures=t["followed"],
            read_figures=t["read"],
            inclusion=t["inclusion"],
            removed=t["removed"],
            tables={name: f[name] for name in TABLES},
            notes=tuple(f["notes"]),
            provenance=found.provenance,
        )


#: The tables of a validation.
TABLES = ("necessary", "sufficient", "reading", "swaps", "claims", "overlaps", "shared", "stable", "written")
