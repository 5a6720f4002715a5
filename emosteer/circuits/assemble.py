"""Directions and scores -> Circuit: sublayer importance, the budget over sublayers, and how faithful the result is.

docs/METHOD.md section 5. Everything is measured on emotion-free prompts at t*, by really injecting and reading the last raw residual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emosteer.attribution.gradients import importance_and_effects, prompt_samples
from emosteer.attribution.unit_scores import UnitScores, contrast_scores, raw_scores, top_units, unit_mask
from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import UsageError
from emosteer.circuits.budget import learn_within_budget
from emosteer.circuits.circuit import Circuit, overlap
from emosteer.circuits.faithfulness import compiled_sets, contrasts_of, faithfulness, injected_effect
from emosteer.circuits.gains import learn_gains
from emosteer.circuits.head_outputs import learn_outputs
from emosteer.circuits.learned_residual import free_vectors, learn_residual
from emosteer.circuits.name_sparing import without_names
from emosteer.circuits.precision import chosen_dtype
from emosteer.circuits.settings import CircuitSettings, GainSettings, VectorSettings, learned_of
from emosteer.directions.activations import Sample
from emosteer.directions.directions import Directions, reference_directions, stable_band
from emosteer.models.model import Model
from emosteer.models.sites import RESID_POST, Head, Neuron, Unit
from emosteer.scenarios.scenarios import Bank, Group

#: Shares of heads that `auto` tries, smallest first.
AUTO_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
#: The paper's budget at Llama-3.2-3B (392 of 229,376 neurons and 168 of 672 heads), as shares; floors per sublayer; cap per sublayer.
PAPER_HEADS, PAPER_NEURONS, PAPER_FLOORS, PAPER_CAP = 0.25, 392 / 229_376, {"heads": 2, "neurons": 4}, 0.4


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

    At reply positions the heads carry the cause (docs/CIRCUITS.md): injecting every neuron's contrast alone does nothing.
    """
    neurons = round((settings.neuron_share or 0) * model.shape.n_layers * model.shape.d_mlp)
    extra = top_units(scores.neurons[emotion], neurons, Neuron)
    total = scores.heads[emotion].numel()
    if settings.head_share is not None:
        return top_units(scores.heads[emotion], max(1, round(settings.head_share * total)), Head) + extra
    sets = [top_units(scores.heads[emotion], max(1, round(share * total)), Head) for share in AUTO_SHARES]
    masks = [unit_mask(model, units) for units in sets]
    effects = injected_effect(model, samples, compiled_sets(model, directions, emotion, masks, settings.spare_names), v_ref)
    kept = [units for units, effect in zip(sets, effects.tolist(), strict=True) if effect >= settings.share * effects[-1].item()]
    return (kept[0] if kept and effects[-1] > 0 else sets[AUTO_SHARES.index(0.25)]) + extra


def learned_units(model: Model, directions: Directions, emotion: int, gain_settings: GainSettings | None) -> list[Unit]:
    """The heads, and within a budget the neurons, that something was learned for, of directions that hold it."""
    heads = directions.z.mean[emotion].unflatten(-1, _heads_of(model)).any(-1)
    found: list[Unit] = [Head(layer, head) for layer, head in heads.nonzero().tolist()]
    if gain_settings is not None and gain_settings.budget is not None:
        found += [Neuron(layer, neuron) for layer, neuron in directions.mlp.mean[emotion].nonzero().tolist()]
    return found


def _heads_of(model: Model) -> tuple[int, int]:
    return model.shape.n_heads, model.shape.d_head


def _with_gains(
    model: Model, directions: Directions, groups: Sequence[Group], bank: Bank, gain_settings: GainSettings, settings: CircuitSettings
) -> tuple[Directions, dict[str, Any]]:
    """Directions whose contrasts of heads, and of neurons where there is a budget for them, are what was learned (zero for what is left
    out), so that everything after reads them.

    The direct effect on the emotions' names is taken out head by head before anything is learned and kept out meanwhile, not again
    afterwards.
    """
    contrast = without_names(model, directions.emotions, directions.z.mean) if settings.spare_names else directions.z.mean
    context = (groups, bank, directions.emotions, directions.instruction, gain_settings)
    neurons = directions.mlp
    if gain_settings.budget is not None:
        mean, values, found = learn_within_budget(model, directions, contrast, settings.spare_names, groups, bank, gain_settings)
        neurons = replace(directions.mlp, mean=values)
    elif gain_settings.learn == "outputs":
        mean, found = learn_outputs(model, contrast, settings.spare_names, *context)
    else:
        found = learn_gains(model, contrast, *context)
        mean = (contrast.unflatten(-1, _heads_of(model)) * found.values[..., None]).flatten(-2)
    record = {"gains": {**vars(gain_settings), **found.trace}}
    learned = replace(directions, z=replace(directions.z, mean=mean), mlp=neurons)
    return learned, record


