"""The contest's figures: what is measured of a reply, how settings are chosen, intervals, and the whole way with planted emotions."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emosteer.base.errors import UsageError
from emosteer.base.files import sha256_file
from emosteer.circuits.methods import CONTEST, CONTROLS, NONE, PROMPTS, STEERED, source_of
from emosteer.circuits.places import Places
from emosteer.cli import main as cli
from emosteer.cli.print_contest import print_evaluation
from emosteer.evaluation.bootstrap import Draws
from emosteer.evaluation.doses import DosePoint, best_prompt, choose
from emosteer.evaluation.evaluate import COMPARED, METRICS, PARTS, compare, equal_ratio, evaluate, frontier, result_of, rivals_of
from emosteer.evaluation.metrics import agreement_of, confusion, contamination_of, judge_shares, kept_tables, measure, table_of
from emosteer.evaluation.settings import Budget, EvaluationSettings
from emosteer.generation.fluency import EMPTY_NLL
from emosteer.judges import answers, soundness
from emosteer.judges import embedded as embedded_judge
from emosteer.judges import registry as judges
from emosteer.judges.huggingface import HfJudge
from emosteer.judges.panel import UNDECIDED
from emosteer.models import model as model_module
from emosteer.scenarios.prompt_sets import KINDS, read_groups
from emosteer.scenarios.scenarios import EMOTIONS as SIX
from emosteer.scenarios.scenarios import SEV_KIND, Group, data_path
from emosteer.scenarios.splits import stable_share
from emosteer.scenarios.words import stem_pattern
from emosteer.writing.contest_writer import Row
from tests.helpers.contest_setup import (
    EMOTIONS,
    BagEncoder,
    WordAnswers,
    WordCheck,
    WordJudge,
    contest,
    defaults,
    groups,
    jury,
    kill_after,
    parts,
    prompts,
)

# ---- one reply ---------------------------------------------------------------------------------------------------------


def reply(text: str = "fine", shares: dict[str, float] | None = None, **other: Any) -> Row:
    """A judged reply that answers its prompt."""
    row = {"text": text, "probabilities": shares, "nll": 2.0, "sound": True, "answers": 0.9}
    row |= {"finish_reason": "stop", "n_tokens": 5, "judged": None, "opinions": {"words": shares}}
    if shares:
        row["judged"] = max(shares, key=lambda label: shares[label])
    return {**row, **other}


SURE = {"anger": 0.6, "sadness": 0.1, "happiness": 0.1, "fear": 0.0, "surprise": 0.0, "disgust": 0.0, "neutral": 0.2}


def test_accuracy_leaves_neutral_out_and_the_panel_s_reading_does_not() -> None:
    shares = {**SURE, "anger": 0.3, "neutral": 0.5}
    right, wrong = measure(reply(shares=shares), "anger", SIX), measure(reply(shares=shares), "sadness", SIX)
    assert (right["accuracy"], right["emotion"], right["good"], right["probability"]) == (1.0, 0.0, 0.0, 0.3)
    assert (wrong["accuracy"], wrong["emotion"], wrong["good"], wrong["probability"]) == (0.0, 0.0, 0.0, 0.1)
    sure = measure(reply(shares=SURE), "anger", SIX)
    assert (sure["emotion"], sure["good"], sure["accuracy"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("part", "emotion", "answers", "sound", "names"),
    [
        ({}, 1, 1, 1, 0),
        ({"judged": "neutral"}, 0, 1, 1, 0),
        ({"judged": "sadness"}, 0, 1, 1, 0),
        ({"judged": UNDECIDED}, 0, 1, 1, 0),
        ({"sound": False}, 1, 1, 0, 0),
        ({"answers": 0.49}, 1, 0, 1, 0),
        ({"text": "how angry"}, 1, 1, 1, 1),
    ],
)
def test_each_part_alone_makes_a_reply_not_good(part: Row, emotion: int, answers: int, sound: int, names: int) -> None:
    """The target's mean probability is the highest throughout: it is the panel's label that counts."""
    found = measure({**reply(shares=SURE), **part}, "anger", SIX)
    assert [found[name] for name in ("emotion", "answers", "sound", "names")] == [emotion, answers, sound, names]
    assert found["good"] == float(not part) and found["accuracy"] == 1.0 and found["probability"] == 0.6


def test_half_a_chance_of_an_answer_is_one_and_a_synonym_is_no_name() -> None:
    assert measure(reply("livid", SURE, answers=0.5), "anger", SIX)["good"] == 1.0


def test_a_missing_opinion_is_no_number_and_an_empty_reply_not_good() -> None:
    found = measure(reply(shares=None), "anger", SIX)
    assert all(math.isnan(found[name]) for name in ("good", "emotion", "accuracy", "probability"))
    assert found["nll"] == 2.0 and found["answers"] == found["sound"] == 1.0
    empty = measure(reply(text="", shares={"neutral": 1.0}, nll=None, answers=0.0), SIX[0], SIX)
    assert all(empty[name] == 0.0 for name in ("good", "emotion", "accuracy", "probability", "answers")) and empty["nll"] == EMPTY_NLL


def test_naming_is_the_emotions_own_name_and_synonyms_are_wider() -> None:
    assert [measure(reply(t), "anger", SIX)["names"] for t in ("So angry!", "I am livid.", "I fear it.")] == [1.0, 0.0, 0.0]
    assert [measure(reply(t), "anger", SIX)["synonyms"] for t in ("So angry!", "I am livid.", "I fear it.")] == [1.0, 1.0, 0.0]
    cut = measure(reply(finish_reason="length", sound=False), "anger", SIX)
    assert (cut["unfinished"], cut["sound"], cut["n_tokens"]) == (1.0, 0.0, 5.0) and measure(reply(), "anger", SIX)["unfinished"] == 0.0


@pytest.mark.parametrize(
    ("text", "share"), [("", 0), ("a b", 0), ("a b c d", 0), ("no no no no no", 2 / 3), ("One two three. One, two THREE!", 1 / 4)]
)
def test_repetition_counts_three_word_runs_that_were_there_before(text: str, share: float) -> None:
    assert measure(reply(text), "anger", SIX)["repetition"] == pytest.approx(share)


def rows_of(some: Sequence[Group], method: str, make: Callable[[Group, str], Row]) -> list[Row]:
    """Judged replies of one method: one per group and emotion, or one per group."""
    targets = (NONE,) if method == NONE else EMOTIONS
    place = [(group, emotion) for group in some for emotion in targets]
    names = [{"skeleton_id": g.key.scenario, "valence": g.key.valence, "emotion": e, "method": method} for g, e in place]
    return [{**make(g, e), **name} for (g, e), name in zip(place, names, strict=True)]


def test_the_unsteered_reply_counts_for_every_emotion() -> None:
    some = groups(4)
    table = table_of(rows_of(some, NONE, lambda g, e: reply(shares={"anger": 0.6, "sadness": 0.2, "happiness": 0.2})), some, EMOTIONS)
    assert table["accuracy"].tolist() == [[1.0, 0.0, 0.0]] * 4 and table["probability"].tolist() == [[0.6, 0.2, 0.2]] * 4
    shuffled = rows_of(some, "circuit", lambda g, e: reply(nll=float(some.index(g) + 10 * EMOTIONS.index(e))))[::-1]
    assert table_of(shuffled, some, EMOTIONS)["nll"].tolist() == [[g, g + 10, g + 20] for g in range(4)]


def test_a_judge_alone_is_counted_by_its_own_label_where_it_spoke() -> None:
    sad, none = {"anger": 0.2, "sadness": 0.7, "neutral": 0.1}, {"anger": 0.1, "sadness": 0.1, "neutral": 0.8}
    rows = [
        {"emotion": "sadness", "opinions": {"a": sad, "b": none}},
        {"emotion": "sadness", "opinions": {"a": sad, "b": None}},
        {"emotion": "anger", "opinions": {"a": sad, "b": sad}},
        {"emotion": "anger", "opinions": {"a": none, "b": None}},
    ]
    assert judge_shares(rows, EMOTIONS) == {"a": 0.5, "b": 0.0}
    plain = [{"emotion": NONE, "opinions": {"a": sad}}, {"emotion": NONE, "opinions": {"a": none}}]
    assert judge_shares(plain, EMOTIONS) == {"a": round(1 / 6, 6)}, "an unsteered reply stands for three targets, and hits one of them"
    assert judge_shares([{"emotion": "anger", "opinions": {"a": None}}], EMOTIONS) == {"a": None}, "not that it read none"


def test_agreement_by_hand() -> None:
    """Four different texts; a repeated one counts once."""
    said = {"anger": {"anger": 0.9, "neutral": 0.1}, "neutral": {"anger": 0.2, "neutral": 0.8}, "fear": {"fear": 1.0}}
    votes = {"w": ("anger",) * 3, "x": ("neutral",) * 3, "y": ("anger", "neutral", "fear"), "z": ("anger", "anger", None)}
    rows = [
        {"text": text, "opinions": {name: None if vote is None else said[vote] for name, vote in zip("abc", labels, strict=True)}}
        for text, labels in [*votes.items(), ("w", votes["w"])]
    ]
    found = agreement_of(rows)
    assert found["judges"] == ["a", "b", "c"] and found["n"] == 4 and found["undecided"] == 0.25
    assert found["pairs"] == {"a - b": 0.75, "a - c": round(2 / 3, 4), "b - c": round(2 / 3, 4)}
    # 11 labels: anger 6, neutral 4, fear 1; only text y disagrees, by all its 3 * 2 pairs over 3 - 1
    assert found["alpha"] == pytest.approx(1 - 10 * 3 / (6 * 5 + 4 * 7 + 1 * 10), abs=1e-4)
    alone = agreement_of([{"text": "w", "opinions": {"a": said["anger"]}}])
    assert (alone["alpha"], alone["pairs"], alone["undecided"]) == (None, {}, 0.0)


def test_contamination_of_replies_is_that_of_their_texts() -> None:
    topics = {"anger": "invoice", "sadness": "curtain", "happiness": "cake"}
    names = ("skeleton_id", "valence", "emotion", "text")
    rows = [dict(zip(names, (f"s{n}", "", e, f"it was the {topics[e]} again"), strict=True)) for n in range(10) for e in EMOTIONS]
    found = contamination_of(rows)
    assert found is not None and found["accuracy"] == found["subject"] == 1.0 and found["n"] == 30
    assert found["chance"] == round(1 / 3, 6) and set(found["by_emotion"].values()) == {1.0}
    assert [word["word"] for word in found["overused"]["anger"]] == ["invoice"] and set(found["phrases"].values()) == {1.0}
    same = contamination_of([{**row, "text": f"it was the door {row['skeleton_id']}"} for row in rows])
    assert same is not None and same["accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    assert json.loads(json.dumps(found)) == found
    assert contamination_of([{**row, "emotion": NONE} for row in rows]) is None, "unsteered replies have no emotion to give away"
    assert contamination_of(rows[:12]) is None, "four prompts are too few"


def test_confusion_is_of_judged_replies_and_its_rows_sum_to_one() -> None:
    judged = {"anger": ["anger", "anger", "neutral"], "sadness": ["fear", None, UNDECIDED], "happiness": [None] * 3}
    rows = [{"emotion": e, "judged": label} for e, labels in judged.items() for label in labels]
    found = confusion(rows, EMOTIONS)
    assert list(found["anger"]) == ["anger", "sadness", "happiness", "fear", "surprise", "disgust", "neutral", UNDECIDED]
    assert found["anger"]["anger"] == pytest.approx(2 / 3, abs=1e-6) and found["sadness"]["fear"] == found["sadness"][UNDECIDED] == 0.5
    assert {target: round(sum(row.values()), 5) for target, row in found.items()} == {"anger": 1.0, "sadness": 1.0}, "none of happiness"
    plain = confusion([{"emotion": NONE, "judged": "neutral"}, {"emotion": NONE, "judged": "fear"}], EMOTIONS)
    assert all(row["neutral"] == row["fear"] == 0.5 for row in plain.values())


# ---- content -----------------------------------------------------------------------------------------------------------


class Compass:
    """Texts are angles in degrees; vectors in the plane."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        angles = torch.tensor([float(t) for t in texts]) * math.pi / 180
        return torch.stack([angles.cos(), angles.sin()], 1)


