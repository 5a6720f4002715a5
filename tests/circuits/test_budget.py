"""Circuits within a budget: what is learned of heads and neurons is what is added, names stay spared, the budget is met, and the units that
a sparse solution needs are found."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from emosteer.attribution.unit_scores import UnitScores, written_direction
from emosteer.base.errors import UsageError
from emosteer.circuits import learning
from emosteer.circuits.assemble import assemble
from emosteer.circuits.budget import choice_of, learn_within_budget
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.gates import chance_open, learn_gates, sampled
from emosteer.circuits.learning import Compared, Comparisons
from emosteer.circuits.name_sparing import without_names
from emosteer.circuits.schedule import Schedule
from emosteer.circuits.selection import Ranked, Worth, integrated_gradients, shuffled
from emosteer.circuits.settings import SELECTIONS, GainSettings
from emosteer.circuits.unit_outputs import UnitOutputs, unit_outputs
from emosteer.directions.directions import Directions
from emosteer.models.model import Model
from emosteer.models.sites import RESID_POST, Head, Neuron
from emosteer.report.commands import made_by
from emosteer.scenarios.prompts import plain
from emosteer.scenarios.scenarios import Group
from tests.attribution.test_unit_scores import double
from tests.circuits.test_assemble import direction_by_hand
from tests.circuits.test_gains import BANK, EMOTIONS, GROUPS, INSTRUCTION, contrast
from tests.circuits.test_learned_residual import FEW, made_directions
from tests.conftest import build
from tests.helpers import reference

BRIEF = GainSettings(steps=8, groups=2, dtype="float32", output_rate=0.3, neuron_rate=0.3, budget=0.25)
N_HEADS, N_NEURONS = 12, 144  # of the tiny models


def neuron_contrast(model: Model, seed: int = 1) -> Tensor:
    """Random contrasts of neurons [emotion, layer, d_mlp]."""
    return 0.3 * torch.randn(3, model.shape.n_layers, model.shape.d_mlp, generator=torch.Generator().manual_seed(seed))


def outputs(model: Model, settings: GainSettings = BRIEF, spare: bool = True) -> UnitOutputs:
    z = without_names(model, EMOTIONS, contrast(model)) if spare else contrast(model)
    return unit_outputs(model, z, neuron_contrast(model), EMOTIONS, spare, settings)


def moved(what: UnitOutputs) -> Tensor:
    """Values of every unit, away from where learning starts."""
    start = what.start()
    return start + 0.5 * torch.randn(start.shape, generator=torch.Generator().manual_seed(4)).to(start)


@pytest.fixture(scope="module")
def directions(tiny: Model) -> Directions:
    return made_directions(tiny)


# ---- what is learned is what is added --------------------------------------------------------------------------------


@torch.no_grad()
def cost_by_hand(model: Model, group: Group, reply: str, z: Tensor, neurons: Tensor) -> float:
    """Mean nats per token of one reply and its end, on its own, with `z` and the neurons themselves changed by bare hooks from the last
    prompt position on. z: [layer, n_heads * d_head]; neurons: [layer, d_mlp]."""
    prompt = model.prompt_ids(plain(group.text, INSTRUCTION, group.earlier))
    tokens = [*model.text_ids(reply), model.tokenizer.eos_token_id]
    changes = {}
    for layer in range(model.shape.n_layers):
        for kind, added in (("z", z[layer]), ("mlp_post", neurons[layer])):

            def change(x: Tensor, added: Tensor = added) -> Tensor:
                return torch.cat([x[:, : len(prompt) - 1], x[:, len(prompt) - 1 :] + added.to(x)], 1)

            changes[layer, kind] = change
    with reference.changed(model.hf, changes):
        logits = model.hf(torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return float(cross_entropy(logits.double(), torch.tensor(tokens)))


def test_the_packed_pass_equals_single_passes_with_heads_and_neurons_changed(family: Model) -> None:
    what = outputs(family)
    values = moved(what)
    z, neurons = what.outputs(values)
    group = GROUPS[0]
    replies = [BANK[group.key][emotion] for emotion in EMOTIONS]
    found = learning.reply_costs(family, group, replies, (1,), what.added(values), INSTRUCTION)
    for row, shift in zip(found, (0, 1), strict=True):
        by_hand = [cost_by_hand(family, group, replies[(e + shift) % 3], z[e], neurons[e]) for e in range(3)]
        assert row.tolist() == pytest.approx(by_hand, abs=1e-4)
    without = [cost_by_hand(family, group, replies[e], z[e], 0 * neurons[e]) for e in range(3)]
    assert max(abs(a - b) for a, b in zip(found[0].tolist(), without, strict=True)) > 1e-3, "the neurons are felt"


def test_neurons_start_at_nothing_and_heads_at_their_contrast(tiny: Model) -> None:
    what = outputs(tiny)
    z, neurons = what.outputs(what.start())
    torch.testing.assert_close(z, without_names(tiny, EMOTIONS, contrast(tiny)), atol=1e-6, rtol=1e-5)
    assert not neurons.any()
    both = unit_outputs(tiny, contrast(tiny), neuron_contrast(tiny), EMOTIONS, False, BRIEF)
    z, neurons = both.outputs(both.contrasts())
    torch.testing.assert_close(z, contrast(tiny), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(neurons, neuron_contrast(tiny), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("units", ["heads", "neurons"])
def test_a_circuit_may_be_of_one_kind_of_units(tiny: Model, units: str) -> None:
    what = outputs(tiny, replace(BRIEF, units=units))
    z, neurons = what.outputs(moved(what))
    assert (bool(z.any()), bool(neurons.any())) == (units == "heads", units == "neurons")
    assert what.n_units == what.by_unit(moved(what)).shape[1] == {"heads": N_HEADS, "neurons": N_NEURONS}[units]


@pytest.mark.parametrize("spare", [True, False])
def test_the_neurons_of_a_layer_do_not_write_the_emotion_s_name_whichever_are_left(family: Model, spare: bool) -> None:
    """By the model's own output weights and unembedding; the neurons that are left out stay out."""
    what = outputs(family, spare=spare)
    units = (torch.rand(3, what.n_units, generator=torch.Generator().manual_seed(2)) < 0.2).float()
    neurons = what.outputs(moved(what) * what.by_value(units))[1]
    left = units[:, N_HEADS:].view_as(neurons).bool()
    assert left.any(-1).all() and not neurons[~left].any()
    lifts, sizes = [], []
    for e, emotion in enumerate(EMOTIONS):
        name = direction_by_hand(family, emotion)
        for layer in range(3):
            of_output = written_direction(family, layer, RESID_POST, name).float()
            written = neurons[e, layer] @ family.w_down(layer).float()
            lifts.append((written @ of_output).abs().item())
            sizes.append((written.norm() * of_output.norm()).item())
    assert max(lifts) < 1e-5 * max(sizes) if spare else max(lifts) > 1e-2 * max(sizes)


