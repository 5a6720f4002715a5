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
class Course:
    """How what is added changes from token to token. vectors: site -> [emotion, d_model]; weights: [row, token, emotion], the multiplier
    of each emotion's vector, which stays what it was at the last of them."""

    vectors: Mapping[Site, Tensor]
    weights: Tensor

    def at(self, token: int) -> dict[Site, Tensor]:
        """What is added when a token of the reply is written, the first of which is 0: site -> [row, d_model]."""
        weights = self.weights[:, min(token, self.weights.shape[1] - 1), :, None]
        # one product after the other: a row's sum must not depend on how many rows there are, as that of a matrix product does
        return {site: sum((weights[:, e].to(v) * v[e] for e in range(len(v))), v.new_zeros(1, 1)) for site, v in self.vectors.items()}

    def moves_at(self, token: int) -> bool:
        """Whether another amount is added at a token than at the one before it."""
        return 0 < token < self.weights.shape[1] and not torch.equal(self.weights[:, token], self.weights[:, token - 1])

    def rows(self, index: Sequence[int]) -> Course:
        """The course of some of the rows, in the given order."""
        return Course(self.vectors, self.weights[list(index)])


@dataclass(frozen=True, eq=False)
class SteeringPlan:
    """What is added where, per row of a batch. vectors: site -> [row, d_model]; positions: "reply", those that write the reply (the last
    of the prompt and every token after it), or "all", as a bias in the weights adds it; course: how this changes over the reply, of which
    `vectors` are then those of the first token. An empty plan changes nothing."""

    vectors: Mapping[Site, Tensor]
    n_rows: int
    positions: str = "reply"
    course: Course | None = None

    @classmethod
    def none(cls, n_rows: int) -> SteeringPlan:
        """The plan that changes nothing."""
        return cls({}, n_rows)

    @classmethod
    def over(cls, course: Course) -> SteeringPlan:
        """The plan of a course."""
        return cls(course.at(0), len(course.weights), course=course if course.weights.shape[1] > 1 else None)

    def rows(self, index: Sequence[int]) -> SteeringPlan:
        """The plan for some of the rows, in the given order."""
        course = None if self.course is None else self.course.rows(index)
        return SteeringPlan({site: value[list(index)] for site, value in self.vectors.items()}, len(index), self.positions, course)

    def to(self, device: torch.device, dtype: torch.dtype) -> SteeringPlan:
        """The plan on a device, without the sites whose vectors are all zero (strength 0 hooks nothing) and stay so."""
        vectors = {s: v.to(device, dtype) for s, v in self.vectors.items() if self.course is not None or v.any()}
        return SteeringPlan(vectors, self.n_rows, self.positions, self.course)


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
        self._rows = torch.arange(plan.n_rows, device=device)

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
        self._rows = rows
        self._vectors = {site: value[rows] for site, value in self._whole.items()}

    def steer(self, vectors: Mapping[Site, Tensor], places: Sequence[int] | None = None) -> None:
        """Adds something else from now on, to all rows that are still there or to those at some places among them. vectors: site of the
        plan -> [row, d_model]."""
        rows = self._rows if places is None else self._rows[list(places)]
        for site, value in vectors.items():
            whole = self._whole[site].clone()
            whole[rows] = value.to(whole)[:, None]
            self._whole[site] = whole
        self.keep(self._rows)
