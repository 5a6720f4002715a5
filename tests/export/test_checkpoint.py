"""Exports: the folder, loaded by plain transformers, is the steered model; nothing half written; memory does not grow with the model."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from emosteer.base.artifacts import Provenance
from emosteer.base.errors import ArtifactError, EmosteerError, ModelError, UsageError
from emosteer.circuits.circuit import Circuit
from emosteer.cli import main as cli
from emosteer.export import checkpoint, tensors
from emosteer.export.checkpoint import export_checkpoint
from emosteer.export.vectors import ExportRequest, compiled
from emosteer.generation.steering import SteeringPlan
from emosteer.models.model import Model
from emosteer.models.weights import resolve as weights
from tests.conftest import SIZES, build, tiny_tokenizer
from tests.helpers.precision import forward_bound
from tests.helpers.whole_artefacts import dial

EMOTIONS = ("anger", "sadness")
IDS = torch.tensor([[1, 7, 9, 12, 30, 41, 22, 5], [1, 8, 20, 15, 33, 5, 60, 2]])
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def hf_model(name: str) -> Any:
    """A random model: "llama", "qwen2", "tied" (one matrix at both ends), "biased" (a Llama with biases of its own and scaled rope)
    or "mistral" (head size of its own)."""
    if name in ("llama", "qwen2"):
        return build(name).hf
    torch.manual_seed(0)
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, head_dim=12, sliding_window=None)).eval()
    if name == "tied":
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    config = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, rope_parameters={**ROPE, "original_max_position_embeddings": 64})
    model = LlamaForCausalLM(config).eval()
    for part, parameter in model.named_parameters():
        if part.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_circuit(hf: Any, sha256: str) -> Circuit:
    """A circuit of random contrasts in a third of the units; none in layer 1's heads."""
    config, draw = hf.config, torch.Generator().manual_seed(1)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    d_head = hf.model.layers[0].self_attn.o_proj.in_features // heads
    chosen = torch.rand(2, layers, heads, generator=draw) < 1 / 2
    chosen[:, 1] = False
    z = torch.randn(2, layers, heads, d_head, generator=draw) * chosen[..., None]
    neurons = (torch.rand(2, layers, config.intermediate_size, generator=draw) < 1 / 3).nonzero()
    return Circuit(
        emotions=EMOTIONS,
        heads=chosen,
        z_delta=z.flatten(2),
        neuron_index=neurons,
        neuron_delta=torch.randn(len(neurons), generator=draw),
        strength=torch.tensor([0.5, 0.75]),
        importance=torch.ones(2, layers, 2),
        vectors=torch.zeros(2, layers, config.hidden_size),
        rms=torch.ones(layers),
        residual_layers=(),
        residual_strength=1.0,
        d_mlp=config.intermediate_size,
        preset="test",
        instruction="",
        metrics={"calibration": dial(EMOTIONS)},
        provenance=Provenance("tiny", sha256, "", "test"),
    )


