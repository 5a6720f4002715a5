"""From a model's name to a model that is ready to be steered. No torch at import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from emosteer.api.inputs import PathLike, path_of
from emosteer.api.making import ensure_circuit
from emosteer.api.steered_model import SteeredModel
from emosteer.circuits.places import ARTIFACTS, DEFAULT_MODEL, find_circuit

if TYPE_CHECKING:
    from emosteer.circuits.circuit import Circuit
    from emosteer.models.model import Model


def load(
    reference: str | Model = DEFAULT_MODEL,
    *,
    circuit: Circuit | PathLike | None = None,
    auto: bool = False,
    artifacts: PathLike = ARTIFACTS,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    control_tokens: bool = False,
) -> SteeredModel:
    """Loads a model and the circuit that steers it.

    Args:
        reference: packaged name, hub id, local folder or GGUF file; or a model in memory (`Model.from_hf`).
        circuit: in memory or as a file; else the model's own in `artifacts`, else the shipped one.
        auto: make directions and circuit, with the shipped data, where there is no circuit; they are written to `artifacts`.
        device: "auto", "cpu", "cuda", "cuda:1"; dtype: "auto", "float32", "bfloat16", "float16"; device_map: lay a large model over all
            GPUs ("auto", "balanced", "sequential").
        control_tokens: let control tokens that somebody typed in a prompt act as such; else they stay the characters that they are.

    Returns:
        The model; its `circuit` is None where there is none and `auto` is off.

    Raises:
        ModelError: if the model cannot be found or loaded. ArtifactError: if the circuit is damaged or another model's.
    """
    from emosteer.circuits.circuit import Circuit
    from emosteer.models.model import Model

    where = {"device": device, "dtype": dtype}
    model = reference if isinstance(reference, Model) else Model.load(reference, **where, device_map=device_map)
    model.control_tokens = model.control_tokens or control_tokens
    if isinstance(circuit, Circuit):
        return SteeredModel(model, circuit)
    given, root = path_of(circuit), Path(artifacts)
    ready = ensure_circuit(model, given, root, lambda: model) if auto else find_circuit(model, given, root)
    return SteeredModel(model, None if ready is None else ready[0])
