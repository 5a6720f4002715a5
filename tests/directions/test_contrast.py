"""Streaming statistics equal a naive computation that keeps every state."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from emosteer.base.errors import DegenerateDirection
from emosteer.directions.activations import Sample, read_states, tokenize_group
from emosteer.directions.contrast import HALVES, HELDOUT, MAX_THEMES, SHUFFLED, Contrasts, Plan, as_json, make_plan, unit_vectors
from emosteer.models.model import Model
from emosteer.models.sites import MLP_POST, Site, Z, residual_sites
from emosteer.scenarios.scenarios import EMOTIONS, VALENCES, GroupKey
from tests.conftest import small_data

States = dict[Site, Tensor]


@dataclass(frozen=True, eq=False)
class World:
    """A random model's states, every one of them kept: per group site -> [1, emotion, width], held-out groups last."""

    model: Model
    plan: Plan
    samples: list[Sample]
    states: list[States]

    def contrasts(self, order: Sequence[int] | None = None, size: int = 1) -> Contrasts:
        """Streamed in batches of `size` groups."""
        return stream(self.plan, self.samples, self.states, order, size)


def stream(plan: Plan, samples: Sequence[Sample], states: Sequence[States], order: Sequence[int] | None = None, size: int = 1) -> Contrasts:
    first = states[0]
    layers = max(site.layer for site in first) + 1
    found = Contrasts(plan, layers, *(first[Site(0, kind)].shape[-1] for kind in ("resid_mid", Z, MLP_POST)))
    order = list(range(len(samples)) if order is None else order)
    for start in range(0, len(order), size):
        some = order[start : start + size]
        found.update([samples[i] for i in some], {site: torch.cat([states[i][site] for i in some]) for site in first})
    return found


def all_sites(n_layers: int) -> list[Site]:
    return [*residual_sites(n_layers), *(Site(layer, kind) for layer in range(n_layers) for kind in (Z, MLP_POST))]


@pytest.fixture(scope="module")
def world(tiny: Model) -> World:
    groups, bank = small_data(8, seed=3)
    samples = [tokenize_group(tiny, group, "reply", EMOTIONS, bank[group.key], "") for group in groups]
    plan = make_plan([(s.key.scenario, s.theme) for s in samples], EMOTIONS, 0.25, seed=5)
    samples.sort(key=lambda s: s.key.scenario in plan.heldout)
    return World(tiny, plan, samples, [read_states(tiny, [s], all_sites(tiny.shape.n_layers)) for s in samples])


def deltas(world: World, site: Site) -> np.ndarray:
    """[group, emotion, width] contrasts of one site, in float64."""
    kept = np.concatenate([state[site].double().numpy() for state in world.states])
    return kept - kept.mean(1, keepdims=True)


def half_of(world: World, sample: Sample) -> int | None:
    """Which half a group falls into; None for the held-out ones."""
    names = world.plan.strata_of(sample)
    assert (HELDOUT in names) == (sample.key.scenario in world.plan.heldout)
    return next((HALVES.index(name) for name in names if name in HALVES), None)


def naive_mean(world: World, site: Site, wanted: Sequence[bool], shuffle: bool = False) -> np.ndarray:
    """Mean contrast over the wanted groups, added up one by one."""
    rows = []
    for sample, delta, want in zip(world.samples, deltas(world, site), wanted, strict=True):
        if want:
            rows.append(delta[world.plan.shuffle(sample)] if shuffle else delta)
    return np.mean(rows, axis=0)


def close(found: Tensor, expected: np.ndarray) -> None:
    """To 1e-9 of the largest entry."""
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


# ---- equal to the naive computation ------------------------------------------------------------------------------------


def test_the_world_is_a_fair_test(world: World) -> None:
    halves = [half_of(world, sample) for sample in world.samples]
    assert halves.count(0) >= 3 and halves.count(1) >= 3 and halves.count(None) == 6
    assert world.plan.themes == ("theme0", "theme1", "theme2") and len(world.samples) == 24
    orders = {tuple(world.plan.shuffle(sample)) for sample in world.samples}
    assert len(orders) > 20 and all(sorted(order) == list(range(6)) for order in orders)


