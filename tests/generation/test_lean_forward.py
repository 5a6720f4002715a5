"""The lean forward pass: it writes what the Hugging Face forward pass with hooks writes, and stays away from what it does not know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from emosteer.generation import engines
from emosteer.generation import generate as generation
from emosteer.generation import kv_cache as cache_module
from emosteer.generation import lean_forward as lean
from emosteer.generation import packed_linear as packed
from emosteer.generation.decoding import Decoding
from emosteer.generation.engines import HookedEngine, LeanEngine, engine_for
from emosteer.generation.generate import Reply, Request, choose, generate
from emosteer.generation.kv_cache import RowCache
from emosteer.generation.lean_forward import Lean, lean_of
from emosteer.generation.native.build import library
from emosteer.generation.prefix_tree import chunks, pack
from emosteer.generation.steering import SteeringPlan
from emosteer.models.model import Model
from emosteer.models.sites import Site
from tests.conftest import SIZES, build, tiny_tokenizer
from tests.helpers import reference
from tests.helpers.precision import assert_forward

#: Unequal lengths, shared beginnings, one prompt that begins another, two that are the same, one token alone.
PROMPTS = (
    (1, 7, 9, 12, 30, 41, 4),
    (1, 7, 9, 4),
    (1, 7, 9, 12, 30, 41, 4),
    (1,),
    (1, 7, 9),
    (5, 30, 31, 32, 60, 61, 62, 17, 3, 4),
    (1, 70),
)
STRENGTHS = (0.0, 1.0, 2.0, 1.5, -1.0, 0.5, 0.0)
KINDS = ("attn_out", "mlp_out", "resid_post")


def variants() -> dict[str, Callable[[], Model]]:
    def llama(**options: Any) -> Model:
        torch.manual_seed(3)
        hf = LlamaForCausalLM(LlamaConfig(**SIZES, **options))
        for name, parameter in hf.named_parameters():
            if name.endswith("bias") or "norm" in name:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
        return Model.from_hf(hf, tiny_tokenizer(), "variant")

    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    return {
        "llama": lambda: build("llama"),
        "qwen2": lambda: build("qwen2"),
        "tied": lambda: llama(tie_word_embeddings=True),
        "biased": lambda: llama(attention_bias=True, mlp_bias=True),
        "wide-heads": lambda: llama(head_dim=16),
        "scaled-rotary": lambda: llama(rope_parameters=scaled),
    }


@pytest.fixture(scope="module", params=list(variants()))
def model(request: pytest.FixtureRequest) -> Model:
    return variants()[request.param]()


def plan_for(model: Model, strengths: Sequence[float] = STRENGTHS) -> SteeringPlan:
    """Every site, another direction and strength for every row."""
    draw = torch.Generator().manual_seed(5)
    sites = [Site(layer, kind) for layer in range(model.shape.n_layers) for kind in KINDS]
    factors = torch.tensor(strengths)[:, None]
    return SteeringPlan(
        {site: factors * torch.randn(len(strengths), model.shape.d_model, generator=draw) for site in sites}, len(strengths)
    )


def requests(prompts: Sequence[tuple[int, ...]] = PROMPTS) -> list[Request]:
    return [Request(str(index), prompt) for index, prompt in enumerate(prompts)]


def engine_used(model: Model, plan: SteeringPlan | None = None) -> type:
    return type(engine_for(model, PROMPTS, plan or SteeringPlan.none(len(PROMPTS)), None, 3))


def both_ways(
    model: Model, monkeypatch: pytest.MonkeyPatch, plan: SteeringPlan, decoding: Decoding
) -> list[tuple[list[Reply], list[Tensor]]]:
    """Replies and the logits of every step by the lean way and by the hooked one."""
    found = []
    for engine in (LeanEngine, HookedEngine):
        trace: list[Tensor] = []
        with monkeypatch.context() as patch:
            if engine is HookedEngine:
                patch.setattr(engines, "lean_of", lambda model: None)
            assert engine_used(model, plan) is engine
            step = engine.step
            patch.setattr(engine, "step", lambda self, tokens, step=step, trace=trace: trace.append(step(self, tokens)) or trace[-1])
            found.append((generate(model, requests(PROMPTS[: plan.n_rows]), plan, decoding), trace))
    return found


def assert_same(found: list[tuple[list[Reply], list[Tensor]]]) -> None:
    (replies, trace), (expected, slow) = found
    assert replies == expected
    assert len(trace) == len(slow)
    for a, b in zip(trace, slow, strict=True):
        assert_forward(a, b)


# ---- the same text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "temperature"), [("plain", 0.0), ("plain", 1.1), ("packed", 0.0), ("native", 0.0), ("tight", 0.0), ("tight native", 0.0)]
)
def test_it_writes_what_hooks_write(model: Model, monkeypatch: pytest.MonkeyPatch, way: str, temperature: float) -> None:
    """packed: weights laid out ahead; native: the compiled step; tight: no room ahead in the cache, prompts read a few tokens at a time."""
    model.__dict__.pop("_lean", None)
    if "native" not in way:
        monkeypatch.setattr(lean, "library", lambda: None)
    elif library() is None:
        pytest.skip("nothing here compiles the step")
    if way == "packed":
        monkeypatch.setattr(packed, "LEAST_ENTRIES", 0)
    if "tight" in way:
        monkeypatch.setattr(cache_module, "ROOM", 1)
        monkeypatch.setattr(engines, "PROMPT_TOKENS", 6)
    decoding = Decoding(14, temperature=temperature, top_p=0.9, repetition_penalty=1.3, seed=2)
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset())
    plan = plan_for(model)
    free = generate(model, requests(), plan, decoding)
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset({free[0].ids[2], free[3].ids[5], free[6].ids[8]}))
    found = both_ways(model, monkeypatch, plan, decoding)
    assert len({reply.n_tokens for reply in found[0][0]}) > 2, "rows end apart"
    assert_same(found)
    if way == "plain":
        assert_same(both_ways(model, monkeypatch, SteeringPlan.none(len(PROMPTS)), decoding))
        assert_same(both_ways(model, monkeypatch, plan_for(model, [2.0]), decoding))
    made = lean_of(model)
    assert made is not None and (made.native is not None) is ("native" in way)
    assert all(linear.is_packed is (way == "packed") for linear in made.linears())
    model.__dict__.pop("_lean")


def test_it_writes_what_a_recomputation_from_scratch_writes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset())
    plan = plan_for(model)
    assert engine_used(model, plan) is LeanEngine
    found = generate(model, requests(), plan, Decoding(8, repetition_penalty=2.0))
    for row, prompt in enumerate(PROMPTS[2:], 2):
        changes = {(site.layer, site.kind): lambda x, v=value[row]: x + v for site, value in plan.vectors.items()}
        assert found[row].ids == reference.greedy(model, prompt, changes, 8, frozenset(), 2.0)[0]


def test_prompts_of_one_token_need_nothing_read(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tiny, requests([(1,), (9,)]), decoding=Decoding(2))  # the proof of the compiled step reads
    monkeypatch.setattr(Lean, "read", lambda *args: pytest.fail("there is nothing to read"))
    monkeypatch.setattr(lean, "_proved", lambda found: True)
    found = generate(tiny, requests([(1,), (9,)]), decoding=Decoding(6))
    assert [r.ids for r in found] == [reference.greedy(tiny, p, {}, 6, tiny.stop_ids, 1.1)[0] for p in ((1,), (9,))]


def test_bfloat16_logits_agree_to_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llama", "qwen2"):
        wide = build(name)
        model = Model.from_hf(wide.hf.to(torch.bfloat16), wide.tokenizer, "half")
        monkeypatch.setattr(packed, "LEAST_ENTRIES", 0)
        plan = plan_for(model)
        traces = [trace for _, trace in both_ways(model, monkeypatch, plan, Decoding(1))]
        assert traces[0][0].dtype == torch.bfloat16
        assert (traces[0][0] - traces[1][0]).abs().max() <= 5e-2 * traces[1][0].abs().max()


def test_token_ids_in_place_of_a_mask_choose_the_same() -> None:
    draw = torch.Generator().manual_seed(1)
    logits, ids = torch.randn(40, 30, generator=draw), torch.randint(0, 30, (40, 12), generator=draw)
    mask = torch.zeros(40, 30, dtype=torch.bool).scatter_(1, ids, True)
    noise = torch.rand(40, generator=draw)
    for decoding in (Decoding(repetition_penalty=1.5), Decoding(repetition_penalty=0.6), Decoding(repetition_penalty=1.0)):
        before = logits.clone()
        assert torch.equal(choose(logits, ids, None, decoding), choose(logits, mask, None, decoding))
        warm = Decoding(temperature=1.0, top_p=0.8, repetition_penalty=decoding.repetition_penalty)
        assert torch.equal(choose(logits, ids, noise, warm), choose(logits, mask, noise, warm))
        assert torch.equal(logits, before), "the logits are the caller's"


@pytest.mark.parametrize("likely", [1, 4, 15])
def test_sampling_among_the_likeliest_draws_what_sampling_among_all_draws(monkeypatch: pytest.MonkeyPatch, likely: int) -> None:
    """With rows whose nucleus is larger than that, and with ties at its border."""
    draw = torch.Generator().manual_seed(4)
    logits = torch.cat([2 * torch.randn(300, 60, generator=draw), torch.randint(0, 3, (300, 60), generator=draw).float()])
    noise, none = torch.rand(600, generator=draw), torch.zeros(600, 1, dtype=torch.long)
    for top_p in (0.1, 0.6, 0.95):
        decoding = Decoding(temperature=0.8, top_p=top_p)
        monkeypatch.setattr(generation, "LIKELY", 10**6)
        expected = choose(logits, none, noise, decoding)
        monkeypatch.setattr(generation, "LIKELY", likely)
        assert torch.equal(choose(logits, none, noise, decoding), expected)


# ---- when it is used -------------------------------------------------------------------------------------------------------


def test_unknown_models_keep_the_hugging_face_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    sliding = Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1))
    others = [
        build("gemma3"),
        Model.from_hf(sliding, tokenizer),
        Model.from_hf(MistralForCausalLM(MistralConfig(**SIZES, head_dim=8)), tokenizer),
        Model.from_hf(LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")), tokenizer),
        Model.from_hf(
            LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})), tokenizer
        ),
    ]
    for model in others:
        assert lean_of(model) is None
    prompt = tuple(range(3, 40))
    assert (
        generate(others[1], requests([prompt]), decoding=Decoding(6))[0].ids
        == reference.greedy(others[1], prompt, {}, 6, frozenset({2}), 1.1)[0]
    )


def test_changed_modules_and_hooks_are_not_passed_over() -> None:
    model = build("llama")
    assert lean_of(model) is not None
    handle = model.layers[1].mlp.register_forward_hook(lambda *args: None)
    assert lean_of(model) is None
    handle.remove()
    assert lean_of(model) is not None

    class Adapted(torch.nn.Linear):
        pass

    model.layers[1].mlp.up_proj.__class__ = Adapted
    assert lean_of(model) is None


def test_other_sites_and_unit_edits_are_hooked(tiny: Model) -> None:
    z = SteeringPlan({Site(1, "z"): torch.ones(len(PROMPTS), tiny.width("z"))}, len(PROMPTS))
    assert engine_used(tiny, z) is HookedEngine
    nothing = SteeringPlan({Site(1, "z"): torch.zeros(len(PROMPTS), tiny.width("z"))}, len(PROMPTS))
    assert engine_used(tiny, nothing) is LeanEngine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_proved_before_it_is_used(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    def make() -> Model:
        made = build("llama")
        return Model.from_hf(made.hf.to(dtype), made.tokenizer)

    assert lean_of(make()) is not None
    rotary = Lean.rotary
    monkeypatch.setattr(Lean, "rotary", lambda self, positions: rotary(self, positions + (positions > 3)))
    model = make()
    assert lean_of(model) is None
    assert engine_used(model) is HookedEngine
    prompt = PROMPTS[0]
    if dtype == torch.float32:
        assert (
            generate(model, requests([prompt]), decoding=Decoding(6))[0].ids
            == reference.greedy(model, prompt, {}, 6, model.stop_ids, 1.1)[0]
        )


def test_it_follows_weights_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laid-out copy of the old weights would write the old text."""
    monkeypatch.setattr(packed, "LEAST_ENTRIES", 0)
    model = build("llama")
    first = generate(model, requests(), decoding=Decoding(6))
    made = lean_of(model)
    assert made is lean_of(model), "made once"
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight.mul_(-1)
    found = generate(model, requests(), decoding=Decoding(6))
    assert lean_of(model) is not made
    assert found != first
    assert [r.ids for r in found] == [reference.greedy(model, p, {}, 6, model.stop_ids, 1.1)[0] for p in PROMPTS]


