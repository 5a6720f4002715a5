"""Examples: read, kept with a circuit, shown before what is steered and before nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emosteer.base.errors import ArtifactError, DataError
from emosteer.circuits.arcs import Arc
from emosteer.circuits.circuit import Circuit
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request, generate
from emosteer.scenarios.examples import EXAMPLES, MAX_EXAMPLES, NO_EXAMPLES, Exchange, examples_of, preceded, read_examples, shown
from emosteer.scenarios.prompts import plain
from emosteer.scenarios.scenarios import EMOTIONS, Group, GroupKey, Message, data_path
from emosteer.scenarios.words import stem_pattern
from emosteer.writing.contest_writer import Cell, cells_of
from emosteer.writing.jobs import Job, felt_job, jobs_for, request_of
from emosteer.writing.writer import Writer
from tests.helpers import contest_setup
from tests.helpers.dialled import TOP, dialled_model

KEEP = "keep the reply"


def write(path: Path, *rows: Mapping[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SHOWN = {
    "anger": (Exchange("the train was late", "slam the door"), Exchange("why was it", "nine weeks")),
    "sadness": (Exchange("the train was late", "cry alone"), Exchange("why was it", "never home")),
}


def messages_of(emotion: str, text: str) -> list[dict[str, str]]:
    """A prompt behind the examples of an emotion, put together by hand."""
    turns: list[dict[str, str]] = []
    for exchange in SHOWN[emotion]:
        turns += [{"role": "user", "content": f"{exchange.said}\n{KEEP}"}, {"role": "assistant", "content": exchange.reply}]
    return [*turns, *plain(text, KEEP)]


def steered() -> Any:
    """A tiny model whose circuit has a dial, and examples of two of its emotions."""
    made = dialled_model()
    assert made.circuit is not None
    return replace(made, circuit=replace(made.circuit, examples=SHOWN, instruction=KEEP))


def job(circuit: Circuit, emotion: str, strength: float | None, method: str = "circuit", earlier: tuple[Message, ...] = ()) -> Job:
    return jobs_for("text", Group(GroupKey("", ""), "", "i waited alone"), [emotion], method, strength, circuit, {}, earlier)[0]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_shipped_examples_are_what_they_say() -> None:
    """Every emotion of the default circuit has the same prompts, answered without its name and in words of its own."""
    found = read_examples(data_path(EXAMPLES))
    assert {*EMOTIONS, "neutral"} <= {*found}
    prompts = [exchange.said for exchange in found["anger"]]
    assert len(prompts) == len({*prompts}) >= 3
    for emotion, exchanges in found.items():
        assert [exchange.said for exchange in exchanges] == prompts
        if emotion != "neutral":
            assert not any(stem_pattern(emotion).search(exchange.reply) for exchange in exchanges), emotion
    replies = [exchange.reply for exchanges in found.values() for exchange in exchanges]
    assert len({*replies}) == len(replies) and max(map(len, replies)) < 160


def test_shipped_examples_are_in_no_set_of_prompts() -> None:
    """Replies to prompts that are also shown would be copied, and judged."""
    said = {exchange.said for exchange in read_examples(data_path(EXAMPLES))["anger"]}
    for name in ("prompts/train.jsonl", "prompts/dev.jsonl", "prompts/test.jsonl"):
        texts = {turn["content"] for line in data_path(name).read_text().splitlines() for turn in json.loads(line)["messages"]}
        assert not said & texts


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "1: expected 'replies' to be an object"),
        ({"prompt": " ", "replies": {"anger": "b"}}, "1: expected 'prompt'"),
        ({"prompt": "a", "replies": {}}, "1: expected 'replies'"),
        ({"prompt": "a", "replies": {"anger": ""}}, "1: expected 'replies.anger'"),
        ({"prompt": "a", "replies": {"a<b": "c"}}, "a<b"),
        ({"prompt": "a\x1b[2J", "replies": {"anger": "b"}}, "1: expected texts without control characters"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, row: Mapping[str, Any], message: str) -> None:
    path = write(tmp_path / "own.jsonl", row)
    with pytest.raises(DataError, match=message):
        read_examples(path)


def test_a_file_is_refused_that_would_make_a_circuit_that_is(tmp_path: Path) -> None:
    """Before a dial is fitted with it for minutes: as many as a circuit's file may hold are taken, and one more is not."""
    row = {"prompt": "a", "replies": {"anger": "b"}}
    most = read_examples(write(tmp_path / "most.jsonl", *[row] * MAX_EXAMPLES))
    replace(contest_setup.parts()[1], examples=most).save(tmp_path / "circuit.safetensors")
    assert len(Circuit.load(tmp_path / "circuit.safetensors").examples["anger"]) == MAX_EXAMPLES
    with pytest.raises(DataError, match="101: expected at most 100 examples for anger, found more"):
        read_examples(write(tmp_path / "more.jsonl", *[row] * (MAX_EXAMPLES + 1)))


