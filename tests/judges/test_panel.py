"""What a panel says, its judges' majority and their agreement, against figures worked out by hand and the published example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from emosteer.judges.panel import UNDECIDED, Panel, Reading, krippendorff_alpha, pairwise_agreement
from emosteer.judges.protocol import LABELS, Opinion
from emosteer.scenarios.scenarios import EMOTIONS


def says(label: str, share: float = 0.7) -> Opinion:
    rest = (1 - share) / (len(LABELS) - 1)
    return Opinion({name: share if name == label else rest for name in LABELS})


MISSING = Opinion(None, "timed out")


def reading(*labels: str | None) -> Reading:
    return Reading({f"judge-{n}": MISSING if label is None else says(label) for n, label in enumerate(labels)})


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("anger", "anger", "fear"), "anger"),
        (("neutral", "anger", "neutral"), "neutral"),
        (("anger", "fear", "neutral"), UNDECIDED),
        (("anger", "anger", "fear", "fear"), UNDECIDED),
        (("anger",), "anger"),
        (("anger", "anger", None), "anger"),
        (("anger", None, None), UNDECIDED),  # one of three judges never decides alone
        ((None, None, None), None),
    ],
)
def test_a_majority_is_more_than_half_of_the_judges_that_were_asked(labels: tuple[str | None, ...], expected: str | None) -> None:
    assert reading(*labels).majority == expected


def test_the_label_is_the_likeliest_by_the_mean() -> None:
    sure = Reading({"a": says("fear", 0.9), "b": says("anger", 0.4), "c": says("anger", 0.4)})
    assert (sure.label, sure.majority) == ("fear", "anger"), "one that is sure against two that waver"
    torn = Reading({"a": says("fear", 0.5), "b": says("anger", 0.7), "c": says("neutral", 0.6)})
    assert (torn.label, torn.majority) == ("anger", UNDECIDED)
    assert Reading({"a": says("neutral", 0.5), "b": says("anger", 0.3)}).label == "neutral", "neutral is a label like the others"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("anger", "anger", None), "anger"),
        (("anger", None, None), UNDECIDED),  # one of three judges never decides alone
        (("anger", None), UNDECIDED),
        (("anger", "anger", None, None), UNDECIDED),
        (("anger",), "anger"),
        ((None, None, None), None),
    ],
)
def test_half_of_the_judges_or_fewer_decide_nothing(labels: tuple[str | None, ...], expected: str | None) -> None:
    assert reading(*labels).label == expected


def test_the_share_is_the_mean_over_the_judges_that_said_something() -> None:
    found = Reading({"a": says("fear", 0.9), "b": says("anger", 0.7), "c": MISSING})
    shares = found.probabilities
    assert shares is not None and tuple(shares) == LABELS and sum(shares.values()) == pytest.approx(1)
    assert shares["fear"] == pytest.approx((0.9 + 0.05) / 2) and shares["disgust"] == pytest.approx((0.1 / 6 + 0.05) / 2)
    assert found.problem == "timed out" and found.row()["c"] is None and found.votes == {"a": "fear", "b": "anger"}
    assert reading(None).probabilities is None and reading("fear").problem == ""


@dataclass
class Told:
    """Says what it was told to."""

    name: str
    says: Sequence[Opinion]

    @property
    def key(self) -> str:
        return f"{self.name}-1"

    def opinions(self, texts: Sequence[str], done: Callable[[int, Opinion], None] | None = None) -> list[Opinion]:
        return list(self.says)


def test_a_panel_is_a_judge_that_says_what_is_likeliest_by_their_mean() -> None:
    first = Told("a", [says("fear", 0.4), says("anger"), says("anger"), MISSING])
    second = Told("b", [says("fear", 0.4), says("fear"), MISSING, MISSING])
    third = Told("c", [says("neutral", 0.94), says("neutral"), says("anger"), MISSING])
    panel, told = Panel((first, second, third)), list[tuple[int, Opinion]]()
    opinions = panel.opinions(["1", "2", "3", "4"], lambda index, opinion: told.append((index, opinion)))
    assert [opinion.emotion() for opinion in opinions] == ["neutral", "anger", "anger", None] and told == list(enumerate(opinions))
    shares = opinions[0].probabilities
    assert shares is not None and max(shares, key=lambda label: shares[label]) == "neutral", "the likeliest, though two say fear"
    assert shares["fear"] == pytest.approx((0.4 + 0.4 + 0.01) / 3) and opinions[0].emotion(EMOTIONS) == "fear"
    assert [opinion.problem for opinion in opinions] == ["", "", "timed out", "timed out"], "one of three lacks: it is not the panel's yet"
    assert (panel.name, panel.key) == ("a, b, c", "mean of a-1, b-1, c-1") and Panel((first,)).key == "a-1"


def test_alpha_of_the_published_example() -> None:
    """Krippendorff 2011, section C: four observers, twelve units, missing data, nominal: 0.743."""
    table = [
        (1, 1, None, 1),
        (2, 2, 3, 2),
        (3, 3, 3, 3),
        (3, 3, 3, 3),
        (2, 2, 2, 2),
        (1, 2, 3, 4),
        (4, 4, 4, 4),
        (1, 1, 2, 1),
        (2, 2, 2, 2),
        (None, 5, 5, 5),
        (None, None, 1, 1),
        (None, None, 3, None),
    ]
    ratings = [[None if value is None else str(value) for value in row] for row in table]
    assert krippendorff_alpha(ratings) == pytest.approx(0.743, abs=5e-4)


def test_alpha_at_its_ends() -> None:
    assert krippendorff_alpha([["a", "a"], ["b", "b"], ["c", "c"]]) == 1
    worse = krippendorff_alpha([["a", "b"], ["b", "a"]])
    assert worse is not None and worse < 0
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None, "one label only: nothing to tell apart from chance"
    assert krippendorff_alpha([["a", None], [None, None]]) is None


def test_pairs_count_the_texts_that_both_labelled() -> None:
    rows = [{"a": "x", "b": "x", "c": "y"}, {"a": "x", "b": "y"}, {"b": "y", "c": "y"}]
    assert pairwise_agreement(rows) == {("a", "b"): 0.5, ("a", "c"): 0.0, ("b", "c"): 0.5}
