"""Generation: decoding as Hugging Face does it, rows that do not depend on their neighbours, steps, the growing cache."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from emosteer.base.errors import DataError, UsageError
from emosteer.generation import generate as generation
from emosteer.generation import kv_cache as cache_module
from emosteer.generation.decoding import GUIDANCE, Decoding
from emosteer.generation.generate import Request, batches, choose, generate, noise_of, steps
from emosteer.generation.kv_cache import ROOM, cache_name, growing_cache
from emosteer.generation.steering import SteeringPlan
from emosteer.models.interventions import RowEdits, unit_masks
from emosteer.models.model import Model
from emosteer.models.sites import Head, Site
from tests.conftest import SIZES, build, tiny_tokenizer
from tests.helpers import reference
from tests.helpers.precision import assert_forward

PROMPTS = ((1, 7, 9, 12, 30, 41, 4), (1, 8, 20, 4), (1, 50, 33, 21, 17, 60, 44, 13, 3, 4), (1, 70, 4), (1, 30, 31, 32, 4))
REQUESTS = [Request(f"row{index}", prompt) for index, prompt in enumerate(PROMPTS)]


def no_stops(model: Model, monkeypatch: pytest.MonkeyPatch, *stops: int) -> None:
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset(stops))


def no_hooks(model: Model) -> bool:
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


# ---- choosing a token ------------------------------------------------------------------------------------------------

SETTINGS = [(1.0, 1.0, 1.0), (0.7, 1.0, 1.0), (1.0, 0.8, 1.0), (1.5, 0.3, 1.3), (0.4, 0.95, 0.7), (1.0, 1e-6, 2.0)]


@pytest.mark.parametrize(("temperature", "top_p", "penalty"), SETTINGS)
def test_sampling_follows_the_probabilities_of_hugging_faces_processors(temperature: float, top_p: float, penalty: float) -> None:
    """Noise on a fine even grid: the share of each token is its probability, to within one step of the grid."""
    steps, vocab = 4000, 25
    draw = torch.Generator().manual_seed(0)
    context = torch.tensor([[3, 7, 7, 20, 11]])
    seen = torch.zeros(1, vocab, dtype=torch.bool)
    seen[0, context[0]] = True
    noise = (torch.arange(steps) + 0.5) / steps
    decoding = Decoding(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
    for _ in range(3):
        logits = 2 * torch.randn(1, vocab, generator=draw)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(context, logits.clone()) if penalty != 1 else logits
        expected = TemperatureLogitsWarper(temperature)(context, expected)
        expected = TopPLogitsWarper(top_p)(context, expected).softmax(-1)[0]
        tokens = choose(logits.expand(steps, -1), seen.expand(steps, -1), noise, decoding)
        share = torch.bincount(tokens, minlength=vocab) / steps
        assert (share - expected).abs().max() <= 1.5 / steps
        assert not share[expected == 0].any()
        for extreme in (0.0, 1 - 2**-24):  # the ends of what torch.rand gives
            token = choose(logits, seen, torch.tensor([extreme]), decoding)
            assert expected[token] > 0


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_takes_the_best_token_after_the_penalty(penalty: float) -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(50, 30, generator=draw)
    context = torch.randint(0, 30, (50, 12), generator=draw)
    seen = torch.zeros(50, 30, dtype=torch.bool).scatter_(1, context, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(context, logits.clone()).argmax(-1)
    assert torch.equal(choose(logits, seen, None, Decoding(repetition_penalty=penalty)), expected)


@pytest.mark.parametrize("penalty", [1.0, 1.1, 2.0])
def test_unsteered_greedy_text_equals_hugging_faces(family: Model, penalty: float) -> None:
    for request in REQUESTS[:3]:
        out = family.hf.generate(
            torch.tensor([request.ids]), do_sample=False, max_new_tokens=20, repetition_penalty=penalty, eos_token_id=2, pad_token_id=2
        )[0, len(request.ids) :].tolist()
        expected = out[: out.index(2)] if 2 in out else out
        assert list(generate(family, [request], decoding=Decoding(20, repetition_penalty=penalty))[0].ids) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_penalty_that_spares_the_prompt_is_hugging_faces_that_ignores_it(family: Model, temperature: float) -> None:
    """Against their processor over the reply alone, a token at a time; and with the prompt's words penalised something else is written."""
    decoding = Decoding(20, temperature, repetition_penalty=3.0, penalise_prompt=False, seed=4)
    found = generate(family, REQUESTS, decoding=decoding)
    for request, reply in zip(REQUESTS, found, strict=True):
        penalise = RepetitionPenaltyLogitsProcessor(3.0, prompt_ignore_length=len(request.ids))
        noise, ids = noise_of(request, decoding), list(request.ids)
        for step in range(20):
            logits = penalise(torch.tensor([ids]), family.hf(torch.tensor([ids])).logits[:, -1].float())
            token = choose(logits, torch.zeros(1, 0, dtype=torch.long), noise[step : step + 1] if temperature else None, decoding)
            if token.item() in family.stop_ids:
                break
            ids.append(token.item())
        assert list(reply.ids) == ids[len(request.ids) :]
    assert [reply.ids for reply in generate(family, REQUESTS, decoding=replace(decoding, penalise_prompt=True))] != [r.ids for r in found]


