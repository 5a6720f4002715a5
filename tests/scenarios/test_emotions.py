"""Names of emotions: one spelling, reserved words, and where names come in."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from emosteer.base.errors import DataError, UsageError
from emosteer.directions.settings import Settings
from emosteer.scenarios.emotions import EMOTIONS, emotion_key, emotion_names, find_emotion, parse_emotions
from emosteer.scenarios.scenarios import GroupKey, read_bank, read_scenarios

#: A name, and other ways of writing it.
SPELLINGS = {
    "anger": ["Anger", "ANGER", " anger\t", "\uff41\uff4e\uff47\uff45\uff52", "an\u00adger"],
    "quiet joy": ["Quiet  Joy", "QUIET\u00a0joy"],
    "l'ennui": ["L\u2019Ennui"],
    "self-pity": ["Self\u2011Pity", "self\u2010pity"],
    "émotion": ["E\u0301MOTION", "e\u0301motion"],
    "φόβος": ["ΦΌΒΟΣ", "φόβοσ", unicodedata.normalize("NFD", "φόβος")],
    "spass": ["Spaß", "SPASS"],
    "よろこび": [unicodedata.normalize("NFD", "よろこび")],
    "イライラ": ["\uff72\uff97\uff72\uff97"],
    "दुःख": ["दुःख"],
    "기쁨": [unicodedata.normalize("NFD", "기쁨")],
    "แปลกใจ": ["แปลกใจ "],
    "страх": ["СТРАХ", "Страх"],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_name_has_one_spelling(name: str) -> None:
    assert [emotion_key(other) for other in [name, *SPELLINGS[name]]] == [name] * (1 + len(SPELLINGS[name]))
    assert all(emotion_key(other) != name for other in SPELLINGS if other != name)
    for written in SPELLINGS[name]:
        assert parse_emotions(f"{written},pride", closed=False) == (name, "pride")
        assert find_emotion(written, ("pride", name), "known:") == name
    assert Settings((SPELLINGS[name][0], "Pride")).emotions == (name, "pride")


def test_lists_may_have_the_commas_of_their_script() -> None:
    assert parse_emotions("怒り、喜び，恐れ", closed=False) == ("怒り", "喜び", "恐れ")
    assert parse_emotions("غضب، فرح", closed=False) == ("غضب", "فرح")


@pytest.mark.parametrize("word", ["all", "None", "NEUTRAL", "ｎｏｎｅ"])
def test_reserved_words_are_no_emotion(word: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^'{emotion_key(word)}' is no emotion's name: it stands for .*; choose another name$"):
        emotion_names(["anger", word])
    for closed in (True, False):
        with pytest.raises(UsageError, match="is no emotion's name: it stands for"):
            parse_emotions(f"anger,{word}", closed=closed)
    bank = tmp_path / "bank.jsonl"
    bank.write_text(json.dumps({"skeleton_id": "a", "valence": "neutral", "emotion": word, "text": "so"}))
    if emotion_key(word) == "neutral":
        assert read_bank(bank) == {GroupKey("a", "neutral"): {"neutral": "so"}}  # the reply that every emotion is told from
    else:
        with pytest.raises(DataError, match=f"bank.jsonl:1: '{emotion_key(word)}' is no emotion's name"):
            read_bank(bank)


@pytest.mark.parametrize("name", ["a/b", "anger=2", "", "  ", "42", "joy\x00", "half\ud800", "<b>", "..", "a:b"])
def test_what_is_no_name_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UsageError, match="expected an emotion's name in letters") as caught:
        emotion_names(["anger", name])
    assert "\n" not in str(caught.value).replace("\x00", "") and str(caught.value).encode()


def test_twice_the_same_name_is_refused() -> None:
    for names in (["Spaß", "spass"], ["Anger", "anger"]):
        with pytest.raises(UsageError, match="named twice"):
            Settings(tuple(names))
        with pytest.raises(UsageError, match="named twice"):
            parse_emotions(",".join(names), closed=False)


def test_names_of_an_older_file_are_found_as_they_stand() -> None:
    assert find_emotion("quiet JOY", ("Quiet Joy", "anger"), "this circuit knows") == "Quiet Joy"
    with pytest.raises(UsageError, match=r"unknown emotion 'Angr' \(did you mean 'anger'\?\); this circuit knows Quiet Joy, anger"):
        find_emotion("Angr", ("Quiet Joy", "anger"), "this circuit knows")


def test_a_bank_of_mixed_spellings_is_one_bank(tmp_path: Path) -> None:
    rows = [("s1", "Positive", "Joy", "a"), ("s1", "positive", "ANGER", "b"), (2, "negative", "joy ", "c"), ("2", "negative", "Anger", "d")]
    bank = tmp_path / "bank.jsonl"
    lines = [json.dumps({"skeleton_id": i, "valence": v, "emotion": e, "gen_text": t, "theme": "x", "score": 0.5}) for i, v, e, t in rows]
    bank.write_text("\n".join(lines))
    wanted = {GroupKey("s1", "positive"): {"joy": "a", "anger": "b"}, GroupKey("2", "negative"): {"joy": "c", "anger": "d"}}
    assert read_bank(bank) == wanted
    bank.write_text("\n".join([*lines, json.dumps({"skeleton_id": "s1", "valence": "positive", "emotion": "JOY", "gen_text": "e"})]))
    with pytest.raises(DataError, match="bank.jsonl:5: s1/positive already has a reply for 'joy'"):
        read_bank(bank)
    bank.write_text(json.dumps({"skeleton_id": "s1", "emotion": "joy", "gen_text": " "}))
    with pytest.raises(DataError, match="bank.jsonl:1: expected 'gen_text' to be a text that is not empty"):
        read_bank(bank)


def test_a_number_is_an_id_in_both_files(tmp_path: Path) -> None:
    file = tmp_path / "sev.jsonl"
    file.write_text(json.dumps({"skeleton_id": 2, "scenario": "I wait", "event": dict.fromkeys(("positive", "neutral", "negative"), "so")}))
    assert read_scenarios(file)[0].id == "2" and set(EMOTIONS) == set(parse_emotions("all"))
