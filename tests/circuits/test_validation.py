"""`validate` on small random models: interventions in exact arithmetic, planted heads that must pass, random heads that must not."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emosteer.base.errors import ArtifactError, DataError, UsageError
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.learning import reply_costs
from emosteer.circuits.places import Places
from emosteer.circuits.validation import validate as stage
from emosteer.circuits.validation.bank_rankings import BankContrasts, Parting
from emosteer.circuits.validation.bench import FOLLOWED, Bench, passage_of
from emosteer.circuits.validation.overlaps import common_by_chance, overlap_of, shared_by_chance
from emosteer.circuits.validation.replays import Intervention, Passage, Readout, capture, replay, sites_of
from emosteer.circuits.validation.settings import MEAN, NEUTRALLY, RESAMPLE, ValidateSettings
from emosteer.circuits.validation.trials import (
    ABLATE,
    HALVES,
    KEEP,
    NEUTRAL_ASKED,
    NOTHING,
    OTHER_HALF,
    OWN,
    SAME_HALF,
    WHOLE,
    Sets,
    Trial,
    core_of,
    plan,
    sets_of,
)
from emosteer.circuits.validation.unit_sets import UnitSet, matched, matched_in_size, taken
from emosteer.circuits.validation.validation import Validation
from emosteer.cli import main as cli
from emosteer.cli.print_validation import print_validation, validation_summary
from emosteer.models.interventions import replace_units
from emosteer.models.model import Model
from emosteer.models.sites import RESID_POST, Head, Neuron, Site, Unit
from emosteer.report import validation_figures
from emosteer.report.inputs import read_inputs
from emosteer.report.sections import sections
from emosteer.report.wording import DASH
from emosteer.scenarios.prompt_sets import KINDS
from emosteer.scenarios.prompts import elicit
from emosteer.scenarios.scenarios import NEUTRAL, Bank, Group, GroupKey
from tests.conftest import build
from tests.helpers.contest_setup import WORD, jury
from tests.helpers.tiny_project import EMOTIONS as THREE
from tests.helpers.tiny_project import write_tiny_project
from tests.helpers.whole_artefacts import SOURCE
from tests.test_planted import EMOTIONS, OTHERS, Planted, plant

WORDS = {"anger": "slam stop", "sadness": "cry alone", "happiness": "laugh sing", "fear": "hide run", "surprise": "blink wait",
         "disgust": "spit filth", NEUTRAL: "office desk"}  # fmt: skip
SETTINGS = ValidateSettings(
    prompts=4, randoms=6, sizes=(), doses=(), kinds=(RESAMPLE, MEAN), held=(NEUTRALLY,), elicitations=("tone",), references=4,
    bank_groups=8, bootstraps=20, row_tokens=4000,
)  # fmt: skip


# ---- interventions ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact() -> Model:
    model = build("llama")
    model.hf.double()
    return model


def passages(model: Model, replies: int = 2) -> tuple[Passage, Passage]:
    """The same replies behind two prompts of unequal length."""
    texts = ["cry alone now , home", "slam the door", "laugh again"][:replies]
    asked = (elicit("tone", text, emotion, "keep the reply") for text, emotion in (("the train was late", "anger"), ("i waited", None)))
    return tuple(passage_of(model, messages, texts, 20) for messages in asked)  # type: ignore[return-value]


def readout(model: Model) -> Readout:
    vectors = torch.randn(2, 2, model.shape.d_model, generator=torch.Generator().manual_seed(3))
    return Readout((1, 2), vectors)


def some_units(model: Model, seed: int, neurons: bool = True) -> UnitSet:
    draw, shape = torch.Generator().manual_seed(seed), model.shape
    heads = torch.rand(shape.n_layers, shape.n_heads, generator=draw) < 0.5
    return UnitSet(heads, torch.rand(shape.n_layers, shape.d_mlp if neurons else 0, generator=draw) < 0.3)


def listed(units: UnitSet) -> list[Unit]:
    heads: list[Unit] = [Head(layer, head) for layer, head in units.heads.nonzero().tolist()]
    return heads + [Neuron(layer, index) for layer, index in units.neurons.nonzero().tolist()]


def alone(model: Model, passage: Passage, units: UnitSet, values: dict[Site, Tensor]) -> list[float]:
    """The simple way: every reply behind its prompt in a sequence of its own, the units replaced where it is written."""
    found = []
    for reply in passage.replies:
        ids = torch.tensor([[*passage.prompt, *reply]])
        where = torch.zeros(ids.shape, dtype=torch.bool)
        where[0, len(passage.prompt) - 1 : -1] = True
        hidden = model.run(ids, replace_units(model, [listed(units)], values, where), bridge=False)
        logits = model.logits(hidden[0, len(passage.prompt) - 1 : -1])
        found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(reply)).item())
    return found


@torch.no_grad()
def test_ablated_replies_cost_what_each_costs_alone_with_its_units_replaced(exact: Model) -> None:
    passage, _ = passages(exact)
    sites, sets = sites_of(exact, True), [some_units(exact, seed) for seed in range(3)]
    draw = torch.Generator().manual_seed(0)
    source = {site: torch.randn(exact.width(site.kind), generator=draw, dtype=torch.float64) for site in sites}
    found = replay(exact, passage, [Intervention(one) for one in sets], source, readout(exact), row_tokens=25)
    for one, costs in zip(sets, found.costs, strict=True):
        assert costs.tolist() == pytest.approx(alone(exact, passage, one, source), rel=1e-6)


@torch.no_grad()
def test_a_dose_of_nothing_changes_nothing_and_doses_lie_between(exact: Model) -> None:
    passage, _ = passages(exact)
    units = some_units(exact, 1)
    source = {site: torch.zeros(exact.width(site.kind), dtype=torch.float64) for site in sites_of(exact, True)}
    doses = [None, Intervention(units, 0.0), Intervention(units, 0.5), Intervention(units)]
    found = replay(exact, passage, doses, source, readout(exact))
    assert torch.equal(found.costs[0], found.costs[1])
    assert torch.equal(found.projections[0], found.projections[1])
    assert not torch.allclose(found.costs[2], found.costs[0]) and not torch.allclose(found.costs[2], found.costs[3])
    halved = {site: 0.5 * value for site, value in capture(exact, passage, [Site(0, "z")]).items()}
    first = UnitSet(units.heads & (torch.arange(3) == 0)[:, None], units.neurons[:, :0])  # behind nothing that is changed
    half = replay(exact, passage, [Intervention(first, 0.5)], source, readout(exact)).costs
    assert torch.allclose(half, replay(exact, passage, [Intervention(first)], halved, readout(exact)).costs, atol=1e-12)


@torch.no_grad()
def test_with_every_head_taken_from_another_prompt_the_run_is_that_prompt_s(exact: Model) -> None:
    """And where nothing is kept, all is replaced: holding and ablating are the same intervention on complements."""
    asked, neutral = passages(exact)
    assert len(asked.prompt) != len(neutral.prompt)
    every = UnitSet(torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 0, dtype=torch.bool))
    source = capture(exact, neutral, sites_of(exact, False))
    nothing = every.without(every)
    found = replay(exact, asked, [Intervention(every), Intervention(nothing.outside(False)), Intervention(nothing)], source, readout(exact))
    wanted = replay(exact, neutral, [None], {}, readout(exact))
    for place in (0, 1):
        assert torch.allclose(found.costs[place], wanted.costs[0], atol=1e-12)
        assert torch.allclose(found.projections[place], wanted.projections[0], atol=1e-5)
    assert torch.allclose(found.costs[2], replay(exact, asked, [None], {}, readout(exact)).costs[0], atol=1e-12)
    assert not torch.allclose(found.costs[0], found.costs[2], atol=1e-3)


@torch.no_grad()
def test_untouched_replies_cost_what_learning_says(exact: Model) -> None:
    group, replies = Group(GroupKey("s", ""), "t", "the train was late"), ["cry alone now", "slam the door"]
    passage = passage_of(exact, elicit("reply", group.text, None, "keep the reply"), replies, 50)
    wanted = reply_costs(exact, group, replies, (), {}, "keep the reply")
    assert replay(exact, passage, [None], {}, readout(exact)).costs[0].tolist() == pytest.approx(wanted[0].tolist(), rel=1e-6)


@torch.no_grad()
def test_projections_are_those_of_the_stream_where_replies_are_written(exact: Model) -> None:
    passage, _ = passages(exact)
    read = readout(exact)
    found = replay(exact, passage, [None], {}, read).projections[0]
    for index, reply in enumerate(passage.replies):
        ids = torch.tensor([[*passage.prompt, *reply]])
        seen = exact.read(ids, [Site(layer, RESID_POST) for layer in read.layers], bridge=False)
        h = torch.stack([seen[Site(layer, RESID_POST)][0, len(passage.prompt) - 1 : -1] for layer in read.layers])
        wanted = torch.einsum("lpd,eld->e", h.float(), read.vectors) / (h.shape[0] * h.shape[1])
        assert torch.allclose(found[index], wanted, atol=1e-4)


@torch.no_grad()
def test_added_contrasts_are_added(exact: Model) -> None:
    passage, _ = passages(exact)
    units = some_units(exact, 2, neurons=False)
    first = UnitSet(units.heads & (torch.arange(3) == 1)[:, None], units.neurons)
    seen = capture(exact, passage, [Site(1, "z")])[Site(1, "z")]
    value = torch.randn(seen.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    added = replay(exact, passage, [Intervention(first, 3.0)], {Site(1, "z"): value}, readout(exact), adding=True)
    put = replay(exact, passage, [Intervention(first)], {Site(1, "z"): seen + 3 * value}, readout(exact))
    assert torch.allclose(added.costs, put.costs, atol=1e-12)


# ---- sets ------------------------------------------------------------------------------------------------------------------------


def test_random_sets_match_in_layer_and_number(exact: Model) -> None:
    units = some_units(exact, 4)
    drawn = [matched(units, str(seed)) for seed in range(20)]
    for one in drawn:
        assert torch.equal(one.heads.sum(1), units.heads.sum(1)) and torch.equal(one.neurons.sum(1), units.neurons.sum(1))
    assert torch.equal(drawn[0].heads, matched(units, "0").heads)
    assert len({tuple(one.heads.flatten().tolist()) for one in drawn}) > 5


def test_sets_of_the_same_size_take_away_about_as_much() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = torch.rand(6, 8, generator=draw) ** 3
    top = UnitSet(sizes > sizes.flatten().topk(12).values.min() - 1e-9, torch.zeros(6, 0, dtype=torch.bool))
    plain = [abs(taken(matched(top, f"{i}"), sizes) - taken(top, sizes)) for i in range(10)]
    sized = [abs(taken(matched_in_size(top, sizes, f"{i}"), sizes) - taken(top, sizes)) for i in range(10)]
    assert max(sized) < min(plain)
    assert not any(torch.equal(matched_in_size(top, sizes, f"{i}").heads, top.heads) for i in range(10))


def test_overlap_by_chance_is_that_of_all_draws() -> None:
    """Two layers of four heads, two and one of them against one and two: every pair of draws counted."""
    first = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    second = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0]]).bool()
    counts: list[int] = []
    for layer0 in itertools.combinations(range(4), 1):
        for layer1 in itertools.combinations(range(4), 2):
            counts.append(len({0, 1} & {*layer0}) + len({0} & {*layer1}))
    chance = common_by_chance(first, second)
    assert chance.tolist() == pytest.approx([counts.count(k) / len(counts) for k in range(3)])
    found = overlap_of(first, second)
    assert found["common"] == 2 and found["p"] == pytest.approx(counts.count(2) / len(counts))
    assert found["expected"] == pytest.approx(sum(counts) / len(counts)) and found["jaccard"] == pytest.approx(2 / 4)
    assert shared_by_chance([first, second], 2) == pytest.approx(sum(counts) / len(counts))


def test_the_core_is_what_most_emotions_share() -> None:
    heads = torch.zeros(3, 2, 4, dtype=torch.bool)
    heads[:, 0, 0] = True
    heads[:2, 1, 1] = True
    heads[0, 1, 3] = True
    core = core_of([UnitSet(one, torch.zeros(2, 0, dtype=torch.bool)) for one in heads])
    assert core.heads.nonzero().tolist() == [[0, 0], [1, 1]]


def test_every_point_has_its_baselines_and_no_trial_is_there_twice() -> None:
    whole = UnitSet(torch.eye(4).bool(), torch.zeros(4, 0, dtype=torch.bool))
    trials = plan(Sets("anger", {WHOLE: whole}, torch.ones(4, 4), 0), ("anger", "fear"), ValidateSettings(randoms=3))
    assert len(set(trials)) == len(trials)
    for trial in trials:
        assert Trial("anger", trial.asked, trial.elicitation) in trials
        if trial.action == KEEP or (trial.action == ABLATE and trial.kind != MEAN and trial.asked == trial.emotion):
            assert replace(trial, size=WHOLE, who=NOTHING, action=KEEP, dose=1.0) in trials, "however the emotion is asked for"


# ---- the stage -------------------------------------------------------------------------------------------------------------------


def data() -> tuple[list[Group], Bank]:
    """Prompts of two kinds; a reply is its emotion's words, which name nothing."""
    words = iter(OTHERS * 3)
    groups = [
        Group(GroupKey(f"p{index}", ""), kind, f"{next(words)} {next(words)} {next(words)}", kind)
        for index in range(8)
        for kind in [("question", "one-liner")[index % 2]]
    ]
    return groups, {group.key: dict(WORDS) for group in groups}


