"""What a causal language model of the Llama shape is made of: its decoder stack and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from emosteer.base.errors import ModelError
from emosteer.models.sites import ATTN_OUT, MLP_OUT, MLP_POST, RESID_POST, Z


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. `d_head` may differ from `d_model / n_heads`; `n_kv_heads` is below `n_heads` with grouped queries."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    context: int


def decoder_body(hf: Any) -> Any:
    """The decoder stack of a causal LM of the Llama shape.

    Raises:
        ModelError: naming the architecture, if it is built in another way.
    """
    body = getattr(hf, "model", None)
    layers = getattr(body, "layers", None)
    first = layers[0] if layers is not None and len(layers) else None
    needed = ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm")
    try:
        for path in needed:
            attrgetter(path)(first)
    except AttributeError as error:
        raise ModelError(
            f"architecture {type(hf).__name__} is not supported: expected decoder layers with {', '.join(needed)} "
            "(Llama, Qwen2/2.5, Gemma 3 and their like)"
        ) from error
    return body


def shape_of(hf: Any) -> Shape:
    """The sizes of a model whose decoder stack `decoder_body` accepts."""
    config, layers = hf.config, hf.model.layers
    o_proj, down_proj = layers[0].self_attn.o_proj, layers[0].mlp.down_proj
    n_heads = config.num_attention_heads
    return Shape(
        n_layers=len(layers),
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        d_model=o_proj.out_features,
        d_head=o_proj.in_features // n_heads,
        d_mlp=down_proj.in_features,
        d_vocab=config.vocab_size,
        context=context_of(config),
    )


def context_of(config: Any) -> int:
    """Positions that a model was made for; very many where its configuration names no limit."""
    return getattr(config, "max_position_embeddings", 0) or 2**20


def tap(layer: nn.Module, kind: str, post_norms: bool) -> tuple[nn.Module, bool]:
    """The module of a plain decoder layer whose input (True) or output (False) is a site of this kind."""
    block: Any = layer
    if kind == Z:
        return block.self_attn.o_proj, True
    if kind == MLP_POST:
        return block.mlp.down_proj, True
    if kind == ATTN_OUT:
        return block.self_attn.o_proj, False
    if kind == MLP_OUT:
        return block.mlp.down_proj, False
    if kind == RESID_POST:
        return block, False
    return (block.pre_feedforward_layernorm if post_norms else block.post_attention_layernorm), True
