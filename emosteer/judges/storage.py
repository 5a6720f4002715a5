"""The judges' file: linear heads, adapters and the card that says how they do on texts they were not fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import ArtifactError
from emosteer.judges import schema
from emosteer.judges.adapters import Adapter
from emosteer.judges.embedded import ENCODER, KIND, LinearHead

_HEAD = ("mean", "scale", "weight", "bias")


def save_judges(
    path: Path, heads: Mapping[str, LinearHead], adapters: Mapping[str, Adapter], card: Mapping[str, Any], provenance: Provenance
) -> None:
    """Writes heads, adapters and their card to one file."""
    tensors = tensors_of(heads)
    tensors = {name: value.half() if name.endswith(("weight", "bias")) else value for name, value in tensors.items()}
    tensors |= {f"{name}:{part}": value for name, adapter in adapters.items() for part, value in adapter.tensors().items()}
    fields = {
        "labels": {name: list(head.labels) for name, head in heads.items()},
        "adapters": {name: list(adapter.labels) for name, adapter in adapters.items()},
        "encoder": ENCODER,
        "card": dict(card),
    }
    artifacts.save(path, KIND, fields, tensors, provenance)


def load_heads(path: Path) -> dict[str, LinearHead]:
    """Reads the linear heads: name -> head.

    Raises:
        ArtifactError: if it is not a judge's file, is damaged, or was made for another encoder.
    """
    return heads_in(_checked(path))


def tensors_of(heads: Mapping[str, LinearHead]) -> dict[str, Tensor]:
    """Heads as a file holds them."""
    return {f"{name}.{part}": getattr(head, part) for name, head in heads.items() for part in _HEAD}


def heads_in(found: artifacts.Artifact) -> dict[str, LinearHead]:
    """Back from that, of a file that is checked (`schema.check`): name -> head."""
    return {
        name: LinearHead(tuple(labels), *(found.tensors[f"{name}.{part}"].float() for part in _HEAD))
        for name, labels in found.fields["labels"].items()
    }


def load_adapter(path: Path, name: str) -> Adapter:
    """Reads an adapter.

    Raises:
        ArtifactError: if it is not there, or as for `load_heads`.
    """
    artifact = _checked(path)
    labels = dict(artifact.fields.get("adapters", {})).get(name)
    if labels is None:
        raise ArtifactError(f"{path} holds no judge '{name}'; run `make judge`")
    tensors = {key.partition(":")[2]: value for key, value in artifact.tensors.items() if key.startswith(f"{name}:")}
    return Adapter.of(labels, tensors)


def _checked(path: Path) -> artifacts.Artifact:
    artifact = artifacts.load(path, KIND)
    if artifact.fields.get("encoder") != ENCODER:
        raise ArtifactError(f"{path} reads the encoder {str(artifact.fields.get('encoder'))[:60]}, expected {ENCODER}; run `make judge`")
    schema.check(artifact)
    return artifact
