"""`generate --engine vllm` from end to end with a stand-in for vLLM (tests/helpers/fakes/vllm) that loads the exported folder by itself."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emosteer.base.errors import UsageError
from emosteer.base.seeds import seed_of
from emosteer.circuits.circuit import Circuit
from emosteer.cli import main as cli
from emosteer.export import cached
from emosteer.export.vectors import ExportRequest
from emosteer.generation.decoding import Decoding
from emosteer.models.model import Model
from emosteer.models.weights import resolve as weights
from emosteer.scenarios.prompts import elicit, plain
from emosteer.serving import vllm_writer
from emosteer.serving.vllm_writer import Served, VllmWriter
from tests.export.test_checkpoint import folder_of

FAKES = Path(__file__).parents[1] / "helpers" / "fakes"
LINES = {"a": "the train was late again", "b": "i waited at the office", "c": "our landlord said never"}
EMOTIONS = ("anger", "sadness")
#: The instruction that the circuits of these tests carry, which prompts end with.
OWN = ""
STRENGTH = {"anger": 0.5, "sadness": 0.75}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vllm")
    folder_of(root, "llama")
    (root / "in.jsonl").write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in LINES.items()))
    return root


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `generate --engine vllm` on the tiny model; returns exit code, stdout, stderr."""
    monkeypatch.chdir(room)
    monkeypatch.setenv("EMOSTEER_CACHE", str(room / "cache"))
    monkeypatch.setenv("EMOSTEER_VLLM_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("FAKE_VLLM_RECORD", str(tmp_path / "record.jsonl"))
    monkeypatch.setenv("FAKE_VLLM_MODE", "echo")

    def call(*arguments: str) -> tuple[int, str, str]:
        fixed = ["-m", "./llama", "--circuit", "llama.circuit", "--engine", "vllm", "--dtype", "float32", "--max-new-tokens", "8"]
        with pytest.raises(SystemExit) as stop:
            cli.main(["generate", *fixed, *arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


@pytest.fixture
def asked(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """What the engines of a test were asked."""
    return lambda: [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model(room: Path) -> Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMOSTEER_CACHE", str(room / "cache"))
        return Model.load(str(room / "llama"), device="cpu", dtype="float32")


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


@torch.no_grad()
def written(model: Model, circuit: Circuit, text: str, emotion: str) -> tuple[list[int], str]:
    """A greedy reply of 8 tokens, token by token without a cache, the circuit added at every position, repetitions punished by 1.1."""
    row = circuit.index(emotion)
    edits = {
        site: (lambda x, v=STRENGTH[emotion] * value[row]: x + v)  # type: ignore[misc]
        for site, value in circuit.steering(model).items()
    }
    ids, reply = model.prompt_ids(plain(text, OWN)), []
    for _ in range(8):
        logits = model.logits(model.run(torch.tensor([ids + reply]), edits, bridge=False))[0, -1]
        for token in set(ids + reply):
            logits[token] = logits[token] / 1.1 if logits[token] > 0 else logits[token] * 1.1
        token = int(logits.argmax())
        if token in model.stop_ids:
            return reply, "stop"
        reply.append(token)
    return reply, "length"


def test_replies_are_those_of_steering_at_all_positions_and_a_killed_run_goes_on(
    run: Run, room: Path, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: Callable[..., Any]
) -> None:
    out = tmp_path / "replies.jsonl"
    monkeypatch.setenv("FAKE_VLLM_MODE", "killed:2")
    start = time.monotonic()
    code, _, err = run("-i", "in.jsonl", "-e", "all", "--out", str(out))
    assert time.monotonic() - start < 60, "a child of the dead engine held the pipe"
    last = err.splitlines()[-1]
    assert code == 1 and last.startswith("emosteer: vLLM failed (anger): it was killed") and "Traceback" not in err
    assert Path(last.rsplit(" ", 1)[1]).is_file(), "the log is there to be read"
    kept = out.read_text()
    assert set(rows_of(out)) == {"c/anger", "b/anger"}, "the two replies that were written stand"
    monkeypatch.setenv("FAKE_VLLM_MODE", "")
    code, printed, err = run("-i", "in.jsonl", "-e", "all", "--out", str(out))
    assert code == 0 and "6 replies" in printed and "all positions" in printed and "2 of 6 replies are there" in err
    assert out.read_text().startswith(kept)
    assert [len(engine["requests"]) for engine in asked()] == [3, 1, 3], "one engine per emotion, for what is missing"
    circuit, rows = Circuit.load(room / "llama.circuit"), rows_of(out)
    assert list(rows["a/anger"]) == [
        *("id", "skeleton_id", "valence", "emotion", "method", "strength", "prompt", "text", "finish_reason", "n_tokens", "run"),
        *("engine", "positions"),
    ]
    for name, text in LINES.items():
        for emotion in EMOTIONS:
            ids, reason = written(model, circuit, text, emotion)
            row = rows[f"{name}/{emotion}"]
            assert row["text"] == model.tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert (row["n_tokens"], row["finish_reason"], row["strength"]) == (len(ids), reason, STRENGTH[emotion])
            assert (row["engine"], row["positions"], row["prompt"], row["method"]) == ("vllm", "all", text, "circuit")
    assert len({row["text"] for row in rows.values()}) > 3 and len({row["run"] for row in rows.values()}) == 1


def test_the_engine_gets_the_prompts_seeds_and_decoding(run: Run, model: Model, asked: Callable[..., Any], room: Path) -> None:
    more = ["--engine-option", "enforce_eager=true", "--engine-option", "quantization=fp8", "--batch-size", "7"]
    how = ["--temperature", "0.7", "--top-p", "0.9", "--repetition-penalty", "1.2", "--seed", "3"]
    code, out, _ = run("-i", "in.jsonl", "-e", "sadness", "--json", *how, *more)
    assert code == 0
    (engine,) = asked()
    ids = [model.prompt_ids(plain(text, OWN)) for text in LINES.values()]
    assert [request["ids"] for request in engine["requests"]] == ids
    assert [request["seed"] for request in engine["requests"]] == [seed_of(3, f"{name}/sadness") for name in LINES]
    one = engine["requests"][0]
    assert (one["temperature"], one["top_p"], one["repetition_penalty"], one["max_tokens"]) == (0.7, 0.9, 1.2, 8)
    assert one["stop_token_ids"] == sorted(model.stop_ids)
    how = engine["engine"]
    assert (how["dtype"], how["enforce_eager"], how["quantization"], how["max_num_seqs"]) == ("float32", True, "fp8", 7)
    assert how["max_model_len"] == 256, "no more than the model's context"
    assert json.loads((Path(how["model"]) / "emosteer_export.json").read_text())["strength"] == 0.75
    package = str(Path(vllm_writer.__file__).parent)
    assert package not in engine["path"], "emosteer's modules would hide others of the same name"
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["id"] for row in rows] == [f"{name}/sadness" for name in LINES], "in the order of the input"
    assert [row["text"] for row in rows] == [model.tokenizer.decode(row[-2:], skip_special_tokens=True).strip() for row in ids]


def test_what_shapes_a_reply_makes_another_run_and_what_does_not_goes_on(run: Run, tmp_path: Path, asked: Callable[..., Any]) -> None:
    out = ["-i", "in.jsonl", "-e", "anger", "--out", str(tmp_path / "r.jsonl")]
    assert run(*out)[0] == 0
    assert run(*out, "--engine-option", "tensor_parallel_size=2", "--batch-size", "3")[0] == 0 and len(asked()) == 1
    for other in (["--engine-option", "quantization=fp8"], ["--seed", "1"], ["--dtype", "bfloat16"]):
        code, _, err = run(*out, *other)
        assert code == 2 and "holds replies of another run" in err
    with pytest.raises(SystemExit):  # nor do the built-in engine's replies mix with these
        cli.main(["generate", "-m", "./llama", "--circuit", "llama.circuit", "--dtype", "float32", "--max-new-tokens", "8", *out])


def test_unsteered_replies_come_from_the_model_as_it_is(run: Run, asked: Callable[..., Any], room: Path, model: Model) -> None:
    assert run("x", "--method", "none")[0] == run("x", "-e", "anger", "--strength", "0")[0] == 0
    assert run("train", "--method", "prompt", "-e", "anger,sadness")[0] == 0
    plain_model = str(weights.resolve(str(room / "llama")).path)
    assert [Path(engine["engine"]["model"]).resolve() for engine in asked()] == [Path(plain_model).resolve()] * 3
    assert [request["ids"] for request in asked()[2]["requests"]] == [
        model.prompt_ids(elicit("tone", "train", emotion, OWN)) for emotion in EMOTIONS
    ], "one engine for both emotions"


def test_a_text_alone_is_answered_with_nothing_but_the_reply(run: Run, model: Model) -> None:
    code, out, err = run("the train was late", "-e", "anger")
    ids = model.prompt_ids(plain("the train was late", OWN))
    assert code == 0 and out == model.tokenizer.decode(ids[-2:], skip_special_tokens=True).strip() + "\n"
    assert "a line on stdout" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["x", "-e", "anger", "--method", "residual"], 2, "--method residual cannot be written into a checkpoint"),
        (["x", "-e", "anger", "--device", "cuda"], 2, "CUDA_VISIBLE_DEVICES"),
        (["x", "-e", "anger", "--dtype", "int3"], 2, "expected auto, float32"),
        (["x", "-e", "anger", "--engine-option", "seed=1"], 2, "--engine-option seed is set by emosteer"),
        (["x", "-e", "anger", "--engine-option", "tensor"], 2, "expected --engine-option NAME=VALUE"),
        (["x", "-e", "anger", "--engine-option", "tensor_size=2"], 1, "tensor_size"),
        (["x", "-e", "anger", "--engine", "vlm"], 2, "did you mean 'vllm'"),
        (["x", "-e", "anger", "--engine", "builtin", "--engine-option", "a=1"], 2, "--engine-option has no meaning with the built-in"),
        (["the " * 300, "-e", "anger"], 1, "exceeds the context"),
    ],
)
def test_bad_input_is_one_clear_line(run: Run, arguments: list[str], code: int, message: str) -> None:
    found, out, err = run(*arguments)
    assert (found, out) == (code, "") and message in err.splitlines()[-1] and "Traceback" not in err


def test_engines_that_fail_say_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, why in (("broken", "ValueError: no room for the KV cache"), ("stuck", "a reply ended as 'abort'")):
        monkeypatch.setenv("FAKE_VLLM_MODE", mode)
        code, out, err = run("x", "-e", "anger")
        last = err.splitlines()[-1]
        assert (code, out) == (1, "") and why in last and "Traceback" not in err
        assert Path(last.rsplit(" ", 1)[1]).is_file()


def test_without_vllm_one_line_says_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    code, _, err = run("x", "-e", "anger")
    assert code == 1 and "pip install 'emosteer[vllm]'" in err.splitlines()[-1], "the named Python has none"
    monkeypatch.delenv("EMOSTEER_VLLM_PYTHON")
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, _, err = run("x", "-e", "anger")
    assert code == 1 and err.count("\n") == 1 and sys.executable in err and "EMOSTEER_VLLM_PYTHON" in err
    monkeypatch.setenv("EMOSTEER_VLLM_PYTHON", "/nowhere/python")
    code, _, err = run("x", "-e", "anger")
    assert code == 2 and err.count("\n") == 1 and "/nowhere/python" in err


def test_a_checkpoint_is_made_once_and_again_where_it_is_damaged(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOSTEER_CACHE", str(tmp_path))
    made: list[str] = []
    export = cached.export_checkpoint
    monkeypatch.setattr(cached, "export_checkpoint", lambda s, out, **how: made.append(str(out)) or export(s, out, **how))
    path = room / "llama.circuit"

    def get(emotion: str = "anger", strength: float = 0.5, dtype: str = "float32") -> Path:
        return cached.cached_checkpoint(
            ExportRequest(weights.resolve(str(room / "llama")), Circuit.load(path), path, emotion, strength), dtype
        )

    first = get()
    assert get() == first and len(made) == 1 and first.parent == tmp_path / "exports"
    others = {get("sadness"), get(strength=0.6), get(dtype="bfloat16")}
    assert len(others) == 3 and first not in others
    assert json.loads((get(dtype="bfloat16") / "config.json").read_text())["dtype"] == "bfloat16"
    (first / "model.safetensors").write_bytes(b"torn")
    assert get() == first and len(made) == 5 and (first / "model.safetensors").stat().st_size > 1000


def test_what_is_served_knows_what_the_model_knows(room: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOSTEER_CACHE", str(room / "cache"))
    served = Served.of(weights.resolve(str(room / "llama")))
    assert (served.stop_ids, served.context, served.sha256) == (model.stop_ids, model.shape.context, model.sha256)
    assert served.dtype == "bfloat16"
    with pytest.raises(UsageError, match="residual"):
        VllmWriter(served, None, Decoding(), "", "residual")
