"""Mixtures and arcs as plain numbers: read, written back, laid out over tokens, and held within what the text bears."""

from __future__ import annotations

import pytest

from emosteer.base.errors import UsageError
from emosteer.circuits.arcs import ARC_TOKENS, Arc, Mixture, strengths_along

KNOWN = ("anger", "sadness", "fear")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sadness:40 + anger:20", {"sadness": 40, "anger": 20}),
        ("sadness@40+anger@20", {"sadness": 40, "anger": 20}),
        ("Fear = 12.5, joy of the sea: -3", {"fear": 12.5, "joy of the sea": -3}),
        ("anger:+5", {"anger": 5}),
        ("well-being:1e1", {"well-being": 10}),
        ("anger:0", {}),
        ("Neutral", {}),
    ],
)
def test_a_mixture_is_read_and_written_back(text: str, expected: dict[str, float]) -> None:
    found = Mixture.parse(text)
    assert found.intensities == expected
    assert Mixture.parse(found.label) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing"),
        ("anger", "expected EMOTION:INTENSITY.*'anger'"),
        (":40", "EMOTION:INTENSITY"),
        ("anger:40 + ", "found ''"),
        ("anger:1e", "found 'anger:1e'"),
        ("anger:1.2.3", "to be a number, found '1.2.3'"),
        ("anger:40 + anger:20", "'anger' is there twice"),
        ("anger:101", "the intensity of anger between -100 and 100, found 101"),
        ("anger:-101 -> fear:20", "between -100 and 100"),
        ("fear:80 ->", "found ''"),
        ("->".join(["fear:1"] * 65), "1 to 64 mixtures, found 65"),
        ("+".join(f"e{n}:1" for n in range(65)), "at most 64 emotions"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Arc.parse(text)


def test_intensities_that_are_no_numbers_are_refused() -> None:
    for value in (float("nan"), float("inf"), 100.5):
        with pytest.raises(UsageError, match="the intensity of anger"):
            Mixture.of({"anger": value})
    with pytest.raises(UsageError, match="at least 2 tokens"):
        Arc.parse("fear:80 -> anger:3", 1)


def test_an_arc_is_even_over_its_tokens_and_then_stays() -> None:
    arc = Arc.parse("fear:80 -> neutral -> anger:60 + fear:-20", 9)
    assert arc.label == "fear:80 -> neutral -> anger:60 + fear:-20 in 9 tokens" and arc.emotions == ("fear", "anger")
    path = [arc.at(token).intensities for token in range(11)]
    assert [round(at.get("fear", 0), 6) for at in path] == [80, 60, 40, 20, 0, -5, -10, -15, -20, -20, -20]
    assert [round(at.get("anger", 0), 6) for at in path] == [0, 0, 0, 0, 0, 15, 30, 45, 60, 60, 60]
    assert Arc.parse("fear:80 -> anger:1").label == "fear:80 -> anger:1" and Arc.parse("fear:80 -> anger:1").tokens == ARC_TOKENS
    still = Arc.parse("fear:80")
    assert not still.moves and still.at(0) == still.at(99) == Mixture({"fear": 80.0})


def test_what_is_more_than_the_text_bears_is_weakened_in_proportion() -> None:
    assert Mixture.parse("sadness:80 + anger:-40").within == Mixture({"sadness": 66.6, "anger": -33.3})
    held = Mixture.parse("sadness:60 + anger:-40")
    assert held.within is held and Mixture.parse("sadness:99 + anger:98 + fear:97").within.within == Mixture(
        {"sadness": 33.6, "anger": 33.3, "fear": 32.9}
    )
    assert Arc.parse("sadness:100 + fear:100 -> fear:30").within.label == "sadness:50 + fear:50 -> fear:30"


def test_strengths_follow_the_dial_token_by_token() -> None:
    def dial(emotion: str, intensity: float) -> float:
        assert emotion in KNOWN
        return intensity / 10 * (1 + KNOWN.index(emotion))

    rows = strengths_along(Arc.parse("fear:100 + anger:100 -> sadness:20", 3), KNOWN, dial, 64)
    assert rows == [[5.0, 0.0, 15.0], [2.5, 2.0, 7.5], [0.0, 4.0, 0.0]]
    assert strengths_along(Arc.parse("fear:100 + anger:100 -> sadness:20", 3), KNOWN, dial, 2) == rows[:2], "no longer than the reply"
    assert strengths_along(Arc.parse("sadness:-50"), KNOWN, dial, 64) == [[0.0, -10.0, 0.0]]
    assert strengths_along(Arc.parse("anger:0"), KNOWN, dial, 64) == [[0.0, 0.0, 0.0]]


def test_what_is_held_at_the_end_of_the_dial_stays_there() -> None:
    """Rounding must not leave the dial, at any length: it would be refused half-way through a reply."""
    for tokens in range(2, 65):
        for stops in (("anger:100", "anger:100", "neutral"), ("neutral", "fear:-100", "fear:-100", "fear:-100", "happiness:100")):
            arc = Arc.parse(" -> ".join(stops), tokens)
            held = [arc.at(token) for token in range(tokens + 1)]
            assert all(-100 <= value <= 100 for mixture in held for value in mixture.intensities.values())
            if stops[0] == "anger:100":
                assert all(mixture.intensities["anger"] == 100 for mixture in held[: (tokens - 1) // 2 + 1])
