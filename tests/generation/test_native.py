"""The compiled step computes what torch computes, at sizes that fill no vector, and is done without wherever it cannot be had."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from emosteer.generation import lean_forward as lean
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request, generate
from emosteer.generation.kv_cache import RowCache
from emosteer.generation.lean_forward import Lean, lean_of
from emosteer.generation.native import build
from emosteer.generation.native import step as native
from emosteer.generation.prefix_tree import pack
from emosteer.models.model import Model
from tests.conftest import SIZES, tiny_tokenizer

pytestmark = pytest.mark.skipif(build.library() is None, reason="nothing here compiles the step")
#: The second form is what processors without AVX-512 run.
FORMS = {"widest": (), "avx2": ("-mno-avx512f",)}


@pytest.fixture(scope="module", params=list(FORMS))
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The functions compiled in one of their forms."""
    compiler, path = build._compiler(), tmp_path_factory.mktemp("native") / f"{request.param}.so"
    assert compiler is not None
    build.build(path, compiler, FORMS[request.param])
    compiled = ctypes.CDLL(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", lambda: compiled)
        native._panel.cache_clear()
        yield
    native._panel.cache_clear()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def linears(depth: int, widths: tuple[int, ...], biased: tuple[bool, ...]) -> list[nn.Linear]:
    made = [nn.Linear(depth, width, bias=bias).requires_grad_(False) for width, bias in zip(widths, biased, strict=True)]
    for index, linear in enumerate(made):
        linear.weight.copy_(draw(*linear.weight.shape, seed=index))
        if linear.bias is not None:
            linear.bias.copy_(draw(len(linear.bias), seed=9))
    return made


# ---- each function ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "widths", "biased"), [(130, (50, 7, 49), (True, False, True)), (64, (48,), (False,)), (5, (1, 2), (False,) * 2)]
)
def test_linear_layers(form: None, depth: int, widths: tuple[int, ...], biased: tuple[bool, ...]) -> None:
    layers = linears(depth, widths, biased)
    compiled = native.Linears(layers)
    one = draw(1, depth)
    expected = torch.cat([layer(one) for layer in layers], dim=-1)
    assert close(compiled(one), expected), "a single row needs no panels"
    compiled.pack(torch.full((compiled.size,), torch.nan))
    for rows, count in itertools.product((1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 70), (1, 2, 3)):
        torch.set_num_threads(count)
        inputs = draw(rows, depth)
        found = compiled(inputs)
        assert close(found, torch.cat([layer(inputs) for layer in layers], dim=-1)), (rows, count)
        assert torch.equal(found[:1], compiled(inputs[:1].contiguous())), "neighbours change nothing"


def test_norms_gates_and_rotations(form: None) -> None:
    for rows, width in ((1, 16), (5, 37), (3, 5), (40, 96)):
        states, weight = draw(rows, width), draw(width)
        assert close(native.norm(states, weight, 1e-5), functional.rms_norm(states, (width,), weight, 1e-5))
        opened, values = 30 * draw(rows, width), draw(rows, width, seed=1)
        expected = functional.silu(opened.double()) * values
        found = native.gate(opened.clone(), values)
        assert ((found - expected).abs() <= 1e-6 * expected.abs() + 1e-30).all(), "over many orders of magnitude"
    heads, angles = draw(6, 5, 10), (draw(6, 1, 10), draw(6, 1, 10, seed=1))
    turned = heads.clone()
    native.rotate(turned, 3, angles)
    assert close(turned[:, :3], heads[:, :3] * angles[0] + heads[:, :3].roll(5, -1) * angles[1])
    assert torch.equal(turned[:, 3:], heads[:, 3:])


@pytest.mark.parametrize(("n_heads", "n_kv_heads", "size"), [(6, 2, 64), (5, 1, 10), (3, 3, 24), (18, 2, 70)])
def test_attention_within_prompts_that_share_their_beginnings(form: None, n_heads: int, n_kv_heads: int, size: int) -> None:
    prompts = [tuple(range(40)), (0, 1, 2, 9), (0, 1, 2), (5,), (0, 1, 2, 3, 4, 99, 98, 97)]
    packed = pack(prompts, 40, torch.device("cpu"))
    states = draw(len(packed.tokens), n_heads + 2 * n_kv_heads, size)
    queries, keys, values = states.split((n_heads, n_kv_heads, n_kv_heads), dim=1)
    found = native.read(queries, n_kv_heads, packed, 0.3)
    for row, prompt in enumerate(prompts):
        nodes = packed.rows[row, 40 - len(prompt) :]
        q, k, v = (part[nodes].transpose(0, 1)[None] for part in (queries, keys, values))
        expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        assert close(found[nodes], expected[0].transpose(0, 1).reshape(len(prompt), -1))


