"""How decoders are laid out: one frozen description per family, and the only place that spells the names of a model's parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from emosteer.base.errors import ModelError
from emosteer.models.sites import ATTN_OUT, MLP_OUT, MLP_POST, RESID_MID, RESID_POST, Z


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
    #: What gives the angles of rotary positions; None: positions are learned, or not told.
    rotary: str | None = "rotary_emb"
    final_norm: str = "norm"

    # ---- paths from a layer ----------------------------------------------------------------------------------------
    attention: str = "self_attn"
    mlp: str = "mlp"
    w_o: str = "self_attn.o_proj"
    #: None: an MLP of experts, no matrix of which says what a neuron writes wherever it is read. Such a model has no neurons here.
    w_down: str | None = "mlp.down_proj"
    #: Queries, keys and values; one path where one matrix holds them all.
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    #: What opens the gate and what passes through it; one path where one matrix holds both.
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    #: Norms of the residual stream before a sublayer reads it; None: it reads the stream as it is.
    attn_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    #: Whether attention and MLP of a layer read the same stream, so that no part of the model reads what is between them; or the field of
    #: the configuration that says so, where models of the family differ.
    parallel: bool | str = False
    #: Norms of what a sublayer writes, before it is added.
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    #: Norms of queries and keys.
    qk_norms: tuple[str, ...] = ()
    #: Numbers that an attention module keeps: the factor of its scores, and its window if it has one.
    attn_scale: str = "scaling"
    attn_window: str = "sliding_window"

    # ---- arithmetic ------------------------------------------------------------------------------------------------
    #: Whether linear maps of a layer keep their weights [in, out].
    transposed: bool = False
    #: A norm's gain is its weight plus this.
    norm_offset: float = 0.0
    norm_epsilon: str = "variance_epsilon"
    embedding_is_scaled: bool = False
    #: Fields of the configuration, which a model may leave empty.
    sliding_window: str = "sliding_window"
    logit_softcap: str = "final_logit_softcapping"
    attn_softcap: str = "attn_logit_softcapping"
    #: What everything that a sublayer adds to the stream is multiplied by; and the logits, or divided by.
    residual_factor: str | None = None
    logit_factor: str | None = None
    logit_divisor: str | None = None
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
        """The first module to read the residual stream after attention; in parallel blocks, before it."""
        return self.mlp_norm or self.mlp

    @property
    def down(self) -> tuple[str, ...]:
        """`w_down`, as far as it has it."""
        return () if self.w_down is None else (self.w_down,)

    @property
    def has_neurons(self) -> bool:
        """Whether its MLPs have neurons that can be read and changed."""
        return self.w_down is not None


_MODELS = "transformers.models"
LLAMA = Family("llama", (f"{_MODELS}.llama.modeling_llama.LlamaForCausalLM",), is_complete=True)
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_FUSED = ("mlp.gate_up_proj",)
_GEMMA = Family(
    "gemma", (f"{_MODELS}.gemma.modeling_gemma.GemmaForCausalLM",), norm_offset=1.0, norm_epsilon="eps", embedding_is_scaled=True
)
_GEMMA2 = replace(
    _GEMMA,
    name="gemma2",
    classes=(f"{_MODELS}.gemma2.modeling_gemma2.Gemma2ForCausalLM",),
    mlp_norm="pre_feedforward_layernorm",
    attn_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
_GEMMA3 = replace(_GEMMA2, name="gemma3", classes=(f"{_MODELS}.gemma3.modeling_gemma3.Gemma3ForCausalLM",), qk_norms=_QK_NORMS)
_OLMO2 = Family(
    "olmo2",
    (f"{_MODELS}.olmo2.modeling_olmo2.Olmo2ForCausalLM", f"{_MODELS}.olmo3.modeling_olmo3.Olmo3ForCausalLM"),
    attn_norm=None,
    mlp_norm=None,
    attn_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    qk_norms=_QK_NORMS,
)

#: Every family that works. A class takes the row that names it, else the first row without classes whose paths it has.
FAMILIES: tuple[Family, ...] = (
    LLAMA,
    replace(LLAMA, name="qwen2", classes=(f"{_MODELS}.qwen2.modeling_qwen2.Qwen2ForCausalLM",)),
    replace(LLAMA, name="mistral", classes=(f"{_MODELS}.mistral.modeling_mistral.MistralForCausalLM",)),
    Family("qwen3", (f"{_MODELS}.qwen3.modeling_qwen3.Qwen3ForCausalLM",), qk_norms=_QK_NORMS),
    Family("smollm3", (f"{_MODELS}.smollm3.modeling_smollm3.SmolLM3ForCausalLM",)),
    Family("helium", (f"{_MODELS}.helium.modeling_helium.HeliumForCausalLM",)),
    Family("ernie4.5", (f"{_MODELS}.ernie4_5.modeling_ernie4_5.Ernie4_5ForCausalLM",)),
    Family(
        "granite",
        (f"{_MODELS}.granite.modeling_granite.GraniteForCausalLM",),
        embedding_is_scaled=True,
        residual_factor="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    Family("phi3", (f"{_MODELS}.phi3.modeling_phi3.Phi3ForCausalLM",), qkv=("self_attn.qkv_proj",), gate_up=_FUSED),
    Family("glm", (f"{_MODELS}.glm.modeling_glm.GlmForCausalLM",), gate_up=_FUSED),
    Family(
        "glm4",
        (f"{_MODELS}.glm4.modeling_glm4.Glm4ForCausalLM",),
        gate_up=_FUSED,
        attn_post_norm="post_self_attn_layernorm",
        mlp_post_norm="post_mlp_layernorm",
    ),
    _GEMMA,
    _GEMMA2,
    _GEMMA3,
    replace(
        _GEMMA3,
        name="gemma3, multimodal",
        classes=(f"{_MODELS}.gemma3.modeling_gemma3.Gemma3ForConditionalGeneration",),
        body="model.language_model",
    ),
    _OLMO2,
    replace(_OLMO2, name="exaone4", classes=(f"{_MODELS}.exaone4.modeling_exaone4.Exaone4ForCausalLM",)),
    Family(
        "nemotron",
        (f"{_MODELS}.nemotron.modeling_nemotron.NemotronForCausalLM",),
        gate_up=("mlp.up_proj",),
        norm_offset=1.0,
        norm_epsilon="eps",
    ),
    Family(
        "stablelm",
        (f"{_MODELS}.stablelm.modeling_stablelm.StableLmForCausalLM",),
        parallel="use_parallel_residual",
        norm_epsilon="eps",
    ),
    Family(
        "cohere",
        (f"{_MODELS}.cohere.modeling_cohere.CohereForCausalLM", f"{_MODELS}.cohere2.modeling_cohere2.Cohere2ForCausalLM"),
        parallel=True,
        mlp_norm=None,
        logit_factor="logit_scale",
    ),
    Family(
        "gpt-neox",
        (f"{_MODELS}.gpt_neox.modeling_gpt_neox.GPTNeoXForCausalLM",),
        body="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
        attention="attention",
        w_o="attention.dense",
        w_down="mlp.dense_4h_to_h",
        qkv=("attention.query_key_value",),
        gate_up=("mlp.dense_h_to_4h",),
        parallel="use_parallel_residual",
        norm_epsilon="eps",
    ),
    Family(
        "gpt2",
        (f"{_MODELS}.gpt2.modeling_gpt2.GPT2LMHeadModel",),
        body="transformer",
        layers="h",
        embedding="wte",
        rotary=None,
        final_norm="ln_f",
        attention="attn",
        w_o="attn.c_proj",
        w_down="mlp.c_proj",
        qkv=("attn.c_attn",),
        gate_up=("mlp.c_fc",),
        attn_norm="ln_1",
        mlp_norm="ln_2",
        transposed=True,
        norm_epsilon="eps",
    ),
    Family(
        "starcoder2",
        (f"{_MODELS}.starcoder2.modeling_starcoder2.Starcoder2ForCausalLM",),
        w_down="mlp.c_proj",
        gate_up=("mlp.c_fc",),
        norm_epsilon="eps",
    ),
    Family("mixtral", (f"{_MODELS}.mixtral.modeling_mixtral.MixtralForCausalLM",), w_down=None, gate_up=()),
    Family("qwen3-moe", (f"{_MODELS}.qwen3_moe.modeling_qwen3_moe.Qwen3MoeForCausalLM",), w_down=None, gate_up=(), qk_norms=_QK_NORMS),
    replace(_GEMMA2, name="like gemma", classes=()),
    Family("like llama"),
    Family("like mixtral", w_down=None, gate_up=()),
)


def family_of(hf: Any) -> Family:
    """The description of a causal LM, with what its configuration decides filled in.

    Raises:
        ModelError: naming the architecture, if it is built in another way.
    """
    name = f"{type(hf).__module__}.{type(hf).__qualname__}"
    for family in FAMILIES:
        if name in family.classes:
            return _decided(family, hf)
    for family in FAMILIES:
        if not family.classes and _lacking(hf, family) is None:
            return family
    raise ModelError(
        f"architecture {type(hf).__name__} is not supported: expected a family of docs/FAMILIES.md, or decoder layers with "
        f"{LLAMA.w_o}, {LLAMA.w_down} and {LLAMA.mlp_norm}"
    ) from _lacking(hf, LLAMA)


def _decided(family: Family, hf: Any) -> Family:
    """The row of one model, where models of the family differ: parallel blocks, and whether those have a norm for each sublayer."""
    if not isinstance(family.parallel, str):
        return family
    first = part(part(hf, family.body), family.layers)[0]
    norm = family.mlp_norm if family.mlp_norm and part(first, family.mlp_norm) is not None else None
    return replace(family, parallel=bool(getattr(text_config(hf), family.parallel)), mlp_norm=norm)


def text_config(hf: Any) -> Any:
    """The configuration of a causal LM's decoder; of a model that reads pictures too, the part for text."""
    nested = getattr(hf.config, "get_text_config", None)
    return nested(decoder=True) if nested else hf.config


