"""Statistics -> Directions: figures, evidence and the file, against a computation that keeps every state."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import ArtifactError, DegenerateDirection, UsageError
from emosteer.cli.print_artifacts import directions_summary
from emosteer.directions.activations import Sample, read_states, rows_of, tokenize_group
from emosteer.directions.contrast import HALVES, Contrasts, make_plan
from emosteer.directions.directions import Directions, Evidence, from_contrasts
from emosteer.models.model import Model
from emosteer.models.sites import MLP_POST, RESID_MID, RESID_POST, Site, Z, residual_sites
from emosteer.report import direction_figures
from emosteer.scenarios.scenarios import EMOTIONS, VALENCES, GroupKey
from tests.conftest import small_data
from tests.directions.test_contrast import all_sites, constant, made, stream

SOURCE = Provenance(model="tiny", model_sha256="ab" * 32, template_sha256="", method="test")


def finish(contrasts: Contrasts, dropped: dict[str, int] | None = None) -> Directions:
    return from_contrasts(contrasts, elicitation="reply", instruction="Be brief.", dropped=dropped or {}, provenance=SOURCE)


@pytest.fixture(scope="module")
def kept(tiny: Model) -> tuple[Contrasts, list[Sample], dict[Site, np.ndarray]]:
    """Streamed statistics beside every state they came from, site -> [group, emotion, width]."""
    groups, bank = small_data(7, seed=11)
    samples = [tokenize_group(tiny, group, "reply", EMOTIONS, bank[group.key], "") for group in groups]
    plan = make_plan([(s.key.scenario, s.theme) for s in samples], EMOTIONS, 0.3, seed=2)
    samples.sort(key=lambda s: s.key.scenario in plan.heldout)
    states = [read_states(tiny, [s], all_sites(tiny.shape.n_layers)) for s in samples]
    return stream(plan, samples, states), samples, {site: np.concatenate([s[site].double().numpy() for s in states]) for site in states[0]}


def unit(means: np.ndarray) -> np.ndarray:
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


def test_vectors_norms_and_moments_equal_the_naive_ones(tiny: Model, kept: tuple[Contrasts, list[Sample], dict[Site, np.ndarray]]) -> None:
    contrasts, _, states = kept
    found = finish(contrasts, {"no reply in the bank": 2})
    assert found.sites == residual_sites(3) and found.emotions == EMOTIONS and found.n_layers == 3
    assert (found.n_groups, found.n_heldout, found.dropped) == (21, 6, {"no reply in the bank": 2})
    for index, site in enumerate(found.sites):
        h = states[site]
        delta = h - h.mean(1, keepdims=True)
        mean = delta.mean(0)  # over all groups, held-out ones included
        np.testing.assert_allclose(found.vectors[:, index], unit(mean), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.norms[:, index], np.linalg.norm(mean, axis=-1), rtol=1e-6)
        np.testing.assert_allclose(found.base[index], h.mean((0, 1)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.rms[index], np.sqrt((h**2).mean()), rtol=1e-6)
        np.testing.assert_allclose(found.variance[:, index], delta.var(0), rtol=1e-5, atol=1e-6)
    for kind, stats in ((Z, found.z), (MLP_POST, found.mlp)):
        for layer in range(3):
            h = states[Site(layer, kind)]
            delta = h - h.mean(1, keepdims=True)
            np.testing.assert_allclose(stats.mean[:, layer], delta.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(stats.variance[:, layer], delta.var(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(stats.base[layer], h.mean((0, 1)), rtol=1e-5, atol=1e-6)
    for kind, which in ((RESID_MID, (0, 2, 4)), (RESID_POST, (1, 3, 5))):
        assert torch.equal(found.at(kind), found.vectors[:, list(which)])


def test_evidence_equals_the_naive_one(kept: tuple[Contrasts, list[Sample], dict[Site, np.ndarray]]) -> None:
    contrasts, samples, states = kept
    plan, evidence = contrasts.plan, finish(contrasts).evidence
    assert evidence is not None
    held = np.array([s.key.scenario in plan.heldout for s in samples])
    half = np.array([HALVES.index(next(n for n in plan.strata_of(s) if n in (*HALVES, "heldout")) if not h else HALVES[0])
                     for s, h in zip(samples, held, strict=True)])  # fmt: skip
    theme = np.array([s.theme for s in samples])
    valence = np.array([s.key.valence for s in samples])
    order = np.array([plan.shuffle(s) for s in samples])
    for index, site in enumerate(residual_sites(3)):
        delta = states[site] - states[site].mean(1, keepdims=True)
        shuffled = np.stack([d[o] for d, o in zip(delta, order, strict=True)])

        def cosine(of: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
            vectors = [unit(of[mask].mean(0)) for mask in masks]
            return np.mean([(a * b).sum(-1) for a, b in itertools.combinations(vectors, 2)], axis=0)

        halves = [~held & (half == 0), ~held & (half == 1)]
        np.testing.assert_allclose(evidence.halves[:, index], cosine(delta, halves), atol=1e-6)
        np.testing.assert_allclose(evidence.halves_shuffled[:, index], cosine(shuffled, halves), atol=1e-6)
        np.testing.assert_allclose(evidence.themes[:, index], cosine(delta, [theme == t for t in np.unique(theme)]), atol=1e-6)
        np.testing.assert_allclose(evidence.valences[:, index], cosine(delta, [valence == v for v in VALENCES]), atol=1e-6)
        for source, found in ((delta, evidence.accuracy), (shuffled, evidence.accuracy_shuffled)):
            guesses = (delta[held] @ unit(source[~held].mean(0)).T).argmax(-1)
            np.testing.assert_allclose(found[index], (guesses == np.arange(6)).mean(0), atol=1e-7)
    assert set(evidence.across) == {"themes", "valences"}


def test_what_there_were_no_two_of_is_not_told_as_perfect_agreement(kept: tuple[Contrasts, list[Sample], dict[Site, np.ndarray]]) -> None:
    made = finish(kept[0])
    assert made.evidence is not None
    alone = replace(made, evidence=replace(made.evidence, valences=torch.ones_like(made.evidence.valences)))
    assert set(alone.evidence.across) == {"themes"}  # type: ignore[union-attr]
    row = directions_summary(alone)["layers"][0]
    assert row["valences"] is None and isinstance(row["themes"], float)
    for found, told in ((made, True), (alone, False)):
        figure = next(figure for figure in direction_figures.evidence(found) if figure.id == "holding")
        assert ("valences" in figure.title) is told and ("Valences" in str(figure.tables[0].head)) is told


def test_a_direction_planted_in_the_model_is_recovered(tiny: Model) -> None:
    """Each emotion's vector is added to the residual stream at every position of its replies, in the middle of the real model."""
    groups, bank = small_data(8, seed=4)
    samples = [tokenize_group(tiny, group, "reply", EMOTIONS, bank[group.key], "") for group in groups]
    plan = make_plan([(s.key.scenario, s.theme) for s in samples], EMOTIONS, 0.25, seed=0)
    samples.sort(key=lambda s: s.key.scenario in plan.heldout)
    torch.manual_seed(1)
    planted = 30 * torch.randn(6, tiny.shape.d_model)
    site = Site(1, RESID_MID)

    def inject(activation: Tensor) -> Tensor:  # unpacked: one row per emotion
        return activation + planted.repeat(len(activation) // 6, 1)[:, None]

    states = [read_states(tiny, [s], all_sites(3), packed=False, edits={site: inject}) for s in samples]
    plain = [read_states(tiny, [s], all_sites(3), packed=False) for s in samples]
    truth = torch.nn.functional.normalize(planted - planted.mean(0), dim=-1)
    index = residual_sites(3).index(site)
    found = finish(stream(plan, samples, states))
    assert (found.vectors[:, index] * truth).sum(-1).min() > 0.999
    assert found.evidence is not None
    assert found.evidence.accuracy[index].min() == 1 and found.evidence.halves[:, index].min() > 0.99
    assert found.evidence.accuracy_shuffled[index].mean() < 0.5 and found.evidence.halves_shuffled[:, index].mean() < 0.8
    without = finish(stream(plan, samples, plain))
    assert (without.vectors[:, index] * truth).sum(-1).max() < 0.7
    # nothing before the planted site moved, and the exact amount arrived at it
    assert torch.equal(found.vectors[:, :index], without.vectors[:, :index])
    moved = found.vectors * found.norms[..., None] - without.vectors * without.norms[..., None]
    torch.testing.assert_close(moved[:, index], planted - planted.mean(0), rtol=1e-4, atol=1e-3)
    assert len(rows_of(samples[0], packed=False)) == 6


@pytest.mark.parametrize("emotions", [("calm", "rage"), tuple(f"mood-{i}" for i in range(8))])
def test_a_users_own_set_of_two_or_eight_emotions(tiny: Model, emotions: tuple[str, ...]) -> None:
    groups, bank = small_data(4, emotions, seed=6)
    samples = [tokenize_group(tiny, group, "reply", emotions, bank[group.key], "") for group in groups]
    plan = make_plan([(s.key.scenario, s.theme) for s in samples], emotions, 0.25, seed=0)
    samples.sort(key=lambda s: s.key.scenario in plan.heldout)
    found = finish(stream(plan, samples, [read_states(tiny, [s], all_sites(3)) for s in samples], size=3))
    assert found.emotions == emotions and found.vectors.shape == (len(emotions), 6, 32)
    torch.testing.assert_close((found.vectors * found.norms[..., None]).sum(0), torch.zeros(6, 32), rtol=0, atol=1e-4)
    if len(emotions) == 2:
        torch.testing.assert_close(found.vectors[0], -found.vectors[1], rtol=1e-5, atol=1e-6)
    assert found.index(emotions[-1]) == len(emotions) - 1
    with pytest.raises(UsageError, match=rf"unknown emotion '{emotions[0]}x' \(did you mean '{emotions[0]}'"):
        found.index(emotions[0] + "x")


# ---- what there is no evidence for -----------------------------------------------------------------------------------------


def eye(keys: list[GroupKey], holdout: float, seed: int = 0, values: Tensor | None = None) -> Contrasts:
    plan = make_plan([(key.scenario, "t") for key in keys], ("a", "b", "c"), holdout, seed)
    keys = sorted(keys, key=lambda key: key.scenario in plan.heldout)
    return stream(plan, [made(key) for key in keys], [constant(torch.eye(3, 4) if values is None else values)] * len(keys))


def test_without_held_out_groups_there_is_no_evidence_and_none_is_made_up() -> None:
    keys = [GroupKey(f"s{index}", valence) for index in range(6) for valence in VALENCES]
    assert finish(eye(keys, 0.0)).evidence is None
    assert finish(eye(keys[:1], 0.0)).evidence is None
    assert finish(eye(keys, 0.34)).evidence is not None


def test_identical_states_are_a_degenerate_direction() -> None:
    keys = [GroupKey(f"s{index}", valence) for index in range(6) for valence in VALENCES]
    with pytest.raises(DegenerateDirection):
        finish(eye(keys, 0.0, values=torch.ones(3, 4)))
    values = torch.eye(3, 4)
    values[2] = values[:2].mean(0)  # one emotion is exactly what the others are on average
    with pytest.raises(DegenerateDirection, match="an emotion equals the mean of all"):
        finish(eye(keys, 0.0, values=values))


# ---- the file ----------------------------------------------------------------------------------------------------------------


def flat(value: object, name: str = "") -> dict[str, object]:
    """Every leaf of a Directions, by path."""
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, (Site, Provenance)):
        return {k: v for field in value.__dataclass_fields__ for k, v in flat(getattr(value, field), f"{name}.{field}").items()}
    return {name: value}


