"""Keeping a circuit from saying the emotion's name.

What a head or neuron writes reaches the logits directly, through the unembedding. The part of it that lifts the emotion's own name
("happy") is not needed to sound happy and makes replies name the feeling. It is projected out at unit level: per layer, the smallest
change of the circuit's contrast after which what it writes is orthogonal to the name's direction, `gain * (mean W_U[names] - mean W_U)`
(less its mean where the final norm centres).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emosteer.attribution.unit_scores import written_direction
from emosteer.models.architecture import before_norm
from emosteer.models.model import Model
from emosteer.models.sites import RESID_MID, RESID_POST
from emosteer.scenarios.words import stem_pattern


def name_tokens(model: Model, emotion: str) -> list[int]:
    """Tokens that are the emotion's name in one of its forms, with or without a space before."""
    pattern = stem_pattern(emotion)
    return [token for token, text in model.token_texts.items() if pattern.fullmatch(text)]


def name_direction(model: Model, emotion: str) -> Tensor | None:
    """Direction in the residual stream that lifts the emotion's name in the logits [d_model]; None if no token is the name.

    The final norm's gain is folded in, and its centring if it has one; its scale, one positive factor per position, is not needed for a
    direction.
    """
    tokens = name_tokens(model, emotion)
    if not tokens:
        return None
    unembedding = model.unembedding.weight.float()
    direction = before_norm(model.family, model.final_norm, unembedding[tokens].mean(0) - unembedding.mean(0))
    return direction / direction.norm()


def name_directions(model: Model, emotions: Sequence[str]) -> Tensor:
    """The direction of every emotion's name [emotion, d_model], float32, on the model's device; zero where no token is the name."""
    blank = torch.zeros(model.shape.d_model, device=model.device)
    directions = [name_direction(model, emotion) for emotion in emotions]
    return torch.stack([blank if direction is None else direction.to(blank) for direction in directions])


def spare_names(model: Model, emotions: Sequence[str], z_delta: Tensor, mlp_delta: Tensor, push: float = 0.0) -> tuple[Tensor, Tensor]:
    """Takes the direct effect on each emotion's own name out of its contrast.

    Args:
        emotions: one per row; a name may stand several times. z_delta: [row, layer, n_heads * d_head], zero outside the circuit;
            mlp_delta: [row, layer, d_mlp], alike.
        push: 0 leaves no direct effect on the name; 1 turns it round where it lifts the name, so that the name is held down as much as it
            was lifted. With a push, a layer that holds the name down already stays as it is.

    Returns:
        The same shapes; entries that were zero stay zero.
    """
    z, mlp = z_delta.clone(), mlp_delta.clone()
    for emotion in dict.fromkeys(emotions):
        direction = name_direction(model, emotion)
        if direction is None:
            continue
        rows = [row for row, name in enumerate(emotions) if name == emotion]
        for layer in range(model.shape.n_layers):
            mid, post = (written_direction(model, layer, kind, direction) for kind in (RESID_MID, RESID_POST))
            of_heads, of_neurons = model.w_o(layer).flatten(0, 1).float() @ mid, model.w_down(layer).float() @ post
            for row in rows:
                z[row, layer] = _without(z[row, layer], of_heads, push)
                mlp[row, layer] = _without(mlp[row, layer], of_neurons, push)
    return z, mlp


def _without(delta: Tensor, effect: Tensor, push: float) -> Tensor:
    """The nearest delta whose summed effect is zero, or with a push no longer above zero but that much below it, without touching entries
    that are zero."""
    effect = torch.where(delta != 0, effect.to(delta), 0.0)
    length, summed = effect.square().sum(), delta @ effect
    if not length > 0 or (push and summed <= 0):
        return delta
    return delta - (1 + push) * effect * summed / length


def name_writers(model: Model, emotions: Sequence[str]) -> Tensor:
    """The direction of every head's output that lifts each emotion's own name directly, through the head's output weights.

    Shape [emotion, layer, n_heads, d_head], float32, unit length; zero where no token is the name.
    """
    shape = model.shape
    writers = torch.zeros(len(emotions), shape.n_layers, shape.n_heads, shape.d_head, device=model.device)
    for e, emotion in enumerate(emotions):
        direction = name_direction(model, emotion)
        if direction is None:
            continue
        for layer in range(shape.n_layers):
            written = model.w_o(layer).float() @ written_direction(model, layer, RESID_MID, direction).float()
            writers[e, layer] = written.to(writers) / written.norm(dim=-1, keepdim=True).clamp_min(1e-12).to(writers)
    return writers


def neurons_of_name(model: Model, emotions: Sequence[str]) -> Tensor:
    """How much every neuron lifts each emotion's own name directly, through its output weights, per unit of activation.

    Shape [emotion, layer, d_mlp], float32; zero where no token is the name.
    """
    shape = model.shape
    lifts = torch.zeros(len(emotions), shape.n_layers, shape.d_mlp, device=model.device)
    for e, emotion in enumerate(emotions):
        direction = name_direction(model, emotion)
        if direction is None:
            continue
        for layer in range(shape.n_layers):
            lifts[e, layer] = model.w_down(layer).float() @ written_direction(model, layer, RESID_POST, direction).float()
    return lifts


def without_names(model: Model, emotions: Sequence[str], z_delta: Tensor) -> Tensor:
    """Takes out of each head's contrast what lifts the emotion's own name directly, head by head, so that no gain can bring it back.

    Args:
        z_delta: [emotion, layer, n_heads * d_head].
    """
    heads = z_delta.unflatten(-1, (model.shape.n_heads, model.shape.d_head))
    writers = name_writers(model, emotions).to(heads)
    return (heads - (heads * writers).sum(-1, keepdim=True) * writers).flatten(-2)