# ---- schedules -------------------------------------------------------------------------------------------------------


def test_a_gradual_schedule_falls_to_the_budget_and_leaves_time_to_fit_on() -> None:
    schedule = Schedule.gradual(100, 0.05)
    shares = list(schedule.cuts.values())
    assert shares == sorted(shares, reverse=True) and shares[0] == 1 and shares[-1] == pytest.approx(0.05)
    assert min(schedule.cuts) == 20 and max(schedule.cuts) < 66 and schedule.ends == (100,)
    assert shares[0] - shares[5] > shares[-6] - shares[-1], "most go first"
    for steps in (1, 2, 3):
        assert list(Schedule.gradual(steps, 0.05).cuts.values())[-1] == pytest.approx(0.05), "however few the steps"


def test_the_rate_comes_down_before_every_end_and_starts_anew() -> None:
    halfway = Schedule.halfway(10, 0.5)
    assert [halfway.rate(step) for step in range(10)] == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    down = Schedule.descent((0.5, 0.1), 4, 4)
    assert (down.steps, down.cuts, down.ends) == (12, {4: 0.5, 8: 0.1}, (8, 12))
    assert [down.rate(step) for step in range(12)] == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 1, 1, 1, 0.5])


# ---- which units are left --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Planted:
    """A problem that few units can solve. needed: [unit], ones for those."""

    model: Model
    needed: Tensor


