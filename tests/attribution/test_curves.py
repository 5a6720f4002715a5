"""Curves, scores and the one-pass check, each against the slow way: bare hooks, one row, no cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emosteer.attribution import ablate as scores
from emosteer.attribution import curves as ablation
from emosteer.attribution import verification
from emosteer.attribution.ablate import ablate
from emosteer.attribution.curves import Condition, TextScore, conditions, curves, units_of
from emosteer.attribution.gradients import true_patches
from emosteer.attribution.scores import SCORE_FORMS, Scores
from emosteer.attribution.settings import ABLATIONS, AblateSettings, CurveSettings
from emosteer.attribution.unit_scores import UnitScores, contrast_scores, raw_scores, top_units, unit_mask
from emosteer.attribution.verification import one_pass, sampled_units, verify
from emosteer.base.errors import ArtifactError, DataError, EmosteerError
from emosteer.base.jsonl import JsonlLog
from emosteer.directions.directions import Directions, stable_band
from emosteer.directions.extract import extract
from emosteer.directions.settings import Settings
from emosteer.generation.decoding import Decoding
from emosteer.models.model import Model
from emosteer.models.sites import MLP_POST, RESID_MID, RESID_POST, Head, Neuron, Site, Unit, Z
from emosteer.scenarios.prompts import elicit, plain
from emosteer.scenarios.scenarios import Bank, Group, GroupKey, Message
from tests.conftest import build, small_data
from tests.helpers import reference
from tests.helpers.precision import contribution_bounds, forward_bound

EMOTIONS = ("anger", "sadness", "happiness")
INSTRUCTION = "keep the reply"
#: One prompt count for all curves; the shares give 3 of 12 heads and 14 of 144 neurons.
CURVES = CurveSettings(shares=(0.25,), neuron_shares=(0.1,), n_random=2, n_prompts=2, max_new_tokens=5, batch_size=96)


@dataclass(frozen=True, eq=False)
class Case:
    model: Model
    groups: list[Group]
    bank: Bank
    directions: Directions
    band: tuple[int, ...]
    scores: UnitScores


def case_of(model: Model) -> Case:
    groups, bank = small_data(3, EMOTIONS)
    directions = extract(model, groups, Settings(EMOTIONS, holdout=0, instruction=INSTRUCTION), bank=bank)
    return Case(model, groups, bank, directions, stable_band(directions), contrast_scores(model, directions))


@pytest.fixture(scope="module")
def case(tiny: Model) -> Case:
    return case_of(tiny)


# ---- the score of a text ---------------------------------------------------------------------------------------------


def test_bank_replies_average_one(family: Model) -> None:
    """Scored against directions of the same groups, replies of e have mean score m[e] . v[f] / |m[f]|: one at f = e."""
    case = case_of(family)
    score = TextScore(family, case.directions, case.band, INSTRUCTION)
    means = []
    for emotion in EMOTIONS:
        found = score(case.groups, [case.bank[group.key][emotion] for group in case.groups])
        means.append(found.mean(0))
    index = [case.directions.sites.index(Site(layer, RESID_POST)) for layer in case.band]
    vectors, norms = case.directions.vectors[:, index], case.directions.norms[:, index]
    wanted = torch.einsum("eld,el,fld,fl->ef", vectors, norms, vectors, 1 / norms) / len(index)
    torch.testing.assert_close(torch.stack(means), wanted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.stack(means).diag(), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.stack(means).mean(0), torch.zeros(3), atol=1e-3, rtol=0)


def test_a_text_is_scored_where_it_is_written_whatever_its_neighbours(case: Case) -> None:
    """By bare hooks: averaged over the last prompt position and all reply positions but the last."""
    prompts = [
        replace(case.groups[number], earlier=(Message("user", "we waited"), Message("assistant", "why")) if odd % 2 else ())
        for odd, number in enumerate((0, 1, 0, 3, 0, 3))  # three texts of one prompt, two of another, one of a third
    ]
    texts = ["never", "i laugh and sing and dance alone .", "", "cry", "slam the door again !", "please stop"]
    score = TextScore(case.model, case.directions, case.band, INSTRUCTION)
    found = score(prompts, texts)
    for row, prompt, text in zip(found, prompts, texts, strict=True):
        head, tail = case.model.prompt_ids(plain(prompt.text, INSTRUCTION, prompt.earlier)), case.model.text_ids(text)
        wanted = torch.zeros(3)
        for layer in case.band:
            h = reference.seen(case.model.hf, head + tail, [(layer, "resid_post")])[layer, "resid_post"]
            index = case.directions.sites.index(Site(layer, RESID_POST))
            state = h[len(head) - 1 : len(head) + max(len(tail) - 1, 0)].mean(0) - case.directions.base[index]
            wanted += case.directions.vectors[:, index] @ state / case.directions.norms[:, index] / len(case.band)
        torch.testing.assert_close(row, wanted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(score(prompts, texts, batch_tokens=1), found, atol=1e-3, rtol=1e-3)
    assert found[:, 0].std() > 0.1, "texts differ, so their order shows"


# ---- conditions and their units --------------------------------------------------------------------------------------


def test_conditions_are_complete() -> None:
    settings = CurveSettings()
    found = conditions(settings)
    assert found[:2] == [Condition("none", "heads", 0.0, "asked"), Condition("none", "heads", 0.0, "plain")]
    wanted = {
        Condition(kind, unit, share, who)
        for unit, shares in (("heads", settings.shares), ("neurons", settings.neuron_shares))
        for kind in ("zero", "mean", "resample", "enhance")
        for share in shares
        for who in ("top", "random:0", "random:1", "random:2")
    }
    assert set(found[2:]) == wanted and len(found) == len(wanted) + 2
    assert conditions(replace(settings, kinds=("zero",), shares=(), neuron_shares=(0.5,), n_random=0))[2:] == [
        Condition("zero", "neurons", 0.5, "top")
    ]


@pytest.mark.parametrize(("unit", "share", "size"), [("heads", 0.25, 3), ("heads", 0.01, 1), ("neurons", 0.1, 14), ("heads", 1.0, 12)])
def test_random_controls_have_the_top_sets_size(case: Case, unit: str, share: float, size: int) -> None:
    make = Head if unit == "heads" else Neuron
    for e in range(3):
        table = (case.scores.heads if unit == "heads" else case.scores.neurons)[e]
        top = units_of(case.model, case.scores, e, Condition("zero", unit, share, "top"), 0)
        assert top == top_units(table, size, make) and len(top) == size
        for who in ("random:0", "random:1"):
            control = units_of(case.model, case.scores, e, Condition("zero", unit, share, who), 0)
            assert len(set(control)) == len(control) == size
            assert all(isinstance(u, make) and 0 <= u.layer < 3 and 0 <= u.index < table.shape[1] for u in control)


def test_random_controls_are_drawn_by_seed_number_and_emotion(case: Case) -> None:
    def control(e: int, who: str, seed: int, kind: str = "zero") -> tuple[Unit, ...]:
        return tuple(units_of(case.model, case.scores, e, Condition(kind, "neurons", 0.1, who), seed))

    drawn = [control(e, who, seed) for e in (0, 1) for who in ("random:0", "random:1") for seed in (0, 1)]
    assert len(set(drawn)) == len(drawn)
    assert control(0, "random:0", 0) == drawn[0] == control(0, "random:0", 0, "enhance"), "all kinds act on the same controls"


def test_the_baselines_act_on_nothing(case: Case) -> None:
    for who in ("asked", "plain"):
        assert units_of(case.model, case.scores, 0, Condition("none", "heads", 0.0, who), 0) == []


# ---- curves ----------------------------------------------------------------------------------------------------------


#: (emotion, prompt, layer, kind) -> [width], what masked entries become, or what is added to them for "enhance".
Values = Callable[[int, int, int, str], Tensor]


def by_hand(case: Case, point: Condition, values: Values | None) -> tuple[list[float], list[str]]:
    """The curve's scores of a point and the texts behind them, one row at a time, by bare hooks and without a cache."""
    asked = point.kind in ABLATIONS or point.who == "asked"
    score = TextScore(case.model, case.directions, case.band, INSTRUCTION)
    texts: list[str] = []
    found: list[float] = []
    for e, emotion in enumerate(EMOTIONS):
        masks = unit_mask(case.model, units_of(case.model, case.scores, e, point, 0))
        own = []
        for number, group in enumerate(case.groups[:2]):
            changes = {}
            for layer in range(case.model.shape.n_layers):
                for kind, mask in ((Z, masks[0][layer]), (MLP_POST, masks[1][layer])):
                    if mask.any() and values:
                        value = values(e, number, layer, kind)
                        if point.kind == "enhance":
                            changes[layer, kind] = lambda x, add=mask * value: x + add
                        else:
                            changes[layer, kind] = lambda x, m=mask, v=value: torch.where(m.bool(), v, x)
            messages = elicit("tone", group.text, emotion, INSTRUCTION) if asked else plain(group.text, INSTRUCTION)
            prompt = case.model.prompt_ids(messages)
            ids, _ = reference.greedy(case.model, prompt, changes, 5, case.model.stop_ids, Decoding().repetition_penalty)
            texts.append(case.model.tokenizer.decode(ids, skip_special_tokens=True).strip())
            own.append(float(score([group], [texts[-1]])[0, e]))
        found.append(sum(own) / len(own))
    return found, texts