def test_the_file_gives_back_every_bit(tmp_path: Path, kept: tuple[Contrasts, list[Sample], dict[Site, np.ndarray]]) -> None:
    for found in (finish(kept[0], {"some emotions have no reply": 1}), replace(finish(kept[0]), evidence=None)):
        found.save(tmp_path / "d.safetensors")
        again = Directions.load(tmp_path / "d.safetensors")
        mine, theirs = flat(found), flat(again)
        assert mine.keys() == theirs.keys() and len(mine) == (27 if found.evidence else 22)
        for name, value in mine.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype, name  # type: ignore[arg-type, attr-defined]
            else:
                assert value == theirs[name] and type(value) is type(theirs[name]), name
        again.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()
    assert set(Evidence.__dataclass_fields__) == {"accuracy", "accuracy_shuffled", "halves", "halves_shuffled", "themes", "valences"}


def test_a_file_of_another_kind_is_no_directions(tmp_path: Path) -> None:
    artifacts.save(tmp_path / "s.safetensors", "scores", {}, {"x": torch.ones(2)}, SOURCE)
    with pytest.raises(ArtifactError, match="expected an artefact of kind 'directions', found 'scores'"):
        Directions.load(tmp_path / "s.safetensors")


def test_a_directions_file_that_lacks_a_part_is_refused_in_one_line(
    tmp_path: Path, kept: tuple[Contrasts, list[Sample], dict[Site, np.ndarray]]
) -> None:
    path = tmp_path / "d.safetensors"
    finish(kept[0]).save(path)
    whole = artifacts.load(path)
    for tensors, fields in (
        ({n: t for n, t in whole.tensors.items() if n != "rms"}, whole.fields),
        ({n: t for n, t in whole.tensors.items() if n != "evidence.themes"}, whole.fields),
        (whole.tensors, {n: v for n, v in whole.fields.items() if n != "sites"}),
    ):
        artifacts.save(path, "directions", fields, tensors, whole.provenance)
        with pytest.raises(ArtifactError, match=r"d\.safetensors lacks '(rms|evidence\.themes|sites)'") as caught:
            Directions.load(path)
        assert "\n" not in str(caught.value)
