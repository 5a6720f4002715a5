"""Descriptions of families: what they say is there and is so, and names stand nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from emosteer.attribution.unit_scores import head_contributions, neuron_contributions, written_direction
from emosteer.base.errors import ModelError
from emosteer.circuits.name_sparing import name_direction, name_tokens
from emosteer.generation.generate import Decoding, Request, generate
from emosteer.generation.lean_forward import lean_of
from emosteer.models import architecture
from emosteer.models.architecture import FAMILIES, LLAMA, Family, family_of, norm_gain, part, parts
from emosteer.models.interventions import replace_units
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, KINDS, MLP_OUT, MLP_POST, RESID_MID, RESID_POST, Head, Neuron, Site, Z
from tests.attribution.test_unit_scores import make_directions, samples
from tests.conftest import SIZES, build, tiny_tokenizer

IDS = torch.tensor([[1, 7, 9, 12, 30, 41], [1, 8, 20, 15, 33, 5]])
BUILT = ("llama", "qwen2", "gemma3")
OTHERS = {
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES)),
    "olmo3": lambda: Olmo3ForCausalLM(Olmo3Config(**SIZES)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=8, sliding_window=None)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SIZES)),
}
#: Models whose class no row names -> the row that takes them.
ROW = {"olmo3": "olmo2", "mistral": "like llama", "smollm3": "like llama"}


def made(name: str) -> Model:
    """A random model whose norms have random weights."""
    if name in BUILT:
        return build(name)
    torch.manual_seed(0)
    hf = OTHERS[name]()
    for key, parameter in hf.named_parameters():
        if "norm" in key:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    return Model.from_hf(hf, tiny_tokenizer(), name)


# ---- what a description says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BUILT, *OTHERS])
@torch.no_grad()
def test_a_description_is_true_of_its_models(name: str) -> None:
    """Loading has proved the sites; here the rest: paths, what differs from Llama, and what a norm multiplies by."""
    model = made(name)
    family, config = model.family, model.hf.config
    assert family.name == ROW.get(name, name)
    for layer in model.layers:
        parts(layer, (family.attention, family.mlp, *family.qkv, family.w_o, *family.gate_up, family.w_down, *family.pre_norms))
        inside = dict(part(layer, family.attention).named_modules())
        assert {f"{family.attention}.{key}" for key in ("q_norm", "k_norm") if key in inside} == set(family.qk_norms)
        norms = {key for key, module in layer.named_modules() if "norm" in key and "." not in key and module is not layer}
        described = {*family.pre_norms, family.attn_post_norm, family.mlp_post_norm} - {None}
        assert norms == described, "no norm of a layer is left out"
    part(model.body, family.rotary)
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for norm in (model.final_norm, *(part(model.layers[0], path) for path in (*family.pre_norms, family.attn_post_norm) if path)):
        epsilon = getattr(norm, family.norm_epsilon)
        scale = (states.square().mean(-1, keepdim=True) + epsilon).sqrt()
        torch.testing.assert_close(norm(states), states / scale * norm_gain(family, norm), rtol=1e-5, atol=1e-6)
    first = {}
    handle = model.layers[0].register_forward_pre_hook(lambda _, args: first.update(hidden=args[0]))
    model.run(IDS, bridge=False)
    handle.remove()
    is_scaled = not torch.allclose(first["hidden"], functional.embedding(IDS, model.embedding.weight))
    assert is_scaled is family.embedding_is_scaled
    assert config.vocab_size == model.unembedding.out_features


def test_rows_are_told_apart() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    named = [name for family in FAMILIES for name in family.classes]
    assert len(set(named)) == len(named)
    assert all(family.classes for family in FAMILIES if family.is_complete), "nobody has read the code of a class that is not named"


# ---- gains and post-norms, each without the other --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "gemma3", "olmo2", "mistral", "smollm3"])
@torch.no_grad()
def test_the_direction_of_a_name_is_what_lifts_its_logits(name: str) -> None:
    """For any state, how far the name's logits lie above the mean is its projection on the direction, by the norm's scale."""
    model = made(name)
    direction = name_direction(model, "anger")
    assert direction is not None
    states = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    logits = model.unembedding(model.final_norm(states))
    lift = (logits[:, name_tokens(model, "anger")].mean(-1) - logits.mean(-1)) * states.square().mean(-1).sqrt()
    cosine = functional.cosine_similarity(lift, states @ direction, dim=0)
    assert cosine > 1 - 1e-5


@torch.no_grad()
def test_a_gain_that_no_row_knows_is_asked_of_the_norm() -> None:
    """Nemotron centres, keeps one less than the gain, and has biases; no row names it, and its norms' weights alone would mislead."""
    torch.manual_seed(0)
    hf = NemotronForCausalLM(NemotronConfig(**SIZES))
    for key, parameter in hf.named_parameters():
        if "norm" in key:
            nn.init.normal_(parameter, mean=0.1, std=0.4)
    model = Model.from_hf(hf, tiny_tokenizer(), "nemotron")
    assert not model.family.classes
    for norm in (model.final_norm, model.layers[1].input_layernorm):
        torch.testing.assert_close(norm_gain(model.family, norm), norm.weight + 1)
    direction = name_direction(model, "anger")
    assert direction is not None
    states = torch.randn(60, 32, generator=torch.Generator().manual_seed(1))
    centred = states - states.mean(-1, keepdim=True)
    logits = model.unembedding(model.final_norm(states))
    lift = (logits[:, name_tokens(model, "anger")].mean(-1) - logits.mean(-1)) * centred.square().mean(-1).sqrt()
    changes = (lift - lift.mean(), centred @ direction - (centred @ direction).mean())  # the norm's bias lifts all states alike
    assert functional.cosine_similarity(*changes, dim=0) > 0.95
    plain = (model.unembedding.weight[name_tokens(model, "anger")].mean(0) - model.unembedding.weight.mean(0)) * model.final_norm.weight
    assert functional.cosine_similarity(lift - lift.mean(), centred @ plain - (centred @ plain).mean(), dim=0) < 0.9, "as it was before"


