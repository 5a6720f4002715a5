"""How the final emotion score depends on activations: gradients, first-order estimates, real patches (docs/METHOD.md section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.attribution.unit_scores import UnitScores
from emosteer.base.errors import DataError
from emosteer.directions.activations import Batch, Sample, make_batch, rows_of
from emosteer.directions.directions import Directions
from emosteer.models.interventions import replace_units
from emosteer.models.model import Model
from emosteer.models.sites import MLP_POST, RESID_MID, RESID_POST, Head, Site, Unit, Z
from emosteer.scenarios.prompts import plain
from emosteer.scenarios.scenarios import Group
from emosteer.scenarios.splits import spread


def prompt_samples(model: Model, groups: Sequence[Group], count: int, n_emotions: int, instruction: str) -> list[Sample]:
    """Emotion-free prompts, evenly spread over the groups, repeated once per emotion and read at t*.

    Raises:
        DataError: if there is no group.
    """
    if not groups:
        raise DataError("no scenario-event to measure on; check the scenario file")
    chosen = spread(groups, count)
    samples = []
    for group in chosen:
        ids = tuple(model.prompt_ids(plain(group.text, instruction, group.earlier)))
        samples.append(Sample(group.key, group.theme, (ids,) * n_emotions, ((),) * n_emotions))
    return samples


def importance_and_effects(model: Model, samples: Sequence[Sample], directions: Directions, v_ref: Tensor) -> tuple[Tensor, UnitScores]:
    """Sublayer importance and first-order unit effects, one forward and backward pass per prompt.

    Returns:
        importance [emotion, layer, 2]: d(final score) / d(dose along v at the attention's, the MLP's output);
        effects: d(final score) when a unit's mean contrast is injected.
    """
    shape, n = model.shape, len(directions.emotions)
    importance = torch.zeros(n, shape.n_layers, 2)
    heads, neurons = torch.zeros(n, shape.n_layers, shape.n_heads), torch.zeros(n, shape.n_layers, shape.d_mlp)
    kinds = [Z, RESID_POST] + [RESID_MID] * (not model.family.parallel) + [MLP_POST] * model.family.has_neurons
    sites = [Site(layer, kind) for layer in range(shape.n_layers) for kind in kinds]
    v = {RESID_MID: directions.at(RESID_MID), RESID_POST: directions.at(RESID_POST)}
    for sample in samples:
        gradients = score_gradients(model, unpacked_batch(model, [sample]), v_ref, sites)
        for site in sites:
            grad = gradients.grad[site][:, -1].cpu()
            if site.kind == RESID_POST:
                importance[:, site.layer, 1] += (grad * v[RESID_POST][:, site.layer]).sum(-1)
                importance[:, site.layer, 0] += (grad * v[RESID_MID][:, site.layer]).sum(-1)  # what attention writes goes past the MLP,
            elif site.kind == RESID_MID:
                importance[:, site.layer, 0] += (grad * v[RESID_MID][:, site.layer]).sum(-1)  # and through it, but for parallel blocks
            elif site.kind == Z:
                effect = grad * directions.z.mean[:, site.layer]
                heads[:, site.layer] += effect.unflatten(-1, (shape.n_heads, shape.d_head)).sum(-1)
            else:
                neurons[:, site.layer] += grad * directions.mlp.mean[:, site.layer]
    return importance / len(samples), UnitScores(heads / len(samples), neurons / len(samples))


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of the final score, and the activations they belong to, at the read positions.

    grad, value: site -> [state, pos, width]; weights: [state, pos], the read positions' shares; scores: [state].
    """

    grad: Mapping[Site, Tensor]
    value: Mapping[Site, Tensor]
    weights: Tensor
    scores: Tensor


def final_score(model: Model, batch: Batch, hidden: Tensor, v_ref: Tensor) -> Tensor:
    """Mean over a state's read positions of the last raw residual's projection on its own v_ref.

    Args:
        hidden: last `resid_post` [row, pos, d_model]; v_ref: [state, d_model].
    """
    return (batch.average(hidden) * v_ref.to(hidden.device).float()).sum(-1)


def score_gradients(model: Model, batch: Batch, v_ref: Tensor, sites: Sequence[Site]) -> Gradients:
    """One forward and one backward pass: d final score / d activation at every site, for every state of an unpacked batch."""
    values: dict[Site, Tensor] = {}
    probes: dict[Site, Tensor] = {}
    last = Site(model.shape.n_layers - 1, RESID_POST)
    hidden: dict[Site, Tensor] = {}

    def probing(site: Site) -> Callable[[Tensor], Tensor]:
        def edit(activation: Tensor) -> Tensor:
            values[site] = activation.detach()
            probes[site] = torch.zeros_like(activation, requires_grad=True)
            return activation + probes[site]

        return edit

    def keep(activation: Tensor) -> Tensor:
        new = probing(last)(activation) if last in sites else activation
        hidden[last] = new
        return new

    edits = {**{site: probing(site) for site in sites if site != last}, last: keep}
    with torch.enable_grad():
        model.run(batch.ids, edits, attention_mask=batch.mask, position_ids=batch.positions)
        scores = final_score(model, batch, hidden[last], v_ref)
        grads = torch.autograd.grad(scores.sum(), [probes[site] for site in sites])
    return Gradients(
        {site: grad.float() for site, grad in zip(sites, grads, strict=True)},
        {site: values[site].float() for site in sites},
        batch.weights[:, 0],
        scores.detach(),
    )


