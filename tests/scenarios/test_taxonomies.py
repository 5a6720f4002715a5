"""The shipped sets of emotions and the bank of replies in those that the six lack."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from emosteer.base.errors import UsageError
from emosteer.base.files import sha256_file
from emosteer.scenarios.contamination import contamination_of_bank
from emosteer.scenarios.emotions import EMOTIONS, emotion_key, parse_emotions
from emosteer.scenarios.lints import lint_bank
from emosteer.scenarios.prompt_sets import KINDS, read_groups
from emosteer.scenarios.scenarios import data_path, read_bank
from emosteer.scenarios.shipped import BANK, MORE, TRAIN, read_data
from emosteer.scenarios.taxonomies import PLACED, TAXONOMIES, families_in, known_emotions, place_of, taxonomy
from emosteer.scenarios.words import name_pattern, stem_pattern

PLUTCHIK = parse_emotions("plutchik8", closed=False)
PRIMARY = parse_emotions("parrott:primary", closed=False)
#: Means of Russell and Mehrabian (1977).
PUBLISHED = {
    "anger": (-0.51, 0.59, 0.25),
    "sadness": (-0.63, -0.27, -0.33),
    "happiness": (0.81, 0.51, 0.46),
    "fear": (-0.64, 0.60, -0.43),
    "surprise": (0.40, 0.67, -0.13),
    "disgust": (-0.60, 0.35, 0.11),
}


@pytest.mark.parametrize("name", TAXONOMIES)
def test_a_set_is_whole(name: str) -> None:
    found = taxonomy(name)
    above: set[str] | None = None if found.parents is None else {emotion.name for emotion in taxonomy(found.parents).tier()}
    for members in found.tiers.values():
        names = [emotion.name for emotion in members]
        assert len(set(names)) == len(names) and all(emotion_key(one) == one for one in names)
        for emotion in members:
            assert emotion.parent in above if above is not None else emotion.parent is None
            assert all(-1 <= value <= 1 for value in emotion.place) and emotion.placed in PLACED
            assert emotion.place == known_emotions()[emotion.name].place, "one place in all sets"
            assert stem_pattern(emotion.name).search(emotion.name) and name_pattern(emotion.name).search(emotion.called)
        above = set(names)


def test_sizes_and_places() -> None:
    assert [len(parse_emotions(name, closed=False)) for name in ("ekman6", "plutchik8", "goemotions27")] == [6, 8, 27]
    assert [len(members) for members in taxonomy("parrott").tiers.values()] == [6, 25, 134]
    assert set(parse_emotions("ekman6")) == set(EMOTIONS) and set(PLUTCHIK) - set(EMOTIONS) == {"trust", "anticipation"}
    assert set(PRIMARY) - set(EMOTIONS) == {"love"}
    assert {name: place_of(name) for name in EMOTIONS} == PUBLISHED and place_of("ennui") is None
    assert {e.name for e in known_emotions().values() if e.placed == "published"} == set(EMOTIONS) | {"joy"}


def test_sets_stand_for_their_emotions_wherever_these_are_read() -> None:
    both = parse_emotions("pride, parrott:primary, Parrott:Secondary", closed=False)
    assert both[0] == "pride" and len(both) == 29 and len(set(both)) == 29, "what the tiers and the list share counts once"
    assert parse_emotions("plutchik8", PLUTCHIK) == PLUTCHIK
    families = families_in(both)
    assert "love" not in families["happiness"], "one set at a time"
    assert families["love"] == ("affection", "lust", "longing") and "surprise" not in families, "a child of its own name is none"
    assert set(families) == set(PRIMARY) - {"surprise"} and "sadness" not in families["sadness"]
    three = families_in(("happiness", "amusement", "joy", "cheerfulness", "rage", "anger"))
    assert three == {"happiness": ("cheerfulness",), "anger": ("rage",), "cheerfulness": ("amusement", "joy")}
    assert families_in(("happiness", "amusement", "anger", "annoyance")) == {"happiness": ("amusement",), "anger": ("annoyance",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parrott", "expected parrott:primary or parrott:secondary or parrott:tertiary"),
        ("parrott:secundary", "did you mean 'secondary'"),
        ("plutchik:primary", r"unknown set of emotions 'plutchik' \(did you mean 'plutchik8'"),
        ("plutchik8", "'plutchik8' holds trust, anticipation, which are not known here; known: anger"),
    ],
)
def test_what_a_set_lacks_is_said(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_emotions(text)


def test_further_emotions_are_read_from_both_banks_on_the_same_prompts() -> None:
    plain = read_data(None, None)
    assert len(plain.groups) == 572 and f"replies/{Path(MORE).name}" not in plain.hashes
    for emotions in (PLUTCHIK, PRIMARY):
        data = read_data(None, None, emotions=emotions)
        assert data.bank is not None and 104 == len(data.groups) == len(data.bank)
        assert all(set(emotions) <= set(replies) for replies in data.bank.values())
        assert {data.hashes[BANK], data.hashes[MORE]} == {sha256_file(data_path(BANK)), sha256_file(data_path(MORE))}
    lacking = read_data(None, None, emotions=("anger", "love", "longing"))
    assert len(lacking.groups) == 104, "what no bank holds is left to the stage, which names it"
    assert read_data(None, None, emotions=("anger", "longing")).hashes == plain.hashes


def test_the_further_replies_are_clean() -> None:
    more, plain, kinds = read_bank(data_path(MORE)), read_bank(data_path(BANK)), {g.key: g.kind for g in read_groups(data_path(TRAIN))}
    assert len(more) == 104 and all(set(replies) == {"trust", "anticipation", "love"} for replies in more.values())
    assert min(Counter(kinds[key] for key in more).values()) >= 8 and set(kinds[key] for key in more) == set(KINDS)
    assert not any(name_pattern("love").search(plain[key]["happiness"].replace("lovely", "love")) for key in more)
    seen: Counter[tuple[str, ...]] = Counter()
    for replies in more.values():
        for text in replies.values():
            said = re.findall(r"[\w']+", text.lower())
            seen.update({tuple(said[i : i + 5]) for i in range(len(said) - 4)})
    assert max(seen.values()) == 1, "no five words in a row twice"
    for emotions in (PLUTCHIK, PRIMARY):
        bank = {key: {name: {**plain[key], **more[key]}[name] for name in emotions} for key in more}
        assert lint_bank(bank, emotions) == []
        measured = contamination_of_bank(bank, emotions)
        new = [name for name in emotions if name not in EMOTIONS]
        assert measured is not None and all(word.share <= 0.18 for name in new for word in measured.overused[name])
