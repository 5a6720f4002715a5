"""Learned residual vectors: learned as the gains are, on the same draws; what is learned is what is added; names stay spared."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from emosteer.base.errors import ArtifactError, DataError, UsageError
from emosteer.circuits import assemble as assembly
from emosteer.circuits import learning
from emosteer.circuits.assemble import DEFAULT_RESIDUAL_STRENGTH, assemble, residual_band
from emosteer.circuits.circuit import Circuit, default_strengths
from emosteer.circuits.gains import learn_gains
from emosteer.circuits.learned_residual import FreeVectors, free_vectors, learn_residual
from emosteer.circuits.learning import Learned
from emosteer.circuits.methods import LEARNED_RESIDUAL, Part
from emosteer.circuits.name_sparing import name_directions
from emosteer.circuits.settings import CircuitSettings, GainSettings, VectorSettings
from emosteer.cli.print_artifacts import circuit_summary, print_circuit
from emosteer.directions.directions import Directions
from emosteer.directions.extract import extract
from emosteer.directions.settings import Settings
from emosteer.generation.steering import Injector, plan_for, residual_vectors
from emosteer.models.model import Model
from emosteer.models.sites import RESID_POST, Site
from emosteer.report.commands import made_by
from emosteer.scenarios.prompts import plain
from emosteer.scenarios.scenarios import Group
from tests.attribution.test_unit_scores import double
from tests.circuits.test_assemble import direction_by_hand
from tests.circuits.test_gains import BANK, EMOTIONS, GROUPS, INSTRUCTION, contrast, loss_by_hand
from tests.conftest import build
from tests.helpers import reference
from tests.helpers.precision import assert_forward

LAYERS = (1, 2)
FEW = CircuitSettings(n_prompts=2, n_random=0)
BRIEF = GainSettings(steps=3, groups=2, dtype="float32")
#: The tiny models' streams are small and their replies random: larger steps than a real model needs.
FAST = VectorSettings(rate=1.0)


def made_directions(model: Model) -> Directions:
    return extract(model, GROUPS, Settings(EMOTIONS, holdout=0, instruction=INSTRUCTION), bank=BANK)


@pytest.fixture(scope="module")
def directions(tiny: Model) -> Directions:
    return made_directions(tiny)


def free(model: Model, directions: Directions, spare: bool = True, strength: float = 1.0) -> FreeVectors:
    return free_vectors(model, directions, LAYERS, strength, spare, FAST)


def learned(
    model: Model, directions: Directions, settings: GainSettings, spare: bool = True, bank: Mapping[Any, Any] = BANK
) -> tuple[Tensor, Learned]:
    return learn_residual(model, free(model, directions, spare), GROUPS, bank, directions, settings)


@torch.no_grad()
def cost_by_hand(model: Model, group: Group, reply: str, vectors: Tensor) -> float:
    """Mean nats per token of one reply and its end, on its own: vectors [layer of LAYERS, d_model] are added to the layers' outputs by
    bare hooks, from the last prompt position on."""
    prompt = model.prompt_ids(plain(group.text, INSTRUCTION))
    tokens = [*model.text_ids(reply), model.tokenizer.eos_token_id]

    def adding(value: Tensor) -> Any:
        return lambda x: torch.cat([x[:, : len(prompt) - 1], x[:, len(prompt) - 1 :] + value.to(x)], 1)

    changes = {(layer, "resid_post"): adding(vector) for layer, vector in zip(LAYERS, vectors, strict=True)}
    with reference.changed(model.hf, changes):
        logits = model.hf(torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return float(cross_entropy(logits.double(), torch.tensor(tokens)))


def margin_by_hand(model: Model, vectors: Tensor, bank: Mapping[Any, Any] = BANK) -> float:
    """How many more nats per token the other emotions' replies cost, over all groups. vectors: [emotion, layer of LAYERS, d_model]."""
    apart = []
    for group in GROUPS:
        for e, emotion in enumerate(EMOTIONS):
            cost = {other: cost_by_hand(model, group, bank[group.key][other], vectors[e]) for other in EMOTIONS}
            apart += [cost[other] - cost[emotion] for other in EMOTIONS if other != emotion]
    return sum(apart) / len(apart)


# ---- what is learned is what is added --------------------------------------------------------------------------------


