"""Learned gains: the packed pass equals single ones with the edits made by hand, gradients are slopes, learning does what it is for."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from emosteer.attribution.gradients import prompt_samples
from emosteer.base.errors import DataError, UsageError
from emosteer.circuits import assemble as assembly
from emosteer.circuits import gains, learning, precision
from emosteer.circuits.assemble import assemble
from emosteer.circuits.faithfulness import NAME_PUSH
from emosteer.circuits.gains import HeadGains, learn_gains, strongest_mask
from emosteer.circuits.learning import Learned
from emosteer.circuits.name_sparing import spare_names, without_names
from emosteer.circuits.settings import CircuitSettings, GainSettings, VectorSettings
from emosteer.directions.directions import Directions, reference_directions, stable_band
from emosteer.directions.extract import extract
from emosteer.directions.settings import Settings
from emosteer.evaluation.controls import random_heads, spares_names
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, Head
from emosteer.scenarios.prompts import plain
from emosteer.scenarios.scenarios import NEUTRAL, Group, Message
from tests.attribution.test_unit_scores import double
from tests.circuits.test_assemble import Case, at_t_star, direction_by_hand, final, written_by
from tests.conftest import build, small_data
from tests.helpers import reference

EMOTIONS = ("anger", "sadness", "happiness")
INSTRUCTION = "keep the reply"
GROUPS, BANK = small_data(3, EMOTIONS)


def contrast(model: Model, seed: int = 0, size: float = 0.5, emotions: int = 3) -> Tensor:
    """Random z contrasts [emotion, layer, n_heads * d_head]."""
    draw = torch.Generator().manual_seed(seed)
    return size * torch.randn(emotions, model.shape.n_layers, model.width("z"), generator=draw)


def random_gains(seed: int = 1, emotions: int = 3) -> Tensor:
    return 2 * torch.rand(emotions, 3, 4, generator=torch.Generator().manual_seed(seed)) - 0.5


# ---- one packed pass -------------------------------------------------------------------------------------------------


@torch.no_grad()
def cost_by_hand(model: Model, group: Group, reply: str, z: Tensor, gain: Tensor) -> float:
    """Mean nats per token of one reply and its end, on its own: the heads' contrast is added to `z` itself, by bare hooks, wherever a
    token of the reply is written: from the last prompt position on.

    Args:
        z: [layer, n_heads * d_head]; gain: [layer, n_heads].
    """
    prompt = model.prompt_ids(plain(group.text, INSTRUCTION, group.earlier))
    tokens = [*model.text_ids(reply), model.tokenizer.eos_token_id]
    changes = {}
    for layer in range(model.shape.n_layers):
        added = z[layer] * gain[layer].repeat_interleave(model.shape.d_head)

        def change(x: Tensor, added: Tensor = added) -> Tensor:
            return torch.cat([x[:, : len(prompt) - 1], x[:, len(prompt) - 1 :] + added.to(x)], 1)

        changes[layer, "z"] = change
    with reference.changed(model.hf, changes):
        logits = model.hf(torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return float(cross_entropy(logits.double(), torch.tensor(tokens)))


def costs(model: Model, group: Group, replies: Sequence[str], shifts: Sequence[int], gain: Tensor, z: Tensor) -> Tensor:
    added = HeadGains(gains.head_outputs(model, z), GainSettings()).added(gain)
    return learning.reply_costs(model, group, replies, shifts, added, INSTRUCTION)


def test_the_packed_pass_equals_single_passes_with_edits_by_hand(family: Model) -> None:
    z, gain = contrast(family), random_gains()
    for group in (*GROUPS[:2], replace(GROUPS[2], earlier=(Message("user", "the train was late"), Message("assistant", "why")))):
        replies = [BANK[group.key][e] for e in EMOTIONS]
        found = costs(family, group, replies, (2, 1), gain, z)
        assert found.shape == (3, 3)
        for row, shift in zip(found, (0, 2, 1), strict=True):
            texts = [replies[(e + shift) % 3] for e in range(3)]
            by_hand = [cost_by_hand(family, group, text, z[e], gain[e]) for e, text in enumerate(texts)]
            assert row.tolist() == pytest.approx(by_hand, abs=1e-4)
            unsteered = [cost_by_hand(family, group, text, z[e], 0 * gain[e]) for e, text in enumerate(texts)]
            assert min(abs(a - b) for a, b in zip(by_hand, unsteered, strict=True)) > 3e-4, "the edits are felt"


def test_a_reply_in_no_emotion_costs_what_it_costs_alone_under_each(family: Model) -> None:
    z, gain, group, common = contrast(family), random_gains(), GROUPS[0], "we sat there"
    replies = [BANK[group.key][e] for e in EMOTIONS]
    added = HeadGains(gains.head_outputs(family, z), GainSettings()).added(gain)
    found = learning.reply_costs(family, group, replies, (1,), added, INSTRUCTION, [common])
    assert found.shape == (3, 3)
    torch.testing.assert_close(found[:2], costs(family, group, replies, (1,), gain, z), atol=1e-4, rtol=0)
    by_hand = [cost_by_hand(family, group, common, z[e], gain[e]) for e in range(3)]
    assert found[2].tolist() == pytest.approx(by_hand, abs=1e-4)


def test_the_neutral_reply_is_always_compared_with_where_the_bank_has_it(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, tuple[str, ...]]] = []
    usual = learning.reply_costs

    def watched(model: Model, group: Group, replies: Sequence[str], shifts: Sequence[int], *rest: Any) -> Tensor:
        seen.append((len(shifts), tuple(rest[2])))
        return usual(model, group, replies, shifts, *rest)

    monkeypatch.setattr(learning, "reply_costs", watched)
    bank = {key: {**replies, NEUTRAL: f"so it was {n}"} for n, (key, replies) in enumerate(BANK.items())}
    neutral = {replies[NEUTRAL] for replies in bank.values()}
    for others, shifts in ((2, 1), (1, 0)):
        seen.clear()
        learn_gains(tiny, contrast(tiny), GROUPS, bank, EMOTIONS, INSTRUCTION, GainSettings(steps=2, groups=2, others=others))
        assert all(n == shifts and len(common) == 1 and common[0] in neutral for n, common in seen) and len(seen) == 4
    seen.clear()
    learn_gains(tiny, contrast(tiny), GROUPS, BANK, EMOTIONS, INSTRUCTION, GainSettings(steps=1, groups=2))
    assert seen == [(2, ()), (2, ())]


def test_what_was_said_before_changes_what_a_reply_costs(tiny: Model) -> None:
    chat, gain, z = replace(GROUPS[0], earlier=(Message("user", "we waited"), Message("assistant", "no"))), random_gains(), contrast(tiny)
    replies = [BANK[chat.key][e] for e in EMOTIONS]
    assert not torch.allclose(costs(tiny, chat, replies, (), gain, z), costs(tiny, GROUPS[0], replies, (), gain, z), atol=1e-3)
    (sample,) = prompt_samples(tiny, [chat], 1, 3, INSTRUCTION)
    ids = tuple(tiny.prompt_ids([*(m._asdict() for m in chat.earlier), *plain(chat.text, INSTRUCTION)]))
    assert sample.prompts == (ids,) * 3, "effects are measured on the whole conversation as well"


def test_a_reply_does_not_feel_the_others(tiny: Model) -> None:
    z, gain, group = contrast(tiny), random_gains(), GROUPS[0]
    wanted = [BANK[group.key][e] for e in EMOTIONS]
    first = costs(tiny, group, wanted, (1, 2), gain, z)
    changed = gain.clone()
    changed[2] *= -3
    second = costs(tiny, group, [*wanted[:2], "cry alone"], (1, 2), changed, z)
    same = [(0, 0), (0, 1), (1, 0), (2, 1)]  # emotions 0 and 1 with the replies of emotions 0 and 1
    for place in same:
        torch.testing.assert_close(first[place], second[place], atol=1e-5, rtol=0)
    felt = [place for place in ((0, 2), (1, 1), (1, 2), (2, 0), (2, 2))]
    assert all((first[place] - second[place]).abs() > 1e-2 for place in felt)
    alike = costs(tiny, group, [wanted[0]] * 3, (1, 2), gain, z)
    torch.testing.assert_close(alike[0].expand(3, -1), alike, atol=1e-5, rtol=0)  # wanted and other replies are read alike


def test_a_group_wider_than_the_sliding_window_is_still_exact() -> None:
    """Positions, not places in the sequence, say how far back a reply sees; it is refused only where it would see too far."""
    gemma, emotions = build("gemma3"), ("anger", "sadness", "happiness", "fear", "surprise", "disgust")
    groups, bank = small_data(3, emotions, words=9)
    z, gain, group = contrast(gemma, emotions=6), random_gains(emotions=6), groups[0]
    texts = [bank[group.key][e] for e in emotions]
    prompt = len(gemma.prompt_ids(plain(group.text, INSTRUCTION)))
    assert prompt + 2 * sum(len(gemma.text_ids(text)) + 1 for text in texts) > gemma.hf.config.sliding_window == 64
    found = costs(gemma, group, texts, (1,), gain, z)[0].tolist()
    assert found == pytest.approx([cost_by_hand(gemma, group, text, z[e], gain[e]) for e, text in enumerate(texts)], abs=1e-4)
    room = 64 - prompt  # of a reply and its end, the last token of which is not read
    fits = ["we " * room, *texts[1:]]
    row = costs(gemma, group, fits, (1,), gain, z)[0].tolist()
    assert row == pytest.approx([cost_by_hand(gemma, group, text, z[e], gain[e]) for e, text in enumerate(fits)], abs=1e-4)
    with pytest.raises(DataError, match="65 tokens do not fit the sliding window of tiny-gemma3 .64.; use --gain-steps 0"):
        costs(gemma, group, ["we " * (room + 1), *texts[1:]], (1,), gain, z)


def loss_by_hand(costs: Sequence[float], weight: float, sharpness: float) -> float:
    """Of one emotion. costs: of the wanted reply, then of the other emotions'."""
    own, *others = costs
    return own + weight * sum(math.log(1 + math.exp(sharpness * (own - other))) for other in others) / len(others)