@pytest.mark.parametrize("name", ["gemma", "olmo2", "olmo3", "gemma3"])
@torch.no_grad()
def test_contributions_equal_the_drop_when_a_unit_is_ablated(name: str) -> None:
    """Gemma: an offset and no post-norms. OLMo 2: post-norms and no offset. A post-norm's scale is held at its clean value, as the
    score leaves it out; its gain acts as the module has it."""
    model = made(name)
    model.hf.double()
    family, layer = model.family, 1
    shape, draw = model.shape, torch.Generator().manual_seed(2)
    v = torch.randn(shape.n_layers, shape.d_model, generator=draw, dtype=torch.float64)
    for kind, path, written, target, table, unit in (
        (Z, family.attn_post_norm, ATTN_OUT, RESID_MID, head_contributions, Head),
        (MLP_POST, family.mlp_post_norm, MLP_OUT, RESID_POST, neuron_contributions, Neuron),
    ):
        seen = model.read(IDS, [Site(index, kind) for index in range(shape.n_layers)], bridge=False)
        after, before = Site(layer, target), Site(layer, written)
        clean = model.read(IDS, [after, before], bridge=False)
        scores = table(model, torch.stack([seen[Site(index, kind)] for index in range(shape.n_layers)], dim=-2), v)[..., layer, :]
        size = rms(clean[before], model) if path else torch.ones(2, 6, 1, dtype=torch.float64)

        def held(_: Any, args: tuple[Tensor], out: Tensor, size: Tensor = size) -> Tensor:
            return out * rms(args[0], model) / size

        handle = part(model.layers[layer], path).register_forward_hook(held) if path else None
        for index in range(scores.shape[-1]):
            edits = replace_units(model, [[unit(layer, index)]] * 2)
            ablated = model.read(IDS, [after], edits=edits, bridge=False)[after]
            drop = (clean[after] - ablated) @ v[layer]
            assert drop.abs().max() > 1e-3
            torch.testing.assert_close(scores[..., index] / size[..., 0], drop, rtol=1e-5, atol=1e-5)  # norms go through float32
        if handle:
            handle.remove()


def rms(states: Tensor, model: Model) -> Tensor:
    """What a norm divides by. Shape [..., 1]."""
    return (states.square().mean(-1, keepdim=True) + getattr(model.final_norm, model.family.norm_epsilon)).sqrt()