def test_the_packed_pass_equals_single_passes_with_hooks_by_hand(family: Model) -> None:
    what = free(family, made_directions(family), strength=2.0)
    vectors = what.vectors(what.start())
    for group in GROUPS[:2]:
        replies = [BANK[group.key][e] for e in EMOTIONS]
        found = learning.reply_costs(family, group, replies, (2, 1), what.added(what.start()), INSTRUCTION)
        for row, shift in zip(found, (0, 2, 1), strict=True):
            texts = [replies[(e + shift) % 3] for e in range(3)]
            by_hand = [cost_by_hand(family, group, text, vectors[e]) for e, text in enumerate(texts)]
            assert row.tolist() == pytest.approx(by_hand, abs=1e-4)
            unsteered = [cost_by_hand(family, group, text, 0 * vectors[e]) for e, text in enumerate(texts)]
            assert min(abs(a - b) for a, b in zip(by_hand, unsteered, strict=True)) > 3e-4, "the vectors are felt"


def test_gradients_are_the_slopes_of_the_loss_and_reach_nothing_but_the_vectors() -> None:
    model, settings = double("llama"), GainSettings(preference=2.0, sharpness=1.5)
    what = free(model, made_directions(model))
    values, group = what.start().double().requires_grad_(), GROUPS[1]
    replies = [BANK[group.key][e] for e in EMOTIONS]
    costs = learning.reply_costs(model, group, replies, (1, 2), what.added(values), INSTRUCTION)
    learning.objective(costs, settings).backward()
    assert values.grad is not None and all(weight.grad is None and not weight.requires_grad for weight in model.hf.parameters())
    found, by_hand, draw, dose = [], [], random.Random(0), 1e-3
    for _ in range(10):
        e, place, coordinate = draw.randrange(3), draw.randrange(2), draw.randrange(32)
        sides = []
        for sign in (1, -1):
            moved = values.detach().clone()
            moved[e, place, coordinate] += sign * dose
            some = [cost_by_hand(model, group, replies[(e + shift) % 3], what.vectors(moved)[e]) for shift in (0, 1, 2)]
            sides.append(loss_by_hand(some, 2.0, 1.5))
        found.append(values.grad[e, place, coordinate].item())
        by_hand.append((sides[0] - sides[1]) / (2 * dose))
    assert found == pytest.approx(by_hand, abs=1e-4) and max(map(abs, by_hand)) > 0.01


def test_without_steps_it_is_residual_steering(family: Model) -> None:
    """Exactly where no name is spared; else less what of the directions lifts the emotion's own name."""
    directions, nothing = made_directions(family), GainSettings(steps=0)
    post = [directions.sites.index(Site(layer, RESID_POST)) for layer in range(3)]
    plain_vectors = residual_vectors(directions.at(RESID_POST), directions.rms[post], LAYERS)
    for spare in (False, True):
        vectors, found = learned(family, directions, nothing, spare)
        assert found.curve == found.margin == ()
        for place, layer in enumerate(LAYERS):
            wanted = plain_vectors[Site(layer, RESID_POST)].clone()
            for e, emotion in enumerate(EMOTIONS if spare else ()):
                name = direction_by_hand(family, emotion) / direction_by_hand(family, emotion).norm()
                assert abs(wanted[e] @ name) > 1e-4, "there is something to spare"
                wanted[e] -= (wanted[e] @ name) * name
            torch.testing.assert_close(vectors[:, place], wanted, atol=1e-6 if spare else 0.0, rtol=1e-5 if spare else 0.0)


# ---- learning --------------------------------------------------------------------------------------------------------


def test_learning_makes_the_wanted_replies_likelier_and_the_margin_rise(family: Model) -> None:
    directions, settings = made_directions(family), GainSettings(steps=16, groups=2, dtype="float32")
    start, _ = learned(family, directions, replace(settings, steps=0))
    vectors, found = learned(family, directions, settings)
    assert vectors.shape == (3, 2, 32) and vectors.dtype == torch.float32 and not vectors.requires_grad
    assert len(found.curve) == len(found.margin) == 16
    assert sum(found.margin[-4:]) / 4 > sum(found.margin[:4]) / 4 + 0.1 and sum(found.curve[-4:]) < sum(found.curve[:4])
    before, after = margin_by_hand(family, start), margin_by_hand(family, vectors)
    assert after > before + 0.1 and margin_by_hand(family, vectors.roll(1, 0)) < after, "each emotion's vectors are its own"