def test_kept_is_the_cosine_with_the_unsteered_reply() -> None:
    some = groups(9)
    plain = rows_of(some, NONE, lambda g, e: reply(str(10 * some.index(g) + 20)))
    near = rows_of(some, "circuit", lambda g, e: reply(str(10 * some.index(g) + {"anger": 2, "sadness": 180, "happiness": 50}[e])))
    found = kept_tables({NONE: plain, "circuit": near[::-1]}, some, EMOTIONS, Compass())
    for e, off in enumerate((18, 160, 30)):
        assert found["circuit"][:, e].tolist() == pytest.approx([math.cos(off * math.pi / 180)] * 9, abs=1e-5)
    assert found[NONE].shape == (9, 3) and found[NONE].min() == pytest.approx(1.0, abs=1e-6)


# ---- choosing ------------------------------------------------------------------------------------------------------------


def point(good: float | None, ratio: float = 1.0, names: float = 0.0, sound: float = 1.0, n: int = 40) -> DosePoint:
    return DosePoint(good, good, good, good, 1.0, ratio, names, sound, n)


PLAIN = point(0.1)


#: The bounds that the made points lie about.
TIGHT = Budget(ratio=1.1, sound=0.9, each_sound=0.8)


def one(points: dict[float, DosePoint], unsteered: DosePoint = PLAIN, budget: Budget | None = None) -> tuple[float, bool]:
    """The choice for a single emotion, whose own share of sound replies is the pooled one."""
    choice = choose({"fear": points}, {"fear": unsteered}, budget or TIGHT)
    return choice.doses["fear"], choice.fits