def values_of(case: Case, kind: str) -> Values | None:
    def stats(site_kind: str) -> Any:
        return case.directions.z if site_kind == Z else case.directions.mlp

    return {
        "none": None,
        "zero": lambda e, prompt, layer, k: torch.zeros(case.model.width(k)),
        "mean": lambda e, prompt, layer, k: stats(k).base[layer],
        "enhance": lambda e, prompt, layer, k: CURVES.strength * stats(k).mean[e, layer],
    }[kind]


def measured(case: Case, point: Condition, settings: CurveSettings = CURVES, **options: Any) -> list[float]:
    rows = curves(case.model, case.directions, case.scores, case.groups[:2], case.band, settings, points=[point], **options)
    assert [row["emotion"] for row in rows] == list(EMOTIONS)
    assert all(row["n"] == 2 and {k: row[k] for k in asdict(point)} == asdict(point) for row in rows)
    return [row["score"] for row in rows]


@pytest.mark.parametrize(
    "point",
    [
        Condition("none", "heads", 0.0, "asked"),
        Condition("none", "heads", 0.0, "plain"),
        Condition("zero", "heads", 0.25, "top"),
        Condition("zero", "neurons", 0.1, "random:1"),
        Condition("mean", "heads", 0.25, "random:0"),
        Condition("enhance", "heads", 0.25, "top"),
        Condition("enhance", "neurons", 0.1, "top"),
    ],
    ids=lambda p: f"{p.kind}-{p.unit}-{p.who}",
)
def test_a_point_equals_hand_hooked_greedy_generation(case: Case, point: Condition) -> None:
    wanted, texts = by_hand(case, point, values_of(case, point.kind))
    assert measured(case, point) == pytest.approx(wanted, abs=2e-3)
    assert measured(case, point, replace(CURVES, batch_size=4)) == pytest.approx(wanted, abs=2e-3), "in batches that part an emotion"
    if point.kind != "none":
        asked = "plain" if point.kind == "enhance" else "asked"
        assert by_hand(case, replace(point, who=asked, share=0.0, kind="none"), None)[1] != texts, "it really changes what is written"


