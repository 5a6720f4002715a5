"""Jobs: what is kept under which key, in which batches it is written, and conversations of several turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emosteer.base.errors import DataError, UsageError
from emosteer.generation.generate import Decoding, Request, batches
from emosteer.models import tokens
from emosteer.models.model import Model
from emosteer.scenarios.conversations import parse_messages
from emosteer.scenarios.scenarios import Group, GroupKey, Message, read_bank
from emosteer.writing.contest_writer import Cell, ContestWriter, cells_of
from emosteer.writing.jobs import Job, job_key, jobs_for, request_of, row_of, strengths_of
from emosteer.writing.reply_files import write_file
from emosteer.writing.writer import Writer
from tests.conftest import small_data, tiny_tokenizer
from tests.helpers import contest_setup, reference
from tests.helpers.dialled import dialled_model

TALK = (Message("system", "keep it"), Message("user", "the train"), Message("assistant", "never again"), Message("user", "why was it late"))


class Named:
    """What keys ask of a model, with hashes that no machine's random numbers change."""

    sha256, template_sha256, dtype, name = "0123abcd", "beef", torch.float32, "named"
    control_tokens, precision = False, "torch.float32"
    tokenizer = tiny_tokenizer()

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return tokens.prompt_ids(self.tokenizer, messages)


NAMED: Model = Named()  # type: ignore[assignment]


def text_job(text: str, emotion: str = "anger", earlier: tuple[Message, ...] = (), method: str = "circuit") -> Job:
    return jobs_for("text", Group(GroupKey("", ""), "", text), [emotion], method, 1.5, None, {}, earlier)[0]


# ---- keys and batches ------------------------------------------------------------------------------------------------


def test_run_keys_job_keys_prompts_and_batches_are_those_of_files_on_disk() -> None:
    """Literal values: with other ones, files that users have begun could not be gone on with."""
    groups = small_data(2)[0]
    jobs = [Job.of(group, emotion, "prompt", None) for group in groups for emotion in ("anger", "fear")]
    writer = Writer(NAMED, None, Decoding(max_new_tokens=6, temperature=0.8), "keep reply", "prompt", batch_size=5)
    assert writer.run_key() == "a8e4b599aa5a" and writer.run_key("c" * 64) == "01afaf980e30"
    assert Writer(NAMED, None, Decoding(), "", "circuit", positions="all").run_key("d" * 64) == "5e58f3b4d757"
    assert list(batches(writer.requests(jobs), 5)) == [[8, 9, 0, 1, 2], [3, 10, 11, 6, 7], [4, 5]]
    assert jobs[0].key == '["s0/positive/anger", "anger", "prompt", null, "hide a home reply no cry train"]'
    plain = text_job("the train is late")
    assert plain.key == '["text/anger", "anger", "circuit", 1.5, "the train is late"]'
    assert request_of(NAMED, plain, "reply") == Request("text/anger", (1, 3, 10, 44, 14, 43, 71, 2, 1, 4))
    asked = (1, 3, 59, 11, 39, 71, 68, 57, 44, 0, 20, 27, 16, 11, 0, 19, 0, 78, 74, 71, 2, 1, 4)
    assert request_of(NAMED, jobs[0], "reply") == Request("s0/positive/anger", asked)


def test_another_chat_template_is_another_run() -> None:
    writer = Writer(NAMED, None, Decoding(), "", "circuit")
    changed: Model = Named()  # type: ignore[assignment]
    changed.template_sha256 = "e" * 64  # type: ignore[misc]
    other = Writer(changed, None, Decoding(), "", "circuit")
    assert writer.run_key() != other.run_key()


def test_prompts_of_one_key_and_other_words_are_told_apart() -> None:
    """A file of one's own may hold ids of the shipped one, and both are written by one writer."""
    none: Model = None  # type: ignore[assignment]
    writer = ContestWriter(NAMED, ("anger", "fear"), {}, {}, Decoding(6), "keep reply", none, batch_size=4)
    group = small_data(1)[0][0]
    edited = replace(group, text="we waited nine weeks")
    one, other, after = (
        Cell(some, "none", "none") for some in (group, edited, replace(group, earlier=(Message("user", "no"), Message("assistant", "yes"))))
    )
    assert len({writer.request(cell).ids for cell in (one, other, after)}) == 3
    assert len({writer.key(cell) for cell in (one, other, after)}) == 3


