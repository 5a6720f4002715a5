"""Guidance: the formula against Hugging Face's, and guided generation against both rows recomputed from scratch, under steering."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.utils import ModelOutput

from emosteer.base.errors import DataError, UsageError
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request, check_lengths, generate
from emosteer.generation.guidance import PLAUSIBLE, guided
from emosteer.generation.steering import SteeringPlan, compile_units, plan_for
from emosteer.generation.streaming import stream
from emosteer.models.interventions import RowEdits, unit_masks
from emosteer.models.model import Model
from emosteer.models.sites import Head
from tests.generation.test_steering import PENALTY, PROMPTS, ROWS, circuit, unit_changes, watch
from tests.helpers import reference
from tests.helpers.precision import forward_bound

EMPTY = (1, 5, 9, 4)
SCALE = 2.5


def test_the_formula_is_hugging_faces_among_plausible_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    here, there = 3 * torch.randn(4, 50, generator=draw), 3 * torch.randn(4, 50, generator=draw)

    class Nothing:
        def __call__(self, *_: object, **__: object) -> object:
            return ModelOutput(logits=there[:, None])

    theirs = UnbatchedClassifierFreeGuidanceLogitsProcessor(SCALE, Nothing(), unconditional_ids=torch.zeros(4, 1, dtype=torch.long))
    expected = theirs(torch.zeros(4, 1, dtype=torch.long), here)
    found = guided(here, there, SCALE)
    plausible = here.softmax(-1) >= PLAUSIBLE * here.softmax(-1).amax(-1, keepdim=True)
    assert plausible.any(-1).all() and not plausible.all() and torch.equal(found.isfinite(), plausible)
    apart = (found - expected).masked_fill(~plausible, math.nan)  # equal up to a constant per row, which changes no probability
    assert torch.allclose(apart.nan_to_num(0), apart.nanmean(-1, keepdim=True).expand_as(apart) * plausible, atol=1e-5)


def test_a_token_is_plausible_from_a_tenth_of_the_likeliest_one_on() -> None:
    """As docs/METHOD.md section 6 says."""
    here = torch.tensor([[0.8, 0.081, 0.079, 0.04]]).log()
    assert guided(here, torch.zeros(1, 4), SCALE).isfinite().tolist() == [[True, True, False, False]]
    assert PLAUSIBLE == 0.1


def scratch_logits(model: Model, ids: tuple[int, ...], prompt: int, changes: reference.Changes) -> Tensor:
    """Logits after a sequence, recomputed; `changes` act from the prompt's last position on."""
    late = {
        place: (lambda x, change=change: torch.cat([x[:, : prompt - 1], change(x[:, prompt - 1 :])], dim=1))
        for place, change in changes.items()
    }
    with reference.changed(model.hf, late), torch.no_grad():
        return model.hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].float()


@pytest.mark.parametrize("stopping", [False, True])
def test_every_step_compares_the_two_rows_under_the_same_steering(family: Model, monkeypatch: pytest.MonkeyPatch, stopping: bool) -> None:
    """Rows of five lengths, emotions and strengths, with and without rows that end early: the logits of every step against both
    sequences recomputed whole with bare hooks."""
    z, mlp = circuit(family)
    changes = [unit_changes(z, mlp, *row) for row in ROWS]
    plan = plan_for(compile_units(family, z, mlp), [e for e, _ in ROWS], [s for _, s in ROWS])
    requests = [Request(str(row), prompt, EMPTY) for row, prompt in enumerate(PROMPTS)]
    decoding = Decoding(10, repetition_penalty=PENALTY, guidance=SCALE)
    monkeypatch.setitem(family.__dict__, "stop_ids", frozenset())
    if stopping:
        free = generate(family, requests, plan, decoding)
        monkeypatch.setitem(family.__dict__, "stop_ids", frozenset({free[1].ids[2], free[3].ids[4]}))
    trace: list[Tensor] = []
    watch(monkeypatch, trace.append)
    replies = generate(family, requests, plan, decoding)
    ends = [len(reply.ids) + (reply.finish_reason == "stop") for reply in replies]
    assert (len(set(ends)) > 1) is stopping and len(trace) == max(ends)
    moved = 0.0
    for step, rows in enumerate(trace):
        alive = [row for row, end in enumerate(ends) if step < end]
        assert len(rows) == len(alive), "rows that ended are not computed"
        for found, row in zip(rows, alive, strict=True):
            said = replies[row].ids[:step]
            here = scratch_logits(family, PROMPTS[row] + said, len(PROMPTS[row]), changes[row])
            there = scratch_logits(family, EMPTY + said, len(EMPTY), changes[row])
            expected = guided(here[None], there[None], SCALE)[0]
            both = found.isfinite() & expected.isfinite()
            assert both.any() and (found[both] - expected[both]).abs().max() <= 2 * SCALE * forward_bound(torch.cat([here, there]))
            moved = max(moved, (expected[both] - here[both]).abs().max().item())
    assert moved > 1e-2, "guidance must matter"