def runner(case: Case, directions: Directions | None = None) -> ablation.Runner:
    return ablation.Runner(
        case.model, directions or case.directions, case.scores, case.groups[:2], lambda prompts, texts: torch.zeros(1), CURVES
    )


@pytest.mark.parametrize("emotion", range(3))
def test_resampling_draws_from_another_emotions_distribution(case: Case, emotion: int) -> None:
    """The emotions are moved so far apart that every draw tells which it is from."""
    z, mlp = (replace(stats, mean=50 * stats.mean) for stats in (case.directions.z, case.directions.mlp))
    point, rows = Condition("resample", "heads", 0.25, "top"), [(emotion, prompt) for prompt in range(1200)]
    for site, stats in ((Site(1, Z), z), (Site(2, MLP_POST), mlp)):
        means, spread = stats.base[site.layer] + stats.mean[:, site.layer], stats.variance[:, site.layer].sqrt()
        values = runner(case, replace(case.directions, z=z, mlp=mlp))._values(point, site, rows)
        sources = torch.cdist(values, means).argmin(1)
        assert set(sources.tolist()) == {0, 1, 2} - {emotion}, "every other emotion is drawn, and never the own one"
        for other in {0, 1, 2} - {emotion}:
            drawn = values[sources == other]
            assert len(drawn) == pytest.approx(600, abs=60), "each as often"
            torch.testing.assert_close(drawn.mean(0), means[other], atol=0.15 * float(spread[other].max()), rtol=0)
            torch.testing.assert_close(drawn.std(0), spread[other], atol=1e-4, rtol=0.15)