def test_what_spares_the_prompt_has_a_key_of_its_own() -> None:
    """Replies on disk from before there was a choice were written with the penalty on the prompt, and keep their keys."""
    old = {"max_new_tokens": 64, "temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.1, "seed": 0}
    assert Decoding().shaping == old and Decoding(repetition_penalty=1, penalise_prompt=False).shaping == {**old, "repetition_penalty": 1}
    assert Decoding.usual().shaping == {**old, "guidance": GUIDANCE, "penalise_prompt": False}
    assert Decoding.usual(guidance=1.0, seed=3) == Decoding(seed=3, penalise_prompt=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, found 0"),
        ({"temperature": -0.1}, "--temperature .* found -0.1"),
        ({"temperature": float("nan")}, "--temperature .* found nan"),
        ({"temperature": float("inf")}, "--temperature .* found inf"),
        ({"top_p": 0.0}, "--top-p .* found 0.0"),
        ({"top_p": 1.01}, "--top-p .* found 1.01"),
        ({"top_p": float("nan")}, "--top-p .* found nan"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty .* found 0.0"),
        ({"repetition_penalty": float("nan")}, "--repetition-penalty .* found nan"),
    ],
)
def test_nonsense_settings_are_usage_errors(fields: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Decoding(**fields)


# ---- rows ------------------------------------------------------------------------------------------------------------


def strong_plan(model: Model, rows: int) -> SteeringPlan:
    draw = torch.Generator().manual_seed(2)
    return SteeringPlan({Site(layer, "attn_out"): torch.randn(rows, model.shape.d_model, generator=draw) for layer in range(3)}, rows)


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_rows_text_does_not_depend_on_its_neighbours(family: Model, monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    decoding = Decoding(max_new_tokens=12, temperature=temperature, top_p=0.95, seed=3)
    plan = strong_plan(family, len(REQUESTS))
    no_stops(family, monkeypatch)
    free = generate(family, REQUESTS, plan, decoding)
    no_stops(family, monkeypatch, free[1].ids[2], free[4].ids[6])
    together = generate(family, REQUESTS, plan, decoding)
    assert len({reply.n_tokens for reply in together}) > 1
    order = [3, 0, 4]
    assert generate(family, [REQUESTS[i] for i in order], plan.rows(order), decoding) == [together[i] for i in order]
    for index, request in enumerate(REQUESTS):
        assert generate(family, [request], plan.rows([index]), decoding) == [together[index]]


def test_sampled_text_depends_on_seed_and_key_and_on_nothing_else(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    no_stops(tiny, monkeypatch)
    decoding = Decoding(max_new_tokens=12, temperature=1.0, repetition_penalty=1.0, seed=1)
    prompt = PROMPTS[0]
    same = generate(tiny, [Request("a", prompt), Request("a", prompt), Request("b", prompt)], decoding=decoding)
    assert same[0] == same[1]
    assert same[0].ids != same[2].ids
    torch.manual_seed(99)  # the global generator has no say
    assert generate(tiny, [Request("a", prompt)], decoding=decoding)[0] == same[0]
    other = generate(tiny, [Request("a", prompt)], decoding=Decoding(12, 1.0, repetition_penalty=1.0, seed=2))[0]
    assert other.ids != same[0].ids
    longer = generate(tiny, [Request("a", prompt)], decoding=Decoding(20, 1.0, repetition_penalty=1.0, seed=1))[0]
    assert longer.ids[:12] == same[0].ids


def test_every_step_of_every_row_uses_its_own_noise(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling in a batch whose rows end apart, against a recomputation from scratch with the same uniform numbers."""
    noise = torch.rand(3, 10, generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr(generation, "_noise", lambda requests, decoding: noise)
    decoding = Decoding(max_new_tokens=10, temperature=1.5, top_p=0.9, repetition_penalty=1.2)

    def slow(row: int, stops: frozenset[int]) -> tuple[int, ...]:
        ids = list(PROMPTS[row])
        for step in range(10):
            logits = tiny.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
            seen = torch.isin(torch.arange(tiny.shape.d_vocab), torch.tensor(ids))[None]
            token = int(choose(logits, seen, noise[row, step : step + 1], decoding))
            if token in stops:
                break
            ids.append(token)
        return tuple(ids[len(PROMPTS[row]) :])

    stop = slow(0, frozenset())[3]
    no_stops(tiny, monkeypatch, stop)
    expected = [slow(row, frozenset({stop})) for row in range(3)]
    assert len(expected[0]) <= 3 and max(map(len, expected)) > 3
    assert [reply.ids for reply in generate(tiny, REQUESTS[:3], decoding=decoding)] == expected


def test_a_number_on_the_border_of_two_tokens_takes_the_second() -> None:
    logits, none = torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)
    first, second = (int(choose(logits, none, torch.tensor([u]), Decoding(temperature=1.0))) for u in (0.0, 0.5))
    assert first != second, "each has half of [0, 1)"


def test_sampled_first_tokens_follow_the_models_probabilities(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    no_stops(tiny, monkeypatch)
    rows = 600
    replies = generate(tiny, [Request(str(i), PROMPTS[1]) for i in range(rows)], decoding=Decoding(1, 1.0, repetition_penalty=1.0))
    share = torch.bincount(torch.tensor([reply.ids[0] for reply in replies]), minlength=tiny.shape.d_vocab) / rows
    expected = tiny.hf(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].softmax(-1)
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / rows).sqrt() + 1 / rows).all()


def test_stop_tokens_end_a_row_and_are_not_part_of_it(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    no_stops(tiny, monkeypatch)
    decoding = Decoding(max_new_tokens=8)
    free = generate(tiny, REQUESTS[:2], decoding=decoding)
    assert [(r.finish_reason, r.n_tokens, r.key) for r in free] == [("length", 8, "row0"), ("length", 8, "row1")]
    stop = next(token for token in free[0].ids if token not in free[1].ids)
    no_stops(tiny, monkeypatch, stop)
    ended, other = generate(tiny, REQUESTS[:2], decoding=decoding)
    assert ended.ids == free[0].ids[: free[0].ids.index(stop)] and ended.finish_reason == "stop"
    assert other == free[1]
    assert ended.text == tiny.tokenizer.decode(ended.ids, skip_special_tokens=True).strip()
    at = free[0].ids.index(stop)
    exact = generate(tiny, REQUESTS[:1], decoding=Decoding(max_new_tokens=at + 1))[0]
    assert exact.finish_reason == "stop" and exact.n_tokens == at, "a stop at the very last step is a stop"
    no_stops(tiny, monkeypatch, free[0].ids[0])
    assert generate(tiny, REQUESTS[:1], decoding=decoding)[0].ids == ()


def test_a_prompt_that_leaves_no_room_for_its_reply_is_refused(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    no_stops(tiny, monkeypatch)
    context = tiny.shape.context
    long = Request("long", (1, *[9] * (context - 4)))
    assert generate(tiny, [long], decoding=Decoding(max_new_tokens=3))[0].n_tokens == 3
    with pytest.raises(DataError, match=f"'long' has {context - 3} tokens; with 4 new ones.*tiny-llama \\({context}\\).*--max-new-tokens"):
        generate(tiny, [REQUESTS[0], long], decoding=Decoding(max_new_tokens=4))


def test_a_plan_of_another_size_is_refused(tiny: Model) -> None:
    with pytest.raises(ValueError, match="plan has 2 rows, the batch 3"):
        generate(tiny, REQUESTS[:3], SteeringPlan.none(2))


def test_no_requests_give_no_replies(tiny: Model) -> None:
    assert generate(tiny, []) == []


def test_batches_hold_every_request_once_longest_first() -> None:
    assert list(batches(REQUESTS, 2)) == [[2, 0], [4, 1], [3]]
    assert sorted(i for batch in batches(REQUESTS, 3) for i in batch) == [0, 1, 2, 3, 4]


def test_plan_and_row_edits_work_together(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at the same site: the units are replaced, the plan's vector is added."""
    no_stops(tiny, monkeypatch)
    size, site = tiny.shape.d_head, Site(1, "z")
    shift = 2 * torch.randn(1, tiny.width("z"), generator=torch.Generator().manual_seed(4))
    masks = unit_masks(tiny, [[Head(1, 1)]])
    found = generate(
        tiny, REQUESTS[:1], SteeringPlan({site: shift}, 1), Decoding(10, repetition_penalty=2.0), row_edits=RowEdits(masks, None)
    )

    def change(x: Tensor) -> Tensor:
        x = x + shift[0]
        x[..., size : 2 * size] = 0
        return x

    assert found[0].ids == reference.greedy(tiny, PROMPTS[0], {(1, "z"): change}, 10, frozenset(), 2.0)[0]


# ---- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_the_columns_of_a_batch_are_its_replies(family: Model, monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    no_stops(family, monkeypatch)
    plan, decoding = strong_plan(family, len(REQUESTS)), Decoding(max_new_tokens=9, temperature=temperature, seed=3)
    free = generate(family, REQUESTS, plan, decoding)
    no_stops(family, monkeypatch, free[1].ids[2], free[4].ids[6])
    replies, columns = generate(family, REQUESTS, plan, decoding), list(steps(family, REQUESTS, plan, decoding))
    assert {reply.finish_reason for reply in replies} == {"stop", "length"}
    for row, reply in enumerate(replies):
        assert tuple(step.tokens[row] for step in columns if row in step.tokens) == reply.ids
        ends = [index for index, step in enumerate(columns) if row in step.ended]
        assert len(ends) == 1 and columns[ends[0]].ended[row] == reply.finish_reason
        last = max((index for index, step in enumerate(columns) if row in step.tokens), default=-1)
        assert ends[0] == last + (reply.finish_reason == "stop"), "a stop token takes a step and is not written"
    assert len(columns) == 9


def test_the_columns_end_with_the_last_row(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    no_stops(tiny, monkeypatch)
    first = generate(tiny, REQUESTS[:1], decoding=Decoding(max_new_tokens=6))[0].ids
    no_stops(tiny, monkeypatch, first[2])
    columns = list(steps(tiny, REQUESTS[:1], decoding=Decoding(max_new_tokens=6)))
    assert len(columns) == first.index(first[2]) + 1 and dict(columns[-1].tokens) == {} and dict(columns[-1].ended) == {0: "stop"}


def hooked_plan(model: Model, rows: int) -> SteeringPlan:
    """A plan that no lean pass takes: it acts at units."""
    draw = torch.Generator().manual_seed(5)
    return SteeringPlan({Site(1, "z"): 2 * torch.randn(rows, model.width("z"), generator=draw)}, rows)


def test_no_hook_is_left_between_steps_nor_after_an_early_end(family: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    no_stops(family, monkeypatch)
    ids = torch.tensor([PROMPTS[0]])
    before = family.hf(input_ids=ids).logits
    plan, decoding = hooked_plan(family, 5), Decoding(9, repetition_penalty=3.0)
    edits = RowEdits(unit_masks(family, [[Head(0, 1)]] * 5), None)
    expected = generate(family, REQUESTS, plan, decoding, row_edits=edits)
    assert [reply.ids for reply in expected] != [reply.ids for reply in generate(family, REQUESTS, None, decoding)]
    column = steps(family, REQUESTS, plan, decoding, row_edits=RowEdits(unit_masks(family, [[Head(0, 1)]] * 5), None))
    for _ in range(3):
        next(column)
        assert no_hooks(family)
        assert torch.equal(family.hf(input_ids=ids).logits, before)
    column.close()
    assert no_hooks(family) and next(column, None) is None
    assert torch.equal(family.hf(input_ids=ids).logits, before)


def test_no_hook_survives_an_exception_in_the_middle_of_a_step(family: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    no_stops(family, monkeypatch)
    column = steps(family, REQUESTS, hooked_plan(family, 5), Decoding(9))
    next(column)

    def explode(*_: object, **__: object) -> None:
        assert not no_hooks(family), "the plan's hooks must be in place by now"
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(family.body, "forward", explode)
        with pytest.raises(ZeroDivisionError):
            next(column)
    assert no_hooks(family)


def test_two_batches_of_one_model_can_be_written_at_the_same_time(family: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps its own steering, whatever the other's engine hooks in; a third runs in between."""
    no_stops(family, monkeypatch)
    decoding = Decoding(8, repetition_penalty=3.0)
    plans = [hooked_plan(family, 5), strong_plan(family, 5)]
    expected = [[reply.ids for reply in generate(family, REQUESTS, plan, decoding)] for plan in plans]
    plain = generate(family, REQUESTS[:2], None, decoding)
    written: list[list[list[int]]] = [[[] for _ in REQUESTS] for _ in plans]
    for both in zip(*(steps(family, REQUESTS, plan, decoding) for plan in plans), strict=True):
        for rows, step in zip(written, both, strict=True):
            for row, token in step.tokens.items():
                rows[row].append(token)
        assert generate(family, REQUESTS[:2], None, decoding) == plain
    assert [[tuple(ids) for ids in rows] for rows in written] == expected


def test_what_an_early_end_leaves_is_no_memory(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    usual = generation.engine_for
    monkeypatch.setattr(generation, "engine_for", lambda *rest: made.append(weakref.ref(engine := usual(*rest))) or engine)
    column = steps(tiny, REQUESTS)
    next(column)
    assert made[0]() is not None
    column.close()
    gc.collect()
    assert made[0]() is None, "the batch's cache is still held"


# ---- the cache -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare_caches(model: Model, prompt: int, steps: int, leave: dict[int, list[int]]) -> DynamicCache:
    """Logits under the growing cache against DynamicCache and against no cache at all, while rows leave."""
    ids = torch.randint(3, 70, (4, prompt + steps), generator=torch.Generator().manual_seed(6))
    caches = growing_cache(model.hf.config), DynamicCache(config=model.hf.config)
    full = model.hf(input_ids=ids, use_cache=False).logits
    alive, start = torch.arange(4), 0
    for end in range(prompt, prompt + steps):
        grown, usual = (
            model.hf(input_ids=ids[alive, start:end], use_cache=True, **{cache_name(model.hf): c}).logits[:, -1] for c in caches
        )
        assert_forward(grown, usual, f"position {end}")
        assert_forward(grown, full[alive, end - 1], f"position {end}")
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == end
        start = end
        if end - prompt in leave:
            keep = torch.tensor(leave[end - prompt])
            alive = alive[keep]
            for c in caches:
                c.batch_select_indices(keep)
    return caches[0]


@pytest.mark.parametrize("room", [1, 3, 4])
def test_the_growing_cache_gives_the_logits_of_dynamic_cache(family: Model, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(cache_module, "ROOM", room)
    compare_caches(family, 5, 12, {2: [0, 2, 3], 3: [1, 2], 8: [1]})


def mixed_gemma() -> Model:
    """A Gemma whose first layer sees everything and whose other layers see a window of 64; in the tiny one all slide."""
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    config = Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=64, query_pre_attn_scalar=16, layer_types=kinds)
    return Model.from_hf(Gemma3ForCausalLM(config), tiny_tokenizer(), "mixed-gemma")


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixed"])
def test_the_growing_cache_beyond_its_room_and_past_a_sliding_window(name: str) -> None:
    """Gemma's sliding layers forget while the full ones grow twice."""
    model = mixed_gemma() if name == "mixed" else build(name)
    cache = compare_caches(model, 40, 2 * ROOM + 3, {ROOM - 1: [0, 1, 3], ROOM: [0, 2], ROOM + 1: [1]})
    held = [layer.keys.shape[-2] for layer in cache.layers]
    full = 40 + 2 * ROOM + 2
    assert held == {"llama": [full] * 3, "gemma3": [63] * 3, "mixed": [full, 63, 63]}[name]


def test_generation_past_gemmas_window_equals_a_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed_gemma()
    no_stops(model, monkeypatch)
    draw = torch.Generator().manual_seed(8)
    prompts = [tuple(torch.randint(3, 70, (n,), generator=draw).tolist()) for n in (60, 20, 75)]
    found = generate(model, [Request(str(i), p) for i, p in enumerate(prompts)], decoding=Decoding(12, repetition_penalty=3.0))
    assert [reply.ids for reply in found] == [reference.greedy(model, p, {}, 12, frozenset(), 3.0)[0] for p in prompts]


def test_only_new_room_is_copied() -> None:
    """Between two growths the states stay where they are: nothing is copied."""
    cache = growing_cache(build("llama").hf.config)
    layer, draw = cache.layers[0], torch.Generator().manual_seed(9)
    states = [torch.randn(2, 2, n, 8, generator=draw) for n in (5, *[1] * (ROOM + 2))]
    places = []
    for index, state in enumerate(states):
        keys, values = layer.update(state, 2 * state)
        places.append(keys.data_ptr())
        expected = torch.cat(states[: index + 1], dim=2)
        assert torch.equal(keys, expected) and torch.equal(values, 2 * expected)
    assert len(set(places)) == 2
