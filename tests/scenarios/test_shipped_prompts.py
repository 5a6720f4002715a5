"""Lints of the shipped prompts and of the bank that answers the training ones: what the data card says of them is so."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from emosteer.base.files import read_jsonl
from emosteer.scenarios.contamination import phrases_of
from emosteer.scenarios.lints import lint_bank, near_duplicates
from emosteer.scenarios.prompt_sets import KINDS, read_groups
from emosteer.scenarios.scenarios import EMOTIONS, NEUTRAL, SEV_KIND, Group, data_path, read_bank
from emosteer.scenarios.words import feeling_pattern

SETS = ("test", "dev", "train")
#: The scenarios of both sides, and what judges learn from. judge/answer_pairs.jsonl is measured on only.
OTHERS = [f"{file.parent.name}/{file.name}" for room in ("judge", "sev") for file in sorted(data_path(room).glob("*.jsonl"))]
OTHERS.remove("judge/answer_pairs.jsonl")


@cache
def prompts(name: str) -> tuple[Group, ...]:
    return tuple(read_groups(data_path(f"prompts/{name}.jsonl")))


def turns(name: str) -> list[str]:
    """Everything that is said in a set of prompts, turn by turn."""
    return [text for group in prompts(name) for text in (*(message.content for message in group.earlier), group.text)]


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from texts_of(item)


def test_every_kind_has_enough_prompts_to_be_told_apart() -> None:
    counts = {name: Counter(group.kind for group in prompts(name)) for name in SETS}
    assert counts["test"] == {kind: 48 for kind in KINDS if kind != SEV_KIND} and len(prompts("test")) == 336
    assert counts["dev"] == {kind: 36 for kind in KINDS if kind != SEV_KIND} and len(prompts("dev")) == 252
    assert {*counts["train"]} == {*KINDS} and set(counts["train"].values()) == {71, 72} and len(prompts("train")) == 572
    assert len(read_groups(data_path("sev/test.jsonl"))) == 480, "the vivid kind of the test set"


@pytest.mark.parametrize("name", SETS)
def test_chats_have_earlier_turns_and_nothing_else_has(name: str) -> None:
    for group in prompts(name):
        assert [message.role for message in group.earlier] == (["user", "assistant"] if group.kind == "chat" else [])


@pytest.mark.parametrize(("first", "second"), [("test", "dev"), ("test", "train"), ("dev", "train")])
def test_sets_are_disjoint_by_id_and_by_text(first: str, second: str) -> None:
    one, two = prompts(first), prompts(second)
    assert not {group.key for group in one} & {group.key for group in two}
    assert not {group.said.lower() for group in one} & {group.said.lower() for group in two}
    assert not {group.text.lower() for group in one} & {group.text.lower() for group in two}, "nor by the last turn alone"
    texts = {(name, str(group.key)): group.said for name, some in ((first, one), (second, two)) for group in some}
    found = near_duplicates({"/".join(key): text for key, text in texts.items()}, 0.7)
    assert [str(p) for p in found if p.where.split("/")[0] != p.message.rsplit(" ", 1)[1].split("/")[0]] == []


def test_ids_differ_from_those_of_scenarios() -> None:
    scenarios = {group.key.scenario for side in ("train", "test") for group in read_groups(data_path(f"sev/{side}.jsonl"))}
    assert not scenarios & {group.key.scenario for name in SETS for group in prompts(name)}


#: What everybody says, and nobody learns a test prompt from.
EVERYDAY = {
    tuple(phrase.split())
    for phrase in (
        *("do i need to check", "what do i need to", "what you think of it", "is it all right to", "how do i get a"),
        *("how long does it take", "the flight was cancelled and", "give me a title for", "a short message to my", "i was just about to"),
        "a note for the lift",  # of a training prompt that is close to a test prompt (data/README.md)
    )
}


@pytest.mark.parametrize("other", OTHERS)
def test_no_five_words_in_a_row_of_a_test_prompt_are_those_of_other_data(other: str) -> None:
    mine = {phrase for text in turns("test") for phrase in phrases_of(text)}
    theirs = {phrase for _, row in read_jsonl(data_path(other), "data") for text in texts_of(row) for phrase in phrases_of(text)}
    assert mine & theirs - EVERYDAY == set()


def test_no_test_prompt_is_one_of_the_answer_check_s_pairs() -> None:
    pairs = [row for _, row in read_jsonl(data_path("judge/answer_pairs.jsonl"), "answer pairs")]
    asked = {row["prompt"].lower() for row in pairs}
    assert not asked & {text.lower() for name in ("test", "dev") for group in prompts(name) for text in (group.text, group.said)}
    assert Counter(row["relation"] for row in pairs) == dict.fromkeys(("right", "other-event", "other-scenario", "rambling"), 70)
    assert all(row["answers"] is (row["relation"] == "right") for row in pairs) and len(asked) == 70
    assert Counter(row["tone"] for row in pairs) == dict.fromkeys((*EMOTIONS, NEUTRAL), 40)


@pytest.mark.parametrize("name", SETS)
def test_prompts_hold_no_feeling_word(name: str) -> None:
    assert [
        (str(group.key), feeling_pattern().findall(group.said)) for group in prompts(name) if feeling_pattern().search(group.said)
    ] == []


@pytest.mark.parametrize("name", ["spoken", "plain"])
def test_a_bank_answers_every_training_prompt_in_every_tone_and_names_none(name: str) -> None:
    bank = read_bank(data_path(f"replies/{name}.jsonl"))
    assert {*bank} == {group.key for group in prompts("train")} and len(bank) == 572
    assert all({*replies} == {*EMOTIONS, NEUTRAL} for replies in bank.values())
    assert [str(problem) for problem in lint_bank(bank, (*EMOTIONS, NEUTRAL))] == []
    registers = Counter(row["register"] for _, row in read_jsonl(data_path("prompts/train.jsonl"), "prompts"))
    assert {*registers} == {"practical", "exclaiming", "to-you", "restrained"} and min(registers.values()) == 142


@pytest.mark.parametrize("name", ["spoken", "plain"])
def test_replies_of_a_bank_are_no_test_prompts_and_no_judge_texts(name: str) -> None:
    said = {text.lower() for replies in read_bank(data_path(f"replies/{name}.jsonl")).values() for text in replies.values()}
    judged = {
        row["text"].lower()
        for name in ("sentences", "replies", "spoken", "toned")
        for _, row in read_jsonl(data_path(f"judge/{name}.jsonl"), "texts")
    }
    assert not said & judged and not said & {text.lower() for name in SETS for text in turns(name)}


def test_word_lists_hold_single_words() -> None:
    """Contamination is measured word by word."""
    lists = json.loads(data_path("emotion_words.json").read_text())
    patterns = [word for words in (*lists["names"].values(), lists["affect"]) for word in words]
    assert all(word.removesuffix("*").isalpha() for word in patterns)
