"""Circuit or Directions -> SteeringPlan: constant vectors per layer and row (docs/METHOD.md section 6).

The modulation `z[h] += s * delta_bar[h]`, `mlp_post[n] += s * delta_bar[n]` adds the same amount at every position, hence a
whole circuit equals two constant vectors per layer, written where `W_O` and `W_down` write. Strength is the multiplier s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.models.hooks import Edit
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, MLP_OUT, RESID_POST, Site

STEERED_KINDS = (ATTN_OUT, MLP_OUT, RESID_POST)


@dataclass(frozen=True, eq=False)
class SteeringPlan:
    """What is added where, per row of a batch. vectors: site -> [row, d_model]; positions: "reply", those that write the reply (the last
    of the prompt and every token after it), or "all", as a bias in the weights adds it. An empty plan changes nothing."""

    vectors: Mapping[Site, Tensor]
    n_rows: int
    positions: str = "reply"

    @classmethod
    def none(cls, n_rows: int) -> SteeringPlan:
        """The plan that changes nothing."""
        return cls({}, n_rows)

    def rows(self, index: Sequence[int]) -> SteeringPlan:
        """The plan for some of the rows, in the given order."""
        return SteeringPlan({site: value[list(index)] for site, value in self.vectors.items()}, len(index), self.positions)

    def to(self, device: torch.device, dtype: torch.dtype) -> SteeringPlan:
        """The plan on a device, without the sites whose vectors are all zero (strength 0 hooks nothing)."""
        return SteeringPlan({s: v.to(device, dtype) for s, v in self.vectors.items() if v.any()}, self.n_rows, self.positions)


def compile_units(model: Model, z_delta: Tensor, mlp_delta: Tensor) -> dict[Site, Tensor]:
    """Turns unit-level contrasts into constant vectors per layer; exact in exact arithmetic.

    Args:
        z_delta: [..., layer, n_heads * d_head], zero outside the circuit; mlp_delta: [..., layer, d_mlp].

    Returns:
        attn_out and mlp_out sites -> [..., d_model], float32, only where something is added.
    """
    vectors: dict[Site, Tensor] = {}
    for layer in range(model.shape.n_layers):
        attn, mlp = z_delta[..., layer, :], mlp_delta[..., layer, :]
        if attn.any():
            vectors[Site(layer, ATTN_OUT)] = attn.to(model.device).float() @ model.w_o(layer).flatten(0, 1).float()
        if mlp.any():
            vectors[Site(layer, MLP_OUT)] = mlp.to(model.device).float() @ model.w_down(layer).float()
    return vectors


def residual_vectors(vectors: Tensor, rms: Tensor, layers: Sequence[int]) -> dict[Site, Tensor]:
    """Residual steering, the comparison method: `v_post[e]` scaled to the layer's rms, added at `resid_post` of each layer.

    Args:
        vectors: [..., layer, d_model], unit length; rms: [layer].
    """
    return {Site(layer, RESID_POST): vectors[..., layer, :] * rms[layer] for layer in layers}


def plan_for(vectors: Mapping[Site, Tensor], emotion_index: Sequence[int], strengths: Sequence[float]) -> SteeringPlan:
    """A plan whose row r adds `strengths[r]` times the vectors of emotion `emotion_index[r]` (-1 adds nothing).

    Args:
        vectors: site -> [emotion, d_model].
    """
    keep = torch.tensor([s if e >= 0 else 0.0 for e, s in zip(emotion_index, strengths, strict=True)])
    pick = [max(e, 0) for e in emotion_index]
    return SteeringPlan({site: value[pick] * keep.to(value)[:, None] for site, value in vectors.items()}, len(pick))


class Injector:
    """The edits of a plan for generation: everything the forward pass computes is shifted, but in the prompt only its last
    position, which writes the first reply token (unless the plan acts everywhere). `rows` may shrink as replies end."""

    def __init__(self, plan: SteeringPlan, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the plan to the model's device and precision."""
        self._everywhere = plan.positions == "all"
        self._vectors = {site: value[:, None] for site, value in plan.to(device, dtype).vectors.items()}
        self._whole = dict(self._vectors)

    def edits(self) -> dict[Site, Edit]:
        """Site -> edit, to be given to `Model.hooks(..., bridge=False)`."""
        return {site: self._edit(site) for site in self._vectors}

    def _edit(self, site: Site) -> Edit:
        def add(activation: Tensor) -> Tensor:
            value = self._vectors[site]
            if activation.shape[1] == 1 or self._everywhere:
                return activation + value
            shifted = activation.clone()
            shifted[:, -1:] += value
            return shifted

        return add

    def keep(self, rows: Tensor) -> None:
        """Keeps the given rows (indices into the original plan)."""
        self._vectors = {site: value[rows] for site, value in self._whole.items()}