@pytest.mark.parametrize("unit", ["heads", "neurons"])
def test_resampling_equals_the_same_by_hand_whatever_the_batches(case: Case, unit: str) -> None:
    """With the draws taken from the runner itself, row by row."""
    point = Condition("resample", unit, 0.25, "top")
    wanted, texts = by_hand(case, point, lambda e, prompt, layer, kind: runner(case)._values(point, Site(layer, kind), [(e, prompt)])[0])
    assert measured(case, point) == pytest.approx(wanted, abs=2e-3)
    assert measured(case, point, replace(CURVES, batch_size=4)) == pytest.approx(wanted, abs=2e-3), "in batches that part an emotion"
    assert by_hand(case, Condition("none", "heads", 0.0, "asked"), None)[1] != texts, "it really changes what is written"


def test_curves_go_on_after_a_kill(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(CURVES, kinds=("zero", "enhance"), n_random=1, max_new_tokens=3)
    arguments = (case.model, case.directions, case.scores, case.groups, case.band, settings)
    whole = curves(*arguments)
    assert len(whole) == 3 * len(conditions(settings)) == 3 * 10
    path, ran = tmp_path / "curves.jsonl", []
    run, append = ablation.Runner.__call__, JsonlLog.append
    monkeypatch.setattr(ablation.Runner, "__call__", lambda self, point: ran.append(point) or run(self, point))

    def dying(self: JsonlLog, row: dict[str, Any]) -> None:
        if len(self.path.read_bytes().splitlines()) == 4:
            raise KeyboardInterrupt
        append(self, row)

    monkeypatch.setattr(JsonlLog, "append", dying)
    with pytest.raises(KeyboardInterrupt):
        curves(*arguments, partial=path)
    with path.open("ab") as file:
        file.write(b'{"key": "torn')
    monkeypatch.setattr(JsonlLog, "append", append)
    ran.clear()
    assert curves(*arguments, partial=path) == whole
    assert ran == conditions(settings)[4:], "what was done is not done again"
    ran.clear()
    assert curves(*arguments, partial=path) == whole and not ran
    curves(*arguments[:-1], replace(settings, seed=1), partial=path)
    assert len(ran) == len(conditions(settings)), "the points of other settings are no use"


def test_too_few_scenario_events_are_refused(case: Case) -> None:
    with pytest.raises(DataError, match="need 20 scenario-events, found 9"):
        curves(case.model, case.directions, case.scores, case.groups, case.band, replace(CURVES, n_prompts=20))


def test_and_before_anything_else_is_measured(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emosteer.attribution.ablate.contrast_scores", lambda *_: pytest.fail("measured"))
    with pytest.raises(DataError, match="need 20 scenario-events, found 9"):
        ablate(case.model, case.directions, case.groups, AblateSettings(curves=replace(CURVES, n_prompts=20)))


# ---- the one-pass check ----------------------------------------------------------------------------------------------


def prompts_of(case: Case, count: int = 3) -> list[list[int]]:
    return [case.model.prompt_ids(plain(group.text, INSTRUCTION)) for group in case.groups[:count]]


def errors_and_bounds(case: Case, prompts: list[list[int]], units: list[Unit]) -> tuple[Tensor, Tensor]:
    """Relative errors of one-pass contributions, and what float32 may do to them, both [prompt, unit]."""
    errors, allowed = [], []
    for e, prompt in enumerate(prompts):
        ids, v = torch.tensor([prompt]), [case.directions.at(kind)[e] for kind in (RESID_MID, RESID_POST)]
        drops = verification.real_drops(case.model, verification.layer_inputs(case.model, ids), units, *v)
        errors.append((one_pass(case.model, ids, units, *v) - drops).abs() / drops.abs())
        allowed.append(contribution_bounds(case.model, ids, units, *v) / drops.abs())
    return torch.stack(errors), torch.stack(allowed)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_one_pass_contributions_pass_the_check(name: str) -> None:
    """Every unit's error is what float32 may do to its sums, and that is little for nearly all of them."""
    case = case_of(build(name))
    prompts = prompts_of(case)
    found = verify(case.model, case.directions, prompts, 60)
    assert found["prompts"] == 3 and found["dtype"] == "float32"
    assert (found["heads"]["units"], found["neurons"]["units"]) == (12, 60)
    units = sampled_units(case.model, 60, 0)
    relative, bound = errors_and_bounds(case, prompts, units)
    assert (relative <= bound).all()
    for kind, mine in (("heads", slice(None, 12)), ("neurons", slice(12, None))):
        assert found[kind]["median_relative_error"] <= bound[:, mine].median() < 1e-4, "which is little"
        assert found[kind]["median_relative_error"] <= found[kind]["max_relative_error"] <= bound[:, mine].max()


@pytest.mark.parametrize(
    ("function", "kind", "wrong", "error"),
    [
        ("head_contributions", "heads", lambda c: -c, 2.0),
        ("neuron_contributions", "neurons", lambda c: -c, 2.0),
        ("head_contributions", "heads", lambda c: c.roll(1, -1), None),
        ("neuron_contributions", "neurons", lambda c: 1.01 * c, 0.01),
    ],
)
def test_a_wrong_formula_is_found(
    case: Case, monkeypatch: pytest.MonkeyPatch, function: str, kind: str, wrong: Callable[[Tensor], Tensor], error: float | None
) -> None:
    right = getattr(verification, function)
    monkeypatch.setattr(verification, function, lambda model, value, v: wrong(right(model, value, v)))
    found = verify(case.model, case.directions, prompts_of(case, 2), 40)
    other = "neurons" if kind == "heads" else "heads"
    units = [unit for unit in sampled_units(case.model, 40, 0) if isinstance(unit, Head) is (other == "heads")]
    bound = errors_and_bounds(case, prompts_of(case, 2), units)[1].max()
    assert found[other]["max_relative_error"] <= bound, "and the other formula is still right"
    assert found[kind]["median_relative_error"] > 5e-3
    if error is not None:
        assert found[kind]["median_relative_error"] == pytest.approx(error, rel=1e-2)


def test_real_drops_are_those_of_the_whole_model_with_a_unit_ablated(case: Case) -> None:
    """Running one layer again is as good as running the model again."""
    ids = torch.tensor(prompts_of(case, 1))
    units = sampled_units(case.model, 20, 0)
    v_mid, v_post = case.directions.at(RESID_MID)[1], case.directions.at(RESID_POST)[1]
    found = verification.real_drops(case.model, verification.layer_inputs(case.model, ids), units, v_mid, v_post)
    contribution, drop = reference.ablation_drops(case.model, ids, -1, units, v_mid, v_post)
    torch.testing.assert_close(found.float(), drop, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(one_pass(case.model, ids, units, v_mid, v_post).float(), contribution, atol=1e-5, rtol=1e-4)
    assert drop.abs().max() > 0.1


def test_the_sample_holds_every_head_and_no_neuron_twice(case: Case) -> None:
    units = sampled_units(case.model, 50, 3)
    assert [u for u in units if isinstance(u, Head)] == [Head(layer, i) for layer in range(3) for i in range(4)]
    assert len(set(units)) == len(units) == 62
    assert sampled_units(case.model, 50, 3) == units != sampled_units(case.model, 50, 4)
    assert len(sampled_units(case.model, 10**6, 0)) == 12 + 144
    assert all(u.layer < 3 and u.index < (4 if isinstance(u, Head) else 48) for u in sampled_units(case.model, 10**6, 0))


def test_checking_leaves_the_model_as_it_was(case: Case) -> None:

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.model.hf.modules())

    before = hooks()
    verify(case.model, case.directions, prompts_of(case, 1), 5)
    assert hooks() == before
    assert {p.dtype for p in case.model.hf.parameters()} == {torch.float32}


# ---- the stage -------------------------------------------------------------------------------------------------------

SMALL = AblateSettings(patch_groups=3, true_groups=2, true_units=12, verify_prompts=1, verify_neurons=10, effect_prompts=2, curves=None)


@pytest.fixture(scope="module")
def made(case: Case) -> Scores:
    tiny_curves = replace(CURVES, kinds=("zero",), n_random=1, max_new_tokens=2)
    settings = replace(SMALL, curves=tiny_curves)
    return ablate(case.model, case.directions, case.groups, settings, bank=case.bank, parents={"directions": "abc"})


def test_scores_that_real_ablation_does_not_bear_out_are_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """One contribution that is off by a hundredth of the largest drop stops the stage, before anything is kept."""
    usual = verification.one_pass

    def off(*arguments: Any) -> Tensor:
        found = usual(*arguments)
        found[3] += 0.01 * found.abs().max()
        return found

    monkeypatch.setattr(verification, "one_pass", off)
    with pytest.raises(
        EmosteerError, match=r"of heads differ from real ablation by 1.*e-02 of the largest drop \(expected at most 0.001\)"
    ):
        ablate(case.model, case.directions, case.groups, SMALL, bank=case.bank)
    kept = ablate(case.model, case.directions, case.groups, replace(SMALL, verify_prompts=0), bank=case.bank)
    assert kept.verification == {}


def test_the_stage_scores_in_four_ways(case: Case, made: Scores) -> None:
    assert set(made.forms) == set(SCORE_FORMS)
    for name, wanted in (("contrast", case.scores), ("raw", raw_scores(case.model, case.directions))):
        assert torch.equal(made.forms[name].heads, wanted.heads) and torch.equal(made.forms[name].neurons, wanted.neurons)
    for form in made.forms.values():
        assert form.heads.shape == (3, 3, 4) and form.neurons.shape == (3, 3, 48)
    assert made.band == case.band and made.importance.shape == (3, 3, 2)
    # as a share of the largest drop: a contribution that nearly cancels out may be off by more of itself
    assert made.verification["heads"]["max_error_to_largest"] <= forward_bound(torch.ones(1))
    assert made.verification["neurons"]["units"] == 10
    assert len(made.curves) == 3 * 6
    assert made.provenance.parents == {"directions": "abc"} and made.provenance.params["curves"]["n_random"] == 1


def test_the_truth_in_the_patches_is_real(case: Case, made: Scores) -> None:
    found = made.patches
    units = [reference.parse_unit(text) for text in found["units"]]
    assert len(set(units)) == 12 and found["groups"] == 2
    e = EMOTIONS.index(found["emotion"])
    patch = made.forms["patch"]
    assert units[:6] == top_units(patch.heads[e], 3, Head) + top_units(patch.neurons[e], 3, Neuron)
    samples = scores.compared_groups(case.model, case.directions, case.groups, case.bank, 2)
    v_ref = scores.reference_directions(case.directions, case.band)
    truth = true_patches(case.model, samples, v_ref, e, units)
    assert found["truth"] == pytest.approx(truth.tolist(), abs=1e-4)
    pair = torch.tensor([found["estimate"], found["truth"]])
    assert found["correlation"] == pytest.approx(torch.corrcoef(pair)[0, 1].item(), abs=1e-5)
    assert found["correlation_random"] == pytest.approx(torch.corrcoef(pair[:, 6:])[0, 1].item(), abs=1e-5)


def test_no_more_units_are_patched_than_there_are(case: Case) -> None:
    """Asked for ten thousand, every unit of the tiny model is patched once, and the draw ends."""
    few = replace(SMALL, patch_groups=1, true_groups=1, true_units=10_000, verify_prompts=0)
    units = ablate(case.model, case.directions, case.groups, few, bank=case.bank).patches["units"]
    assert len(units) == len(set(units)) == 3 * (4 + 48)


def test_scores_come_back_as_they_were_saved(made: Scores, tmp_path: Path) -> None:
    made.save(tmp_path / "s.safetensors")
    back = Scores.load(tmp_path / "s.safetensors")
    for name, form in made.forms.items():
        assert torch.equal(back.forms[name].heads, form.heads) and torch.equal(back.forms[name].neurons, form.neurons)
    assert torch.equal(back.importance, made.importance)
    assert (back.emotions, back.band) == (made.emotions, made.band)
    for name in ("verification", "patches", "curves"):
        assert getattr(back, name) == json.loads(json.dumps(getattr(made, name)))
    assert json.loads(json.dumps(asdict(back.provenance))) == json.loads(json.dumps(asdict(made.provenance)))


def test_parts_can_be_left_out(case: Case) -> None:
    found = ablate(case.model, case.directions, case.groups, replace(SMALL, patch_groups=0, verify_prompts=0))
    assert set(found.forms) == {"contrast", "raw", "effect"}
    assert found.patches == {} and found.verification == {} and found.curves == []


def test_gemma_says_that_it_is_not_checked() -> None:
    case = case_of(build("gemma3"))
    found = ablate(case.model, case.directions, case.groups, replace(SMALL, patch_groups=0))
    assert "norms a sublayer's output" in found.verification["skipped"]


def test_complete_groups_are_patched_first_and_every_emotion_is(case: Case) -> None:
    keys = [group.key for group in case.groups]
    two = {e: case.bank[keys[1]][e] for e in EMOTIONS[:2]}
    bank = {keys[0]: case.bank[keys[0]], keys[4]: {"anger": "no"}, keys[1]: two}

    def chosen(bank: Bank, count: int) -> list[tuple[GroupKey, tuple[int, ...]]]:
        return [(s.key, s.emotions) for s in scores.compared_groups(case.model, case.directions, case.groups, bank, count)]

    assert chosen(bank, 5) == [(keys[0], ()), (keys[1], (0, 1))] and chosen(bank, 1) == [(keys[0], ())]
    last = {e: case.bank[keys[2]][e] for e in EMOTIONS[1:]}
    assert {key for key, _ in chosen({keys[1]: two, keys[2]: last}, 1)} == {keys[1], keys[2]}, "each alone lacks an emotion"
    with pytest.raises(DataError, match=f"no scenario-event has a reply in {EMOTIONS[2]} and in another"):
        chosen({keys[1]: two}, 5)
    with pytest.raises(DataError, match="--replies"):
        ablate(case.model, case.directions, case.groups, SMALL, bank={})


def test_another_models_directions_are_refused(case: Case) -> None:
    with pytest.raises(ArtifactError, match="was made for|were made for"):
        ablate(build("llama", seed=1), case.directions, case.groups, SMALL, bank=case.bank)


def test_a_failed_check_names_the_way_round_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(scores, "verify", fails)
    with pytest.raises(EmosteerError, match="no room.*--verify-prompts 0"):
        ablate(case.model, case.directions, case.groups, replace(SMALL, patch_groups=0))