@torch.no_grad()
def speaking(seed: int) -> Planted:
    """A planted model whose unembedding reads what the planted units write: it says the words of the emotion that it is asked for. Those
    words have a little of what the emotion's name has, so that the contrasts of a bank show the heads that read it."""
    planted = plant(seed)
    vocabulary, hf = planted.model.tokenizer.get_vocab(), planted.model.hf
    for e, emotion in enumerate(EMOTIONS):
        for word in WORDS[emotion].split():
            hf.lm_head.weight[vocabulary[word]] += 2 * planted.d[e]
            hf.model.embed_tokens.weight[vocabulary[word]] += 2 * planted.r[e]
    return planted


def circuit_of(planted: Planted, heads: list[set[Unit]]) -> Circuit:
    """A circuit of given heads; its directions are what the planted units write."""
    model, n = planted.model, len(EMOTIONS)
    shape = model.shape
    mask = torch.zeros(n, shape.n_layers, shape.n_heads, dtype=torch.bool)
    for e, units in enumerate(heads):
        for unit in units:
            mask[e, unit.layer, unit.index] = True
    delta = torch.randn(n, shape.n_layers, shape.n_heads * shape.d_head, generator=torch.Generator().manual_seed(0))
    return Circuit(
        emotions=EMOTIONS,
        heads=mask,
        z_delta=delta * mask.repeat_interleave(shape.d_head, -1),
        neuron_index=torch.zeros(0, 3, dtype=torch.int64),
        neuron_delta=torch.zeros(0),
        strength=torch.ones(n),
        importance=torch.zeros(n, shape.n_layers, 2),
        vectors=planted.d[:, None].expand(-1, shape.n_layers, -1).contiguous(),
        rms=torch.ones(shape.n_layers),
        residual_layers=(2,),
        residual_strength=1.0,
        d_mlp=shape.d_mlp,
        preset="auto",
        instruction="keep the reply",
        metrics={"band": [2, 3]},
        provenance=replace(SOURCE, model_sha256=model.sha256),
    )


