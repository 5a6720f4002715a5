"""Prompts of many kinds: reading, kinds, even draws, and which sets of them the stages take."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emosteer.base.errors import DataError, UsageError
from emosteer.base.files import sha256_file
from emosteer.scenarios import shipped
from emosteer.scenarios.prompt_sets import KINDS, of_kinds, parse_kinds, read_events, read_groups
from emosteer.scenarios.prompts import ELICITATIONS, elicit, plain
from emosteer.scenarios.scenarios import (
    EMOTIONS,
    SEV_KIND,
    VALENCES,
    Group,
    GroupKey,
    Message,
    data_path,
    groups_of,
    read_bank,
    read_scenarios,
)
from emosteer.scenarios.splits import split, spread, stable_share
from tests.scenarios.test_scenarios import row, scenario

CHAT = [("system", "be brief"), ("user", "is it far"), ("assistant", "no"), ("user", "then i walk")]


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in said]


def prompt(number: int = 0, kind: str = "question", **changes: Any) -> dict[str, Any]:
    """A clean line."""
    return {"id": f"p-{number}", "kind": kind, "messages": turns(("user", f"what is number{number}")), **changes}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows to a file, in folders where need be."""

    def go(*rows: dict[str, Any], name: str = "f.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        return path

    return go


# ---- reading -------------------------------------------------------------------------------------------------------


def test_a_prompt_is_a_group_without_valence_whose_last_turn_is_answered(write: Callable[..., Path]) -> None:
    found = read_groups(write(prompt(1), prompt(2, "chat", messages=turns(*CHAT))))
    assert found[0] == Group(GroupKey("p-1", ""), "question", "what is number1", "question")
    assert found[1] == Group(GroupKey("p-2", ""), "chat", "then i walk", "chat", tuple(Message(*turn) for turn in CHAT[:3]))
    assert str(found[0].key) == "p-1" and found[1].said == "be brief is it far no then i walk" and found[0].said == "what is number1"


def test_lines_of_both_forms_stand_together(write: Callable[..., Path]) -> None:
    path = write(row(0), prompt(1), row(1))
    found = read_groups(path)
    assert [*found[:3], *found[4:]] == groups_of([scenario(0), scenario(1)]) and found[3].key == GroupKey("p-1", "")
    assert [group.kind for group in found] == [SEV_KIND] * 3 + ["question"] + [SEV_KIND] * 3
    assert read_events(path) == [scenario(0), scenario(1)]
    assert read_groups(data_path("sev/test.jsonl")) == groups_of(read_scenarios(data_path("sev/test.jsonl")))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kind": None}, "f.jsonl:2: expected 'kind' to be a text that is not empty, found nothing"),
        ({"kind": "chatt"}, "f.jsonl:2: unknown kind 'chatt' \\(did you mean 'chat'\\?\\); expected sev-vivid, sev-plain, "),
        ({"kind": "x" * 5000}, "f.jsonl:2: unknown kind 'x{60}'; expected sev-vivid, sev-plain, "),
        ({"id": " "}, "f.jsonl:2: expected 'id' to be a text that is not empty"),
        ({"messages": []}, "f.jsonl:2: expected 'messages' to be a list of objects with 'role' and 'content', found \\[\\]"),
        ({"messages": turns(("user", "a"), ("assistant", "b"))}, "f.jsonl:2: expected the last message to be the user's"),
        ({"messages": turns(("user", " "))}, "f.jsonl:2: message 1: expected 'content' to be a text that is not empty"),
        ({"id": "p-1"}, "f.jsonl:2: the id 'p-1' was used on line 1; ids must be unique"),
        (row(0, scenario=""), "f.jsonl:2: .*scenario"),
    ],
)
def test_errors_name_file_line_and_field(write: Callable[..., Path], bad: dict[str, Any], message: str) -> None:
    line = bad if "event" in bad else prompt(2) | bad
    with pytest.raises(DataError, match=message):
        read_groups(write(prompt(1), line))


def test_a_scenario_and_a_prompt_may_not_share_an_id(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="f.jsonl:2: the id 's-000' was used on line 1"):
        read_groups(write(row(0), prompt(id="s-000")))


