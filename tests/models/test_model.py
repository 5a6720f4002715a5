"""The adapter: identities, hooks that fire and go, both trees the same."""

from __future__ import annotations

import pytest
import torch

from emosteer.base.errors import ModelError, UsageError
from emosteer.models.devices import resolve_device
from emosteer.models.model import Model
from emosteer.models.sites import KINDS, Site
from tests.helpers.precision import assert_forward

IDS = torch.tensor([[1, 7, 9, 12, 30, 41], [1, 8, 20, 15, 33, 5]])


def all_sites(model: Model) -> list[Site]:
    return [Site(layer, kind) for layer in range(model.shape.n_layers) for kind in KINDS]


@torch.no_grad()
def test_both_trees_read_the_same_activations(family: Model) -> None:
    plain = family.read(IDS, all_sites(family), bridge=False)
    bridge = family.read(IDS, all_sites(family), bridge=True)
    for site in all_sites(family):
        assert_forward(bridge[site], plain[site], str(site))


@torch.no_grad()
def test_reading_by_either_tree_equals_the_untouched_model(family: Model) -> None:
    expected = family.hf(input_ids=IDS).logits
    for bridge in (False, True):
        assert_forward(family.logits(family.run(IDS, bridge=bridge)), expected)


@torch.no_grad()
def test_an_edit_at_any_site_changes_the_output_of_either_tree_alike(family: Model) -> None:
    base = family.run(IDS, bridge=False)
    for site in all_sites(family):
        shift = torch.linspace(-1, 1, family.width(site.kind))
        edited = [family.run(IDS, {site: lambda x, s=shift: x + s}, bridge=bridge) for bridge in (False, True)]
        torch.testing.assert_close(edited[0], edited[1], rtol=1e-3, atol=1e-4, msg=str(site))
        assert (edited[0] - base).abs().max() > 1e-3, site


@torch.no_grad()
def test_w_o_and_w_down_are_what_the_model_multiplies_by(family: Model) -> None:
    site = {kind: Site(1, kind) for kind in KINDS}
    seen = family.read(IDS, list(site.values()))
    heads = seen[site["z"]].unflatten(-1, (family.shape.n_heads, family.shape.d_head))
    assert_forward(torch.einsum("bphd,hdm->bpm", heads, family.w_o(1)), seen[site["attn_out"]])
    assert_forward(seen[site["mlp_post"]] @ family.w_down(1), seen[site["mlp_out"]])


@pytest.mark.parametrize("bridge", [False, True])
def test_no_hook_survives_an_exception(tiny: Model, bridge: bool) -> None:
    before = tiny.run(IDS, bridge=bridge)

    def explode(_: torch.Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tiny.run(IDS, {Site(0, "z"): lambda x: x * 0, Site(1, "resid_post"): explode}, bridge=bridge)
    assert torch.equal(tiny.run(IDS, bridge=bridge), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.hf.modules())


def test_the_two_trees_share_their_weights(tiny: Model) -> None:
    owned = {p.data_ptr() for p in tiny.hf.parameters()}
    assert {p.data_ptr() for p in tiny.bridge.original_model.parameters()} == owned


def test_an_architecture_of_another_shape_is_refused_by_name() -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    from tests.conftest import tiny_tokenizer

    hf = GPTJForCausalLM(GPTJConfig(n_layer=1, n_embd=8, n_head=2, rotary_dim=4, vocab_size=32))
    with pytest.raises(ModelError, match="GPTJForCausalLM"):
        Model.from_hf(hf, tiny_tokenizer())


def test_a_layer_that_breaks_the_residual_identity_is_refused() -> None:
    from tests.conftest import build

    model = build("llama")
    mlp = model.layers[1].mlp
    real = mlp.forward
    mlp.forward = lambda x: 2 * real(x)
    with pytest.raises(ModelError, match="LlamaForCausalLM.*resid_post of layer 1"):
        Model.from_hf(model.hf, model.tokenizer)


def test_the_system_line_moves_into_the_user_turn_where_there_is_no_system_role(tiny: Model) -> None:
    from tests.conftest import TEMPLATE, build

    model = build("llama")
    model.tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    ids = model.prompt_ids([{"role": "system", "content": "always anger"}, {"role": "user", "content": "the train"}])
    assert model.tokenizer.decode(ids).split() == [
        "<|im_start|>",
        "user",
        "always",
        "anger",
        "the",
        "train",
        "<|im_end|>",
        "<|im_start|>",
        "assistant",
    ]


def test_unknown_devices_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda"):
        resolve_device("gpu0")
    with pytest.raises(UsageError, match="CUDA devices"):
        resolve_device("cuda:63")