@pytest.fixture(scope="module")
def planted() -> Planted:
    return speaking(0)


#: For what is to be run several times.
SMALL = replace(SETTINGS, kinds=(RESAMPLE,), prompts=2, randoms=2, references=2, bank_groups=4, bootstraps=10)


@pytest.fixture(scope="module")
def found(planted: Planted) -> Validation:
    groups, bank = data()
    return stage.validate(planted.model, circuit_of(planted, planted.heads), groups, bank, SETTINGS)


def row(found: Validation, table: str, kind: str, figure: str = "margin", emotion: str = "all") -> dict[str, Any]:
    wanted = {"emotion": emotion, "kind": kind, "figure": figure, "size": WHOLE, "dose": 1.0}
    rows = [one for one in found.tables[table] if wanted.items() <= one.items()]
    assert len(rows) == 1
    return dict(rows[0])


@pytest.mark.parametrize("kind", [MEAN, RESAMPLE])
@pytest.mark.parametrize("figure", FOLLOWED)
def test_planted_heads_are_necessary_and_random_ones_are_not(found: Validation, kind: str, figure: str) -> None:
    claim = next(one for one in found.tables["claims"] if (one["figure"], one["kind"], one["size"]) == (figure, kind, WHOLE))
    assert claim["holds"] and len(claim["larger"]) >= 4 and len(claim["apart"]) >= 4
    both = row(found, "necessary", kind, figure)
    assert both["share"][0] > 0.5 and both["random_share"][0] < 0.25
    assert both["p"] == pytest.approx(1 / 7) and both["effect_size"] > 2


