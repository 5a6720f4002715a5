"""The stage `ablate`: Directions -> Scores of every head and neuron, the checks that they are right, and the curves."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.attribution.curves import curves, require_prompts
from emosteer.attribution.gradients import attribution_patching, held_by, importance_and_effects, prompt_samples, true_patches
from emosteer.attribution.scores import Scores
from emosteer.attribution.settings import AblateSettings, CurveSettings
from emosteer.attribution.unit_scores import UnitScores, contrast_scores, raw_scores, top_units
from emosteer.attribution.verification import verify
from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import DataError, EmosteerError
from emosteer.base.files import sha256_text
from emosteer.base.pieces import gather
from emosteer.base.processes import ALONE, Crew
from emosteer.base.progress import bar, note
from emosteer.directions.activations import Sample, tokenize_group
from emosteer.directions.directions import Directions, reference_directions, stable_band
from emosteer.models.model import NO_NEURONS, Model
from emosteer.models.sites import Head, Neuron, Unit
from emosteer.scenarios.prompts import plain
from emosteer.scenarios.scenarios import Bank, Group, replies_of
from emosteer.scenarios.splits import spread

#: Errors of a contribution that rounding explains, in shares of the prompt's largest drop: in float32, where 2e-6 is usual, and below.
EXACT, EXACT_IN_HALF = 1e-3, 0.1


def ablate(
    model: Model,
    directions: Directions,
    groups: Sequence[Group],
    settings: AblateSettings,
    *,
    bank: Bank | None = None,
    partial: Path | None = None,
    data: Mapping[str, str] | None = None,
    parents: Mapping[str, str] | None = None,
    crew: Crew = ALONE,
) -> Scores:
    """Scores every unit in four ways, checks them by intervening, and measures the curves.

    Args:
        groups: scenario-events (train); bank: their replies, for the `reply` elicitation; partial: where finished curve points are
            kept, so that a rerun goes on; data, parents: hashes for the provenance; crew: the processes that share the groups and the
            points of the curves, which need `partial` on a disk that all see.

    Raises:
        ShareDone: in every process but the first, once its share is done.
        ArtifactError: if the directions are another model's. DataError: if an emotion has no reply beside one in another.
    """
    artifacts.require_model(directions.provenance, model.sha256, model.name, "the directions")
    wanted = _curves_of(model, settings.curves)
    if wanted is not None:
        require_prompts(groups, wanted)
    band = stable_band(directions)
    v_ref = reference_directions(directions, band)
    forms = {"contrast": contrast_scores(model, directions), "raw": raw_scores(model, directions)}
    team = _Team(model, directions, v_ref, crew, None if partial is None else pieces_of(partial))
    with bar("ablate (steps)", 4) as advance:
        prompts = prompt_samples(model, groups, settings.effect_prompts, len(directions.emotions), directions.instruction)
        importance, forms["effect"] = team.importance_and_effects(prompts)
        advance(1)
        samples = compared_groups(model, directions, groups, bank, settings.patch_groups) if settings.patch_groups else []
        if samples:
            forms["patch"] = team.attribution_patching(samples, "patch")
        advance(1)
        patches = _patches(team, forms["patch"], samples, settings) if samples and settings.true_units else {}
        advance(1)
        checked = _verify(model, directions, groups, settings) if crew.lead else {}
        advance(1)
    rows = curves(model, directions, forms["contrast"], groups, band, wanted, partial=partial, crew=crew) if wanted else []
    crew.finish()
    provenance = Provenance(
        model=model.name,
        model_sha256=model.sha256,
        template_sha256=model.template_sha256,
        method="one-pass contributions, attribution patching, ablation and enhancement curves",
        params={
            **{**vars(replace(settings, curves=None)), "curves": vars(wanted) if wanted else None},
            **{"dtype": model.precision, "device": model.device.type},
        },
        seed=settings.seed,
        data=dict(data or {}),
        parents=dict(parents or {}),
        versions=artifacts.versions(),
    )
    return Scores(directions.emotions, forms, importance, band, checked, patches, rows, provenance)


def _curves_of(model: Model, wanted: CurveSettings | None) -> CurveSettings | None:
    """The curves that a model can have: where there are no neurons, none of neurons."""
    if wanted is None or not wanted.neuron_shares or model.family.has_neurons:
        return wanted
    note(f"curves of {model.name} are of heads only: {NO_NEURONS}")
    return replace(wanted, neuron_shares=())


def compared_groups(model: Model, directions: Directions, groups: Sequence[Group], bank: Bank | None, count: int) -> list[Sample]:
    """Groups that compare emotions, evenly spread, as token ids under the directions' own elicitation: complete ones, and where there are
    too few, those that lack an emotion; more than `count` where an emotion would have none."""
    order, emotions = spread(groups, len(groups)), directions.emotions
    if directions.elicitation == "reply":
        held = {group.key: replies_of(bank, group, emotions) for group in order}
        order = sorted((group for group in order if len(held[group.key]) > 1), key=lambda group: len(held[group.key]) < len(emotions))
    else:
        held = {group.key: dict.fromkeys(emotions, "") for group in order}
    chosen, lacking = order[:count], set(emotions)
    lacking -= {emotion for group in chosen for emotion in held[group.key]}
    for group in order[count:]:
        if lacking & held[group.key].keys():
            chosen.append(group)
            lacking -= held[group.key].keys()
    if lacking:
        raise DataError(
            f"no scenario-event has a reply in {', '.join(sorted(lacking))} and in another emotion; give the bank that the directions were "
            "made with (--replies)"
        )
    return [tokenize_group(model, g, directions.elicitation, emotions, held[g.key], directions.instruction) for g in chosen]


def pieces_of(partial: Path) -> Path:
    """The folder in which several processes keep the groups' scores, beside the finished points of the curves."""
    return partial.with_name(partial.name + ".pieces")


