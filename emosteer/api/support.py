"""What each stage can do with a loaded model, and why not where it cannot: the table of docs/FAMILIES.md, and to ask before the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emosteer.base.errors import ModelError

if TYPE_CHECKING:
    from emosteer.models.model import Model


@dataclass(frozen=True)
class Support:
    """Whether a stage works, and what is to be said about it: under which limits, or why not."""

    works: bool
    notes: tuple[str, ...] = ()


def support(model: Model) -> dict[str, Support]:
    """Stage -> what it can do with this model. Makes and proves the bridge and the fast pass, as the stages would.

    "generate, fast" is the forward pass of `generation.lean_forward`, "generate, hooked" the one of transformers; streams are written by
    the same two.
    """
    from emosteer.export.forms import llama_form
    from emosteer.export.llamacpp import vector_hint
    from emosteer.generation.lean_forward import lean_of
    from emosteer.models.model import NO_NEURONS

    heads = () if model.family.has_neurons else (f"heads only: {NO_NEURONS}",)
    tree = () if model.on_bridge else ("in the Hugging Face model, as TransformerLens has no bridge with its sites",)
    scaled = "contributions are exact up to a factor per layer: what a sublayer writes is normed before it is added"
    scale = (scaled,) if model.family.post_norms else ()
    lean = lean_of(model) is not None
    packed = Support(False, (f"the weights are quantised ({model.quantised}); export from plain ones",)) if model.quantised else None
    return {
        "extract": Support(True, heads),
        "ablate": Support(True, (*heads, *tree, *scale)),
        "circuit": Support(True, (*heads, *tree)),
        "generate, fast": Support(lean, () if lean else ("the hooked engine writes instead",)),
        "generate, hooked": Support(True),
        "stream": Support(True),
        "export checkpoint": packed or _if_made(lambda: llama_form(model.hf.config, "float32")),
        "export llama.cpp vector": packed or _if_made(lambda: vector_hint(model.hf.config)),
    }


def _if_made(make: Callable[[], Any]) -> Support:
    """Whether an export is possible, by trying its first step."""
    try:
        make()
    except ModelError as error:
        return Support(False, (str(error),))
    return Support(True)
