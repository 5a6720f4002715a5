"""Attention as plain products equals the fused one, and is in place only while its block runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from emosteer.circuits import learning
from emosteer.models.dense_attention import dense, dense_attention
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, Site
from tests.circuits.test_gains import BANK, EMOTIONS, GROUPS, INSTRUCTION


def test_it_is_the_fused_attention_with_its_gradients() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, heads, 7, 8, generator=draw, requires_grad=True) for heads in (6, 3, 3)]
    mask = torch.zeros(2, 1, 7, 7).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    weight = torch.randn(2, 7, 6, 8, generator=draw)
    found = dense(None, *parts, mask, 0.4)[0]
    wanted = scaled_dot_product_attention(*parts, attn_mask=mask, scale=0.4, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad((found * weight).sum(), parts), torch.autograd.grad((wanted * weight).sum(), parts), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_model_in_bfloat16_costs_the_same_with_it_and_has_its_own_back_afterwards(family: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(copy.deepcopy(family.hf).to(torch.bfloat16), family.tokenizer, family.name, family.sha256)
    calls: list[int] = []
    monkeypatch.setattr("emosteer.models.dense_attention.dense", lambda *args, **more: (calls.append(1), dense(*args, **more))[1])
    group = GROUPS[0]
    replies = [BANK[group.key][emotion] for emotion in EMOTIONS]
    added = {Site(1, ATTN_OUT): 0.3 * torch.randn(3, model.shape.d_model, generator=torch.Generator().manual_seed(1))}
    usual = learning.reply_costs(model, group, replies, (1,), added, INSTRUCTION)
    with pytest.raises(RuntimeError), dense_attention(model):
        torch.testing.assert_close(learning.reply_costs(model, group, replies, (1,), added, INSTRUCTION), usual, atol=0.05, rtol=0.02)
        raise RuntimeError
    assert len(calls) == model.shape.n_layers
    assert torch.equal(learning.reply_costs(model, group, replies, (1,), added, INSTRUCTION), usual) and len(calls) == model.shape.n_layers
    with dense_attention(family):  # in float32 the fused one stays
        learning.reply_costs(family, group, replies, (1,), added, INSTRUCTION)
    assert len(calls) == model.shape.n_layers