@dataclass(frozen=True, eq=False)
class _Team:
    """What is averaged over groups, group by group: shared by the processes, added up in the groups' order."""

    model: Model
    directions: Directions
    v_ref: Tensor
    crew: Crew
    folder: Path | None

    def importance_and_effects(self, prompts: Sequence[Sample]) -> tuple[Tensor, UnitScores]:
        """As `gradients.importance_and_effects`, the prompts shared by the processes."""

        def one(sample: Sample) -> dict[str, Tensor]:
            importance, effects = importance_and_effects(self.model, [sample], self.directions, self.v_ref)
            return {"importance": importance, "heads": effects.heads, "neurons": effects.neurons}

        means = self._mean("effect", prompts, one)
        return means["importance"], UnitScores(means["heads"], means["neurons"])

    def attribution_patching(self, samples: Sequence[Sample], name: str) -> UnitScores:
        """As `gradients.attribution_patching`, the groups shared by the processes."""

        def one(sample: Sample) -> dict[str, Tensor]:
            scores, _ = attribution_patching(self.model, [sample], self.v_ref, self.directions)
            return {"heads": scores.heads, "neurons": scores.neurons}

        means = self._mean(name, samples, one)
        share = held_by(samples, len(self.v_ref)).clamp_min(1)[:, None, None] / len(samples)  # the mean is over those that hold the emotion
        return UnitScores(means["heads"] / share, means["neurons"] / share)

    def true_patches(self, samples: Sequence[Sample], emotion: int, units: Sequence[Unit]) -> Tensor:
        """As `gradients.true_patches`, the groups shared by the processes."""

        def one(sample: Sample) -> dict[str, Tensor]:
            return {"drops": true_patches(self.model, [sample], self.v_ref, emotion, units, self.directions)}

        name = f"true-{sha256_text(json.dumps([emotion, [str(unit) for unit in units]]))[:12]}"
        return self._mean(name, samples, one)["drops"]

    def _mean(self, name: str, samples: Sequence[Sample], one: Callable[[Sample], dict[str, Tensor]]) -> dict[str, Tensor]:
        origin = [self.directions.provenance.origin(), self.model.sha256, self.model.precision, torch.__version__]
        tokens = [[str(s.key), s.prompts, s.replies, s.held] for s in samples]
        fingerprint = sha256_text(json.dumps([name, origin, tokens], sort_keys=True, default=str))
        pieces = gather(self.crew, self.folder, name, fingerprint, len(samples), lambda index: one(samples[index]))
        total = {key: torch.zeros_like(value) for key, value in pieces[0].items()}
        for piece in pieces:
            for key in total:
                total[key] += piece[key]
        return {key: value / len(samples) for key, value in total.items()}


