"""A random model of every family that works, and of models that differ inside one: two layers, weights that tell parts apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from emosteer.models.model import Model
from tests.conftest import SIZES, tiny_tokenizer

#: Fields of a configuration.
SMALL: dict[str, Any] = {**SIZES, "num_hidden_layers": 2}
#: As many neurons as coordinates: no width tells which way round a matrix is.
_GPT2 = dict(vocab_size=SIZES["vocab_size"], n_embd=32, n_inner=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3)
_PICTURES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
_GEMMA: dict[str, Any] = dict(head_dim=16, query_pre_attn_scalar=16)
_EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2, moe_intermediate_size=16)


def _of(name: str, model: str | None = None, **fields: Any) -> Callable[[], Any]:
    """What makes a random causal LM of one of transformers' families."""

    def make() -> Any:
        config = getattr(transformers, f"{name}Config")(**{**SMALL, **fields})
        return getattr(transformers, model or f"{name}ForCausalLM")(config)

    return make


def _gemma3_with_pictures() -> Any:
    text = {**SMALL, **_GEMMA, "sliding_window": 64}
    config = transformers.Gemma3Config(text_config=text, vision_config=_PICTURES, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=2))


@dataclass(frozen=True)
class Case:
    """A model: the row of the architecture table that takes it, what people know it as, and what makes a random one."""

    row: str
    known_as: str
    make: Callable[[], Any]


#: By name.
MODELS: dict[str, Case] = {
    "llama": Case("llama", "Llama 1 to 3.3, SmolLM 1 and 2, and what is built like them", _of("Llama")),
    "qwen2": Case("qwen2", "Qwen 2 and 2.5", _of("Qwen2")),
    "mistral": Case("mistral", "Mistral 7B", _of("Mistral", head_dim=8, sliding_window=None)),
    "qwen3": Case("qwen3", "Qwen 3, dense", _of("Qwen3", head_dim=8)),
    "smollm3": Case("smollm3", "SmolLM 3", _of("SmolLM3", no_rope_layers=[1, 0])),
    "helium": Case("helium", "Helium 1", _of("Helium", head_dim=8)),
    "ernie4.5": Case("ernie4.5", "Ernie 4.5, dense", _of("Ernie4_5", head_dim=8)),
    "granite": Case(
        "granite",
        "Granite 3.x, dense",
        _of("Granite", residual_multiplier=0.4, embedding_multiplier=3.0, attention_multiplier=0.2, logits_scaling=2.0),
    ),
    "phi3": Case("phi3", "Phi 3, 3.5, 4 and 4 mini", _of("Phi3")),
    "glm": Case("glm", "GLM 4 9B (2024), GLM-Edge", _of("Glm", head_dim=8)),
    "glm4": Case("glm4", "GLM 4 (0414)", _of("Glm4", head_dim=8)),
    "gemma": Case("gemma", "Gemma 1", _of("Gemma", head_dim=16)),
    "gemma2": Case("gemma2", "Gemma 2", _of("Gemma2", **_GEMMA)),
    "gemma3": Case("gemma3", "Gemma 3, 270M and 1B", _of("Gemma3Text", "Gemma3ForCausalLM", **_GEMMA, sliding_window=64)),
    "gemma3, multimodal": Case("gemma3, multimodal", "Gemma 3, 4B and larger: the text part", _gemma3_with_pictures),
    "olmo2": Case("olmo2", "OLMo 2", _of("Olmo2")),
    "olmo3": Case("olmo2", "OLMo 3", _of("Olmo3")),
    "exaone4": Case("exaone4", "EXAONE 4", _of("Exaone4", sliding_window=64, sliding_window_pattern=2)),
    "nemotron": Case("nemotron", "Nemotron 3 and 4, Minitron", _of("Nemotron")),
    "starcoder2": Case("starcoder2", "StarCoder 2", _of("Starcoder2", sliding_window=None)),
    "stablelm": Case("stablelm", "StableLM 2 1.6B", _of("StableLm")),
    "stablelm, parallel": Case("stablelm", "StableLM with parallel blocks", _of("StableLm", use_parallel_residual=True, use_qkv_bias=True)),
    "cohere": Case("cohere", "Command R, Aya 23", _of("Cohere", logit_scale=0.5)),
    "cohere2": Case("cohere", "Command R7B, Command A", _of("Cohere2", logit_scale=0.5, sliding_window=64)),
    "gpt-neox": Case("gpt-neox", "Pythia, GPT-NeoX", _of("GPTNeoX", num_key_value_heads=4)),
    "gpt-neox, in turn": Case(
        "gpt-neox", "GPT-NeoX without parallel blocks", _of("GPTNeoX", num_key_value_heads=4, use_parallel_residual=False)
    ),
    "gpt2": Case("gpt2", "GPT-2", _gpt2),
    "mixtral": Case("mixtral", "Mixtral", _of("Mixtral", num_local_experts=4)),
    "qwen3-moe": Case("qwen3-moe", "Qwen 3, experts", _of("Qwen3Moe", num_experts=4, head_dim=8, mlp_only_layers=[0], **_EXPERTS)),
    "seed-oss": Case("like llama", "Seed-OSS: no row names its class", _of("SeedOss", head_dim=8)),
    "qwen2-moe": Case(
        "like mixtral",
        "Qwen 2, experts: no row names its class",
        _of("Qwen2Moe", num_experts=4, shared_expert_intermediate_size=24, **_EXPERTS),
    ),
}


def random_model(name: str) -> Model:
    """A random model whose norms and biases are random too: what leaves one out gives other numbers."""
    torch.manual_seed(0)
    hf = MODELS[name].make()
    for key, parameter in hf.named_parameters():
        if "norm" in key or ".ln_" in key or key.endswith("bias"):
            nn.init.normal_(parameter, mean=0.0 if key.endswith("bias") else 0.5, std=0.3)
    return Model.from_hf(hf, tiny_tokenizer(), name)