def factor_of(config: Any, times: str | None, per: str | None = None) -> float:
    """What a value is multiplied by, by the fields of the configuration that say so; 1 where a family has none."""
    factor = float(getattr(config, times)) if times else 1.0
    return factor / float(getattr(config, per)) if per else factor


def _needed(family: Family) -> tuple[str, ...]:
    """The paths of a layer without which no site can be found."""
    paths = (family.w_o, family.w_down, family.mlp, family.mlp_reader, family.attn_post_norm, family.mlp_post_norm)
    return tuple(path for path in paths if path is not None)


def _lacking(hf: Any, family: Family) -> AttributeError | TypeError | None:
    """What keeps a model's layers from being laid out so; None if nothing does."""
    try:
        for layer in part(part(hf, family.body), family.layers):
            parts(layer, _needed(family))
    except (AttributeError, TypeError) as error:
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
    """What a norm multiplies by, in float32. Shape [d_model], or [] where it multiplies by nothing.

    A family that names its classes says whether a gain is the weight or one more. Of others it is asked of the norm itself: both kinds,
    with and without centring, leave a vector of ones of either sign as it is but for the gain (and a bias, which cancels).
    """
    if getattr(norm, "weight", None) is None:
        return torch.ones(())
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


def before_norm(family: Family, norm: Any, vectors: Tensor) -> Tensor:
    """What of a norm's input a direction behind it reads, but for the norm's scale, one positive factor per position. Shape [..., d_model].

    A norm that centres reads nothing along a vector of equal numbers; of such a vector it leaves nothing but its bias.
    """
    read = vectors * norm_gain(family, norm).to(vectors)
    weight = getattr(norm, "weight", None)
    ones = torch.ones_like(vectors.reshape(-1, vectors.shape[-1])[0] if weight is None else weight)
    with torch.no_grad():
        left = (norm(ones) - norm(-ones)).abs().max()
    return read - read.mean(-1, keepdim=True) if float(left) < 1e-3 * float(read.abs().max() / vectors.abs().max()) else read


