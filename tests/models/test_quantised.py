"""Weights in 8 and 4 bits: what is read from them is what they do, and every stage runs on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from emosteer.attribution.ablate import ablate
from emosteer.attribution.settings import AblateSettings
from emosteer.base.errors import ModelError, UsageError
from emosteer.circuits.assemble import assemble
from emosteer.circuits.precision import chosen_dtype, reader
from emosteer.circuits.settings import CircuitSettings, GainSettings
from emosteer.directions.extract import extract
from emosteer.directions.settings import Settings
from emosteer.generation.generate import Decoding, Request, generate
from emosteer.generation.steering import plan_for
from emosteer.models import quantised
from emosteer.models.interventions import replace_units
from emosteer.models.model import Model
from emosteer.models.quantised import dense_weight, gradient_error
from emosteer.models.sites import MLP_POST, RESID_MID, RESID_POST, Head, Neuron, Site, Z
from emosteer.models.weights.whole import scheme_of
from tests.conftest import SIZES, small_data, tiny_tokenizer

#: Blocks of 64 numbers share a scale: widths are multiples of it.
WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 128}
SCHEMES = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}
IDS = torch.tensor([[1, 7, 9, 12, 30, 41]])
EMOTIONS = ("anger", "sadness", "fear")


def plain_folder(path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**WIDE, attention_bias=True)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random weights plain and quantised, as checkpoints."""
    root = tmp_path_factory.mktemp("quantised")
    found = {"plain": plain_folder(root / "plain")}
    for name, config in SCHEMES.items():
        packed = AutoModelForCausalLM.from_pretrained(found["plain"], quantization_config=config, dtype=torch.float32)
        packed.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
        found[name] = root / name
    return found


@pytest.fixture(scope="module", params=sorted(SCHEMES))
def packed(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Model]:
    yield Model.load(str(folders[request.param]))


def test_what_is_read_from_packed_weights_is_near_the_plain_ones(packed: Model, folders: dict[str, Path]) -> None:
    """And not the stored integers, which were 150 times as large."""
    plain = Model.load(str(folders["plain"]))
    bound = {"int8": 0.02, "nf4": 0.15}[str(packed.quantised)]
    for layer in range(3):
        for found, expected in ((packed.w_o(layer), plain.w_o(layer)), (packed.w_down(layer), plain.w_down(layer))):
            assert found.shape == expected.shape
            assert 0 < (found - expected).norm() / expected.norm() < bound
    assert packed.precision == f"torch.float32+{packed.quantised}" and plain.precision == "torch.float32"