@pytest.mark.parametrize(
    ("points", "dose", "fits"),
    [
        ({0.5: point(0.3), 1.0: point(0.6), 1.5: point(0.5)}, 1.0, True),  # the highest
        ({0.5: point(0.3), 1.0: point(0.6, ratio=1.11), 1.5: point(0.5)}, 1.5, True),  # over budget
        ({0.5: point(0.3), 1.0: point(0.6, ratio=1.1)}, 1.0, True),  # the budget itself is within
        ({0.5: point(0.3), 1.0: point(0.6, names=0.025)}, 0.5, True),  # names too often
        ({0.5: point(0.3, names=0.1), 1.0: point(0.6, names=0.2), 1.5: point(0.5, names=0.1)}, 1.5, True),  # all do: the fewest
        ({0.5: point(0.3, ratio=2.0), 1.0: point(0.6, names=0.2), 1.5: point(0.5, names=0.1)}, 1.5, True),  # of those within
        ({0.5: point(0.3), 1.0: point(0.6, sound=0.875)}, 0.5, True),
        ({0.5: point(0.3), 1.0: point(0.6, sound=0.9)}, 1.0, True),
        ({1.5: point(0.9, ratio=1.3), 0.5: point(0.3, ratio=1.2)}, 0.5, False),  # nothing fits: the nearest to the budget
        ({1.5: point(0.9, sound=0.7), 0.5: point(0.3, sound=0.75), 1.0: point(0.6, sound=0.5)}, 0.5, False),  # or the weakest, unsound
        ({0.5: point(0.6), 1.0: point(0.6)}, 0.5, True),  # equals: the weaker
        ({0.5: point(0.3), 1.0: point(None)}, 0.5, True),  # no opinion is no evidence
        ({0.5: point(None), 1.0: point(None)}, 0.5, False),
    ],
)
def test_the_rule(points: dict[float, DosePoint], dose: float, fits: bool) -> None:
    assert one(points) == (dose, fits)


def test_good_decides_and_of_as_many_good_replies_the_likelier_target() -> None:
    """The mean P(target) alone would take the strongest, six-way accuracy as well."""

    def made(good: float, probability: float) -> DosePoint:
        return replace(point(good), probability=probability, accuracy=probability)

    assert one({0.5: made(0.3, 0.2), 1.0: made(0.5, 0.4), 1.5: made(0.475, 0.9)}) == (1.0, True), "a reply of forty more"
    assert one({0.5: made(0.5, 0.2), 1.0: made(0.5, 0.4), 1.5: made(0.5, 0.3)}) == (1.0, True), "a tie"
    assert one({0.5: made(0.0, 0.2), 1.0: made(0.0, 0.4)}) == (1.0, True), "nothing is good yet"
    both = choose(
        {"fear": {1.0: made(0.5, 0.1), 2.0: made(0.5, 0.9)}, "anger": {1.0: made(0.2, 0.9), 2.0: made(0.225, 0.1)}},
        {"fear": PLAIN, "anger": PLAIN},
        TIGHT,
    )
    assert both.doses == {"fear": 2.0, "anger": 2.0}
    # the difference of one emotion, shared by six, is small: it decides all the same
    others = {emotion: {1.0: made(0.5, 0.5)} for emotion in SIX if emotion != "anger"}
    close = choose({"anger": {0.5: made(0.5, 0.4), 1.0: made(0.5, 0.41)}, **others}, dict.fromkeys(SIX, PLAIN), TIGHT)
    assert close.doses["anger"] == 1.0


def test_nothing_is_asked_to_be_sounder_than_the_unsteered_replies() -> None:
    points = {0.5: point(0.3), 1.0: point(0.6, sound=0.75)}
    assert one(points) == (0.5, True)
    assert one(points, point(0.1, sound=0.75)) == (1.0, True)
    assert one(points, budget=Budget(ratio=1.1, sound=0.7, each_sound=0.7)) == (1.0, True)
    assert one(points, budget=Budget(ratio=1.1, sound=0.7, each_sound=0.8)) == (0.5, True), "one emotion alone falls below its own share"


@pytest.mark.parametrize(("n", "unsound", "fine"), [(16, 11, True), (16, 12, False), (32, 22, True), (32, 23, False), (10, 7, True)])
def test_no_emotion_may_fall_below_its_own_bound(n: int, unsound: int, fine: bool) -> None:
    """At 30 %, twelve of sixteen would leave 25 %."""
    points = {0.5: point(0.3, n=n), 1.0: point(0.6, sound=1 - unsound / n, n=n)}
    budget = Budget(ratio=1.1, sound=0.1, each_sound=0.3)
    assert one(points, budget=budget) == (1.0 if fine else 0.5, True)


def test_the_budget_is_that_of_all_replies_together() -> None:
    mild, wild = {1.0: point(0.3, ratio=0.8), 2.0: point(0.5, ratio=0.9)}, {1.0: point(0.2, ratio=1.0), 2.0: point(0.8, ratio=1.3)}
    choice = choose({"fear": mild, "anger": wild}, {"fear": PLAIN, "anger": PLAIN}, TIGHT)
    assert choice.doses == {"fear": 2.0, "anger": 2.0} and choice.fits, "sqrt(0.9 * 1.3) = 1.08"
    named = {1.0: point(0.2), 2.0: point(0.8, names=0.05)}
    assert choose({"fear": named, "anger": named}, {"fear": PLAIN, "anger": PLAIN}, TIGHT).doses in ({"fear": 1.0, "anger": 1.0},), (
        "2.5 % of all replies"
    )
    more = choose({"fear": named, "anger": {1.0: point(0.2, n=80)}}, {"fear": PLAIN, "anger": PLAIN}, TIGHT)
    assert more.doses["fear"] == 2.0, "2 of 120 replies: an emotion counts by its replies"


def test_the_choice_is_the_best_of_all_allocations() -> None:
    draw = random.Random(0)
    for _ in range(20):
        points = {
            e: {d: point(draw.random(), draw.uniform(0.7, 1.6), draw.choice([0, 0, 0.05]), draw.uniform(0.82, 1)) for d in (1.0, 2.0, 3.0)}
            for e in ("fear", "anger", "disgust")
        }
        choice = choose(points, dict.fromkeys(points, PLAIN), TIGHT)
        fitting = {}
        for doses in itertools.product((1.0, 2.0, 3.0), repeat=3):
            some = [points[e][d] for e, d in zip(points, doses, strict=True)]
            ratio = math.exp(sum(math.log(p.ratio) for p in some) / 3)
            if ratio <= 1.1 and sum(p.sound for p in some) / 3 >= 0.9 and sum(p.names for p in some) / 3 <= 0.02:
                fitting[doses] = sum(p.good or 0 for p in some)
        if fitting:
            assert tuple(choice.doses.values()) == max(fitting, key=lambda doses: fitting[doses]) and choice.fits


