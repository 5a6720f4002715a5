"""The best of several: what the candidates are, who chooses, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emosteer.circuits.methods import CIRCUIT, NONE, RESIDUAL
from emosteer.generation.decoding import DRAWN_TEMPERATURE, DRAWN_TOP_P, Decoding
from emosteer.generation.generate import Request, generate, steps
from emosteer.generation.steering import SteeringPlan
from emosteer.judges.choosing.chooser import Chooser
from emosteer.models.model import Model
from emosteer.scenarios.scenarios import Message
from emosteer.writing.best_of import Asked, beginnings, candidate_key, chooser_for, generate_best, rows_of, write_batch
from emosteer.writing.contest_writer import Cell
from emosteer.writing.jobs import Job, felt_in, said_in
from emosteer.writing.writer import Writer
from tests.helpers.choosing import ByRule
from tests.helpers.contest_setup import EMOTIONS, WORD, contest, groups, parts

DECODING = Decoding(max_new_tokens=10, best_of=5, seed=3)


def requests(model: Model, count: int = 3) -> list[Request]:
    return [Request(f"r{n}", tuple(model.prompt_ids([{"role": "user", "content": group.text}]))) for n, group in enumerate(groups(count))]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("No! Why? I waited", ["No!", "No! Why?", "No! Why? I waited"]),
        ("No. Why?", ["No.", "No. Why?"]),
        ("It costs 3.5 pounds, Mr. Hill.  Really?!", ["It costs 3.5 pounds, Mr. Hill.", "It costs 3.5 pounds, Mr. Hill.  Really?!"]),
        ("1. Eggs. 2. Milk.", ["1. Eggs.", "1. Eggs. 2. Milk."]),
        ('"Go!" she said. Fine', ['"Go!"', '"Go!" she said.', '"Go!" she said. Fine']),
        ("\u4e0d\uff01\u4e3a\u4ec0\u4e48\uff1f", ["\u4e0d\uff01", "\u4e0d\uff01\u4e3a\u4ec0\u4e48\uff1f"]),
        ("no end", ["no end"]),
        (" \n", []),
    ],
)
def test_a_reply_may_end_after_any_of_its_sentences(text: str, parts: list[str]) -> None:
    """Not after a title, a number, or inside one."""
    assert beginnings(text) == parts


def test_candidates_are_what_generate_draws_and_the_chosen_one_is_kept(tiny: Model) -> None:
    """Each by its own seed; the longest is chosen here, and it is one of those that `generate` draws alone."""
    chooser, asked = ByRule(len), [Asked(f"said {n}", ("anger",)) for n in range(3)]
    found = generate_best(tiny, requests(tiny), SteeringPlan.none(3), DECODING, asked, chooser)  # type: ignore[arg-type]
    for n, (request, reply) in enumerate(zip(requests(tiny), found, strict=True)):
        drawn = [
            generate(tiny, [replace(request, key=candidate_key(request.key, place))], decoding=DECODING.drawing)[0] for place in range(5)
        ]
        assert len({one.text for one in drawn}) > 1
        assert reply.text == max((one.text for one in drawn), key=len) and reply.key == request.key
        assert {text for said, text, _ in chooser.shown if said == f"said {n}"} == {p for one in drawn for p in beginnings(one.text)}
    assert {names for _, _, names in chooser.shown} == {("anger",)}


def test_a_reply_that_was_ended_early_has_stopped(tiny: Model) -> None:
    """Its tokens are those of its text."""
    chooser = ByRule(lambda text: -len(text))
    found = generate_best(tiny, requests(tiny, 4), SteeringPlan.none(4), replace(DECODING, best_of=8), [Asked("x")] * 4, chooser)  # type: ignore[arg-type]
    shortest: dict[str, int] = {}
    ended = [reply for reply in found if tuple(tiny.text_ids(reply.text)) == reply.ids and reply.finish_reason == "stop"]
    assert ended and not shortest
    assert all(len(reply.text) == min(len(t) for _, t, _ in chooser.shown if t == reply.text) for reply in found)


def test_of_equals_the_first_is_kept(tiny: Model) -> None:
    """A chooser of no mind changes nothing but the temperature."""
    chooser = ByRule(lambda text: 1)
    found = generate_best(tiny, requests(tiny), SteeringPlan.none(3), DECODING, [Asked("x")] * 3, chooser)  # type: ignore[arg-type]
    alone = generate(tiny, requests(tiny), decoding=DECODING.drawing)
    assert [reply.text for reply in found] == [beginnings(reply.text)[0] if reply.text else "" for reply in alone]


def test_each_candidate_is_steered_as_its_reply(tiny: Model) -> None:
    """Planted emotions: every candidate of every row says the word of its own emotion."""
    model, circuit, _ = parts()
    writer = Writer(model, circuit, DECODING, "", CIRCUIT, chooser=ByRule(len))  # type: ignore[arg-type]
    jobs = [Job(f"j{e}", None, None, (Message("user", groups(1)[0].text),), e, CIRCUIT, 6.0) for e in EMOTIONS]
    for job, reply in writer.write(jobs):
        assert WORD[job.emotion] in reply.text
    seen = writer.chooser.shown  # type: ignore[union-attr]
    assert {names for _, _, names in seen} == {(e,) for e in EMOTIONS}
    assert {said for said, _, _ in seen} == {groups(1)[0].text}


def test_batch_size_and_neighbours_change_nothing(tiny: Model) -> None:
    """A batch holds so many candidates, not replies."""
    model, circuit, _ = parts()
    jobs = [Job(f"j{n}/{e}", None, None, (Message("user", g.text),), e, CIRCUIT, 3.0) for n, g in enumerate(groups(3)) for e in EMOTIONS]

    def texts(size: int) -> dict[str, str]:
        writer = Writer(model, circuit, DECODING, "", CIRCUIT, size, chooser=ByRule(len))  # type: ignore[arg-type]
        return {job.id: reply.text for job, reply in writer.write(jobs)}

    assert texts(1) == texts(7) == texts(64)
    assert rows_of(32, DECODING) == 6 and rows_of(3, DECODING) == 1 and rows_of(32, replace(DECODING, best_of=1)) == 32


def test_the_run_key_knows_the_chooser_and_the_number() -> None:
    """And that of replies without candidates stays what it was."""
    model, circuit, _ = parts()

    def key(best_of: int, chooser: str | None) -> str:
        who: Any = None if chooser is None else ByRule(len, chooser)
        return Writer(model, circuit, replace(DECODING, best_of=best_of), "", CIRCUIT, chooser=who).run_key()

    assert len({key(1, None), key(4, "a"), key(5, "a"), key(5, "b")}) == 4
    assert "best_of" not in replace(DECODING, best_of=1).shaping and DECODING.shaping["best_of"] == 5


def test_a_stream_of_the_best_is_one_piece() -> None:
    """The same as what is written whole."""
    model, circuit, _ = parts()
    writer = Writer(model, circuit, DECODING, "", CIRCUIT, chooser=ByRule(len))  # type: ignore[arg-type]
    job = Job("j", None, None, (Message("user", groups(1)[0].text),), "anger", CIRCUIT, 3.0)
    [(_, reply)] = list(writer.write([job]))
    assert list(writer.stream(job)) == [reply.text]


def test_greedy_candidates_are_drawn_and_sampled_ones_as_asked() -> None:
    """All greedy candidates would be one."""
    assert DECODING.drawing == replace(DECODING, best_of=1, temperature=DRAWN_TEMPERATURE, top_p=DRAWN_TOP_P)
    warm = replace(DECODING, temperature=1.2, top_p=1.0)
    assert warm.drawing == replace(warm, best_of=1)
    assert replace(DECODING, best_of=1).drawing == replace(DECODING, best_of=1)


def test_candidates_need_somebody_who_chooses(tiny: Model) -> None:
    """Neither the engine nor a writer without a chooser writes the first of them in silence."""
    with pytest.raises(ValueError, match="token by token"):
        next(steps(tiny, requests(tiny, 1), decoding=DECODING))
    with pytest.raises(ValueError, match="has to choose"):
        write_batch(tiny, requests(tiny, 1), SteeringPlan.none(1), DECODING, [Asked("x")], None)


def test_no_chooser_is_loaded_for_replies_without_candidates(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a second model."""
    monkeypatch.setattr(Chooser, "load", lambda *_: pytest.fail("loaded"))
    assert chooser_for(tiny, Decoding()) is None