# ---- the step --------------------------------------------------------------------------------------------------------------


def odd_model() -> Model:
    """No size is a multiple of a vector's; every layer has biases and norms of its own."""
    torch.manual_seed(1)
    sizes = {**SIZES, "hidden_size": 42, "intermediate_size": 75, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
    hf = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True))
    for name, parameter in hf.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return Model.from_hf(hf, tiny_tokenizer(), "odd")


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 7, 20])
def test_a_step_is_torchs_step(form: None, rows: int) -> None:
    """Rows of different lengths, one layer steered after attention, one after the MLP, the rest not at all."""
    model = odd_model()
    made = Lean(model)
    compiled = native.NativeStep(model)
    assert compiled.takes(1) and not compiled.takes(2)
    lengths = [1 + row % 5 for row in range(rows)]
    tokens, positions = torch.arange(rows) % 50, torch.tensor(lengths)
    added: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * model.shape.n_layers
    added[0], added[-1] = (draw(rows, 42), None), (None, draw(rows, 42, seed=1))

    def run(way: native.NativeStep | None) -> tuple[Tensor, Tensor]:
        cache = RowCache(model.shape, lengths, 3, model.device, model.dtype)
        cache.block.copy_(draw(*cache.block.shape))
        made.native = way
        for _ in range(2):  # the second step reads what the first one wrote
            hidden = made.step(tokens, positions, cache, added)
        return made.logits(hidden), cache.block

    expected = run(None)
    if rows == 1:
        assert all(close(*pair, 1e-5) for pair in zip(run(compiled), expected, strict=True)), "with the weights as they are"
    else:
        with pytest.raises(AssertionError):
            compiled.head(draw(rows, 42))
    compiled.pack()
    assert all(close(*pair, 1e-5) for pair in zip(run(compiled), expected, strict=True))


@torch.no_grad()
def test_prompts_are_read_as_torch_reads_them_and_alike_in_any_company(form: None) -> None:
    model = odd_model()
    made, compiled = Lean(model), native.NativeStep(model)
    compiled.pack()
    prompts = [tuple(range(3, 20)), (3, 4, 5, 6, 30, 31), (3, 4, 5), (9, 8)]

    def read(some: list[tuple[int, ...]], way: native.NativeStep | None, known: int = 0) -> list[Tensor]:
        """Of each prompt [layer, 2, position, head, d_head]; known: how many tokens of the first one are taken from a reading of it."""
        made.native, kept = way, list[Tensor]()
        packed = pack(some, 20, torch.device("cpu"), [some[0][:known]] if known else [])
        before = read(some[:1], way)[0][:, :, :known] if known else None
        made.native = way
        made.read(packed, lambda _, *states: kept.append(torch.stack(states)), before)
        return [torch.stack(kept)[:, :, packed.rows[row, 20 - len(prompt) :]] for row, prompt in enumerate(some)]

    expected = read(prompts, None)
    for count in (1, 2):
        torch.set_num_threads(count)
        found = read(prompts, compiled)
        assert all(close(*pair, 1e-5) for pair in zip(found, expected, strict=True))
        for row, prompt in enumerate(prompts):
            assert torch.equal(read([prompt], compiled)[0], found[row]), "neighbours change nothing"
        for known in (1, 3, 16):
            assert all(map(torch.equal, read(prompts, compiled, known), found)), known
            assert all(close(*pair, 1e-5) for pair in zip(read(prompts, None, known), expected, strict=True))


def test_many_tokens_are_left_to_torch_where_its_products_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = native.NativeStep(odd_model())
    assert compiled.reads(1) and not compiled.reads(2), "its weights are not laid out yet"
    compiled.pack()
    for slow in (True, False):
        monkeypatch.setattr(native, "_torch_is_slow", lambda slow=slow: slow)
        assert compiled.reads(native.READ_ROWS) and compiled.reads(native.READ_ROWS + 1) == slow


