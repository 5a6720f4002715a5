"""How decoders are laid out: one frozen description per family, and the only place that spells the names of a model's parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from emosteer.base.errors import ModelError
from emosteer.models.sites import ATTN_OUT, MLP_OUT, MLP_POST, RESID_POST, Z


@dataclass(frozen=True)
class Family:
    """The layout of one family of decoders: where its parts are, as attribute paths, and how its arithmetic differs from Llama's.

    What is not given is as in Llama. Biases need no entry: whoever computes with a linear map asks the map for its bias.
    """

    name: str
    #: Full names of the causal LMs that are laid out so; none: any class that has the paths.
    classes: tuple[str, ...] = ()

    # ---- paths from the causal LM, and from the decoder body -------------------------------------------------------
    body: str = "model"
    unembedding: str = "lm_head"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    rotary: str = "rotary_emb"
    final_norm: str = "norm"

    # ---- paths from a layer ----------------------------------------------------------------------------------------
    attention: str = "self_attn"
    mlp: str = "mlp"
    w_o: str = "self_attn.o_proj"
    w_down: str = "mlp.down_proj"
    #: Queries, keys and values; one path where one matrix holds them all.
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    #: What opens the gate and what passes through it; one path where one matrix holds both.
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    #: Norms of the residual stream before a sublayer reads it; None: it reads the stream as it is.
    attn_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    #: Norms of what a sublayer writes, before it is added.
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    #: Norms of queries and keys.
    qk_norms: tuple[str, ...] = ()
    #: Numbers that an attention module keeps: the factor of its scores, and its window if it has one.
    attn_scale: str = "scaling"
    attn_window: str = "sliding_window"

    # ---- arithmetic ------------------------------------------------------------------------------------------------
    #: A norm's gain is its weight plus this.
    norm_offset: float = 0.0
    norm_epsilon: str = "variance_epsilon"
    embedding_is_scaled: bool = False
    #: Fields of the configuration, which a model may leave empty.
    sliding_window: str = "sliding_window"
    logit_softcap: str = "final_logit_softcapping"
    attn_softcap: str = "attn_logit_softcapping"
    #: Whether the above is all that differs from Llama. Never of a row that takes classes whose code nobody has read.
    is_complete: bool = False

    @property
    def post_norms(self) -> bool:
        """Whether it norms what a sublayer writes before adding it."""
        return self.attn_post_norm is not None or self.mlp_post_norm is not None

    @property
    def pre_norms(self) -> tuple[str, ...]:
        """The norms before attention and before the MLP, as far as it has them."""
        return tuple(path for path in (self.attn_norm, self.mlp_norm) if path is not None)

    @property
    def mlp_reader(self) -> str:
        """The first module to read the residual stream after attention."""
        return self.mlp_norm or self.mlp


LLAMA = Family("llama", ("transformers.models.llama.modeling_llama.LlamaForCausalLM",), is_complete=True)
_GEMMA = Family(
    "gemma",
    ("transformers.models.gemma.modeling_gemma.GemmaForCausalLM",),
    norm_offset=1.0,
    norm_epsilon="eps",
    embedding_is_scaled=True,
)
_GEMMA2 = replace(
    _GEMMA,
    name="gemma2",
    classes=("transformers.models.gemma2.modeling_gemma2.Gemma2ForCausalLM",),
    mlp_norm="pre_feedforward_layernorm",
    attn_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

#: Every family that works. A class takes the row that names it, else the first row without classes whose paths it has.
FAMILIES: tuple[Family, ...] = (
    LLAMA,
    replace(LLAMA, name="qwen2", classes=("transformers.models.qwen2.modeling_qwen2.Qwen2ForCausalLM",)),
    Family("qwen3", ("transformers.models.qwen3.modeling_qwen3.Qwen3ForCausalLM",), qk_norms=_QK_NORMS),
    Family(
        "phi3",
        ("transformers.models.phi3.modeling_phi3.Phi3ForCausalLM",),
        qkv=("self_attn.qkv_proj",),
        gate_up=("mlp.gate_up_proj",),
    ),
    _GEMMA,
    _GEMMA2,
    replace(_GEMMA2, name="gemma3", classes=("transformers.models.gemma3.modeling_gemma3.Gemma3ForCausalLM",), qk_norms=_QK_NORMS),
    Family(
        "olmo2",
        ("transformers.models.olmo2.modeling_olmo2.Olmo2ForCausalLM", "transformers.models.olmo3.modeling_olmo3.Olmo3ForCausalLM"),
        attn_norm=None,
        mlp_norm=None,
        attn_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        qk_norms=_QK_NORMS,
    ),
    replace(_GEMMA2, name="like gemma", classes=()),
    Family("like llama"),
)


def family_of(hf: Any) -> Family:
    """The description of a causal LM.

    Raises:
        ModelError: naming the architecture, if it is built in another way.
    """
    name = f"{type(hf).__module__}.{type(hf).__qualname__}"
    for family in FAMILIES:
        if name in family.classes:
            return family
    for family in FAMILIES:
        if not family.classes and _lacking(hf, family) is None:
            return family
    needed = _needed(LLAMA)
    raise ModelError(
        f"architecture {type(hf).__name__} is not supported: expected decoder layers with {', '.join(needed)} "
        "(Llama, Qwen2/2.5, Gemma 3 and their like)"
    ) from _lacking(hf, LLAMA)


def _needed(family: Family) -> list[str]:
    """The paths of a layer without which no site can be found."""
    paths = (family.w_o, family.w_down, family.mlp_reader, family.attn_post_norm, family.mlp_post_norm)
    return [path for path in paths if path is not None]


def _lacking(hf: Any, family: Family) -> AttributeError | IndexError | TypeError | None:
    """What keeps a model's first layer from being laid out so; None if nothing does."""
    try:
        first = part(part(hf, family.body), family.layers)[0]
        for path in _needed(family):
            part(first, path)
    except (AttributeError, IndexError, TypeError) as error:
        return error
    return None


