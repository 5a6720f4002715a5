"""Small random models, built locally with a fixed seed; no download, no network."""

from __future__ import annotations

import os
import random

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from emosteer.models.model import Model
from emosteer.scenarios.scenarios import EMOTIONS, VALENCES, Bank, Group, GroupKey

# tensors this small are slowed down by threads, eightfold on a busy machine; but nothing may depend on there being one
torch.set_num_threads(int(os.environ.get("EMOSTEER_TEST_THREADS", "1")))

_TEXT = (
    "i you we it the a my our is was in on at of to and but not what why how this that they waited nine weeks permit office desk came "
    "back went home said told door late train flat landlord boss call never ever again please stop laugh sing dance cry alone hide "
    "run shake slam spit filth wait really blink no yes keep reply two sentences . , ! ? anger sadness happiness fear surprise "
    "disgust feeling express emotion always"
)
WORDS = _TEXT.split()
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a ChatML-like template."""
    special = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system"]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(special + WORDS))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[.!]"), "isolated")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


SIZES = dict(
    vocab_size=len(dict.fromkeys(["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system", *WORDS])),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)


def build(family: str, seed: int = 0) -> Model:
    """A random model of a family: "llama" (grouped heads), "qwen2" (q/k/v biases) or "gemma3" (post-norms, d_head of its own)."""
    torch.manual_seed(seed)
    if family == "llama":
        hf = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif family == "qwen2":
        hf = Qwen2ForCausalLM(Qwen2Config(**SIZES))
        for layer in hf.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                torch.nn.init.normal_(getattr(layer.self_attn, name).bias, std=0.3)
    else:
        hf = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=64, query_pre_attn_scalar=16))
        for name, parameter in hf.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return Model.from_hf(hf, tiny_tokenizer(), f"tiny-{family}")


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The random Llama-like model that most tests use."""
    return build("llama")


@pytest.fixture(scope="session", params=["llama", "qwen2", "gemma3"])
def family(request: pytest.FixtureRequest) -> Model:
    """One random model of each supported family."""
    return build(request.param)


def small_data(scenarios: int = 6, emotions: tuple[str, ...] = EMOTIONS, seed: int = 0, words: int = 7) -> tuple[list[Group], Bank]:
    """Groups of random words over three themes and three valences, and a complete reply bank of replies of unequal length."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))

    groups = [Group(GroupKey(f"s{index}", valence), f"theme{index % 3}", text(4, 9)) for index in range(scenarios) for valence in VALENCES]
    return groups, {group.key: {emotion: text(2, words) for emotion in emotions} for group in groups}