@pytest.mark.parametrize("size", [1, 5, 18])
def test_means_of_every_stratum_equal_the_naive_ones(world: World, size: int) -> None:
    found = world.contrasts(size=size)
    halves = [half_of(world, sample) for sample in world.samples]
    members: dict[str, list[bool]] = {name: [half == index for half in halves] for index, name in enumerate(HALVES)}
    members[HELDOUT] = [half is None for half in halves]
    members |= {f"theme:theme{t}": [s.theme == f"theme{t}" for s in world.samples] for t in range(3)}
    members |= {f"valence:{v}": [s.key.valence == v for s in world.samples] for v in VALENCES}
    assert set(world.plan.strata) == {*members, *SHUFFLED}
    for index, site in enumerate(residual_sites(world.model.shape.n_layers)):
        for name, wanted in members.items():
            close(found.mean(name)[:, index], naive_mean(world, site, wanted))
        for half, name in enumerate(SHUFFLED):
            close(found.mean(name)[:, index], naive_mean(world, site, [h == half for h in halves], shuffle=True))
        close(found.mean(*HALVES, HELDOUT)[:, index], naive_mean(world, site, [True] * 24))
        close(found.mean(*HALVES)[:, index], naive_mean(world, site, [h is not None for h in halves]))


def test_second_moment_base_and_rms_equal_the_naive_ones(world: World) -> None:
    found = world.contrasts(size=4)
    assert found.n_groups == 24
    for index, site in enumerate(residual_sites(world.model.shape.n_layers)):
        kept = np.concatenate([state[site].double().numpy() for state in world.states])
        close(found.sums["resid_sq"][:, index], (deltas(world, site) ** 2).sum(0))
        close(found.sums["resid_base"][index] / 24, kept.reshape(-1, kept.shape[-1]).mean(0))
        np.testing.assert_allclose((found.sums["resid_rms"][index] / 24).sqrt().item(), np.sqrt((kept**2).mean()), rtol=1e-9)


@pytest.mark.parametrize("kind", [Z, MLP_POST])
def test_unit_statistics_equal_the_naive_ones(world: World, kind: str) -> None:
    mean, variance, base = world.contrasts(size=7).moments(kind)
    for layer in range(world.model.shape.n_layers):
        delta = deltas(world, Site(layer, kind))
        kept = np.concatenate([state[Site(layer, kind)].double().numpy() for state in world.states])
        close(mean[:, layer], delta.mean(0))
        close(variance[:, layer], delta.var(0))
        close(base[layer], kept.mean((0, 1)))


def test_held_out_groups_are_named_by_the_directions_of_the_others(world: World) -> None:
    found = world.contrasts(size=6)
    halves = [half_of(world, sample) for sample in world.samples]
    for index, site in enumerate(residual_sites(world.model.shape.n_layers)):
        delta = deltas(world, site)
        for which, shuffle in enumerate((False, True)):
            means = naive_mean(world, site, [half is not None for half in halves], shuffle=shuffle)
            vectors = means / np.linalg.norm(means, axis=-1, keepdims=True)
            right = np.zeros(6)
            for group, half in enumerate(halves):
                if half is None:
                    for emotion in range(6):
                        right[emotion] += np.argmax([delta[group, emotion] @ vector for vector in vectors]) == emotion
            assert found.sums["correct"][which, index].tolist() == right.tolist(), (site, which)
    assert 0 < found.sums["correct"].sum() < 2 * 6 * 6 * 6


# ---- order, batches, checkpoints ---------------------------------------------------------------------------------------


def same_sums(first: Contrasts, second: Contrasts) -> None:
    assert set(first.state()) == set(second.state())
    for name, value in first.sums.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(second.sums[name], value, rtol=1e-9, atol=1e-9 * scale, msg=name)


def test_the_order_and_the_size_of_batches_do_not_matter(world: World) -> None:
    base = world.contrasts()
    fit = [i for i, sample in enumerate(world.samples) if half_of(world, sample) is not None]
    held = [i for i in range(24) if i not in fit]
    for seed, size in ((0, 1), (1, 3), (2, 6)):
        draw = random.Random(seed)
        order = draw.sample(fit, len(fit)) + draw.sample(held, len(held))
        same_sums(base, world.contrasts(order, size))


def test_a_checkpoint_in_the_middle_gives_the_same_bits(world: World) -> None:
    whole = world.contrasts(size=2)
    half = world.contrasts(range(10), size=2)
    saved = {name: value.clone() for name, value in half.state().items()}
    other = stream(world.plan, world.samples[:1], world.states[:1])
    other.restore(saved)
    for start in range(10, 24, 2):
        some = range(start, start + 2)
        other.update([world.samples[i] for i in some], {s: torch.cat([world.states[i][s] for i in some]) for s in world.states[0]})
    assert all(torch.equal(other.state()[name], value) for name, value in whole.state().items())
    assert all(torch.equal(half.state()[name], value) for name, value in saved.items())  # going on did not write into it


