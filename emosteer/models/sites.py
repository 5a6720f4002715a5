"""Places in a transformer: sites, heads and neurons as frozen, ordered, printable values. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from emosteer.base.errors import UsageError

RESID_MID = "resid_mid"
RESID_POST = "resid_post"
Z = "z"
MLP_POST = "mlp_post"
ATTN_OUT = "attn_out"
MLP_OUT = "mlp_out"

#: resid_mid: residual stream after attention; in parallel blocks, whose MLP does not read it, it can be read and not changed.
#: resid_post: after the MLP, before any final norm.
#: z: attention output per head before W_O, heads side by side. mlp_post: neurons after the gate, before W_down; of width 0 in mixtures of
#: experts. attn_out, mlp_out: what W_O and W_down write, biases included, before any post-norm (Gemma) or factor (Granite).
KINDS = (RESID_MID, RESID_POST, Z, MLP_POST, ATTN_OUT, MLP_OUT)


@dataclass(frozen=True, order=True)
class Site:
    """One kind of activation at one layer, e.g. ``Site(3, "resid_mid")``, printed ``L3.resid_mid``."""

    layer: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown site kind {self.kind!r}; known: {', '.join(KINDS)}")

    def __str__(self) -> str:
        return f"L{self.layer}.{self.kind}"


@dataclass(frozen=True, order=True)
class Head:
    """One attention head, printed ``L3H7``."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"


@dataclass(frozen=True, order=True)
class Neuron:
    """One MLP neuron, printed ``L3N1024``."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}N{self.index}"


Unit = Head | Neuron


def parse_site(text: str) -> Site:
    """Reads ``L3.resid_mid`` back into a Site.

    Raises:
        UsageError: if the text is not a site.
    """
    match = re.fullmatch(r"L(\d+)\.(\w+)", text)
    if not match or match[2] not in KINDS:
        raise UsageError(f"expected a site such as 'L3.resid_mid', found {text!r}")
    return Site(int(match[1]), match[2])


def residual_sites(n_layers: int) -> tuple[Site, ...]:
    """All residual-stream sites in the order in which the model writes them: mid then post, layer by layer."""
    return tuple(Site(layer, kind) for layer in range(n_layers) for kind in (RESID_MID, RESID_POST))