def _patches(team: _Team, estimates: UnitScores, samples: Sequence[Sample], settings: AblateSettings) -> dict[str, Any]:
    """Really patches the best units of one emotion per group set and a random sample, and compares with the estimate on the same groups."""
    units: list[Unit] = []
    shape = team.model.shape
    count = min(settings.true_units, shape.n_layers * (shape.n_heads + shape.d_mlp))
    half = count // 2
    draw = random.Random(f"{settings.seed}/patches")
    emotion = draw.randrange(len(team.directions.emotions))
    patched = [sample for sample in samples if emotion in sample.held][: settings.true_groups]
    local = team.attribution_patching(patched, "patch-some")
    units += top_units(estimates.heads[emotion], half // 2, Head) + top_units(estimates.neurons[emotion], half - half // 2, Neuron)
    kinds = [(make, size) for make, size in ((Head, shape.n_heads), (Neuron, shape.d_mlp)) if size]
    while len(units) < count:
        make, size = draw.choice(kinds)
        unit = make(draw.randrange(shape.n_layers), draw.randrange(size))
        if unit not in units:
            units.append(unit)
    truth = team.true_patches(patched, emotion, units)
    estimate = torch.tensor([local.of(emotion, unit) for unit in units])
    return {
        "emotion": team.directions.emotions[emotion],
        "units": [str(unit) for unit in units],
        "estimate": estimate.tolist(),
        "truth": truth.tolist(),
        "correlation": _correlation(estimate, truth),
        "correlation_random": _correlation(estimate[half:], truth[half:]),
        "groups": len(patched),
        "patched": {
            "groups": len(samples),
            "incomplete": sum(bool(sample.emotions) for sample in samples),
            "replies": dict(zip(team.directions.emotions, held_by(samples, len(team.v_ref)).tolist(), strict=True)),
        },
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def _verify(model: Model, directions: Directions, groups: Sequence[Group], settings: AblateSettings) -> dict[str, Any]:
    """The one-pass check; models whose sublayer outputs are normed (Gemma) are exact only up to a factor and are left out."""
    if not settings.verify_prompts:
        return {}
    if model.spread:
        return {"skipped": "the model lies on several devices, and the check runs single layers on the CPU"}
    if model.family.post_norms:
        return {"skipped": "this architecture norms a sublayer's output before adding it: contributions are exact up to a factor per layer"}
    prompts = [model.prompt_ids(plain(g.text, directions.instruction, g.earlier)) for g in spread(groups, settings.verify_prompts)]
    try:
        found = verify(model, directions, prompts, settings.verify_neurons, settings.seed)
    except (RuntimeError, MemoryError) as error:
        raise EmosteerError(f"the check against real ablation failed ({error}); leave it out with --verify-prompts 0") from error
    require_exact(found, model.dtype, model.quantised)
    return found


def require_exact(found: Mapping[str, Any], dtype: torch.dtype, quantised: str | None = None) -> None:
    """Refuses scores that real ablation does not bear out.

    Args:
        found: what `verify` returned; dtype: of the pass whose contributions were compared; quantised: how its weights are, if they are:
            8-bit maps round activations too, about as half precision does.

    Raises:
        EmosteerError: if a contribution is off by more than rounding explains (`EXACT`, `EXACT_IN_HALF`).
    """
    bound = EXACT if dtype is torch.float32 and quantised is None else EXACT_IN_HALF
    for kind in ("heads", "neurons"):
        error = found[kind]["max_error_to_largest"] if kind in found else 0.0
        if not error <= bound:
            raise EmosteerError(
                f"one-pass contributions of {kind} differ from real ablation by {error:.1e} of the largest drop (expected at most "
                f"{bound:g}): the scores would be wrong for this model, and nothing was written; please report it, or leave the check "
                "out with --verify-prompts 0"
            )