def test_planted_heads_are_sufficient_and_random_ones_are_not(found: Validation) -> None:
    for figure in FOLLOWED:
        alone = row(found, "sufficient", NEUTRALLY, figure)
        assert alone["share"][0] > 0.5 and alone["random_share"][0] < 0.25


def test_neurons_are_ablated_with_the_heads_and_held_without_them(planted: Planted) -> None:
    """The planted neurons, which pass on what the heads write, are necessary, too; the random sets have as many in every layer."""
    units = [[e, unit.layer, unit.index] for e, members in enumerate(planted.neurons) for unit in sorted(members, key=str)]
    delta = torch.ones(len(units))
    circuit = replace(circuit_of(planted, planted.heads), neuron_index=torch.tensor(units), neuron_delta=delta)
    groups, bank = data()
    made = stage.validate(planted.model, circuit, groups, bank, replace(SMALL, parts=("necessary", "sufficient")))
    alone = stage.validate(planted.model, circuit_of(planted, planted.heads), groups, bank, replace(SMALL, parts=("necessary",)))
    both, heads = row(made, "necessary", RESAMPLE), row(alone, "necessary", RESAMPLE)
    assert both["share"][0] > heads["share"][0] - 0.05 and both["random_share"][0] < 0.4
    assert row(made, "necessary", RESAMPLE, emotion="anger")["units"] == 5
    assert row(made, "sufficient", NEUTRALLY)["share"][0] > 0.3, "with every other neuron held as well"