def test_what_a_job_wants() -> None:
    """What is added; what a prompt asks for; nothing for an unsteered reply, or away from an emotion."""
    _, circuit, _ = parts()

    def job(emotion: str, method: str, strength: float | None, course: Any = None) -> Job:
        return Job("j", None, None, (Message("user", "x"),), emotion, method, strength, course)

    assert felt_in(job("anger", CIRCUIT, 2.0), circuit) == ("anger",) == felt_in(job("anger", RESIDUAL, 2.0), circuit)
    assert felt_in(job("anger", CIRCUIT, -2.0), circuit) == () == felt_in(job(NONE, NONE, None), None)
    assert felt_in(job("sadness", "prompt", None), None) == ("sadness",)
    assert felt_in(job("mix", CIRCUIT, None, ((0.0, 1.0, 0.0), (0.0, 0.5, 2.0))), circuit) == ("sadness", "happiness")
    assert said_in((Message("system", "be brief"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))) == "a b c"


def test_the_contest_chooses_for_every_method_alike(tmp_path: Path) -> None:
    """Unsteered replies, too; keys know the number and the chooser."""
    chooser: Any = ByRule(len)
    plain = contest(tmp_path / "plain")
    found = replace(plain, decoding=replace(plain.decoding, best_of=4, seed=1), chooser=chooser, _prompts={})
    cells = [Cell(groups(1)[0], NONE, NONE), Cell(groups(1)[0], "anger", CIRCUIT, 4.0)]
    rows = found.write(cells, "test")
    assert {names for _, _, names in chooser.shown} == {(), ("anger",)}
    for cell, row in zip(cells, rows, strict=True):
        mine = [text for _, text, names in chooser.shown if names == (() if cell.emotion == NONE else ("anger",))]
        assert row["text"] == max(mine, key=len)
    other = replace(found, chooser=ByRule(len, "another"), _prompts={})  # type: ignore[arg-type]
    assert len({plain.key(cells[1]), found.key(cells[1]), other.key(cells[1])}) == 3


def test_a_candidate_that_names_the_emotion_comes_last() -> None:
    """However likely it is; where all name it, the likeliest stays."""
    model, circuit, _ = parts()
    one = [Request("r", tuple(model.prompt_ids([{"role": "user", "content": groups(1)[0].text}])))]

    def texts(wanted: tuple[str, ...], rule: Any) -> str:
        chooser: Any = ByRule(rule)
        return generate_best(model, one, SteeringPlan.none(1), replace(DECODING, best_of=12), [Asked("x", wanted)], chooser)[0].text

    drawn = {text for key in range(12) for text in beginnings(_drawn(model, one[0], key))}
    named = [text for text in drawn if "anger" in text.split()]
    assert named and len(named) < len(drawn), "some of the candidates say the word, and some do not"
    assert "anger" in texts((), lambda text: "anger" in text) and "anger" not in texts(("anger",), lambda text: "anger" in text)


def _drawn(model: Model, request: Request, place: int) -> str:
    return generate(model, [replace(request, key=candidate_key(request.key, place))], decoding=DECODING.drawing)[0].text
