"""The public API on a tiny model: it does what the commands do, steers the plain model alike, and streams what it writes."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import emosteer
from emosteer.api import options
from emosteer.api.inputs import bank_of
from emosteer.api.steered_model import SteeredModel
from emosteer.attribution.settings import AblateSettings
from emosteer.base.errors import ArtifactError, DataError, UsageError
from emosteer.calibration.settings import CalibrateSettings
from emosteer.circuits.heads.settings import HeadSettings
from emosteer.circuits.places import OWN_BANK
from emosteer.circuits.settings import CircuitSettings
from emosteer.circuits.validation.settings import ValidateSettings
from emosteer.cli import main as cli
from emosteer.directions.settings import Settings
from emosteer.generation.decoding import Decoding
from emosteer.probing.settings import ProbeSettings
from emosteer.side_effects.settings import EffectsSettings
from emosteer.writing.settings import BATCH_SIZE
from tests.conftest import build
from tests.helpers.choosing import choose_by
from tests.helpers.tiny_project import EMOTIONS, write_tiny_project

ROOT = Path(__file__).parents[2]
TEXTS = [
    "the boss said stop",
    "my flat is at the office",
    "the train was late",
    "we waited nine weeks",
    "i keep the desk",
    "they told us the door",
    "the landlord never came back",
    "not our permit",
]
MIXED = ["anger", "sadness", "fear", None, "fear", "anger", "sadness", "anger"]
CHAT = [
    {"role": "user", "content": "the train was late"},
    {"role": "assistant", "content": "which train"},
    {"role": "user", "content": "the boss said stop"},
]
LONG = dict(max_new_tokens=12, guidance=1.0, examples=False, penalise_prompt=True)  # as a block steers


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def steered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    """A tiny model with a circuit, made by the API's own functions in float32."""
    root = tmp_path_factory.mktemp("api")
    write_tiny_project(root, request.param)
    model = emosteer.load(build(request.param), artifacts=root)
    assert model.circuit is None
    data = dict(scenarios=root / "sev.jsonl", replies=root / "bank.jsonl")
    directions = emosteer.extract(model, emotions=EMOTIONS, holdout=0.2, **data)
    circuit = emosteer.assemble(model, directions, gain_steps=0, head_share=0.5, strength=8.0, tune=False, **data)
    return SteeredModel(model.model, circuit)


# ---- writing ---------------------------------------------------------------------------------------------------------------


def test_a_block_steers_the_plain_model_token_for_token_as_generate_writes(steered: SteeredModel) -> None:
    decoding = dict(max_new_tokens=12, do_sample=False, pad_token_id=steered.model.pad_id, eos_token_id=sorted(steered.model.stop_ids))
    differs = 0
    for text, emotion in zip(TEXTS, MIXED, strict=True):
        reply, inputs = steered.generate(text, emotion, **LONG), steered.inputs(text)
        with steered.steering(emotion):
            tokens = steered.hf.generate(**inputs, repetition_penalty=Decoding.repetition_penalty, **decoding)
        row = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        stop = next((place for place, token in enumerate(row) if token in steered.model.stop_ids), len(row))
        assert tuple(row[:stop]) == reply.ids
        differs += reply.ids != steered.generate(text, **LONG).ids
    assert differs >= 4, "steering must matter"


def test_a_stream_joined_is_the_whole_reply_also_in_a_batch_of_eight_mixed_emotions(steered: SteeredModel) -> None:
    whole = steered.generate(TEXTS, MIXED, **LONG)
    parts = dict.fromkeys(range(8), "")
    for piece in steered.stream(TEXTS, MIXED, **LONG):
        parts[piece.row] += piece.text
    assert [parts[row] for row in range(8)] == [reply.text for reply in whole] and len(set(parts.values())) >= 3
    assert "".join(steered.stream(TEXTS[0], "anger", **LONG)) == steered.generate(TEXTS[0], "anger", **LONG).text