def benched(
    planted: Planted, circuit: Circuit, prompts: tuple[list[Group], Bank], settings: ValidateSettings
) -> tuple[Bench, BankContrasts]:
    """The bench of a run, and what its rankings are made from."""
    groups, bank = prompts
    usable, tried, references = stage.drawn_prompts(circuit, groups, bank, settings)
    contrasts, kept = stage._read(planted.model, circuit, bank, usable, references, settings)
    return stage.bench_of(planted.model, circuit, bank, tried, contrasts, kept, settings), contrasts


def test_with_nothing_kept_everything_is_held_neurons_too(planted: Planted) -> None:
    """What sufficiency is measured from, where the circuit has neurons: the empty set of the very intervention."""
    units = [[e, unit.layer, unit.index] for e, members in enumerate(planted.neurons) for unit in sorted(members, key=str)]
    circuit = replace(circuit_of(planted, planted.heads), neuron_index=torch.tensor(units), neuron_delta=torch.ones(len(units)))
    bench, _ = benched(planted, circuit, data(), SMALL)
    whole = bench.sets[0].own[WHOLE]
    every = UnitSet(torch.ones_like(whole.heads), torch.ones_like(whole.neurons))
    heads = UnitSet(every.heads, torch.zeros_like(whole.neurons))
    bench = replace(bench, sets=[replace(one, own={**one.own, "every": every, "heads": heads}) for one in bench.sets])
    asked = Trial("anger", "anger", "tone", WHOLE, NOTHING, KEEP, MEAN)
    ablated = [replace(asked, size=size, who=OWN, action=ABLATE) for size in ("every", "heads")]
    nothing, all_units, all_heads = bench.run(0, "tone", "anger", [asked, *ablated])
    assert nothing == pytest.approx(all_units, abs=1e-5)
    assert all_units != pytest.approx(all_heads, abs=1e-3), "else it makes no difference here"


def test_a_kind_of_prompts_is_in_one_half_of_the_ranked_and_of_the_tried(planted: Planted) -> None:
    """The tried prompts are of fewer kinds than there are; which of them are held out was decided by all."""
    words = iter(OTHERS * 3)
    groups = [Group(GroupKey(f"{kind}{i}", ""), kind, f"{next(words)} {next(words)}", kind) for i in range(2) for kind in KINDS]
    bank = {group.key: dict(WORDS) for group in groups}
    bench, contrasts = benched(planted, circuit_of(planted, planted.heads), (groups, bank), replace(SMALL, prompts=4, bank_groups=16))
    ranked = {group.kind: half for group, half in zip(stage.drawn(groups, 16), contrasts.halves.tolist(), strict=True)}
    assert len({group.kind for group in bench.groups}) == 4 < len(ranked) and set(ranked.values()) == {0, 1}
    assert list(bench.halves) == [ranked[group.kind] for group in bench.groups]
    few, read = benched(planted, circuit_of(planted, planted.heads), (groups, bank), replace(SMALL, prompts=4, bank_groups=3))
    assert read.parting == contrasts.parting == Parting.of(groups) and few.halves == bench.halves, "nor do the ranked decide"


def test_where_a_half_has_no_prompt_nothing_is_tried_with_its_ranking(planted: Planted) -> None:
    """Three drawn prompts of one theme while there are two: there is no ranking of the other half, and all else is tried."""
    groups = [replace(group, kind="question", theme=("home", "work")[i > 2]) for i, group in enumerate(data()[0])]
    circuit = circuit_of(planted, planted.heads)
    sets = sets_of(planted.model, circuit, torch.ones(circuit.heads.shape), [], SMALL)
    assert {Parting.of(groups).half(group) for group in groups[:3]} == {0}
    for one in sets:
        assert WHOLE in one.own and not set(HALVES) & set(one.own)
        assert not {SAME_HALF, OTHER_HALF} & {trial.size for trial in plan(one, EMOTIONS, SMALL)}


