"""Words, sentences and names in scripts with and without white space between words."""

from __future__ import annotations

import re

import pytest

from emosteer.scenarios.contamination import content_words
from emosteer.scenarios.lints import Limits, lint_bank, lint_scenario, near_duplicates
from emosteer.scenarios.scenarios import GroupKey, Scenario, data_path, groups_of, read_bank
from emosteer.scenarios.scripts import joined, word_count, words
from emosteer.scenarios.words import name_pattern, stem_pattern, word_pattern
from emosteer.writing.own_replies import fault


@pytest.mark.parametrize(
    ("text", "count", "one_by_one"),
    [
        ("Don't stop \u2014 now.", 4, ["don", "t", "stop", "now"]),  # as ever: what stands between white space
        ("我今天很生气。", 3, list("我今天很生气")),
        ("私は怒りを感じた、とても。", 4 + 2, list("私は怒りを感じたとても")),
        ("ﾃﾚﾋﾞを見た", 4, ["ﾃ", "ﾚ", "ﾋ", "ﾞ", "を", "見", "た"]),
        ("ฉันโกรธมากวันนี้", 3, ["ฉั", "น", "โ", "ก", "ร", "ธ", "ม", "า", "ก", "วั", "น", "นี้"]),
        ("我用Python 3写的", 1 + 1 + 1 + 1, ["我", "用", "python", "3", "写", "的"]),
        ("난 오늘 기쁨이 넘친다", 4, ["난", "오늘", "기쁨이", "넘친다"]),
        ("मुझे बहुत खुशी हुई", 4, ["मुझे", "बहुत", "खुशी", "हुई"]),
        ("", 0, []),
    ],
)
def test_words_are_counted_by_the_script_of_their_letters(text: str, count: int, one_by_one: list[str]) -> None:
    assert word_count(text) == count and words(text) == one_by_one


def test_english_is_counted_as_it_always_was() -> None:
    bank = read_bank(data_path("replies/plain.jsonl"))
    texts = [text for replies in bank.values() for text in replies.values()] + [
        "caf\u00e9 \u2013 it\u2019s 1\ufe0f\u20e3 ... ok_then \u00bd"
    ]
    assert [word_count(text) for text in texts] == [len(text.split()) for text in texts]
    assert [words(text) for text in texts] == [re.findall(r"\w+", text.lower()) for text in texts]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("怒り", "私は怒りを感じた", ["怒り"]),
        ("生气", "我今天很生气。", ["生气"]),
        ("生气", "我今天很高兴。", []),
        ("โกรธ", "ฉันโกรธมากวันนี้", ["โกรธ"]),
        ("イライラ", "ｲﾗｲﾗする", ["イライラ"]),
        ("기쁨", "난 기쁨이 넘친다", ["기쁨이"]),
        ("खुशी", "मुझे खुशी हुई", ["खुशी"]),
        ("खुश", "मुझे खुशी हुई", ["खुशी"]),
        ("शी", "मुझे खुशी हुई", []),  # inside a word of a script with white space
        ("страх", "Страха нет", ["Страха"]),
        ("joy", "killjoy joyful JOY", ["joyful", "JOY"]),
        ("anger", "他很angry了", ["angry"]),
        ("quiet joy", "a Quiet\n joy, quietjoy", ["Quiet\n joy"]),
        ("spass", "viel Spaß", ["Spaß"]),
        ("φόβος", "Ο ΦΌΒΟΣ", ["ΦΌΒΟΣ"]),
        ("émoi", "mon e\u0301moi", ["émoi"]),
        ("l'ennui", "c'est l\u2019ennui", ["l'ennui"]),
    ],
)
def test_a_name_is_found_where_its_script_lets_it_stand(name: str, text: str, found: list[str]) -> None:
    assert name_pattern(name).findall(text) == found
    assert bool(stem_pattern(name.upper()).search(text)) is bool(found)


def test_a_token_is_a_name_or_not() -> None:
    assert all(stem_pattern("怒り").fullmatch(token) for token in ("怒り", " 怒り"))
    assert not any(stem_pattern("怒り").fullmatch(token) for token in ("怒", "怒りを", "", "\ufffd"))
    assert word_pattern(("sad", "joy*")).fullmatch("Joyful") and not word_pattern(("sad", "joy*")).fullmatch("sadly")


def test_lints_and_filters_read_other_scripts() -> None:
    key, text = GroupKey("s", "neutral"), "今天的会议又推迟了，我等了很久，真的很生气"
    found = [str(p) for p in lint_bank({key: {"生气": text}}, ("生气",))]
    assert found == ["s/neutral/生气: emotion word: names a feeling: 生气"]  # and it is long enough
    scenario = Scenario("s", "t", "我在办公室里等了很久很久", dict.fromkeys(("positive", "neutral", "negative"), "短"))
    assert [p.rule for p in lint_scenario(scenario, Limits(scenario_words=(6, 60)))] == ["length"] * 3
    assert fault(text, "喜び", "stop") is None and fault(text, "生气", "stop") == "names the emotion"
    assert fault("很好", "喜び", "stop") == "too short" and fault("我很累" * 9, "喜び", "stop") == "repeats itself"
    assert near_duplicates({"a": text, "b": text[:-1]}, 0.5) and not near_duplicates({"a": text, "b": "昨天下雨，地上都湿了"}, 0.5)
    assert content_words("会议又推迟, I waited") == ["waited", "会议", "议又", "又推", "推迟"]


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ("I wait at the desk.", "It opens.", "I wait at the desk. It opens."),
        ("I wait at the desk", "It opens.", "I wait at the desk. It opens."),
        ('He said "wait"', "It opens.", 'He said "wait" It opens.'),
        ("Platform 9", "It opens", "Platform 9. It opens"),
        ("我在等", "门开了。", "我在等。门开了。"),
        ("我在等。", "门开了。", "我在等。 门开了。"),
        ("ฉันรออยู่", "ประตูเปิด", "ฉันรออยู่ ประตูเปิด"),
        ("मैं रुकी", "वह खुला", "मैं रुकी. वह खुला"),
    ],
)
def test_a_scenario_without_a_full_stop_gets_one(first: str, second: str, text: str) -> None:
    assert joined(first, second) == text
    assert groups_of([Scenario("s", "t", first, dict.fromkeys(("positive", "neutral", "negative"), second))])[0].text == text
