"""Which heads and neurons write the emotion: the exact contribution of every unit in one pass.

docs/METHOD.md section 4. Contributions are linear in the activations, so the mean contrastive contribution of every unit follows from
the mean contrast that `extract` keeps: no forward pass per head, and none at all once the directions are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.directions.directions import Directions
from emosteer.models.architecture import before_norm, part
from emosteer.models.interventions import unit_slice
from emosteer.models.model import Model
from emosteer.models.sites import RESID_MID, RESID_POST, Head, Neuron, Unit


def written_direction(model: Model, layer: int, kind: str, vectors: Tensor) -> Tensor:
    """Residual directions as seen from where `W_O` (kind resid_mid) or `W_down` (resid_post) writes.

    The same vectors for Llama and Qwen; times the factor of Granite. Gemma and OLMo 2 norm a sublayer's output before adding it: there the
    norm's gain is folded in and its scale left out, so scores are exact up to one positive factor per layer and position.
    """
    path = model.family.attn_post_norm if kind == RESID_MID else model.family.mlp_post_norm
    seen = vectors if model.residual_factor == 1 else model.residual_factor * vectors
    return seen if path is None else before_norm(model.family, part(model.layers[layer], path), seen)


def head_contributions(model: Model, z: Tensor, v_mid: Tensor) -> Tensor:
    """`c[h] = (z[h] W_O[h]) . v_mid`: zero-ablating head h lowers the projection on v_mid at its own layer by exactly this.

    Args:
        z: [..., layer, n_heads * d_head]; v_mid: [..., layer, d_model], broadcast against z.

    Returns:
        [..., layer, head].
    """
    heads = z.unflatten(-1, (model.shape.n_heads, model.shape.d_head))
    scores = []
    for layer in range(z.shape[-2]):
        v = written_direction(model, layer, RESID_MID, v_mid[..., layer, :]).to(z)
        scores.append(torch.einsum("...hd,hdm,...m->...h", heads[..., layer, :, :], model.w_o(layer).to(z), v))
    return torch.stack(scores, dim=-2)


def neuron_contributions(model: Model, mlp_post: Tensor, v_post: Tensor) -> Tensor:
    """`c[n] = mlp_post[n] * (W_down[:, n] . v_post)`, exact like `head_contributions`.

    Args:
        mlp_post: [..., layer, d_mlp]; v_post: [..., layer, d_model].

    Returns:
        [..., layer, neuron].
    """
    scores = []
    for layer in range(mlp_post.shape[-2]):
        v = written_direction(model, layer, RESID_POST, v_post[..., layer, :]).to(mlp_post)
        scores.append(mlp_post[..., layer, :] * (v @ model.w_down(layer).T.to(mlp_post)))
    return torch.stack(scores, dim=-2)


@dataclass(frozen=True, eq=False)
class UnitScores:
    """One way of scoring every unit. heads: [emotion, layer, head]; neurons: [emotion, layer, neuron]."""

    heads: Tensor
    neurons: Tensor

    def of(self, emotion: int, unit: Unit) -> float:
        """The score of one unit."""
        table = self.heads if isinstance(unit, Head) else self.neurons
        return table[emotion, unit.layer, unit.index].item()


def contrast_scores(model: Model, directions: Directions) -> UnitScores:
    """Mean contrastive contribution of every unit over all groups (the default form)."""
    z, mlp = directions.z.mean.to(model.device), directions.mlp.mean.to(model.device)
    return _scores(model, directions, z, mlp)


def raw_scores(model: Model, directions: Directions) -> UnitScores:
    """Mean contribution of every unit in the emotional runs (the paper's form): the contrast plus what all emotions share."""
    z = (directions.z.mean + directions.z.base).to(model.device)
    mlp = (directions.mlp.mean + directions.mlp.base).to(model.device)
    return _scores(model, directions, z, mlp)


def _scores(model: Model, directions: Directions, z: Tensor, mlp: Tensor) -> UnitScores:
    v_mid, v_post = directions.at(RESID_MID).to(z), directions.at(RESID_POST).to(z)
    return UnitScores(head_contributions(model, z, v_mid).cpu(), neuron_contributions(model, mlp, v_post).cpu())


def top_units(table: Tensor, count: int, make: type[Head] | type[Neuron]) -> list[Unit]:
    """The units with the largest scores, best first. table: [layer, index]."""
    order = table.flatten().topk(min(count, table.numel())).indices.tolist()
    return [make(index // table.shape[1], index % table.shape[1]) for index in order]


def unit_mask(model: Model, units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
    """Units as 0/1 masks over `z` entries [layer, n_heads * d_head] and neurons [layer, d_mlp]."""
    shape = model.shape
    z, mlp = torch.zeros(shape.n_layers, shape.n_heads * shape.d_head), torch.zeros(shape.n_layers, shape.d_mlp)
    for unit in units:
        (z if isinstance(unit, Head) else mlp)[unit.layer, unit_slice(model, unit)] = 1
    return z, mlp
