"""What words show of a prompt and a reply: figures by hand, and pairs that differ in one thing alone."""

from __future__ import annotations

import random

import pytest

from emosteer.judges.pair_words import longest_run, pair_words

#: Places of some figures.
HEARD, RUN, BEGINS, TAKEN_UP, OF_PROMPT, NEW_FORMS, LAST, NEW = range(8)
LENGTH, REPEATED, SAID_BEFORE, DISTINCT, CONTENT, ASKS, EXCLAIMS, YES, SORRY, ITSELF, CHATBOT, NUMBERS, LISTED, QUOTED = range(8, 22)
PROMPT_SELF, SELF, OTHER, ANY_SELF, ANY_OTHER, PROMPT_OTHER, BOTH_SELF, TURNED_TO, OTHER_SELF, CHANGED, SAME_SIDE = range(22, 33)
QUESTION, FACT, WHETHER, REQUEST, STATEMENT, PROMPT_LENGTH = range(33, 39)

BUS = "The shop was shut. My bus left two minutes early today."


def test_what_is_copied() -> None:
    echo = pair_words(BUS, "My bus left two minutes early today.")
    assert (echo[HEARD], echo[RUN], echo[NEW], echo[NEW_FORMS]) == (1.0, 1.0, 0.0, 0.0) and echo[LAST] == 1.0
    assert echo[OF_PROMPT] == 1.0 and 0 < echo[TAKEN_UP] < 1 and not echo[BEGINS]
    assert pair_words(BUS, "The shop!")[BEGINS] == 1.0
    other = pair_words(BUS, "Buses are a pest, take a taxi.")
    assert other[HEARD] == 0.0 and other[RUN] == 0.0 and other[NEW] == pytest.approx(0.1 * 3)  # buses, pest, taxi
    assert other[NEW_FORMS] == 1.0, "bus is shorter than a form that is compared"


def test_the_shape_of_a_reply() -> None:
    found = pair_words(BUS, 'No! Is it "7" again? Is it again? 1. a b')
    assert (found[YES], found[QUOTED], found[LISTED]) == (1.0, 1.0, 0.0)
    assert found[ASKS] == pytest.approx(2 / 4) and found[EXCLAIMS] == pytest.approx(1 / 4)  # "1." ends one, too
    assert found[SAID_BEFORE] == pytest.approx(3 / 11) and found[REPEATED] == pytest.approx(1 / 10) and found[NUMBERS] > 0
    assert pair_words(BUS, "Two things:\n- one\n- another")[LISTED] == 1.0
    sorry = pair_words(BUS, "I'm sorry, but as an AI my reply has two sentences.")
    assert (sorry[SORRY], sorry[CHATBOT], sorry[ITSELF]) == (1.0, 1.0, 1.0)
    assert pair_words("Two is 2.", "2 it is.")[NUMBERS] == 0.0, "the prompt has said it"


def test_who_speaks_of_whom() -> None:
    turned, not_turned = pair_words(BUS, "Your bus was early!"), pair_words(BUS, "My bus was early!")
    assert (turned[CHANGED], turned[SAME_SIDE], turned[TURNED_TO], turned[BOTH_SELF]) == (1.0, 0.0, 1.0, 0.0)
    assert (not_turned[CHANGED], not_turned[SAME_SIDE], not_turned[TURNED_TO], not_turned[BOTH_SELF]) == (0.0, 1.0, 0.0, 1.0)
    asked = pair_words("How was your weekend?", "I slept.")
    assert (asked[OTHER_SELF], asked[PROMPT_OTHER], asked[ANY_SELF], asked[PROMPT_SELF]) == (1.0, 1.0, 1.0, 0.0)
    assert asked[SELF] == pytest.approx(1 / 2) and asked[OTHER] == 0.0


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        (BUS, (0, 0, 0, 0, 1)),
        ("Hello. Which bus is it?", (1, 1, 0, 0, 0)),
        ("Is it the bus?", (1, 0, 1, 0, 0)),
        ("The bus, you say?", (1, 0, 0, 0, 0)),
        ("Name a bus.", (0, 0, 0, 1, 0)),
        ("Could I ask something? Write a line to the driver.", (0, 0, 0, 1, 0)),
    ],
)
def test_what_was_asked_for(prompt: str, kind: tuple[int, ...]) -> None:
    found = pair_words(prompt, "The bus.")
    assert tuple(found[QUESTION:PROMPT_LENGTH]) == kind
    new_for_statement, new_for_question, new_for_request = found[39], found[42], found[44]
    assert all(
        value == 0 for value, on in ((new_for_statement, kind[4]), (new_for_question, kind[0]), (new_for_request, kind[3])) if not on
    )


def test_figures_stay_between_0_and_1_whatever_the_texts_are() -> None:
    draw = random.Random(0)
    letters = 'abc i my you your ? ! . , 1 2 \n- " sorry reply yes é 好 \u200b'
    for _ in range(200):
        prompt, reply = ("".join(draw.choice(letters) for _ in range(draw.randint(0, 80))) for _ in range(2))
        found = pair_words(prompt, reply)
        assert len(found) == 46 and all(0 <= value <= 1 for value in found), (prompt, reply)


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [("a b c d", "x b c y", 2), ("a b", "b a", 1), ("a a b", "a b a a b", 3), ("", "a", 0), ("a", "b", 0)],
)
def test_the_longest_run(first: str, second: str, length: int) -> None:
    assert longest_run(first.split(), second.split()) == longest_run(second.split(), first.split()) == length
