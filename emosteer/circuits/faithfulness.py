"""How much of the whole model's effect a circuit stands for, measured by really injecting it (docs/METHOD.md section 5)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emosteer.attribution.unit_scores import unit_mask
from emosteer.circuits.name_sparing import spare_names
from emosteer.circuits.settings import CircuitSettings
from emosteer.directions.activations import Sample
from emosteer.directions.directions import Directions
from emosteer.generation.steering import compile_units
from emosteer.models.model import Model
from emosteer.models.sites import RESID_POST, Head, Neuron, Site, Unit

#: How far the direct effect on the emotion's own name is turned round (no clean comparison of 0 and 1 was made).
NAME_PUSH = 1.0


@torch.no_grad()
def injected_effect(model: Model, samples: Sequence[Sample], vectors: Mapping[Site, Tensor], v_ref: Tensor) -> Tensor:
    """Really injects variants at t* and reads the final score.

    Args:
        vectors: site -> [variant, d_model], added to the site at t*; v_ref: [d_model].

    Returns:
        [variant], mean over prompts of the final score's change.
    """
    last = Site(model.shape.n_layers - 1, RESID_POST)
    n = next(iter(vectors.values())).shape[0] if vectors else 1
    change = torch.zeros(n)

    def adding(value: Tensor) -> Any:
        def edit(activation: Tensor) -> Tensor:
            shifted = activation.clone()
            shifted[1:, -1] += value.to(activation)
            return shifted

        return edit

    for sample in samples:
        ids = torch.tensor(sample.prompts[0], device=model.device).expand(n + 1, -1)
        hidden = model.read(ids, [last], edits={site: adding(value) for site, value in vectors.items()})[last]
        # the difference is taken before projecting: the residual's massive entries would drown a small one in bfloat16
        shift = hidden[1:, -1].float() - hidden[:1, -1].float()
        change += (shift @ v_ref.to(model.device).float()).cpu()
    return change / len(samples)


Mask = tuple[Tensor, Tensor]


def contrasts_of(model: Model, directions: Directions, emotion: int, mask: Mask, spare: bool) -> Mask:
    """What a set of units adds at strength 1: the mean contrast inside the mask, names spared if wanted.

    Returns:
        (z [layer, n_heads * d_head], mlp [layer, d_mlp]).
    """
    z, mlp = directions.z.mean[emotion] * mask[0], directions.mlp.mean[emotion] * mask[1]
    if spare:
        z, mlp = (delta[0] for delta in spare_names(model, directions.emotions[emotion : emotion + 1], z[None], mlp[None], push=NAME_PUSH))
    return z, mlp


def compiled_sets(model: Model, directions: Directions, emotion: int, masks: Sequence[Mask], spare: bool) -> dict[Site, Tensor]:
    """Sets of units, as masks, made injection variants: site -> [set, d_model]."""
    found = [contrasts_of(model, directions, emotion, mask, spare) for mask in masks]
    return compile_units(model, torch.stack([z for z, _ in found]), torch.stack([mlp for _, mlp in found]))


def faithfulness(
    model: Model,
    directions: Directions,
    emotion: int,
    units: Sequence[Unit],
    samples: Sequence[Sample],
    v_ref: Tensor,
    settings: CircuitSettings,
    plain_contrast: tuple[Directions, bool] | None = None,
) -> dict[str, Any]:
    """What the circuit stands for, against the effect of injecting every unit of the kinds that it uses.

    Args:
        units: best first.
        plain_contrast: the directions without learned gains, where `directions` carries some, and whether names are spared. Everything
            that is not the circuit then adds its plain contrast, scaled to the length of all that the circuit adds: gains would else
            only seem to be a larger dose.

    Returns:
        faithfulness: the circuit's share of the whole effect; left: the share of all other units (completeness is high when it is
        low); without_weakest: its share without its weakest quarter (minimality); random_mean, random_max: of random circuits of equal
        size; whole_effect: the change of the final score that the shares refer to.
    """
    n_heads = sum(isinstance(unit, Head) for unit in units)
    n_neurons = len(units) - n_heads
    mine = unit_mask(model, units)
    whole = torch.full_like(mine[0], float(n_heads > 0)), torch.full_like(mine[1], float(n_neurons > 0))
    rest = whole[0] - mine[0], whole[1] - mine[1]
    strongest = unit_mask(model, units[: max(1, len(units) * 3 // 4)])
    seeds = [f"{settings.seed}/{emotion}/{i}" for i in range(settings.n_random)]
    randoms = [unit_mask(model, random_units(model, n_heads, n_neurons, seed)) for seed in seeds]
    vectors = compiled_sets(model, directions, emotion, [whole, mine, rest, strongest, *randoms], settings.spare_names)
    if plain_contrast is not None:
        others = compiled_sets(model, plain_contrast[0], emotion, [whole, mine, rest, strongest, *randoms], plain_contrast[1])
        vectors = at_length_of(vectors, 1, others, keep=(1, 3))
    total, *shares = injected_effect(model, samples, vectors, v_ref).tolist()
    shares = [effect / total if total else 0.0 for effect in shares]
    return {
        "heads": n_heads,
        "neurons": n_neurons,
        "whole_effect": total,
        "faithfulness": shares[0],
        "left": shares[1],
        "without_weakest": shares[2],
        "random_mean": sum(shares[3:]) / max(1, len(randoms)),
        "random_max": max(shares[3:], default=0.0),
    }


def at_length_of(mine: dict[Site, Tensor], index: int, others: dict[Site, Tensor], keep: Sequence[int]) -> dict[Site, Tensor]:
    """The variants `others` [set, d_model], each scaled to the total length of variant `index` of `mine`; those of `keep` from `mine`."""

    def lengths(vectors: dict[Site, Tensor]) -> Tensor:
        return torch.stack([value.square().sum(-1) for value in vectors.values()]).sum(0).sqrt()

    scale = lengths(mine)[index] / lengths(others).clamp_min(1e-12)
    blank = next(iter(others.values())) * 0
    made = {site: others.get(site, blank) * scale[:, None] for site in {**others, **mine}}
    for site, value in made.items():
        value[list(keep)] = mine[site][list(keep)] if site in mine else 0.0
    return made


def random_units(model: Model, n_heads: int, n_neurons: int, seed: str) -> list[Unit]:
    """Heads and neurons drawn from the whole model; no unit is excluded, the circuit's own neither."""
    shape, draw = model.shape, random.Random(seed)
    heads = draw.sample(range(shape.n_layers * shape.n_heads), n_heads)
    neurons = draw.sample(range(shape.n_layers * shape.d_mlp), n_neurons)
    found: list[Unit] = [Head(i // shape.n_heads, i % shape.n_heads) for i in heads]
    return found + [Neuron(i // shape.d_mlp, i % shape.d_mlp) for i in neurons]
