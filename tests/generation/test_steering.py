"""Compiled vectors equal the unit-level modulation: in one pass, and in generation under the cache, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from emosteer.generation import generate as generation
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request, generate
from emosteer.generation.steering import Injector, SteeringPlan, compile_units, plan_for, residual_vectors
from emosteer.models.model import Model
from emosteer.models.sites import Site
from tests.helpers import reference
from tests.helpers.precision import assert_forward, forward_bound

IDS = torch.tensor([[1, 7, 9, 12, 30, 41], [1, 8, 20, 15, 33, 5], [1, 60, 22, 17, 9, 14]])
PROMPTS = ((1, 7, 9, 12, 30, 41, 4), (1, 8, 20, 4), (1, 50, 33, 21, 17, 60, 44, 13, 3, 4), (1, 70, 4), (1, 30, 31, 32, 4))
ROWS = ((0, 1.0), (1, -0.5), (2, 2.0), (-1, 3.0), (0, 0.0))  # emotion and strength: two rows must stay as they are
PENALTY = 3.0


def circuit(model: Model, scale: float = 0.5) -> tuple[Tensor, Tensor]:
    """Contrasts of a circuit for three emotions: a third of the units, none in layer 1's heads."""
    shape, draw = model.shape, torch.Generator().manual_seed(0)
    deltas = []
    for width in (shape.n_heads * shape.d_head, shape.d_mlp):
        delta = scale * torch.randn(3, shape.n_layers, width, generator=draw)
        deltas.append(delta * (torch.rand(delta.shape, generator=draw) < 1 / 3))
    deltas[0][:, 1] = 0
    return deltas[0], deltas[1]


def unit_changes(z: Tensor, mlp: Tensor, emotion: int, strength: float) -> reference.Changes:
    """The modulation of one row at unit level, for bare hooks."""
    if emotion < 0:
        return {}
    made = {}
    for kind, delta in (("z", z), ("mlp_post", mlp)):
        for layer in range(delta.shape[1]):
            made[layer, kind] = lambda x, d=strength * delta[emotion, layer]: x + d
    return made


@torch.no_grad()
def test_compiled_vectors_are_what_the_units_write(family: Model) -> None:
    z, mlp = circuit(family)
    vectors = compile_units(family, z, mlp)
    assert Site(1, "attn_out") not in vectors and len(vectors) == 2 * family.shape.n_layers - 1
    for layer, block in enumerate(family.hf.model.layers):
        if layer != 1:
            torch.testing.assert_close(
                vectors[Site(layer, "attn_out")], z[:, layer] @ block.self_attn.o_proj.weight.T, rtol=1e-4, atol=1e-5
            )
        torch.testing.assert_close(vectors[Site(layer, "mlp_out")], mlp[:, layer] @ block.mlp.down_proj.weight.T, rtol=1e-4, atol=1e-5)


def watch(monkeypatch: pytest.MonkeyPatch, see: Callable[[Tensor], Any]) -> None:
    """Shows the logits of every step, whichever forward pass made them, as tokens are chosen from them."""
    usual = generation.choose

    def choose(logits: Tensor, *rest: Any) -> Tensor:
        see(logits.clone())
        return usual(logits, *rest)

    monkeypatch.setattr(generation, "choose", choose)


@torch.no_grad()
@pytest.mark.parametrize("bridge", [False, True])
def test_compiled_logits_equal_those_of_unit_edits(family: Model, bridge: bool) -> None:
    z, mlp = circuit(family)
    vectors = compile_units(family, z, mlp)
    base = family.logits(family.run(IDS))
    for strength in (-1.0, 0.5, 3.0):
        rows = strength * z, strength * mlp  # row r is emotion r
        by_unit = family.logits(family.run(IDS, reference.unit_edits(*rows), bridge=bridge))
        shifts = {site: (lambda x, v=strength * v[:, None]: x + v) for site, v in vectors.items()}
        compiled = family.logits(family.run(IDS, shifts, bridge=bridge))
        scale = by_unit.abs().max()
        assert_forward(compiled, by_unit)
        assert (by_unit - base).abs().max() > 1e-2 * scale
    shared = family.run(IDS, reference.unit_edits(z[1], mlp[1]), bridge=bridge)  # [layer, ...]: the same for every row
    torch.testing.assert_close(shared, family.run(IDS, reference.unit_edits(z[[1] * 3], mlp[[1] * 3]), bridge=bridge))
    for row in range(3):  # bare hooks
        with reference.changed(family.hf, unit_changes(z, mlp, row, -1.0)):
            expected = family.hf(input_ids=IDS[[row]], use_cache=False).logits[0]
        found = family.logits(family.run(IDS, reference.unit_edits(-z, -mlp), bridge=bridge))[row]
        assert_forward(found, expected)