def test_keys_and_batches_of_the_contest_are_those_of_files_on_disk() -> None:
    groups = small_data(2)[0]
    none: Model = None  # type: ignore[assignment]
    writer = ContestWriter(NAMED, ("anger", "fear"), {}, {"circuit": "hash"}, Decoding(6), "keep reply", none, batch_size=4)
    cells = cells_of("none", groups, {}) + cells_of("circuit", groups[:3], {"anger": 2.0, "fear": 1.0})
    cells += cells_of("prompt-tone", groups[:2], {"anger": None, "fear": None})
    assert list(writer._batches(cells)) == [[4, 0, 1, 5], [3, 2], [6, 7, 8, 9], [10, 11], [12, 13, 14, 15]]
    keys = [writer.key(cells[index])[:16] for index in (0, 6, 7, 12)]
    assert keys == ["8031349a7fe2e565", "6840d46b6a0e6433", "9d1139d8a2abd6e5", "b55aff97d34dcfc6"]


# ---- conversations ---------------------------------------------------------------------------------------------------


def test_a_conversation_is_the_chat_template_s() -> None:
    talk = text_job(TALK[-1].content, earlier=TALK[:-1])
    assert talk.messages == TALK and talk.text == "why was it late"
    turns = [message._asdict() for message in TALK]
    template = NAMED.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert template.count("<|im_start|>") == 5
    assert list(request_of(NAMED, talk, "").ids) == NAMED.tokenizer(template, add_special_tokens=False)["input_ids"]
    instructed = [*turns[:-1], {"role": "user", "content": "why was it late\nkeep the reply"}]
    assert list(request_of(NAMED, talk, "keep the reply").ids) == NAMED.prompt_ids(instructed)


@pytest.mark.parametrize("earlier", [TALK[:-1], TALK[1:-1]])
def test_the_prompt_method_asks_in_the_last_turn(earlier: tuple[Message, ...]) -> None:
    talk, turns = text_job("why", "fear", earlier, "prompt"), [message._asdict() for message in earlier]
    last = {"role": "user", "content": "why\nReply to this in a tone of strong fear.\nkeep"}
    assert list(request_of(NAMED, talk, "keep").ids) == NAMED.prompt_ids([*turns, last])
    system = {"role": "system", "content": "keep it\nAlways reply in fear." if len(earlier) == 3 else "Always reply in fear."}
    rest = [turn for turn in turns if turn["role"] != "system"]
    plain = {"role": "user", "content": "why\nkeep"}
    assert list(request_of(NAMED, talk, "keep", "system").ids) == NAMED.prompt_ids([system, *rest, plain])


def test_steering_acts_where_the_new_reply_is_written_and_on_no_earlier_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against bare hooks from the prompt's last position on, and against hooks everywhere, which write something else."""
    model, circuit, _ = contest_setup.parts()
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset())
    job = text_job("why was it late", contest_setup.EMOTIONS[0], TALK[:-1])
    vectors = circuit.steering(model)
    changes = {(site.layer, site.kind): lambda x, added=value[0]: x + 1.5 * added for site, value in vectors.items()}
    prompt = request_of(model, job, "").ids
    expected = reference.greedy(model, prompt, changes, 8, frozenset(), 1.1)[0]
    unsteered = reference.greedy(model, prompt, {}, 8, frozenset(), 1.1)[0]
    ((_, reply),) = Writer(model, circuit, Decoding(8), "", "circuit").write([job])
    assert reply.ids == expected != unsteered
    with reference.changed(model.hf, changes):
        everywhere = model.hf(input_ids=torch.tensor([prompt])).logits[0, -1]
    late = reference.greedy(model, prompt, changes, 1, frozenset())[1][0]
    assert not torch.allclose(everywhere, late, atol=1e-3), "the earlier turns would have been steered"


def test_a_file_holds_the_conversation_and_goes_on_by_it(tmp_path: Path) -> None:
    model = contest_setup.parts()[0]
    out, writer = tmp_path / "out.jsonl", Writer(model, None, Decoding(4), "", "none")
    talks = [text_job("why", "none", earlier, "none") for earlier in ((), TALK[:3], TALK[1:3])]
    assert len({job.key for job in talks}) == 3
    rows = write_file(writer, talks, out)
    assert "messages" not in rows[0] and rows[0]["prompt"] == "why"
    assert rows[1]["messages"] == [{"role": m.role, "content": m.content} for m in (*TALK[:3], Message("user", "why"))]
    assert [job_key(row) for row in rows] == [job.key for job in talks]
    kept = out.read_bytes()
    assert sorted(job_key(json.loads(line)) for line in kept.splitlines()) == sorted(job.key for job in talks)
    assert write_file(writer, talks, out) == rows and out.read_bytes() == kept


