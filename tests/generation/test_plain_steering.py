"""Steering the plain Hugging Face model: `hf.generate` inside the block writes what `generate` writes, and nothing is left behind it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from emosteer.base.errors import UsageError
from emosteer.generation.generate import Decoding, Request, generate
from emosteer.generation.plain_steering import refuse_steered, steered
from emosteer.generation.steering import SteeringPlan
from emosteer.models.model import Model
from emosteer.models.sites import Site

#: Each holds the token that pads: Hugging Face's repetition penalty counts padding as written.
PROMPTS = ((1, 7, 9, 12, 30, 41, 2, 4), (1, 8, 2, 4), (1, 50, 33, 21, 17, 60, 44, 13, 2, 4))
STEPS, PENALTY = 10, 1.3


def plan_of(model: Model, rows: int, positions: str = "reply") -> SteeringPlan:
    """Strong vectors of every kind that steering uses, another one for every row."""
    draw = torch.Generator().manual_seed(3)
    sites = (Site(0, "attn_out"), Site(1, "mlp_out"), Site(2, "resid_post"))
    return SteeringPlan({site: 2 * torch.randn(rows, model.shape.d_model, generator=draw) for site in sites}, rows, positions)


def padded(prompts: tuple[tuple[int, ...], ...], left: bool = True) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    fill = [[0] * (width - len(prompt)) for prompt in prompts]
    rows = [
        ([2 for _ in f] + list(p), f + [1] * len(p)) if left else (list(p) + [2 for _ in f], [1] * len(p) + f)
        for p, f in zip(prompts, fill, strict=True)
    ]
    return {"input_ids": torch.tensor([ids for ids, _ in rows]), "attention_mask": torch.tensor([mask for _, mask in rows])}


def write(model: Model, inputs: dict[str, Tensor], **options: Any) -> list[tuple[int, ...]]:
    """What Hugging Face writes, up to the first stop token."""
    usual = dict(max_new_tokens=STEPS, do_sample=False, repetition_penalty=PENALTY, pad_token_id=2, eos_token_id=2)
    rows = model.hf.generate(**inputs, **{**usual, **options})[:, inputs["input_ids"].shape[1] :].tolist()
    return [tuple(row[: row.index(2)] if 2 in row else row) for row in rows]


@pytest.mark.parametrize("positions", ["reply", "all"])
def test_hugging_face_writes_what_generate_writes(family: Model, positions: str) -> None:
    """Alone, and in a left-padded batch whose rows are steered each their own way."""
    plan = plan_of(family, 3, positions)
    decoding = Decoding(STEPS, repetition_penalty=PENALTY)
    requests = [Request(str(row), prompt) for row, prompt in enumerate(PROMPTS)]
    expected = [reply.ids for reply in generate(family, requests, plan, decoding)]
    plain = [reply.ids for reply in generate(family, requests, None, decoding)]
    assert sum(one != two for one, two in zip(expected, plain, strict=True)) >= 2, "steering must matter"
    with steered(family, plan):
        assert write(family, padded(PROMPTS)) == expected
    for row in range(3):
        with steered(family, plan.rows([row])):
            assert write(family, padded((PROMPTS[row],))) == [expected[row]]
    assert write(family, padded(PROMPTS)) == plain, "and is gone after the block"


def test_one_row_steers_a_whole_batch_and_beams_keep_their_rows(tiny: Model) -> None:
    plan = plan_of(tiny, 3)
    with steered(tiny, plan.rows([0])):
        together = write(tiny, padded(PROMPTS))
    requests = [Request(str(row), prompt) for row, prompt in enumerate(PROMPTS)]
    assert together == [reply.ids for reply in generate(tiny, requests, plan.rows([0, 0, 0]), Decoding(STEPS, repetition_penalty=PENALTY))]
    with steered(tiny, plan):
        beams = write(tiny, padded(PROMPTS), num_beams=3)
    for row in range(3):
        with steered(tiny, plan.rows([row])):
            assert write(tiny, padded((PROMPTS[row],)), num_beams=3) == [beams[row]]


@torch.no_grad()
def test_nothing_is_left_after_the_block_nor_after_an_exception(family: Model) -> None:
    ids = torch.tensor([PROMPTS[0]])
    before = family.hf(input_ids=ids).logits
    with pytest.raises(ZeroDivisionError), steered(family, plan_of(family, 1)):
        inside = family.hf(input_ids=ids).logits
        raise ZeroDivisionError
    assert torch.equal(inside[:, :-1], before[:, :-1]) and not torch.equal(inside[:, -1], before[:, -1]), (
        "the last position alone is steered"
    )
    assert torch.equal(family.hf(input_ids=ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in family.hf.modules())
    refuse_steered(family)


def test_a_block_inside_another_is_refused_and_the_outer_one_goes_on(tiny: Model) -> None:
    plan = plan_of(tiny, 1)
    with steered(tiny, plan):
        steered_reply = write(tiny, padded(PROMPTS[:1]))
        with pytest.raises(UsageError, match="cannot hold another one"), steered(tiny, plan):
            pass
        with pytest.raises(UsageError, match="end the block first"):
            refuse_steered(tiny)
        assert write(tiny, padded(PROMPTS[:1])) == steered_reply
    assert write(tiny, padded(PROMPTS[:1])) != steered_reply


@pytest.mark.parametrize(
    ("options", "left", "message"),
    [
        ({"use_cache": False}, True, "needs the KV cache"),
        ({"prefill_chunk_size": 3}, True, "one new token per pass"),
        ({}, False, "padded on the left"),
        ({}, True, "steers 2 rows"),
    ],
)
def test_passes_that_would_be_steered_elsewhere_are_refused(tiny: Model, options: dict[str, Any], left: bool, message: str) -> None:
    rows = 2 if "2 rows" in message else 3
    with steered(tiny, plan_of(tiny, rows)), pytest.raises(UsageError, match=message):
        write(tiny, padded(PROMPTS, left), **options)


def test_at_all_positions_no_cache_is_needed(tiny: Model) -> None:
    plan = plan_of(tiny, 1, "all")
    with steered(tiny, plan):
        cached, bare = write(tiny, padded(PROMPTS[:1])), write(tiny, padded(PROMPTS[:1]), use_cache=False)
    assert cached == bare != write(tiny, padded(PROMPTS[:1]))


def test_a_plan_of_nothing_changes_nothing(tiny: Model) -> None:
    plan = plan_of(tiny, 1)
    still = replace(plan, vectors={site: 0 * value for site, value in plan.vectors.items()})
    before = write(tiny, padded(PROMPTS[:1]))
    for nothing in (still, SteeringPlan.none(1)):
        with steered(tiny, nothing):
            assert write(tiny, padded(PROMPTS[:1])) == before