@pytest.fixture(scope="module")
def planted() -> Planted:
    """A random model in which all units write much, most of them into a part of the stream that nothing reads: not the layers above, nor
    the unembedding. Two heads and 24 neurons, a sixth of either, write where it is read."""
    model, draw = build("llama", seed=3), torch.Generator().manual_seed(5)
    hidden = torch.linalg.qr(torch.randn(32, 8, generator=draw))[0]
    hidden = hidden @ hidden.T
    needed = torch.zeros(N_HEADS + N_NEURONS)
    needed[torch.randperm(N_HEADS, generator=draw)[:2]] = 1
    needed[N_HEADS + torch.randperm(N_NEURONS, generator=draw)[:24]] = 1
    heads, neurons = needed[:N_HEADS].view(3, 4), needed[N_HEADS:].view(3, 48)
    with torch.no_grad():
        for layer, block in enumerate(model.hf.model.layers):
            attention, mlp = block.self_attn, block.mlp
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                part.weight -= part.weight @ hidden
            for part, seen in ((attention.o_proj, heads[layer].repeat_interleave(8)), (mlp.down_proj, neurons[layer])):
                lost = 2 * hidden @ part.weight
                part.weight.copy_(torch.where(seen.bool(), part.weight, lost))
        model.hf.lm_head.weight -= model.hf.lm_head.weight @ hidden
    return Planted(Model.from_hf(model.hf, model.tokenizer, "tiny-planted"), needed)


def share_found(planted: Planted, what: UnitOutputs, units: Tensor) -> float:
    """The share of the needed units that are among the chosen ones, the mean over emotions. units: [emotion, unit], ones and zeros."""
    assert units.sum(1).tolist() == [26.0] * 3 and units[:, :N_HEADS].sum(1).tolist() == [2.0] * 3
    return ((units * planted.needed).sum(1) / planted.needed.sum()).mean().item()


SIXTH = replace(BRIEF, steps=60, groups=3, budget=1 / 6, preference=2.0)


def test_gates_find_the_units_that_a_sparse_solution_needs(planted: Planted) -> None:
    what = outputs(planted.model, SIXTH, spare=False)
    scores = learn_gates(planted.model, what, GROUPS, BANK, EMOTIONS, INSTRUCTION, SIXTH, 1 / 6)
    logits = what.row(scores)
    assert share_found(planted, what, what.best(logits, 1 / 6)) > 0.6, "four times as many as by chance"
    assert share_found(planted, what, what.best(what.lengths(what.contrasts()), 1 / 6)) < 0.3, "those that write most are others"
    left_open = (chance_open(logits) > 0.5).float()
    assert left_open.sum(1).max() < 2 * 26, "the price has closed most of 156"
    assert (left_open * planted.needed).sum() > 0.5 * left_open.sum(), "and most that are left open are needed"


def test_gradual_pruning_finds_them_too(planted: Planted) -> None:
    what = outputs(planted.model, SIXTH, spare=False)
    choice, left = Worth(what), list[Tensor]()
    context = (GROUPS, BANK, EMOTIONS, INSTRUCTION, SIXTH)
    schedule = Schedule.gradual(60, 1 / 6)
    learning.learn(planted.model, what, *context, schedule=schedule, choice=choice, at_end=lambda _, values: left.append(values))
    assert share_found(planted, what, (what.by_unit(left[0].abs()) > 0).float()) > 0.75


def test_a_gate_is_open_as_often_as_its_logit_says() -> None:
    logits = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0])
    noise = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0))
    gates = sampled(logits, noise)
    torch.testing.assert_close((gates > 0).float().mean(0), chance_open(logits), atol=0.015, rtol=0)
    assert gates.min() == 0 and gates.max() == 1 and ((gates > 0) & (gates < 1)).any()


def test_integrated_gradients_of_the_units_add_up_to_what_all_of_them_do(directions: Directions) -> None:
    """Completeness, against the margins of the two runs by single passes by hand."""
    model = double("llama")
    settings = replace(BRIEF, others=2)
    what = outputs(model, settings)
    assert what.neurons is not None
    found = integrated_gradients(model, what, GROUPS[:2], BANK, directions, settings, prompts=2, points=24)
    torch.testing.assert_close(found.sum.sum(1).float(), (found.end - found.start).float(), atol=2e-3, rtol=0.02)
    z, neurons = what.outputs(what.contrasts())
    draw, data = random.Random(settings.seed), Comparisons.of(GROUPS[:2], BANK, EMOTIONS)
    by_hand = torch.zeros(3)
    for group in (GROUPS[0], GROUPS[1]):
        shifts = Compared.draw(group, data, settings, draw).shifts
        for e in range(3):
            costs = [cost_by_hand(model, group, BANK[group.key][EMOTIONS[(e + s) % 3]], z[e], neurons[e]) for s in (0, *shifts)]
            by_hand[e] += (sum(costs[1:]) / len(costs[1:]) - costs[0]) / 2
    torch.testing.assert_close(found.end.float(), by_hand, atol=1e-3, rtol=0)