def part(module: Any, path: str) -> Any:
    """What a module holds at an attribute path.

    Raises:
        AttributeError: if there is nothing.
    """
    return attrgetter(path)(module)


def parts(module: Any, paths: tuple[str, ...]) -> list[Any]:
    """What a module holds at several attribute paths."""
    return [part(module, path) for path in paths]


def norm_gain(family: Family, norm: Any) -> Tensor:
    """What a norm multiplies by, in float32. Shape [d_model].

    A family that names its classes says whether a gain is the weight or one more. Of others it is asked of the norm itself: both kinds,
    with and without centring, leave a vector of ones of either sign as it is but for the gain (and a bias, which cancels).
    """
    weight: Tensor = norm.weight.float()
    if family.classes:
        return weight + family.norm_offset if family.norm_offset else weight
    signs = torch.ones_like(norm.weight)
    signs[1::2] = -1
    with torch.no_grad():
        asked: Tensor = ((norm(signs) - norm(-signs)).float() / 2 * signs.float()).detach()
    exact = [weight + offset for offset in (0.0, 1.0)]  # what was asked has the precision of the norm, and its epsilon
    near = [torch.allclose(asked, gain, rtol=2e-2, atol=2e-2) for gain in exact]
    return exact[near.index(True)] if any(near) else asked


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


def shape_of(config: Any, layers: Any, family: Family) -> Shape:
    """The sizes of a model, from its configuration and its decoder layers."""
    w_o, w_down = part(layers[0], family.w_o), part(layers[0], family.w_down)
    n_heads = config.num_attention_heads
    return Shape(
        n_layers=len(layers),
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        d_model=w_o.out_features,
        d_head=w_o.in_features // n_heads,
        d_mlp=w_down.in_features,
        d_vocab=config.vocab_size,
        context=context_of(config),
    )


def context_of(config: Any) -> int:
    """Positions that a model was made for; very many where its configuration names no limit."""
    return getattr(config, "max_position_embeddings", 0) or 2**20


def tap(layer: nn.Module, kind: str, family: Family) -> tuple[nn.Module, bool]:
    """The module of a plain decoder layer whose input (True) or output (False) is a site of this kind."""
    if kind == RESID_POST:
        return layer, False
    path, is_input = {
        Z: (family.w_o, True),
        MLP_POST: (family.w_down, True),
        ATTN_OUT: (family.w_o, False),
        MLP_OUT: (family.w_down, False),
    }.get(kind, (family.mlp_reader, True))
    return part(layer, path), is_input
