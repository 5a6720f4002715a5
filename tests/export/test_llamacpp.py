"""Exports for llama.cpp: the files read back by the gguf package hold what the steered model adds, where the format says it acts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from emosteer.base.errors import ModelError, UsageError
from emosteer.circuits.circuit import Circuit
from emosteer.cli import main as cli
from emosteer.export import llamacpp
from emosteer.export.checkpoint import export_checkpoint
from emosteer.export.llamacpp import export_control_vector, export_gguf_model, paired_rows
from emosteer.export.vectors import ExportRequest
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.models.weights import resolve as weights
from tests.export.test_checkpoint import IDS, folder_of, random_circuit, steering
from tests.helpers.precision import forward_bound
from tests.models.test_weights import _byte_alphabet, write_gguf

PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")},
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMOSTEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def write_qwen2(path: Path) -> Path:
    """A random three-layer Qwen2 with grouped heads, biases, quantised matrices and an alignment of its own."""
    random = np.random.default_rng(0)
    tokens = ["<unk>", "<|im_start|>", "<|im_end|>", *_byte_alphabet(), "he", "ll"]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_custom_alignment(64)
    writer.add_block_count(3)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(20000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(7)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")

    def add(name: str, *shape: int) -> None:
        values = random.normal(0, 0.3, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), 64)
    add("output.weight", len(tokens), 64)
    add("output_norm.weight", 64)
    for block in range(3):
        for name, rows in {"attn_q": 64, "attn_k": 32, "attn_v": 32}.items():
            add(f"blk.{block}.{name}.weight", rows, 64)
            add(f"blk.{block}.{name}.bias", rows)
        for name, shape in {"attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}.items():
            add(f"blk.{block}.{name}.weight", *shape)
        add(f"blk.{block}.attn_norm.weight", 64)
        add(f"blk.{block}.ffn_norm.weight", 64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ExportRequest]:
    """A steering of a tiny model that came as a GGUF file."""
    root, made = tmp_path_factory.mktemp("ggufs"), {}

    def get(name: str) -> ExportRequest:
        if name not in made:
            path = write_gguf(root / "llama.gguf") if name == "llama" else write_qwen2(root / "qwen2.gguf")
            found = weights.resolve(str(path))
            random_circuit(AutoModelForCausalLM.from_pretrained(found.path), found.sha256).save(root / f"{name}.circuit")
            made[name] = ExportRequest(found, Circuit.load(root / f"{name}.circuit"), root / f"{name}.circuit", "anger", 0.4)
        return made[name]

    return get


@torch.no_grad()
def steered(found: ExportRequest, sites: Callable[[dict[Site, Tensor]], dict[Site, Tensor]] = lambda v: v) -> Tensor:
    """Logits of the built-in engine when it adds the circuit's vectors (or what `sites` makes of them) at every position."""
    model = Model.load(str(found.model.path), device="cpu", dtype="float32")
    e = found.circuit.index(found.emotion)
    vectors = sites({site: found.strength * value[e] for site, value in found.circuit.steering(model).items()})
    return model.logits(model.run(IDS, {site: (lambda x, v=value: x + v) for site, value in vectors.items()}, bridge=False))


@torch.no_grad()
def logits_of_gguf(path: Path) -> Tensor:
    """What llama.cpp's `llama` architecture computes of a file, as a Hugging Face Llama whose weights are set by hand."""
    reader = gguf.GGUFReader(path)
    key = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    values = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(values["token_embd.weight"]),
            hidden_size=key["embedding_length"],
            intermediate_size=key["feed_forward_length"],
            num_hidden_layers=key["block_count"],
            num_attention_heads=key["attention.head_count"],
            num_key_value_heads=key["attention.head_count_kv"],
            rms_norm_eps=key["attention.layer_norm_rms_epsilon"],
            rope_parameters={"rope_type": "default", "rope_theta": key["rope.freq_base"]},
            attention_bias=True,
            mlp_bias=True,
        )
    )
    d_head = key["embedding_length"] // key["attention.head_count"]
    state = {"model.embed_tokens.weight": values["token_embd.weight"], "model.norm.weight": values["output_norm.weight"]}
    state["lm_head.weight"] = values.get("output.weight", values["token_embd.weight"])
    for layer in range(key["block_count"]):
        for part, name in PARTS.items():
            for end in ("weight", "bias"):
                value = values.get(f"blk.{layer}.{part}.{end}")
                if value is not None and part in ("attn_q", "attn_k"):
                    # rows 2 i and 2 i + 1 of a head turn together there, rows i and i + d_head / 2 here
                    order = [h + r for h in range(0, len(value), d_head) for r in [*range(0, d_head, 2), *range(1, d_head, 2)]]
                    value = value[order]
                if value is not None:
                    state[f"model.layers.{layer}.{name}.{end}"] = value
    lacking = model.load_state_dict(state, strict=False).missing_keys
    for name in lacking:
        assert name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "gate_proj.bias", "up_proj.bias")), name
        model.get_parameter(name).zero_()
    return model.eval()(IDS).logits


