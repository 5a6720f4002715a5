"""What is known of a model once it is loaded: its family, what was proved, what each stage can do, its template, the memory it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from emosteer.api.costs.memory import memory_of
from emosteer.api.support import Support, support

if TYPE_CHECKING:
    from emosteer.models.chat_templates import Template
    from emosteer.models.model import Model


@dataclass(frozen=True)
class Checked:
    """What is known of a model.

    family: its row (docs/FAMILIES.md); sizes: of `Shape`, by name; proofs: what loading proved; memory: stage -> bytes, by the arithmetic
    of docs/SCALING.md, the weights included.
    """

    name: str
    sha256: str
    architecture: str
    family: str
    parameters: int
    tensors: int
    precision: str
    device: str
    sizes: dict[str, int]
    proofs: tuple[str, ...]
    template: Template
    stages: dict[str, Support]
    memory: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return asdict(self)


def checked(model: Model) -> Checked:
    """Asks a loaded model for everything that a user wants to know before the work; proves the bridge and the fast pass on the way."""
    stages = support(model)
    weights = dict(model.hf.named_parameters())
    return Checked(
        name=model.name,
        sha256=model.sha256,
        architecture=type(model.hf).__name__,
        family=model.family.name,
        parameters=sum(weight.numel() for weight in weights.values()),
        tensors=len(weights),
        precision=model.precision.removeprefix("torch."),
        device=str(model.device),
        sizes=asdict(model.shape),
        proofs=_proofs(model, stages),
        template=model.template,
        stages=stages,
        memory=memory_of(model),
    )


def _proofs(model: Model, stages: dict[str, Support]) -> tuple[str, ...]:
    """What was proved of this model, in the words of a table."""
    found = ["every tensor is read, used and finite"]
    found += [f"the sites of {model.shape.n_layers} layers fire, and the residual stream is the sum of what is written into it"]
    found += ["output weights write what the layers write", "logits are the model's own", "the final norm's gain is what the gradient says"]
    found += ["gradients pass the packed weights"] if model.quantised else []
    found += ["the TransformerBridge has the same states, and the same effect of an edit at every site"] if model.on_bridge else []
    return (*found, *(["the fast pass writes the same logits"] if stages["generate, fast"].works else []))