def folder_of(root: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model as a folder, and its circuit beside it."""
    folder = root / name
    hf = hf_model(name).to(dtype)
    hf.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    random_circuit(hf, weights.resolve(str(folder)).sha256).save(root / f"{name}.circuit")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMOSTEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = folder_of(root, name)
        return made[name]

    return get


def steering(folder: Path, strength: float = 0.7, emotion: str = "sadness") -> ExportRequest:
    path = folder.parent / f"{folder.name}.circuit"
    return ExportRequest(weights.resolve(str(folder)), Circuit.load(path), path, emotion, strength)


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, from however many files."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@torch.no_grad()
def logits(folder: Path, dtype: Any = torch.float32) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(IDS).logits


@torch.no_grad()
def steered_logits(folder: Path, emotion: str, strength: float) -> Tensor:
    """What the built-in engine computes when it steers every position."""
    model = Model.load(str(folder), device="cpu", dtype="float32")
    found = Circuit.load(folder.parent / f"{folder.name}.circuit", model)
    row = found.index(emotion)
    plan = SteeringPlan({site: strength * value[row : row + 1] for site, value in found.steering(model).items()}, 1)
    edits = {site: (lambda x, v=value: x + v) for site, value in plan.vectors.items()}
    return model.logits(model.run(IDS, edits, bridge=False))


# ---- the folder is the steered model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "tied", "biased", "mistral"])
def test_plain_transformers_computes_what_the_steered_model_computes(folders: Any, tmp_path: Path, name: str) -> None:
    folder = folders(name)
    export_checkpoint(steering(folder), tmp_path / "out")
    expected, plain = steered_logits(folder, "sadness", 0.7), logits(folder)
    found = logits(tmp_path / "out")
    print(f"{name}: largest difference {(found - expected).abs().max():.1e} of logits up to {expected.abs().max():.1f}")
    assert (found - expected).abs().max() <= forward_bound(expected)
    assert (plain - expected).abs().max() > 0.5  # and steering does something


@pytest.mark.parametrize("name", ["llama", "qwen2", "biased"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strength_zero_is_the_original(folders: Any, tmp_path: Path, name: str, dtype: str) -> None:
    """Its weights bit for bit; its logits up to the order of sums, which is another with a bias and at another place in memory."""
    folder = folders(name)
    export_checkpoint(steering(folder, strength=0.0), tmp_path / "out", precision=dtype)
    kind = getattr(torch, dtype)
    before, after = stored(folder), stored(tmp_path / "out")
    assert all(torch.equal(after.pop(part), value.to(kind)) for part, value in before.items())
    assert not any(value.any() for value in after.values()), "what is new adds nothing"
    expected = logits(folder, kind)
    assert (logits(tmp_path / "out", kind) - expected).abs().max() <= forward_bound(expected)


def test_no_weight_is_changed_and_the_biases_are_the_compiled_vectors(folders: Any, tmp_path: Path) -> None:
    folder = folders("qwen2")
    facts = export_checkpoint(steering(folder), tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    added = {name: value for name, value in after.items() if name not in before}
    model = Model.load(str(folder), device="cpu", dtype="float32")
    vectors = Circuit.load(folder.parent / "qwen2.circuit").steering(model)
    for layer in range(3):
        for kind, part in (("attn_out", "self_attn.o_proj"), ("mlp_out", "mlp.down_proj")):
            found = added.pop(f"model.layers.{layer}.{part}.bias")
            site = next((s for s in vectors if (s.layer, s.kind) == (layer, kind)), None)
            expected = 0.7 * vectors[site][1] if site else torch.zeros(32)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(added) == 6 and not any(value.any() for value in added.values())  # gate and up
    assert facts["bias_rounding"] == 0


def test_the_source_precision_is_kept_and_rounding_is_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama", torch.bfloat16)
    facts = export_checkpoint(steering(folder), tmp_path / "out")
    after = load_file(tmp_path / "out/model.safetensors")
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[name], value) for name, value in load_file(folder / "model.safetensors").items())
    assert 0 < facts["bias_rounding"] < 2**-8 and facts["dtype"] == "bfloat16"
    wide = export_checkpoint(steering(folder), tmp_path / "wide", precision="float32")
    assert wide["bias_rounding"] == 0 and wide["bytes"] == 2 * facts["bytes"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto").dtype == torch.float32


def test_tokenizer_template_and_settings_come_along(folders: Any, tmp_path: Path) -> None:
    folder = folders("qwen2")
    export_checkpoint(steering(folder), tmp_path / "out")
    talk = [{"role": "user", "content": "we waited nine weeks ."}]
    ids = [AutoTokenizer.from_pretrained(where).apply_chat_template(talk, return_dict=False) for where in (folder, tmp_path / "out")]
    assert ids[0] == ids[1] and len(ids[0]) > 5
    assert (tmp_path / "out/generation_config.json").read_text() == (folder / "generation_config.json").read_text()
    card = (tmp_path / "out/README.md").read_text()
    found = steering(folder)
    for fact in (found.model.sha256, found.facts()["circuit_sha256"], "sadness", "0.7", "Licence", "Qwen2 rewritten as Llama", "positions"):
        assert fact in card, fact
    assert json.loads((tmp_path / "out/emosteer_export.json").read_text())["strength"] == 0.7


def test_emosteer_itself_takes_the_folder_as_a_model(folders: Any, tmp_path: Path) -> None:
    export_checkpoint(steering(folders("qwen2")), tmp_path / "out", shard_size=20_000)
    model = Model.load(str(tmp_path / "out"), device="cpu", dtype="float32")
    expected = logits(tmp_path / "out")
    assert (model.logits(model.run(IDS)) - expected).abs().max() <= forward_bound(expected)


# ---- sharding and memory ---------------------------------------------------------------------------------------------


def test_small_shards_hold_the_same(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders("biased")
    monkeypatch.setattr(tensors, "PIECE", 1000)  # pieces of a few rows
    whole, split = tmp_path / "whole", tmp_path / "split"
    export_checkpoint(steering(folder), whole)
    facts = export_checkpoint(steering(folder), split, shard_size=20_000)
    files = sorted(split.glob("model-*.safetensors"))
    assert len(files) == facts["shards"] > 3 and not (split / "model.safetensors").exists()
    assert all(file.stat().st_size < 20_000 + 4_000 for file in files)
    index = json.loads((split / "model.safetensors.index.json").read_text())
    together = {}
    for file in files:
        part = load_file(file)
        assert set(part) == {name for name, where in index["weight_map"].items() if where == file.name}
        together |= part
    expected = load_file(whole / "model.safetensors")
    assert together.keys() == expected.keys() and all(torch.equal(together[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values()) == facts["bytes"]
    assert (logits(split) - logits(whole)).abs().max() <= forward_bound(logits(whole)), "and is read as the same"


def test_a_sharded_source_is_read(folders: Any, tmp_path: Path) -> None:
    folder = folders("qwen2")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "qwen2", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "qwen2")
    assert len(list((tmp_path / "qwen2").glob("*.safetensors"))) > 3
    found = weights.resolve(str(tmp_path / "qwen2"))
    path = folder.parent / "qwen2.circuit"
    export_checkpoint(ExportRequest(found, Circuit.load(path), path, "sadness", 0.7), tmp_path / "out")
    export_checkpoint(steering(folder), tmp_path / "expected")
    found, expected = stored(tmp_path / "out"), stored(tmp_path / "expected")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_no_more_than_a_piece_of_the_model_is_in_memory(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of weights comes through `read_bytes`; the live ones are counted."""
    folder = folders("llama")
    live, peak, read = 0, 0, 0
    real = tensors.read_bytes

    class Counted(bytearray):
        pass

    def counting(opened: Any, size: int) -> bytearray:
        nonlocal live, peak, read
        data = Counted(real(opened, size))
        live, read = live + size, read + size
        peak = max(peak, live)

        def gone(size: int = size) -> None:
            nonlocal live
            live -= size

        weakref.finalize(data, gone)
        return data

    monkeypatch.setattr(tensors, "read_bytes", counting)
    monkeypatch.setattr(tensors, "PIECE", 2048)
    facts = export_checkpoint(steering(folder), tmp_path / "out", shard_size=30_000)
    assert read > facts["bytes"] and facts["shards"] > 2
    assert 0 < peak <= 2 * 2048 and live == 0  # one piece being used, one being read


# ---- errors and interruptions ----------------------------------------------------------------------------------------


def test_an_interrupted_export_leaves_nothing(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = folders("llama"), tmp_path / "out"
    export_checkpoint(steering(folder, emotion="anger"), out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    real, calls = tensors.read_bytes, 0

    def stops(opened: Any, size: int) -> bytearray:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise KeyboardInterrupt
        return real(opened, size)

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "read_bytes", stops)
        for where, force in ((tmp_path / "new", False), (out, True)):
            calls = 0
            with pytest.raises(KeyboardInterrupt):
                export_checkpoint(steering(folder), where, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the earlier export is whole, the new one nowhere
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_a_full_disk_is_one_line(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "_write", full)
    with pytest.raises(EmosteerError, match="disk is full"):
        export_checkpoint(steering(folders("llama")), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(EmosteerError, match="the disk has 0 MB; free some space"):
        export_checkpoint(steering(folders("llama")), tmp_path / "out")


def test_what_is_there_is_not_overwritten(folders: Any, tmp_path: Path) -> None:
    folder, out = folders("llama"), tmp_path / "out"
    out.mkdir()
    export_checkpoint(steering(folder), out)  # an empty folder is fine
    with pytest.raises(UsageError, match="earlier export; add --force"):
        export_checkpoint(steering(folder), out)
    export_checkpoint(steering(folder, emotion="anger"), out, force=True)
    assert json.loads((out / "emosteer_export.json").read_text())["emotion"] == "anger"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UsageError, match="no export of emosteer"):
            export_checkpoint(steering(folder), mine, force=force)
    with pytest.raises(UsageError, match="found the file"):
        export_checkpoint(steering(folder), mine / "thesis.txt", force=True)


def test_models_that_cannot_carry_biases_are_refused_with_those_that_can(folders: Any, tmp_path: Path) -> None:
    build("gemma3").hf.save_pretrained(tmp_path / "gemma")
    found = replace(steering(folders("llama")), model=replace(weights.resolve(str(folders("llama"))), path=tmp_path / "gemma"))
    with pytest.raises(ModelError, match="Gemma3ForCausalLM has no place.*Llama, Qwen2/2.5 and Mistral"):
        export_checkpoint(found, tmp_path / "out")
    for name, settings in {
        "mistral": {"sliding_window": 64},
        "qwen2": {
            "sliding_window": 64,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    }.items():
        copied = tmp_path / name
        copied.mkdir()
        for file in folders(name).iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps({**config, **settings}))
        with pytest.raises(ModelError, match="sliding windows.*Llama, Qwen2/2.5"):
            export_checkpoint(replace(found, model=replace(found.model, path=copied)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_and_foreign_weights_are_refused(folders: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "copy"
    folder.mkdir()
    for file in folders("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    found = replace(steering(folders("llama")), model=replace(weights.resolve(str(folder)), path=folder))
    good = load_file(folders("llama") / "model.safetensors")

    def refused(values: dict[str, Tensor], message: str) -> None:
        save_file(values, folder / "model.safetensors")
        with pytest.raises(EmosteerError, match=message):
            export_checkpoint(found, tmp_path / "out")

    refused({k: v for k, v in good.items() if "layers.2.mlp.up_proj" not in k}, "lacks 1 weights.*layers.2.mlp.up_proj")
    refused({**good, "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, "no place for.*q_norm")
    refused({**good, "model.layers.0.mlp.up_proj.weight": torch.ones(48, 32).to(torch.int8)}, "found .*up_proj.weight in I8")
    refused({**good, "model.layers.0.mlp.down_proj.weight": torch.ones(32, 47)}, "width 47.*another model")
    save_file({**good, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    export_checkpoint(found, tmp_path / "buffers")  # what old checkpoints carry is left out
    assert "rotary" not in str(load_file(tmp_path / "buffers/model.safetensors").keys())
    save_file({**good, "model.norm.weight": torch.full((32,), 1e30)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="model.norm.weight holds values too large for float16"):
        export_checkpoint(found, tmp_path / "out", precision="float16")
    (folder / "model.safetensors").write_bytes((folders("llama") / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged.*cut short"):
        export_checkpoint(found, tmp_path / "out")
    with pytest.raises(ArtifactError, match="not finite"):
        compiled(tensors.stored_tensors(folders("llama")), steering(folders("llama"), strength=3e38))
    assert not (tmp_path / "out").exists()


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", *arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def test_the_command_resolves_strength_as_generate_does(folders: Any, tmp_path: Path, run: Any) -> None:
    folder = folders("llama")
    common = ["--model", str(folder), "--circuit", str(folder.parent / "llama.circuit"), "--json"]
    for index, (asked, strength) in enumerate(((["--intensity", "75"], 1.5), (["--strength", "0.25"], 0.25), ([], 0.5))):
        code, out, err = run("--emotion", "anger", "--out", str(tmp_path / f"o{index}"), *asked, *common)
        assert code == 0, err
        facts = json.loads(out)
        assert facts["strength"] == pytest.approx(strength) and facts["emotion"] == "anger" and facts["dtype"] == "float32"
        expected = steered_logits(folder, "anger", facts["strength"])
        assert (logits(tmp_path / f"o{index}") - expected).abs().max() <= forward_bound(expected)
    code, out, err = run("--emotion", "anger", "--out", str(tmp_path / "o3"), *common[:-1])
    assert code == 0 and "vllm serve" in out and str(tmp_path / "o3") in out


def test_bad_requests_are_one_line(folders: Any, tmp_path: Path, run: Any) -> None:
    folder = folders("llama")
    common = ["--model", str(folder), "--circuit", str(folder.parent / "llama.circuit"), "--out", str(tmp_path / "out")]
    cases = {
        ("--emotion", "joy"): (2, "unknown emotion 'joy'"),
        ("--emotion", "all"): (2, "expected one emotion, found 2"),
        ("--emotion", "anger", "--to", "gguff"): (2, "did you mean 'gguf'"),
        ("--emotion", "anger", "--strength", "nan"): (2, "--strength"),
        ("--emotion", "anger", "--strength", "1", "--intensity", "5"): (2, "found both"),
        ("--emotion", "anger", "--intensity", "101"): (2, "intensity"),
        ("--emotion", "anger", "--dtype", "int8"): (2, "unknown dtype"),
        ("--emotion", "anger", "--to", "gguf", "--dtype", "float16"): (2, "no meaning with --to gguf"),
        ("--emotion", "anger", "--shard-size", "2XB"): (2, "expected --shard-size such as"),
        ("--emotion", "anger", "--circuit", "none.safetensors"): (1, "does not exist"),
    }
    for arguments, (expected, message) in cases.items():
        code, out, err = run(*common, *arguments)
        assert (code, out) == (expected, ""), (arguments, err)
        assert message in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    assert not (tmp_path / "out").exists()
    other = folders("qwen2")
    code, _, err = run("--model", str(other), *common[2:], "--emotion", "anger")
    assert code == 1 and "not for qwen2" in err


@pytest.mark.parametrize(
    ("name", "value"),
    [("shape", None), ("shape", [32, 31]), ("shape", [-1, 32]), ("dtype", 7), ("data_offsets", [8]), ("data_offsets", [64, 0])],
)
def test_a_header_that_makes_no_sense_is_one_line(folders: Any, tmp_path: Path, name: str, value: Any) -> None:
    data = (folders("llama") / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header["model.layers.1.mlp.up_proj.weight"]
    entry[name] = value
    if value is None:
        del entry[name]
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ModelError, match="model.safetensors is damaged or no safetensors file"):
        tensors.stored_tensors(tmp_path)
