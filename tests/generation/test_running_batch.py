"""A running batch: whoever joins and leaves meanwhile, each request is written what `generate` writes for it alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from emosteer.base.errors import DataError
from emosteer.generation import joining_engines
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Reply, Request, generate
from emosteer.generation.joining_cache import JoiningCache
from emosteer.generation.joining_engines import CohortEngine, LeanJoiningEngine
from emosteer.generation.kv_cache import ROOM
from emosteer.generation.lean_forward import Lean, lean_of
from emosteer.generation.running_batch import Ask, RunningBatch, Written
from emosteer.generation.steering import Course, SteeringPlan, compile_units
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, Site
from emosteer.models.tokens import reply_text
from tests.conftest import build, tiny_tokenizer
from tests.generation.test_steering import circuit
from tests.helpers.families import random_model

EMPTY = (1, 5, 9, 4)
#: What many prompts begin with.
BEGINNING = (1, 5, 9, 4, 7, 30, 31, 8, 8, 12, 40, 41)
SETTINGS = [
    Decoding(9, repetition_penalty=1.3),
    Decoding(14, repetition_penalty=1.3, guidance=1.5),
    Decoding(12, repetition_penalty=2.0, penalise_prompt=False),
    Decoding(11, temperature=0.9, repetition_penalty=1.6, penalise_prompt=False, guidance=1.5, seed=5),
    Decoding(6, temperature=1.1, seed=3),
    Decoding(17, temperature=0.8, top_p=0.7, repetition_penalty=1.2, guidance=2.5, seed=8),
    Decoding(1, guidance=1.5),
    Decoding(30, repetition_penalty=1.0),
]


@dataclass(frozen=True)
class Case:
    """A request with what it comes with."""

    ask: Ask
    joins_at: int
    leaves_at: int | None


def cases(model: Model, count: int, seed: int = 0) -> list[Case]:
    """Requests of all kinds that come in waves; a fifth is cancelled on its way."""
    draw, made = random.Random(seed), list[Case]()
    torch.manual_seed(seed)
    for index in range(count):
        ids = tuple(draw.randrange(3, model.shape.d_vocab) for _ in range(draw.choice([1, 2, 5, 9, 40])))
        ids = BEGINNING[: draw.choice([0, 0, 9, 12])] + ids
        kind = draw.randrange(4)
        weights = None if kind == 0 else 2 * torch.randn([1, 1, 5, 12][kind], 3)
        if kind == 3:
            weights[0] = 0  # type: ignore[index]  # an arc that starts from neutral
        decoding = draw.choice(SETTINGS)
        ask = Ask(Request(f"row{index}", ids, EMPTY), decoding, weights, draw.choice([None, None, 3]))
        at = draw.randrange(25)
        made.append(Case(ask, at, at + draw.randrange(6) if draw.random() < 0.2 else None))
    return made


def alone(model: Model, vectors: dict, ask: Ask) -> Reply:  # type: ignore[type-arg]
    plan = None if ask.weights is None else SteeringPlan.over(Course(vectors, ask.weights[None]))
    return generate(model, [ask.request], plan, ask.decoding)[0]


def run(batch: RunningBatch, made: list[Case]) -> tuple[dict[int, list[Written]], int]:
    """Plays the cases; returns what each was written, and the most requests that shared a step."""
    tickets: dict[int, int] = {}
    found: dict[int, list[Written]] = {index: [] for index in range(len(made))}
    at, most, left = 0, 0, len(made)
    while left:
        for index, case in enumerate(made):
            if case.leaves_at == at and index in tickets:
                here = batch.n_rows
                left -= batch.cancel(tickets[index])
                assert batch.n_rows in (here, here - 1 - case.ask.decoding.guides), "its rows are free at once"
            if case.joins_at == at:
                tickets[index] = batch.join(case.ask)
        most = max(most, batch.n_requests)
        owners = {ticket: index for index, ticket in tickets.items()}
        for written in batch.step():
            found[owners[written.ticket]].append(written)
            left -= written.ended is not None
        at += 1
        assert at < 500
    return found, most


@pytest.mark.parametrize("seed", [0, 1])
def test_each_request_is_written_what_generate_writes_for_it_alone(family: Model, seed: int) -> None:
    vectors = compile_units(family, *circuit(family))
    batch = RunningBatch(family, vectors)
    by_hooks = family.hf.config.model_type.startswith("gemma")
    assert isinstance(batch._engine, CohortEngine if by_hooks else LeanJoiningEngine)
    made = cases(family, 16 if by_hooks else 40, seed)
    found, most = run(batch, made)
    whole, early = 0, 0
    for index, case in enumerate(made):
        expected = alone(family, vectors, case.ask)
        ids = tuple(written.token for written in found[index] if written.token is not None)
        if found[index] and found[index][-1].ended:
            assert (ids, found[index][-1].ended) == (expected.ids, expected.finish_reason), index
            assert reply_text(family.tokenizer, ids) == expected.text
            whole += 1
        else:
            assert case.leaves_at is not None and ids == expected.ids[: len(ids)], index
            early += 1
    assert whole >= len(made) * 0.6 and early >= 1 and most >= 5 and batch.n_requests == batch.n_rows == 0


def test_the_order_in_which_requests_come_changes_nothing(tiny: Model) -> None:
    vectors = compile_units(tiny, *circuit(tiny))
    made = [case for case in cases(tiny, 30, 5) if case.leaves_at is None]
    together = run(RunningBatch(tiny, vectors), [Case(case.ask, 0, None) for case in made])[0]
    apart = run(RunningBatch(tiny, vectors), [Case(case.ask, 3 * index, None) for index, case in enumerate(made)])[0]
    assert [[w.token for w in row] for row in together.values()] == [[w.token for w in row] for row in apart.values()]


def test_logprobs_are_those_of_the_distribution_that_is_written_from(tiny: Model) -> None:
    request = Request("a", (5, 9, 12))
    batch = RunningBatch(tiny, {})
    batch.join(Ask(request, Decoding(4, repetition_penalty=1.0), likeliest=5))
    batch.join(Ask(request, Decoding(4, repetition_penalty=1.0), likeliest=0))
    seen = list(request.ids)
    for _ in range(4):
        first, second, *_ = batch.step()
        with torch.no_grad():
            expected: Tensor = tiny.hf(torch.tensor([seen])).logits[0, -1].log_softmax(-1)
        assert first.token is not None and first.logprob == pytest.approx(expected[first.token].item(), abs=1e-4)
        assert [token for token, _ in first.likeliest] == expected.topk(5).indices.tolist() and first.likeliest[0][0] == first.token
        assert second.likeliest == () and second.logprob == first.logprob
        seen.append(first.token)


def test_a_prompt_that_is_too_long_is_refused_and_the_others_go_on(tiny: Model) -> None:
    batch = RunningBatch(tiny, {})
    batch.join(Ask(Request("a", (5, 9)), Decoding(3)))
    with pytest.raises(DataError, match="'long' has 250 tokens; with 10 new ones"):
        batch.join(Ask(Request("long", (5,) * 250), Decoding(10)))
    with pytest.raises(ValueError, match="empty prompt"):
        batch.join(Ask(Request("b", (5, 9)), Decoding(3, guidance=2.0)))
    assert batch.n_requests == 1 and len(batch.step()) == 1
    batch.clear()
    assert batch.step() == [] and batch.n_rows == 0


def test_the_cache_grows_and_gives_its_memory_back(tiny: Model) -> None:
    """Rows keep their columns through all of it: each is filled with numbers of its own, and a mask hides what lies behind them."""
    cache = JoiningCache(tiny.shape, tiny.device, tiny.dtype)
    draw, rows, sizes = random.Random(0), list[list[float]](), set[int]()
    for turn in range(600):
        if len(rows) < 5 and draw.random() < 0.3:
            length = draw.choice([0, 3, 20, 90])
            [slot] = cache.join([length])
            assert slot == len(rows)
            values = torch.arange(length, dtype=torch.float) + 1000 * turn
            states = values[:, None].expand(tiny.shape.n_layers, tiny.shape.n_kv_heads, length, tiny.shape.d_head)
            cache.place(slot, torch.stack([states, -states], dim=1))
            rows.append(values.tolist())
        if rows:
            mask = cache.advance()
            new = torch.tensor([float(turn + index / 10) for index in range(len(rows))])[:, None, None]
            new = new.expand(-1, tiny.shape.n_kv_heads, tiny.shape.d_head)
            for layer in range(tiny.shape.n_layers):
                keys, values = cache.write(layer, new, -new)
            for index, row in enumerate(rows):
                row.append(new[index, 0, 0].item())
                assert keys[index, 0, : len(row), 0].tolist() == row and values[index, 1, : len(row), -1].tolist() == [-x for x in row]
                hidden = torch.zeros(keys.shape[2]) if mask is None else mask[index, 0, 0]
                assert not hidden[: len(row)].any() and torch.isinf(hidden[len(row) :]).all()
                assert [int(span[index]) for span in cache.spans] == [0, len(row)]
        if rows and draw.random() < 0.15:
            gone = draw.randrange(len(rows))
            moved = cache.drop([gone])
            rows = [rows[old] for old in moved]
        sizes.add(cache.store.shape[4])
        assert cache.store.shape[4] <= max(map(len, rows), default=0) + 90 + 3 * ROOM
    assert len(sizes) > 3 and 0 in sizes


def test_a_full_batch_goes_on_in_the_same_memory(tiny: Model) -> None:
    """Whoever comes and goes, until somebody longer comes, whose memory is given back when he has gone."""
    cache = JoiningCache(tiny.shape, tiny.device, tiny.dtype)
    cache.join([20] * 6)
    places = []
    for turn in range(200):
        cache.advance()
        if turn % 5 == 4:
            cache.drop([int(cache.lengths.argmax())])
            cache.join([20])
        places.append(cache.store.data_ptr())
    assert cache.n_columns < 60 and len(set(places)) == 1
    [slot] = cache.join([900])
    assert cache.store.shape[4] > 900
    cache.drop([slot])
    cache.advance()
    assert cache.n_columns < 60 and cache.store.shape[4] <= cache.n_columns + ROOM and cache.n_rows == 6


def test_no_memory_is_kept_for_rows_that_have_left(tiny: Model) -> None:
    """Neither when somebody much longer joins the few who stayed, nor when these grow."""
    cache = JoiningCache(tiny.shape, tiny.device, tiny.dtype)
    cache.join([20] * 128)
    cache.drop(range(1, 127))
    cache.join([7000])
    assert cache.n_rows == 3 and cache.store.shape[2] <= 6
    cache.drop([2])
    cache.advance()
    assert cache.store.shape[4] < 200


def test_the_store_stays_within_its_bound(tiny: Model) -> None:
    """Rows come while theirs times the longest stays below it, as the server books them; near it nobody is copied at every step."""
    bound = 2000
    cache = JoiningCache(tiny.shape, tiny.device, tiny.dtype, bound)
    draw, ends, moves, steps = random.Random(0), list[int](), 0, 0
    for _ in range(800):
        length, more = draw.choice([1, 5, 60, 300]), draw.choice([5, 40, 200])
        while (len(ends) + 1) * max(length + more, *ends, 0) <= bound:
            ends.append(length + more)
            cache.join([length])
        before = cache.store.data_ptr()
        cache.advance()
        moves, steps = moves + (cache.store.data_ptr() != before), steps + 1
        assert cache.n_rows * cache.n_columns <= cache.store.shape[2] * cache.store.shape[4] <= bound
        gone = [row for row, (length, end) in enumerate(zip(cache.lengths.tolist(), ends, strict=True)) if length == end]
        ends = [ends[row] for row in cache.drop(gone)] if gone else ends
    assert moves < steps / 4


@pytest.mark.parametrize("runs_already", [True, False])
def test_a_neighbour_that_overflows_spoils_nobody(monkeypatch: pytest.MonkeyPatch, runs_already: bool) -> None:
    """He leaves states that are not finite; whoever is moved into his slot, or joins it, is written as alone. Without the compiled step,
    which reads a row's own columns only."""
    model = random_model("llama")
    lean = lean_of(model)
    assert lean is not None
    monkeypatch.setattr(lean, "prepare", lambda rows: None)
    monkeypatch.setattr(lean, "native", None)
    sites = {Site(layer, ATTN_OUT): torch.ones(1, model.shape.d_model) for layer in range(model.shape.n_layers)}
    batch = RunningBatch(model, sites)

    def asked(key: str, ids: Sequence[int], tokens: int, weight: float | None = None) -> Ask:
        return Ask(Request(key, tuple(ids), EMPTY), Decoding(tokens), None if weight is None else torch.full((1, 1), weight), None)

    other = asked("other", range(5, 11), 6)
    batch.join(asked("stays", range(3, 30), 40))
    broken = batch.join(asked("broken", range(3, 23), 30, float("inf")))
    ticket = batch.join(other) if runs_already else None
    tokens = [step.token for _ in range(2 if runs_already else 6) for step in batch.step() if step.ticket == ticket]
    batch.cancel(broken)
    ticket = batch.join(other) if ticket is None else ticket
    while batch.n_requests > 1:
        tokens += [step.token for step in batch.step() if step.ticket == ticket]
    assert tuple(token for token in tokens if token is not None) == alone(model, sites, other).ids and len(tokens) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beginnings_that_were_read_are_not_read_again(tiny: Model, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Neither those of other prompts, nor of a conversation that goes on; keys and values are those of a prompt read alone."""
    model = tiny if dtype == torch.float32 else Model.from_hf(build("llama").hf.to(dtype), tiny_tokenizer(), "half")
    lean = lean_of(model)
    assert lean is not None
    lean.prepare(8)
    engine, states, seen = LeanJoiningEngine(lean, []), Lean.states, []
    monkeypatch.setattr(
        Lean, "states", lambda self, packed, *rest: (seen.append(len(packed.tokens) - packed.n_known), states(self, packed, *rest))[1]
    )
    longer = (*BEGINNING, *range(20, 50))
    waves = [
        ([(*BEGINNING, 50, 51, 3)], [14]),
        ([(*BEGINNING, 52, 3), (*BEGINNING, 50, 51, 3), (*BEGINNING, 52, 60, 3)], [2]),
        ([(*longer, 3), (*longer, 9, 9, 3), (4, 3)], [33]),
        ([(*longer, 9, 9, 3, 9, 3), (*BEGINNING[:5], 3)], [2]),
        ([(*longer, 9, 9, 3, 9, 3), (3,)], []),
    ]
    plan = SteeringPlan.none
    for prompts, fresh in waves:
        engine.join(prompts, plan(len(prompts)))
        assert seen == fresh
        seen.clear()
        for row, prompt in enumerate(prompts, len(engine.slot) - len(prompts)):
            alone, n = LeanJoiningEngine(lean, []), len(prompt) - 1
            alone.join([prompt], plan(1))
            found, expected = (e.cache.block[:, :, e.slot[at], :, :n] for e, at in ((engine, row), (alone, 0)))
            if lean.native is not None:
                assert torch.equal(found, expected), "to the last bit"
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
        seen.clear()
    monkeypatch.setattr(joining_engines, "KEPT", 60)
    engine.join([(*range(40, 80), 3), (*range(3, 40), 5), (*range(2, 80), 5)], plan(3))
    assert sum(map(len, engine.heads.kept)) <= 60 and (*range(2, 80),) not in engine.heads.kept
