"""States are read where docs/METHOD.md section 3 says, and packing changes nothing: proved against the plain model, reply by reply."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from emosteer.base.errors import DataError, OutOfMemory
from emosteer.directions import activations
from emosteer.directions.activations import Sample, batches_by_cost, read_positions, read_states, rows_of, tokenize_group
from emosteer.models.memory import halve_on_oom
from emosteer.models.model import Model
from emosteer.models.sites import KINDS, MLP_POST, RESID_MID, RESID_POST, Site, Z
from emosteer.scenarios.prompts import elicit
from emosteer.scenarios.scenarios import EMOTIONS, Group, GroupKey, Message
from tests.conftest import WORDS, build, small_data
from tests.helpers.precision import assert_forward

READ_KINDS = (RESID_MID, RESID_POST, Z, MLP_POST)


def sites_of(model: Model) -> list[Site]:
    return [Site(layer, kind) for layer in range(model.shape.n_layers) for kind in READ_KINDS]


def samples_of(model: Model, scenarios: int = 1, elicitation: str = "reply", seed: int = 0) -> list[Sample]:
    groups, bank = small_data(scenarios, seed=seed)
    return [tokenize_group(model, group, elicitation, EMOTIONS, bank[group.key], "") for group in groups]


def sample_of(prompt: int, replies: Sequence[int]) -> Sample:
    """Distinct tokens all over, so that a mix-up of any two positions shows."""
    ids = iter([*range(5, 87)] * 5)
    shared = tuple(next(ids) for _ in range(prompt))
    return Sample(GroupKey("s", "neutral"), "t", (shared,) * len(replies), tuple(tuple(next(ids) for _ in range(n)) for n in replies))


@torch.no_grad()
def alone(model: Model, ids: Sequence[int], start: int, stop: int) -> dict[Site, Tensor]:
    """The slow truth: one sequence, the untouched Hugging Face model, no mask, torch's own hooks, mean over positions [start, stop)."""
    store: dict[Site, Tensor] = {}
    attention: dict[int, Tensor] = {}
    handles = []
    for index, layer in enumerate(model.hf.model.layers):

        def on_attention(_: object, __: object, output: tuple[Tensor, ...], index: int = index) -> None:
            attention[index] = output[0]

        def on_z(_: object, args: tuple[Tensor, ...], index: int = index) -> None:
            store[Site(index, Z)] = args[0]

        def on_neurons(_: object, args: tuple[Tensor, ...], index: int = index) -> None:
            store[Site(index, MLP_POST)] = args[0]

        def on_layer(block: torch.nn.Module, args: tuple[Tensor, ...], output: object, index: int = index) -> None:
            written = attention[index]
            if model.hf.config.model_type.startswith("gemma"):
                written = block.post_attention_layernorm(written)
            store[Site(index, RESID_MID)] = args[0] + written
            store[Site(index, RESID_POST)] = output[0] if isinstance(output, tuple) else output  # type: ignore[assignment]

        handles += [
            layer.self_attn.register_forward_hook(on_attention),
            layer.self_attn.o_proj.register_forward_pre_hook(on_z),
            layer.mlp.down_proj.register_forward_pre_hook(on_neurons),
            layer.register_forward_hook(on_layer),
        ]
    try:
        model.hf(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {site: value[0, start:stop].double().mean(0) for site, value in store.items()}


def truth(model: Model, samples: Sequence[Sample]) -> dict[Site, Tensor]:
    """site -> [group, emotion, width], by `alone`; a reply of n tokens is written at positions p-1 .. p+n-2."""
    rows = []
    for sample in samples:
        for prompt, reply in zip(sample.prompts, sample.replies, strict=True):
            stop = len(prompt) + len(reply) - 1 if reply else len(prompt)
            rows.append(alone(model, prompt + reply, len(prompt) - 1, stop))
    shape = (len(samples), len(samples[0].prompts))
    return {site: torch.stack([row[site] for row in rows]).unflatten(0, shape) for site in rows[0]}


def assert_states(found: dict[Site, Tensor], expected: dict[Site, Tensor]) -> None:
    assert set(found) == set(expected)
    for site, value in found.items():
        assert_forward(value, expected[site], str(site))


def widths(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the token ids of every later forward pass."""
    assert model.bridge  # its proof runs passes of its own
    seen: list[tuple[int, ...]] = []
    real = Model.run

    def run(self: Model, ids: Tensor, *args: object, **options: object) -> Tensor:
        seen.append(tuple(ids.shape))
        return real(self, ids, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "run", run)
    return seen


# ---- packed == unpacked == reply by reply ----------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_states_equal_the_plain_model_run_reply_by_reply(family: Model, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = samples_of(family)  # three groups of unequal lengths: rows are padded
    assert len({sample.cost for sample in samples}) == 3 and all(sample.cost < 64 for sample in samples)
    passes = widths(family, monkeypatch)
    found = read_states(family, samples, sites_of(family), packed=packed)
    lengths = [s.cost if packed else max(len(p) + len(r) for p, r in zip(s.prompts, s.replies, strict=True)) for s in samples]
    assert passes == [(3 if packed else 18, max(lengths))]
    assert_states(found, truth(family, samples))


@pytest.mark.parametrize("elicitation", ["tone", "system"])
def test_prompts_of_their_own_are_read_at_the_last_prompt_position(family: Model, elicitation: str) -> None:
    samples = samples_of(family, elicitation=elicitation)
    assert not any(reply for sample in samples for reply in sample.replies) and len(set(samples[0].prompts)) == 6
    assert_states(read_states(family, samples, sites_of(family)), truth(family, samples))


def test_replies_of_none_one_and_many_tokens_side_by_side(tiny: Model) -> None:
    samples = [sample_of(4, [0, 1, 2, 9]), sample_of(1, [5, 1, 1, 3]), sample_of(7, [2, 2, 2, 2])]
    for packed in (True, False):
        assert_states(read_states(tiny, samples, sites_of(tiny), packed=packed), truth(tiny, samples))


def test_a_group_whose_pass_is_longer_than_the_sliding_window_falls_back_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = build("gemma3")
    window = gemma.hf.config.sliding_window
    assert window == 64 and set(gemma.hf.config.layer_types) == {"sliding_attention"}
    samples = [sample_of(10, [12, 11, 13, 12, 12, 9]), sample_of(6, [3, 3, 3, 3, 3, 3])]  # packed 79 and 24 tokens, alone at most 23
    expected = truth(gemma, samples)
    passes = widths(gemma, monkeypatch)
    found = read_states(gemma, samples, sites_of(gemma))
    assert passes == [(12, 23)]
    assert_states(found, expected)


def test_a_single_reply_longer_than_the_sliding_window_is_cut_as_the_model_cuts_it() -> None:
    gemma = build("gemma3")
    samples = [sample_of(50, [40, 3]), sample_of(8, [70, 90])]
    expected = truth(gemma, samples)
    assert_states(read_states(gemma, samples, sites_of(gemma)), expected)
    assert_states(read_states(gemma, samples, sites_of(gemma), packed=False), expected)
    wide = build("gemma3")
    wide.hf.config.sliding_window = 4096
    for layer in wide.hf.model.layers:
        layer.self_attn.sliding_window = 4096
    assert (truth(wide, samples)[Site(2, RESID_POST)] - expected[Site(2, RESID_POST)]).abs().max() > 1e-2  # the window is felt here


# ---- exact positions ---------------------------------------------------------------------------------------------------


def test_read_positions_are_those_that_write_the_reply() -> None:
    assert read_positions(5, 0) == (4,)
    assert read_positions(5, 1) == (4,)
    assert read_positions(5, 4) == (4, 5, 6, 7)


def test_a_packed_row_holds_the_absolute_positions_of_each_reply_alone() -> None:
    (row,) = rows_of(sample_of(3, [2, 0, 4]))
    assert row.ids == tuple(range(5, 14))
    assert row.positions == (0, 1, 2, 3, 4, 3, 4, 5, 6)
    assert row.segments == (0, 0, 0, 1, 1, 3, 3, 3, 3)
    assert row.reads == ((2, 3), (2,), (2, 5, 6, 7))


@pytest.mark.parametrize("packed", [True, False])
def test_a_shift_at_one_position_moves_exactly_the_states_that_read_it(tiny: Model, packed: bool) -> None:
    """Injected at the last residual, where nothing downstream can spread it: state e moves by shift / reads(e), or not at all."""
    sample = sample_of(4, [3, 1, 5])
    last = Site(tiny.shape.n_layers - 1, RESID_POST)
    shift = torch.linspace(-1, 1, tiny.shape.d_model)
    base = read_states(tiny, [sample], [last], packed=packed)[last]
    # (row, position) -> {emotion: how many positions its mean is over}; t* is position 3, shared when packed.
    if packed:  # prompt 0-3, replies at 4-6, 7 and 8-12
        expected: dict[tuple[int, int], dict[int, int]] = {(0, 3): {0: 3, 1: 1, 2: 5}}
        expected |= {(0, position): {0: 3} for position in (4, 5)} | {(0, position): {2: 5} for position in (8, 9, 10, 11)}
        size, rows = 13, 1
    else:
        expected = {(0, position): {0: 3} for position in (3, 4, 5)} | {(1, 3): {1: 1}}
        expected |= {(2, position): {2: 5} for position in (3, 4, 5, 6, 7)}
        size, rows = 9, 3
    for row in range(rows):
        for position in range(size):

            def edit(activation: Tensor, row: int = row, position: int = position) -> Tensor:
                new = activation.clone()
                new[row, position] += shift
                return new

            moved = read_states(tiny, [sample], [last], packed=packed, edits={last: edit})[last][0] - base[0]
            for emotion in range(3):
                reads = expected.get((row, position), {}).get(emotion)
                wanted = shift / reads if reads else torch.zeros_like(shift)
                torch.testing.assert_close(moved[emotion], wanted, rtol=1e-4, atol=2e-5, msg=f"row {row}, position {position}, {emotion}")


@pytest.mark.parametrize("packed", [True, False])
def test_the_last_reply_token_and_other_replies_change_no_bit(family: Model, packed: bool) -> None:
    sample = sample_of(5, [4, 3, 5])
    sites = sites_of(family)
    base = read_states(family, [sample], sites, packed=packed)

    def moved(emotion: int, index: int) -> list[bool]:
        """Which emotions' states change, at any site, when one token of one reply becomes another."""
        replies = [list(reply) for reply in sample.replies]
        replies[emotion][index] = 87
        new = read_states(family, [replace(sample, replies=tuple(map(tuple, replies)))], sites, packed=packed)
        return [any(not torch.equal(new[site][0, e], base[site][0, e]) for site in sites) for e in range(3)]

    for emotion, length in enumerate((4, 3, 5)):
        only_mine = [e == emotion for e in range(3)]
        assert moved(emotion, length - 1) == [False] * 3  # it is written, never read
        assert moved(emotion, length - 2) == only_mine
        assert moved(emotion, 0) == only_mine


def test_every_prompt_token_is_seen_by_every_reply(tiny: Model) -> None:
    sample = sample_of(5, [4, 1])
    site = Site(2, RESID_POST)
    base = read_states(tiny, [sample], [site])[site][0]
    for index in range(5):
        prompt = (*sample.prompts[0][:index], 87, *sample.prompts[0][index + 1 :])
        new = read_states(tiny, [replace(sample, prompts=(prompt,) * 2)], [site])[site][0]
        assert (new - base).abs().amax(-1).min() > 1e-3, index


def test_padding_and_neighbours_in_the_batch_do_not_show(family: Model) -> None:
    samples = [sample_of(4, [3, 2]), sample_of(9, [8, 6])]
    both = read_states(family, samples, sites_of(family))
    for index, sample in enumerate(samples):
        own = read_states(family, [sample], sites_of(family))
        for site in own:
            assert_forward(both[site][index], own[site][0], str(site))


def test_states_are_read_behind_the_edit_of_their_site(tiny: Model) -> None:
    sample = sample_of(4, [3, 2])
    site, later = Site(0, RESID_MID), Site(0, RESID_POST)
    base = read_states(tiny, [sample], [site, later])
    zeroed = read_states(tiny, [sample], [site, later], edits={site: torch.zeros_like})
    assert zeroed[site].abs().max() == 0 and base[site].abs().min() > 0
    assert (zeroed[later] - base[later]).abs().max() > 1e-2


def test_every_kind_can_be_read_and_nothing_stays_hooked(tiny: Model) -> None:
    sites = [Site(1, kind) for kind in KINDS]
    states = read_states(tiny, [sample_of(4, [3, 2])], sites)
    torch.testing.assert_close(  # averaging is linear: the identities of single positions hold for the means
        states[Site(1, Z)] @ tiny.w_o(1).flatten(0, 1), states[Site(1, "attn_out")], rtol=1e-4, atol=2e-5
    )
    torch.testing.assert_close(states[Site(1, RESID_MID)] + states[Site(1, "mlp_out")], states[Site(1, RESID_POST)], rtol=1e-4, atol=2e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.hf.modules())


# ---- tokenizing --------------------------------------------------------------------------------------------------------


def test_a_group_is_tokenized_as_prompt_and_bare_replies(tiny: Model) -> None:
    group = Group(GroupKey("s1", "positive"), "work", "the train was late")
    sample = tokenize_group(
        tiny, group, "reply", ("joy", "rage"), {"joy": "sing dance", "rage": "slam the door", "calm": "wait"}, "keep two"
    )
    vocabulary = tiny.tokenizer.get_vocab()

    def ids(text: str) -> tuple[int, ...]:
        return tuple(vocabulary[word] for word in text.split())

    prompt = ids("<|im_start|> user the train was late keep two <|im_end|> <|im_start|> assistant")
    assert sample == Sample(group.key, "work", (prompt, prompt), (ids("sing dance"), ids("slam the door")))
    assert sample.packs and sample.cost == len(prompt) + 5


@pytest.mark.parametrize("elicitation", ["reply", "tone", "system", "stimulus"])
def test_a_chat_is_tokenized_with_its_earlier_turns(tiny: Model, elicitation: str) -> None:
    """Token for token what the chat template makes of the conversation, with the elicitation's system line at its head."""
    chat = Group(GroupKey("p1", ""), "chat", "the train was late", "chat", (Message("user", "we wait"), Message("assistant", "why")))
    replies = {"anger": "slam", "fear": "hide"} if elicitation == "reply" else None
    sample = tokenize_group(tiny, chat, elicitation, ("anger", "fear"), replies, "keep two")
    turns = [{"role": "user", "content": "we wait"}, {"role": "assistant", "content": "why"}]
    for emotion, ids in zip(("anger", "fear"), sample.prompts, strict=True):
        *system, last = elicit(elicitation, chat.text, emotion, "keep two")
        template = tiny.tokenizer.apply_chat_template([*system, *turns, last], tokenize=False, add_generation_prompt=True)
        assert template.count("<|im_start|>") == 4 + len(system)
        assert list(ids) == tiny.tokenizer(template, add_special_tokens=False)["input_ids"]


def test_a_prompt_longer_than_the_context_is_refused_with_both_figures(tiny: Model) -> None:
    fixed = len(tiny.prompt_ids([{"role": "user", "content": ""}]))
    room = tiny.shape.context - fixed

    def sample(words: int, reply: int) -> Sample:
        group = Group(GroupKey("s7", "negative"), "t", " ".join(["train"] * words))
        return tokenize_group(tiny, group, "reply", ("joy", "rage"), {"joy": "sing", "rage": " ".join(["no"] * reply)}, "")

    full = sample(room - 4, 4)
    assert len(full.prompts[0]) + 4 == tiny.shape.context
    read_states(tiny, [full], [Site(0, RESID_POST)])  # the limit itself fits
    with pytest.raises(DataError, match=r"s7/negative: 257 tokens do not fit the context of tiny-llama \(256 tokens\)"):
        sample(room - 4, 5)
    with pytest.raises(DataError, match="s7/negative"):
        tokenize_group(tiny, Group(GroupKey("s7", "negative"), "t", " ".join(WORDS * 4)), "tone", ("joy",), None, "")


# ---- batches -----------------------------------------------------------------------------------------------------------


def test_batches_keep_to_the_budget_padding_included_and_hold_every_group_once(tiny: Model) -> None:
    samples = samples_of(tiny, scenarios=9)
    for budget in (1, 90, 200, 10_000):
        batches = batches_by_cost(samples, budget)
        assert sorted(s.key for batch in batches for s in batch) == sorted(s.key for s in samples)
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(s.cost for s in batch) <= budget
        for before, after in zip(batches, batches[1:], strict=False):
            assert before[-1].cost >= after[0].cost  # similar lengths together
            assert (len(before) + 1) * before[0].cost > budget  # no batch ends while the next group would still fit
    assert len(batches_by_cost(samples, 1)) == len(samples) and len(batches_by_cost(samples, 10_000)) == 1


def test_cost_counts_what_a_pass_computes() -> None:
    assert sample_of(10, [3, 4, 0]).cost == 17
    own = Sample(GroupKey("s", "neutral"), "t", ((1, 2), (1, 3)), ((), ()))
    assert own.cost == 4 and not own.packs
    assert Sample(GroupKey("s", "neutral"), "t", ((1, 2), (1, 3)), ((7,), (8, 9))).cost == 7


def test_batches_are_deterministic_and_ties_keep_their_order() -> None:
    same = [replace(sample_of(4, [2, 2]), key=GroupKey(f"s{index}", "neutral")) for index in range(7)]
    assert [[s.key.scenario for s in batch] for batch in batches_by_cost(same, 24)] == [["s0", "s1", "s2"], ["s3", "s4", "s5"], ["s6"]]
    assert batches_by_cost(same, 24) == batches_by_cost(iter(same), 24)


# ---- halving -----------------------------------------------------------------------------------------------------------


def limited(model: Model, site: Site, limit: int, error: Exception) -> Callable[[list[Sample]], tuple[list[Sample], dict[Site, Tensor]]]:
    """A pass that runs out of memory in the middle of the model when it holds more than `limit` rows."""

    def hook(activation: Tensor) -> None:
        if len(activation) > limit:
            raise error

    return lambda some: (some, read_states(model, some, [site], edits={Site(1, RESID_MID): hook}))


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate"), torch.OutOfMemoryError("cuda"), MemoryError()])
def test_a_batch_that_does_not_fit_is_halved_to_the_same_states_and_says_so(tiny: Model, error: Exception) -> None:
    samples, site = samples_of(tiny, scenarios=2)[:5], Site(2, RESID_POST)
    said: list[str] = []
    parts = list(halve_on_oom(samples, limited(tiny, site, 2, error), said.append))
    assert [len(some) for some, _ in parts] == [2, 1, 2] and [s for some, _ in parts for s in some] == samples
    expected = read_states(tiny, samples, [site])[site]
    assert_forward(torch.cat([states[site] for _, states in parts]), expected)
    assert said == ["out of memory: the batch of 5 groups is halved", "out of memory: the batch of 3 groups is halved"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.hf.modules())


def test_nothing_is_said_or_split_where_everything_fits(tiny: Model) -> None:
    samples, said = samples_of(tiny), []
    parts = list(halve_on_oom(samples, limited(tiny, Site(0, RESID_POST), 3, MemoryError()), said.append))
    assert len(parts) == 1 and not said


def test_a_single_group_that_does_not_fit_is_one_line_that_says_what_to_do(tiny: Model) -> None:
    compute = limited(tiny, Site(0, RESID_POST), 0, RuntimeError("DefaultCPUAllocator: not enough memory"))
    with pytest.raises(OutOfMemory, match="single item.*--dtype bfloat16") as caught:
        list(halve_on_oom(samples_of(tiny), compute, lambda _: None))
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny: Model) -> None:
    said: list[str] = []
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(
            halve_on_oom(samples_of(tiny), limited(tiny, Site(0, RESID_POST), 0, RuntimeError("shapes cannot be multiplied")), said.append)
        )
    assert not said


def test_unpacked_rows_get_a_plain_padding_mask_and_packed_rows_an_additive_one(tiny: Model) -> None:
    rows = [row for sample in (sample_of(2, [1, 2]),) for row in rows_of(sample, packed=False)]
    assert activations.make_batch(tiny, rows).mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    mask = activations.make_batch(tiny, rows_of(sample_of(2, [1, 2]))).mask
    seen = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert (mask == 0).int().tolist() == [[seen]] and mask.max() == 0 and mask.min() == torch.finfo(torch.float32).min


def test_states_lie_in_room_taken_before_the_pass(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken during the pass, it would break up the space that activations leave, and the heap would grow with every layer."""
    room: set[int] = set()
    run = tiny.run

    def watched(*args: Any, **options: Any) -> Tensor:
        room.update(found.data_ptr() for found in gc.get_objects() if type(found) is Tensor and torch._C._has_storage(found))
        return run(*args, **options)

    monkeypatch.setattr(tiny, "run", watched)
    states = read_states(tiny, samples_of(tiny), sites_of(tiny))
    assert len(states) == len(sites_of(tiny)) and all(state.data_ptr() in room for state in states.values())
