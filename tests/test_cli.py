"""The command line as a user meets it: on the tiny model saved to a folder, from extract to generate, and every kind of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emosteer.base.files import sha256_file
from emosteer.cli import main as cli
from emosteer.generation.native.build import library
from emosteer.scenarios.data_files import data_path
from emosteer.scenarios.shipped import read_data
from tests.conftest import build
from tests.helpers.choosing import choose_by
from tests.helpers.precision import forward_bound
from tests.helpers.tiny_project import EMOTIONS, write_tiny_project


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, scenarios, and a bank, as files."""
    root = tmp_path_factory.mktemp("cli")
    write_tiny_project(root)
    return root


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in the folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EMOSTEER_CACHE", str(folder / "cache"))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


@pytest.fixture
def made(run: Callable[..., Any], folder: Path) -> Path:
    """The folder once `extract` and `circuit` have run."""
    if not (folder / "artifacts/tiny/circuit.safetensors").exists():
        extract = [
            "extract",
            "-m",
            "./tiny",
            "--scenarios",
            "sev.jsonl",
            "--replies",
            "bank.jsonl",
            "--emotions",
            ",".join(EMOTIONS),
            "--holdout",
            "0.2",
        ]
        assert run(*extract)[0] == 0
        assert run("circuit", "-m", "./tiny", "--scenarios", "sev.jsonl", "--heads", "0.25", "--strength", "2")[0] == 0
    return folder


def one_line(err: str) -> bool:
    return err.count("\n") == 1 and err.startswith("emosteer: ") and "Traceback" not in err


# ---- the way through -----------------------------------------------------------------------------------------------


def test_extract_prints_evidence_and_writes_an_artefact(run: Callable[..., Any], made: Path) -> None:
    code, out, _ = run("inspect", "artifacts/tiny/directions.safetensors", "--json")
    found = json.loads(out)
    assert code == 0 and found["kind"] == "directions"
    assert found["content"]["emotions"] == list(EMOTIONS)
    assert found["content"]["groups"] == 18 and found["content"]["heldout"] == 3
    assert found["provenance"]["data"]["sev.jsonl"] == sha256_file(made / "sev.jsonl")
    assert {"accuracy", "accuracy_shuffled", "halves", "themes", "valences"} <= set(found["content"]["layers"][0])


def test_the_circuit_knows_its_parent_and_its_units(run: Callable[..., Any], made: Path) -> None:
    code, out, _ = run("inspect", "artifacts/tiny/circuit.safetensors", "--json")
    found = json.loads(out)
    assert code == 0 and found["provenance"]["parents"]["directions"] == sha256_file(made / "artifacts/tiny/directions.safetensors")
    assert [found["content"]["emotions"][e]["heads"] for e in EMOTIONS] == [3, 3, 3]
    assert found["content"]["strength"] == {e: 2.0 for e in EMOTIONS}
    assert run("inspect", "artifacts/tiny/circuit.safetensors")[0] == 0