def test_the_best_of_several_is_chosen_for_each_prompt_and_streams_as_one_piece(
    steered: SteeredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever chooses, in the emotions that are added; a mixture's count together. One candidate is none."""
    chooser = choose_by(monkeypatch)
    best = steered.generate(TEXTS, MIXED, best_of=4, **LONG)
    assert {names for _, _, names in chooser.shown} == {("anger",), ("sadness",), ("fear",), ()}
    assert [reply.text for reply in best] == [max((t for said, t, _ in chooser.shown if said == text), key=len) for text in TEXTS]
    assert list(steered.stream(TEXTS[0], "anger", best_of=4, **LONG)) == [steered.generate(TEXTS[0], "anger", best_of=4, **LONG).text]
    pieces = {piece.row: (piece.text, piece.finish_reason) for piece in steered.stream(TEXTS, MIXED, best_of=4, **LONG)}
    assert pieces == {row: (reply.text, reply.finish_reason) for row, reply in enumerate(best)}
    seen = len(chooser.shown)
    assert steered.generate(TEXTS[0], "anger", best_of=1, **LONG) == steered.generate(TEXTS[0], "anger", **LONG)
    assert len(chooser.shown) == seen
    for wrong in (0, 65):
        with pytest.raises(UsageError, match="--best-of must lie between 1 and 64"):
            steered.generate(TEXTS[0], "anger", best_of=wrong)


def test_prompts_end_with_the_instruction_of_the_circuit(steered: SteeredModel) -> None:
    """What its dial was fitted to; another where one is given."""
    assert steered.circuit is not None
    other = replace(steered, circuit=replace(steered.circuit, instruction="no ."))
    own, given = other.inputs(TEXTS[0])["input_ids"], steered.inputs(TEXTS[0], instruction="no .")["input_ids"]
    assert torch.equal(own, given) and not torch.equal(own, other.inputs(TEXTS[0], instruction="yes .")["input_ids"])
    assert other.generate(TEXTS[0], "anger", **LONG).text == steered.generate(TEXTS[0], "anger", instruction="no .", **LONG).text


def test_a_conversation_is_answered_and_only_its_new_reply_is_steered(steered: SteeredModel) -> None:
    reply = steered.generate(CHAT, "anger", **LONG)
    assert reply.ids == steered.generate([CHAT, CHAT[:1]], ["anger", "fear"], **LONG)[0].ids
    ids, alone = steered.inputs(CHAT)["input_ids"], steered.inputs(CHAT[-1]["content"])["input_ids"]
    assert ids.shape[1] > alone.shape[1] and torch.equal(ids[0, -4:], alone[0, -4:]), "what was said before is read as well"
    with torch.no_grad():
        plain = steered.hf(input_ids=ids).logits
        with steered.steering("anger"):
            inside = steered.hf(input_ids=ids).logits
    assert torch.equal(plain[:, :-1], inside[:, :-1]) and not torch.equal(plain[:, -1], inside[:, -1])


def test_strengths_per_prompt(steered: SteeredModel) -> None:
    rows = steered.generate([TEXTS[0]] * 3, "anger", strength=[0.0, 8.0, None], **LONG)
    assert rows[0].ids == steered.generate(TEXTS[0], **LONG).ids and rows[1].ids == rows[2].ids
    assert rows[1].ids != rows[0].ids or steered.model.hf.config.model_type.startswith("gemma"), "which says one word over and over"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate("", "anger"), UsageError, "empty"),
        (lambda m: m.generate(TEXTS, ["anger"]), UsageError, "one for each of 8 prompts, found 1"),
        (lambda m: m.generate("the boss", "angr"), (UsageError, DataError, ArtifactError), "anger"),
        (lambda m: m.generate("the boss", "anger", method="circit"), UsageError, "did you mean 'circuit'"),
        (lambda m: m.generate("the boss", "anger", strenght=2), UsageError, "did you mean 'strength'"),
        (lambda m: m.generate("the boss", "anger", strength=float("nan")), UsageError, "finite"),
        (lambda m: m.generate("the boss", "anger", strength=1, intensity=2), UsageError, "found both"),
        (lambda m: m.generate("the boss", "anger", intensity=50), ArtifactError, "dial|calibrate"),
        (lambda m: m.generate("the boss", intensity=50), UsageError, "none is named"),
        (lambda m: m.generate(["the boss", "the train"], strength=[1, 2]), UsageError, "none is named"),
        (lambda m: m.generate([{"role": "user", "content": ""}]), (UsageError, DataError), "conversation 1"),
        (lambda m: m.generate("the " * 400), DataError, "256"),
        (lambda m: m.steering("anger", method="prompt").__enter__(), UsageError, "steers nothing"),
        (lambda m: m.generate("the boss", "anger", method="learned-residual"), ArtifactError, "--learn-residual"),
        (lambda m: m.steering("anger", method="learned-residual", strength=1.0).__enter__(), ArtifactError, "--learn-residual"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(steered: SteeredModel, call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call(steered)


def test_inside_a_block_nothing_else_is_written_or_measured(steered: SteeredModel) -> None:
    with steered.steering("anger"):
        for call in (lambda: steered.generate("the boss"), lambda: emosteer.extract(steered)):
            with pytest.raises(UsageError, match="end the block first"):
                call()


def test_without_a_circuit_the_way_to_one_is_said(steered: SteeredModel) -> None:
    bare = SteeredModel(steered.model)
    with pytest.raises(ArtifactError, match="auto=True"):
        bare.generate("the boss", "anger")
    assert bare.generate("the boss", "anger", method="prompt", **LONG).text and bare.emotions == emosteer.EMOTIONS


# ---- the stages: what the commands do ------------------------------------------------------------------------------------------


def test_functions_and_commands_make_the_same_artefacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_project(tmp_path)
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, "-m", "./tiny", "--scenarios", "sev.jsonl"])
        assert not stop.value.code

    command("extract", "--replies", "bank.jsonl", "--emotions", ",".join(EMOTIONS), "--holdout", "0.2")
    command("circuit", "--heads", "0.25", "--strength", "2")
    m = emosteer.load("./tiny")
    data = dict(scenarios="sev.jsonl", replies="bank.jsonl")
    directions = emosteer.extract(m, emotions=EMOTIONS, holdout=0.2, **data)
    theirs = emosteer.Directions.load(Path("artifacts/tiny/directions.safetensors"))
    assert same(directions, theirs)
    circuit = emosteer.assemble(m, scenarios="sev.jsonl", head_share=0.25, strength=2.0)
    written = emosteer.Circuit.load(Path("artifacts/tiny/circuit.safetensors"))
    assert torch.equal(circuit.z_delta, written.z_delta) and torch.equal(circuit.strength, written.strength)
    with pytest.raises(UsageError, match="residual vectors are learned beside gains"):
        emosteer.assemble(m, scenarios="sev.jsonl", head_share=0.25, learn_residual=True)
    learned = dict(data, gain_steps=2, tune=False)
    steered = SteeredModel(m.model, emosteer.assemble(m, **learned))
    assert steered.circuit is not None and steered.circuit.learned_residual is not None, "the default"
    assert steered.generate("the boss", "anger", method="learned-residual", strength=9.0, **LONG).ids != steered.generate("the boss").ids
    small = emosteer.assemble(m, learn_residual=False, budget=0.25, units="neurons", **learned)
    assert small.learned_residual is None and not small.heads.any() and len(small.neuron_index) == len(EMOTIONS) * 36
    with pytest.raises(UsageError, match="within a budget the units' outputs are learned; leave out --preset"):
        emosteer.assemble(m, budget=0.25, head_share=0.25, **learned)
    assert circuit.metrics == written.metrics and circuit.provenance.parents == written.provenance.parents
    assert m.circuit is not None and torch.equal(m.circuit.z_delta, written.z_delta), "load finds what the command made"