def test_a_text_s_row_is_as_it_was() -> None:
    from emosteer.generation.generate import Reply

    row = row_of(text_job("why"), Reply("text/anger", "no", (5, 6), "stop"), "run1")
    assert json.dumps(row) == (
        '{"id": "text/anger", "skeleton_id": null, "valence": null, "emotion": "anger", "method": "circuit", "strength": 1.5, '
        '"prompt": "why", "text": "no", "finish_reason": "stop", "n_tokens": 2, "run": "run1"}'
    )


def test_a_prompt_of_a_file_is_a_job_with_its_earlier_turns_and_no_valence() -> None:
    chat = Group(GroupKey("p1", ""), "chat", "why was it late", "chat", TALK[1:3])
    for job in (Job.of(chat, "fear", "circuit", 1.0), jobs_for("p1", chat, ["fear"], "circuit", 1.0, None, {})[0]):
        assert (job.id, job.skeleton_id, job.valence, job.messages) == ("p1/fear", "p1", None, TALK[1:])
        assert list(request_of(NAMED, job, "keep").ids) == NAMED.prompt_ids(
            [*(m._asdict() for m in TALK[1:3]), {"role": "user", "content": "why was it late\nkeep"}]
        )


def test_replies_to_prompts_are_a_bank(tmp_path: Path) -> None:
    """What is written of a prompt file can be read back as its bank."""
    model = contest_setup.parts()[0]
    found = contest_setup.prompts(3)
    jobs = [Job.of(prompt, emotion, "prompt", None) for prompt in found for emotion in ("anger", "fear")]
    rows = write_file(Writer(model, None, Decoding(4), "", "prompt"), jobs, tmp_path / "bank.jsonl")
    bank = read_bank(tmp_path / "bank.jsonl")
    assert [*bank] == [prompt.key for prompt in found] and bank[found[0].key] == {"anger": rows[0]["text"], "fear": rows[1]["text"]}


def turn(role: object, content: object = "why") -> dict[str, object]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "f:3: expected 'messages' to be a list of objects with 'role' and 'content', found nothing"),
        ([], "f:3: expected 'messages' to be a list .*, found \\[\\]"),
        (["why"], 'f:3: message 1: expected an object with .*, found "why"'),
        ([turn("robot")], "f:3: message 1: expected 'role' to be system or user, found \"robot\""),
        ([turn(["user"])], "f:3: message 1: expected 'role' to be system or user, found \\[\"user\"\\]"),
        ([turn("assistant")], "f:3: message 1: expected 'role' to be system or user, found \"assistant\""),
        ([turn("user"), turn("user")], "f:3: message 2: expected 'role' to be assistant after user, found \"user\""),
        ([turn("user"), turn("assistant"), turn("system")], "f:3: message 3: expected 'role' to be user after assistant, found"),
        ([turn("system")], "f:3: expected the last message to be the user's, found one of role 'system'"),
        ([turn("user"), turn("assistant")], "f:3: expected the last message to be the user's, found one of role 'assistant'"),
        ([turn("user", " ")], "f:3: message 1: expected 'content' to be a text that is not empty"),
        ([{"role": "user"}], "f:3: message 1: expected 'content' to be a text that is not empty, found nothing"),
    ],
)
def test_what_is_no_conversation_is_refused_by_file_line_and_message(value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_messages(value, "f:3")


def test_a_conversation_is_read_as_it_stands() -> None:
    assert parse_messages([message._asdict() for message in TALK], "f:1") == TALK
    assert parse_messages([turn("user", " why ")], "f:1") == (Message("user", "why"),)


def test_the_strengths_of_a_job_are_those_of_its_emotion_however_it_is_spelt() -> None:
    circuit = dialled_model().circuit
    assert circuit is not None
    job = Job("x/anger", None, None, (Message("user", "x"),), "Anger ", "circuit", 1.5)
    assert strengths_of(job, circuit) == (tuple(1.5 if name == "anger" else 0.0 for name in circuit.emotions),)
    assert strengths_of(replace(job, method="none"), circuit) == strengths_of(replace(job, strength=0.0), circuit) == ((0.0,) * 6,)
    with pytest.raises(UsageError, match="unknown emotion 'joy'"):
        strengths_of(replace(job, emotion="joy"), circuit)