def test_gradients_are_the_slopes_of_the_loss() -> None:
    model, settings = double("llama"), GainSettings(preference=2.0, sharpness=1.5)
    z, gain, group = contrast(model), random_gains().requires_grad_(), GROUPS[1]
    replies = [BANK[group.key][e] for e in EMOTIONS]
    slopes = torch.autograd.grad(learning.objective(costs(model, group, replies, (1, 2), gain, z), settings), gain)[0]
    found, by_hand, draw, dose = [], [], random.Random(0), 1e-3
    for _ in range(12):
        e, layer, head = draw.randrange(3), draw.randrange(3), draw.randrange(4)
        sides = []
        for sign in (1, -1):
            moved = gain.detach().double()[e]
            moved[layer, head] += sign * dose
            some = [cost_by_hand(model, group, replies[(e + shift) % 3], z[e], moved) for shift in (0, 1, 2)]
            sides.append(loss_by_hand(some, 2.0, 1.5))
        found.append(slopes[e, layer, head].item())
        by_hand.append((sides[0] - sides[1]) / (2 * dose))
    assert found == pytest.approx(by_hand, abs=1e-4)
    assert max(map(abs, by_hand)) > 0.05


def test_every_other_emotion_is_compared_with(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    usual = learning.reply_costs

    def watched(model: Model, group: Group, replies: Sequence[str], shifts: Sequence[int], *rest: Any) -> Tensor:
        seen.append(tuple(shifts))
        assert list(replies) == [BANK[group.key][e] for e in EMOTIONS]
        return usual(model, group, replies, shifts, *rest)

    monkeypatch.setattr(learning, "reply_costs", watched)
    learn_gains(tiny, contrast(tiny), GROUPS, BANK, EMOTIONS, INSTRUCTION, GainSettings(steps=4, groups=2, others=1))
    assert {shift for shifts in seen for shift in shifts} == {1, 2} and all(len(shifts) == 1 for shifts in seen)
    seen.clear()
    learn_gains(tiny, contrast(tiny), GROUPS, BANK, EMOTIONS, INSTRUCTION, GainSettings(steps=1, groups=2, others=5))
    assert all(sorted(shifts) == [1, 2] for shifts in seen), "no more than there are"


# ---- learning --------------------------------------------------------------------------------------------------------


def mean_cost(model: Model, z: Tensor, values: Tensor) -> float:
    """Of the wanted replies, over all groups and emotions, by hand."""
    found = [
        cost_by_hand(model, group, BANK[group.key][emotion], z[e], values[e]) for group in GROUPS for e, emotion in enumerate(EMOTIONS)
    ]
    return sum(found) / len(found)


@pytest.fixture(scope="module")
def learned(tiny: Model) -> tuple[Tensor, GainSettings, Learned]:
    z, settings = contrast(tiny), GainSettings(steps=24, groups=2, keep=0.5, start=1.0)
    return z, settings, learn_gains(tiny, z, GROUPS, BANK, EMOTIONS, INSTRUCTION, settings)


def test_learning_makes_the_wanted_replies_likelier(tiny: Model, learned: tuple[Tensor, GainSettings, Learned]) -> None:
    z, settings, found = learned
    after, nothing = mean_cost(tiny, z, found.values), mean_cost(tiny, z, torch.zeros(3, 3, 4))
    start = mean_cost(tiny, z, torch.full((3, 3, 4), settings.start))
    assert after < nothing - 0.1 and after < start - 0.1
    swapped = mean_cost(tiny, z, found.values.roll(1, 0))
    assert after < swapped, "each emotion's gains are its own"
    assert len(found.curve) == 24 and sum(found.curve[-6:]) / 6 < sum(found.curve[:6]) / 6 - 0.1
    assert len(found.margin) == 24 and sum(found.margin[-6:]) / 6 > sum(found.margin[:6]) / 6 + 0.1


def test_the_curve_is_the_cost_of_the_wanted_replies(tiny: Model) -> None:
    """All groups in one step: the first point is the mean cost at the start."""
    z = contrast(tiny)
    exact = GainSettings(steps=1, groups=9, start=0.7, keep=1.0, dtype="float32")
    found = learn_gains(tiny, z, GROUPS, BANK, EMOTIONS, INSTRUCTION, exact)
    assert list(found.curve) == pytest.approx([mean_cost(tiny, z, torch.full((3, 3, 4), 0.7))], abs=1e-3)
    start, apart = torch.full((3, 4), 0.7), []
    for group in GROUPS:
        for e, emotion in enumerate(EMOTIONS):
            cost = {other: cost_by_hand(tiny, group, BANK[group.key][other], z[e], start) for other in EMOTIONS}
            apart += [cost[other] - cost[emotion] for other in EMOTIONS if other != emotion]
    assert list(found.margin) == pytest.approx([sum(apart) / len(apart)], abs=1e-3)


def test_a_float32_model_is_read_in_lower_precision_and_not_changed(tiny: Model) -> None:
    z, few = contrast(tiny), GainSettings(steps=3, groups=3, dtype="bfloat16")
    rough = learn_gains(tiny, z, GROUPS, BANK, EMOTIONS, INSTRUCTION, few)
    exact = learn_gains(tiny, z, GROUPS, BANK, EMOTIONS, INSTRUCTION, replace(few, dtype="float32"))
    assert tiny.dtype == torch.float32 and rough.values.dtype == torch.float32
    assert not torch.equal(rough.values, exact.values) and rough.curve == pytest.approx(exact.curve, abs=0.15)
    copied = precision.reader(tiny, "bfloat16")
    assert copied.dtype == torch.bfloat16 and copied.hf is not tiny.hf
    assert precision.reader(tiny, "float32") is tiny and precision.reader(copied, "bfloat16") is copied


def timed(patch: pytest.MonkeyPatch, seconds: Mapping[torch.dtype, float]) -> list[torch.dtype]:
    """Trials take as long as given here; returns the list of those that were made."""
    tried: list[torch.dtype] = []

    def step_seconds(model: Model, against: float = 0.0) -> float:
        tried.append(model.dtype)
        return seconds[model.dtype]

    patch.setattr(precision, "step_seconds", step_seconds)
    patch.setattr(precision, "slow_in_bfloat16", lambda device: False)
    return tried


@pytest.mark.parametrize(
    ("exact", "rough", "chosen"),
    [(1.0, 0.5, "bfloat16"), (1.0, 4.0, "float32"), (1.0, 1.0, "float32"), (0.01, 0.001, "float32")],
)
def test_the_faster_precision_is_measured_and_kept_in_the_record(
    tiny: Model,
    directions: Directions,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    exact: float,
    rough: float,
    chosen: str,
) -> None:
    tried = timed(monkeypatch, {torch.float32: exact, torch.bfloat16: rough})
    auto = GainSettings(steps=2, groups=1)
    assert auto.dtype == "auto" and precision.chosen_dtype(tiny, "auto") == chosen
    quick = exact < precision.QUICK
    assert tried == [torch.float32] + [torch.bfloat16] * (not quick), "where a step takes no time, no copy is made to try"
    lines = [line for line in capsys.readouterr().err.splitlines() if f"gradients in {chosen}" in line]
    assert len(lines) == (not quick)
    made = assemble(tiny, directions, GROUPS, FEW, bank=BANK, gain_settings=auto, vector_settings=VectorSettings())
    wanted = assemble(tiny, directions, GROUPS, FEW, bank=BANK, gain_settings=replace(auto, dtype=chosen), vector_settings=VectorSettings())
    assert made.metrics["gains"]["dtype"] == chosen and len(tried) == 2 * (2 - quick), "once for gains and vectors"
    assert torch.equal(made.z_delta, wanted.z_delta) and same(made, wanted)


def test_what_is_named_or_cannot_be_copied_is_not_measured(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, {})
    half = precision.reader(tiny, "bfloat16")
    assert precision.chosen_dtype(half, "auto") == "bfloat16" and precision.reader(half, "auto") is half
    assert [precision.chosen_dtype(tiny, name) for name in ("bfloat16", "float32")] == ["bfloat16", "float32"] and not tried
    with pytest.raises(UsageError, match="unknown dtype 'bfloat32'.*expected auto, bfloat16, float32"):
        GainSettings(dtype="bfloat32")


def test_bfloat16_is_not_tried_where_there_are_no_units_for_it(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, {torch.float32: 1.0, torch.bfloat16: 0.5})
    monkeypatch.setattr(precision, "slow_in_bfloat16", lambda device: device.type == "cpu")
    assert precision.chosen_dtype(tiny, "auto") == "float32" and not tried


def test_what_else_the_machine_does_counts_for_nothing(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that waits, as on a busy processor, is as fast as one that does not."""
    usual = tiny.run

    def waiting(*args: Any, **options: Any) -> Tensor:
        time.sleep(2 * precision.QUICK)
        return usual(*args, **options)

    monkeypatch.setattr(tiny, "run", waiting)
    assert precision.step_seconds(tiny) < precision.QUICK and precision.chosen_dtype(tiny, "auto") == "float32"


def test_a_trial_takes_time_and_leaves_nothing_behind(family: Model) -> None:
    passes: list[torch.Size] = []
    handle = family.body.register_forward_hook(lambda _module, _args, out: passes.append(out.last_hidden_state.shape))
    try:
        assert precision.step_seconds(family) > 0
        assert passes == [(1, precision.TOKENS, 32)] * (1 + precision.REPEATS)
        passes.clear()
        assert precision.step_seconds(family, 1e-9) > 0 and len(passes) == 1, "where the first one has lost, it is not repeated"
    finally:
        handle.remove()
    assert all(parameter.grad is None for parameter in family.hf.parameters())
    assert precision.step_seconds(precision.reader(family, "bfloat16")) > 0


@pytest.mark.parametrize(("keep", "left"), [(0.5, 6), (0.25, 3), (0.01, 1), (1.0, 12)])
def test_heads_outside_the_kept_share_are_exactly_zero(tiny: Model, keep: float, left: int) -> None:
    z = contrast(tiny)
    values = learn_gains(tiny, z, GROUPS, BANK, EMOTIONS, INSTRUCTION, GainSettings(steps=4, groups=1, keep=keep)).values
    assert values.shape == (3, 3, 4) and values.dtype == torch.float32 and not values.requires_grad
    assert (values != 0).flatten(1).sum(1).tolist() == [left] * 3


def test_the_kept_heads_are_those_that_write_most(family: Model) -> None:
    z, values = contrast(family), random_gains()
    size = torch.zeros(3, 12)
    for e in range(3):
        for layer in range(3):
            weight = family.hf.model.layers[layer].self_attn.o_proj.weight
            for head in range(4):
                part = slice(head * family.shape.d_head, (head + 1) * family.shape.d_head)
                size[e, layer * 4 + head] = (values[e, layer, head] * weight[:, part] @ z[e, layer, part]).norm()
    found = strongest_mask(values, gains.head_outputs(family, z), 0.4).flatten(1)
    for e in range(3):
        order = sorted(range(12), key=lambda i: -size[e, i])
        assert set(found[e].nonzero().flatten().tolist()) == set(order[:5])
    assert set(found.unique().tolist()) == {0.0, 1.0}


def test_a_head_that_pushes_the_wrong_way_gets_a_negative_gain() -> None:
    """In the last layer, behind which almost nothing follows: one head writes the word of the reply's unembedding, one its opposite, and
    one nothing of use. The word is what is wanted."""
    model = build("llama", seed=3)
    weight = model.hf.lm_head.weight
    bank = {group.key: {emotion: " ".join([emotion] * 4) for emotion in EMOTIONS} for group in GROUPS}
    z = torch.zeros(3, 3, 4, 8)
    for e, emotion in enumerate(EMOTIONS):
        word = (weight[model.tokenizer.get_vocab()[emotion]] - weight.mean(0)) * model.hf.model.norm.weight
        for head, sign in ((0, 1.0), (1, -1.0)):
            reached = model.hf.model.layers[2].self_attn.o_proj.weight[:, head * 8 : head * 8 + 8].T @ word
            z[e, 2, head] = sign * reached / reached.norm()
    settings = GainSettings(steps=16, groups=2, start=0.5, keep=2 / 12)
    values = learn_gains(model, z.flatten(-2), GROUPS, bank, EMOTIONS, INSTRUCTION, settings).values
    assert (values[:, 2, 0] > 1).all() and (values[:, 2, 1] < -0.5).all()
    assert (values != 0).sum() == 6, "heads that write nothing are dropped first"


def test_learning_is_deterministic_for_a_seed_and_leaves_everything_as_it_was(tiny: Model) -> None:
    z, few = contrast(tiny), GainSettings(steps=3, groups=2)
    before, weights = z.clone(), {name: value.clone() for name, value in tiny.hf.state_dict().items()}
    with torch.no_grad():
        unsteered = tiny.hf(torch.tensor([[3, 9, 12]])).logits
    first = learn_gains(tiny, z, GROUPS, BANK, EMOTIONS, INSTRUCTION, few)
    again = learn_gains(tiny, z, GROUPS, BANK, EMOTIONS, INSTRUCTION, few)
    other = learn_gains(tiny, z, GROUPS, BANK, EMOTIONS, INSTRUCTION, replace(few, seed=1))
    assert torch.equal(first.values, again.values) and first.curve == again.curve
    assert not torch.equal(first.values, other.values), "another draw of scenario-events"
    assert torch.equal(z, before) and all(torch.equal(value, weights[name]) for name, value in tiny.hf.state_dict().items())
    with torch.no_grad():
        assert torch.equal(tiny.hf(torch.tensor([[3, 9, 12]])).logits, unsteered), "no hook is left"
    assert all(parameter.grad is None for parameter in tiny.hf.parameters())


def test_groups_with_gaps_are_learned_from_and_those_of_one_emotion_are_not(tiny: Model) -> None:
    """A bank of the model's own replies has gaps."""
    z, few = contrast(tiny), GainSettings(steps=2, groups=3)
    gaps = {key: dict(replies) for key, replies in BANK.items()}
    for group in GROUPS[3:6]:
        gaps[group.key].pop("sadness")
    for group in GROUPS[6:]:
        gaps[group.key] = {"anger": gaps[group.key]["anger"]}
    found = learn_gains(tiny, z, GROUPS, gaps, EMOTIONS, INSTRUCTION, few)
    wanted = learn_gains(tiny, z, GROUPS[:6], gaps, EMOTIONS, INSTRUCTION, few)
    assert torch.equal(found.values, wanted.values) and found.curve == wanted.curve
    learned_from = {"groups": 6, "incomplete": 3, "replies": {"anger": 6, "sadness": 3, "happiness": 6}}
    assert found.trace["learned_from"] == learned_from


def test_nothing_to_learn_from_is_refused(tiny: Model) -> None:
    z, half = contrast(tiny), {key: {"anger": replies["anger"]} for key, replies in BANK.items()}
    for groups, bank in (([], BANK), (GROUPS, {}), (GROUPS, half)):
        with pytest.raises(DataError, match="no scenario-event has bank replies in two emotions .*--gain-steps 0"):
            learn_gains(tiny, z, groups, bank, EMOTIONS, INSTRUCTION, GainSettings(steps=1))


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"steps": 10_001}, {"keep": 0.0}, {"keep": 1.5}, {"keep": -0.1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--gain-steps from 0 to 10000 and --keep above 0 and up to 1"):
        GainSettings(**wrong)


# ---- names -----------------------------------------------------------------------------------------------------------


def lifts(model: Model, z: Tensor, emotion: str) -> Tensor:
    """What every head writes along the emotion's name [layer, n_heads]."""
    name = direction_by_hand(model, emotion)
    found = torch.zeros(3, 4)
    for layer in range(3):
        for head in range(4):
            alone = torch.zeros_like(z[layer])
            part = slice(head * model.shape.d_head, (head + 1) * model.shape.d_head)
            alone[part] = z[layer, part]
            found[layer, head] = written_by(model, layer, alone, "z") @ name / name.norm()
    return found


def test_no_head_lifts_the_name_and_no_gain_brings_it_back(family: Model) -> None:
    z = contrast(family, size=1.0)
    before = z.clone()
    clean = without_names(family, EMOTIONS, z)
    assert torch.equal(z, before) and clean.shape == z.shape
    scaled = clean * random_gains(5).repeat_interleave(family.shape.d_head, -1) * 4
    for e, emotion in enumerate(EMOTIONS):
        assert lifts(family, clean[e], emotion).abs().max() < 1e-5 and lifts(family, z[e], emotion).abs().max() > 0.3
        assert lifts(family, scaled[e], emotion).abs().max() < 1e-4


def test_names_are_taken_out_of_each_head_by_the_smallest_change(family: Model) -> None:
    """The change is along the one direction of the head's input that reaches the name."""
    z = contrast(family, size=1.0)
    change = (z - without_names(family, EMOTIONS, z)).unflatten(-1, (4, family.shape.d_head))
    for e, emotion in enumerate(EMOTIONS):
        wanted = torch.zeros_like(change[e])
        for layer in range(3):
            for head in range(4):
                units = torch.eye(family.width("z"))[head * family.shape.d_head : (head + 1) * family.shape.d_head]
                row = torch.stack([written_by(family, layer, unit, "z") @ direction_by_hand(family, emotion) for unit in units])
                old = z[e, layer].view(4, -1)[head]
                wanted[layer, head] = row * (row @ old) / (row @ row)
        torch.testing.assert_close(change[e], wanted, atol=1e-5, rtol=1e-4)


def test_an_emotion_without_a_name_in_the_vocabulary_keeps_its_contrast(tiny: Model) -> None:
    z = contrast(tiny)
    clean = without_names(tiny, ("anger", "serenity", "happiness"), z)
    assert torch.equal(clean[1], z[1]) and not torch.equal(clean[0], z[0])


# ---- the stage -------------------------------------------------------------------------------------------------------

FEW = CircuitSettings(n_prompts=2, n_random=0)


@pytest.fixture(scope="module")
def directions(tiny: Model) -> Directions:
    return extract(tiny, GROUPS, Settings(EMOTIONS, holdout=0, instruction=INSTRUCTION), bank=BANK)


def same(first: Any, second: Any) -> bool:
    pairs = [(value, getattr(second, name)) for name, value in vars(first).items()]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def test_without_steps_or_without_a_bank_nothing_is_learned(tiny: Model, directions: Directions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "learn_gains", lambda *_: pytest.fail("gains were learned"))
    usual = assemble(tiny, directions, GROUPS, FEW)
    options: list[Mapping[str, Any]] = [
        {"bank": BANK, "gain_settings": GainSettings(steps=0)},
        {"bank": None, "gain_settings": GainSettings()},
        {"bank": BANK, "gain_settings": None},
    ]
    for some in options:
        assert same(usual, assemble(tiny, directions, GROUPS, FEW, **some))
    assert "gains" not in usual.metrics


@pytest.mark.parametrize("spare", [True, False])
def test_the_circuit_adds_its_gains_times_the_contrast(tiny: Model, directions: Directions, spare: bool) -> None:
    settings, gain_settings = replace(FEW, spare_names=spare), GainSettings(learn="gains", steps=4, groups=1, keep=0.3)
    before = directions.z.mean.clone()
    circuit = assemble(tiny, directions, GROUPS, settings, bank=BANK, gain_settings=gain_settings)
    added = without_names(tiny, EMOTIONS, directions.z.mean) if spare else directions.z.mean
    values = learn_gains(tiny, added, GROUPS, BANK, EMOTIONS, INSTRUCTION, gain_settings).values
    assert (values != 0).flatten(1).sum(1).tolist() == [4, 4, 4]
    torch.testing.assert_close(circuit.z_delta, added * values.repeat_interleave(8, -1))
    for e, emotion in enumerate(EMOTIONS):
        kept = {Head(layer, head) for layer, head in values[e].nonzero().tolist()}
        assert set(circuit.units(emotion)) == kept and circuit.metrics["emotions"][emotion]["heads"] == 4
        outside = circuit.z_delta[e].view(3, 4, 8)[values[e] == 0]
        assert not outside.any() and outside.shape == (8, 8)
        lift = lifts(tiny, circuit.z_delta[e], emotion).abs().max()
        assert lift < 1e-5 if spare else lift > 0.02
    assert len(circuit.neuron_index) == 0 and torch.equal(directions.z.mean, before)
    assert circuit.strength.tolist() == [1.0, 1.0, 1.0], "what was learned"
    assert circuit.metrics["gains"]["steps"] == 4 and len(circuit.metrics["gains"]["curve"]) == 4
    assert circuit.provenance.params["spare_names"] is spare and spares_names(circuit) is spare, "the artefact tells the one from the other"
    told = circuit.provenance.params

    def drawn(**params: Any) -> Tensor:  # what the control's heads write along the names
        found = random_heads(tiny, replace(circuit, provenance=replace(circuit.provenance, params={**told, **params})), directions, seed=0)
        return torch.stack([torch.stack([v[e] for v in found.values()]) @ direction_by_hand(tiny, name) for e, name in enumerate(EMOTIONS)])

    plain = drawn(spare_names=False)
    assert plain.abs().max() > 0.02
    torch.testing.assert_close(drawn(), torch.zeros_like(plain) if spare else plain, atol=1e-4, rtol=1e-4)
    earlier = {name: value for name, value in told.items() if name not in ("dtype", "device")} | {"spare_names": False}
    assert spares_names(replace(circuit, provenance=replace(circuit.provenance, params=earlier))), (
        "files of before said so of all that was learned"
    )


def test_steering_with_the_circuit_costs_what_was_learned(tiny: Model, directions: Directions) -> None:
    """Strength 1 of the finished circuit, as generation adds it, is what the gains were fitted with."""
    circuit = assemble(tiny, directions, GROUPS, FEW, bank=BANK, gain_settings=GainSettings(learn="gains", steps=4, groups=1))
    added = without_names(tiny, EMOTIONS, directions.z.mean)
    values = learn_gains(tiny, added, GROUPS, BANK, EMOTIONS, INSTRUCTION, GainSettings(steps=4, groups=1)).values
    wanted = torch.einsum("elh,elhm->elm", values, gains.head_outputs(tiny, added))
    vectors = {site: vector for site, vector in circuit.steering(tiny).items() if vector.any()}
    assert {(site.layer, site.kind) for site in vectors} == {(layer, ATTN_OUT) for layer in range(3) if wanted[:, layer].any()}
    for site, vector in vectors.items():
        torch.testing.assert_close(vector.float(), wanted[:, site.layer], atol=1e-5, rtol=1e-4)


def test_measures_are_of_what_the_circuit_really_adds(tiny: Model, directions: Directions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known gains instead of learned ones, injected by bare hooks; against the plain contrast of all heads at the same length."""
    values = torch.zeros(3, 3, 4)
    values[:, 1, 2], values[:, 2, 0], values[:, 0, 3] = 1.5, -2.0, 0.5
    monkeypatch.setattr(assembly, "learn_gains", lambda *_: Learned(values, (1.0,), (0.0,)))
    circuit = assemble(tiny, directions, GROUPS, FEW, bank=BANK, gain_settings=GainSettings(learn="gains"))
    v_ref = reference_directions(directions, stable_band(directions))
    case = Case(tiny, directions, GROUPS, prompt_samples(tiny, GROUPS, 2, 3, INSTRUCTION), v_ref)

    def effect(e: int, z: Tensor) -> float:
        return final(case, v_ref[e], {(layer, "z"): at_t_star(z[layer]) for layer in range(3)}) - final(case, v_ref[e])

    def length(z: Tensor) -> Tensor:
        return torch.stack([written_by(tiny, layer, z[layer], "z") for layer in range(3)]).norm()

    shares = []
    for e, emotion in enumerate(EMOTIONS):
        assert set(circuit.units(emotion)) == {Head(1, 2), Head(2, 0), Head(0, 3)}
        found = circuit.metrics["emotions"][emotion]
        whole = spare_names(tiny, [emotion], directions.z.mean[e : e + 1], torch.zeros(1, 3, 48), NAME_PUSH)[0][0]
        whole = whole * length(circuit.z_delta[e]) / length(whole)
        assert found["whole_effect"] == pytest.approx(effect(e, whole), abs=2e-3, rel=1e-3)
        assert found["faithfulness"] * found["whole_effect"] == pytest.approx(effect(e, circuit.z_delta[e]), abs=2e-3, rel=1e-3)
        shares.append(found["faithfulness"])
    assert max(abs(share - 1) for share in shares) > 0.1, "what was learned differs from the plain contrast"
