"""Attention as plain matrix products, for gradients in bfloat16 on a CPU.

torch's fused attention takes three times as long there as the products that it fuses, forward and backward together, at the few hundred
tokens that learning packs into one row. Everywhere else the fused one is at least as fast, and stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from emosteer.models.model import Model

#: The name by which Hugging Face's models find it, and that of what it stands in for.
NAME, FUSED = "emosteer_dense", "sdpa"


def dense(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Attention under an additive mask. query: [row, head, pos, d_head]; key, value: [row, group of heads, pos, d_head]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@contextmanager
def dense_attention(model: Model) -> Iterator[None]:
    """Computes so while the block runs, where it is faster. Passes in it must bring an additive mask."""
    found = {id(part.config): part.config for layer in model.layers for part in layer.modules() if hasattr(part, "config")}
    fused = [config for config in found.values() if getattr(config, "_attn_implementation", None) == FUSED]
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not fused:
        yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, dense)
    try:
        for config in fused:
            config._attn_implementation = NAME
        yield
    finally:
        for config in fused:
            config._attn_implementation = FUSED
