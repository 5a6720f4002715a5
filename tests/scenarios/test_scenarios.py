"""The reader's complaints, the lints (each fires on a planted case and on nothing else), the split, and the data that is shipped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emosteer.base.errors import DataError, UsageError
from emosteer.scenarios.lints import Limits, Problem, lint_bank, lint_scenario, lint_scenarios, near_duplicates, overlap_between
from emosteer.scenarios.scenarios import (
    EMOTIONS,
    VALENCES,
    GroupKey,
    Scenario,
    data_path,
    groups_of,
    parse_emotions,
    read_bank,
    read_scenarios,
)
from emosteer.scenarios.splits import split, stable_share
from emosteer.scenarios.words import feeling_pattern, name_pattern

NOUNS = (
    "kettle",
    "ladder",
    "invoice",
    "bicycle",
    "parcel",
    "window",
    "ticket",
    "lamp",
    "drawer",
    "garden",
    "piano",
    "ferry",
    "carpet",
    "printer",
    "bakery",
    "orchard",
    "engine",
    "mirror",
    "blanket",
    "scooter",
)


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A clean row; any two differ in the noun and the numbers, so that no three words in a row are the same."""
    noun, other = NOUNS[number % 20], NOUNS[(number // 20 + number + 7) % 20]
    made = {
        "skeleton_id": f"s-{number:03d}",
        "theme": ["work", "home"][number % 2],
        "scenario": f"My {noun}{number} {other}{number} waits near{number} gate{number} until morning{number} comes{number} round{number}.",
        "event": {
            "positive": f"Somebody{number} brings{number} the{number} {noun} over{number} for{number} free{number}.",
            "neutral": f"Nobody{number} asks{number} about{number} {noun} today{number} or{number} later{number}.",
            "negative": f"Thieves{number} take{number} my{number} {noun} away{number} by{number} night{number}.",
        },
    }
    return made | changes


def scenario(number: int = 0, **changes: Any) -> Scenario:
    made = row(number, **changes)
    return Scenario(made["skeleton_id"], made["theme"], made["scenario"], made["event"])


def rules(problems: list[Problem]) -> Counter[str]:
    return Counter(problem.rule for problem in problems)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (objects, or text as it is) to a file."""

    def go(*rows: dict[str, Any] | str, name: str = "f.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
        return path

    return go


# ---- reading -------------------------------------------------------------------------------------------------------


def test_reads_rows_as_they_are(write: Callable[..., Path]) -> None:
    path = write(row(1), "", row(2, theme=" home "))  # an empty line is no row
    assert read_scenarios(path) == [scenario(1), scenario(2, theme="home")]
    assert [s.to_row() for s in read_scenarios(path)] == [row(1), row(2, theme="home")]


def test_an_id_may_be_a_number_and_a_theme_may_be_absent(write: Callable[..., Path]) -> None:
    made = row(0, skeleton_id=7)
    del made["theme"]
    found = read_scenarios(write(made))[0]
    assert (found.id, found.theme) == ("7", "")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row()).encode())
    assert read_scenarios(tmp_path / "f.jsonl") == [scenario()]


EVENTS = row()["event"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{torn", "malformed JSON"),
        ("[1, 2]", "expected a JSON object, found a list"),
        (row(1, skeleton_id=None), "expected 'skeleton_id' to be a text that is not empty, found nothing"),
        (row(1, skeleton_id=True), "expected 'skeleton_id' to be a text that is not empty, found bool true"),
        (row(1, skeleton_id="s-000"), "skeleton_id 's-000' was used on line 1; ids must be unique"),
        (row(1, theme=3), "expected 'theme' to be a text, found a int"),
        (row(1, scenario="  "), "expected 'scenario' to be a text that is not empty"),
        (row(1, scenario=5), "expected 'scenario' to be a text that is not empty, found int 5"),
        (row(1, event="won"), "expected 'event' to be an object with positive, neutral, negative, found str \"won\""),
        (row(1, event=None), "expected 'event' to be an object with positive, neutral, negative, found nothing"),
        (row(1, event={"positive": "a", "negative": "b"}), "the event 'neutral' is missing"),
        (row(1, event=EVENTS | {"negative": ""}), "expected 'event.negative' to be a text that is not empty"),
        (row(1, event=EVENTS | {"negative": ["a"]}), "expected 'event.negative' to be a text that is not empty, found list"),
        (row(1, scenario="It says \ud83d on the card"), "'scenario' holds half of a character"),
        (row(1, theme="\udc00"), "'theme' holds half of a character"),
    ],
)
def test_reader_names_file_line_and_fault(write: Callable[..., Path], second: Any, message: str) -> None:
    path = write(row(0), second)
    with pytest.raises(DataError) as caught:
        read_scenarios(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reader_of_missing_empty_directory_and_other_encodings(tmp_path: Path, write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_scenarios(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="found the directory"):
        read_scenarios(tmp_path)
    with pytest.raises(DataError, match="is empty"):
        read_scenarios(write("", " "))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(row()).encode() + b'\n{"scenario": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: expected UTF-8 text, found byte 0xe9"):
        read_scenarios(latin)


def test_groups_keep_all_valences_of_a_scenario_apart() -> None:
    groups = groups_of([scenario(0), scenario(1)])
    assert [str(group.key) for group in groups[:3]] == ["s-000/positive", "s-000/neutral", "s-000/negative"]
    assert len({group.key for group in groups}) == 6
    assert [group.text for group in groups[:3]] == [f"{scenario().text} {scenario().events[v]}" for v in VALENCES]


# ---- reply bank ----------------------------------------------------------------------------------------------------


def reply(number: int, valence: str, emotion: str, text: str | None = None) -> dict[str, Any]:
    words = (
        f"{NOUNS[number % 20]}{number} {valence}x{number} {emotion[::-1]}{number} turns{valence}{number} round{emotion[::-1]} again{number}"
    )
    return {"skeleton_id": f"s-{number:03d}", "valence": valence, "emotion": emotion, "text": text or words}


def full_bank(count: int = 2) -> list[dict[str, Any]]:
    return [reply(n, valence, emotion) for n in range(count) for valence in VALENCES for emotion in EMOTIONS]


def test_bank_keeps_both_valences_of_one_scenario(write: Callable[..., Path]) -> None:
    bank = read_bank(
        write(reply(0, "positive", "anger", "one"), reply(0, "negative", "anger", "two"), reply(0, "negative", "fear", "three"))
    )
    assert bank == {GroupKey("s-000", "positive"): {"anger": "one"}, GroupKey("s-000", "negative"): {"anger": "two", "fear": "three"}}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (reply(0, "postive", "fear"), "unknown valence 'postive' (did you mean 'positive'?); expected positive, neutral, negative"),
        (reply(0, "positive", "anger", "again"), "s-000/positive already has a reply for 'anger'"),
        ({"skeleton_id": "a", "valence": "neutral", "emotion": "fear"}, "expected 'text' to be a text that is not empty, found nothing"),
        ({"skeleton_id": "a", "valence": "neutral", "text": "t"}, "expected 'emotion' to be a text"),
    ],
)
def test_bank_reader_names_file_line_and_fault(write: Callable[..., Path], second: Any, message: str) -> None:
    path = write(reply(0, "positive", "anger"), second)
    with pytest.raises(DataError) as caught:
        read_bank(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


# ---- emotions ------------------------------------------------------------------------------------------------------


def test_parse_emotions() -> None:
    assert parse_emotions(" ALL ") == EMOTIONS
    assert parse_emotions("Fear, anger,") == ("fear", "anger")
    assert parse_emotions("pride", closed=False) == ("pride",)
    assert parse_emotions("pride", ("pride", "awe")) == ("pride",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("angr", r"unknown emotion 'angr' \(did you mean 'anger'\?\); known: anger, sadness"),
        ("xyzzy", r"unknown emotion 'xyzzy'; known"),
        (" , ", "found nothing"),
        ("fear,Fear", "named twice"),
    ],
)
def test_parse_emotions_refuses(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_emotions(text)


def test_parse_emotions_open_set_wants_words() -> None:
    with pytest.raises(UsageError, match="in letters"):
        parse_emotions("a/b", closed=False)


# ---- splitting -----------------------------------------------------------------------------------------------------


def test_split_is_balanced_disjoint_and_deterministic() -> None:
    made = [scenario(n, theme=f"t{n % 4}") for n in range(40)]
    train, test = split(made, 0.3, seed=5)
    assert sorted(s.id for s in train + test) == [s.id for s in made]
    assert Counter(s.theme for s in test) == {f"t{n}": 3 for n in range(4)}
    assert split(list(reversed(made)), 0.3, seed=5)[1] == list(reversed(test))  # the order of the file does not matter, but is kept
    assert split(made, 0.3, seed=6)[1] != test


@pytest.mark.parametrize("themes", [40, 13, 8])
def test_split_of_small_themes_keeps_the_share(themes: int) -> None:
    """Rounding each theme by itself would give themes of one scenario all to one side."""
    made = [scenario(n, theme=f"t{n % themes}") for n in range(40)]
    train, test = split(made, 0.5, seed=0)
    assert len(test) == 20
    in_test, in_all = Counter(s.theme for s in test), Counter(s.theme for s in made)
    assert all(abs(in_test[theme] - n / 2) < 1 for theme, n in in_all.items())
    if themes == 40:
        assert {s.id for s in split(made, 0.5, seed=1)[1]} != {s.id for s in test}


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, float("nan"), 0.01])
def test_split_refuses_shares_that_leave_a_side_empty(share: float) -> None:
    with pytest.raises(UsageError, match="share"):
        split([scenario(n) for n in range(4)], share, seed=0)


def test_stable_share_depends_on_key_and_seed_alone() -> None:
    shares = [stable_share(f"k{n}", 0) for n in range(2000)]
    assert shares == [stable_share(f"k{n}", 0) for n in range(2000)]
    assert all(0 <= share < 1 for share in shares)
    assert sum(share < 0.5 for share in shares) == pytest.approx(1000, abs=100)
    assert stable_share("k0", 1) != shares[0]


# ---- lints of scenarios --------------------------------------------------------------------------------------------


def test_clean_scenarios_have_no_problem() -> None:
    assert lint_scenarios([scenario(n) for n in range(40)]) == []


LONG = " ".join(f"w{n}" for n in range(61))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenario": "Too short by far."}, "scenario has 4 words, expected 8 to 60"),
        ({"scenario": LONG}, "scenario has 61 words, expected 8 to 60"),
        ({"event": EVENTS | {"negative": "It broke."}}, "event.negative has 2 words, expected 6 to 60"),
    ],
)
def test_length_lint(changes: dict[str, Any], message: str) -> None:
    assert [str(p) for p in lint_scenario(scenario(0, **changes))] == [f"s-000: length: {message}"]


@pytest.mark.parametrize("word", ["angry", "Happily", "worried", "SURPRISED", "disgusting", "sad", "felt", "relieved"])
def test_emotion_word_lint(word: str) -> None:
    event = f"My neighbour, {word} once more, closes the gate."
    problems = lint_scenario(scenario(0, event=EVENTS | {"neutral": event}))
    assert [str(p) for p in problems] == [f"s-000: emotion word: event.neutral holds {word}"]


@pytest.mark.parametrize("word", ["madam", "stunt", "grossly-free", "cheerleader", "gladiator", "sadhu", "fury-free"])
def test_word_patterns_end_where_words_end(word: str) -> None:
    expected = word == "fury-free"  # a hyphen ends a word
    assert bool(feeling_pattern().search(f"the {word} there")) is expected


def test_name_pattern_of_an_unlisted_emotion_is_its_stem() -> None:
    assert name_pattern("nostalgia").search("pure Nostalgia")
    assert name_pattern("İğrenme").search("bu İğrenme dır") and name_pattern("İğrenme").search("bu i̇ğrenme dır")
    assert not name_pattern("anger").search("a happy day")
    assert name_pattern().search("a happy day")


def test_same_text_twice_in_one_scenario() -> None:
    found = lint_scenarios([scenario(0, event=EVENTS | {"neutral": EVENTS["positive"]})])
    assert [str(p) for p in found] == ["s-000: duplicate: two of its texts are the same"]


def test_duplicate_and_near_duplicate_scenarios() -> None:
    copy = scenario(0, skeleton_id="s-900")
    assert rules(lint_scenarios([scenario(0), scenario(1), copy])) == {"duplicate": 1}
    edited = scenario(0, skeleton_id="s-900", event=EVENTS | {"neutral": "An entirely other thing comes to pass here."})
    found = lint_scenarios([scenario(0), scenario(1), edited])
    assert rules(found) == {"near-duplicate": 1}
    assert found[0].where == "s-900" and "with s-000" in found[0].message


def test_theme_balance_lint() -> None:
    made = [scenario(n, theme="a" if n < 5 else "b") for n in range(7)]
    assert [str(p) for p in lint_scenarios(made)] == ["themes: balance: the largest has 5 scenarios, the smallest 2"]
    assert lint_scenarios(made[1:]) == []  # 4 to 2 is still allowed


def test_limits_are_the_callers() -> None:
    assert rules(lint_scenario(scenario(), Limits(scenario_words=(20, 30), event_words=(1, 3)))) == {"length": 4}


def test_near_duplicates_measure_the_shorter_text() -> None:
    texts = {"a": "one two three four five", "b": "ONE, two three four! six seven eight nine ten", "c": "nothing of the kind in here"}
    assert near_duplicates(texts, 0.7) == []
    (found,) = near_duplicates(texts, 0.6)
    assert str(found) == "b: near-duplicate: shares 67% of its word 3-grams with a"
    assert near_duplicates({"a": "short", "b": "short"}, 0.5)[0].rule == "duplicate"
    assert near_duplicates({}, 0.5) == []


def test_overlap_between_files() -> None:
    first, second = [scenario(n) for n in range(3)], [scenario(n) for n in range(3, 6)]
    assert overlap_between(first, second) == []
    same_id = scenario(4, skeleton_id="s-000")
    assert [str(p) for p in overlap_between(first, [same_id])] == ["s-000: not disjoint: the same id is in both files"]
    same_text = scenario(1, skeleton_id="s-900")
    assert [str(p) for p in overlap_between(first, [same_text])] == ["s-900: not disjoint: shares 100% of its word 3-grams with s-001"]
    retold = replace(scenario(4, skeleton_id="s-902"), text=first[1].text)
    assert [str(p) for p in overlap_between(first, [retold])] == ["s-902: not disjoint: shares 100% of its word 3-grams with s-001"]
    assert rules(lint_scenarios([first[1], retold])) == {"duplicate": 1}, "the same situation with other events"
    assert overlap_between(first, [scenario(5), scenario(5, skeleton_id="s-901")]) == []  # inside one file is another lint's matter


# ---- lints of replies ----------------------------------------------------------------------------------------------


def bank_of(write: Callable[..., Path], rows: list[dict[str, Any]]) -> list[Problem]:
    return lint_bank(read_bank(write(*rows)))


def test_clean_bank_has_no_problem(write: Callable[..., Path]) -> None:
    assert bank_of(write, full_bank()) == []


def test_incomplete_group_of_a_bank(write: Callable[..., Path]) -> None:
    found = bank_of(write, full_bank()[:-2])
    assert [str(p) for p in found] == ["s-001/negative: balance: no reply for surprise, disgust"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Out, now.", "length: 2 words, expected 5 to 60"),
        ("You make me so angry, every single week.", "emotion word: names a feeling: angry"),
        ("Such joy in your kitchen, every single week.", "emotion word: names a feeling: joy"),  # another emotion's name as well
    ],
)
def test_reply_lints(write: Callable[..., Path], text: str, problem: str) -> None:
    rows = full_bank()
    rows[0]["text"] = text
    assert [str(p) for p in bank_of(write, rows)] == [f"s-000/positive/anger: {problem}"]


def test_near_duplicate_replies(write: Callable[..., Path]) -> None:
    rows = full_bank()
    rows[1]["text"] = rows[0]["text"]
    assert rules(bank_of(write, rows)) == {"duplicate": 1}


def test_replies_of_unequal_length(write: Callable[..., Path]) -> None:
    rows = full_bank()
    for number, made in enumerate(rows):
        if made["emotion"] == "fear":
            made["text"] += "".join(f" more{number}x{n}" for n in range(6))
    assert [str(p) for p in bank_of(write, rows)] == ["replies: balance: fear averages 12.0 words, anger 6.0"]


# ---- the data that is shipped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sev/train.jsonl", "sev/test.jsonl"])
def test_shipped_scenarios(name: str) -> None:
    scenarios = read_scenarios(data_path(name))
    assert len(scenarios) == 160
    assert sorted(Counter(s.theme for s in scenarios).values()) == [20] * 8
    assert lint_scenarios(scenarios) == []


def test_shipped_train_and_test_are_disjoint_and_cover_the_same_themes() -> None:
    train, test = read_scenarios(data_path("sev/train.jsonl")), read_scenarios(data_path("sev/test.jsonl"))
    assert overlap_between(train, test) == []
    assert {s.theme for s in train} == {s.theme for s in test}


def test_shipped_replies_answer_every_group_of_train_and_none_of_test() -> None:
    bank = read_bank(data_path("replies/train.jsonl"))
    assert len(bank) == 480
    assert Counter(emotion for replies in bank.values() for emotion in replies) == dict.fromkeys(EMOTIONS, 480)
    assert set(bank) == {group.key for group in groups_of(read_scenarios(data_path("sev/train.jsonl")))}
    assert not {key.scenario for key in bank} & {s.id for s in read_scenarios(data_path("sev/test.jsonl"))}
    assert [str(problem) for problem in lint_bank(bank)] == []


def test_missing_shipped_file() -> None:
    with pytest.raises(DataError, match="no-such.jsonl is missing"):
        data_path("no-such.jsonl")
