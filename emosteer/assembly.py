"""Directions and scores -> Circuit: sublayer importance, the budget over sublayers, and how faithful the result is.

METHOD section 5. Everything is measured on emotion-free prompts at t*, by really injecting and reading the last raw residual.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from emosteer import artifacts
from emosteer.activations import Sample
from emosteer.artifacts import Provenance
from emosteer.attribution import (
    UnitScores,
    contrast_scores,
    raw_scores,
    reference_directions,
    score_gradients,
    stable_band,
    top_units,
    unit_mask,
    unpacked_batch,
)
from emosteer.circuit import Circuit, overlap
from emosteer.directions import Directions
from emosteer.errors import DataError, UsageError, suggest
from emosteer.gains import GainSettings, learn_gains, without_names
from emosteer.model import Model
from emosteer.naming import spare_names
from emosteer.prompts import plain
from emosteer.scenarios import Bank, Group, spread
from emosteer.sites import MLP_POST, RESID_MID, RESID_POST, Head, Neuron, Site, Unit, Z
from emosteer.steering import compile_units

PRESETS = ("auto", "paper")
RANKINGS = ("contrast", "raw", "effect")


@dataclass(frozen=True)
class CircuitSettings:
    """How a circuit is put together.

    ranking: contrast (mean contrastive contribution at the unit's own layer), raw (the paper's form), effect (first-order effect of
    injecting the unit's contrast on the final score). head_share, neuron_share: of all units; None lets the preset decide.
    share: what `auto` must keep of the whole-model effect. spare_names: take the direct effect on the emotion's own name out of what
    the circuit adds (see `naming.py`). n_prompts: emotion-free prompts that effects are measured on.
    """

    preset: str = "auto"
    ranking: str = "contrast"
    head_share: float | None = None
    neuron_share: float | None = None
    share: float = 0.95
    spare_names: bool = True
    n_prompts: int = 6
    n_random: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("preset", self.preset, PRESETS), ("ranking", self.ranking, RANKINGS)):
            if value not in known:
                raise UsageError(f"unknown {name} '{value}'{suggest(value, known)}; expected {', '.join(known)}")
        for name, number in (("--heads", self.head_share), ("--neurons", self.neuron_share), ("--share", self.share)):
            if number is not None and not 0 <= number <= 1:
                raise UsageError(f"{name} must be a share between 0 and 1, found {number}")


#: How far the direct effect on the emotion's own name is turned round (no clean comparison of 0 and 1 was made).
NAME_PUSH = 1.0
#: Shares of heads that `auto` tries, smallest first.
AUTO_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
#: The paper's budget at Llama-3.2-3B (392 of 229,376 neurons and 168 of 672 heads), as shares; floors per sublayer; cap per sublayer.
PAPER_HEADS, PAPER_NEURONS, PAPER_FLOORS, PAPER_CAP = 0.25, 392 / 229_376, {"heads": 2, "neurons": 4}, 0.4


def prompt_samples(model: Model, groups: Sequence[Group], count: int, n_emotions: int, instruction: str) -> list[Sample]:
    """Emotion-free prompts, evenly spread over the groups, repeated once per emotion and read at t*.

    Raises:
        DataError: if there is no group.
    """
    if not groups:
        raise DataError("no scenario-event to measure on; check the scenario file")
    chosen = spread(groups, count)
    found = []
    for group in chosen:
        ids = tuple(model.prompt_ids(plain(group.text, instruction)))
        found.append(Sample(group.key, group.theme, (ids,) * n_emotions, ((),) * n_emotions))
    return found


def importance_and_effects(model: Model, samples: Sequence[Sample], directions: Directions, v_ref: Tensor) -> tuple[Tensor, UnitScores]:
    """Sublayer importance and first-order unit effects, one forward and backward pass per prompt.

    Returns:
        importance [emotion, layer, 2]: d(final score) / d(dose along v at the attention's, the MLP's output);
        effects: d(final score) when a unit's mean contrast is injected.
    """
    shape, n = model.shape, len(directions.emotions)
    importance = torch.zeros(n, shape.n_layers, 2)
    heads, neurons = torch.zeros(n, shape.n_layers, shape.n_heads), torch.zeros(n, shape.n_layers, shape.d_mlp)
    layers = range(shape.n_layers)
    sites = [Site(layer, kind) for layer in layers for kind in (Z, RESID_MID, MLP_POST, RESID_POST)]
    v = {RESID_MID: directions.at(RESID_MID), RESID_POST: directions.at(RESID_POST)}
    for sample in samples:
        found = score_gradients(model, unpacked_batch(model, [sample]), v_ref, sites)
        for site in sites:
            grad = found.grad[site][:, -1].cpu()
            if site.kind in v:
                if site.kind == RESID_MID:  # an edit there reaches the MLP alone; what attention writes also goes past it
                    grad = grad + found.grad[Site(site.layer, RESID_POST)][:, -1].cpu()
                importance[:, site.layer, int(site.kind == RESID_POST)] += (grad * v[site.kind][:, site.layer]).sum(-1)
            elif site.kind == Z:
                effect = grad * directions.z.mean[:, site.layer]
                heads[:, site.layer] += effect.unflatten(-1, (shape.n_heads, shape.d_head)).sum(-1)
            else:
                neurons[:, site.layer] += grad * directions.mlp.mean[:, site.layer]
    return importance / len(samples), UnitScores(heads / len(samples), neurons / len(samples))


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


def allocate(importance: Tensor, budget: int, floor: int, cap: float, capacity: int) -> list[int]:
    """Spreads a budget over sublayers in proportion to `max(importance, 0)`, with a floor and a cap per sublayer.

    Args:
        importance: [sublayer]; cap: as a share of the budget; capacity: units that a sublayer has.

    Returns:
        Units per sublayer; their sum is the budget, as far as caps and capacity allow.
    """
    n = len(importance)
    limit = min(capacity, max(1, int(cap * budget)))
    floor = min(floor, budget // n, limit)
    counts = [floor] * n
    weights = importance.clamp_min(0).double().tolist()
    if sum(weights) == 0:
        weights = [1.0] * n
    left = budget - floor * n
    while left > 0:
        free = [i for i in range(n) if counts[i] < limit and weights[i] > 0] or [i for i in range(n) if counts[i] < limit]
        if not free:
            break
        total = sum(weights[i] for i in free) or float(len(free))
        wanted = {i: left * (weights[i] or 1.0) / total for i in free}
        whole = {i: min(int(wanted[i]), limit - counts[i]) for i in free}
        if all(whole[i] == int(wanted[i]) for i in free):  # nobody was cut: the largest remainders get what rounding left
            open_to = [i for i in free if counts[i] + whole[i] < limit]
            for i in sorted(open_to, key=lambda i: (whole[i] - wanted[i], i))[: left - sum(whole.values())]:
                whole[i] += 1
        for i, more in whole.items():
            counts[i] += more
        left = budget - sum(counts)
    return counts


def paper_units(model: Model, scores: UnitScores, importance: Tensor, emotion: int, settings: CircuitSettings) -> list[Unit]:
    """The paper's circuit, scaled to the model in hand: budgets over sublayers by importance, filled by rank inside each."""
    shape, units = model.shape, []
    n_heads, n_neurons = shape.n_layers * shape.n_heads, shape.n_layers * shape.d_mlp
    head_share = PAPER_HEADS if settings.head_share is None else settings.head_share
    neuron_share = PAPER_NEURONS if settings.neuron_share is None else settings.neuron_share
    plan = (
        (Head, scores.heads, importance[emotion, :, 0], round(n_heads * head_share), PAPER_FLOORS["heads"], shape.n_heads),
        (Neuron, scores.neurons, importance[emotion, :, 1], round(n_neurons * neuron_share), PAPER_FLOORS["neurons"], shape.d_mlp),
    )
    for make, table, weight, budget, floor, capacity in plan:
        for layer, count in enumerate(allocate(weight, budget, floor, PAPER_CAP, capacity)):
            units += [make(layer, i) for i in table[emotion, layer].topk(count).indices.tolist()]
    return units


def auto_units(
    model: Model,
    directions: Directions,
    scores: UnitScores,
    emotion: int,
    samples: Sequence[Sample],
    v_ref: Tensor,
    settings: CircuitSettings,
) -> list[Unit]:
    """The smallest set of top-ranked heads that keeps a stated share of the effect of all heads; neurons only on request.

    FINDINGS: at reply positions the heads carry the cause, injecting every neuron's contrast alone does nothing.
    """
    neurons = round((settings.neuron_share or 0) * model.shape.n_layers * model.shape.d_mlp)
    extra = top_units(scores.neurons[emotion], neurons, Neuron)
    total = scores.heads[emotion].numel()
    if settings.head_share is not None:
        return top_units(scores.heads[emotion], max(1, round(settings.head_share * total)), Head) + extra
    sets = [top_units(scores.heads[emotion], max(1, round(share * total)), Head) for share in AUTO_SHARES]
    masks = [unit_mask(model, units) for units in sets]
    effects = injected_effect(model, samples, _compiled(model, directions, emotion, masks, settings.spare_names), v_ref)
    kept = [units for units, effect in zip(sets, effects.tolist(), strict=True) if effect >= settings.share * effects[-1].item()]
    return (kept[0] if kept and effects[-1] > 0 else sets[AUTO_SHARES.index(0.25)]) + extra


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


def _compiled(model: Model, directions: Directions, emotion: int, masks: Sequence[Mask], spare: bool) -> dict[Site, Tensor]:
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
    vectors = _compiled(model, directions, emotion, [whole, mine, rest, strongest, *randoms], settings.spare_names)
    if plain_contrast is not None:
        others = _compiled(model, plain_contrast[0], emotion, [whole, mine, rest, strongest, *randoms], plain_contrast[1])
        vectors = _at_length_of(vectors, 1, others, keep=(1, 3))
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


def _at_length_of(mine: dict[Site, Tensor], index: int, others: dict[Site, Tensor], keep: Sequence[int]) -> dict[Site, Tensor]:
    """The variants `others` [set, d_model], each scaled to the total length of variant `index` of `mine`; those of `keep` from `mine`."""

    def lengths(vectors: dict[Site, Tensor]) -> Tensor:
        return torch.stack([value.square().sum(-1) for value in vectors.values()]).sum(0).sqrt()

    scale = lengths(mine)[index] / lengths(others).clamp_min(1e-12)
    blank = next(iter(others.values())) * 0
    made = {site: others.get(site, blank) * scale[:, None] for site in {**others, **mine}}
    for site, value in made.items():
        value[list(keep)] = mine[site][list(keep)] if site in mine else 0.0
    return made


def _heads_of(model: Model) -> tuple[int, int]:
    return model.shape.n_heads, model.shape.d_head


def _with_gains(
    model: Model, directions: Directions, groups: Sequence[Group], bank: Bank, gain_settings: GainSettings, settings: CircuitSettings
) -> tuple[Directions, CircuitSettings, dict[str, Any]]:
    """Directions whose head contrasts carry the learned gains (zero for the heads left out), so that everything after reads them.

    The direct effect on the emotions' names is taken out head by head before the gains are learned, not again afterwards.
    """
    contrast = without_names(model, directions.emotions, directions.z.mean) if settings.spare_names else directions.z.mean
    found = learn_gains(model, contrast, groups, bank, directions.emotions, directions.instruction, gain_settings)
    mean = (contrast.unflatten(-1, _heads_of(model)) * found.values[..., None]).flatten(-2)
    record = {"gains": {**vars(gain_settings), "curve": list(found.curve), "margin": list(found.margin)}}
    return replace(directions, z=replace(directions.z, mean=mean)), replace(settings, spare_names=False), record


def random_units(model: Model, n_heads: int, n_neurons: int, seed: str) -> list[Unit]:
    """Heads and neurons drawn from the whole model; no unit is excluded, the circuit's own neither."""
    shape, draw = model.shape, random.Random(seed)
    heads = draw.sample(range(shape.n_layers * shape.n_heads), n_heads)
    neurons = draw.sample(range(shape.n_layers * shape.d_mlp), n_neurons)
    found: list[Unit] = [Head(i // shape.n_heads, i % shape.n_heads) for i in heads]
    return found + [Neuron(i // shape.d_mlp, i % shape.d_mlp) for i in neurons]


def assemble(
    model: Model,
    directions: Directions,
    groups: Sequence[Group],
    settings: CircuitSettings,
    *,
    data: Mapping[str, str] | None = None,
    parents: Mapping[str, str] | None = None,
    bank: Bank | None = None,
    gain_settings: GainSettings | None = None,
) -> Circuit:
    """The stage `circuit`: ranks, budgets, assembles and measures one circuit per emotion.

    Args:
        groups: scenario-events whose plain prompts effects are measured on; use train, never test.
        bank, gain_settings: with both, how much each head adds is learned (`gains.learn_gains`) and the heads that are left make the
            circuit; otherwise every head of the ranking adds its mean contrast.

    Raises:
        ArtifactError: if the directions are another model's.
    """
    artifacts.require_model(directions.provenance, model.sha256, model.name, "the directions")
    n = len(directions.emotions)
    _ = model.bridge  # made and proved now: what cannot be measured should not cost minutes of learning first
    learned: dict[str, Any] = {}
    plain_contrast = directions, settings.spare_names
    if bank is not None and gain_settings is not None and gain_settings.steps:
        directions, settings, learned = _with_gains(model, directions, groups, bank, gain_settings, settings)
    band = stable_band(directions)
    v_ref = reference_directions(directions, band)
    samples = prompt_samples(model, groups, settings.n_prompts, n, directions.instruction)
    importance, effects = importance_and_effects(model, samples, plain_contrast[0], v_ref)
    scores = (
        {"contrast": contrast_scores, "raw": raw_scores}[settings.ranking](model, directions) if settings.ranking != "effect" else effects
    )
    sets: list[list[Unit]] = []
    metrics: dict[str, Any] = {"band": list(band), "emotions": {}, **learned}
    for e, emotion in enumerate(directions.emotions):
        units: list[Unit]
        if learned:
            units = [Head(layer, head) for layer, head in directions.z.mean[e].unflatten(-1, _heads_of(model)).any(-1).nonzero().tolist()]
        elif settings.preset == "paper":
            units = paper_units(model, scores, importance, e, settings)
        else:
            units = auto_units(model, directions, scores, e, samples, v_ref[e], settings)
        if not units:
            raise UsageError("the circuit would be empty; raise --heads or --neurons")
        units.sort(key=lambda unit: -scores.of(e, unit))
        sets.append(units)
        metrics["emotions"][emotion] = faithfulness(
            model, directions, e, units, samples, v_ref[e], settings, plain_contrast if learned else None
        )
    hashes = directions.provenance.data if data is None else data
    circuit = _circuit(model, directions, sets, importance, settings, metrics, hashes, parents or {})
    metrics["overlap"] = overlap(circuit)
    return circuit


#: Strength of a ranked circuit that nobody has calibrated (2 to 4 on every model tried; learned gains are learned at strength 1);
#: residual steering in rms.
DEFAULT_STRENGTH, DEFAULT_RESIDUAL_STRENGTH = 3.0, 1.0


def _circuit(
    model: Model,
    directions: Directions,
    sets: Sequence[Sequence[Unit]],
    importance: Tensor,
    settings: CircuitSettings,
    metrics: Mapping[str, Any],
    data: Mapping[str, str],
    parents: Mapping[str, str],
) -> Circuit:
    masks = [unit_mask(model, units) for units in sets]
    z_mask, mlp_mask = torch.stack([m[0] for m in masks]), torch.stack([m[1] for m in masks])
    added = [contrasts_of(model, directions, e, mask, settings.spare_names) for e, mask in enumerate(masks)]
    z_delta, mlp_delta = torch.stack([z for z, _ in added]), torch.stack([mlp for _, mlp in added])
    index = mlp_mask.nonzero()
    heads = z_mask.unflatten(-1, (model.shape.n_heads, model.shape.d_head))[..., 0].bool()
    post = [i for i, site in enumerate(directions.sites) if site.kind == RESID_POST]
    n_layers = model.shape.n_layers
    provenance = Provenance(
        model=model.name,
        model_sha256=model.sha256,
        template_sha256=model.template_sha256,
        method=f"{'learned head gains' if 'gains' in metrics else f'{settings.preset} circuit by {settings.ranking} rank'}, "
        f"{directions.elicitation} directions",
        params={**vars(settings), "extract": directions.provenance.params},
        seed=settings.seed,
        data=dict(data),
        parents=dict(parents),
        versions=artifacts.versions(),
    )
    return Circuit(
        emotions=directions.emotions,
        heads=heads,
        z_delta=z_delta,
        neuron_index=index,
        neuron_delta=mlp_delta[tuple(index.T)],
        strength=torch.full((len(sets),), 1.0 if "gains" in metrics else DEFAULT_STRENGTH),
        importance=importance,
        vectors=directions.at(RESID_POST),
        rms=directions.rms[post],
        residual_layers=tuple(range(n_layers // 2, n_layers - max(1, n_layers // 15))),
        residual_strength=DEFAULT_RESIDUAL_STRENGTH,
        d_mlp=model.shape.d_mlp,
        preset=settings.preset,
        instruction=directions.instruction,
        metrics=metrics,
        provenance=provenance,
    )