def _residual(
    model: Model,
    directions: Directions,
    spare: bool,
    groups: Sequence[Group],
    bank: Bank,
    gain_settings: GainSettings,
    vector_settings: VectorSettings,
) -> tuple[Tensor, dict[str, Any]]:
    """The learned residual vectors [emotion, layer of the band, d_model] and their record, beside what stands in that of the gains."""
    strength = DEFAULT_RESIDUAL_STRENGTH
    free = free_vectors(model, directions, residual_band(model.shape.n_layers), strength, spare, vector_settings)
    vectors, learned = learn_residual(model, free, groups, bank, directions, gain_settings)
    record = {**vars(vector_settings), "start": strength, **learned.trace}
    return vectors, {"learned_residual": record}


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
    vector_settings: VectorSettings | None = None,
) -> Circuit:
    """The stage `circuit`: ranks, budgets, assembles and measures one circuit per emotion.

    Args:
        groups: scenario-events whose plain prompts effects are measured on; use train, never test.
        bank, gain_settings: with both, how much each head adds is learned (`gains.learn_gains`) and the heads that are left make the
            circuit; otherwise every head of the ranking adds its mean contrast.
        vector_settings: with gains, learn residual vectors as well, on the same data in the same way, for the contest.

    Raises:
        ArtifactError: if the directions are another model's.
    """
    artifacts.require_model(directions.provenance, model.sha256, model.name, "the directions")
    n = len(directions.emotions)
    if settings.neuron_share or settings.preset == "paper":
        model.refuse_neurons("--neurons" if settings.neuron_share else "--preset paper")
    _ = model.on_bridge  # made and proved now: what cannot be measured should not cost minutes of learning first
    learned: dict[str, Any] = {}
    plain_contrast, residual = (directions, settings.spare_names), None
    if bank is not None and gain_settings is not None and gain_settings.steps:
        gain_settings = replace(gain_settings, dtype=chosen_dtype(model, gain_settings.dtype))  # once, so that both are learned alike
        directions, learned = _with_gains(model, directions, groups, bank, gain_settings, settings)
        if vector_settings is not None:
            residual, record = _residual(model, *plain_contrast, groups, bank, gain_settings, vector_settings)
            learned |= record
    spare = settings.spare_names and not learned  # what was learned has been kept from the names all along
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
            units = learned_units(model, directions, e, gain_settings)
        elif settings.preset == "paper":
            units = paper_units(model, scores, importance, e, settings)
        else:
            units = auto_units(model, directions, scores, e, samples, v_ref[e], settings)
        if not units:
            raise UsageError("the circuit would be empty; raise --heads or --neurons")
        units.sort(key=lambda unit: -scores.of(e, unit))
        sets.append(units)
        metrics["emotions"][emotion] = faithfulness(
            model, directions, e, units, samples, v_ref[e], replace(settings, spare_names=spare), plain_contrast if learned else None
        )
    hashes = directions.provenance.data if data is None else data
    circuit = replace(circuit_of(model, directions, sets, importance, settings, metrics, hashes, parents or {}), learned_residual=residual)
    metrics["overlap"] = overlap(circuit)
    return circuit


#: Strength of a ranked circuit that nobody has calibrated (2 to 4 on every model tried; learned gains are learned at strength 1);
#: residual steering in rms.
DEFAULT_STRENGTH, DEFAULT_RESIDUAL_STRENGTH = 3.0, 1.0
#: Of learned outputs that nobody has calibrated: they are learned at 1, where every reply is emotional and few still answer
#: (docs/CIRCUITS.md, blind reading of development prompts).
OUTPUT_STRENGTH = 0.7


def residual_band(n_layers: int) -> tuple[int, ...]:
    """The layers that residual steering writes to: the upper half but the last ones, and one layer at least."""
    first = n_layers // 2
    return tuple(range(first, max(first + 1, n_layers - max(1, n_layers // 15))))


def how_made(metrics: Mapping[str, Any], settings: CircuitSettings) -> str:
    """What was learned within which bounds, or ranked, for people."""
    gains = metrics.get("gains", {})
    if gains.get("budget") is None:
        what = learned_of(metrics)
        return f"learned head {what}" if what else f"{settings.preset} circuit by {settings.ranking} rank"
    units = {"both": "heads and neurons"}.get(gains["units"], gains["units"])
    return f"learned outputs of {units} within {gains['budget']:.4g} of them by {gains['select']} selection"


def circuit_of(
    model: Model,
    directions: Directions,
    sets: Sequence[Sequence[Unit]],
    importance: Tensor,
    settings: CircuitSettings,
    metrics: Mapping[str, Any],
    data: Mapping[str, str],
    parents: Mapping[str, str],
) -> Circuit:
    """Makes the value: units of every emotion, which add their contrast in `directions`. metrics: say what was learned, if anything; what
    was learned was kept from writing the names while it was (`settings.spare_names`)."""
    masks = [unit_mask(model, units) for units in sets]
    z_mask, mlp_mask = torch.stack([m[0] for m in masks]), torch.stack([m[1] for m in masks])
    what = learned_of(metrics)
    spare = settings.spare_names and what is None
    added = [contrasts_of(model, directions, e, mask, spare) for e, mask in enumerate(masks)]
    z_delta, mlp_delta = torch.stack([z for z, _ in added]), torch.stack([mlp for _, mlp in added])
    index = mlp_mask.nonzero()
    heads = z_mask.unflatten(-1, (model.shape.n_heads, model.shape.d_head))[..., 0].bool()
    post = [i for i, site in enumerate(directions.sites) if site.kind == RESID_POST]
    strengths = {"outputs": OUTPUT_STRENGTH, "gains": 1.0, None: DEFAULT_STRENGTH}
    provenance = Provenance(
        model=model.name,
        model_sha256=model.sha256,
        template_sha256=model.template_sha256,
        method=f"{how_made(metrics, settings)}, {directions.elicitation} directions",
        params={**vars(settings), "dtype": model.precision, "device": model.device.type, "extract": directions.provenance.params},
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
        strength=torch.full((len(sets),), strengths[what]),
        importance=importance,
        vectors=directions.at(RESID_POST),
        rms=directions.rms[post],
        residual_layers=residual_band(model.shape.n_layers),
        residual_strength=DEFAULT_RESIDUAL_STRENGTH,
        d_mlp=model.shape.d_mlp,
        preset=settings.preset,
        instruction=directions.instruction,
        metrics=metrics,
        provenance=provenance,
    )