@pytest.mark.parametrize("stopping", [False, True])
def test_steered_generation_in_a_mixed_batch_equals_unit_edits_without_a_cache(
    family: Model, monkeypatch: pytest.MonkeyPatch, stopping: bool
) -> None:
    """Logits of every step and the greedy text, each row against itself alone, recomputed from scratch for every token."""
    steps = 16
    z, mlp = circuit(family)
    changes = [unit_changes(z, mlp, *row) for row in ROWS]
    stops: frozenset[int] = frozenset()
    if stopping:
        free = [reference.greedy(family, prompt, c, steps, stops, PENALTY)[0] for prompt, c in zip(PROMPTS, changes, strict=True)]
        stops = frozenset({free[1][1], free[3][5], free[0][9]})
    monkeypatch.setitem(family.__dict__, "stop_ids", stops)
    expected = [reference.greedy(family, prompt, c, steps, stops, PENALTY) for prompt, c in zip(PROMPTS, changes, strict=True)]
    plain = [reference.greedy(family, prompt, {}, steps, stops, PENALTY) for prompt in PROMPTS]
    assert all((expected[row][1][0] - plain[row][1][0]).abs().max() > 1e-2 for row in range(3)), "steering must matter"
    lengths = {len(trace) for _, trace in expected}
    assert (len(lengths) > 2) is stopping, "rows end at different times"

    trace: list[Tensor] = []
    watch(monkeypatch, trace.append)
    plan = plan_for(compile_units(family, z, mlp), [e for e, _ in ROWS], [s for _, s in ROWS])
    requests = [Request(str(row), prompt) for row, prompt in enumerate(PROMPTS)]
    replies = generate(family, requests, plan, Decoding(max_new_tokens=steps, repetition_penalty=PENALTY))
    assert [reply.ids for reply in replies] == [ids for ids, _ in expected]
    assert [reply.finish_reason for reply in replies] == ["length" if len(ids) == steps else "stop" for ids, _ in expected]
    for step, logits in enumerate(trace):
        alive = [row for row, (_, own) in enumerate(expected) if len(own) > step]
        assert len(logits) == len(alive), "rows that ended are not computed"
        for found, row in zip(logits, alive, strict=True):
            own = expected[row][1][step]
            assert_forward(found, own, f"step {step}, row {row}")
    assert len(trace) == max(lengths)