def test_the_best_of_several_is_printed_and_kept_and_vllm_knows_none(
    run: Callable[..., Any], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, also where a reply is printed as it is written; a file of other settings is refused; the estimate counts candidates."""
    chooser = choose_by(monkeypatch)
    some = ["generate", "the train was late", "-m", "./tiny", "-e", "anger", "--max-new-tokens", "8", "--seed", "5"]
    code, out, err = run(*some, "--best-of", "4")
    assert code == 0, err
    assert out.strip() == max((text for _, text, _ in chooser.shown), key=len)
    file = tmp_path / "replies.jsonl"
    assert run(*some, "--best-of", "4", "--out", str(file))[0] == 0
    assert json.loads(file.read_text())["text"] == out.strip()
    code, _, err = run(*some, "--best-of", "3", "--out", str(file))
    assert code != 0 and one_line(err)
    code, out, err = run(*some, "--best-of", "4", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["parts"], err
    code, out, err = run(*some, "--best-of", "4", "--engine", "vllm")
    assert code == 2 and out == "" and one_line(err) and "--best-of" in err
    code, _, err = run(*some, "--best-of", "99")
    assert code == 2 and one_line(err) and "64" in err


def test_the_default_circuit_learns_how_much_each_head_adds(run: Callable[..., Any], made: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    arguments = ["circuit", "-m", "./tiny", "--scenarios", "sev.jsonl", "--strength", "2", "--out", str(out), "--json"]
    assert run(*arguments, "--replies", "bank.jsonl", "--gain-steps", "1", "--learn", "gains")[0] == 0
    assert "learned head gains" in json.loads(run("inspect", str(out), "--json")[1])["provenance"]["method"]
    code, printed, _ = run(*arguments, "--replies", "bank.jsonl", "--gain-steps", "3", "--keep", "0.25")
    assert code == 0 and [json.loads(printed)["emotions"][emotion]["heads"] for emotion in EMOTIONS] == [3, 3, 3]
    provenance = json.loads(run("inspect", str(out), "--json")[1])["provenance"]
    assert provenance["data"]["replies/bank.jsonl"] == sha256_file(made / "bank.jsonl") and "learned head outputs" in provenance["method"]
    code, _, err = run(*arguments)
    assert code == 1 and one_line(err) and "give the bank of these scenarios with --replies" in err, "the shipped bank has other scenarios"
    assert run(*arguments, "--gain-steps", "0")[0] == 0, "which a ranking does not need"
    assert "learned" not in json.loads(run("inspect", str(out), "--json")[1])["provenance"]["method"]


def test_residual_vectors_are_learned_with_the_gains_and_steer(run: Callable[..., Any], made: Path, tmp_path: Path) -> None:
    def assembled(name: str, *options: str) -> tuple[int, str, Path]:
        out = tmp_path / name
        data = ["--scenarios", "sev.jsonl", "--replies", "bank.jsonl", "--no-tune", "--out", str(out)]
        code, _, err = run("circuit", "-m", "./tiny", *data, *options)
        return code, err, out

    def written(circuit: Path, *options: str) -> tuple[int, str, str]:
        some = ["--circuit", str(circuit), "--method", "learned-residual", "-e", "all", "--max-new-tokens", "8", "--json"]
        return run("generate", "the train was late", "-m", "./tiny", *some, *options)

    gains = ("--gain-steps", "3")
    for options in (gains, (*gains, "--learn-residual")):
        code, err, out = assembled("with", *options)
        assert code == 0, err
        found = json.loads(run("inspect", str(out), "--json")[1])
        assert len(found["content"]["learned_residual"]["margin"]) == 3 and found["tensors"]["learned_residual"][1] == [3, 1, 32]
    assert " --learn-residual " in found["command"], "kept as it was asked for"
    code, printed, err = written(out)
    rows = [json.loads(line) for line in printed.splitlines()]
    assert code == 0 and [(row["method"], row["strength"]) for row in rows] == [("learned-residual", 1.0)] * 3
    code, printed, _ = written(out, "--strength", "40")
    assert code == 0 and [json.loads(line)["text"] for line in printed.splitlines()] != [row["text"] for row in rows]
    assert written(out, "--intensity", "50")[0] == 2

    _, _, bare = assembled("without", *gains, "--no-learn-residual")
    assert json.loads(run("inspect", str(bare), "--json")[1])["content"]["learned_residual"] is None
    for circuit in (bare, made / "artifacts/tiny/circuit.safetensors"):
        for options in ((), ("--strength", "2")):
            code, printed, err = written(circuit, *options)
            assert code == 1 and printed == "" and one_line(err) and "`emosteer circuit --learn-residual`" in err
    for options in (("--gain-steps", "0"), ("--heads", "0.25"), ("--preset", "paper")):
        code, err, out = assembled("never", *options, "--learn-residual")
        assert code == 2 and one_line(err) and "leave out --preset, --heads, --neurons and --gain-steps 0" in err and not out.exists()
        assert assembled("ranked", *options)[0] == 0, "where no gains are learned, the default learns no vectors"


def test_ablate_prints_checks_and_curves(run: Callable[..., Any], made: Path) -> None:
    options = [
        "--shares",
        "0.25",
        "--neuron-shares",
        "",
        "--kinds",
        "zero,enhance",
        "--randoms",
        "2",
        "--prompts",
        "2",
        "--patch-groups",
        "2",
    ]
    arguments = ["ablate", "-m", "./tiny", "--scenarios", "sev.jsonl", "--replies", "bank.jsonl", *options]
    code, out, _ = run(*arguments, "--json")
    found = json.loads(out)
    assert code == 0
    heads = found["verification"]["heads"]
    assert heads["units"] == 12 and heads["max_error_to_largest"] <= forward_bound(torch.ones(1))
    assert {(row["kind"], row["share"]) for row in found["curves"]} == {
        ("none (asked)", 0),
        ("none (plain)", 0),
        ("zero", 0.25),
        ("enhance", 0.25),
    }
    assert len(found["patches"]["units"]) == 32
    assert not list((made / "artifacts/tiny").glob("*.partial*"))
    assert run("inspect", "artifacts/tiny/scores.safetensors")[0] == 0
    assert run(*arguments)[0] == 0


def test_generate_answers_a_text(run: Callable[..., Any], made: Path) -> None:
    code, out, err = run("generate", "the train was late", "-e", "anger", "-m", "./tiny", "--max-new-tokens", "8")
    assert (code, err) == (0, "") and out.strip()
    rows = [
        json.loads(line)
        for line in run("generate", "the train was late", "-e", "all", "-m", "./tiny", "--json", "--max-new-tokens", "8")[1].splitlines()
    ]
    assert [row["emotion"] for row in rows] == list(EMOTIONS)
    assert rows[0]["text"] == out.strip() and rows[0]["strength"] == 2.0 and rows[0]["method"] == "circuit"


@pytest.mark.parametrize("method", ["circuit", "residual", "prompt", "none"])
def test_generate_writes_a_file_of_every_method_and_goes_on_after_a_kill(
    run: Callable[..., Any], made: Path, method: str, tmp_path: Path
) -> None:
    out = tmp_path / "replies.jsonl"
    emotion = [] if method == "none" else ["-e", "all" if method != "prompt" else ",".join(EMOTIONS)]
    arguments = [
        "generate",
        "-m",
        "./tiny",
        "--input",
        "sev.jsonl",
        "--method",
        method,
        *emotion,
        "--out",
        str(out),
        "--max-new-tokens",
        "6",
    ]
    assert run(*arguments)[0] == 0
    whole = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(whole) == (18 if method == "none" else 54)
    names = {"id", "skeleton_id", "valence", "emotion", "method", "strength", "prompt", "text", "finish_reason", "n_tokens"}
    assert all(names <= set(row) for row in whole) and {row["emotion"] for row in whole} == (
        {"none"} if method == "none" else set(EMOTIONS)
    )
    assert len({row["id"] for row in whole}) == len(whole)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:5]) + lines[5][:20])  # a kill tears a line
    assert run(*arguments)[0] == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, whole))


def test_a_file_of_other_settings_is_not_mixed_up(run: Callable[..., Any], made: Path, tmp_path: Path) -> None:
    arguments = [
        "generate",
        "-m",
        "./tiny",
        "--input",
        "sev.jsonl",
        "-e",
        "anger",
        "--out",
        str(tmp_path / "r.jsonl"),
        "--max-new-tokens",
        "4",
    ]
    assert run(*arguments)[0] == 0
    before = (tmp_path / "r.jsonl").read_text()
    code, _, err = run(*arguments, "--temperature", "0.7")
    assert code == 2 and one_line(err) and "another run" in err
    assert (tmp_path / "r.jsonl").read_text() == before
    assert run(*arguments, "--temperature", "0.7", "--fresh")[0] == 0


def test_generate_streams_a_single_text(run: Callable[..., Any], made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    arguments = ["generate", "the train was late", "-e", "anger", "-m", "./tiny", "--max-new-tokens", "8"]
    pieces: list[str] = []
    usual = typer.echo
    monkeypatch.setattr(typer, "echo", lambda text="", **how: (pieces.append(text), usual(text, **how)))
    out = run(*arguments)[1]
    assert len(pieces) > 4 and "".join(pieces) + "\n" == out, "word by word, and a line break at the end"


def test_generate_answers_conversations(run: Callable[..., Any], made: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "the train"}, {"role": "assistant", "content": "never"}, {"role": "user", "content": "why"}]
    lines = tmp_path / "in.jsonl"
    rows: list[dict[str, Any]] = [{"id": "talk", "messages": talk}, {"id": "text", "text": "why"}, {"messages": talk[2:]}]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    arguments = [
        "generate",
        "-m",
        "./tiny",
        "-i",
        str(lines),
        "-e",
        "fear",
        "--max-new-tokens",
        "4",
        "--instruction",
        "",
        "--out",
        str(out),
    ]
    assert run(*arguments)[0] == 0
    found = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert found["talk/fear"]["messages"] == talk and found["talk/fear"]["prompt"] == "why"
    assert "messages" not in found["text/fear"]
    assert found["line-3/fear"] == {**found["text/fear"], "id": "line-3/fear"}, "a conversation of one turn is a text"
    whole = out.read_bytes()
    assert run(*arguments)[0] == 0 and out.read_bytes() == whole


def test_what_generate_writes_to_a_prompt_file_is_its_bank(run: Callable[..., Any], made: Path, tmp_path: Path) -> None:
    """Prompts keep their ids, and earlier turns reach the model: the same tokens as the conversation typed in."""
    chat = [{"role": "user", "content": "the train"}, {"role": "assistant", "content": "never"}, {"role": "user", "content": "why"}]
    lines: list[dict[str, Any]] = [
        {"id": "c1", "kind": "chat", "messages": chat},
        {"id": "q1", "kind": "question", "messages": chat[2:]},
        {"id": "own", "kind": "mine", "messages": chat},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    out = tmp_path / "out.jsonl"
    options = ("-m", "./tiny", "-e", "fear,anger", "--method", "prompt", "--max-new-tokens", "4", "--out", str(out))
    assert run("generate", "-i", str(tmp_path / "in.jsonl"), *options)[0] == 0
    found = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert found["c1/fear"]["messages"] == chat and (found["c1/fear"]["skeleton_id"], found["c1/fear"]["valence"]) == ("c1", None)
    assert found["own/fear"]["text"] == found["c1/fear"]["text"] and found["own/fear"]["skeleton_id"] is None, "a kind of the user's own"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in lines[:2]))
    written = [row for row in found.values() if row["skeleton_id"] is not None]
    (tmp_path / "bank.jsonl").write_text("".join(json.dumps({**row, "text": row["text"] or "no"}) + "\n" for row in written))
    data = read_data(prompts, tmp_path / "bank.jsonl")
    assert [str(group.key) for group in data.groups] == ["c1", "q1"] and data.bank is not None
    assert all({*replies} == {"fear", "anger"} for replies in data.bank.values())


def test_generate_reads_lines_with_text_and_stdin(
    run: Callable[..., Any], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"id": "a", "text": "the boss said stop"}\n{"text": "i went home"}\n')
    code, out, _ = run("generate", "-m", "./tiny", "-i", str(lines), "-e", "fear", "--json", "--max-new-tokens", "4")
    assert code == 0 and [json.loads(line)["id"] for line in out.splitlines()] == ["a/fear", "line-2/fear"]
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("the boss said stop"))
    code, out, _ = run("generate", "-m", "./tiny", "-e", "fear", "--json", "--max-new-tokens", "4")
    assert code == 0 and json.loads(out)["prompt"] == "the boss said stop"


def test_strength_zero_writes_what_the_unsteered_model_writes(run: Callable[..., Any], made: Path) -> None:
    steered = run("generate", "the train was late", "-e", "anger", "-m", "./tiny", "--strength", "0", "--max-new-tokens", "12")[1]
    assert steered == run("generate", "the train was late", "-m", "./tiny", "--method", "none", "--max-new-tokens", "12")[1]


def test_auto_makes_what_is_missing(run: Callable[..., Any], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emosteer.api import making
    from emosteer.scenarios import shipped

    files = {shipped.TRAIN: made / "sev.jsonl", "sev/train.jsonl": made / "sev.jsonl", shipped.BANK: made / "bank.jsonl"}
    monkeypatch.setattr(shipped, "data_path", lambda name: files.get(name) or data_path(name))
    monkeypatch.setattr(making, "EMOTIONS", EMOTIONS)
    arguments = [
        "generate",
        "the train was late",
        "-e",
        "fear",
        "-m",
        "./tiny",
        "--artifacts",
        str(tmp_path / "made"),
        "--max-new-tokens",
        "4",
    ]
    code, _, err = run(*arguments)
    assert code == 1 and one_line(err) and "emosteer extract --model ./tiny" in err and "--auto" in err
    assert run(*arguments, "--auto")[0] == 0
    assert (tmp_path / "made/tiny/circuit.safetensors").exists()
    assert run(*arguments)[0] == 0


def test_extract_with_the_models_own_replies(run: Callable[..., Any], made: Path, tmp_path: Path) -> None:
    from emosteer.writing.own_replies import fault

    assert fault("the desk came back and i said stop", "anger", "stop") is None
    assert fault("my anger is at the door now", "anger", "stop") == "names the emotion"
    assert fault("no", "anger", "stop") == "too short"
    assert fault("go on go on go on go on go on go on go on", "anger", "stop") == "repeats itself"
    assert fault("the desk came back and i said stop", "anger", "length") == "cut off"
    arguments = [
        "extract",
        "-m",
        "./tiny",
        "--scenarios",
        "sev.jsonl",
        "--replies",
        "self",
        "--emotions",
        "anger,fear",
        "--out",
        str(tmp_path / "d.safetensors"),
    ]
    code, _, err = run(*arguments)
    assert (tmp_path / "own-replies.jsonl").read_text().count("\n") == 36
    assert (
        code == 0 or "scenario-event has a reply" in err or "no reply in" in err
    )  # a random model rarely ends a reply; either way one line says so


# ---- bad input -----------------------------------------------------------------------------------------------------


BAD = [
    (["generate", "x", "-e", "angry", "-m", "./tiny"], 2, "did you mean 'anger'"),
    (["generate", "x", "-m", "./tiny"], 2, "--emotion is missing"),
    (["generate", "x", "-e", "anger", "--strength", "much"], 2, "'--strength'"),
    (["generate", "x", "-e", "anger", "--strength", "nan", "-m", "./tiny"], 2, "--strength"),
    (["report", "--model", ""], 2, "expected the name of a model in --model, found ''"),
    (["generate", "x", "-e", "anger", "--strength", "inf", "-m", "./tiny"], 2, "--strength"),
    (["generate", "x", "-e", "anger", "--method", "circut", "-m", "./tiny"], 2, "did you mean 'circuit'"),
    (["generate", "x", "-e", "anger", "-m", "smolm2-135m"], 1, "did you mean"),
    (["generate", "x", "-e", "anger", "-m", "./nowhere"], 1, "nowhere"),
    (["generate", "", "-e", "anger", "-m", "./tiny"], 2, "empty"),
    (["generate", "x", "-e", "anger", "-m", "./tiny", "--input", "sev.jsonl"], 2, "found both"),
    (["generate", "-e", "anger", "-m", "./tiny", "--input", "missing.jsonl"], 1, "does not exist"),
    (["generate", "-e", "anger", "-m", "./tiny", "--input", "empty.jsonl"], 1, "is empty"),
    (["generate", "-e", "anger", "-m", "./tiny", "--input", "malformed.jsonl"], 1, "malformed.jsonl:2"),
    (["generate", "-e", "anger", "-m", "./tiny", "--input", "noevent.jsonl"], 1, "noevent.jsonl:1: the event 'negative' is missing"),
    (["generate", "-e", "anger", "-m", "./tiny", "--input", "talk.jsonl"], 1, "talk.jsonl:1: message 2: expected 'role' to be assistant"),
    (["generate", "-e", "anger", "-m", "./tiny", "--input", "both.jsonl"], 1, "both.jsonl:1: expected a 'text' or 'messages', found both"),
    (["generate", "-e", "anger", "-m", "./tiny", "--input", "latin1.jsonl"], 1, "UTF-8"),
    (["generate", "x", "-e", "anger", "-m", "./tiny", "--max-new-tokens", "0"], 2, "at least 1"),
    (["generate", "the " * 300, "-e", "anger", "-m", "./tiny"], 1, "exceeds the context"),
    (["generate", "x", "-e", "anger", "-m", "./tiny", "--circuit", "pickle.pt"], 1, "pickle"),
    (
        ["generate", "x", "-e", "anger", "-m", "./tiny", "--circuit", "artifacts/tiny/directions.safetensors"],
        1,
        "expected an artefact of kind 'circuit'",
    ),
    (["generate", "-i", "sev.jsonl", "-e", "anger", "-m", "./tiny", "--out", "sev.jsonl/x.jsonl"], 1, "cannot write"),
    (["extract", "-m", "./tiny", "--emotions", "anger"], 2, "at least two"),
    (["extract", "-m", "./tiny", "--elicitation", "mood"], 2, "reply, tone, system"),
    (["extract", "-m", "./tiny", "--scenarios", "sev.jsonl", "--replies", "malformed.jsonl"], 1, "malformed.jsonl"),
    (["extract", "-m", "./tiny", "--device", "gpu"], 2, "expected auto, cpu, cuda"),
    (["extract", "-m", "./tiny", "--dtype", "int3"], 2, "expected auto, float32"),
    (["ablate", "-m", "./tiny", "--kinds", "knock"], 2, "zero, mean, resample, enhance"),
    (["ablate", "-m", "./tiny", "--shares", "2"], 2, "--shares"),
    (["circuit", "-m", "./tiny", "--preset", "papr"], 2, "did you mean 'paper'"),
    (["circuit", "-m", "./tiny", "--directions", "truncated.safetensors"], 1, "damaged"),
    (["circuit", "-m", "./tiny", "--keep", "0"], 2, "--keep above 0"),
    (["circuit", "-m", "./tiny", "--gain-steps", "-1"], 2, "'--gain-steps'"),
    (["circuit", "-m", "./tiny", "--ranking", "raw"], 2, "--ranking is of ranked heads"),
    (["circuit", "-m", "./tiny", "--share", "0.8"], 2, "--share is of ranked heads"),
    (["circuit", "-m", "./tiny", "--gain-steps", "0", "--keep", "0.2"], 2, "--keep is of learned heads"),
    (["circuit", "-m", "./tiny", "--preset", "paper", "--learn", "gains"], 2, "--learn is of learned heads"),
    (["circuit", "-m", "./tiny", "--preset", "paper", "--gain-steps", "7"], 2, "--gain-steps is of learned heads"),
    (["effects", "-m", "./tiny", "--judge", "nonsense", "--dry-run"], 2, "unknown judge 'nonsense'"),
    (["effects", "-m", "./tiny", "--judge", "openai:x", "--dry-run"], 2, "needs --base-url"),
    (["validate", "-m", "./tiny", "--written", "2", "--judge", "nonsense", "--dry-run"], 2, "unknown judge 'nonsense'"),
    (["validate", "-m", "./tiny", "--judge", "linear"], 2, "add --written N"),
    (["probe", "-m", "./tiny", "--circuit", "missing.safetensors", "--moved", "4", "--dry-run"], 1, "missing.safetensors"),
    (["probe", "-m", "./tiny", "--circuit", "artifacts/tiny/circuit.safetensors", "--moved", "0", "--dry-run"], 2, "found moved 0"),
    (
        ["ablate", "-m", "./tiny", "--scenarios", "sev.jsonl", "--replies", "bank.jsonl", "--prompts", "999", "--dry-run"],
        1,
        "lower --prompts",
    ),
    (["generate", "x", "-e", "anger", "-m", "./tiny", "--fresh"], 2, "--fresh replaces --out"),
    (["build", "sev.jsonl", "-n", "5"], 2, "--count has a meaning with --author only"),
    (["build", "sev.jsonl", "--temperature", "0.5"], 2, "--temperature has a meaning with --author only"),
    (["build", "--author", "--domain", "x", "--out", "new.jsonl", "--dry-run"], 2, "who is to write?"),
    (
        ["build", "--author", "--domain", "x", "--out", "new.jsonl", "--model", "./tiny", "--emotions", "anger"],
        2,
        "--emotions is of a bank",
    ),
    (["inspect", "missing.safetensors"], 1, "does not exist"),
    (["models", "path", "nosuchmodel"], 1, "unknown model"),
    (["nonsense"], 2, "nonsense"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD, ids=[" ".join(a)[:60] for a, _, _ in BAD])
def test_bad_input_is_one_clear_line(run: Callable[..., Any], made: Path, arguments: list[str], code: int, message: str) -> None:
    (made / "empty.jsonl").write_text("")
    turns = [{"role": "user", "content": "a"}] * 2
    (made / "talk.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (made / "both.jsonl").write_text(json.dumps({"messages": turns[:1], "text": "a"}) + "\n")
    (made / "malformed.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (made / "noevent.jsonl").write_text('{"skeleton_id": "a", "theme": "t", "scenario": "s", "event": {"positive": "p", "neutral": "n"}}\n')
    (made / "latin1.jsonl").write_bytes('{"text": "caf\xe9"}\n'.encode("latin-1"))
    (made / "pickle.pt").write_bytes(b"PK\x03\x04 not really")
    (made / "truncated.safetensors").write_bytes((made / "artifacts/tiny/directions.safetensors").read_bytes()[:5000])
    found, out, err = run(*arguments)
    assert (found, out) == (code, "") and one_line(err), err
    assert message in err


def test_an_artefact_of_another_model_is_refused_by_both_names(run: Callable[..., Any], made: Path) -> None:
    other = build("llama", seed=7)
    other.hf.save_pretrained(made / "other")
    other.tokenizer.save_pretrained(made / "other")
    code, _, err = run("generate", "x", "-e", "anger", "-m", "./other", "--circuit", "artifacts/tiny/circuit.safetensors")
    assert code == 1 and one_line(err) and "tiny" in err and "other" in err


def test_debug_shows_the_traceback(run: Callable[..., Any], made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emosteer.base.errors import UsageError

    with pytest.raises(UsageError):
        cli.main(["generate", "x", "-m", "./tiny", "--debug"])


def test_a_full_disk_is_one_line_and_loses_nothing(
    run: Callable[..., Any], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "replies.jsonl"
    arguments = ["generate", "-m", "./tiny", "--input", "sev.jsonl", "-e", "anger", "--out", str(out), "--max-new-tokens", "4"]
    arguments += ["--batch-size", "1"]
    library()  # compiled now, whichever test comes first: that writes a file and says so
    run("--version")  # and what it said is read
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run(*arguments)
    assert code == 1 and one_line(err) and "disk is full" in err
    assert len(out.read_text().splitlines()) == 4
    monkeypatch.setattr(os, "fsync", real)
    assert run(*arguments)[0] == 0 and len(out.read_text().splitlines()) == 18


def test_out_of_memory_halves_the_batch_and_says_so(
    run: Callable[..., Any], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emosteer.writing import best_of as writing

    real = writing.generate

    def narrow(model: Any, requests: Any, *rest: Any, **options: Any) -> Any:
        if len(requests) > 5:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes")
        return real(model, requests, *rest, **options)

    monkeypatch.setattr(writing, "generate", narrow)
    code, _, err = run(
        "generate", "-m", "./tiny", "-i", "sev.jsonl", "-e", "anger", "--out", str(tmp_path / "r.jsonl"), "--max-new-tokens", "4"
    )
    assert code == 0 and "halved" in err and len((tmp_path / "r.jsonl").read_text().splitlines()) == 18


def test_help_does_not_import_torch() -> None:
    lines = (
        "import sys",
        "from emosteer.cli import main as cli",
        "try: cli.main(['--help'])",
        "except SystemExit: pass",
        "assert not {'torch', 'transformers'} & set(sys.modules)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "generate" in done.stdout, done.stderr


def test_models_lists_the_embedded_default(run: Callable[..., Any]) -> None:
    code, out, _ = run("models", "list", "--json")
    assert code == 0 and any(row["name"] == "smollm2-135m" for row in json.loads(out))


def test_a_table_prints_texts_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Replies may hold what a terminal library takes for markup: it must neither vanish nor end the command."""
    from emosteer.base.tables import print_table

    told = ["Dear [name],", "[/INST] so be it", "a :smile: in words", "[bold]loud[/bold]"]
    print_table(["reply [0]", "n"], [[text, 1] for text in told], title="all [of] them")
    out = capsys.readouterr().out
    assert all(text in out for text in [*told, "reply [0]", "all [of] them"])