def same(one: emosteer.Directions, other: emosteer.Directions) -> bool:
    """Whether two hold the same numbers."""
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)]
    tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor)]
    return bool(tensors) and all(torch.equal(a, b) for a, b in tensors)


# ---- names ---------------------------------------------------------------------------------------------------------------------


def test_importing_is_instant_and_names_come_when_they_are_used() -> None:
    code = (
        "import time; t = time.perf_counter(); import emosteer, sys; took = time.perf_counter() - t\n"
        "assert 'torch' not in sys.modules; print(took, len(emosteer.EMOTIONS)); assert 'torch' not in sys.modules\n"
        "assert emosteer.load.__module__ == 'emosteer.api.loading' and set(emosteer.__all__) <= set(dir(emosteer))\n"
    )
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True) for _ in range(3)]
    assert all(done.returncode == 0 for done in runs), runs[0].stderr
    took, emotions = zip(*(done.stdout.split() for done in runs), strict=True)
    assert min(map(float, took)) < 0.1 and set(emotions) == {"6"}


def test_an_unknown_name_points_to_the_page() -> None:
    with pytest.raises(AttributeError, match="docs/API.md"):
        _ = emosteer.lod


@pytest.mark.parametrize(
    ("typed", "settings"),
    [
        (options.ExtractOptions, Settings),
        (options.AblateOptions, AblateSettings),
        (options.AssembleOptions, CircuitSettings),
        (options.CalibrateOptions, CalibrateSettings),
        (options.DecodingOptions, Decoding),
        (options.ProbeOptions, ProbeSettings),
        (options.HeadOptions, HeadSettings),
        (options.EffectsOptions, EffectsSettings),
        (options.ValidateOptions, ValidateSettings),
    ],
)
def test_the_named_options_are_the_fields_of_the_settings(typed: Any, settings: Any) -> None:
    assert set(typed.__annotations__) == {field.name for field in fields(settings)}