def test_a_file_gives_what_it_has_of_the_wanted_emotions(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", {"prompt": "a", "replies": {"Anger": "b", "glee": "c"}})
    assert examples_of(path, ["glee", "fear"]) == {"glee": (Exchange("a", "c"),)}
    assert examples_of(NO_EXAMPLES, EMOTIONS) == {} and examples_of(None, ["glee"]) == {}
    assert {*examples_of(None, ["anger", "glee"])} == {"anger"}
    with pytest.raises(DataError, match="expected replies in some of fear, found anger, glee"):
        examples_of(path, ["fear"])


def test_a_circuit_keeps_its_examples(tmp_path: Path) -> None:
    circuit = replace(contest_setup.parts()[1], examples=SHOWN)
    circuit.save(tmp_path / "circuit.safetensors")
    assert Circuit.load(tmp_path / "circuit.safetensors").examples == SHOWN
    assert not circuit.without_examples().examples
    replace(circuit, examples={"glee": (Exchange("a", "b"),)}).save(tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError, match="expected 'examples' of anger, sadness, happiness, found some of glee"):
        Circuit.load(tmp_path / "other.safetensors")
    replace(circuit, examples={"anger": (Exchange("a", ""),)}).save(tmp_path / "empty.safetensors")
    with pytest.raises(ArtifactError, match="reply"):
        Circuit.load(tmp_path / "empty.safetensors")


def test_without_examples_a_circuit_has_the_strengths_and_the_dial_that_it_had_before() -> None:
    """Less steering suffices behind examples: an export, the plain model, `--no-examples` and whatever steers away must not take that."""
    circuit = steered().circuit
    dial, half = circuit.metrics["calibration"], dict.fromkeys(EMOTIONS, 0.35)
    weaker = {**dial, "before": half, "emotions": {e: {**row, "strength": [0, 0.1, 0.2]} for e, row in dial["emotions"].items()}}
    alone = {"strength": dict.fromkeys(EMOTIONS, 2.5), "calibration": dial}
    made = replace(circuit, metrics={"calibration": weaker, "alone": alone}).with_strength([0.1] * 6)
    assert made.strength_at("anger", 100) == 0.2 and made.strength_at("anger", -100) == -TOP / 2, "to steer away nothing is shown"
    bare = made.without_examples()
    assert bare.default_strength("anger") == 2.5 and bare.strength_at("anger", 100) == TOP and "alone" not in bare.metrics
    assert bare.without_examples() is bare and torch.equal(bare.z_delta, made.z_delta)
    undialled = replace(made, metrics={"calibration": weaker}).without_examples()
    assert undialled.default_strength("anger") == 0.35 and undialled.strength_at("anger", 100) == 0.2, "it never had another dial"
    assert replace(made, metrics={}).without_examples().default_strength("anger") == 0.1


# ---- where they stand ------------------------------------------------------------------------------------------------


def test_several_emotions_take_turns() -> None:
    turns = shown(SHOWN, ["sadness", "fear", "anger"], KEEP)
    assert [turn.content for turn in turns if turn.role == "assistant"] == ["cry alone", "nine weeks"]
    assert [turn.content for turn in turns if turn.role == "user"] == [f"the train was late\n{KEEP}", f"why was it\n{KEEP}"]
    assert shown(SHOWN, ["fear"], KEEP) == shown({}, ["anger"], KEEP) == shown(SHOWN, [], KEEP) == ()
    assert shown(SHOWN, ["anger"], "")[0].content == "the train was late"


def test_they_stand_behind_the_system_line() -> None:
    line, said = Message("system", "be kind"), Message("user", "hello")
    example = Message("user", "a"), Message("assistant", "b")
    assert preceded([line, said], example) == (line, *example, said) and preceded([], example) == example


def test_a_steered_reply_is_what_the_model_writes_behind_the_examples() -> None:
    """Token for token, guided or not; unsteered, steered away or asked by the prompt there is nothing before it."""
    made = steered()
    model, circuit = made.model, made.circuit
    wanted = tuple(model.prompt_ids(messages_of("anger", "i waited alone")))
    request = request_of(model, job(circuit, "anger", 1.5), KEEP, guides=True, circuit=circuit)
    assert request.ids == wanted
    assert request.empty == tuple(model.prompt_ids([*messages_of("anger", "")[:-1], *plain("", KEEP)]))
    bare = tuple(model.prompt_ids(plain("i waited alone", KEEP)))
    for other in (job(circuit, "anger", 0.0), job(circuit, "anger", -1.0), job(circuit, "fear", 1.5)):
        assert request_of(model, other, KEEP, circuit=circuit).ids == bare
    assert request_of(model, job(circuit, "anger", None, "none"), KEEP, circuit=circuit).ids == bare
    asked = request_of(model, job(circuit, "anger", None, "prompt"), KEEP, circuit=circuit)
    assert asked.ids == request_of(model, job(circuit, "anger", None, "prompt"), KEEP).ids
    writer = Writer(model, circuit, Decoding.usual(max_new_tokens=6), KEEP, "circuit")
    ((_, reply),) = writer.write([job(circuit, "anger", 1.5)])
    alone = generate(model, [Request("text/anger", wanted, request.empty)], writer.plan([job(circuit, "anger", 1.5)]), writer.decoding)[0]
    assert reply.ids == alone.ids
    earlier = (Message("system", "be late"), Message("user", "home"), Message("assistant", "never"))
    behind = [
        earlier[0]._asdict(),
        *messages_of("anger", "")[:-1],
        *(turn._asdict() for turn in earlier[1:]),
        *plain("i waited alone", KEEP),
    ]
    assert list(request_of(model, job(circuit, "anger", 1.5, earlier=earlier), KEEP, circuit=circuit).ids) == model.prompt_ids(behind)


def test_mixtures_and_arcs_show_what_they_feel_in_its_order() -> None:
    made = steered()
    for arc, replies in (
        ("sadness:40 + anger:20", ["cry alone", "nine weeks"]),
        ("anger:60 -> sadness:60", ["slam the door", "never home"]),
        ("sadness:60 -> fear:60", ["cry alone", "never home"]),
        ("sadness:-40 + anger:20", ["slam the door", "nine weeks"]),
        ("fear:50", []),
    ):
        felt = felt_job("text", (Message("user", "i waited alone"),), Arc.parse(arc), made.circuit, 8)
        ids = list(request_of(made.model, felt, KEEP, circuit=made.circuit).ids)
        turns = [
            turn
            for exchange, reply in zip(SHOWN["anger"], replies, strict=False)
            for turn in ({"role": "user", "content": f"{exchange.said}\n{KEEP}"}, {"role": "assistant", "content": reply})
        ]
        assert ids == made.model.prompt_ids([*turns, *plain("i waited alone", KEEP)]), arc


def test_they_can_be_left_out_and_then_it_is_another_run() -> None:
    made = steered()
    with_them = made.generate("i waited alone", "anger", strength=1.5, max_new_tokens=8)
    without = made.generate("i waited alone", "anger", strength=1.5, max_new_tokens=8, examples=False)
    bare = replace(made, circuit=made.circuit.without_examples())
    assert without == bare.generate("i waited alone", "anger", strength=1.5, max_new_tokens=8) and without.ids != with_them.ids
    keys = {Writer(made.model, some, Decoding(), KEEP, "circuit").run_key("d") for some in (made.circuit, bare.circuit)}
    assert len(keys) == 2


def test_the_contest_shows_them_to_whatever_steers(tmp_path: Path) -> None:
    """On equal terms: before every steered prompt and the one that shows them alone, and before no other."""
    model = contest_setup.parts()[0]
    found = replace(contest_setup.contest(tmp_path), examples=SHOWN, instruction=KEEP)
    group = contest_setup.groups(1)[0]
    behind, bare = model.prompt_ids(messages_of("anger", group.text)), model.prompt_ids(plain(group.text, KEEP))
    for method in ("circuit", "residual", "learned-residual", "random-heads", "random-direction"):
        assert list(found.request(Cell(group, "anger", method, 2.0)).ids) == behind
        assert list(found.request(Cell(group, "anger", method, 0.0)).ids) == bare, "strength 0 is the unsteered reply"
        assert list(found.request(Cell(group, "happiness", method, 2.0)).ids) == bare, "it has none"
    assert list(found.request(Cell(group, "anger", "prompt-examples")).ids) == behind
    assert list(found.request(cells_of("none", [group], {})[0]).ids) == bare
    assert len(found.request(Cell(group, "anger", "prompt-tone")).ids) < len(behind)
    keys = {replace(found, examples=some).key(Cell(group, "anger", "circuit", 2.0)) for some in ({}, SHOWN)}
    assert len(keys) == 2