@torch.no_grad()
def test_strength_zero_changes_no_bit(family: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither alone nor beside rows that are steered."""
    vectors = compile_units(family, *circuit(family))
    requests = [Request(str(row), prompt) for row, prompt in enumerate(PROMPTS[:3])]
    decoding = Decoding(max_new_tokens=6)
    traces: list[list[Tensor]] = []
    watch(monkeypatch, lambda logits: traces[-1].append(logits))
    monkeypatch.setitem(family.__dict__, "stop_ids", frozenset())
    plans = [
        None,
        plan_for(vectors, [0, 1, 2], [0.0] * 3),
        plan_for(vectors, [-1] * 3, [1.0] * 3),
        plan_for(vectors, [0, 1, 2], [0.0, 2.0, 0.0]),
    ]
    for plan in plans:
        traces.append([])
        generate(family, requests, plan, decoding)
    for other in traces[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(traces[0], other, strict=True))
    for a, b in zip(traces[0], traces[3], strict=True):
        assert (a - b)[[0, 2]].abs().max() <= forward_bound(a)
    assert (traces[0][0] - traces[3][0])[1].abs().max() > 100 * forward_bound(traces[0][0])


def test_a_plan_without_effect_hooks_nothing(tiny: Model) -> None:
    vectors = compile_units(tiny, *circuit(tiny))
    device, dtype = tiny.device, tiny.dtype
    assert Injector(plan_for(vectors, [0, 1], [0.0, 0.0]), device, dtype).edits() == {}
    assert Injector(SteeringPlan.none(2), device, dtype).edits() == {}
    assert set(Injector(plan_for(vectors, [0, 1], [0.0, 1.0]), device, dtype).edits()) == set(vectors)


def test_scaled_gives_every_row_its_own_emotion_and_strength() -> None:
    site = Site(0, "attn_out")
    plan = plan_for({site: torch.tensor([[1.0, 2.0], [10.0, 20.0]])}, [1, -1, 0, 1], [0.5, 7.0, 2.0, -1.0])
    assert plan.n_rows == 4
    assert plan.vectors[site].tolist() == [[5.0, 10.0], [0.0, 0.0], [2.0, 4.0], [-10.0, -20.0]]
    some = plan.rows([3, 0, 3])
    assert some.n_rows == 3
    assert some.vectors[site].tolist() == [[-10.0, -20.0], [5.0, 10.0], [-10.0, -20.0]]
    with pytest.raises(ValueError):
        plan_for({site: torch.ones(2, 2)}, [0, 1], [1.0])


def test_residual_vectors_have_the_length_of_the_layers_rms() -> None:
    vectors = torch.eye(4)[:3].reshape(1, 3, 4)
    found = residual_vectors(vectors, torch.tensor([2.0, 3.0, 5.0]), (0, 2))
    assert {str(site): value.tolist() for site, value in found.items()} == {
        "L0.resid_post": [[2.0, 0, 0, 0]],
        "L2.resid_post": [[0, 0, 5.0, 0]],
    }


@torch.no_grad()
def test_the_injector_shifts_the_last_prompt_position_only_and_kept_rows_keep_their_vectors(tiny: Model) -> None:
    site = Site(1, "mlp_out")
    vectors = torch.arange(3.0)[:, None] + torch.ones(3, tiny.shape.d_model)
    injector = Injector(SteeringPlan({site: vectors}, 3), tiny.device, tiny.dtype)
    before = tiny.read(IDS, [site], bridge=False)[site]
    after = tiny.read(IDS, [site], edits=injector.edits(), bridge=False)[site]
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert torch.equal(after[:, -1], before[:, -1] + vectors)
    edits = injector.edits()
    for kept in ([0, 2], [2]):
        injector.keep(torch.tensor(kept))
        single = torch.zeros(len(kept), 1, tiny.shape.d_model)  # under the cache every pass has length 1
        assert torch.equal(edits[site](single)[:, 0], vectors[kept])


STRONG = [3.0, 5.0, 0.0]


@torch.no_grad()
def test_a_plan_for_all_positions_acts_like_biases_in_the_weights(family: Model) -> None:
    """Against a loop without cache that shifts every position of prompts of different lengths."""
    vectors = compile_units(family, *circuit(family))
    plan = replace(plan_for(vectors, [0, 1, 2], STRONG), positions="all")
    requests = [Request(str(row), prompt) for row, prompt in enumerate(PROMPTS[:3])]
    found = generate(family, requests, plan, Decoding(max_new_tokens=5, repetition_penalty=1.0))
    assert plan.rows([1]).positions == plan.to(family.device, family.dtype).positions == "all"
    differs = False
    for row, prompt in enumerate(PROMPTS[:3]):
        added = {site: value[row] for site, value in plan.vectors.items()}
        edits = {site: lambda x, value=value: x + value.to(x) for site, value in added.items()}
        ids = list(prompt)
        for _ in range(5):
            token = int(family.logits(family.run(torch.tensor([ids]), edits, bridge=False)[0, -1]).argmax())
            if token in family.stop_ids:
                break
            ids.append(token)
        assert found[row].ids == tuple(ids[len(prompt) :])
        usual = generate(family, requests[row : row + 1], plan_for(vectors, [row], [STRONG[row]]), Decoding(5, repetition_penalty=1.0))
        differs |= usual[0].ids != found[row].ids
    assert differs, "the prompt's positions matter"
