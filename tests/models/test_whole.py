"""Nothing is made up: folders that lack, add or change something, or want code run, are refused in one line; a fuzz of such folders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from emosteer.base.errors import EmosteerError, ModelError
from emosteer.models.model import Model
from emosteer.models.weights.whole import require_finite
from tests.conftest import SIZES, build, tiny_tokenizer
from tests.models.test_weights import write_gguf

Change = Callable[[dict[str, Tensor]], Any]


def folder(path: Path, family: str = "llama", *, tied: bool = False, seed: int = 0) -> Path:
    """A random model as it is downloaded."""
    from copy import deepcopy

    hf = deepcopy(build(family).hf)
    hf.config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    made = type(hf)(hf.config)
    made.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def change(path: Path, tensors: Change | None = None, **config: Any) -> Path:
    """Changes the tensors of a folder, or fields of its config.json (None takes one out)."""
    if tensors is not None:
        held = load_file(path / "model.safetensors")
        tensors(held)
        save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((path / "config.json").read_text())
    text |= config
    (path / "config.json").write_text(json.dumps({name: value for name, value in text.items() if value is not None}))
    return path


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        Model.load(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message, "one line"
    return message


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_folder_is_loaded(tmp_path: Path, tied: bool) -> None:
    path = folder(tmp_path / "whole", tied=tied)
    model = Model.load(str(path))
    held = load_file(path / "model.safetensors")
    assert ("lm_head.weight" in held) is not tied
    assert all(torch.equal(value, model.hf.state_dict()[name]) for name, value in held.items())


@pytest.mark.parametrize(
    ("dtype", "slow", "said"), [("bfloat16", True, True), ("bfloat16", False, False), ("float32", True, False), ("auto", True, False)]
)
def test_who_asks_for_bfloat16_where_it_is_slow_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str, slow: bool, said: bool
) -> None:
    monkeypatch.setattr("emosteer.models.devices.torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: not slow)
    model = Model.load(str(folder(tmp_path / "whole")), device="cpu", dtype=dtype)
    assert model.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert ("this processor has no units for bfloat16" in capsys.readouterr().err) == said


def test_known_buffers_and_a_tied_head_that_is_written_twice_are_no_fault(tmp_path: Path) -> None:
    path = folder(tmp_path / "twice", tied=True)
    twice = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change(path, lambda held: held.update({**twice, "lm_head.weight": held["model.embed_tokens.weight"].clone()}))
    assert Model.load(str(path)).name == "twice"


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (lambda held: held.pop("lm_head.weight"), {}, r"its files lack lm_head.weight, which would be random numbers"),
        (None, {"num_hidden_layers": 4}, r"its files lack model.layers.3.input_layernorm.weight, .* and 6 more"),
        (None, {"num_hidden_layers": 2}, r"its files hold model.layers.2.input_layernorm.weight, .* for which the model has no place"),
        (lambda held: held.update({"model.norm.weight": torch.ones(31)}), {}, r"model.norm.weight has shape 31, but .* asks for 32"),
        (None, {"intermediate_size": 50}, r"mlp.down_proj.weight has shape 32x48, but its config.json asks for 32x50 and 8 more"),
        (lambda held: held.update({"more.weight": torch.ones(2)}), {}, r"its files hold more.weight, for which the model has no place"),
        (lambda held: held["model.norm.weight"].fill_(float("nan")), {}, r"32 weights that are not finite in model.norm.weight"),
        (None, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"is quantised \(gptq\), which cannot be loaded here: .*copy"),
        (None, {"quantization_config": {"bits": 4}}, r"is quantised \(an unknown method\), which cannot be loaded here"),
        (None, {"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "m.M", "AutoConfig": "c.C"}}, r"which emosteer never runs"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused_by_name(tmp_path: Path, tensors: Change | None, config: dict[str, Any], said: str) -> None:
    path = change(folder(tmp_path / "model"), tensors, **config)
    (path / "m.py").write_text("raise SystemExit('code of the folder was run')")
    (path / "c.py").write_text("raise SystemExit('code of the folder was run')")
    import re

    assert re.search(said, refused(path))


def test_code_beside_a_model_that_is_known_is_not_run(tmp_path: Path) -> None:
    """As Phi-3's folders have it: transformers knows the model, so that the code is not needed."""
    path = change(folder(tmp_path / "model"), auto_map={"AutoModelForCausalLM": "m.M", "AutoConfig": "c.C"})
    for file in ("m.py", "c.py"):
        (path / file).write_text("raise SystemExit('code of the folder was run')")
    assert isinstance(Model.load(str(path)).hf, LlamaForCausalLM)


def test_a_model_without_fused_attention_computes_it_step_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    hf = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16))
    hf.save_pretrained(tmp_path / "gemma2")
    tiny_tokenizer().save_pretrained(tmp_path / "gemma2")
    model = Model.load(str(tmp_path / "gemma2"))
    assert model.hf.config._attn_implementation == "eager" and "no fused attention" in capsys.readouterr().err
    ids = torch.tensor([[1, 7, 9, 12]])
    with torch.no_grad():
        torch.testing.assert_close(model.hf(ids).logits, hf.eval()(ids).logits)


