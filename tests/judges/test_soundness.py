"""Soundness: the rules, the verdict of rules and head together, and the shipped check."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emosteer.base.errors import ArtifactError
from emosteer.judges.embedded import LinearHead
from emosteer.judges.protocol import Soundness
from emosteer.judges.soundness import (
    BROKEN,
    FAULTS,
    SENSE,
    SOUND,
    THRESHOLD,
    SoundnessCheck,
    SoundnessHeads,
    plain_faults,
    repeats,
    repetition,
    unfinished,
    verdicts_of,
    words_of,
)
from emosteer.judges.storage import save_judges
from emosteer.scenarios.scenarios import data_path, read_bank
from tests.helpers.judge_setup import PROVENANCE, real_encoder, tiny_encoder, tiny_heads

PLAIN = "I waited nine weeks for that permit, and the office never told me why. What should I do now?"


@pytest.fixture(scope="module")
def bank() -> list[str]:
    """Every shipped reply."""
    return [text for replies in read_bank(data_path("replies/train.jsonl")).values() for text in replies.values()]


# ---- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (PLAIN, []),
        ("Ugh!!!", []),
        ("No.", []),
        ("", ["empty"]),
        ("  \n", ["empty"]),
        ("?! ...", ["empty"]),
        ("\U0001f600\U0001f600", ["empty"]),
        ("No, no, no, no! I will not sit on that train again.", []),  # four in a row are speech
        ("No, no, no, no, no! I will not sit on that train again.", ["repetition"]),
        ("No NO no No nO, I will not sit on that train again.", ["repetition"]),
        ("I went home and I went home and I went home and", ["repetition"]),
        ("We sat down. The door was open. The door was open! The door was open?", ["repetition"]),
        ("the cat the dog the fish the hat the pen the cup the", ["repetition"]),  # one word makes more than half
        ("I can't stop, I can't stop laughing at all of this today.", []),
        (" ".join(f"word{i}" for i in range(80)), []),
        ("|| ## ~~ a == && b !! @@ ??", ["symbols"]),
        ("!!! ok ???", []),  # too short to tell
        ("... !!! ### no no no no no ### !!! ... *** ~~~ ===", ["repetition", "symbols"]),
        ("Je ne peux pas attendre, c'est très loin d'ici.", []),  # other languages are for the head
    ],
)
def test_rules(text: str, faults: list[str]) -> None:
    assert plain_faults(text) == faults


def test_every_loop_of_up_to_six_words_is_found_wherever_it_stands() -> None:
    words = re.findall(r"\w+", PLAIN)
    for size in range(1, 7):
        for start in (0, 5, len(words) - size):
            loop = " ".join([*words[:start], *words[start : start + size] * max(3, 6 // size), "and", "then"])
            assert plain_faults(loop) == ["repetition"], loop
        once = " ".join([*words[:start], *words[start : start + size] * (2 if size > 1 else 1), "and", "then"])
        assert plain_faults(once) == [], "twice is not a loop"


def repeated_by_hand(text: str, n: int) -> float:
    words = [word.strip(".,!?").lower() for word in text.split()]
    grams, seen, again = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)], set[tuple[str, ...]](), 0
    for gram in grams:
        again += gram in seen
        seen.add(gram)
    return again / len(grams) if grams else 0.0


def test_the_repeated_share_counts_what_occurred_before() -> None:
    texts = [PLAIN, "a b c a b c a b c", "A b, a B! a b", "one two", "", "again and again and again and again we go"]
    for text in texts:
        for n in (2, 3):
            assert repetition(words_of(text), n) == pytest.approx(repeated_by_hand(text, n))
    assert repetition(words_of("a b c a b c")) == 0.25 and repetition([]) == 0.0


def test_anything_said_twice_repeats() -> None:
    assert repeats("that that is it") and repeats("we went home and we went home") and not repeats(PLAIN) and not repeats("")


@pytest.mark.parametrize(
    "text", ["I went to the", "I went to the -", "First, then;", 'She said "no', "and so, ", "it ended (", "**we went**"]
)
def test_unfinished(text: str) -> None:
    assert unfinished(text)


@pytest.mark.parametrize(
    "text", ["It ended.", 'She said "no."', "Really?!  ", "So be it…", "Well done \U0001f389", "(all of it.)", "**Stop!**", ""]
)
def test_finished(text: str) -> None:
    assert not unfinished(text)


# ---- rules and head together -----------------------------------------------------------------------------------------


def through() -> SoundnessHeads:
    """Heads that hand probabilities through: features are their logarithms, those of the faults first."""
    n, both = 1 + len(FAULTS), 3 + len(FAULTS)
    broken = LinearHead((SOUND, *FAULTS), torch.zeros(both), torch.ones(both), torch.eye(both)[:n], torch.zeros(n))
    sense = LinearHead((SOUND, SENSE), torch.zeros(both), torch.ones(both), torch.eye(both)[n:], torch.zeros(2))
    return SoundnessHeads(broken, sense)


def verdict(text: str, senseless: float = 0.0, **shares: float) -> Soundness:
    """What is said of a text to which the heads give these shares; what they leave goes to the first label."""
    rest = 1 - sum(shares.values())
    row = [shares.get(label, 0.0) + (rest if i == 0 else 0) for i, label in enumerate((SOUND, *FAULTS))]
    features = torch.tensor([*row, 1 - senseless, senseless]).clamp_min(1e-9).log()
    return verdicts_of(through(), features[None], [text])[0]


def test_the_head_decides_where_no_rule_does() -> None:
    assert verdict(PLAIN) == Soundness(True, (), 0.0)
    assert verdict(PLAIN, order=0.9) == Soundness(False, ("order",), 0.9)
    assert verdict(PLAIN, order=0.1, language=0.5, symbols=0.3) == Soundness(False, ("language",), 0.9), "the likeliest fault"
    assert verdict(PLAIN, order=0.4, language=0.4).reasons == ("order",), "what is broken in one way or another is broken"
    assert verdict(PLAIN, order=BROKEN - 0.01) == Soundness(True, (), 0.0), "a doubt is none"
    assert not verdict(PLAIN, order=BROKEN + 0.01).sound


def test_what_makes_no_sense_is_unsound_and_a_fault_is_named_first() -> None:
    assert verdict(PLAIN, senseless=0.5) == Soundness(False, (SENSE,), 0.5)
    assert verdict(PLAIN, senseless=THRESHOLD - 0.01).sound
    assert verdict(PLAIN, senseless=0.5, order=0.9) == Soundness(False, ("order",), 0.9)
    assert verdict(PLAIN, senseless=0.9, repetition=0.6) == Soundness(False, (SENSE,), 0.9), "no loop is there to be counted"
    assert verdict("no " * 20, senseless=0.9).reasons == ("repetition", "unfinished")


def test_a_rule_outvotes_a_head_that_is_content() -> None:
    found = verdict("no " * 20)
    assert not found.sound and found.reasons == ("repetition", "unfinished") and found.score == 0.0
    assert verdict("") == Soundness(False, ("empty",), 0.0)


def test_a_repetition_must_be_there_to_be_counted() -> None:
    assert verdict(PLAIN, repetition=0.9) == Soundness(True, (), 0.0), "and does not count in the score"
    assert verdict("That that is the permit. That is the way, and that is the way.", repetition=0.9).reasons == ("repetition",)


def test_being_unfinished_alone_leaves_a_text_sound() -> None:
    cut = PLAIN.rsplit(" ", 2)[0]
    assert verdict(cut) == Soundness(True, ("unfinished",), 0.0)
    assert verdict(cut, order=0.9) == Soundness(False, ("order", "unfinished"), 0.9)


def saved(path: Path, seed: int = 0) -> Path:
    save_judges(path, tiny_heads(seed), {}, {}, PROVENANCE)
    return path


def test_the_check_reads_the_soundness_head_of_the_judges_file(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    check = SoundnessCheck.load(saved(tmp_path / "a.safetensors"), encoder)
    texts = ["we was in the desk .", "cry", PLAIN, "", "it was not at the desk but on it and why ."]
    found = check.check(texts)
    assert found == verdicts_of(check.heads, encoder.features(texts), texts) and len({row.score for row in found}) > 3
    assert found[::-1] == check.check(texts[::-1]) and check.check([]) == []
    assert SoundnessCheck.load(saved(tmp_path / "b.safetensors"), encoder).key == check.key
    assert SoundnessCheck.load(saved(tmp_path / "b.safetensors", seed=1), encoder).key != check.key
    with pytest.raises(ArtifactError, match="does not exist"):
        SoundnessCheck.load(tmp_path / "c.safetensors", encoder)
    for missing in ("soundness", "sense"):
        heads = {name: head for name, head in tiny_heads().items() if name != missing}
        save_judges(tmp_path / "c.safetensors", heads, {}, {}, PROVENANCE)
        with pytest.raises(ArtifactError, match=f"holds no head '{missing}' for the check of soundness; run `make judge`"):
            SoundnessCheck.load(tmp_path / "c.safetensors", encoder)


# ---- the shipped check -----------------------------------------------------------------------------------------------


def shuffle(words: list[str], draw: random.Random) -> str:
    return " ".join(draw.sample(words, len(words)))


def repeat(words: list[str], draw: random.Random) -> str:
    start = draw.randrange(len(words) - 4)
    size, times = draw.choice([(1, 10), (2, 6), (4, 5)])
    return " ".join([*words[:start], *words[start : start + size] * times])


def chain(words: list[str], draw: random.Random) -> str:
    start = draw.randrange(len(words) // 2)
    return " ".join([*words[:start], "-".join(word.strip(".,!?;:").lower() for word in words[start : start + 10]) + "-"])


def test_the_shipped_check_tells_replies_from_garbled_ones(bank: list[str]) -> None:
    """The bank's replies are none of its texts. At most 2 % of what is garbled passes, at most 3 % of what is whole does not."""
    check, draw = SoundnessCheck.load(encoder=real_encoder()), random.Random(11)
    whole = draw.sample(bank, 240)
    garbled = [way(text.split(), draw) for way in (shuffle, repeat, chain) for text in draw.sample(bank, 80)]
    refused = [text for text, found in zip(whole, check.check(whole), strict=True) if not found.sound]
    passed = [text for text, found in zip(garbled, check.check(garbled), strict=True) if found.sound]
    assert len(refused) <= 0.03 * len(whole), refused
    assert len(passed) <= 0.02 * len(garbled), passed


