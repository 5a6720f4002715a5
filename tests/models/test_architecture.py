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
from transformers import LlamaConfig, NemotronConfig, NemotronForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from emosteer.attribution.unit_scores import head_contributions, neuron_contributions, written_direction
from emosteer.base.errors import ModelError
from emosteer.circuits.name_sparing import name_direction, name_tokens
from emosteer.generation.generate import Decoding, Request, generate
from emosteer.generation.lean_forward import lean_of
from emosteer.models import architecture
from emosteer.models.architecture import FAMILIES, LLAMA, Family, family_of, norm_gain, part, parts
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, KINDS, MLP_OUT, MLP_POST, RESID_MID, RESID_POST, Site, Z
from tests.attribution.test_unit_scores import make_directions, samples
from tests.conftest import SIZES, tiny_tokenizer
from tests.helpers.families import MODELS, random_model

IDS = torch.tensor([[1, 7, 9, 12, 30, 41], [1, 8, 20, 15, 33, 5]])

# ---- what a description says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_description_is_true_of_its_models(name: str) -> None:
    """Loading has proved the sites; here the rest: paths, what differs from Llama, and what a norm multiplies by."""
    model = random_model(name)
    family, config = model.family, model.config
    assert family.name == MODELS[name].row
    for layer in model.layers:
        parts(layer, (family.attention, family.mlp, *family.qkv, family.w_o, *family.gate_up, *family.pre_norms))
        inside = dict(part(layer, family.attention).named_modules())
        assert {f"{family.attention}.{key}" for key in ("q_norm", "k_norm") if key in inside} == set(family.qk_norms)
        norms = {key for key, module in layer.named_modules() if "norm" in key or key.startswith("ln_")}
        described = {*family.pre_norms, *family.qk_norms, family.attn_post_norm, family.mlp_post_norm} - {None}
        assert norms == described, "no norm of a layer is left out"
    if family.rotary is not None:
        part(model.body, family.rotary)
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for norm in (model.final_norm, *(part(model.layers[0], path) for path in (*family.pre_norms, family.attn_post_norm) if path)):
        epsilon, bias = getattr(norm, family.norm_epsilon), getattr(norm, "bias", None)
        centred = states - states.mean(-1, keepdim=True) if centres(norm) else states
        scale = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        expected = centred / scale * norm_gain(family, norm) + (0 if bias is None else bias)
        torch.testing.assert_close(norm(states), expected, rtol=1e-5, atol=1e-6)
    first = {}
    handle = model.layers[0].register_forward_pre_hook(lambda _, args: first.update(hidden=args[0]))
    model.run(IDS, bridge=False)
    handle.remove()
    if family.rotary is not None:
        is_scaled = not torch.allclose(first["hidden"], functional.embedding(IDS, model.embedding.weight))
        assert is_scaled is family.embedding_is_scaled
    assert config.vocab_size == model.unembedding.out_features


def centres(norm: nn.Module) -> bool:
    """Whether a norm takes the mean away, by its name; RMS norms do not."""
    return "LayerNorm" in type(norm).__name__


def test_rows_are_told_apart() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    named = [name for family in FAMILIES for name in family.classes]
    assert len(set(named)) == len(named)
    assert all(family.classes for family in FAMILIES if family.is_complete), "nobody has read the code of a class that is not named"
    assert not [family.name for family in FAMILIES if family.parallel and (family.residual_factor or family.post_norms)], "see `hooks`"
    assert {case.row for case in MODELS.values()} >= {family.name for family in FAMILIES if family.classes}, "every row has a random model"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", "architecture GPT2LMHeadModel is not supported: expected a family of docs/FAMILIES.md, or decoder layers with"),
        ("granite", "resid_post of layer 0 is not resid_mid . MLP output"),
        ("glm4", "resid_post of layer 0 is not resid_mid . MLP output"),
    ],
)
def test_a_model_without_a_row_that_is_true_of_it_is_refused_in_one_line(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "FAMILIES", [row for row in FAMILIES if row.name != name])
    with pytest.raises(ModelError, match=message) as caught:
        random_model(name)
    assert "\n" not in str(caught.value) and "not supported" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("granite", {"residual_factor": None}, "resid_post of layer 0 is not resid_mid"),
        ("granite", {"logit_divisor": None}, "the logits are not the model's own"),
        ("cohere", {"logit_factor": None}, "the logits are not the model's own"),
        ("gpt2", {"transposed": False}, "attn_out of layer 0 is not z W_O"),
        ("gemma", {"norm_offset": 0.0}, "the final norm's gain is not what it should be"),
        ("nemotron", {"norm_offset": 0.0}, "the final norm's gain is not what it should be"),
        ("stablelm", {"parallel": True}, "the MLP of layer 0 reads what attention writes"),
        ("gpt-neox", {"parallel": False}, "resid_post of layer 0 is not resid_mid"),
        ("phi3", {"attn_post_norm": "input_layernorm"}, "resid_mid of layer 1 is not resid_pre . attention output"),
    ],
)
def test_the_proof_at_load_finds_a_wrong_description(
    name: str, wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture, "FAMILIES", [replace(row, **wrong) if row.name == name else row for row in FAMILIES])
    with pytest.raises(ModelError, match=message):
        random_model(name)


