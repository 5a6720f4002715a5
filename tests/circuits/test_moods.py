"""What is felt over turns: fading by halves, and a mood that what is said moves, by the personality's weights."""

from __future__ import annotations

import itertools

import pytest

from emosteer.base.errors import UsageError
from emosteer.circuits.arcs import Mixture
from emosteer.circuits.moods import FULL, Mood, Personality, left
from emosteer.scenarios.scenarios import EMOTIONS, Message
from emosteer.scenarios.taxonomies import place_of
from emosteer.writing.feelings import Feeling

TURNS = (Message("user", "hello"), Message("assistant", "yes"), Message("user", "stop"), Message("assistant", "no"), Message("user", "go"))


def test_a_mood_alone_with_one_emotion_is_read_as_it() -> None:
    for emotion in EMOTIONS:
        mood = Mood.of(Mixture({emotion: FULL}))
        assert mood.place == pytest.approx(place_of(emotion))
        found = mood.mixture(EMOTIONS).intensities
        assert max(found, key=lambda name: found[name]) == emotion and sum(found.values()) <= 100
    assert Mood().mixture(EMOTIONS) == Mixture({}) and Mood.of(Mixture({"fear": 40})).mixture(("happiness",)) == Mixture({})


def test_a_personality_weighs_the_axes_as_mehrabian_has_them() -> None:
    assert Personality().weights == (1, 1, 1)
    assert Personality(extraversion=1).weights == pytest.approx((1.21, 1, 1.6))
    assert Personality.parse("agreeableness:-1, stability=0.5").weights == pytest.approx((1 - 0.59 + 0.095, 1 - 0.3 - 0.285, 1.32))
    said = {"anger": 0.5, "neutral": 0.5}
    calm, nervous = (Mood().moved(said, Personality(stability=s)).place[1] for s in (1.0, -1.0))
    assert (calm, nervous) == pytest.approx((0.295 * 0.43, 0.295 * 1.57))
    assert Mood((0.9, 0.0, -0.9)).moved({"happiness": 1}, Personality()).place == pytest.approx((1.0, 0.51, -0.44)), "within -1 and 1"
    assert Personality.parse(Personality.parse("openness:0.5, stability:-1").label) == Personality(openness=0.5, stability=-1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Personality.parse("kindness:1"), "unknown trait 'kindness'"),
        (lambda: Personality.parse("openness"), "TRAIT:NUMBER"),
        (lambda: Personality.parse("openness:nan"), "openness between -1 and 1"),
        (lambda: Personality.of({"stability": 1.5}), "stability between -1 and 1"),
        (lambda: left(1, 0), "above 0"),
        (lambda: left(1, float("nan")), "above 0"),
        (lambda: Mood.of(Mixture({"ennui": 10.0})), "of 'ennui' are not known"),
        (lambda: Feeling.of(mix="anger:1", arc="anger:1"), "found both"),
        (lambda: Feeling.of(arc_tokens=5), "without an arc"),
        (lambda: Feeling.of(arc="anger:1 -> fear:2", personality="neutral"), "found both"),
        (lambda: Feeling.of(half_life=-1.0), "above 0"),
        (lambda: Feeling.of(mix="anger:1").starting(("fear",), 3.0), "leave the emotion"),
        (lambda: Feeling.of(half_life=1.0).starting(("fear",), None), "name both"),
        (lambda: Feeling.of(half_life=1.0).now(TURNS, EMOTIONS, None), "found none"),
    ],
)
def test_nonsense_is_refused(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()  # type: ignore[operator]


def test_an_emotion_fades_by_halves_with_each_reply_of_its_half_life() -> None:
    feeling = Feeling.of(half_life=1.0)
    assert feeling is not None
    [anger] = feeling.starting(("anger",), 80.0)
    assert [anger.now(TURNS[:count], EMOTIONS, None).label for count in (1, 3, 5)] == ["anger:80", "anger:40", "anger:20"]
    arc = Feeling.of(arc="anger:80 -> fear:40", half_life=2.0)
    assert arc is not None and arc.now(TURNS, EMOTIONS, None).label == "anger:40 -> fear:20"


def test_a_mood_follows_the_users_turns_and_forgets() -> None:
    asked: list[list[str]] = []

    def read(texts: list[str]) -> list[dict[str, float]]:
        asked.append(list(texts))
        return [{"anger": 1.0} if text == "hello" else {"neutral": 1.0} for text in texts]

    feeling = Feeling.of(personality={}, half_life=1.0)
    assert feeling is not None
    first, last = (feeling.now(TURNS[:count], EMOTIONS, read).stops[0].intensities["anger"] for count in (1, 5))  # type: ignore[arg-type]
    assert asked == [["hello"], ["hello", "stop", "go"]] and first / last == pytest.approx(4, rel=0.02)
    started = Feeling.of(mix={"happiness": 75}, personality="neutral")
    assert started is not None
    assert list(started.now(TURNS[2:3], EMOTIONS, read).stops[0].intensities) == ["happiness", "surprise"]  # type: ignore[arg-type]


def test_no_personality_turns_a_movement_round() -> None:
    """They move more or less with what they are shown, never the other way."""
    extremes = [Personality(*traits) for traits in itertools.product((-1.0, 1.0), repeat=5)]
    assert all(min(one.weights) >= 0 for one in extremes)
    assert Personality(openness=-1, conscientiousness=-1, extraversion=-1, agreeableness=1).weights[2] == 0, "Mehrabian's sum is -0.34"