def test_what_the_empty_prompt_says_too_is_left_alone(tiny: Model) -> None:
    """Where both rows are the same prompt nothing is compared: the reply is the unguided one."""
    plain = [Request(str(row), prompt) for row, prompt in enumerate(PROMPTS)]
    same = [replace(request, empty=request.ids) for request in plain]
    other = [replace(request, empty=EMPTY) for request in plain]
    decoding = Decoding(12, repetition_penalty=PENALTY)
    expected = [reply.ids for reply in generate(tiny, plain, None, decoding)]
    assert [reply.ids for reply in generate(tiny, same, None, replace(decoding, guidance=4.0))] == expected
    assert [reply.ids for reply in generate(tiny, other, None, replace(decoding, guidance=4.0))] != expected
    assert [reply.ids for reply in generate(tiny, other, None, decoding)] == expected, "without guidance the empty prompt is not read"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_guided_reply_does_not_depend_on_its_batch_and_streams_whole(tiny: Model, temperature: float) -> None:
    z, mlp = circuit(tiny)
    plan = plan_for(compile_units(tiny, z, mlp), [e for e, _ in ROWS], [s for _, s in ROWS])
    requests = [Request(str(row), prompt, EMPTY[: 2 + row % 3]) for row, prompt in enumerate(PROMPTS)]
    decoding = Decoding(8, temperature, repetition_penalty=PENALTY, seed=3, guidance=SCALE)
    together = generate(tiny, requests, plan, decoding)
    assert together == [generate(tiny, [request], plan.rows([row]), decoding)[0] for row, request in enumerate(requests)]
    texts = [""] * len(requests)
    for piece in stream(tiny, requests, plan, decoding):
        texts[piece.row] += piece.text
    assert texts == [reply.text for reply in together]


def test_only_plausible_tokens_are_written(tiny: Model) -> None:
    """Sampled hot and guided far, every token still has its share of the likeliest one's probability in the prompt's own row."""
    requests = [Request(f"row{row}", PROMPTS[row % 5], EMPTY) for row in range(20)]
    replies = generate(tiny, requests, None, Decoding(4, 5.0, repetition_penalty=1.0, guidance=9.0))
    for request, reply in zip(requests, replies, strict=True):
        for step, token in enumerate(reply.ids):
            shares = scratch_logits(tiny, request.ids + reply.ids[:step], len(request.ids), {}).softmax(-1)
            assert shares[token] >= 0.99 * PLAUSIBLE * shares.max()


def test_what_makes_no_sense_is_refused(tiny: Model) -> None:
    for scale in (0.5, math.inf, math.nan):
        with pytest.raises(UsageError, match="--guidance must be a number of at least 1"):
            Decoding(guidance=scale)
    guides = Decoding(2, guidance=2.0)
    with pytest.raises(ValueError, match="empty prompt"):
        generate(tiny, [Request("a", PROMPTS[0], EMPTY), Request("b", PROMPTS[1])], None, guides)
    edits = RowEdits(unit_masks(tiny, [[Head(0, 0)]]), None)
    with pytest.raises(ValueError, match="edits of units"):
        generate(tiny, [Request("a", PROMPTS[0], EMPTY)], SteeringPlan.none(1), guides, row_edits=edits)
    context = tiny.shape.context
    with pytest.raises(DataError, match=f"has {context} tokens"):
        check_lengths([Request("a", (1, 4), (1,) * context)], guides, context, "tiny")