def test_the_margin_rises_on_the_planted_task_where_that_of_gains_does() -> None:
    """The wanted reply is one word over and over. One head of the last layer writes it, which the gains find; the vectors find the word
    from directions that know nothing of it."""
    model = build("llama", seed=3)
    weight, bank = model.hf.lm_head.weight, {group.key: {emotion: " ".join([emotion] * 4) for emotion in EMOTIONS} for group in GROUPS}
    words = torch.stack([weight[model.tokenizer.get_vocab()[emotion]] - weight.mean(0) for emotion in EMOTIONS])
    z = torch.zeros(3, 3, 4, 8)
    reached = (words * model.hf.model.norm.weight) @ model.hf.model.layers[2].self_attn.o_proj.weight[:, :8]
    z[:, 2, 0] = reached / reached.norm(dim=-1, keepdim=True)
    settings = GainSettings(steps=16, groups=2, start=0.5, keep=1 / 12, dtype="float32")
    gains = learn_gains(model, z.flatten(-2), GROUPS, bank, EMOTIONS, INSTRUCTION, settings)
    directions = made_directions(model)
    vectors, found = learned(model, directions, settings, spare=False, bank=bank)
    for margin in (gains.margin, found.margin):
        assert sum(margin[-4:]) / 4 > sum(margin[:4]) / 4 + 0.1
    start, _ = learned(model, directions, replace(settings, steps=0), spare=False, bank=bank)
    cosines = [torch.cosine_similarity(some[:, 1], words * model.hf.model.norm.weight).mean() for some in (start, vectors)]
    assert cosines[1] > cosines[0] + 0.2, "the last layer's vectors turn to the words"
    assert margin_by_hand(model, vectors, bank) > margin_by_hand(model, start, bank) + 0.5