def test_circuits_of_different_sizes_lend_and_write_with_the_focus_of_each(planted: Planted, tmp_path: Path) -> None:
    """Sadness has more heads than the focus, the others fewer: its focus is a share of the heads, theirs the whole circuit."""
    groups, bank = data()
    e = EMOTIONS.index("sadness")
    heads = [set(members) for members in planted.heads]
    heads[e] |= {Head(2, h) for h in range(8)}
    circuit = circuit_of(planted, heads)
    deltas = circuit.z_delta.clone()
    deltas[e, 2] *= 0.01  # the others are the largest
    circuit, settings = replace(circuit, z_delta=deltas), replace(SMALL, written=1, parts=("swaps",))
    made = stage.validate(planted.model, circuit, groups, bank, settings, jury=jury(tmp_path))
    assert {one["emotion"]: one["size"] for one in made.tables["swaps"]} == {f: "5%" if f == "sadness" else WHOLE for f in EMOTIONS}
    equal = stage.validate(planted.model, circuit_of(planted, planted.heads), groups, bank, replace(settings, written=0))
    lent, wanted = ({one["emotion"]: one["lent"] for one in some.tables["swaps"]} for some in (made, equal))
    assert lent["anger"]["sadness"] == pytest.approx(wanted["anger"]["sadness"], abs=1e-5), "with its focus, not with all its heads"
    assert [(one["who"], one["size"]) for one in made.tables["written"]] == [
        ("clean", WHOLE), *(((who, size)) for size in ("5%", WHOLE) for who in (OWN, "random"))
    ]  # fmt: skip
    assert {one["size"] for one in made.tables["overlaps"]} == {"5%", WHOLE}
    at_focus = [one for one in made.tables["overlaps"] if one["size"] == "5%"]
    assert len(at_focus) == 15 and not any(one["common"] for one in at_focus)


def test_a_ratio_that_says_nothing_is_not_shown(found: Validation, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{name: value for name, value in one.items() if name != "ratio"} for one in found.tables["necessary"] if one["size"] == WHOLE]
    without = replace(found, tables={**dict.fromkeys(found.tables, ()), "necessary": rows})
    print_validation({**validation_summary(without), "file": "v.safetensors"})
    (head, line) = [text for text in capsys.readouterr().out.splitlines() if "ratio" in text or f"{WHOLE} {MEAN}" in text][:2]
    assert "ratio" in head and " - " in line
    table = validation_figures.tables(without)[0]
    assert {cells[table.head.index("Ratio")] for cells in table.rows} == {DASH}


def test_what_asking_brings_is_what_all_heads_carry(found: Validation) -> None:
    """Holding every head where the neutral prompt has it is the neutral prompt: the shares of both tables are of the same whole."""
    for emotion in EMOTIONS:
        held, ablated = row(found, "sufficient", NEUTRALLY, emotion=emotion), row(found, "necessary", MEAN, emotion=emotion)
        assert held["whole"] == pytest.approx(ablated["whole"], abs=1e-4)


def test_other_heads_in_the_planted_layers_are_no_circuit(planted: Planted) -> None:
    rivals: list[set[Unit]] = []
    every = set().union(*planted.heads)
    for e in range(len(EMOTIONS)):
        free = [[Head(layer, h) for h in range(8) if Head(layer, h) not in every] for layer in (0, 1)]
        rivals.append({layer[e % len(layer)] for layer in free})
    groups, bank = data()
    made = stage.validate(planted.model, circuit_of(planted, rivals), groups, bank, SMALL)
    assert not any(claim["holds"] for claim in made.tables["claims"])
    for kind in (RESAMPLE,):
        assert row(made, "necessary", kind)["share"][0] < 0.2
    assert row(made, "sufficient", NEUTRALLY)["share"][0] < 0.2


def test_planted_heads_serve_their_own_emotion(found: Validation) -> None:
    """Own heads pass their emotion's contrasts on; those of another emotion, which write another direction, do not."""
    for one in found.tables["swaps"]:
        assert one["own"][0] > max(lent[0] for lent in one["lent"].values())
    assert all(one["common"] == 0 for one in found.tables["overlaps"])
    assert all(one["heads"] == 0 for one in found.tables["shared"])


def test_planted_heads_are_always_in_the_ranking(found: Validation) -> None:
    """The bank's contrasts show them in every bootstrap, and in both halves of the prompt kinds."""
    for one in found.tables["stable"]:
        assert one["heads"] == one["always"] == one["circuit"] == one["held"] == 2
        assert one["halves"] == 1.0 and one["halves_expected"] < 0.5
    assert torch.allclose(found.inclusion.sum((1, 2)), torch.full((6,), 2.0))


