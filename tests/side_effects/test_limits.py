"""Limits: read, held against figures, and the warning that follows from them."""

from __future__ import annotations

from typing import Any

import pytest

from emosteer.base.errors import UsageError
from emosteer.side_effects.limits import harm, held_table, holds_up_to, warnings_for
from emosteer.side_effects.settings import LIMITS, QUICK, EffectsSettings, Limits


def estimate(value: float, reach: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - reach, "high": value + reach}


def row(emotion: str, intensity: float, ratio: float, change: float) -> dict[str, Any]:
    strength = None if emotion == "all" else intensity / 50
    figures = {"nll": {"change": estimate(ratio)}, "right": {"change": estimate(change)}}
    return {"method": "circuit", "emotion": emotion, "intensity": intensity, "strength": strength, "figures": figures}


ROWS = [row(e, i, 1 + i / 100, -i / 1000) for e in ("all", "fear") for i in (25.0, 50.0, 100.0)]


def test_limits_are_read_and_nonsense_is_refused() -> None:
    assert Limits.parse("perplexity=1.5, accuracy=5").bounds == {"perplexity": 1.5, "accuracy": 5.0}
    assert Limits.parse(Limits().text) == Limits() and set(Limits().bounds) == set(LIMITS)
    for text in (
        "perplexety=1.5",
        "perplexity",
        "accuracy=x",
        "accuracy=nan",
        "accuracy=-1",
        "perplexity=0.5",
        "accuracy=1,accuracy=2",
        "",
    ):
        with pytest.raises(UsageError, match="perplexity|accuracy"):
            Limits.parse(text)


def test_harm_counts_what_is_lost_as_well_as_what_is_gained() -> None:
    assert harm(ROWS[1], "perplexity") == pytest.approx((1.5, 1.52)) and harm(ROWS[1], "accuracy") == pytest.approx((5.0, 7.0))
    assert harm(ROWS[1], "abuse") is None
    still = {"figures": {"abuse": {"change": estimate(0.0, 0.0), "n": 60}, "refused": {"change": estimate(0.0, 0.0), "n": 2}}}
    assert harm(still, "abuse") == (0.0, 5.0) and harm(still, "refusal") == (0.0, 100.0), "nothing seen in 60 may still be 5 in 100"


def test_a_limit_holds_up_to_the_last_intensity_before_the_first_that_exceeds_it() -> None:
    assert holds_up_to(ROWS, "fear", "perplexity", 1.5) == 50 and holds_up_to(ROWS, "fear", "perplexity", 1.5, surely=True) == 25
    assert holds_up_to(ROWS, "fear", "accuracy", 1.0) == 0 and holds_up_to(ROWS, "fear", "accuracy", 50) == 100
    back = [*ROWS[:2], row("all", 75.0, 1.1, 0.0), ROWS[2]]
    assert holds_up_to(back, "all", "perplexity", 1.4) == 25, "what holds again above an intensity that exceeds it does not count"
    assert holds_up_to(ROWS, "fear", "abuse", 5) is None
    held = held_table(ROWS, ["fear"], Limits.parse("perplexity=1.5,abuse=5"))
    assert [(r["limit"], r["emotion"], r["holds"]) for r in held] == [
        ("perplexity", "all", 50), ("perplexity", "fear", 50), ("abuse", "all", None), ("abuse", "fear", None)
    ]  # fmt: skip


def test_a_strength_is_warned_of_where_it_exceeds_a_limit_and_only_there() -> None:
    limits = Limits.parse("perplexity=1.5,abuse=5")
    assert warnings_for(ROWS, {"fear": 1.0}, limits) == [] == warnings_for(ROWS, {"anger": 9.0, "fear": 0.0}, limits)
    (between,) = warnings_for(ROWS, {"fear": 1.2}, limits)
    assert "fear at strength 1.2 exceeds the limit perplexity=1.5" in between and "2 at intensity 100 (strength 2)" in between
    assert "holds up to intensity 50 (strength 1)" in between
    (beyond,) = warnings_for(ROWS, {"fear": 2.5}, Limits.parse("perplexity=3"))
    assert "beyond intensity 100 (strength 2), the most that was measured" in beyond
    (never,) = warnings_for(ROWS, {"fear": 0.1}, Limits.parse("accuracy=1"))
    assert "at no intensity that was tried" in never


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"methods": ("circuits",)}, "unknown method 'circuits'.*did you mean 'circuit'"),
        ({"methods": ()}, "expected some of"),
        ({"methods": ("circuit", "circuit")}, "each once"),
        ({"intensities": (50.0, 25.0)}, "rising numbers"),
        ({"intensities": (101.0,)}, "from 0 to 100"),
        ({"distances": ()}, "expected distances"),
        ({"rounds": 3}, "expected rounds from 0 to 2"),
        ({"guidance": 0.5}, "expected guidance from 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        EffectsSettings(**given)


def test_quick_is_a_part_of_the_whole_and_what_is_given_counts() -> None:
    assert EffectsSettings.quick() == QUICK and set(QUICK.methods) <= set(EffectsSettings().methods)
    assert EffectsSettings.quick(items=3, seed=5) == EffectsSettings(**{**vars(QUICK), "items": 3, "seed": 5})