def test_the_shipped_check_needs_the_head_for_word_order(bank: list[str]) -> None:
    """The rules alone let shuffled words pass, and a reply that is cut off is sound to both."""
    check, draw = SoundnessCheck.load(encoder=real_encoder()), random.Random(12)
    texts = draw.sample(bank, 30)
    shuffled = [shuffle(text.split(), draw) for text in texts]
    assert not any(plain_faults(text) for text in shuffled)
    assert [found.reasons[0] for found in check.check(shuffled) if not found.sound].count("order") >= 28
    cut = [" ".join(text.split()[:-4]).rstrip(".,!?;:") for text in texts]
    found = check.check(cut)
    assert all("unfinished" in row.reasons for row in found) and sum(row.sound for row in found) >= 28


def test_the_shipped_check_refuses_other_languages() -> None:
    check = SoundnessCheck.load(encoder=real_encoder())
    texts = [
        "Das ist wirklich schade, ich hätte mir so sehr gewünscht, dass es diesmal besser läuft.",
        "Je suis tellement content pour toi, tu as vraiment travaillé dur pour y arriver.",
        "我真的很难过,我们等了这么久。",
    ]
    assert [found.reasons[0] for found in check.check(texts)] == ["language"] * 3


def test_scores_are_probabilities_of_being_broken(bank: list[str]) -> None:
    check, draw = SoundnessCheck.load(encoder=real_encoder()), random.Random(13)
    texts = draw.sample(bank, 20)
    whole = Tensor([found.score for found in check.check(texts)])
    garbled = Tensor([found.score for found in check.check([shuffle(text.split(), draw) for text in texts])])
    assert whole.median() < 0.2 and garbled.median() > 0.9 and whole.min() >= 0 and garbled.max() <= 1