def test_a_map_is_asked_without_its_bias_and_in_parts(packed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = packed.layers[1].self_attn.o_proj
    assert type(linear) is not nn.Linear and linear.bias is not None
    whole = dense_weight(linear, torch.float32)
    monkeypatch.setattr(quantised, "ROWS", 7)
    assert torch.allclose(dense_weight(linear, torch.float32), whole, atol=1e-3 * float(whole.abs().max()))
    plain = nn.Linear(5, 3)
    assert torch.allclose(dense_weight(plain, torch.float32), plain.weight, atol=1e-6)


def test_contributions_are_what_ablation_finds(packed: Model) -> None:
    """Zeroing a head or neuron lowers the projection by its contribution; int8 rounds activations too, so only about."""
    direction = torch.randn(WIDE["hidden_size"], generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()
    layer = 1
    seen = packed.read(IDS, [Site(layer, Z), Site(layer, MLP_POST), Site(layer, RESID_MID), Site(layer, RESID_POST)])
    heads = torch.einsum("hd,hdm,m->h", seen[Site(layer, Z)][0, -1].unflatten(-1, (4, 16)), packed.w_o(layer), direction)
    neurons = seen[Site(layer, MLP_POST)][0, -1] * (packed.w_down(layer) @ direction)
    units = [(Head(layer, 2), RESID_MID, heads[2]), (Neuron(layer, int(neurons.abs().argmax())), RESID_POST, neurons.abs().max())]
    for unit, kind, expected in units:
        where = Site(layer, kind)
        without = packed.read(IDS, [where], edits=replace_units(packed, [[unit]]))[where]
        change = ((seen[where] - without)[0, -1] @ direction).abs()
        assert change == pytest.approx(float(abs(expected)), rel=0.1, abs=0.02 * float(heads.abs().max()))


def test_greedy_text_is_that_of_transformers(packed: Model) -> None:
    ids = tuple(IDS[0].tolist())
    reply = generate(packed, [Request("a", ids)], decoding=Decoding(max_new_tokens=6, temperature=0, repetition_penalty=1, guidance=1))[0]
    hf = packed.hf.generate(IDS, max_new_tokens=6, do_sample=False, repetition_penalty=1.0, attention_mask=torch.ones_like(IDS))
    written = hf[0, len(ids) :].tolist()
    assert list(reply.ids) == [token for token in written if token not in packed.stop_ids][: len(reply.ids)] and reply.ids


def test_gradients_pass_through_packed_weights(packed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = packed.layers[0].mlp.down_proj
    weight = packed.w_down(0).T
    assert gradient_error(linear, weight, torch.float32) < 0.02
    assert gradient_error(linear, -weight, torch.float32) > 1, "a wrong one is seen"
    forward = type(linear).forward
    monkeypatch.setattr(type(linear), "forward", lambda self, x: forward(self, x.detach()))
    with pytest.raises(ModelError, match="no true gradient passes the"):
        Model.from_hf(packed.hf, packed.tokenizer, "cut")


def test_gradients_are_taken_through_the_packed_model_itself(packed: Model) -> None:
    assert chosen_dtype(packed, "auto") == "float32"
    assert reader(packed, "bfloat16") is packed


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_plain_weights_are_packed_on_loading(name: str, folders: dict[str, Path]) -> None:
    model, checkpoint = Model.load(str(folders["plain"]), dtype=name), Model.load(str(folders[name]))
    assert model.precision == checkpoint.precision
    assert model.sha256 != checkpoint.sha256 and model.sha256 == Model.load(str(folders["plain"])).sha256
    assert torch.equal(model.w_down(2), checkpoint.w_down(2))
    with pytest.raises(ModelError, match=f"is quantised already .{name}.; leave --dtype"):
        Model.load(str(folders[name]), dtype=name)


def test_a_lack_of_the_package_is_said(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--dtype nf4 needs the package bitsandbytes"):
        Model.load(str(folders["plain"]), dtype="nf4")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"load_in_8bit": True}}, "int8"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "nf4"),
        ({"quantization_config": {"load_in_4bit": True}}, "fp4"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": SCHEMES["nf4"]}, "nf4"),
    ],
)
def test_schemes_by_name(config: dict[str, Any], expected: str | None) -> None:
    assert scheme_of(config) == expected


def test_the_stages_run_on_packed_weights(packed: Model) -> None:
    """Directions, scores that real ablation bears out, a circuit that is learned, and steered text."""
    groups, bank = small_data(8, EMOTIONS)
    directions = extract(packed, groups, Settings(EMOTIONS), bank=bank)
    assert directions.provenance.params["dtype"] == f"float32+{packed.quantised}"
    few = AblateSettings(patch_groups=2, true_groups=1, true_units=4, verify_prompts=1, verify_neurons=8, effect_prompts=1, curves=None)
    scores = ablate(packed, directions, groups, few, bank=bank)
    assert scores.forms and scores.verification["heads"]["max_error_to_largest"] < 0.1
    settings, gains = CircuitSettings(n_prompts=1, n_random=1), GainSettings(steps=2, groups=1)
    circuit = assemble(packed, directions, groups, settings, bank=bank, gain_settings=gains)
    vectors = circuit.steering(packed)
    plain, steered = (
        generate(packed, [Request("a", tuple(IDS[0].tolist()))], plan_for(vectors, [0], [dose]), Decoding(max_new_tokens=6, guidance=1.0))[
            0
        ]
        for dose in (0.0, 3.0)
    )
    assert plain.ids != steered.ids