# ---- a GGUF model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_gguf_model_with_biases_is_the_steered_model(ggufs: Any, tmp_path: Path, name: str) -> None:
    found = ggufs(name)
    facts = export_gguf_model(found, tmp_path / "out.gguf")
    expected, written = steered(found), logits_of_gguf(tmp_path / "out.gguf")
    assert (written - expected).abs().max() <= forward_bound(expected)
    assert (steered(found, lambda v: {}) - expected).abs().max() > 0.1
    assert facts["architecture"] == name and facts["biases"] == 2 * found.circuit.z_delta.shape[1]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_metadata_and_tensors_are_the_source_s(ggufs: Any, tmp_path: Path, name: str) -> None:
    found = ggufs(name)
    export_gguf_model(found, tmp_path / "out.gguf")
    before, after = gguf.GGUFReader(found.model.reference), gguf.GGUFReader(tmp_path / "out.gguf")
    assert after.get_field("general.architecture").contents() == "llama"
    own = {key for key in after.fields if key.startswith("emosteer.")}
    assert after.get_field("emosteer.emotion").contents() == "anger" and after.get_field("emosteer.strength").contents() == pytest.approx(
        0.4
    )
    renamed = {key.replace("qwen2.", "llama.", 1) if key.startswith("qwen2.") else key: field for key, field in before.fields.items()}
    assert set(after.fields) - own == set(renamed)
    for key, field in renamed.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            assert (after.get_field(key).contents(), after.get_field(key).types) == (field.contents(), field.types), key
    old, new = ({t.name: t for t in reader.tensors} for reader in (before, after))
    added = new.keys() - old.keys()
    assert added == {f"blk.{n}.{part}.bias" for n in range(found.circuit.z_delta.shape[1]) for part in ("attn_output", "ffn_down")}
    for key, tensor in old.items():
        assert new[key].tensor_type == tensor.tensor_type and new[key].shape.tolist() == tensor.shape.tolist()
        if name == "llama" or ".attn_q." not in key and ".attn_k." not in key:
            assert np.array_equal(new[key].data, tensor.data), key
        else:  # the same quantised rows in another order
            assert sorted(row.tobytes() for row in new[key].data) == sorted(row.tobytes() for row in tensor.data)
    assert all(t.data_offset % (64 if name == "qwen2" else 32) == 0 for t in after.tensors)