def test_memory_does_not_grow_with_the_number_of_groups(world: World) -> None:
    def numbers(contrasts: Contrasts) -> int:
        return sum(value.numel() for value in contrasts.state().values())

    assert numbers(world.contrasts()) == numbers(world.contrasts(range(1)))


# ---- groups and strata ---------------------------------------------------------------------------------------------------


def made(key: GroupKey, theme: str = "t", n: int = 3) -> Sample:
    return Sample(key, theme, ((1,),) * n, ((),) * n)


def constant(values: Tensor, d: int = 4) -> States:
    """States of one group of a one-layer model whose every site holds `values` [emotion, d]."""
    assert values.shape[-1] == d
    return {site: values[None] for site in all_sites(1)}


def test_every_valence_of_a_scenario_counts() -> None:
    """Keyed by scenario alone, one of these three groups would be all that is left."""
    plan = make_plan([("s0", "t")], ("a", "b", "c"), 0.0, seed=0)
    values = [torch.eye(3, 4) * scale for scale in (1.0, 10.0, 100.0)]
    samples = [made(GroupKey("s0", valence)) for valence in VALENCES]
    found = stream(plan, samples, [constant(value) for value in values])
    assert found.n_groups == 3
    contrast = torch.eye(3, 4, dtype=torch.float64)
    contrast[:, :3] -= 1 / 3
    half = next(name for name in HALVES if name in plan.strata_of(samples[0]))  # all valences of a scenario share a half
    close(found.mean(half)[:, 0], (37 * contrast).numpy())
    for valence, scale in zip(VALENCES, (1.0, 10.0, 100.0), strict=True):
        close(found.mean(f"valence:{valence}")[:, 1], (scale * contrast).numpy())


def test_held_out_scenarios_never_leak_into_the_directions_that_name_them() -> None:
    """Held-out groups are a thousand times stronger and have their labels turned round: the slightest leak would name them right."""
    names = [f"s{index}" for index in range(20)]
    plan = make_plan([(name, "t") for name in names], ("a", "b", "c"), 0.2, seed=1)
    assert len(plan.heldout) == 4
    keys = sorted((GroupKey(name, valence) for name in names for valence in VALENCES), key=lambda key: key.scenario in plan.heldout)
    truth = torch.eye(3, 4)
    states = [constant(1000 * truth.roll(1, 0) if key.scenario in plan.heldout else truth) for key in keys]
    found = stream(plan, [made(key) for key in keys], states, size=6)
    assert found.sums["count"][plan.strata.index(HELDOUT)] == 12
    assert found.sums["correct"][0].abs().max() == 0
    fair = stream(plan, [made(key) for key in keys], [constant(truth)] * len(keys), size=6)
    assert fair.sums["correct"][0].tolist() == [[12.0] * 3] * 2
    for name in (*HALVES, *SHUFFLED):  # nothing of the held-out groups is in the halves or in their controls
        assert found.mean(name).abs().max() <= 2 / 3 + 1e-9


def test_a_planted_direction_is_recovered_and_shuffled_labels_do_not_find_it() -> None:
    """h = what the group says + emotion's vector + noise: 30 times smaller than the group's own part, at the noise's size."""
    torch.manual_seed(0)
    d, n, scenarios = 64, 6, 100
    planted = torch.randn(n, d)
    expected = unit_vectors((planted - planted.mean(0)).double())
    names = [f"s{index}" for index in range(scenarios)]
    plan = make_plan([(name, "t") for name in names], [f"e{index}" for index in range(n)], 0.2, seed=0)
    keys = sorted((GroupKey(name, valence) for name in names for valence in VALENCES), key=lambda key: key.scenario in plan.heldout)
    states = [constant(30 * torch.randn(1, d) + planted + torch.randn(n, d), d) for _ in keys]
    found = stream(plan, [made(key, n=n) for key in keys], states, size=20)
    for strata in ((*HALVES, HELDOUT), HALVES, *((name,) for name in HALVES)):
        assert (unit_vectors(found.mean(*strata)) * expected[:, None]).sum(-1).min() > 0.97, strata
    assert (unit_vectors(found.mean(*HALVES, HELDOUT)) * expected[:, None]).sum(-1).min() > 0.995
    shuffled = unit_vectors(found.mean(*SHUFFLED))
    assert (shuffled * expected[:, None]).sum(-1).abs().mean() < 0.5
    right = found.sums["correct"] / found.sums["count"][plan.strata.index(HELDOUT)]
    assert right[0].min() > 0.95 and right[1].mean() < 0.45