# ---- kinds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("all", KINDS),
        ("", KINDS),
        ("chat,question", ("question", "chat")),
        (" Chat , ONE-LINER,", ("one-liner", "chat")),
        ("-chat", KINDS[:-1]),
        ("all,-chat,-sev-vivid", KINDS[1:-1]),
        ("question,chat,-chat", ("question",)),
    ],
)
def test_kinds_are_named_or_left_out(text: str, kinds: tuple[str, ...]) -> None:
    assert parse_kinds(text) == kinds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chatt", "unknown kind 'chatt' \\(did you mean 'chat'"),
        ("-chatt", "unknown kind '-chatt' \\(did you mean 'chat'"),
        ("chat,-chat", "'chat,-chat' leaves no kind of prompt"),
        (",".join(f"-{kind}" for kind in KINDS), "leaves no kind"),
    ],
)
def test_kinds_that_there_are_not(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_kinds(text)


def some(**counts: int) -> list[Group]:
    """So many prompts of each kind, one kind after the other."""
    return [Group(GroupKey(f"{kind}-{n}", ""), kind, f"{kind} {n}", kind) for kind, count in counts.items() for n in range(count)]


def test_draws_are_even_over_the_kinds_and_every_beginning_is() -> None:
    groups = some(question=9, chat=7, request=2)
    drawn = of_kinds(groups, KINDS, 12)
    assert Counter(group.kind for group in drawn) == {"question": 4, "request": 2, "chat": 4}
    for size in (3, 6):
        assert len(set(Counter(group.kind for group in drawn[:size]).values())) == 1, "the kinds take turns"
    assert [g for g in drawn if g.kind == "chat"] == spread([g for g in groups if g.kind == "chat"], 4)
    assert Counter(group.kind for group in of_kinds(groups, ("chat", "request"), 5)) == {"request": 2, "chat": 2}
    assert len(of_kinds(groups, KINDS, 1)) == 3, "at least one of each"
    assert sorted(of_kinds(groups, KINDS, 0), key=str) == sorted(groups, key=str), "0 is all"
    assert of_kinds(groups, ("small-talk",), 4) == []
    assert of_kinds(groups, KINDS, 12) == drawn and set(drawn) < set(of_kinds(groups, KINDS, 18))


# ---- earlier turns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elicitation", ELICITATIONS)
def test_what_was_said_before_stands_before_every_elicitation(elicitation: str) -> None:
    """A system line of an elicitation joins the conversation's own at the head."""
    earlier = tuple(Message(*turn) for turn in CHAT[1:3])
    for emotion in ("fear", None):
        alone, asked = elicit(elicitation, "why", emotion, "keep"), elicit(elicitation, "why", emotion, "keep", earlier)
        assert asked == [*alone[:-1], *turns(*CHAT[1:3]), alone[-1]]
        headed = elicit(elicitation, "why", emotion, "keep", (Message("system", "be brief"), *earlier))
        head = "\n".join(["be brief", *(turn["content"] for turn in alone[:-1])])
        assert headed == [{"role": "system", "content": head}, *turns(*CHAT[1:3]), alone[-1]]
    assert plain("why", "keep", earlier) == [*turns(*CHAT[1:3]), {"role": "user", "content": "why\nkeep"}]


# ---- the sets that stages take -------------------------------------------------------------------------------------


@pytest.fixture
def folder(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's own shipped data: sixteen scenarios and thirty prompts on either side."""
    for side, start in (("train", 0), ("test", 100)):
        write(*(row(start + n) for n in range(16)), name=f"sev/{side}.jsonl")
    for side, start in (("dev", 0), ("test", 100)):
        write(*(prompt(start + n, ("question", "chat", "bare-fact")[n % 3]) for n in range(30)), name=f"prompts/{side}.jsonl")
    monkeypatch.setattr(shipped, "data_path", lambda name: tmp_path / name)
    return tmp_path


def test_development_prompts_are_of_all_kinds_and_none_of_them_teaches(folder: Path) -> None:
    found = shipped.development_groups(16)
    assert Counter(group.kind for group in found.groups) == {SEV_KIND: 4, "question": 4, "bare-fact": 4, "chat": 4}
    train, prompts = folder / "sev/train.jsonl", folder / "prompts/dev.jsonl"
    scenarios = read_scenarios(train)
    kept_back = split(scenarios, 0.2, 0)[1]
    assert [g for g in found.groups if g.kind == SEV_KIND] == spread(groups_of(kept_back), 4)
    assert {g.key for g in found.groups if g.kind != SEV_KIND} < {g.key for g in read_groups(prompts)}
    described = found.described()
    assert described["files"] == {"sev/train.jsonl": sha256_file(train), "prompts/dev.jsonl": sha256_file(prompts)} == found.hashes
    assert (described["n_groups"], described["kinds"]) == (16, {SEV_KIND: 4, "question": 4, "bare-fact": 4, "chat": 4})
    left = shipped.without_development(groups_of(scenarios))
    assert not {g.key.scenario for g in left} & {s.id for s in kept_back} and len(left) == 3 * (16 - len(kept_back))
    chats = shipped.development_groups(6, kinds=("chat",))
    assert len(chats.groups) == 6 and [*chats.hashes] == ["prompts/dev.jsonl"], "only files that were drawn from"


def test_test_prompts_are_of_all_kinds_from_the_end_of_each_order(folder: Path) -> None:
    found = shipped.unseen_groups(16)
    everything = [*read_groups(folder / "sev/test.jsonl"), *read_groups(folder / "prompts/test.jsonl")]
    for kind in (SEV_KIND, "question", "bare-fact", "chat"):
        order = sorted((g for g in everything if g.kind == kind), key=lambda g: stable_share(str(g.key), 1))
        assert [g for g in found.groups if g.kind == kind] == order[-4:]
        skipped = shipped.unseen_groups(16, 4).groups
        assert [g for g in skipped if g.kind == kind] == order[-8:-4], "as many of each kind are left out"
    assert sorted(shipped.unseen_groups(0).groups, key=str) == sorted(everything, key=str)
    assert not {g.key for g in everything} & {g.key for g in shipped.development_groups(0).groups}
    assert Counter(g.kind for g in shipped.unseen_groups(8, kinds=("chat", "question")).groups) == {"question": 4, "chat": 4}
    for beyond in (10, 13, 25):
        with pytest.raises(UsageError, match=f"--skip {beyond} leaves nothing of 10 prompts"):
            shipped.unseen_groups(4, beyond)


def test_a_file_of_one_s_own_is_not_split_and_its_kinds_are_those_it_has(
    folder: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = write(*(row(n) for n in range(5)), prompt(1), prompt(2, "chat"), name="mine.jsonl")
    assert len(shipped.development_groups(0, mine).groups) == 17 == len(shipped.unseen_groups(0, 0, mine).groups)
    for found in (shipped.development_groups(4, mine, ("small-talk", "chat")), shipped.unseen_groups(4, 0, mine, ("small-talk", "chat"))):
        assert [group.key.scenario for group in found.groups] == ["p-2"] and found.files == (mine,)
    for draw in (lambda kinds: shipped.development_groups(4, mine, kinds), lambda kinds: shipped.unseen_groups(4, 0, mine, kinds)):
        with pytest.raises(DataError, match="mine.jsonl has no prompt of the kinds small-talk, request; choose others with --kinds"):
            draw(("small-talk", "request"))
    monkeypatch.chdir(folder)
    assert [*shipped.development_groups(4, Path("mine.jsonl")).hashes] == ["mine.jsonl"]


def test_a_prompt_file_is_training_data_like_any_other(folder: Path, write: Callable[..., Path]) -> None:
    """Prompts have a development file of their own: none of a training file is kept back; the scenarios beside them are split."""
    mine = write(*(row(n) for n in range(10)), prompt(1), prompt(2, SEV_KIND), name="mine.jsonl")
    replies = [
        {"skeleton_id": name, "emotion": emotion, "text": f"no {name} {emotion}", **({"valence": valence} if valence else {})}
        for name, valences in (("p-1", ("",)), ("p-2", ("",)), ("s-003", VALENCES))
        for valence in valences
        for emotion in EMOTIONS
    ]
    data = shipped.read_data(mine, write(*replies, name="bank.jsonl"))
    assert [str(group.key) for group in data.groups] == ["s-003/positive", "s-003/neutral", "s-003/negative", "p-1", "p-2"]
    assert data.bank is not None and data.bank[GroupKey("p-2", "")]["fear"] == "no p-2 fear"
    groups = read_groups(mine)
    kept_back = {s.id for s in split(read_events(mine), 0.2, 0)[1]}
    left = shipped.without_development(groups, mine)
    assert left == [group for group in groups if group.key.scenario not in kept_back] and len(kept_back) == 2
    assert {"p-1", "p-2"} < {group.key.scenario for group in left}
    only = read_groups(write(prompt(1), prompt(2), name="only.jsonl"))
    assert shipped.without_development(only, folder / "only.jsonl") == only == shipped.without_development(only)


# ---- the data that is shipped --------------------------------------------------------------------------------------


def test_the_shipped_bank_of_prompts_is_read_as_their_replies() -> None:
    data = shipped.read_data(data_path("prompts/train.jsonl"), data_path("replies/spoken.jsonl"))
    bank = read_bank(data_path("replies/spoken.jsonl"))
    assert data.bank == bank and [group.key for group in data.groups] == [*bank] and len(bank) == 572