def test_biases_of_the_file_s_own_are_added_to(ggufs: Any, tmp_path: Path) -> None:
    found = ggufs("llama")
    export_gguf_model(found, tmp_path / "once.gguf")
    once = replace(found, model=replace(found.model, reference=str(tmp_path / "once.gguf")))
    export_gguf_model(once, tmp_path / "twice.gguf")
    one, two = ({t.name: t.data for t in gguf.GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("once", "twice"))
    name = "blk.1.ffn_down.bias"
    assert np.abs(one[name]).max() > 0.1 and np.allclose(two[name], 2 * one[name])


def test_rows_are_paired_head_by_head() -> None:
    rows = np.arange(12)[:, None] * np.ones(2)
    assert paired_rows(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


# ---- a control vector --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_control_vector_holds_what_each_layer_adds(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, name)
    found = steering(folder)
    facts = export_control_vector(found, tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector" and fields["controlvector.model_hint"] == name
    assert fields["controlvector.layer_count"] == 2 and facts["layers"] == [1, 2]
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.2"]  # llama.cpp has none for layer 0
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 and t.data.shape == (32,) for t in reader.tensors)
    model = Model.load(str(folder), device="cpu", dtype="float32")
    vectors = {(s.layer, s.kind): 0.7 * v[1] for s, v in found.circuit.steering(model).items()}
    last = vectors[2, "attn_out"] + vectors[2, "mlp_out"]
    first = vectors[1, "mlp_out"] + vectors[0, "attn_out"] + vectors[0, "mlp_out"]  # no head of layer 1 is in this circuit
    torch.testing.assert_close(torch.from_numpy(reader.tensors[1].data.copy()), last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(reader.tensors[0].data.copy()), first, rtol=1e-5, atol=1e-5)


def divergence(first: Tensor, second: Tensor) -> float:
    """Mean KL divergence of next-token distributions, in nats."""
    p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_the_approximation_is_exact_for_late_mlp_vectors_and_measured_for_all(tmp_path: Path) -> None:
    """After a layer, what its MLP adds is added exactly; what its attention adds comes late, which is measured."""
    folder = folder_of(tmp_path, "llama")
    found = steering(folder, strength=0.3)

    def form(vectors: dict[Site, Tensor]) -> dict[Site, Tensor]:
        after = llamacpp.residual_form(vectors, 3, 32)
        return {Site(layer, "resid_post"): vector for layer, vector in enumerate(after, 1)}

    def only(vectors: dict[Site, Tensor]) -> dict[Site, Tensor]:
        return {site: v for site, v in vectors.items() if site.layer and site.kind == "mlp_out"}

    exact = steered(found, only), steered(found, lambda v: form(only(v)))
    torch.testing.assert_close(exact[0], exact[1], rtol=1e-4, atol=1e-4)
    plain, circuit, vector = steered(found, lambda v: {}), steered(found), steered(found, form)
    effect, error = divergence(circuit, plain), divergence(circuit, vector)
    print(f"the circuit moves the next token by {effect:.3f} nats; its control vector is {error:.3f} nats from it ({error / effect:.0%})")
    assert effect > 0.1 and error > 1e-3  # three random layers are the worst case; a real model is in docs/EXPORT.md


# ---- errors and the command line -------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_said(ggufs: Any, tmp_path: Path) -> None:
    plain = steering(folder_of(tmp_path, "llama"))
    with pytest.raises(ModelError, match="did not come as a GGUF.*--to checkpoint.*convert_hf_to_gguf"):
        export_gguf_model(plain, tmp_path / "out.gguf")
    gemma = tmp_path / "gemma"
    gemma.mkdir()
    (gemma / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="no control vector.*gemma3_text; expected one of llama"):
        export_control_vector(replace(plain, model=replace(plain.model, path=gemma)), tmp_path / "out.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma3")
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    llamacpp._write(writer)
    other = replace(ggufs("llama"), model=replace(ggufs("llama").model, reference=str(tmp_path / "other.gguf")))
    with pytest.raises(ModelError, match="no place for the biases in gemma3; .* llama, qwen2"):
        export_gguf_model(other, tmp_path / "out.gguf")
    (tmp_path / "cut.gguf").write_bytes(Path(ggufs("llama").model.reference).read_bytes()[:200])
    cut = replace(other, model=replace(other.model, reference=str(tmp_path / "cut.gguf")))
    with pytest.raises(ModelError, match="cannot read"):
        export_gguf_model(cut, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists() and not list(tmp_path.glob(".*"))


def test_a_failed_write_leaves_nothing(ggufs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.gguf").write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists; add --force"):
        export_gguf_model(ggufs("llama"), tmp_path / "out.gguf")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", stop)
    with pytest.raises(KeyboardInterrupt):
        export_gguf_model(ggufs("llama"), tmp_path / "out.gguf", force=True)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("out.gguf", b"mine")]


def test_the_command_writes_both(ggufs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ggufs("qwen2")
    common = [
        "export",
        "-m",
        found.model.reference,
        "--circuit",
        str(found.path),
        "-e",
        "anger",
        "--strength",
        "0.4",
        "--out",
        str(tmp_path),
    ]
    for to, name in (("gguf", "qwen2-anger-vector.gguf"), ("gguf-model", "qwen2-anger.gguf")):
        with pytest.raises(SystemExit) as stop:
            cli.main([*common, "--to", to, "--json"])
        out = capsys.readouterr().out
        assert stop.value.code == 0 and json.loads(out)["out"] == str(tmp_path / name) and (tmp_path / name).is_file()
        with pytest.raises(SystemExit):
            cli.main([*common, "--to", to, "--force"])
        assert "the prompt's tokens too" in capsys.readouterr().out


def test_a_checkpoint_of_a_gguf_file_is_the_same_model(ggufs: Any, tmp_path: Path) -> None:
    found = ggufs("qwen2")
    export_checkpoint(found, tmp_path / "out")
    export_gguf_model(found, tmp_path / "out.gguf")
    with torch.no_grad():
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(IDS).logits
    assert (written - logits_of_gguf(tmp_path / "out.gguf")).abs().max() <= forward_bound(written)
