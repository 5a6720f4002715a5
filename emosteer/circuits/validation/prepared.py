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
from emosteer.circuits.validation.bank_rankings import BankContrasts
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
                return _unpacked(kept.tensors)
    contrasts, references = read()
    if path is not None:
        artifacts.save(path, KIND, {"key": key}, _packed(contrasts, references), provenance)
    return contrasts, references


def _packed(contrasts: BankContrasts, references: References) -> dict[str, Tensor]:
    return {**vars(contrasts), "removed": references.removed, **{f"mean.{site}": value for site, value in references.means.items()}}


def _unpacked(tensors: Mapping[str, Tensor]) -> tuple[BankContrasts, References]:
    contrasts = BankContrasts(tensors["z"], tensors["mid"], tensors["halves"])
    means = {parse_site(name.removeprefix("mean.")): value for name, value in tensors.items() if name.startswith("mean.")}
    return contrasts, References(means, tensors["removed"], contrasts.z.mean(0))