def test_an_offset_alone_leaves_a_written_direction_as_it_is() -> None:
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(written_direction(made("gemma"), 1, RESID_MID, v), v)
    olmo = made("olmo2")
    expected = {RESID_MID: olmo.layers[1].post_attention_layernorm.weight, RESID_POST: olmo.layers[1].post_feedforward_layernorm.weight}
    for kind, gain in expected.items():
        assert torch.equal(written_direction(olmo, 1, kind, v), v * gain)


# ---- a family that differs only in names -------------------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.size, self.index = config.head_dim, index
        self.factor = self.size**-0.5
        wide, narrow = config.num_attention_heads * self.size, config.num_key_value_heads * self.size
        self.query = nn.Linear(config.hidden_size, wide, bias=False)
        self.key, self.value = (nn.Linear(config.hidden_size, narrow, bias=False) for _ in range(2))
        self.dense = nn.Linear(wide, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        split = [linear(hidden).unflatten(-1, (-1, self.size)).transpose(1, 2) for linear in (self.query, self.key, self.value)]
        q, k = apply_rotary_pos_emb(*split[:2], *angles)
        k, v = (k, split[2]) if cache is None else cache.update(k, split[2], self.index)
        causal = mask is None and q.shape[2] > 1
        z = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.factor, enable_gqa=True)
        return self.dense(z.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.dense_gate, self.dense_h_to_4h = (nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2))
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense_4h_to_h(functional.silu(self.dense_gate(hidden)) * self.dense_h_to_4h(hidden))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (Norm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
        self.attention, self.feed_forward = Attention(config, index), Mlp(config)

    def forward(self, hidden: Tensor, *rest: Any) -> Tensor:
        hidden = hidden + self.attention(self.ln_1(hidden), *rest)
        return hidden + self.feed_forward(self.ln_2(hidden))


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([Block(config, index) for index in range(config.num_hidden_layers)])
        self.ln_f, self.rope = Norm(config.hidden_size, config.rms_norm_eps), LlamaRotaryEmbedding(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        hidden = self.wte(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=attention_mask, cache=past_key_values, position_ids=position_ids
        )
        angles = self.rope(hidden, position_ids)
        for block in self.h:
            hidden = block(hidden, angles, mask, past_key_values)
        return SimpleNamespace(last_hidden_state=self.ln_f(hidden))


class RenamedForCausalLM(nn.Module):
    """Llama's arithmetic; not one part of the tree has Llama's name."""

    def __init__(self, config: LlamaConfig, generation_config: Any) -> None:
        super().__init__()
        self.config, self.generation_config = config, generation_config
        self.transformer, self.embed_out = Decoder(config), nn.Linear(config.hidden_size, config.vocab_size, bias=False)


RENAMED = Family(
    "renamed",
    (f"{__name__}.RenamedForCausalLM",),
    body="transformer",
    unembedding="embed_out",
    layers="h",
    embedding="wte",
    rotary="rope",
    final_norm="ln_f",
    attention="attention",
    mlp="feed_forward",
    w_o="attention.dense",
    w_down="feed_forward.dense_4h_to_h",
    qkv=("attention.query", "attention.key", "attention.value"),
    gate_up=("feed_forward.dense_gate", "feed_forward.dense_h_to_4h"),
    attn_norm="ln_1",
    mlp_norm="ln_2",
    attn_scale="factor",
    norm_epsilon="eps",
    is_complete=True,
)


def renamed_tree(llama: Model) -> RenamedForCausalLM:
    """The weights of a Llama in the renamed tree, carried over by the two descriptions alone."""
    hf = RenamedForCausalLM(llama.hf.config, llama.hf.generation_config)
    body = part(hf, RENAMED.body)
    pairs = [(llama.unembedding, hf.embed_out), (llama.embedding, body.wte), (llama.final_norm, body.ln_f)]
    for theirs, mine in zip(llama.layers, part(body, RENAMED.layers), strict=True):
        pairs += zip(*(parts(layer, layer_paths(family)) for layer, family in ((theirs, LLAMA), (mine, RENAMED))), strict=True)
    for source, target in pairs:
        target.load_state_dict(source.state_dict())
    return hf


def layer_paths(family: Family) -> tuple[str, ...]:
    """Every module of a layer that holds weights."""
    return (*family.qkv, family.w_o, *family.gate_up, family.w_down, *family.pre_norms)


@pytest.fixture
def renamed(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """The tiny Llama under other names. TransformerLens cannot wrap it, so it is read, like a model on several devices, without."""
    monkeypatch.setattr(architecture, "FAMILIES", (*FAMILIES, RENAMED))
    model = Model.from_hf(renamed_tree(tiny), tiny.tokenizer, "renamed")
    model.spread = True
    yield model


def test_without_its_row_it_is_refused(tiny: Model) -> None:
    with pytest.raises(ModelError, match="architecture RenamedForCausalLM is not supported: expected decoder layers with self_attn.o_proj"):
        family_of(renamed_tree(tiny))


@torch.no_grad()
def test_a_family_of_other_names_has_the_same_sites_weights_and_output(renamed: Model, tiny: Model) -> None:
    sites = [Site(layer, kind) for layer in range(tiny.shape.n_layers) for kind in KINDS]
    found, expected = renamed.read(IDS, sites), tiny.read(IDS, sites, bridge=False)
    assert found.keys() == expected.keys() == set(sites)
    for site in sites:
        torch.testing.assert_close(found[site], expected[site], rtol=1e-4, atol=1e-5, msg=str(site))
        shift = torch.linspace(-1, 1, tiny.width(site.kind))
        edited = [model.run(IDS, {site: lambda x, s=shift: x + s}, bridge=False) for model in (renamed, tiny)]
        torch.testing.assert_close(*edited, rtol=1e-3, atol=1e-4, msg=str(site))
    torch.testing.assert_close(renamed.logits(renamed.run(IDS)), tiny.logits(tiny.run(IDS, bridge=False)), rtol=1e-4, atol=1e-4)
    assert renamed.shape == tiny.shape
    for layer in range(tiny.shape.n_layers):
        assert torch.equal(renamed.w_o(layer), tiny.w_o(layer)) and torch.equal(renamed.w_down(layer), tiny.w_down(layer))


def test_a_family_of_other_names_has_the_same_directions_and_scores(renamed: Model, tiny: Model) -> None:
    groups = samples()
    found, expected = make_directions(renamed, groups), make_directions(tiny, groups)
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.z.mean, expected.z.mean, rtol=1e-3, atol=1e-4)
    assert torch.equal(*(name_direction(model, "anger") for model in (renamed, tiny)))
    v = expected.at(RESID_MID)
    for table, states in ((head_contributions, expected.z.mean), (neuron_contributions, expected.mlp.mean)):
        assert torch.equal(table(renamed, states, v), table(tiny, states, v))


def test_a_family_of_other_names_is_written_by_the_fast_pass(renamed: Model, tiny: Model) -> None:
    requests = [Request(str(row), (1, 7, 9 + row, 4)) for row in range(3)]
    assert lean_of(renamed) is not None
    assert generate(renamed, requests, decoding=Decoding(8)) == generate(tiny, requests, decoding=Decoding(8))


@pytest.mark.parametrize(
    "difference",
    [
        {"is_complete": False},
        {"norm_offset": 1.0},
        {"embedding_is_scaled": True},
        {"mlp_post_norm": "ln_2"},
        {"attn_norm": None},
        {"qk_norms": ("attention.query",)},
        {"qkv": ("attention.query",)},
        {"gate_up": ("feed_forward.dense_gate",)},
    ],
    ids=lambda difference: next(iter(difference)),
)
def test_the_fast_pass_is_for_those_whose_description_says_nothing_else(renamed: Model, difference: dict[str, Any]) -> None:
    renamed.family = replace(renamed.family, **difference)
    assert lean_of(renamed) is None


def test_a_row_is_enough_for_the_fast_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral without a window is a Llama; the fast pass takes it as soon as a row says so, and proves it."""
    assert lean_of(made("mistral")) is None
    row = Family("mistral", ("transformers.models.mistral.modeling_mistral.MistralForCausalLM",), is_complete=True)
    monkeypatch.setattr(architecture, "FAMILIES", (*FAMILIES, row))
    assert lean_of(made("mistral")) is not None
