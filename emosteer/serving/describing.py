"""What a server has, for programs and for the playground."""

from __future__ import annotations

from typing import Any

from emosteer.circuits.arcs import ARC_TOKENS
from emosteer.circuits.dial import MOST_TOGETHER
from emosteer.circuits.moods import HALF_LIFE, Personality
from emosteer.generation.decoding import Decoding
from emosteer.serving.asking import Served
from emosteer.serving.settings import ServeSettings

#: Intensities whose strengths are told.
_DIAL = (25, 50, 75, 100)


def models_of(served: Served) -> list[dict[str, Any]]:
    """The model, and one entry for each emotion at its default strength; intensities and mixtures can be named, too."""
    names = [served.name, *(f"{served.name}:{emotion}" for emotion in served.circuit.emotions)]
    return [{"id": name, "object": "model", "created": 0, "owned_by": "emosteer"} for name in names]


def described(served: Served, settings: ServeSettings) -> dict[str, Any]:
    """What the circuit knows, its dial, its heads by layer, and the server's usual settings."""
    circuit, shape = served.circuit, served.model.shape
    size = circuit.z_delta.float().unflatten(2, (shape.n_heads, shape.d_head)).norm(dim=-1)  # [emotion, layer, head]
    emotions = []
    for index, emotion in enumerate(circuit.emotions):
        dial = {str(i): circuit.strength_at(emotion, i) for i in _DIAL} if _has_dial(served, emotion) else None
        heads = [[layer, head, round(size[index, layer, head].item(), 4)] for layer, head in circuit.heads[index].nonzero().tolist()]
        emotions.append({"name": emotion, "default_strength": circuit.default_strength(emotion), "dial": dial, "heads": heads})
    return {
        "model": served.name,
        "layers": shape.n_layers,
        "heads": shape.n_heads,
        "context": shape.context,
        "emotions": emotions,
        "most_together": MOST_TOGETHER,
        "arc_tokens": ARC_TOKENS,
        "half_life": HALF_LIFE,
        "traits": list(vars(Personality())),
        "instruction": circuit.instruction,
        "max_tokens": served.longest,
        "usual": {**Decoding.usual().shaping, "max_tokens": min(served.longest, Decoding.max_new_tokens)},
        "needs_key": settings.api_key is not None,
    }


def _has_dial(served: Served, emotion: str) -> bool:
    return served.circuit.calibrated and len(served.circuit.metrics["calibration"]["emotions"][emotion]["strength"]) > 1