# ---- gains and post-norms, each without the other --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_direction_of_a_name_is_what_lifts_its_logits(name: str) -> None:
    """For any state, how far the name's logits lie above the mean is its projection on the direction, by the norm's scale; a norm's bias
    lifts all states alike, and cancels between a state and its opposite."""
    model = random_model(name)
    direction = name_direction(model, "anger")
    assert direction is not None
    states = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)) + 0.5
    logits = [model.unembedding(model.final_norm(sign * states)) for sign in (1, -1)]
    lift = sum(sign * (each[:, name_tokens(model, "anger")].mean(-1) - each.mean(-1)) for sign, each in zip((1, -1), logits, strict=True))
    scale = (states - states.mean(-1, keepdim=True) if centres(model.final_norm) else states).square().mean(-1).sqrt()
    cosine = functional.cosine_similarity(lift * scale, states @ direction, dim=0)
    assert cosine > 1 - 1e-5


@torch.no_grad()
def test_a_gain_that_no_row_knows_is_asked_of_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nemotron centres, keeps one less than the gain, and has biases; without its row, its norms' weights alone would mislead."""
    torch.manual_seed(0)
    hf = NemotronForCausalLM(NemotronConfig(**SIZES))
    for key, parameter in hf.named_parameters():
        if "norm" in key:
            nn.init.normal_(parameter, mean=0.1, std=0.4)
    monkeypatch.setattr(architecture, "FAMILIES", [row for row in FAMILIES if row.name != "nemotron"])
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


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_contributions_equal_the_drop_when_a_unit_is_ablated(name: str) -> None:
    """Gemma: an offset and no post-norms. OLMo 2: post-norms and no offset. Granite: a factor. A post-norm's scale is held at its clean
    value, as the score leaves it out; its gain acts as the module has it. A unit is ablated in the weights: no hook has a part in it."""
    model = random_model(name)
    model.hf.double().set_experts_implementation("eager")  # the fused one has no double precision
    family, layer = model.family, 1
    shape, draw = model.shape, torch.Generator().manual_seed(2)
    v = torch.randn(shape.n_layers, shape.d_model, generator=draw, dtype=torch.float64)
    for kind, path, written, target, table, writer in (
        (Z, family.attn_post_norm, ATTN_OUT, RESID_MID, head_contributions, family.w_o),
        (MLP_POST, family.mlp_post_norm, MLP_OUT, RESID_POST, neuron_contributions, family.w_down),
    ):
        seen = model.read(IDS, [Site(index, kind) for index in range(shape.n_layers)], bridge=False)
        after, before = Site(layer, target), Site(layer, written)
        clean = model.read(IDS, [after, before], bridge=False)
        scores = table(model, torch.stack([seen[Site(index, kind)] for index in range(shape.n_layers)], dim=-2), v)[..., layer, :]
        if writer is None:
            assert scores.shape[-1] == shape.d_mlp == 0, "an MLP of experts has no neurons"
            continue
        size = rms(clean[before], model) if path else torch.ones(2, 6, 1, dtype=torch.float64)

        def held(_: Any, args: tuple[Tensor], out: Tensor, size: Tensor = size) -> Tensor:
            return out * rms(args[0], model) / size

        handle = part(model.layers[layer], path).register_forward_hook(held) if path else None
        weight, width = part(model.layers[layer], writer).weight, model.width(kind) // scores.shape[-1]
        matrix, kept = weight.T if family.transposed else weight, weight.clone()
        moved = 0
        for index in range(scores.shape[-1]):
            matrix[:, index * width : (index + 1) * width] = 0
            drop = (clean[after] - model.read(IDS, [after], bridge=False)[after]) @ v[layer]
            weight.copy_(kept)
            moved += bool(drop.abs().max() > 1e-3)
            torch.testing.assert_close(scores[..., index] / size[..., 0], drop, rtol=1e-5, atol=1e-5)  # norms go through float32
        assert moved >= 0.8 * scores.shape[-1], "neurons that never fire say nothing"
        if handle:
            handle.remove()


def rms(states: Tensor, model: Model) -> Tensor:
    """What a norm divides by. Shape [..., 1]."""
    return (states.square().mean(-1, keepdim=True) + getattr(model.final_norm, model.family.norm_epsilon)).sqrt()


def test_an_offset_alone_leaves_a_written_direction_as_it_is() -> None:
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(written_direction(random_model("gemma"), 1, RESID_MID, v), v)
    olmo = random_model("olmo2")
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

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> Any:
        return SimpleNamespace(logits=self.embed_out(self.transformer(input_ids).last_hidden_state))


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
    with pytest.raises(ModelError, match="architecture RenamedForCausalLM is not supported: expected a family of docs/FAMILIES.md"):
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
        {"rotary": None},
        {"parallel": True},
        {"transposed": True},
        {"w_down": None},
        {"residual_factor": "initializer_range"},
        {"logit_factor": "initializer_range"},
        {"logit_divisor": "initializer_range"},
    ],
    ids=lambda difference: next(iter(difference)),
)
def test_the_fast_pass_is_for_those_whose_description_says_nothing_else(renamed: Model, difference: dict[str, Any]) -> None:
    renamed.family = replace(renamed.family, **difference)
    assert lean_of(renamed) is None


def test_a_row_is_enough_for_the_fast_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral without a window is a Llama; the fast pass takes it because its row says so, and proves it."""
    assert lean_of(random_model("mistral")) is not None
    monkeypatch.setattr(architecture, "FAMILIES", [row for row in FAMILIES if row.name != "mistral"])
    assert lean_of(random_model("mistral")) is None


def test_the_fast_pass_is_not_for_windows() -> None:
    """Its proof is shorter than any window; the configuration has to say that there is none."""
    model = random_model("mistral")
    model.config.sliding_window = 4096
    assert lean_of(model) is None