def test_too_many_doses_are_refused_at_once() -> None:
    points = {float(dose): point(0.5) for dose in range(1, 31)}
    with pytest.raises(UsageError, match="fewer --doses"):
        choose(dict.fromkeys(SIX, points), dict.fromkeys(SIX, PLAIN), TIGHT)


def test_the_best_prompt_has_the_most_good_replies_within_the_ratio() -> None:
    points = {"prompt-system": point(0.3), "prompt-tone": point(0.6, ratio=1.2), "prompt-stimulus": point(0.4, names=0.5)}
    assert best_prompt(points, TIGHT) == "prompt-stimulus", "a prompt has no dose that would name less"
    assert best_prompt(points, Budget(ratio=1.3)) == "prompt-tone"
    assert best_prompt(points, Budget(ratio=0.9)) in ("prompt-system", "prompt-stimulus")
    read = {name: replace(value, probability=0.9, accuracy=0.9) if name == "prompt-system" else value for name, value in points.items()}
    assert best_prompt(read, TIGHT) == "prompt-stimulus", "whatever six-way accuracy says"


def tables(n: int = 6, seed: int = 0, shift: float = 0.0) -> dict[str, Tensor]:
    """Random figures of a method [group, emotion]."""
    noise = torch.Generator().manual_seed(seed)
    found = {name: torch.rand(n, 3, generator=noise, dtype=torch.float64) for name in (*METRICS, "nll", "n_tokens")}
    for name in ("good", "emotion", "accuracy", "answers", "names", "sound"):
        found[name] = found[name].round()
    found["nll"] = 2 + 0.3 * found["nll"] + shift
    return found


def test_a_point_compares_the_same_groups_and_leaves_missing_opinions_out() -> None:
    table, base = tables(4, 1), tables(6, 2)
    for name in ("good", "emotion", "probability", "accuracy"):
        table[name][0, 1] = float("nan")
    found = DosePoint.of(table, base, 1)
    assert found.n == 4 and found.probability == pytest.approx(table["probability"][1:, 1].mean().item(), abs=1e-6)
    wanted = math.exp(sum(table["nll"][g, 1].item() - base["nll"][g, 1].item() for g in range(4)) / 4)
    assert found.ratio == pytest.approx(wanted, abs=1e-6)
    assert found.good == pytest.approx(table["good"][1:, 1].mean().item(), abs=1e-6)
    assert found.answers == pytest.approx(table["answers"][:, 1].mean().item(), abs=1e-6), "the answer check never fails"
    for name in ("good", "emotion", "probability", "accuracy"):
        table[name][:] = float("nan")
    nothing = DosePoint.of(table, base)
    assert nothing.good is nothing.emotion is nothing.probability is nothing.accuracy is None and nothing.n == 12


# ---- figures -----------------------------------------------------------------------------------------------------------------


def test_results_by_hand() -> None:
    some, table, base = groups(6), tables(6, 3), tables(6, 4)
    for name in ("good", "emotion", "accuracy", "probability"):
        table[name][2] = float("nan")
    draws = Draws.make(6, 400)
    rows = [judged_row(e, "anger") for e in EMOTIONS]
    found = result_of("circuit", table, base, rows, some, draws, EMOTIONS)
    there = [g for g in range(6) if g != 2]
    assert (found["n"], found["missing"]) == (18, 3)
    assert found["accuracy"]["value"] == pytest.approx(table["accuracy"][there].mean().item(), abs=1e-6)
    assert found["ratio"]["value"] == pytest.approx(math.exp(table["nll"].mean() - base["nll"].mean()), abs=1e-6)
    assert found["median_ratio"]["value"] == pytest.approx(math.exp(table["nll"].quantile(0.5) - base["nll"].quantile(0.5)), abs=1e-6)
    for name in METRICS:
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    fear = found["by_emotion"]["sadness"]
    assert fear["n"] == 6 and fear["names"]["value"] == pytest.approx(table["names"][:, 1].mean().item(), abs=1e-6)
    lines = [g for g, group in enumerate(some) if group.key.valence == "neutral"]
    valence = found["by_valence"]["neutral"]
    assert len(lines) == 2 and valence["n"] == 6
    assert valence["ratio"]["value"] == pytest.approx(math.exp(table["nll"][lines].mean() - base["nll"][lines].mean()), abs=1e-6)
    assert found["confusion"]["sadness"]["anger"] == 1.0 and found["judges"] == {"words": round(1 / 3, 6)}
    assert found["contamination"] is None and [*found["by_kind"]] == [SEV_KIND] == [found["worst_kind"]]


def judged_row(emotion: str, label: str, scenario: str = "s00") -> Row:
    """What result_of asks of a judged reply."""
    opinions = {"words": {label: 1.0}}
    return {"emotion": emotion, "judged": label, "opinions": opinions, "text": "no", "skeleton_id": scenario, "valence": ""}


def test_results_by_kind_and_the_worst_kind_by_hand() -> None:
    some = [*groups(3), *prompts(6)]
    table, base = tables(9, 3), tables(9, 4)
    for name, values in (("good", (1, 1, 1, 0.5, 0, 1, 1, 1, 1)), ("emotion", (0, 0, 0, 1, 1, 1, 1, 1, 1))):
        table[name] = torch.tensor(values, dtype=torch.float64)[:, None].expand(9, 3).clone()
    table["good"][4, 2] = float("nan")
    found = result_of("circuit", table, base, [judged_row("anger", "anger")], some, Draws.make(9, 400), EMOTIONS)
    lines = {SEV_KIND: [0, 1, 2], "chat": [3, 6], "question": [4, 7], "one-liner": [5, 8]}
    assert [*found["by_kind"]] == [*lines]
    good = {kind: part["good"]["value"] for kind, part in found["by_kind"].items()}
    assert good == {SEV_KIND: 1.0, "chat": 0.75, "question": 0.6, "one-liner": 1.0}, "a question lacks an opinion: 3 of 5"
    assert found["worst_kind"] == "question" and found["missing"] == 1
    for kind, place in lines.items():
        part = found["by_kind"][kind]
        assert {*part} == {*PARTS, "ratio", "n"} and part["n"] == 3 * len(place)
        for name in ("answers", "names", "sound"):
            assert part[name]["value"] == pytest.approx(table[name][place].mean().item(), abs=1e-6)
        assert part["ratio"]["value"] == pytest.approx(math.exp(table["nll"][place].mean() - base["nll"][place].mean()), abs=1e-6)
    assert [*found["by_valence"]] == ["positive", "neutral", "negative"] and found["by_valence"]["neutral"]["n"] == 3
    table["good"][[5, 8]] = float("nan")
    silent = result_of("circuit", table, base, [judged_row("anger", "anger")], some, Draws.make(9, 400), EMOTIONS)
    assert silent["by_kind"]["one-liner"]["good"]["value"] is None and silent["worst_kind"] == "question", "of those that were judged"
    table["good"][:] = float("nan")
    unheard = result_of("circuit", table, base, [judged_row("anger", "anger")], some, Draws.make(9, 400), EMOTIONS)
    assert unheard["worst_kind"] is None