def test_weights_are_laid_out_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_ENTRIES", 0)
    for rows, most, expected in ((1, 2**30, False), (8, 10, False), (8, 2**30, True)):
        monkeypatch.setattr(packed, "MOST_BYTES", most)
        linears = Lean(build("llama")).linears()
        packed.pack_all(linears, rows)
        assert all(linear.is_packed is expected for linear in linears)
    assert linears[1](torch.randn(3, 32, generator=torch.Generator().manual_seed(0))).shape == (3, 64)


# ---- prefixes ----------------------------------------------------------------------------------------------------------------


def test_every_distinct_prefix_is_one_node_and_every_row_finds_its_own() -> None:
    sequences = [prompt for prompt in PROMPTS] + [()]
    found = pack(sequences, 12, torch.device("cpu"))
    prefixes = {tuple(s[: end + 1]) for s in sequences for end in range(len(s))}
    assert len(found.tokens) == len(prefixes) and found.rows.shape == (len(sequences), 12)
    for row, sequence in enumerate(sequences):
        nodes = found.rows[row, 12 - len(sequence) :]
        assert found.tokens[nodes].tolist() == list(sequence) and found.positions[nodes].tolist() == list(range(len(sequence)))
    leaves = {s for s in sequences if s and not any(o[: len(s)] == s and len(o) > len(s) for o in sequences)}
    assert len(found.paths) == len(leaves)
    assert torch.equal(found.paths.flatten()[found.place], torch.arange(len(found.tokens)))
    width = found.paths.shape[1]
    assert torch.equal(found.place % width, found.positions), "a node stands at its position, and what stands before it is its prefix"
    for node, place in enumerate(found.place.tolist()):
        path = found.paths[place // width, : place % width + 1]
        assert any(found.tokens[path].tolist() == list(prefix) for prefix in prefixes) and path[-1] == node


@pytest.mark.parametrize("budget", [1, 8, 100])
def test_chunks_hold_every_sequence_that_is_not_empty(budget: int) -> None:
    sequences = [*PROMPTS, ()]
    groups = list(chunks(sequences, budget))
    assert sorted(index for group in groups for index in group) == list(range(len(PROMPTS)))
    assert all(group == sorted(group) for group in groups)
    for group in groups:
        distinct = {sequences[i][: end + 1] for i in group for end in range(len(sequences[i]))}
        assert len(distinct) <= budget or len({sequences[i] for i in group}) == 1 or budget == 1
    assert len(groups) == {1: len(PROMPTS), 8: 3, 100: 1}[budget] or budget == 1


# ---- the cache ---------------------------------------------------------------------------------------------------------------


def test_rows_that_leave_the_cache_take_nothing_with_them(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one list of columns per row; the room runs out several times on the way."""
    monkeypatch.setattr(cache_module, "ROOM", 2)
    shape, draw = tiny.shape, torch.Generator().manual_seed(0)
    lengths = [3, 5, 0, 5, 2]
    cache = RowCache(shape, lengths, 9, torch.device("cpu"), torch.float32)
    states = torch.randn(20, shape.n_kv_heads, shape.d_head, generator=draw)
    nodes = torch.zeros(5, 5, dtype=torch.long)
    own = [[] for _ in lengths]  # type: list[list[Tensor]]
    for row, length in enumerate(lengths):
        nodes[row, 5 - length :] = torch.arange(length) + 4 * row
        own[row] = [states[4 * row + i] for i in range(length)]
    for layer in range(shape.n_layers):
        cache.fill(layer, range(5), nodes, states, 2 * states)
    for step in range(9):
        new = torch.randn(len(own), shape.n_kv_heads, shape.d_head, generator=draw)
        mask = cache.advance()
        for layer in range(shape.n_layers):
            keys, values = cache.write(layer, new, 2 * new)
        for slot, columns in enumerate(own):
            columns.append(new[slot])
            assert torch.equal(keys[slot, :, -len(columns) :].transpose(0, 1), torch.stack(columns))
            assert torch.equal(values[slot], 2 * keys[slot])
            unused = keys.shape[2] - len(columns)
            assert unused >= 0 and (mask is not None or unused == 0)
            if mask is not None:
                assert torch.isinf(mask[slot, 0, 0, :unused]).all() and not mask[slot, 0, 0, unused:].any()
        gone = {2: [1], 4: [0, 3], 6: [1]}.get(step, [])
        if gone:
            order = cache.drop(gone)
            own = [own[slot] for slot in order]
    assert len(own) == 1