def test_it_goes_on_where_it_stopped_and_comes_to_the_same(planted: Planted, tmp_path: Path) -> None:
    groups, bank = data()
    some = replace(SMALL, parts=("necessary", "reading"))
    circuit, log = circuit_of(planted, planted.heads), tmp_path / "partial.jsonl"
    first = stage.validate(planted.model, circuit, groups, bank, some, partial=log)
    lines = log.read_text().splitlines()
    changed = json.loads(lines[3])
    changed["figures"][0][0] += 100.0
    log.write_text("\n".join([*lines[:3], json.dumps(changed), *lines[4:9], lines[9][:20]]))
    again = stage.validate(planted.model, circuit, groups, bank, some, partial=log)
    differs = again.followed_figures - first.followed_figures
    assert int((differs.abs() > 50).sum()) == 1 and int((differs != 0).sum()) == 1, "what was kept is taken, all else is made again"
    assert len(log.read_text().splitlines()) == len(lines) and torch.equal(again.read_figures, first.read_figures)
    other = stage.validate(planted.model, circuit, groups, bank, replace(some, seed=1), partial=log)
    assert (other.followed_figures - again.followed_figures).abs().max() > 50, "another seed's trials are other trials"


def test_replies_under_ablation_lose_the_emotion_and_are_kept(planted: Planted, tmp_path: Path) -> None:
    """The judge knows the words of three emotions. With the planted heads at their neutral means the model no longer says them."""
    groups, bank = data()
    settings, circuit = replace(SMALL, written=2, parts=("swaps",)), circuit_of(planted, planted.heads)
    made = stage.validate(planted.model, circuit, groups, bank, settings, jury=jury(tmp_path))
    shares = {one["who"]: [one["by_emotion"][emotion] for emotion in WORD] for one in made.tables["written"]}
    assert set(shares) == {"clean", "circuit", "random"} and {one["replies"] for one in made.tables["written"]} == {12}
    lost, random = (sum(shares["clean"]) - sum(shares[who]) for who in ("circuit", "random"))
    assert lost >= 1 and random <= lost / 2
    path = tmp_path / "v.safetensors"
    made.save(path)
    assert Validation.load(path).tables["written"] == made.tables["written"]
    silent = jury(tmp_path)  # the same folder: everything is there
    again = stage.validate(planted.model, circuit, groups, bank, settings, jury=silent)
    assert again.tables["written"] == made.tables["written"] and not silent.judges[0].asked  # type: ignore[attr-defined]


def test_the_report_shows_the_verdict_where_somebody_tried_the_circuit(planted: Planted, found: Validation, tmp_path: Path) -> None:
    places = Places.of("planted", tmp_path)
    circuit_of(planted, planted.heads).save(places.circuit)
    found.save(places.validation)
    section = next(one for one in sections(read_inputs(places)) if one.id == "validation")
    shown = {table.caption.partition(":")[0]: table for table in section.after}
    assert [table.caption.partition(":")[0] for table in section.after].count("Necessary") == 2
    assert set(shown) == {"Necessary", "Sufficient", "Swaps", "Is it a circuit? It is where at least 4 emotions show all three"}
    assert shown["Is it a circuit? It is where at least 4 emotions show all three"].rows[0][-1] == "yes"
    assert any("tried another circuit" in one for one in read_inputs(places).warnings) is False
    replace(found, provenance=replace(found.provenance, parents={"circuit": "0" * 64})).save(places.validation)
    assert any("tried another circuit" in one for one in read_inputs(places).warnings)


