"""What a circuit adds, layer by layer, computed from a model folder's files without loading the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base.errors import ArtifactError, ModelError
from emosteer.base.files import sha256_file
from emosteer.circuits.circuit import Circuit
from emosteer.export.tensors import Stored, pieces
from emosteer.models.architecture import LLAMA
from emosteer.models.sites import ATTN_OUT, MLP_OUT, Site
from emosteer.models.weights.resolve import Weights

#: Where the two sublayers of a layer write into the residual stream.
WRITERS = {ATTN_OUT: LLAMA.w_o, MLP_OUT: LLAMA.w_down}
#: What the names of the layers' weights begin with in the files of a model folder.
LAYERS = f"{LLAMA.body}.{LLAMA.layers}"


@dataclass(frozen=True, eq=False)
class ExportRequest:
    """What is exported: the circuit of an emotion at a strength. intensity: what the strength was asked for as, if it was;
    command: what asks for it, where a command line does."""

    model: Weights
    circuit: Circuit
    path: Path
    emotion: str
    strength: float
    intensity: float | None = None
    command: str | None = None

    def facts(self) -> dict[str, Any]:
        """Names and hashes, for whoever finds the export."""
        return {
            "model": self.model.name,
            "model_sha256": self.model.sha256,
            "circuit": self.path.name,
            "circuit_sha256": sha256_file(self.path),
            "emotion": self.emotion,
            "strength": self.strength,
            "intensity": self.intensity,
            "positions": "all",
            **({"command": self.command} if self.command is not None else {}),
        }


def layer_weight(layer: int, kind: str) -> str:
    """Name of the weight by which a sublayer writes."""
    return f"{LAYERS}.{layer}.{WRITERS[kind]}.weight"


def compiled(stored: Mapping[str, Stored], steering: ExportRequest) -> dict[Site, Tensor]:
    """The constant vectors of the circuit times the strength, float32; the same that `Circuit.steering` gives of a loaded model.

    Returns:
        attn_out and mlp_out sites -> [d_model], only where something is added.

    Raises:
        ModelError: if the folder lacks a weight. ArtifactError: if the circuit's sizes are another model's, or the strength overflows.
    """
    circuit = steering.circuit
    e = circuit.index(steering.emotion)
    deltas = {ATTN_OUT: circuit.z_delta[e].float(), MLP_OUT: circuit.mlp_delta()[e].float()}
    vectors: dict[Site, Tensor] = {}
    for layer in range(circuit.z_delta.shape[1] if steering.strength else 0):
        for kind, delta in deltas.items():
            if delta[layer].any():
                vectors[Site(layer, kind)] = steering.strength * _times(stored, layer_weight(layer, kind), delta[layer])
    for site, vector in vectors.items():
        if not torch.isfinite(vector).all():
            raise ArtifactError(
                f"the circuit at strength {steering.strength} adds values that are not finite at {site}; lower the strength"
            )
    return vectors


def _times(stored: Mapping[str, Stored], name: str, delta: Tensor) -> Tensor:
    """`W @ delta` with W read in pieces. Shapes: W [d_model, width], delta [width]."""
    weight = stored.get(name)
    if weight is None:
        raise ModelError(f"the model folder holds no {name}; expected decoder layers of the Llama shape")
    if weight.shape[1:] != delta.shape:
        raise ArtifactError(f"expected a circuit of width {weight.shape[1]} for {name}, found {len(delta)}; it was made for another model")
    return torch.cat([piece.float() @ delta for piece in pieces(weight)])
