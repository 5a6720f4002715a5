"""Contamination against texts whose subject does, and does not, give the emotion away."""

from __future__ import annotations

import random

import pytest

from emosteer.base.errors import DataError
from emosteer.scenarios.contamination import Text, contamination, contamination_of_bank, content_words, phrases_of, subject_words, word_list
from emosteer.scenarios.lints import lint_contamination
from emosteer.scenarios.scenarios import EMOTIONS, VALENCES, Bank, GroupKey, data_path, read_bank
from emosteer.scenarios.words import feeling_pattern

SUBJECTS = {"anger": ("refund", "invoice", "clerk"), "sadness": ("bedroom", "photograph", "curtain"), "fear": ("ladder", "river", "dog")}


def texts(leak: float, groups: int = 40, seed: int = 0) -> list[Text]:
    """Texts whose subject is their emotion's own with probability `leak`, else anybody's."""
    draw = random.Random(seed)
    everybody = [word for words in SUBJECTS.values() for word in words]
    return [
        Text(f"I said it about the {draw.choice(words if draw.random() < leak else everybody)} again.", emotion, f"prompt-{n}")
        for n in range(groups)
        for emotion, words in SUBJECTS.items()
    ]


def test_subjects_that_belong_to_an_emotion_are_found_and_shared_ones_are_not() -> None:
    leaking, clean = contamination(texts(1.0, 200)), contamination(texts(0.0, 200))
    assert leaking.accuracy == leaking.subject == 1 and leaking.chance == pytest.approx(1 / 3)
    assert abs(clean.accuracy - 1 / 3) < 0.06, "nothing to go by: chance, within three standard errors of 600 texts"
    assert clean.accuracy < contamination(texts(0.5, 200)).accuracy < 1
    assert {row.word for row in leaking.overused["fear"]} == set(SUBJECTS["fear"])
    assert all(row.share > row.elsewhere == 0 for row in leaking.overused["fear"])
    assert not any(clean.overused.values())


@pytest.mark.parametrize("n", [1, 5, 20])
def test_an_emotion_with_few_texts_hides_nothing_of_the_others(n: int) -> None:
    """Words that so few texts do not hold are not rare there: they would all speak for it."""
    few = [Text("I said it about the parcel again.", "happiness", f"prompt-{i}") for i in range(n)]
    found = contamination([*texts(1.0, 100), *few])
    assert all(found.by_emotion[emotion] > 0.95 for emotion in SUBJECTS), found.by_emotion


def test_emotion_words_and_function_words_do_not_count() -> None:
    assert subject_words("It's unfair that the invoice was lovely.") == ["invoice"]
    assert content_words("I'm so furious, you've ANGERED me about Tom's 3 invoices!") == ["tom's", "invoices"]
    named = [Text(f"I am {word} about the invoice.", emotion, f"{n}") for n in range(20) for emotion, word in NAMED.items()]
    assert contamination(named).accuracy == pytest.approx(1 / 3), "every text ties: each emotion takes its share of the point"


NAMED = {"anger": "furious", "sadness": "miserable", "fear": "terrified"}


def test_a_prompt_is_never_fitted_and_tested_on_at_once() -> None:
    """Each prompt has a subject of its own that both its texts share: only a leak between folds could tell them apart."""
    private = [Text(f"About the {word} of prompt{chr(97 + n)}.", emotion, f"{n}") for n in range(20) for emotion, word in LEAK[n].items()]
    assert contamination(private).accuracy == pytest.approx(0.5)


LEAK = [{"anger": f"thing{chr(97 + n)}anger", "fear": f"thing{chr(97 + n)}fear"} for n in range(20)]