def test_the_command_prints_what_it_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a random model with a circuit of random heads: tables, JSON, the kept command, `inspect`."""
    monkeypatch.chdir(tmp_path)
    write_tiny_project(tmp_path)
    model = Model.load("tiny")
    some = UnitSet(some_units(model, 0).heads, torch.zeros(3, 0, dtype=torch.bool))
    tried = replace(
        circuit_of(speaking(1), [set() for _ in EMOTIONS]),
        emotions=THREE,
        heads=some.heads.expand(3, -1, -1).contiguous(),
        z_delta=some.heads.repeat_interleave(8, -1).float().expand(3, -1, -1).contiguous(),
        strength=torch.ones(3),
        importance=torch.zeros(3, 3, 2),
        vectors=torch.nn.functional.normalize(torch.randn(3, 3, 32), dim=-1),
        rms=torch.ones(3),
        d_mlp=48,
        metrics={},
        provenance=replace(SOURCE, model_sha256=model.sha256),
    )
    tried.save(tmp_path / "c.safetensors")
    few = "--prompts 2 --randoms 2 --references 2 --bank-groups 4 --bootstraps 2"
    line = f"validate --model ./tiny --circuit c.safetensors --scenarios sev.jsonl --replies bank.jsonl --out v.safetensors --quick {few}"
    printed = _said(capsys, line)
    for said in ("necessary:", "sufficient:", "reading:", "swaps", "one emotion's or all emotions'?", "stable:", "is it a circuit?"):
        assert said in printed
    assert not list(tmp_path.glob("*partial*"))
    shown = json.loads(_said(capsys, "inspect v.safetensors --json"))
    assert shown["kind"] == "validation" and shown["command"] == f"emosteer {line}"
    assert shown["provenance"]["params"]["prompts"] == 2 and shown["provenance"]["params"]["kinds"] == [RESAMPLE], "what is given stays"
    assert json.loads(_said(capsys, f"{line} --json"))["claims"] == shown["content"]["claims"]


def _said(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """What a command prints."""
    with pytest.raises(SystemExit) as ended:
        cli.main(line.split())
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_what_is_left_out_is_not_measured_and_the_rest_is_the_same(planted: Planted, tmp_path: Path) -> None:
    """With what was read beforehand kept from an earlier run, too: damaged, it is read again."""
    groups, bank = data()
    circuit, log = circuit_of(planted, planted.heads), tmp_path / "p.jsonl"
    whole = stage.validate(planted.model, circuit, groups, bank, SMALL, partial=log)
    kept = tmp_path / "p.jsonl.prepared"
    assert kept.is_file()
    part = stage.validate(planted.model, circuit, groups, bank, replace(SMALL, parts=("necessary",)), partial=log)
    assert part.tables["necessary"] == whole.tables["necessary"] and part.tables["claims"] == whole.tables["claims"]
    assert not any(part.tables[name] for name in ("sufficient", "reading", "swaps")) and not part.read
    part.save(tmp_path / "v.safetensors")
    assert Validation.load(tmp_path / "v.safetensors").followed == part.followed
    kept.write_bytes(kept.read_bytes()[:-9])
    log.unlink()
    again = stage.validate(planted.model, circuit, groups, bank, replace(SMALL, parts=("swaps",)), partial=log)
    assert again.tables["swaps"] == whole.tables["swaps"] and again.tables["stable"] == whole.tables["stable"]


def test_it_is_read_back_as_it_was_written_and_nonsense_is_refused(found: Validation, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    found.save(path)
    back = Validation.load(path)
    assert back.followed == found.followed and back.tables == found.tables and torch.equal(back.read_figures, found.read_figures)
    for change, said in (
        ({"inclusion": found.inclusion + 2}, "inclusion"),
        ({"followed_figures": found.followed_figures[:-1]}, "followed"),
        ({"tables": {**found.tables, "claims": [{"size": "whole"}]}}, "claims"),
        ({"tables": {**found.tables, "necessary": [{**found.tables["necessary"][0], "emotion": "love"}]}}, "love"),
    ):
        replace(found, **change).save(path)  # type: ignore[arg-type]
        with pytest.raises(ArtifactError, match=said):
            Validation.load(path)


def test_too_few_prompts_and_settings_without_sense_are_refused(planted: Planted) -> None:
    groups, bank = data()
    circuit = circuit_of(planted, planted.heads)
    with pytest.raises(DataError, match="more than 8 prompts"):
        stage.validate(planted.model, circuit, groups, bank, replace(SETTINGS, prompts=8))
    with pytest.raises(ArtifactError, match="the circuit was made for"):
        other = replace(circuit, provenance=replace(circuit.provenance, model_sha256="0" * 64))
        stage.validate(planted.model, other, groups, bank, SETTINGS)
    for wrong in ({"kinds": ("means",)}, {"sizes": (0.0,)}, {"focus": 2.0}, {"prompts": 1}, {"held": ()}, {"randoms": 1}):
        with pytest.raises(UsageError):
            ValidateSettings(**wrong)  # type: ignore[arg-type]


def test_trials_under_a_prompt_for_another_emotion_are_kept_apart(found: Validation) -> None:
    """What an emotion's circuit does to other emotions is measured under their prompts, and counts for specificity alone."""
    asked = {(t.emotion, t.asked) for t in found.followed if t.who == OWN and t.action == ABLATE and t.elicitation == "tone"}
    assert asked == {(a, b) for a in EMOTIONS for b in EMOTIONS}
    assert {t.asked == t.emotion for t in found.followed if t.who == NEUTRAL_ASKED} == {True}