def unpacked_batch(model: Model, samples: Sequence[Sample]) -> Batch:
    """A batch with one row per emotion of every group: what a gradient or a patch of one emotion must not share."""
    return make_batch(model, [row for sample in samples for row in rows_of(sample, packed=False)])


def other_emotions_mean(states: Tensor) -> Tensor:
    """Patch source: for each emotion of a group the mean state of the group's other emotions. [group, emotion, width] -> same."""
    n = states.shape[1]
    return (states.sum(1, keepdim=True) - states) / (n - 1)


def patch_source(states: Tensor, sample: Sample, site: Site, directions: Directions | None) -> Tensor:
    """The same of one group at a head or neuron site. Where it lacks emotions, their mean contrasts stand in for them, so that each emotion
    is compared with all others whatever is missing. [emotion that the group holds, width] -> same.
    """
    if not sample.emotions:
        return other_emotions_mean(states[None])[0]
    if directions is None:
        raise ValueError(f"{sample.key} lacks emotions: the directions' contrasts are needed in their place")
    stats, n = directions.z if site.kind == Z else directions.mlp, len(directions.emotions)
    base = states.mean(0) - stats.mean[list(sample.held), site.layer].mean(0).to(states)
    return (n * base - states) / (n - 1)


def held_by(samples: Sequence[Sample], n_emotions: int) -> Tensor:
    """How many of the groups hold each emotion. Shape [emotion]."""
    return torch.tensor([sum(number in sample.held for sample in samples) for number in range(n_emotions)])


def attribution_patching(
    model: Model, samples: Sequence[Sample], v_ref: Tensor, directions: Directions | None = None
) -> tuple[UnitScores, Tensor]:
    """First-order estimate, for every unit at once, of how much the final score falls when the unit's activation at all read
    positions is replaced by its mean in the group's other emotions.

    Args:
        samples: groups, computed one at a time; v_ref: [emotion, d_model]; directions: whose contrasts stand in for emotions that a
            group lacks.

    Returns:
        Estimates averaged over the groups that hold the emotion (0 where none does), and the clean final scores [group, emotion], NaN for
        emotions that a group lacks.
    """
    shape, n = model.shape, len(v_ref)
    heads = torch.zeros(n, shape.n_layers, shape.n_heads)
    neurons = torch.zeros(n, shape.n_layers, shape.d_mlp)
    kinds = [Z] + [MLP_POST] * model.family.has_neurons
    sites = [Site(layer, kind) for layer in range(shape.n_layers) for kind in kinds]
    clean = []
    for sample in samples:
        batch, held = unpacked_batch(model, [sample]), list(sample.held)
        gradients = score_gradients(model, batch, v_ref[held], sites)
        reads = (gradients.weights > 0).float()[:, :, None]
        for site in sites:
            state = torch.einsum("sp,spw->sw", gradients.weights, gradients.value[site])
            patch = patch_source(state, sample, site, directions)
            effect = ((gradients.value[site] - patch[:, None]) * gradients.grad[site] * reads).sum(1).cpu()
            if site.kind == Z:
                heads[held, site.layer] += effect.unflatten(-1, (shape.n_heads, shape.d_head)).sum(-1)
            else:
                neurons[held, site.layer] += effect
        scores = torch.full((n,), float("nan"))
        scores[held] = gradients.scores.float().cpu()
        clean.append(scores)
    count = held_by(samples, n).clamp_min(1)[:, None, None]
    return UnitScores(heads / count, neurons / count), torch.stack(clean)


@torch.no_grad()
def true_patches(
    model: Model,
    samples: Sequence[Sample],
    v_ref: Tensor,
    emotion: int,
    units: Sequence[Unit],
    directions: Directions | None = None,
    rows: int = 16,
) -> Tensor:
    """The truth that `attribution_patching` estimates: each unit really patched, one row per unit. Shape [unit], mean over groups, all of
    which hold the emotion."""
    drops = torch.zeros(len(units))
    last = Site(model.shape.n_layers - 1, RESID_POST)
    for sample in samples:
        whole, place = unpacked_batch(model, [sample]), sample.held.index(emotion)
        sites = sorted({Site(u.layer, Z if isinstance(u, Head) else MLP_POST) for u in units})
        seen = model.read(whole.ids, [*sites, last], attention_mask=whole.mask, position_ids=whole.positions)
        patch = {site: patch_source(whole.average(seen[site]), sample, site, directions)[place] for site in sites}
        clean = whole.average(seen[last])[place]
        single = Sample(sample.key, sample.theme, (sample.prompts[place],), (sample.replies[place],))
        for start in range(0, len(units), rows):
            chosen = units[start : start + rows]
            batch = unpacked_batch(model, [single] * len(chosen))
            edits = replace_units(model, [[unit] for unit in chosen], patch, positions=batch.read_mask())
            out = model.read(batch.ids, [last], edits=edits, attention_mask=batch.mask, position_ids=batch.positions)[last]
            # the difference is taken before projecting: the residual's massive entries would drown it otherwise
            drops[start : start + rows] += ((clean - batch.average(out)) @ v_ref[emotion].to(clean)).cpu()
    return drops / len(samples)