def test_random_rankings_take_as_many_of_every_layer() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = UnitScores(torch.randn(2, 3, 4, generator=draw), torch.randn(2, 3, 48, generator=draw))
    other = shuffled(scores, 1)
    for mine, theirs in ((scores.heads, other.heads), (scores.neurons, other.neurons)):
        assert not torch.equal(mine, theirs) and torch.equal(mine.sort(-1).values, theirs.sort(-1).values)
    assert torch.equal(shuffled(scores, 1).heads, other.heads) and not torch.equal(shuffled(scores, 2).neurons, other.neurons)


# ---- the stage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", SELECTIONS)
def test_the_circuit_keeps_to_its_budget_however_its_units_are_chosen(tiny: Model, directions: Directions, select: str) -> None:
    settings = replace(BRIEF, steps=4, select=select)
    z, neurons, found = learn_within_budget(tiny, directions, directions.z.mean, True, GROUPS, BANK, settings)
    assert z.unflatten(-1, (4, 8)).any(-1).flatten(1).sum(1).tolist() == [3] * 3
    assert neurons.ne(0).flatten(1).sum(1).tolist() == [36] * 3
    assert len(found.margin) == (2 if select == "gates" else 4)


def test_a_ranking_decides_which_units_are_left(tiny: Model, directions: Directions) -> None:
    what = outputs(tiny)
    choice = choice_of(tiny, what, GROUPS, BANK, directions, replace(BRIEF, select="contrast"))
    assert isinstance(choice, Ranked)
    kept = choice.kept(what.start(), 0.25)
    table = what.table(choice.scores)
    for e in range(3):
        best = set(table.heads[e].flatten().topk(3).indices.tolist())
        assert set(what.parts(kept)[0][e].any(-1).flatten().nonzero().flatten().tolist()) == best  # type: ignore[index]


def test_the_circuit_adds_what_was_learned_of_heads_and_neurons_and_says_so(tiny: Model, directions: Directions, tmp_path: Path) -> None:
    settings = replace(BRIEF, steps=4)
    circuit = assemble(tiny, directions, GROUPS, FEW, bank=BANK, gain_settings=settings)
    contrasts = without_names(tiny, EMOTIONS, directions.z.mean)
    z, neurons, _ = learn_within_budget(tiny, directions, contrasts, True, GROUPS, BANK, settings)
    torch.testing.assert_close(circuit.z_delta, z, atol=0, rtol=0)
    torch.testing.assert_close(circuit.mlp_delta(), neurons, atol=0, rtol=0)
    for emotion in EMOTIONS:
        units = circuit.units(emotion)
        assert (sum(isinstance(unit, Head) for unit in units), sum(isinstance(unit, Neuron) for unit in units)) == (3, 36)
    assert circuit.learned_outputs and circuit.metrics["gains"]["budget"] == 0.25
    assert circuit.provenance.method.startswith("learned outputs of heads and neurons")
    assert "--gain-steps 4 --budget 0.25" in made_by("circuit", circuit, "m") and "--select" not in made_by("circuit", circuit, "m")
    circuit.save(tmp_path / "c.safetensors")
    assert torch.equal(Circuit.load(tmp_path / "c.safetensors", tiny).mlp_delta(), neurons)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown --select 'gate' .did you mean 'gates'"):
        GainSettings(select="gate")
    with pytest.raises(UsageError, match="unknown --units 'head'"):
        GainSettings(units="head")
    with pytest.raises(UsageError, match="expected --budget to be a share of the units above 0 and up to 1, found 5"):
        GainSettings(budget=5)
    with pytest.raises(UsageError, match="--learn gains"):
        GainSettings(budget=0.1, learn="gains")