def test_the_interval_of_a_ratio_is_paired_with_the_unsteered_replies() -> None:
    """Prompts differ far more than methods do: a method 0.1 nats above on every reply has a ratio without spread."""
    base = tables(6, 5)
    base["nll"] = torch.linspace(1, 6, 6, dtype=torch.float64)[:, None].expand(6, 3)
    table = {**base, "nll": base["nll"] + 0.1}
    found = result_of("circuit", table, base, [], groups(6), Draws.make(6, 400), EMOTIONS)["ratio"]
    assert found == {"value": pytest.approx(math.exp(0.1), abs=1e-6)} | {k: pytest.approx(math.exp(0.1), abs=1e-6) for k in ("low", "high")}


def test_differences_are_over_replies_that_both_have() -> None:
    a, b, base = tables(6, 6), tables(6, 7), tables(6, 8)
    a["good"][0, 0] = b["good"][3, 1] = float("nan")
    draws = Draws.make(6, 400)
    found = compare(a, b, base, "good", draws, 0)
    both = ~(a["good"].isnan() | b["good"].isnan())
    assert found["n"] == 16
    assert found["difference"]["value"] == pytest.approx((a["good"][both] - b["good"][both]).mean().item(), abs=1e-6)
    ratio = compare(a, b, base, "ratio", draws, 0)
    one, two = (math.exp(t["nll"].mean() - base["nll"].mean()) for t in (a, b))
    assert ratio["difference"]["value"] == pytest.approx(one - two, abs=1e-6) and 0 < ratio["p"] <= 1
    same = compare(a, a, base, "good", draws, 0)
    assert same["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0} and same["p"] == 1.0


def test_equal_ratio_takes_the_nearest_dose_and_says_how_near() -> None:
    base = tables(6, 0)
    trials = {(NONE, None): base, ("prompt-tone", None): tables(6, 1, shift=0.05)}
    trials |= {("circuit", dose): tables(6, 1, shift=shift) for dose, shift in ((0.5, -0.1), (1.0, 0.06), (1.5, 0.4))}
    settings = EvaluationSettings(methods=(NONE, "prompt-tone", "circuit"), doses=(0.5, 1.0, 1.5))
    doses = {"prompt-tone": dict.fromkeys(EMOTIONS), "circuit": dict.fromkeys(EMOTIONS, 1.5)}
    (found,) = equal_ratio(trials, doses, [("circuit", "prompt-tone")], settings)
    assert found["setting"] == 1.0 and found["ratio_a"] / found["ratio_b"] == pytest.approx(math.exp(0.01), abs=1e-5)
    assert found["difference"]["value"] == 0.0 and found["n"] == 18
    trials["circuit", 1.0] = {**trials["circuit", 1.0], "good": torch.ones(6, 3, dtype=torch.float64)}
    (found,) = equal_ratio(trials, doses, [("circuit", "prompt-tone")], settings)
    asked = trials["prompt-tone", None]["good"].mean().item()
    assert found["good_a"]["value"] == 1.0 and found["good_b"]["value"] == pytest.approx(asked, abs=1e-6)
    assert found["difference"]["value"] == pytest.approx(1 - asked, abs=1e-6)


def test_the_frontier_has_every_method_dose_and_emotion() -> None:
    trials = {(NONE, None): tables(6, 0), ("circuit", 0.5): tables(6, 1), ("random-heads", 0.5): tables(3, 2)}
    found = frontier(trials, EMOTIONS)
    assert [(row["method"], row["setting"], row["target"]) for row in found[:4]] == [(NONE, None, e) for e in ("all", *EMOTIONS)]
    assert len(found) == 12 and found[0]["ratio"] == 1.0 and found[0]["n"] == 18
    assert next(row for row in found if row["method"] == "random-heads" and row["target"] == "all")["n"] == 9
    whole = next(row for row in found if row["method"] == "circuit" and row["target"] == "all")
    for name in ("good", "emotion", "answers"):
        assert whole[name] == pytest.approx(trials["circuit", 0.5][name].mean().item(), abs=1e-6)
    assert whole.keys() == {"method", "setting", "target", *(field.name for field in fields(DosePoint))}


def test_settings_refuse_nonsense() -> None:
    for methods, message in (
        (("none", "circut"), "did you mean 'circuit'"),
        (("none", "random-circuit"), "add circuit to --methods"),
        (("circuit",), "add none"),
    ):
        with pytest.raises(UsageError, match=message):
            EvaluationSettings(methods=methods)
    for doses in ((), (0.0, 1.0), (-1.0,), (math.nan,), (math.inf,)):
        with pytest.raises(UsageError, match="--doses"):
            EvaluationSettings(doses=doses)
    with pytest.raises(UsageError, match="--budget"):
        EvaluationSettings(budget=Budget(ratio=0.0))
    assert rivals_of((NONE, "circuit", "residual"), None) == [("circuit", "residual"), ("circuit", NONE), ("residual", NONE)]


# ---- the whole way ---------------------------------------------------------------------------------------------------------------

SETTINGS = EvaluationSettings(doses=(0.25, 1.0, 2.0), control_groups=2, budget=Budget(ratio=3.0, names=0.02, sound=0.5, each_sound=0.5))


def hold(
    folder: Path,
    judge: WordJudge | Sequence[WordJudge] | None = None,
    paid: bool = False,
    settings: EvaluationSettings = SETTINGS,
    test: Sequence[Group] = (),
) -> tuple[Row, list[Row]]:
    """The contest on disjoint scenario-events."""
    panel = jury(folder, judge, paid=paid)
    return evaluate(contest(folder, batch_size=16), panel, groups(3, 30), test or groups(6), defaults(), settings)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Row, list[Row]]:
    return hold(tmp_path_factory.mktemp("contest"))