def test_gains_and_vectors_meet_the_same_groups_and_comparisons(
    tiny: Model, directions: Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    usual = learning.reply_costs

    def watched(model: Model, group: Group, replies: Sequence[str], shifts: Sequence[int], *rest: Any) -> Tensor:
        seen.append((group.key, tuple(replies), tuple(shifts), tuple(rest[-1]), model.dtype))
        return usual(model, group, replies, shifts, *rest)

    monkeypatch.setattr(learning, "reply_costs", watched)
    settings = GainSettings(steps=6, groups=2, others=1, content=1.0, dtype="bfloat16")
    learn_gains(tiny, contrast(tiny), GROUPS, BANK, EMOTIONS, INSTRUCTION, settings)
    by_gains = seen.copy()
    seen.clear()
    learned(tiny, directions, settings)
    assert seen == by_gains and len(seen) == 24 and len({key for key, *_ in seen}) == 9
    assert all(elsewhere and set(elsewhere).isdisjoint(replies) for _, replies, _, elsewhere, _ in seen), "of another prompt"
    seen.clear()
    learned(tiny, directions, replace(settings, seed=1))
    assert seen != by_gains, "another seed, other draws"


def test_learning_is_deterministic_and_leaves_everything_as_it_was(tiny: Model, directions: Directions) -> None:
    before, weights = directions.vectors.clone(), {name: value.clone() for name, value in tiny.hf.state_dict().items()}
    first, again = (learned(tiny, directions, BRIEF)[0] for _ in range(2))
    assert torch.equal(first, again) and torch.equal(directions.vectors, before)
    assert all(torch.equal(value, weights[name]) for name, value in tiny.hf.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny.hf.parameters())


def test_one_step_moves_a_vector_by_the_rate_in_rms(tiny: Model, directions: Directions) -> None:
    """The first step of Adam moves every coordinate by its rate; the last of one step goes at the full rate."""
    what = replace(free(tiny, directions, spare=False), step=0.25)
    vectors, _ = learn_residual(tiny, what, GROUPS, BANK, directions, replace(BRIEF, steps=1))
    moved = (vectors - what.vectors(what.start())) / what.rms[:, None]
    torch.testing.assert_close(moved.norm(dim=-1), torch.full((3, 2), 0.25), atol=1e-3, rtol=0)


def test_nothing_to_learn_from_is_refused(tiny: Model, directions: Directions) -> None:
    with pytest.raises(DataError, match="no scenario-event has bank replies in two emotions"):
        learned(tiny, directions, BRIEF, bank={})
    with pytest.raises(UsageError, match="expected a rate above 0, found 0"):
        VectorSettings(rate=0.0)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_names_are_spared_while_learning_and_afterwards(family: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    names = torch.stack([direction_by_hand(family, emotion) for emotion in EMOTIONS])
    names = names / names.norm(dim=-1, keepdim=True)
    directions, lifts, usual = made_directions(family), list[float](), learning.reply_costs

    def watched(model: Model, group: Group, replies: Sequence[str], shifts: Sequence[int], added: Any, *rest: Any) -> Tensor:
        lifts.extend((value.detach() * names).sum(-1).abs().max().item() for value in added.values())
        return usual(model, group, replies, shifts, added, *rest)

    monkeypatch.setattr(learning, "reply_costs", watched)
    settings = GainSettings(steps=5, groups=1, dtype="float32")
    for spare in (True, False):
        lifts.clear()
        vectors, _ = learned(family, directions, settings, spare)
        lifts.append((vectors * names[:, None]).sum(-1).abs().max().item())
        scale = vectors.norm(dim=-1).max().item()
        assert len(lifts) == 2 * 5 + 1 and (max(lifts) < 1e-5 * scale if spare else min(lifts) > 1e-2 * scale)


def test_a_spared_vector_does_not_move_the_name_s_logit_against_the_others(tiny: Model, directions: Directions) -> None:
    """In the last layer, behind which only the final norm follows: it may rescale the logits' differences, and does nothing else."""
    vectors, _ = learned(tiny, directions, BRIEF)
    ids = torch.tensor([tiny.prompt_ids(plain(GROUPS[0].text, INSTRUCTION))])
    for e, emotion in enumerate(EMOTIONS):
        leads, scales = [], []
        for dose in (0.0, 1.0):
            push, last = dose * vectors[e, 1], Site(2, RESID_POST)

            def edit(x: Tensor, push: Tensor = push) -> Tensor:
                return x + push

            with torch.no_grad():
                stream = tiny.read(ids, [last], edits={last: edit}, bridge=False)[last][0, -1]
                logits = tiny.logits(tiny.final_norm(stream))
            scales.append(stream.square().mean().add(1e-6).sqrt())
            leads.append((logits[tiny.tokenizer.get_vocab()[emotion]] - logits.mean()) * scales[-1])
        assert leads[1].item() == pytest.approx(leads[0].item(), abs=1e-3) and abs(scales[1] / scales[0] - 1) > 1e-4


def test_an_emotion_without_a_name_in_the_vocabulary_is_free(tiny: Model) -> None:
    found = name_directions(tiny, ("anger", "serenity"))
    assert not found[1].any() and found[0].norm().item() == pytest.approx(1.0)
    values = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    vectors = FreeVectors(values, torch.tensor([2.0]), (1,), found, 0.1).vectors(values)
    assert torch.equal(vectors[1], 2 * values[1]) and abs(vectors[0, 0] @ found[0]) < 1e-5 < 0.05 < abs(values[0, 0] @ found[0])


# ---- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def circuit(tiny: Model, directions: Directions) -> Circuit:
    return assemble(tiny, directions, GROUPS, FEW, bank=BANK, gain_settings=BRIEF, vector_settings=FAST)


@pytest.mark.parametrize("spare", [True, False])
def test_the_circuit_holds_what_was_learned_from_the_plain_directions(tiny: Model, directions: Directions, spare: bool) -> None:
    settings = replace(FEW, spare_names=spare)
    circuit = assemble(tiny, directions, GROUPS, settings, bank=BANK, gain_settings=BRIEF, vector_settings=FAST)
    band = residual_band(3)
    what = free_vectors(tiny, directions, band, DEFAULT_RESIDUAL_STRENGTH, spare, FAST)
    vectors, found = learn_residual(tiny, what, GROUPS, BANK, directions, BRIEF)
    assert circuit.learned_residual is not None and torch.equal(circuit.learned_residual, vectors)
    assert circuit.residual_layers == band and list(circuit.learned_stream()) == [Site(layer, RESID_POST) for layer in band]
    record = {"rate": 1.0, "start": 1.0, **found.trace}
    assert circuit.metrics["learned_residual"] == record and len(found.curve) == 3
    assert circuit.metrics["gains"]["dtype"] == "float32"


def test_all_else_in_the_circuit_is_as_without_it(tiny: Model, directions: Directions, circuit: Circuit, tmp_path: Path) -> None:
    usual = assemble(tiny, directions, GROUPS, FEW, bank=BANK, gain_settings=BRIEF)
    assert usual.learned_residual is None and "learned_residual" not in usual.metrics
    metrics = {name: value for name, value in circuit.metrics.items() if name != "learned_residual"}
    usual.save(tmp_path / "usual")
    replace(circuit, learned_residual=None, metrics=metrics).save(tmp_path / "bare")
    assert (tmp_path / "usual").read_bytes() == (tmp_path / "bare").read_bytes()


def test_where_no_gains_are_learned_nothing_is(tiny: Model, directions: Directions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "learn_residual", lambda *_: pytest.fail("vectors were learned"))
    for options in ({"bank": BANK, "gain_settings": GainSettings(steps=0)}, {"bank": None, "gain_settings": GainSettings()}):
        assert assemble(tiny, directions, GROUPS, FEW, vector_settings=FAST, **options).learned_residual is None  # type: ignore[arg-type]


def test_generation_adds_what_was_learned_times_the_strength(family: Model) -> None:
    """Logits of the plan, as `generate` carries it out, against bare hooks that add the vectors where reply tokens are written."""
    made = assemble(family, made_directions(family), GROUPS, FEW, bank=BANK, gain_settings=BRIEF, vector_settings=FAST)
    assert made.learned_residual is not None
    ids = torch.tensor([family.prompt_ids(plain(GROUPS[0].text, INSTRUCTION))])
    plan = plan_for(made.added(Part.LEARNED_STREAM, family), [1, 0, -1], [1.0, 0.7, 1.0])
    edits = Injector(plan, family.device, family.dtype).edits()
    with torch.no_grad():
        found = family.logits(family.run(ids.expand(3, -1), edits, bridge=False))[:, -1]
    for row, (e, strength) in enumerate(((1, 1.0), (0, 0.7), (0, 0.0))):

        def adding(value: Tensor) -> Any:
            return lambda x: torch.cat([x[:, :-1], x[:, -1:] + value], 1)

        places = {(layer, "resid_post"): adding(strength * made.learned_residual[e, i]) for i, layer in enumerate(made.residual_layers)}
        with reference.changed(family.hf, places), torch.no_grad():
            assert_forward(found[row], family.hf(ids, use_cache=False).logits[0, -1], f"row {row}")
    assert (found[0] - found[2]).abs().max() > 1e-2, "it is felt"


def test_it_comes_back_as_it_was_saved_and_old_files_have_none(
    tiny: Model, circuit: Circuit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    circuit.save(tmp_path / "c.safetensors")
    back = Circuit.load(tmp_path / "c.safetensors", tiny)
    assert back.learned_residual is not None and torch.equal(back.learned_residual, circuit.learned_residual)  # type: ignore[arg-type]
    assert back.has(Part.LEARNED_STREAM) and default_strengths(back.with_strength([3.0] * 3, 5.0), [LEARNED_RESIDUAL]) == {
        LEARNED_RESIDUAL: dict.fromkeys(EMOTIONS, 1.0)
    }
    print_circuit({"file": "x", **circuit_summary(back)})
    assert "learned residual vectors: 3 steps" in capsys.readouterr().out

    metrics = {name: value for name, value in circuit.metrics.items() if name != "learned_residual"}
    replace(circuit, learned_residual=None, metrics=metrics).save(tmp_path / "old.safetensors")
    old = Circuit.load(tmp_path / "old.safetensors", tiny)
    assert old.learned_residual is None and not old.has(Part.LEARNED_STREAM) and old.has(Part.UNITS) and old.has(Part.STREAM)
    for refused in (old.learned_stream, lambda: old.added(Part.LEARNED_STREAM, tiny), lambda: old.require(Part.LEARNED_STREAM)):
        with pytest.raises(ArtifactError, match="has no learned residual vectors; .*`emosteer circuit --learn-residual`"):
            refused()
    print_circuit({"file": "x", **circuit_summary(old)})
    assert "learned residual vectors: none" in capsys.readouterr().out
    assert made_by("circuit", old, "m").endswith(" --no-learn-residual") and "residual" not in made_by("circuit", back, "m")
