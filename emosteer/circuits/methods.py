"""Every way of writing that the contest compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emosteer.circuits.circuit import Circuit

NONE = "none"
PROMPTS = ("prompt-system", "prompt-tone", "prompt-stimulus")
STEERED = ("residual", "circuit")
RANDOM = ("random-heads", "random-circuit", "random-direction")
METHODS = (NONE, *PROMPTS, *STEERED, *RANDOM)
#: The method whose strengths a control takes.
CONTROL_OF = {"random-heads": "circuit", "random-circuit": "circuit", "random-direction": "residual"}


def default_strengths(circuit: Circuit, methods: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Method -> emotion -> default strength; controls have those of what they control, methods that steer nothing are left out."""
    own: Mapping[str, Sequence[float]] = {
        "circuit": circuit.strength.tolist(),
        "residual": [circuit.residual_strength] * len(circuit.emotions),
    }
    sources = {method: CONTROL_OF.get(method, method) for method in methods}
    return {
        method: {emotion: round(strength, 6) for emotion, strength in zip(circuit.emotions, own[source], strict=True)}
        for method, source in sources.items()
        if source in own
    }