def test_phrases_of_five_words_are_counted_across_prompts_only() -> None:
    assert phrases_of("One, two three; four five six") == [("one", "two", "three", "four", "five"), ("two", "three", "four", "five", "six")]
    shared = [Text(f"well I never heard such a thing {n}", "anger", f"{n}") for n in range(5)]
    apart = [Text(f"{w} {w}a {w}b {w}c {w}d", "fear", "0") for w in ("p", "q")] + [Text("p pa pb pc pd", "fear", "0")]
    assert contamination(shared + apart).phrases == {"anger": 1.0, "fear": 0.0}, "the same prompt may repeat itself"


def test_too_little_is_refused() -> None:
    with pytest.raises(DataError, match="at least two emotions to at least 5 prompts, found 1 and 5"):
        contamination([Text("a", "anger", f"{n}") for n in range(5)])


def test_the_word_list_holds_what_it_says() -> None:
    words = word_list("function_words")
    assert {"the", "don't", "wasn't", "monday", "because"} <= words and not {"refund", "door", "empty", "skin"} & words
    assert all(word == word.lower() for word in words)


def test_the_first_bank_is_contaminated() -> None:
    """The shipped bank's subjects name the emotion in four of five replies. Measured, not wished for."""
    bank = read_bank(data_path("replies/train.jsonl"))
    rows = [Text(text, emotion, key.scenario) for key, replies in bank.items() for emotion, text in replies.items()]
    assert contamination(rows).accuracy == pytest.approx(0.826, abs=0.02)


def test_the_spoken_bank_is_half_as_contaminated() -> None:
    """Its replies to one prompt have the same content, so that the subject is left with the emotion's own ways."""
    found = contamination_of_bank(read_bank(data_path("replies/spoken.jsonl")), EMOTIONS)
    assert found is not None and found.n == 6 * 572 and found.chance == pytest.approx(1 / 6)
    assert found.accuracy == pytest.approx(0.471, abs=0.01) and found.subject == pytest.approx(0.462, abs=0.01)
    assert max(found.phrases.values()) < 0.13


def test_a_bank_too_small_is_not_measured_and_others_emotions_are_left_out() -> None:
    rows = texts(1.0, 5)
    bank: Bank = {}
    for row in rows:
        bank.setdefault(GroupKey(row.group, ""), {})[row.emotion] = row.text
    assert contamination_of_bank(bank, ("anger",)) is None and contamination_of_bank(dict([*bank.items()][:4]), tuple(SUBJECTS)) is None
    assert contamination_of_bank(bank, tuple(SUBJECTS)) == contamination(rows)
    assert contamination_of_bank(bank, ("anger", "fear")) == contamination([row for row in rows if row.emotion != "sadness"])
    valences = {GroupKey(f"s{n}", valence): {"anger": "no", "fear": "yes"} for n in range(4) for valence in VALENCES}
    assert contamination_of_bank(valences, ("anger", "fear")) is None, "events of one scenario are one prompt"


def test_a_bound_is_a_problem_when_the_subject_gives_more_away() -> None:
    clean, leaking = contamination(texts(0.0)), contamination(texts(1.0))
    assert lint_contamination(clean, 0.6) == [] and lint_contamination(leaking, 1.0) == []
    (problem,) = lint_contamination(leaking, 0.35)
    assert str(problem).startswith(
        "replies: contamination: subject words alone name the emotion of 100.0% of held-out replies (chance 33.3%), expected at most 35.0%"
    )
    assert "anger clerk, " in str(problem) or "invoice" in str(problem)
    (missing,) = lint_contamination(None, 0.35)
    assert "too few replies to measure it" in str(missing)


def test_words_are_told_feelings_as_whole_texts_are() -> None:
    """Word by word, with the pattern of the whole list over the text as the measure."""
    bank = read_bank(data_path("replies/train.jsonl"))
    for said in ["I'm MADDENED, he's glad; anger's un-happy_1 mad2 Angry!", *([*replies.values()][0] for replies in bank.values())]:
        without = feeling_pattern().regex.sub(" ", said.replace("\u2019", "'"))
        assert content_words(said) == content_words(without), said
