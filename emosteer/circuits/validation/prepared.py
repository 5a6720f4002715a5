"""What is read before anything is tried: contrasts of the bank, neutral means, what heads remove. Kept on disk, so that a rerun starts at
its trials."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import ArtifactError
from emosteer.base.files import sha256_text
from emosteer.circuits.validation.bank_rankings import BankContrasts, Parting
from emosteer.circuits.validation.bench import References
from emosteer.models.sites import parse_site

KIND = "validation-preparation"


def prepared(
    path: Path | None, provenance: Provenance, told: Mapping[str, Any], read: Callable[[], tuple[BankContrasts, References]]
) -> tuple[BankContrasts, References]:
    """Takes what is kept, or reads and keeps it.

    Args:
        path: where it is kept, None keeps nothing; told: all that it depends on.
    """
    key = sha256_text(json.dumps([provenance.origin(), told], sort_keys=True, default=str))
    if path is not None and path.is_file():
        with contextlib.suppress(ArtifactError):  # damaged: read again
            kept = artifacts.load(path, KIND)
            if kept.fields.get("key") == key:
                return _unpacked(kept.tensors, kept.fields["parting"])
    contrasts, references = read()
    if path is not None:
        fields = {"key": key, "parting": {"by": contrasts.parting.by, "names": list(contrasts.parting.names)}}
        artifacts.save(path, KIND, fields, _packed(contrasts, references), provenance)
    return contrasts, references


def _packed(contrasts: BankContrasts, references: References) -> dict[str, Tensor]:
    read = {"z": contrasts.z, "mid": contrasts.mid, "halves": contrasts.halves, "removed": references.removed}
    return {**read, **{f"mean.{site}": value for site, value in references.means.items()}}


def _unpacked(tensors: Mapping[str, Tensor], parting: Mapping[str, Any]) -> tuple[BankContrasts, References]:
    contrasts = BankContrasts(tensors["z"], tensors["mid"], tensors["halves"], Parting(parting["by"], tuple(parting["names"])))
    means = {parse_site(name.removeprefix("mean.")): value for name, value in tensors.items() if name.startswith("mean.")}
    return contrasts, References(means, tensors["removed"], contrasts.z.mean(0))