def test_every_public_name_is_described_and_typed() -> None:
    page = (ROOT / "docs" / "API.md").read_text(encoding="utf-8")
    assert {name for name in emosteer.__all__ if f"`{name}`" not in page} == set()
    assert (ROOT / "emosteer" / "py.typed").is_file()
    for name in emosteer.__all__:
        value = getattr(emosteer, name)
        if callable(value):
            assert (inspect.getdoc(value) or "").strip(), name


def test_the_signatures_on_the_page_are_those_of_the_code() -> None:
    """Names of parameters and, where the page gives one, defaults; what `**settings` or `**options` stands for is checked above."""
    page = (ROOT / "docs" / "API.md").read_text(encoding="utf-8")
    shown = {name: ast.parse(f"def f({given}): ...").body[0] for name, given in re.findall(r"(\w+)\(([^()`]*\*,[^()`]*)\)", page)}
    assert set(shown) >= {
        "load",
        "generate",
        "steering",
        "extract",
        "ablate",
        "assemble",
        "calibrate",
        "evaluate",
        "probe",
        "effects",
        "make_judge",
    }
    homes = {**{name: getattr(emosteer, name) for name in emosteer.__all__}, **vars(SteeredModel)}
    typed = {name: None for name in options.WritingOptions.__annotations__}
    for name, node in shown.items():
        assert isinstance(node, ast.FunctionDef)
        known = {key: value.default for key, value in inspect.signature(homes[name]).parameters.items()}
        defaults = {
            **typed,
            **{field.name: field.default for field in fields(Decoding)},
            "method": "circuit",
            "positions": "reply",
            **known,
        }
        defaults |= {"batch_size": BATCH_SIZE, "examples": True, **vars(Decoding.usual())} if name == "generate" else {}
        values = [*[None] * (len(node.args.args) - len(node.args.defaults)), *node.args.defaults, *node.args.kw_defaults]
        for argument, value in zip([*node.args.args, *node.args.kwonlyargs], values, strict=True):
            assert argument.arg in (known if "options" not in known else defaults), f"{name}: {argument.arg}"
            if isinstance(value, ast.Constant):
                default = defaults[argument.arg]
                assert (str(default) if isinstance(default, Path) else default) == value.value, f"{name}: {argument.arg}"


def test_the_models_own_replies_are_read_where_directions_were_made_with_them(tmp_path: Path) -> None:
    def made(*files: str) -> Any:
        return SimpleNamespace(provenance=SimpleNamespace(data=dict.fromkeys(files, "0" * 64)))

    place = tmp_path / "directions.safetensors"
    with_own, with_others = made(f"replies/{OWN_BANK}"), made("replies/plain.jsonl")
    assert bank_of(None, with_own, place) == bank_of("self", with_own, place) == tmp_path / OWN_BANK
    assert bank_of("other.jsonl", with_own, place) == Path("other.jsonl") and bank_of(None, with_others, place) is None
    for directions, where in ((with_others, place), (with_own, None)):
        with pytest.raises(UsageError, match="not made with the model's own replies; run `emosteer extract --replies self` first"):
            bank_of("self", directions, where)
