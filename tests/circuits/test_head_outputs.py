"""Learned head outputs: what is learned is what the circuit adds, at the heads; names stay spared; the weakest heads go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emosteer.attribution.unit_scores import written_direction
from emosteer.base.errors import UsageError
from emosteer.circuits import learning
from emosteer.circuits.assemble import assemble
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.gains import learn_gains
from emosteer.circuits.head_outputs import HeadOutputs, head_outputs, learn_outputs
from emosteer.circuits.learning import Learned
from emosteer.circuits.methods import Part
from emosteer.circuits.name_sparing import without_names
from emosteer.circuits.settings import GainSettings
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, RESID_MID, Head, Site
from emosteer.scenarios.scenarios import Group
from tests.attribution.test_unit_scores import double
from tests.circuits.test_assemble import direction_by_hand
from tests.circuits.test_gains import BANK, EMOTIONS, GROUPS, INSTRUCTION, contrast, cost_by_hand, loss_by_hand
from tests.circuits.test_learned_residual import BRIEF, FEW, made_directions

FAST = replace(BRIEF, learn="outputs", output_rate=0.3)


def spared(model: Model) -> Tensor:
    return without_names(model, EMOTIONS, contrast(model))


def outputs(model: Model, settings: GainSettings = FAST, spare: bool = True) -> HeadOutputs:
    return head_outputs(model, spared(model) if spare else contrast(model), EMOTIONS, spare, settings)


def learned(model: Model, settings: GainSettings, spare: bool = True, bank: Mapping[Any, Any] = BANK) -> tuple[Tensor, Learned]:
    z = spared(model) if spare else contrast(model)
    return learn_outputs(model, z, spare, GROUPS, bank, EMOTIONS, INSTRUCTION, settings)


# ---- what is learned is what is added --------------------------------------------------------------------------------


def test_the_packed_pass_equals_single_passes_with_the_outputs_put_into_z(family: Model) -> None:
    what = outputs(family)
    values = what.start() + 0.3 * torch.randn(what.first.shape, generator=torch.Generator().manual_seed(4))
    z = what.outputs(values).flatten(-2)
    group, one = GROUPS[0], torch.ones(3, 4)
    replies = [BANK[group.key][emotion] for emotion in EMOTIONS]
    found = learning.reply_costs(family, group, replies, (1,), what.added(values), INSTRUCTION)
    for row, shift in zip(found, (0, 1), strict=True):
        by_hand = [cost_by_hand(family, group, replies[(e + shift) % 3], z[e], one) for e in range(3)]
        assert row.tolist() == pytest.approx(by_hand, abs=1e-4)
    unsteered = cost_by_hand(family, group, replies[0], 0 * z[0], one)
    assert abs(found[0, 0].item() - unsteered) > 1e-3, "the outputs are felt"


def test_gradients_are_the_slopes_of_the_loss() -> None:
    model = double("llama")
    settings = replace(FAST, preference=2.0, sharpness=1.5)
    what, group = outputs(model, settings), GROUPS[1]
    what = replace(what, **{name: getattr(what, name).double() for name in ("first", "scale", "output", "names")})
    values = what.start().double().requires_grad_()
    replies = [BANK[group.key][emotion] for emotion in EMOTIONS]
    learning.objective(learning.reply_costs(model, group, replies, (1, 2), what.added(values), INSTRUCTION), settings).backward()
    assert values.grad is not None and all(weight.grad is None for weight in model.hf.parameters())
    dose, found, by_hand = 1e-3, [], []
    for e, layer, head, coordinate in ((0, 0, 0, 0), (1, 2, 3, 5), (2, 1, 2, 7), (0, 2, 1, 3)):
        sides = []
        for sign in (1, -1):
            moved = values.detach().clone()
            moved[e, layer, head, coordinate] += sign * dose
            z = what.outputs(moved).flatten(-2)[e]
            costs = [cost_by_hand(model, group, replies[(e + shift) % 3], z, torch.ones(3, 4)) for shift in (0, 1, 2)]
            sides.append(loss_by_hand(costs, 2.0, 1.5))
        found.append(values.grad[e, layer, head, coordinate].item())
        by_hand.append((sides[0] - sides[1]) / (2 * dose))
    assert found == pytest.approx(by_hand, abs=1e-4) and max(map(abs, by_hand)) > 1e-3


def test_without_steps_it_is_the_heads_contrast_at_the_starting_gain(family: Model) -> None:
    z, found = learned(family, replace(FAST, steps=0, output_start=1.5))
    torch.testing.assert_close(z, 1.5 * spared(family), atol=1e-6, rtol=1e-5)
    assert found.curve == found.margin == ()


# ---- learning --------------------------------------------------------------------------------------------------------


def margin(model: Model, z: Tensor, bank: Mapping[Any, Any] = BANK) -> float:
    apart = []
    for group in GROUPS:
        for e, emotion in enumerate(EMOTIONS):
            cost = {other: cost_by_hand(model, group, bank[group.key][other], z[e], torch.ones(3, 4)) for other in EMOTIONS}
            apart += [cost[other] - cost[emotion] for other in EMOTIONS if other != emotion]
    return sum(apart) / len(apart)


def test_learning_tells_the_replies_apart_and_better_than_gains_can(tiny: Model) -> None:
    """Ground truth by single passes by hand: the same data, steps and starting point, with more freedom."""
    settings = replace(FAST, steps=16)
    start, _ = learned(tiny, replace(settings, steps=0))
    z, found = learned(tiny, settings)
    assert z.shape == start.shape and len(found.curve) == len(found.margin) == 16
    gains = learn_gains(tiny, spared(tiny), GROUPS, BANK, EMOTIONS, INSTRUCTION, settings)
    scaled = (spared(tiny).unflatten(-1, (4, 8)) * gains.values[..., None]).flatten(-2)
    before, after, by_gains = (margin(tiny, some) for some in (start, z, scaled))
    assert after > before + 0.1 and after > by_gains + 0.05
    assert margin(tiny, z.roll(1, 0)) < after, "each emotion's outputs are its own"


def test_half_of_the_heads_go_and_stay_away(tiny: Model) -> None:
    z, _ = learned(tiny, replace(FAST, steps=6, keep=0.25))
    heads = z.unflatten(-1, (4, 8)).any(-1).flatten(1)
    assert heads.sum(1).tolist() == [3, 3, 3]
    what = outputs(tiny)
    size = what.written(what.start()).norm(dim=-1).flatten(1)
    mask = what.kept(what.start(), 0.5)[..., 0].flatten(1)
    for e in range(3):
        assert set(mask[e].nonzero().flatten().tolist()) == set(size[e].topk(6).indices.tolist())


def test_draws_are_those_of_gains(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    usual = learning.reply_costs

    def watched(model: Model, group: Group, replies: Sequence[str], shifts: Sequence[int], *rest: Any) -> Tensor:
        seen.append((group.key, tuple(replies), tuple(shifts)))
        return usual(model, group, replies, shifts, *rest)

    monkeypatch.setattr(learning, "reply_costs", watched)
    learn_gains(tiny, contrast(tiny), GROUPS, BANK, EMOTIONS, INSTRUCTION, FAST)
    by_gains = seen.copy()
    seen.clear()
    first, _ = learned(tiny, FAST)
    assert seen == by_gains and torch.equal(first, learned(tiny, FAST)[0])


# ---- names -----------------------------------------------------------------------------------------------------------


def test_no_head_writes_the_emotion_s_name(family: Model) -> None:
    """By the model's own output weights and unembedding, head by head, behind what a family's norms make of it; without sparing they do."""
    shape = family.shape
    for spare in (True, False):
        z, _ = learned(family, FAST, spare)
        heads, lifts, sizes = z.unflatten(-1, (shape.n_heads, shape.d_head)), [], []
        for e, emotion in enumerate(EMOTIONS):
            name = direction_by_hand(family, emotion)
            for layer in range(shape.n_layers):
                of_output = written_direction(family, layer, RESID_MID, name).float()
                written = torch.einsum("hd,hdm->hm", heads[e, layer], family.w_o(layer).float())
                lifts.append((written @ of_output).abs().max().item())
                sizes.append((written.norm(dim=-1) * of_output.norm()).max().item())
        assert max(lifts) < 1e-5 * max(sizes) if spare else max(lifts) > 1e-2 * max(sizes)


# ---- the stage -------------------------------------------------------------------------------------------------------


def test_the_circuit_adds_what_was_learned_and_says_so(tiny: Model, tmp_path: Path) -> None:
    directions = made_directions(tiny)
    circuit = assemble(tiny, directions, GROUPS, FEW, bank=BANK, gain_settings=FAST)
    z = without_names(tiny, EMOTIONS, directions.z.mean)
    wanted, found = learn_outputs(tiny, z, True, GROUPS, BANK, EMOTIONS, INSTRUCTION, FAST)
    torch.testing.assert_close(circuit.z_delta, wanted, atol=0, rtol=0)
    assert circuit.learned_gains and circuit.learned_outputs and circuit.strength.tolist() == pytest.approx([0.7] * 3)
    assert circuit.metrics["gains"]["learn"] == "outputs" and circuit.metrics["gains"]["margin"] == list(found.margin)
    assert circuit.provenance.method.startswith("learned head outputs")
    for e, emotion in enumerate(EMOTIONS):
        heads = {(unit.layer, unit.index) for unit in circuit.units(emotion) if isinstance(unit, Head)}
        assert heads == {tuple(place) for place in wanted[e].unflatten(-1, (4, 8)).any(-1).nonzero().tolist()} and len(heads) == 6
        for layer in range(3):
            summed = torch.einsum("hd,hdm->m", wanted[e, layer].unflatten(-1, (4, 8)), tiny.w_o(layer).float())
            torch.testing.assert_close(circuit.added(Part.UNITS, tiny)[Site(layer, ATTN_OUT)][e], summed, atol=1e-6, rtol=1e-4)
    circuit.save(tmp_path / "c.safetensors")
    assert torch.equal(Circuit.load(tmp_path / "c.safetensors", tiny).z_delta, circuit.z_delta)


def test_what_is_learned_is_named(tiny: Model) -> None:
    with pytest.raises(UsageError, match="unknown --learn 'output' .did you mean 'outputs'.*expected outputs, gains"):
        GainSettings(learn="output")
    with pytest.raises(UsageError, match="expected a rate above 0"):
        GainSettings(output_rate=0.0)