def output_matrix(linear: Any, family: Family) -> Tensor:
    """The weights of a linear map that writes into the stream. Shape [d_model, width]."""
    weight: Tensor = linear.weight
    return weight.T if family.transposed else weight


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. `d_head` may differ from `d_model / n_heads`; `n_kv_heads` is below `n_heads` with grouped queries; `d_mlp` is 0
    where there are no neurons."""

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
    d_model, width = _sizes(part(layers[0], family.w_o), family)
    n_heads = config.num_attention_heads
    return Shape(
        n_layers=len(layers),
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        d_model=d_model,
        d_head=width // n_heads,
        d_mlp=_sizes(part(layers[0], family.w_down), family)[1] if family.w_down else 0,
        d_vocab=config.vocab_size,
        context=context_of(config),
    )


def _sizes(linear: Any, family: Family) -> tuple[int, int]:
    """What a linear map writes and reads; the module says so where quantisation packs its weight."""
    return (linear.nf, linear.nx) if hasattr(linear, "nf") else (linear.out_features, linear.in_features)


def context_of(config: Any) -> int:
    """Positions that a model was made for; very many where its configuration names no limit."""
    return getattr(config, "max_position_embeddings", 0) or 2**20


def tap(layer: nn.Module, kind: str, family: Family) -> tuple[nn.Module, bool]:
    """The module of a plain decoder layer whose input (True) or output (False) is a site of this kind.

    Two are not there as they are: without neurons, `mlp_post` is no part of the MLP's input (`hooks`); in parallel blocks, `resid_mid` is
    what the attention puts out and what the layer reads, added up.
    """
    if kind == RESID_POST:
        return layer, False
    if kind == RESID_MID and family.parallel:
        return part(layer, family.attention), False
    path, is_input = {
        Z: (family.w_o, True),
        MLP_POST: (family.w_down or family.mlp, True),
        ATTN_OUT: (family.w_o, False),
        MLP_OUT: (family.w_down or family.mlp, False),
    }.get(kind, (family.mlp_reader, True))
    return part(layer, path), is_input