def test_numbers_too_large_for_float16_are_named(tmp_path: Path) -> None:
    weights = change(folder(tmp_path / "weights"), lambda held: held["model.norm.weight"].fill_(1e6))
    assert "model.norm.weight (float16)" in refused(weights, dtype="float16") and "bfloat16" in refused(weights, dtype="float16")
    states = change(folder(tmp_path / "states"), lambda held: held["model.layers.1.mlp.down_proj.weight"].fill_(6e4))
    message = refused(states, dtype="float16")
    assert "layer 1 is not finite in float16; try --dtype bfloat16 or float32" in message
    assert Model.load(str(states), dtype="float32").name == "states"


def test_a_model_in_memory_is_checked_as_well() -> None:
    hf = build("llama").hf
    broken = type(hf)(hf.config)
    with torch.no_grad():
        broken.model.layers[0].self_attn.q_proj.weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match="1 weights that are not finite in model.layers.0.self_attn.q_proj.weight"):
        require_finite(broken, "broken")
    with pytest.raises(ModelError, match="not finite"):
        Model.from_hf(broken, tiny_tokenizer(), "broken")


FIELDS = {
    "num_hidden_layers": (0, 1, 2, 4, -1, "three", 2.5),
    "num_attention_heads": (1, 2, 3, 5, 0, -4, "many"),
    "num_key_value_heads": (1, 3, 4, 0, -1, 7),
    "hidden_size": (16, 31, 33, 64, 0, -32, "wide"),
    "intermediate_size": (0, 1, 47, 49, -5, 96),
    "vocab_size": (1, 10, 79, 81, 0, -1, 10**7),
    "model_type": ("qwen2", "gpt2", "", 7, "strange"),
    "hidden_act": ("relu6", "none", 3),
    "head_dim": (1, 3, 16, 0, -8),
    "rms_norm_eps": ("small", None, -1.0),
    "architectures": ([], ["Nothing"], 5),
    "torch_dtype": ("float99", 3),
    "rope_theta": ("far", 0),
    "max_position_embeddings": (0, -1, "long"),
    "tie_word_embeddings": (True, "perhaps"),
}


def mutate(path: Path, draw: random.Random) -> tuple[str, bool]:
    """One change of a folder; says which, and whether the folder still holds everything that its config asks for."""
    held = load_file(path / "model.safetensors")
    name = draw.choice(sorted(held))
    way = draw.choice(("drop", "rename", "reshape", "nan", "inf", "cut", "config", "config", "config", "text"))
    if way == "config":
        field = draw.choice(sorted(FIELDS))
        value = draw.choice(FIELDS[field])
        change(path, **{field: value})
        return f"{field}={value!r}", field not in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    if way == "cut":
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[: draw.randrange(len(content))])
        return "cut short", False
    if way == "text":
        (path / "config.json").write_text(draw.choice(("", "[]", "null", "{", '{"model_type": "llama"', "\x00\x01", "7")))
        return "config.json", False
    value = held.pop(name)
    if way == "rename":
        held[name + draw.choice((".old", "s", "_"))] = value
    elif way == "reshape":
        held[name] = draw.choice((value[:-1], value.flatten()[:-1], torch.cat([value, value]), value[None]))
    elif way in ("nan", "inf"):
        value.view(-1)[draw.randrange(value.numel())] = float(way)
        held[name] = value
    save_file({key: tensor.contiguous() for key, tensor in held.items()}, path / "model.safetensors", metadata={"format": "pt"})
    return f"{way} {name}", False


@pytest.mark.parametrize("seed", range(60))
def test_no_mutated_folder_loads_with_a_made_up_weight(tmp_path: Path, seed: int) -> None:
    """Each either loads with exactly the numbers of its file, or is refused in one line."""
    path = folder(tmp_path / "model", tied=bool(seed % 2))
    what, whole = mutate(path, random.Random(seed))
    try:
        model = Model.load(str(path))
    except EmosteerError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, what
        return
    assert whole, f"{what}: loaded"
    held, state = load_file(path / "model.safetensors"), model.hf.state_dict()
    tied = {"lm_head.weight"} if "lm_head.weight" not in held else set()
    assert held.keys() == state.keys() - tied and all(torch.equal(value, state[key]) for key, value in held.items()), what
    if tied:
        assert torch.equal(state["lm_head.weight"], held["model.embed_tokens.weight"]), what


def test_a_lack_in_one_of_several_shards_is_named(tmp_path: Path) -> None:
    hf = build("llama").hf
    hf.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "shards")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    shard = tmp_path / "shards" / table["weight_map"].pop(name)
    assert Model.load(str(tmp_path / "shards")).name == "shards", "an index that leaves a tensor out loses nothing that its shard holds"
    held = load_file(shard)
    held.pop(name)
    save_file(held, shard, metadata={"format": "pt"})
    index.write_text(json.dumps(table))
    assert f"its files lack {name}" in refused(tmp_path / "shards")


def test_a_gguf_file_that_lacks_a_layer_is_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It claims three layers and holds two; what is refused is not kept as if it were whole."""
    monkeypatch.setenv("EMOSTEER_CACHE", str(tmp_path / "cache"))
    count = gguf.GGUFWriter.add_block_count
    monkeypatch.setattr(gguf.GGUFWriter, "add_block_count", lambda self, n: count(self, n + 1))
    path = write_gguf(tmp_path / "short.gguf")
    for _ in range(2):
        assert "its files lack model.layers.2." in refused(path)
    monkeypatch.undo()
    monkeypatch.setenv("EMOSTEER_CACHE", str(tmp_path / "cache"))
    assert Model.load(str(write_gguf(tmp_path / "whole.gguf"))).shape.n_layers == 2