def test_a_missing_signal_is_an_error_and_not_a_plausible_vector() -> None:
    plan = make_plan([("s0", "t")], ("a", "b", "c"), 0.0, seed=0)
    found = stream(plan, [made(GroupKey("s0", "neutral"))], [constant(torch.ones(3, 4) / 3)])
    half = next(name for name in HALVES if name in plan.strata_of(made(GroupKey("s0", "neutral"))))
    assert found.mean(half).abs().max() == 0
    with pytest.raises(DegenerateDirection, match="equals the mean of all emotions"):
        unit_vectors(found.mean(half))
    with pytest.raises(DegenerateDirection, match="no group falls into heldout"):
        found.mean(HELDOUT)
    with pytest.raises(DegenerateDirection):
        unit_vectors(torch.full((1, 3), float("nan")))
    close(unit_vectors(torch.tensor([[3.0, -4.0], [0.0, 1e-30]], dtype=torch.float64)), np.array([[0.6, -0.8], [0.0, 1.0]]))


# ---- plans ---------------------------------------------------------------------------------------------------------------


def pairs(count: int, themes: Mapping[str, int]) -> list[tuple[str, str]]:
    names = [theme for theme, weight in themes.items() for _ in range(weight)]
    return [(f"s{index}", names[index % len(names)]) for index in range(count) for _ in VALENCES]


def test_the_plan_holds_out_whole_scenarios_by_seed_alone() -> None:
    data = pairs(40, {"a": 1})
    plan = make_plan(data, EMOTIONS, 0.1, seed=3)
    assert len(plan.heldout) == 4 and plan.heldout < {f"s{index}" for index in range(40)}
    assert make_plan(data[::-1], EMOTIONS, 0.1, seed=3) == plan
    assert make_plan(data, EMOTIONS, 0.1, seed=4).heldout != plan.heldout
    assert not make_plan(data, EMOTIONS, 0.0, seed=3).heldout
    assert make_plan(data, EMOTIONS, 0.2, seed=3).heldout > plan.heldout
    halves = [sum(HALVES[0] in plan.strata_of(made(GroupKey(f"s{i}", "neutral"))) for i in range(400))]
    assert 160 < halves[0] < 240


def test_only_the_largest_themes_have_a_stratum() -> None:
    themes = {f"t{index:02}": index + 1 for index in range(MAX_THEMES + 3)}
    plan = make_plan(pairs(sum(themes.values()), themes), EMOTIONS, 0.1, seed=0)
    assert plan.themes == tuple(f"t{index:02}" for index in range(3, MAX_THEMES + 3))
    small = made(GroupKey("s1", "neutral"), "t00")
    assert not any(name.startswith("theme:") for name in plan.strata_of(small))
    assert "theme:t05" in plan.strata_of(made(GroupKey("s1", "neutral"), "t05"))


def test_the_shuffled_control_differs_between_the_valences_of_a_scenario_and_is_fair() -> None:
    plan = make_plan([("s0", "t")], EMOTIONS, 0.0, seed=0)
    drawn = [plan.shuffle(made(GroupKey(f"s{i}", valence), n=6)) for i in range(200) for valence in VALENCES]
    assert plan.shuffle(made(GroupKey("s0", "neutral"), n=6)) == plan.shuffle(made(GroupKey("s0", "neutral"), n=6))
    assert len({tuple(order) for order in drawn}) > 350  # 600 draws of 720 orders
    kept = sum(order[e] == e for order in drawn for e in range(6)) / (600 * 6)
    assert abs(kept - 1 / 6) < 0.03


def test_a_plan_in_a_header_is_plain_and_sorted() -> None:
    plan = Plan(("b", "a"), ("t",), frozenset({"s2", "s10", "s1"}), 7)
    assert as_json(plan) == {"emotions": ["b", "a"], "themes": ["t"], "heldout": ["s1", "s10", "s2"], "seed": 7}