# ---- doing without ---------------------------------------------------------------------------------------------------------


def requests() -> list[Request]:
    return [Request(str(row), (1, 7, 9 + row)) for row in range(3)]


def test_a_step_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    expected = generate(odd_model(), requests(), decoding=Decoding(5))
    step = native.NativeStep.step
    for wrong_rows in ((1, 3), (3,)):
        patched = lambda self, hidden, *rest, rows=wrong_rows: step(self, hidden, *rest) * (1 + (len(hidden) in rows))  # noqa: E731
        monkeypatch.setattr(native.NativeStep, "step", patched)
        model = odd_model()
        assert generate(model, requests(), decoding=Decoding(5)) == expected
        made = lean_of(model)
        assert made is not None and made.native is None
        assert "does not compute what torch computes" in capsys.readouterr().err


def test_large_models_and_other_precisions_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "MOST_BYTES", 10)
    model = odd_model()
    generate(model, requests(), decoding=Decoding(3))
    made = lean_of(model)
    assert made is not None and made.native is not None and not made.native.is_packed, "single rows go on with the weights as they are"
    half = Model.from_hf(odd_model().hf.to(torch.bfloat16), tiny_tokenizer(), "half")
    generate(half, requests(), decoding=Decoding(3))
    made = lean_of(half)
    assert made is not None and made.native is None


def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMOSTEER_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh(monkeypatch, tmp_path)
    assert build.library.__wrapped__() is not None and "compiling" in capsys.readouterr().err
    monkeypatch.setattr(build, "build", lambda *args: pytest.fail("it is there"))
    assert build.library.__wrapped__() is not None and not capsys.readouterr().err
    assert sorted(path.suffix for path in (tmp_path / "native").iterdir()) == [".sha256", ".so"]


@pytest.mark.parametrize("compiler", ["#!/bin/sh\necho step.cpp:1: error: no such luck >&2; exit 1\n", "not a program"])
def test_a_compiler_that_fails_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], compiler: str
) -> None:
    fresh(monkeypatch, tmp_path)
    program = tmp_path / "broken-compiler"
    program.write_text(compiler, encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    assert build.library.__wrapped__() is None
    said = capsys.readouterr().err
    assert "slower" in said and ("no such luck" in said or "format" in said)
    assert build.library.__wrapped__() is None and not capsys.readouterr().err
    assert [path.suffix for path in (tmp_path / "native").iterdir()] == [".failed"]


def test_no_compiler_and_the_switch_are_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh(monkeypatch, tmp_path)
    monkeypatch.setenv("EMOSTEER_NATIVE", "0")
    assert build.library.__wrapped__() is None
    monkeypatch.delenv("EMOSTEER_NATIVE")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.library.__wrapped__() is None
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(build, "_processor", lambda: "fpu sse2")
    assert build.library.__wrapped__() is None
    assert not (tmp_path / "native").exists()


# ---- whose the library is -------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a stand-in for the library would be kept: what is built is a copy of the real one."""
    (real,) = [Path(found._name) for found in [build.library()] if found is not None]
    made = tmp_path / "cache" / "step-0.so"

    def copy(path: Path, compiler: str) -> None:
        build.make_folder(path.parent)
        path.write_bytes(real.read_bytes())
        build.write_text(path.with_suffix(".sha256"), build.sha256_file(path))

    monkeypatch.setattr(build, "build", copy)
    return made


def test_a_library_is_loaded_only_if_its_bytes_are_those_that_were_compiled(place: Path) -> None:
    assert build._load(place, "c++") is not None
    whole = place.read_bytes()
    place.unlink()  # not overwritten: the loaded one is mapped from it
    place.write_bytes(whole[:-1] + b"x")
    assert build._load(place, "c++") is not None and place.read_bytes() == whole, "compiled again, not loaded"
    place.with_suffix(".sha256").unlink()
    place.unlink()
    place.write_bytes(whole + b"more")
    assert build._load(place, "c++") is not None and place.read_bytes() == whole


def test_a_library_that_others_could_exchange_is_not_loaded_and_none_is_compiled_there(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.parent.mkdir()
    place.parent.chmod(0o777)
    assert build._load(place, "c++") is None and not list(place.parent.iterdir())
    assert "the compiled writing step is left out" in (said := capsys.readouterr().err) and "written by others" in said
