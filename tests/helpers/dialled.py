"""A tiny model with a circuit that has a dial, made in memory in no time: random contrasts, a straight dial."""

from __future__ import annotations

from typing import Any

import torch

from emosteer.api.steered_model import SteeredModel
from emosteer.base.artifacts import Provenance
from emosteer.circuits.circuit import Circuit
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import EMOTIONS
from tests.conftest import build

#: Strength at intensity 100.
TOP = 3.0


def dialled_circuit(model: Model, emotions: tuple[str, ...] = EMOTIONS) -> Circuit:
    """Random contrasts of a third of the heads; intensity 100 is strength `TOP`, 50 half of it."""
    shape, draw = model.shape, torch.Generator().manual_seed(0)
    n = len(emotions)
    heads = torch.rand(n, shape.n_layers, shape.n_heads, generator=draw) < 1 / 3
    z = 0.5 * torch.randn(n, shape.n_layers, shape.n_heads, shape.d_head, generator=draw) * heads[..., None]
    vectors = torch.nn.functional.normalize(torch.randn(n, shape.n_layers, shape.d_model, generator=draw), dim=-1)
    curve: dict[str, Any] = {"strength": [0.0, TOP / 2, TOP], "fitted": [0.0, 0.5, 1.0], "judged": [0.0, 0.5, 1.0]}
    curve |= {"n": [1] * 3, "error": [0.1] * 3, "ratio": [1.0] * 3, "sound": [1.0] * 3, "names": [0.0] * 3}
    none: dict[str, Any] = {name: [] for name in ("strength", "judged", "n", "error", "ratio", "sound", "names", "why")}
    curve["broke"] = none
    made = {"judge": "embedded", "groups": 1, "rule": "", "default_intensity": None, "before": dict.fromkeys(emotions, 0.7)}
    return Circuit(
        emotions=emotions,
        heads=heads,
        z_delta=z.flatten(2),
        neuron_index=torch.zeros(0, 3, dtype=torch.long),
        neuron_delta=torch.zeros(0),
        strength=torch.full((n,), 0.7),
        importance=torch.zeros(n, shape.n_layers, 2),
        vectors=vectors,
        rms=torch.ones(shape.n_layers),
        residual_layers=(1,),
        residual_strength=0.5,
        d_mlp=shape.d_mlp,
        preset="auto",
        instruction="",
        metrics={"calibration": {**made, "emotions": {emotion: curve for emotion in emotions}}},
        provenance=Provenance(model.name, model.sha256, model.template_sha256, "test"),
    )


def endless_model() -> SteeredModel:
    """Such a model whose replies no token ends, so that they are long enough to be looked at."""
    model = dialled_model()
    model.model.__dict__["stop_ids"] = frozenset()
    return model


def dialled_model(family: str = "llama") -> SteeredModel:
    """A tiny model of a family with such a circuit."""
    model = build(family)
    return SteeredModel(model, dialled_circuit(model))