def test_the_planted_circuit_wins_and_random_ones_do_not(held: tuple[Row, list[Row]]) -> None:
    body, rows = held
    results = {row["method"]: row for row in body["results"]}
    assert list(results) == list(CONTEST)
    assert results[NONE]["accuracy"]["value"] == pytest.approx(1 / 3) and results[NONE]["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert results["circuit"]["emotion"]["value"] > 0.8 and results["residual"]["emotion"]["value"] > 0.7
    assert results["circuit"]["good"]["value"] > 0.5
    assert results["learned-residual"]["good"]["value"] == results["residual"]["good"]["value"], "the same vectors, at other units"
    for control in CONTROLS:
        assert results[control]["emotion"]["value"] < 0.4 > results[control]["good"]["value"]
    (found,) = [r for r in body["comparisons"] if (r["a"], r["b"], r["metric"]) == ("circuit", "random-circuit", "good")]
    assert found["difference"]["low"] > 0.2 and found["p"] == round(2 * 2**-6, 4) and found["n"] == 18
    assert {(r["a"], r["b"]) for r in body["comparisons"]} == set(rivals_of(CONTEST, body["best_prompt"]))
    assert {r["metric"] for r in body["comparisons"]} == set(COMPARED)
    assert [(line["a"], line["b"]) for line in body["equal_ratio"]] == [
        (a, b) for a, b in rivals_of(CONTEST, body["best_prompt"]) if b in (*STEERED, body["best_prompt"])
    ]


def test_results_agree_with_the_replies_on_disk(held: tuple[Row, list[Row]]) -> None:
    """Every figure can be had again from test-replies.jsonl, by plain loops."""
    body, rows = held
    some = {str(group.key): group for group in groups(6)}
    assert len(rows) == 6 + 10 * 18 and {f"{row['skeleton_id']}/{row['valence']}" for row in rows} == set(some)
    base = sum(row["nll"] for row in rows if row["method"] == NONE) / 6
    for result in body["results"]:
        mine = [row for row in rows if row["method"] == result["method"]]
        pairs = [(row, row["emotion"]) for row in mine] if result["method"] != NONE else [(row, e) for row in mine for e in EMOTIONS]
        right = [bool(row["text"]) and max(EMOTIONS, key=lambda e: row["probabilities"][e]) == target for row, target in pairs]
        assert result["accuracy"]["value"] == pytest.approx(sum(right) / len(pairs), abs=1e-6)
        answered = [bool(row["text"]) and "never" not in row["text"].split() for row, _ in pairs]
        assert result["answers"]["value"] == pytest.approx(sum(answered) / len(pairs), abs=1e-6)
        read = [max(row["probabilities"], key=lambda label, row=row: row["probabilities"][label]) == target for row, target in pairs]
        assert result["emotion"]["value"] == pytest.approx(sum(read) / len(pairs), abs=1e-6) == result["judges"]["words"]
        good = [
            a and b and row["sound"] and not stem_pattern(target).search(row["text"])
            for a, b, (row, target) in zip(answered, read, pairs, strict=True)
        ]
        assert result["good"]["value"] == pytest.approx(sum(good) / len(pairs), abs=1e-6)
        assert result["ratio"]["value"] == pytest.approx(math.exp(sum(row["nll"] for row, _ in pairs) / len(pairs) - base), abs=1e-5)
        assert result["unfinished"]["value"] == pytest.approx(sum(r["finish_reason"] == "length" for r, _ in pairs) / len(pairs), abs=1e-6)
        assert result["n"] == len(pairs) and result["missing"] == 0
        strengths = {(row["emotion"], row["strength"]) for row in mine}
        wanted = {(NONE, None)} if result["method"] == NONE else set(body["chosen"][result["method"]].items())
        assert strengths == wanted


def test_settings_are_chosen_by_the_rule_from_the_frontier(held: tuple[Row, list[Row]]) -> None:
    body, _ = held
    points = {(r["method"], r["setting"], r["target"]): r for r in body["frontier"]}

    def make(row: Row) -> DosePoint:
        return DosePoint(**{field.name: row[field.name] for field in fields(DosePoint)})

    for method in STEERED:
        tried = {emotion: {dose: make(points[method, dose, emotion]) for dose in SETTINGS.doses} for emotion in EMOTIONS}
        choice = choose(tried, {emotion: make(points[NONE, None, emotion]) for emotion in EMOTIONS}, SETTINGS.budget)
        assert body["chosen"][method] == {e: dose * defaults()[method][e] for e, dose in choice.doses.items()}
        assert (method in body["unfit"]) == (not choice.fits)
    for control, source in ((control, source_of(control)) for control in CONTROLS):
        assert body["chosen"][control] == body["chosen"][source]
        assert points[control, 1.0, "all"]["n"] == 6 and points[source, 1.0, "all"]["n"] == 9
    prompts = {name: make(points[name, None, "all"]) for name in PROMPTS}
    assert body["best_prompt"] == best_prompt(prompts, SETTINGS.budget)
    assert all(value is None for name in (NONE, *PROMPTS) for value in body["chosen"][name].values())


@pytest.mark.parametrize("killed_after", [3, 140, 300, 499])
def test_killed_at_any_moment_the_rerun_ends_in_the_same_bytes(
    held: tuple[Row, list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    with monkeypatch.context() as patched:
        kill_after(patched, killed_after)
        with pytest.raises(KeyboardInterrupt):
            hold(tmp_path)
    assert json.dumps(hold(tmp_path)) == json.dumps(held)


def test_missing_opinions_are_counted_and_leave_the_denominators(held: tuple[Row, list[Row]], tmp_path: Path) -> None:
    def failing(text: str) -> bool:
        return len(text) % 3 == 1

    body, rows = hold(tmp_path, WordJudge(failing), paid=True)
    whole = {(row["method"], row["id"]): row for row in held[1]}
    lost = 0
    for result in body["results"]:
        mine = [row for row in rows if row["method"] == result["method"]]
        known = [row for row in mine if not failing(row["text"])]
        lost += len(mine) - len(known)
        factor = 3 if result["method"] == NONE else 1
        assert result["missing"] == factor * (len(mine) - len(known)) and result["n"] == factor * len(mine)
        assert all((row["probabilities"] is None) == failing(row["text"]) for row in mine)
        if result["method"] != NONE:
            right = [bool(row["text"]) and max(EMOTIONS, key=lambda e: row["probabilities"][e]) == row["emotion"] for row in known]
            assert result["accuracy"]["value"] == pytest.approx(sum(right) / len(right), abs=1e-6)
            read = [row["judged"] == row["emotion"] for row in known]
            assert result["emotion"]["value"] == pytest.approx(sum(read) / len(read), abs=1e-6)
        assert result["ratio"]["value"] is not None and result["sound"]["value"] is not None
    assert lost > 20
    same = [(row, other) for row in rows if row["strength"] == (other := whole[row["method"], row["id"]])["strength"]]
    assert len(same) > 100 and all(row["text"] == other["text"] for row, other in same), "a failing judge changes nothing that is written"
    assert json.dumps(hold(tmp_path, WordJudge(), paid=True)) == json.dumps(held), "asked again, the missing ones are there"


def test_a_judge_that_says_nothing_ends_in_a_complete_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body, rows = hold(tmp_path, WordJudge(lambda text: True), paid=True)
    for result in body["results"]:
        empty = sum(row["text"] == "" for row in rows if row["method"] == result["method"]) * (3 if result["method"] == NONE else 1)
        assert result["n"] == 18 and result["missing"] == 18 - empty, "an empty reply needs no judge"
        assert result["accuracy"]["value"] == result["good"]["value"] == (0.0 if empty else None)
        assert result["ratio"]["value"] > 0
    assert body["chosen"]["circuit"] == dict.fromkeys(EMOTIONS, 0.5), "the weakest"
    assert body["unfit"] == dict.fromkeys(STEERED, list(EMOTIONS))
    assert "NaN" not in json.dumps(body)
    show(body, capsys)


def show(body: Row, capsys: pytest.CaptureFixture[str]) -> str:
    """The printed tables of an evaluation."""
    split = {"n_groups": 9, "kinds": {"chat": 4, SEV_KIND: 5}, "files": {"test.jsonl": "0"}}
    print_evaluation(
        {"model": "tiny", "judge": {"name": "words"}, "emotions": list(EMOTIONS), "test": split, "dev": split, **body}, "x.json"
    )
    return capsys.readouterr().out


def test_the_tables_hold_the_figures(held: tuple[Row, list[Row]], capsys: pytest.CaptureFixture[str]) -> None:
    out = show(held[0], capsys)
    for result in held[0]["results"]:
        line = next(line for line in out.splitlines() if line.startswith(f"{result['method']} "))
        for name in ("good", "emotion"):
            share = result[name]
            assert f"{100 * share['value']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]" in line
        assert result["worst_kind"] in line
    assert "9 prompts (chat 4, sev-vivid 5), each for every emotion" in out and "most good replies with ratio up to 3" in out
    measured = [result for result in held[0]["results"] if result["contamination"] is not None]
    assert [result["method"] for result in measured] == [method for method in CONTEST if method != NONE]
    table = out[out.index("topic contamination") :].splitlines()
    for result in measured:
        line = next(line for line in table if line.startswith(f"{result['method']} "))
        shares = [f"{100 * result['contamination'][name]:.1f}" for name in ("accuracy", "subject", "chance")]
        assert line.split()[1:4] == shares and f"{100 * max(result['contamination']['phrases'].values()):.1f}" in line
    assert "circuit - residual" in out and f"circuit - {held[0]['best_prompt']}" in out and "at the ratio of" in out


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Row, list[Row]]:
    """A contest on prompts of several kinds, read by a panel of three of whom one hears laughter only."""
    panel = [WordJudge(), WordJudge(name="others", key="words-2"), WordJudge(lambda text: "laugh" not in text, name="deaf", key="deaf")]
    return hold(tmp_path_factory.mktemp("mixed"), panel, settings=QUICK, test=[*groups(3), *prompts(6)], paid=True)


QUICK = replace(SETTINGS, methods=(NONE, "circuit", "prompt-tone"))


def test_a_panel_reads_prompts_of_all_kinds(mixed: tuple[Row, list[Row]], capsys: pytest.CaptureFixture[str]) -> None:
    body, rows = mixed
    assert [*body["results"][0]["by_kind"]] == [SEV_KIND, "chat", "question", "one-liner"]
    assert {row["kind"] for row in rows} == {SEV_KIND, "chat", "question", "one-liner"}
    chat = next(row for row in rows if row["kind"] == "chat")
    assert chat["prompt"] == prompts(1)[0].said and (chat["valence"], chat["id"]) == ("", f"p00/{chat['emotion']}")
    assert body["agreement"]["judges"] == ["deaf", "others", "words"] and body["agreement"]["pairs"]["others - words"] == 1.0
    assert body["agreement"]["n"] == len({row["text"] for row in rows})
    for row in rows:
        given = [shares for shares in row["opinions"].values() if shares is not None]
        assert [*row["opinions"]] == ["words", "others", "deaf"] and len(given) == (3 if "laugh" in row["text"] or not row["text"] else 2)
        assert row["judged"] == max(given[0], key=lambda label, shares=given[0]: shares[label]), "two of three agree"
        assert row["answers"] == (0.0 if not row["text"] else 0.1 if "never" in row["text"].split() else 0.9)
    for result in body["results"]:
        assert result["missing"] == 0 and result["judges"]["words"] == result["judges"]["others"] == result["emotion"]["value"]
        assert sum(part["n"] for part in result["by_kind"].values()) == result["n"] == 27
        worst = min(result["by_kind"], key=lambda kind: result["by_kind"][kind]["good"]["value"])
        assert result["worst_kind"] == worst
    out = show(body, capsys)
    assert "emotion read by" in out and "Krippendorff's alpha" in out and "others - words 100%" in out
    head = next(line for line in out.splitlines() if line.startswith("good / emotion / answers"))
    circuit = next(result for result in body["results"] if result["method"] == "circuit")
    best = max(body["results"], key=lambda result: result["good"]["value"])
    kinds = sorted(best["by_kind"], key=lambda kind: best["by_kind"][kind]["good"]["value"])
    assert head.split()[5:] == kinds, "the worst kind stands first"
    line = [line for line in out[out.index(head) :].splitlines() if line.startswith("circuit ")][0]
    for kind in kinds:
        assert " / ".join(f"{100 * circuit['by_kind'][kind][name]['value']:.1f}" for name in ("good", "emotion", "answers")) in line


# ---- the command -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in a folder with the tiny model, its planted circuit, and judges who know the planted words."""
    model, circuit, directions = parts()
    circuit.save(tmp_path / "circuit.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_module.Model, "load", classmethod(lambda cls, *a, **b: model))
    monkeypatch.setattr(judges, "make_judges", lambda spec, **options: [WordJudge(name=name, key=f"{name}-1") for name in spec.split(",")])
    monkeypatch.setattr(embedded_judge, "shared_encoder", BagEncoder)
    monkeypatch.setattr(soundness.SoundnessCheck, "load", classmethod(lambda cls, **options: WordCheck()))
    monkeypatch.setattr(answers.AnswerCheck, "load", classmethod(lambda cls, **options: WordAnswers()))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["evaluate", "--circuit", "circuit.safetensors", *arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


SMALL = ("--groups", "8", "--dev-groups", "8", "--doses", "1,2", "--max-new-tokens", "4", "--budget", "3")


READ_BY = {"soundness": "check-1", "answers": "answers-1"}


def test_the_command_writes_the_artefact_and_goes_on(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    _, _, directions = parts()
    directions.save(Places.of(parts()[0].name).directions)
    code, out, err = run(*SMALL, "--json")
    assert code == 0, err
    found = json.loads(out)
    folder = Places.of(parts()[0].name).folder / "evaluation"
    first = (folder / "evaluation.json").read_bytes()
    assert json.loads(first) == found
    assert (found["schema"], found["kind"], found["model"], found["emotions"]) == (2, "evaluation", parts()[0].name, list(EMOTIONS))
    assert found["command"].startswith("emosteer evaluate --circuit circuit.safetensors --groups 8") and "created" not in found
    assert found["dtype"] == "float32" and found["decoding"]["max_new_tokens"] == 4
    assert found["judge"] == {"name": "embedded, public, linear", "key": "mean of embedded-1, public-1, linear-1"} | READ_BY
    for split, files in (("dev", ("sev/train.jsonl", "prompts/dev.jsonl")), ("test", ("sev/test.jsonl", "prompts/test.jsonl"))):
        assert found[split] == {"n_groups": 8, "kinds": dict.fromkeys(KINDS, 1), "files": {f: sha256_file(data_path(f)) for f in files}}
    assert {row["method"] for row in found["results"]} == set(CONTEST) - {"prompt-examples"}, "this circuit has none"
    rows = [json.loads(line) for line in (folder / "test-replies.jsonl").read_text().splitlines()]
    assert len(rows) == 8 + 9 * 24 and {row["kind"] for row in rows} == set(KINDS)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert run(*SMALL, "--json")[:2] == (0, out) and (folder / "evaluation.json").read_bytes() == first
    assert {file.name: file.stat().st_size for file in folder.iterdir()} == sizes, "nothing was written or asked again"
    code, table, _ = run(*SMALL)
    assert code == 0 and "random-direction" in table and str(folder / "evaluation.json") in table


def test_test_prompts_come_from_the_end_of_the_order(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    names = [f"s{i}" for i in range(20)]
    event = {"positive": "it came back", "neutral": "it was late", "negative": "it went home"}
    lines = [json.dumps({"skeleton_id": n, "theme": "t", "scenario": f"i waited at the {n}", "event": event}) for n in names]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n")
    code, out, err = run(*SMALL, "--json", "--scenarios", "mine.jsonl", "--methods", "circuit,residual", "--out", "here")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "here" / "test-replies.jsonl").read_text().splitlines()]
    keys = [f"{n}/{v}" for n in names for v in event]
    assert {f"{r['skeleton_id']}/{r['valence']}" for r in rows} == set(sorted(keys, key=lambda key: stable_share(key, 1))[-8:])
    assert [*json.loads(out)["test"]["files"]] == ["mine.jsonl"] and json.loads(out)["test"]["kinds"] == {SEV_KIND: 8}
    assert json.loads(out)["dev"]["kinds"] == {SEV_KIND: 8}, "strengths are chosen on the kinds that are tested"
    assert [row["method"] for row in json.loads(out)["results"]] == [NONE, "residual", "circuit"]
    assert {row["prompt"].split()[4].rstrip(".") for row in rows} <= set(names)
    code, out, err = run(*SMALL, "--scenarios", "mine.jsonl", "--methods", "circuit,residual", "--out", "there", "--skip", "8")
    rows = [json.loads(line) for line in (tmp_path / "there" / "test-replies.jsonl").read_text().splitlines()]
    assert {f"{r['skeleton_id']}/{r['valence']}" for r in rows} == set(sorted(keys, key=lambda key: stable_share(key, 1))[-16:-8])


def test_kinds_and_judges_are_chosen(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    options = (*SMALL, "--json", "--methods", "circuit", "--judge", "words")
    code, out, err = run(*options, "--kinds", "chat,question", "--out", "here")
    assert code == 0, err
    found = json.loads(out)
    assert found["test"]["kinds"] == {"question": 4, "chat": 4} == found["dev"]["kinds"] and found["judge"]["name"] == "words"
    assert [*found["test"]["files"]] == ["prompts/test.jsonl"] and found["agreement"]["judges"] == ["words"]
    chats = [json.loads(line) for line in (tmp_path / "here" / "test-replies.jsonl").read_text().splitlines()]
    said = {group.key.scenario: group.said for group in read_groups(data_path("prompts/test.jsonl"))}
    assert all(row["prompt"] == said[row["skeleton_id"]] for row in chats)
    code, out, err = run(*options, "--kinds=-chat", "--out", "there")
    assert code == 0 and json.loads(out)["test"]["kinds"] == dict.fromkeys(KINDS[:-1], 1)


def test_without_directions_random_heads_is_left_out_unless_asked_for(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = run(*SMALL, "--json")
    assert code == 0 and "left out: random-heads needs the directions" in err
    assert {row["method"] for row in json.loads(out)["results"]} == set(CONTEST) - {"random-heads", "prompt-examples"}
    code, out, err = run(*SMALL, "--methods", "circuit,random-heads")
    assert code == 1 and out == "" and "emosteer extract" in err and err.count("\n") == 1


def test_a_circuit_without_learned_residual_vectors_holds_the_contest_without_them(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    replace(parts()[1], learned_residual=None).save(tmp_path / "circuit.safetensors")
    code, out, err = run(*SMALL, "--json")
    assert code == 0 and "left out: learned-residual needs learned residual vectors, which this circuit lacks" in err
    found = json.loads(out)
    assert {row["method"] for row in found["results"]} == set(CONTEST) - {"random-heads", "learned-residual", "prompt-examples"}
    assert "learned-residual" not in {*found["chosen"], *found["defaults"], *(row["b"] for row in found["comparisons"])}
    code, out, err = run(*SMALL, "--methods", "circuit,learned-residual", "--out", "there")
    assert code == 1 and out == "" and "`emosteer circuit --learn-residual`" in err and err.count("\n") == 1
    parts()[1].save(tmp_path / "circuit.safetensors")
    code, out, err = run(*SMALL, "--methods", "circuit,learned-residual", "--out", "there", "--json")
    assert code == 0 and [row["method"] for row in json.loads(out)["results"]] == [NONE, "learned-residual", "circuit"]
    assert {(row["a"], row["b"]) for row in json.loads(out)["comparisons"]} >= {("circuit", "learned-residual")}


def test_a_judge_that_is_the_steered_model_is_refused(run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    judge = object.__new__(HfJudge)  # nothing but what names it and its weights is looked at
    for name, value in {"name": "hf:tiny", "key": "x", "weights": (parts()[0].sha256,)}.items():
        object.__setattr__(judge, name, value)
    monkeypatch.setattr(judges, "make_judges", lambda spec, **options: [WordJudge(), judge])
    monkeypatch.setattr(judges, "specs_of", lambda spec: ["embedded", "embedded"])
    code, out, err = run(*SMALL)
    assert code == 2 and out == "" and "independent" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "circuit,prompt"), "unknown method 'prompt'"),
        (("--doses", "1,x"), "expected --doses"),
        (("--doses", "0"), "expected --doses"),
        (("--budget", "nan"), "--budget"),
        (("--scenarios", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("--skip", "100000"), "leaves nothing"),
        (("--kinds", "chatt"), "unknown kind 'chatt' (did you mean 'chat'?)"),
        (("--kinds", "all,-chat", "--scenarios", "chats.jsonl"), "chats.jsonl has no prompt of the kinds"),
    ],
)
def test_bad_options_are_one_line(run: Callable[..., tuple[int, str, str]], options: tuple[str, ...], message: str) -> None:
    Path("chats.jsonl").write_text('{"id": "c", "kind": "chat", "messages": [{"role": "user", "content": "why"}]}\n')
    code, out, err = run(*SMALL[:2], *options)
    assert code in (1, 2) and out == "" and message in err and err.count("\n") == 1 and "Traceback" not in err
