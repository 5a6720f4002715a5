"""A point of valence, arousal and dominance as a mixture: nothing that the dial allows comes nearer, and the model is steered by it."""

from __future__ import annotations

import math
import random

import pytest

from emosteer.api.steered_model import SteeredModel
from emosteer.base.errors import UsageError
from emosteer.circuits.arcs import Mixture
from emosteer.circuits.dial import MOST_TOGETHER
from emosteer.circuits.moods import FULL
from emosteer.circuits.points import NEAR, mixture_at, parse_point
from emosteer.scenarios.emotions import EMOTIONS, parse_emotions
from emosteer.scenarios.scenarios import Message
from emosteer.scenarios.taxonomies import place_of
from emosteer.writing.feelings import Feeling
from tests.helpers.dialled import TOP, dialled_model

PLUTCHIK = parse_emotions("plutchik8", closed=False)
TEXT, SHORT = "the boss said stop", dict(max_new_tokens=10)


def place(intensities: dict[str, float]) -> tuple[float, ...]:
    return tuple(sum(value / FULL * place_of(name)[axis] for name, value in intensities.items()) for axis in range(3))  # type: ignore[index]


@pytest.mark.parametrize("emotions", [EMOTIONS, PLUTCHIK])
def test_nothing_that_the_dial_allows_comes_nearer(emotions: tuple[str, ...]) -> None:
    draw = random.Random(0)
    for _ in range(12):
        point = (draw.uniform(-1, 1), draw.uniform(-1, 1), draw.uniform(-1, 1))
        found = mixture_at(point, emotions)
        mixed = found.mixture.intensities
        assert all(value > 0 for value in mixed.values()) and sum(mixed.values()) <= MOST_TOGETHER and len(mixed) <= 4
        assert found.place == pytest.approx(place(dict(mixed))) and found.distance == pytest.approx(math.dist(point, found.place))
        for _ in range(1500):
            weights = [draw.expovariate(1) if draw.random() < 0.4 else 0.0 for _ in emotions]
            total = MOST_TOGETHER * (1 if draw.random() < 0.5 else draw.random()) / (sum(weights) or 1)
            other = place({name: weight * total for name, weight in zip(emotions, weights, strict=True)})
            assert math.dist(point, other) > found.distance - 0.003, "but for intensities being rounded to a tenth"


def test_what_can_be_reached_is_reached_by_the_weakest_mixture() -> None:
    for name in PLUTCHIK:
        found = mixture_at(place_of(name), PLUTCHIK)  # type: ignore[arg-type]
        assert found.there and found.distance <= NEAR and sum(found.mixture.intensities.values()) <= FULL + 0.1
    assert mixture_at(place_of("fear"), EMOTIONS).mixture == Mixture({"fear": 75.0})  # type: ignore[arg-type]
    half = mixture_at((0.405, 0.255, 0.23), EMOTIONS)
    assert half.there and half.mixture.intensities["happiness"] == pytest.approx(37.5, abs=0.1)
    both = mixture_at(place({"anger": 40, "sadness": 30}), EMOTIONS)  # type: ignore[arg-type]
    assert both.there and sum(both.mixture.intensities.values()) <= 70.1
    assert mixture_at((0.0, 0.0, 0.0), EMOTIONS).mixture == Mixture({})


def test_a_calm_point_is_out_of_reach_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    feeling = Feeling.of(point="0.9,-0.9,0.5")
    assert feeling is not None
    feeling.tell_reached(EMOTIONS)
    assert "0.9,-0.9,0.5 is out of reach of anger, sadness" in capsys.readouterr().err
    found = mixture_at((0.9, -0.9, 0.5), EMOTIONS)
    assert not found.there and found.distance > 0.5
    reached = Feeling.of(point=(-0.51, 0.59, 0.25))
    assert reached is not None
    reached.tell_reached(EMOTIONS)
    assert capsys.readouterr().err == ""


def test_a_point_fades_and_starts_a_mood() -> None:
    turns = (Message("user", "hello"), Message("assistant", "yes"), Message("user", "go"))
    faded = Feeling.of(point="-0.64,0.6,-0.43", half_life=1.0)
    assert faded is not None and faded.now(turns, EMOTIONS, None).label == "fear:37.5"
    mood = Feeling.of(point="-0.64,0.6,-0.43", personality="neutral")
    assert mood is not None
    found = mood.now(turns[:1], EMOTIONS, lambda texts: [{"neutral": 1.0} for _ in texts]).stops[0].intensities
    assert max(found, key=lambda name: found[name]) == "fear"


@pytest.mark.parametrize("text", ["", "0.2,0.9", "0.2,0.9,x", "0,0,1.5", "0,nan,0", "1,2,3,4"])
def test_what_is_no_point_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="valence, arousal, dominance as three numbers from -1 to 1"):
        parse_point(text)


def test_points_exclude_what_else_says_what_is_felt() -> None:
    for other in ({"mix": "anger:4"}, {"arc": "anger:4"}):
        with pytest.raises(UsageError, match="found two of them"):
            Feeling.of(point="0,0,0", **other)  # type: ignore[arg-type]
    feeling = Feeling.of(point="0,0,0")
    assert feeling is not None
    with pytest.raises(UsageError, match="a point says which emotions"):
        feeling.starting(("anger",), 5.0)
    with pytest.raises(UsageError, match="none of ennui has a known"):
        mixture_at((0.1, 0.1, 0.1), ("ennui",))


@pytest.fixture(scope="module")
def steered() -> SteeredModel:
    return dialled_model()


def test_a_model_is_steered_by_the_points_mixture(steered: SteeredModel) -> None:
    """Intervenes: what is added to every head is the sum of the emotions' vectors at the strengths of the point's mixture."""
    point = (-0.55, 0.2, 0.0)
    mixture = mixture_at(point, EMOTIONS).mixture
    assert len(mixture.intensities) > 1
    work = steered._work(TEXT, None, {"vad": "-0.55,0.2,0", **SHORT})  # type: ignore[typeddict-item]
    strengths = work.jobs[0].course
    assert strengths is not None
    assert dict(zip(EMOTIONS, strengths[0], strict=True)) == pytest.approx({e: TOP * mixture.intensities.get(e, 0) / 100 for e in EMOTIONS})
    found = steered.generate(TEXT, vad=point, **SHORT)  # type: ignore[call-overload]
    assert found.ids == steered.generate(TEXT, mix=mixture.intensities, **SHORT).ids  # type: ignore[call-overload]
    assert found.ids != steered.generate(TEXT, vad=(0.8, 0.5, 0.4), **SHORT).ids  # type: ignore[call-overload]
    assert steered.generate(TEXT, vad=(0, 0, 0), **SHORT).ids == steered.generate(TEXT, **SHORT).ids  # type: ignore[call-overload]
