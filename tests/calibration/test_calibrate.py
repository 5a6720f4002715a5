"""The intensity dial: its arithmetic, the cap under the guard, and `calibrate` end to end on a planted circuit with a fake judge."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from emosteer.base.artifacts import Provenance
from emosteer.base.errors import ArtifactError, DataError, UsageError
from emosteer.base.files import sha256_file, write_jsonl
from emosteer.base.jsonl import KeyedLog
from emosteer.calibration.calibrate import (
    FLOOR,
    Climb,
    calibrate,
    check,
    climb,
    grid,
    joint_ratio,
    lowered,
    most_good,
    uncalibrated,
    worthwhile,
)
from emosteer.calibration.settings import CalibrateSettings, Guard
from emosteer.calibration.trials import StrengthPoint, Trials, circuit_key
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.dial import dial, flattened, isotonic, strength_for
from emosteer.cli import main as cli
from emosteer.cli.command_line import with_command
from emosteer.generation.decoding import Decoding
from emosteer.generation.fluency import reply_nll
from emosteer.generation.generate import Request, generate
from emosteer.generation.steering import plan_for
from emosteer.judges.jury import Jury
from emosteer.judges.protocol import LABELS, Opinion, Soundness
from emosteer.models.model import Model
from emosteer.scenarios import shipped
from emosteer.scenarios.examples import Exchange
from emosteer.scenarios.prompts import plain
from emosteer.scenarios.scenarios import Group
from tests.conftest import build, small_data
from tests.helpers.contest_setup import WordAnswers, prompts

EMOTIONS = ("anger", "sadness", "disgust")
WORDS = {"anger": "slam stop boss never", "sadness": "cry alone again home", "disgust": "spit filth wait door"}
TEXTS = Decoding(max_new_tokens=8)

# ---- the arithmetic ------------------------------------------------------------------------------------------------


def best_isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest non-decreasing sequence, by trying every way to cut the values into blocks of equal value."""
    best, least = [], math.inf
    for cuts in product((False, True), repeat=len(values) - 1):
        blocks: list[list[int]] = [[0]]
        for i, cut in enumerate(cuts, 1):
            if cut:
                blocks.append([])
            blocks[-1].append(i)
        means = [sum(values[i] * weights[i] for i in b) / sum(weights[i] for i in b) for b in blocks]
        if any(a > b for a, b in pairwise(means)):
            continue
        fit = [mean for mean, block in zip(means, blocks, strict=True) for _ in block]
        loss = sum(w * (v - f) ** 2 for v, f, w in zip(values, fit, weights, strict=True))
        if loss < least - 1e-12:
            best, least = fit, loss
    return best


def test_isotonic_regression_is_the_best_of_all_cuts() -> None:
    draw = random.Random(0)
    for case in range(300):
        n = draw.randint(1, 8)
        values = [draw.choice((0.0, 0.1, 0.2, 0.5)) if case % 3 else draw.random() for _ in range(n)]
        weights = [draw.randint(1, 5) if case % 2 else 1 for _ in range(n)]
        assert isotonic(values, weights) == pytest.approx(best_isotonic(values, weights), abs=1e-9)
    assert isotonic([3, 1], [1, 3]) == [1.5, 1.5], "a heavier value counts for more"


def sigmoid(strength: float) -> float:
    return 0.05 + 0.85 / (1 + math.exp(-1.6 * (strength - 4)))


def test_judged_intensity_rises_evenly_along_the_dial() -> None:
    strengths = [0.2 * i for i in range(41)]
    fitted = isotonic([sigmoid(s) for s in strengths], [1] * 41)
    low, high = sigmoid(0), sigmoid(8)
    for intensity in range(101):
        reached = sigmoid(strength_for(strengths, fitted, intensity))
        assert reached == pytest.approx(low + intensity / 100 * (high - low), abs=0.005)
    coarse = strengths[::5]  # nine points, as by default
    worst = max(abs(sigmoid(strength_for(coarse, [sigmoid(s) for s in coarse], i)) - (low + i / 100 * (high - low))) for i in range(101))
    assert worst < 0.06


def test_the_dial_never_stands_still_whatever_the_noise() -> None:
    draw = random.Random(1)
    for _ in range(300):
        n = draw.randint(2, 10)
        strengths = [0.0, *sorted(draw.sample(range(1, 50), n - 1))]
        values = [draw.choice((0.1, 0.2, 0.3)) if draw.random() < 0.5 else draw.random() for _ in range(n)]
        fitted = isotonic(values, [1] * n)
        at = [strength_for(strengths, fitted, i) for i in range(101)]
        assert all(a < b for a, b in pairwise(at)) and at[0] == 0
        shares, ends = dial(strengths, fitted)
        assert shares[0] == 0 and shares[-1] == 1 and all(a < b for a, b in pairwise(shares)) and all(a < b for a, b in pairwise(ends))
        first_of_highest = strengths[fitted.index(fitted[-1])] or strengths[-1]
        assert at[-1] == pytest.approx(first_of_highest), "100 is where the highest intensity is reached first"


def test_where_the_judge_is_as_good_as_sure_the_dial_ends() -> None:
    assert flattened([0.0, 0.5, 0.97, 0.99, 1.0]) == pytest.approx([0.0, 0.5, 0.97, 0.98, 0.98])
    strengths = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert strength_for(strengths, flattened([0.0, 0.5, 0.97, 0.99, 1.0]), 100) == 3.0
    assert strength_for(strengths, flattened([0.1, 0.3, 0.5, 0.7, 0.9]), 100) == 4.0, "where it still rises, to the cap"
    assert flattened([0.3, 0.3]) == [0.3, 0.3]


def test_plateaus() -> None:
    strengths = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert dial(strengths, [0.1, 0.3, 0.5, 0.5, 0.7, 0.9]) == ([0, *map(pytest.approx, (0.25, 0.5, 0.75)), 1], [0, 1, 2.5, 4, 5])
    assert dial(strengths, [0.1, 0.5, 0.9, 0.9, 0.9, 0.9])[1][-1] == 2.0
    assert dial(strengths, [0.2] * 6) == ([0, 1], [0, 5])
    shares, at = dial(strengths, [0.1, 0.1, 0.1, 0.5, 0.7, 0.9])  # nothing happens up to 2: hardly any of the dial is spent there
    assert (shares[1], at[1]) == (0.05, 2.0) and strength_for(strengths, [0.1, 0.1, 0.1, 0.5, 0.7, 0.9], 25) > 2
    shares, at = dial(strengths, [0.1, 0.1, 0.12, 0.5, 0.7, 0.9])  # nor more than half the way to the next value
    assert shares[1] == pytest.approx(0.0125)
    for wrong in (-0.1, 100.1, math.nan, math.inf):
        with pytest.raises(UsageError, match="between 0 and 100"):
            strength_for(strengths, [0.2] * 6, wrong)


# ---- the cap -------------------------------------------------------------------------------------------------------


@dataclass
class Curves:
    """Trials whose figures are functions of emotion and strength."""

    ratio: Callable[[str, float], float] = lambda e, s: 1.0
    sound: Callable[[str, float], float] = lambda e, s: 1.0
    names: Callable[[str, float], float] = lambda e, s: 0.0
    error: float = 0.0
    prompts: int = 10_000
    calls: list[list[tuple[str, float]]] = field(default_factory=list)

    def at(self, wanted: Sequence[tuple[str, float]], what: str = "") -> list[StrengthPoint]:
        self.calls.append(list(wanted))
        judged = (0.1,) * self.prompts
        return [StrengthPoint(e, s, judged, self.ratio(e, s), self.sound(e, s), self.names(e, s), self.error) for e, s in wanted]

    def tried(self, emotion: str) -> list[float]:
        return [s for call in self.calls for e, s in call if e == emotion and s]


STRICT = Guard(ratio=1.2, sound=0.95, names=0.2)


def capped(curves: Curves, top: float = 8.0, **options: Any) -> dict[str, float]:
    settings = CalibrateSettings(**{"points": 9, "refine": 3, "guard": STRICT, **options})
    found = climb(curves, dict.fromkeys(EMOTIONS, top), settings)  # type: ignore[arg-type]
    for emotion, one in found.items():
        held, broke = [p.strength for p in one.held], [p.strength for p in one.broke]
        assert held + broke == sorted(held + broke) and held[0] == 0
        assert sorted(held[1:] + broke) == sorted(curves.tried(emotion)), "every point tried is kept"
        assert not STRICT.faults(one.held[-1], one.held[0]), "the cap itself holds every bound"
        assert all(not STRICT.faults(p, one.held[0], slack=1) for p in one.held), "and what is weaker misses none but by chance"
    return {emotion: one.held[-1].strength for emotion, one in found.items()}


def test_the_cap_is_the_end_of_what_holds_found_by_halving() -> None:
    limits = {"anger": 5.3, "sadness": 2.6, "disgust": 99.0}
    curves = Curves(ratio=lambda e, s: 1.1 if s <= limits[e] else 1.3)
    assert capped(curves) == {"anger": 5.25, "sadness": 2.5, "disgust": 8.0}
    assert curves.tried("sadness") == [1, 2, 3, 2.5, 2.75, 2.625], "once broken, nothing stronger is written"
    assert curves.calls[1] == [(e, 1.0) for e in EMOTIONS] and curves.calls[-1] == [("anger", 5.375), ("sadness", 2.625)]
    assert capped(Curves(ratio=lambda e, s: 1.2 if s <= 5.3 else 1.2001), refine=0) == dict.fromkeys(EMOTIONS, 5.0)
    assert capped(Curves(ratio=lambda e, s: 1 + 0.25 * (s > 1.4)), points=3, refine=6)["anger"] == pytest.approx(1.4, abs=0.07)


def test_what_holds_again_beyond_a_break_does_not_count() -> None:
    """A ratio that is bad at 3 and good again at 4 to 8, and one that falls first."""
    assert capped(Curves(ratio=lambda e, s: 1.5 if 2.4 < s < 3.5 else 0.9))["anger"] == 2.375
    assert capped(Curves(ratio=lambda e, s: {0: 1.0}.get(s, 0.7 + 0.1 * s)))["anger"] == 5.0


def test_soundness_and_naming_cap_too() -> None:
    assert capped(Curves(sound=lambda e, s: 1 - 0.02 * s), refine=4)["anger"] == pytest.approx(2.5)
    assert capped(Curves(names=lambda e, s: 0.04 * s), refine=0)["anger"] == 5.0
    assert capped(Curves(sound=lambda e, s: 0.9 if s < 3.2 else 0.89))["anger"] == 3.125, "unsteered replies are no better"
    assert capped(Curves(names=lambda e, s: 0.3 if s < 3.2 else 0.31))["anger"] == 3.125
    assert capped(Curves(ratio=lambda e, s: math.nan if s else 1.0))["anger"] == 0.0, "no figure is no licence"


def test_a_miss_within_chance_ends_nothing_but_is_no_cap() -> None:
    """Of two dozen prompts one more or less is chance: a weaker strength may miss a bound by a standard error, the cap may not."""

    def spike(high: float) -> Callable[[str, float], float]:
        return lambda e, s: high if 2.4 < s < 3.5 else 0.9 if s < 5.3 else 1.6

    assert capped(Curves(ratio=spike(1.3), error=0.1))["anger"] == 5.25
    assert capped(Curves(ratio=spike(1.35), error=0.1))["anger"] == 2.375, "1.2 * exp(0.1) is 1.326"
    assert capped(Curves(ratio=lambda e, s: 1.0 if s < 4.2 else 1.3, error=0.1))["anger"] == 4.125, "missed by chance, but to the end"
    few, many = (Curves(sound=lambda e, s: 0.92 if 1.5 < s < 2.5 else 1.0, prompts=n) for n in (24, 1000))
    assert capped(few)["anger"] == 8.0 and capped(many)["anger"] == 1.5
    few, many = (Curves(names=lambda e, s: 0.24 if 1.5 < s < 2.5 else 0.0, prompts=n) for n in (24, 1000))
    assert capped(few)["anger"] == 8.0 and capped(many)["anger"] == 1.5


def climbed(*ratios: float) -> Climb:
    return Climb(tuple(StrengthPoint("x", float(i), (0.1,), ratio, 1.0, 0.0) for i, ratio in enumerate(ratios)))


def test_the_ratio_proper_is_that_of_all_emotions_together() -> None:
    climbs = {"anger": climbed(1.0, 1.3, 1.6, 1.9), "sadness": climbed(1.0, 0.8, 0.6), "disgust": climbed(1.0, 1.1, 1.5)}
    assert joint_ratio([c.held[-1] for c in climbs.values()]) == pytest.approx((1.9 * 0.6 * 1.5) ** (1 / 3))
    assert lowered(climbs, 1.3) == climbs, "an emotion may be above where another is below"
    once = lowered(climbs, 1.15)  # (1.6 * 0.6 * 1.5) ** (1 / 3) = 1.13
    assert [p.strength for p in once["anger"].held] == [0, 1, 2] and [p.strength for p in once["anger"].broke] == [3]
    assert once["sadness"] == climbs["sadness"] and once["disgust"] == climbs["disgust"]
    more = lowered(climbs, 0.95)  # anger 1.9, 1.6, disgust 1.5, anger 1.3: (1.0 * 0.6 * 1.1) ** (1 / 3) = 0.87
    assert [len(c.held) for c in more.values()] == [1, 3, 2]
    assert [p.strength for p in more["anger"].broke] == [1, 2, 3], "in order"
    hopeless = {"anger": Climb((StrengthPoint("x", 0.0, (0.1,), 1.0, 1.0, 0.0), StrengthPoint("x", 1.0, (0.1,), 5.0, 1.0, 0.0)))}
    assert len(lowered(hopeless, 1.2)["anger"].held) == 1, "unsteered text is what is left"


def test_strengths_that_pay_for_emotion_with_good_replies_are_left_out() -> None:
    def of(*good: float, prompts: int = 100) -> Climb:
        points = (StrengthPoint("x", float(i), (0.1,) * prompts, 1.0, 1.0, 0.0, good=share) for i, share in enumerate(good))
        return Climb(tuple(points), (StrengthPoint("x", 9.0, (0.1,), 3.0, 1.0, 0.0),))

    found = worthwhile({"anger": of(0.0, 0.3, 0.5, 0.41, 0.39, 0.2), "sadness": of(0.0, 0.1, 0.2)})
    assert [p.strength for p in found["anger"].held] == [0, 1, 2, 3], "0.4 is two standard errors below 0.5 with 100 prompts"
    assert [p.strength for p in found["anger"].broke] == [4, 5, 9] and len(found["sadness"].held) == 3
    assert len(worthwhile({"anger": of(0.0, 0.3, 0.5, 0.41, 0.39, 0.2, prompts=16)})["anger"].held) == 5
    assert len(worthwhile({"anger": of(0.0, 0.0, 0.0)})["anger"].held) == 3, "where nothing is good nothing is worse"
    six = worthwhile({"anger": of(0.0, 1.0, 5 / 6, 5 / 6, 1 / 6, prompts=6)})["anger"]
    assert len(six.held) == 4, "one reply of six that is not good may be chance, also where all were; four are more"


def test_the_default_is_where_most_replies_are_good_and_not_one_lucky_point() -> None:
    strengths = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert most_good(strengths, [0.0, 0.1, 0.3, 0.4, 0.35, 0.2]) == 3.0
    assert most_good(strengths, [0.0, 0.5, 0.0, 0.4, 0.4, 0.4]) == 4.0, "its neighbours are bad"
    assert most_good(strengths, [0.9, 0.2, 0.2, 0.2, 0.2, 0.2]) == 1.0, "unsteered is no strength, and the weakest of equals"
    assert most_good([0.0, 2.0], [0.0, 0.0]) == 2.0


def test_caps_lowered_for_the_joint_ratio_say_so(model: Model, circuit: Circuit, tmp_path: Path) -> None:
    made = run(model, circuit, tmp_path / "log.jsonl", settings=replace(LENIENT, ratio=1.05))
    table = made.metrics["calibration"]
    ends = [curve["ratio"][-1] for curve in table["emotions"].values()]
    assert table["joint_ratio"] == pytest.approx(math.prod(ends) ** (1 / len(ends)), rel=1e-4) and table["joint_ratio"] <= 1.05
    assert any(["joint ratio"] in curve["broke"]["why"] for curve in table["emotions"].values())


# ---- a planted circuit and a fake judge -----------------------------------------------------------------------------


def planted() -> Model:
    """The tiny model with a head per emotion in its last layer that writes the emotion's words."""
    model = build("llama")
    vocab, weight = model.tokenizer.get_vocab(), model.hf.model.layers[2].self_attn.o_proj.weight
    with torch.no_grad():
        for e, emotion in enumerate(EMOTIONS):
            written = model.hf.lm_head.weight[[vocab[word] for word in WORDS[emotion].split()]].mean(0)
            weight[:, 8 * e : 8 * e + 8] = 0
            weight[:, 8 * e] = written / written.norm()
    model.hf.requires_grad_(False)
    return Model.from_hf(model.hf, model.tokenizer, "tiny")


def circuit_of(model: Model, strength: float = 12.0) -> Circuit:
    z = torch.zeros(3, 3, 32)
    heads = torch.zeros(3, 3, 4, dtype=torch.bool)
    for e in range(3):
        z[e, 2, 8 * e], heads[e, 2, e] = 1, True
    names = ("heads", "neurons", "faithfulness", "left", "without_weakest", "random_mean", "random_max")
    metrics = {
        "emotions": {e: dict.fromkeys(names, 1) for e in EMOTIONS},
        "overlap": {a: {b: float(a == b) for b in EMOTIONS} for a in EMOTIONS},
    }
    return Circuit(
        emotions=EMOTIONS,
        heads=heads,
        z_delta=z,
        neuron_index=torch.zeros(0, 3, dtype=torch.long),
        neuron_delta=torch.zeros(0),
        strength=torch.full((3,), strength),
        importance=torch.zeros(3, 3, 2),
        vectors=torch.nn.functional.normalize(torch.ones(3, 3, 32), dim=-1),
        rms=torch.ones(3),
        residual_layers=(1,),
        residual_strength=1.0,
        d_mlp=48,
        preset="auto",
        instruction="keep the reply",
        metrics=metrics,
        provenance=Provenance(model.name, model.sha256, "", "planted", parents={"directions": "d" * 64}),
    )


class WordJudge:
    """P(emotion) grows with the share of its words; never told the target. Texts in `deaf` fail."""

    name, key = "words", "words-1"

    def __init__(self, deaf: Callable[[str], bool] = lambda text: False) -> None:
        self.deaf, self.asked = deaf, []  # type: ignore[var-annotated]

    def opinions(self, texts: Sequence[str], done: Any = None) -> list[Opinion]:
        self.asked += texts
        return [Opinion(None, "deaf") if self.deaf(text) else Opinion(self.shares(text)) for text in texts]

    @staticmethod
    def shares(text: str) -> dict[str, float]:
        words = text.split()
        raw = {label: 0.02 + sum(w in WORDS.get(label, "").split() for w in words) / max(1, len(words)) for label in LABELS}
        raw["neutral"] += 0.5
        return {label: value / sum(raw.values()) for label, value in raw.items()}


def read_as(text: str) -> str:
    """The judge's label, neutral allowed."""
    shares = WordJudge.shares(text)
    return max(shares, key=lambda label: shares[label])


class Calm:
    """Everything is sound that is not empty."""

    key = "calm"

    def check(self, texts: Sequence[str]) -> list[Soundness]:
        return [Soundness(bool(text), () if text else ("empty",), float(not text)) for text in texts]


@pytest.fixture(scope="module")
def model() -> Model:
    return planted()


@pytest.fixture(scope="module")
def circuit(model: Model) -> Circuit:
    return circuit_of(model)


GROUPS = small_data(4, EMOTIONS)[0]
LENIENT = CalibrateSettings(guard=Guard(ratio=1.8, sound=0.95, names=0.2), points=5, refine=2, ratio=9.0)


def on(model: Model, circuit: Circuit, log: Path, groups: Sequence[Any] = GROUPS, judge: Any = None) -> Trials:
    kept = KeyedLog(log)
    return Trials(model, circuit, jury(kept, judge), groups, kept, TEXTS, batch_size=10)


def jury(kept: KeyedLog, judge: Any = None) -> Jury:
    return Jury((judge or WordJudge(),), Calm(), WordAnswers(), lambda texts: torch.zeros(len(texts), 2), kept)


def run(model: Model, circuit: Circuit, log: Path, settings: CalibrateSettings = LENIENT, judge: Any = None) -> Circuit:
    found = on(model, circuit, log, judge=judge)
    return calibrate(found, settings, {"dev.jsonl": "a" * 64}, {"circuit": "c" * 64})


@pytest.fixture(scope="module")
def made(model: Model, circuit: Circuit, tmp_path_factory: pytest.TempPathFactory) -> Circuit:
    return run(model, circuit, tmp_path_factory.mktemp("made") / "log.jsonl")


def replies_by_hand(model: Model, circuit: Circuit, emotion: str, strength: float) -> list[str]:
    """Every reply written alone."""
    vectors = circuit.steering(model)
    texts = []
    for group in GROUPS:
        ids = tuple(model.prompt_ids(plain(group.text, circuit.instruction)))
        texts.append(generate(model, [Request("x", ids)], plan_for(vectors, [EMOTIONS.index(emotion)], [strength]), TEXTS)[0].text)
    return texts


def test_the_figures_are_those_of_replies_written_alone(model: Model, circuit: Circuit, made: Circuit) -> None:
    table = made.metrics["calibration"]
    base = [10.0 if math.isnan(x) else x for x in reply_nll(model, replies_by_hand(model, circuit, "anger", 0.0))]
    seen, shares = set(), set()
    for emotion, curve in table["emotions"].items():
        for part in (curve, curve["broke"]):
            for i, strength in enumerate(part["strength"]):
                texts = replies_by_hand(model, circuit, emotion, strength)
                nll = [10.0 if math.isnan(x) else x for x in reply_nll(model, texts)]
                assert part["judged"][i] == pytest.approx(fmean(WordJudge.shares(t)[emotion] for t in texts), abs=1e-5)
                assert part["ratio"][i] == pytest.approx(math.exp(fmean(nll) - fmean(base)), rel=1e-3)
                dearer = [b - a for a, b in zip(base, nll, strict=True)]
                if strength:
                    assert part["ratio_error"][i] == pytest.approx(stdev(dearer) / len(dearer) ** 0.5, abs=1e-3)
                assert part["sound"][i] == pytest.approx(fmean(bool(t) for t in texts), abs=1e-6)
                assert part["names"][i] == pytest.approx(fmean(emotion in t for t in texts), abs=1e-6)
                answered = [bool(t) and "never" not in t.split() for t in texts]
                assert part["answers"][i] == pytest.approx(fmean(answered), abs=1e-6)
                good = [read_as(t) == emotion and ok and emotion not in t for t, ok in zip(texts, answered, strict=True)]
                assert part["good"][i] == pytest.approx(fmean(good), abs=1e-6)
                shares.add(part["good"][i])
                assert part["n"][i] == len(GROUPS) and part["error"][i] > 0
                seen.add(round(part["judged"][i], 3))
        assert curve["fitted"] == pytest.approx(flattened(isotonic(curve["judged"], curve["n"])), abs=1e-6)
        assert curve["strength"][0] == 0 and all(a < b for a, b in pairwise(curve["strength"]))
        assert max(curve["ratio"]) <= 1.8 and max(curve["strength"]) <= 24
    assert len(seen) > 10 and len(shares) > 2, "strength changes what is judged, and how much of it is good"
    assert any(curve["broke"]["strength"] for curve in table["emotions"].values()), "the guard had something to do"


def test_the_circuit_carries_its_dial(circuit: Circuit, made: Circuit, tmp_path: Path) -> None:
    made.save(tmp_path / "c.safetensors")
    again = Circuit.load(tmp_path / "c.safetensors")
    assert again.calibrated and not circuit.calibrated and again.metrics == made.metrics
    for e, emotion in enumerate(EMOTIONS):
        curve = made.metrics["calibration"]["emotions"][emotion]
        assert again.strength_at(emotion, 0) == 0
        assert 0 < again.strength_at(emotion, 100) <= curve["strength"][-1]
        assert again.strength_at(emotion, 40) == round(strength_for(curve["strength"], curve["fitted"], 40), 6)
        assert again.strength[e].item() == pytest.approx(again.strength_at(emotion, 75)), "the default is intensity 75"
    assert torch.equal(again.z_delta, circuit.z_delta) and again.residual_strength == circuit.residual_strength
    table = made.metrics["calibration"]
    assert table["judge"] == "words" and table["groups"] == 12 and table["before"] == dict.fromkeys(EMOTIONS, 12.0)
    assert table["cap"] == {"ratio": 1.8, "sound": 0.95, "names": 0.2, "joint_ratio": 9.0} and "default: intensity 75" in table["rule"]
    assert made.provenance.parents == {"directions": "d" * 64, "circuit": "c" * 64}
    assert again.strength_at("anger", -80) == -again.strength_at("anger", 40), "less of it, by half of the dial"
    for wrong in (-101, 101, math.nan):
        with pytest.raises(UsageError, match="between -100 and 100"):
            again.strength_at("anger", wrong)
    with pytest.raises(UsageError, match="did you mean 'anger'"):
        again.strength_at("angry", 50)
    with pytest.raises(ArtifactError, match="emosteer calibrate"):
        circuit.strength_at("anger", 50)


def test_calibrating_twice_gives_the_same(model: Model, circuit: Circuit, made: Circuit, tmp_path: Path) -> None:
    """The second time starts from the strengths before the first, not from the default intensity."""
    back = uncalibrated(made)
    assert torch.equal(back.strength, circuit.strength) and back.metrics == circuit.metrics
    assert circuit_key(made) == circuit_key(circuit) != circuit_key(replace(circuit, z_delta=2 * circuit.z_delta))
    run(model, made, tmp_path / "log.jsonl").save(tmp_path / "again")
    made.save(tmp_path / "first")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "first").read_bytes()


class Killed(WordJudge):
    """Dies at its nth question."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.left = nth

    def opinions(self, texts: Sequence[str], done: Any = None) -> list[Opinion]:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().opinions(texts, done)


@pytest.mark.parametrize("share", [0.0, 0.04, 0.3, 0.61, 0.9])
def test_killed_and_run_again(model: Model, circuit: Circuit, made: Circuit, tmp_path: Path, share: float) -> None:
    """The same circuit to the last bit; what was kept is not written or judged again."""
    log = tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(model, circuit, log, judge=Killed(3))
    assert log.stat().st_size > 1000
    assert run(model, circuit, log).metrics == made.metrics
    lines = log.read_text().splitlines(keepends=True)
    kept = lines[: int(share * len(lines))]
    log.write_text("".join(kept) + lines[len(kept)][:25])  # a kill at another moment, which tore a line
    judge = WordJudge()
    assert run(model, circuit, log, judge=judge).metrics == made.metrics
    again = log.read_text().splitlines(keepends=True)
    assert again[: len(kept)] == kept and sorted(again) == sorted(lines)
    before = len(judge.asked)
    assert run(model, circuit, log, judge=judge).metrics == made.metrics and len(judge.asked) == before
    assert log.read_text().splitlines(keepends=True) == again, "the third run computes nothing"


def test_another_circuit_or_judge_does_not_take_the_kept_figures(model: Model, circuit: Circuit, made: Circuit, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    run(model, circuit, log)
    stronger = replace(circuit, z_delta=1.5 * circuit.z_delta)
    found, fresh = run(model, stronger, log), run(model, stronger, tmp_path / "fresh.jsonl")
    assert found.metrics == fresh.metrics != made.metrics
    other = WordJudge()
    other.key = "words-2"
    run(model, circuit, log, judge=other)
    assert len(other.asked) > 20


def test_a_judge_that_fails_is_missing_and_asked_again(model: Model, circuit: Circuit, made: Circuit, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    partly = run(model, circuit, log, judge=WordJudge(deaf=lambda text: len(text) % 3 == 0))
    counts = [n for curve in partly.metrics["calibration"]["emotions"].values() for n in curve["n"]]
    assert 0 < min(counts) < len(GROUPS)
    plain_texts = replies_by_hand(model, circuit, "anger", 0.0)
    heard = [WordJudge.shares(t)["anger"] for t in plain_texts if len(t) % 3]
    assert partly.metrics["calibration"]["emotions"]["anger"]["judged"][0] == pytest.approx(fmean(heard), abs=1e-5), "never 'no match'"
    for emotion, curve in partly.metrics["calibration"]["emotions"].items():
        for strength, good in zip(curve["strength"], curve["good"], strict=True):
            texts = [text for text in replies_by_hand(model, circuit, emotion, strength) if len(text) % 3]
            meant = [read_as(t) == emotion and bool(t) and "never" not in t.split() and emotion not in t for t in texts]
            assert good == pytest.approx(fmean(meant), abs=1e-6), "a reply that no judge has read is not a bad one"
    assert run(model, circuit, log).metrics == made.metrics
    with pytest.raises(DataError, match="failed on all 12 replies"):
        run(model, circuit, tmp_path / "deaf.jsonl", judge=WordJudge(deaf=lambda text: True))


def test_where_nothing_holds_there_is_no_dial(
    model: Model, circuit: Circuit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_texts = replies_by_hand(model, circuit, "anger", 0.0)
    monkeypatch.setattr(Calm, "check", lambda self, texts: [Soundness(text in plain_texts, (), 0.0) for text in texts])
    made = run(model, circuit, tmp_path / "log.jsonl")
    assert (
        made.strength[0] == circuit.strength[0]
        and "(sound); its default strength stays 12 and it has no intensity" in capsys.readouterr().err
    )
    assert made.metrics["calibration"]["emotions"]["anger"]["broke"]["why"][-1] == ["sound"]
    with pytest.raises(ArtifactError, match="use --strength"):
        made.strength_at("anger", 50)
    assert "anger" in check(on(model, made, tmp_path / "log.jsonl"))["without_dial"]


def test_refusals(model: Model, circuit: Circuit, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no judge knows the emotion 'pride'"):
        run(model, replace(circuit, emotions=("anger", "sadness", "pride")), tmp_path / "log.jsonl")
    with pytest.raises(UsageError, match="default strength for anger is 0"):
        run(model, circuit.with_strength([0, 1, 1]), tmp_path / "log.jsonl")
    with pytest.raises(DataError, match="no scenario-event"):
        on(model, circuit, tmp_path / "log.jsonl", [])


def test_the_check_measures_other_prompts(model: Model, made: Circuit, tmp_path: Path) -> None:
    others = small_data(4, EMOTIONS, seed=5)[0]
    found = check(on(model, made, tmp_path / "log.jsonl", others))
    vectors = made.steering(model)
    for e, emotion in enumerate(EMOTIONS):
        row = found["emotions"][emotion]
        assert row["intensity"] == [0, 25, 50, 75, 100] and row["strength"] == [made.strength_at(emotion, i) for i in row["intensity"]]
        by_hand = []
        for group in others:
            ids = tuple(model.prompt_ids(plain(group.text, made.instruction)))
            texts = [generate(model, [Request("x", ids)], plan_for(vectors, [e], [s]), TEXTS)[0].text for s in row["strength"]]
            by_hand.append([WordJudge.shares(text)[emotion] for text in texts])
        judged = torch.tensor(by_hand)
        assert row["judged"] == pytest.approx(judged.mean(0).tolist(), abs=1e-5)
        steps = judged.diff(dim=1)
        assert row["rise"] == pytest.approx(steps.mean(0).tolist(), abs=1e-5)
        assert row["rise_error"] == pytest.approx((steps.std(0) / len(others) ** 0.5).tolist(), abs=1e-5)
        assert row["monotone"] == all(rise > 0 for rise in row["rise"])
    assert found["monotone"] == all(row["monotone"] for row in found["emotions"].values())
    for i, joint in enumerate(found["joint_ratio"]):
        ratios = [row["ratio"][i] for row in found["emotions"].values()]
        assert joint == pytest.approx(math.prod(ratios) ** (1 / len(ratios)), rel=1e-5)
    assert found["joint_ratio"][0] == 1.0
    assert found["highest_ratio"] == max(max(row["ratio"]) for row in found["emotions"].values())


# ---- the command line ------------------------------------------------------------------------------------------------


def line_of(prompt: Group, side: str) -> dict[str, Any]:
    """A prompt as a line of a file."""
    turns = [*(message._asdict() for message in prompt.earlier), {"role": "user", "content": prompt.text}]
    return {"id": f"{side}-{prompt.key}", "kind": prompt.kind, "messages": turns}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Model, circuit: Circuit) -> Path:
    root = tmp_path_factory.mktemp("calibrate")
    model.hf.save_pretrained(root / "tiny")
    model.tokenizer.save_pretrained(root / "tiny")
    for side in ("train", "test"):
        lines = []
        for i, place in enumerate(["office", "train", "flat", "desk", "door", "home", "boss", "cry"]):
            events = {"positive": f"the {place} came back", "neutral": f"the {place} was late", "negative": f"the {place} went"}
            lines.append({"skeleton_id": f"{side}{i}", "theme": "t", "scenario": f"i waited at the {place}", "event": events})
        write_jsonl(root / f"data/sev/{side}.jsonl", lines)
        written = [line_of(prompt, side) for prompt in prompts(18) if prompt.kind != "one-liner"]
        write_jsonl(root / f"data/prompts/{'dev' if side == 'train' else side}.jsonl", written)
    Circuit.save(replace(circuit, provenance=replace(circuit.provenance, model_sha256=Model.load(str(root / "tiny")).sha256)), root / "c")
    return root


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EMOSTEER_CACHE", str(folder / "cache"))
    monkeypatch.setattr("emosteer.judges.jury.make_jury", lambda judge, **options: jury)
    monkeypatch.setattr(shipped, "data_path", lambda name: folder / "data" / name)

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return command


FAST = ("-m", "./tiny", "--max-new-tokens", "6", "--groups", "6")


def test_from_the_command_line(call: Callable[..., Any], folder: Path) -> None:
    where = ("--circuit", "c", "--out", "made/circuit.safetensors")
    code, out, _ = call("calibrate", *FAST, *where, "--points", "5", "--json")
    found = json.loads(out)
    assert code == 0 and found["file"] == "made/circuit.safetensors" and found["calibration"]["groups"] == 6
    assert (folder / "made/circuit.calibration.jsonl").exists() and Circuit.load(folder / "made/circuit.safetensors").calibrated
    assert not Circuit.load(folder / "c").calibrated, "what was calibrated stays as it was"
    assert Circuit.load(folder / "made/circuit.safetensors").provenance.parents["circuit"] == sha256_file(folder / "c")
    before = (folder / "made/circuit.safetensors").read_bytes()
    code, out, _ = call("calibrate", *FAST, "--circuit", "made/circuit.safetensors", "--points", "5")
    again = Circuit.load(folder / "made/circuit.safetensors")
    typed = "emosteer calibrate --model ./tiny --circuit {} --groups 6 --points 5 --max-new-tokens 6"
    assert again.provenance.command == typed.format("made/circuit.safetensors")
    with_command(again, typed.format("c --out made/circuit.safetensors")).save(folder / "made/as-before")
    assert code == 0 and "strength at 25" in out and (folder / "made/as-before").read_bytes() == before, "the same but for the command"
    code, out, _ = call("inspect", "made/circuit.safetensors")
    assert code == 0 and "strength at 25" in out and "intensity dial, 6 prompts, judge words" in out
    assert "strength at 25" not in call("inspect", "c")[1]

    code, out, _ = call("calibrate", *FAST, "--circuit", "made/circuit.safetensors", "--check", "--out", "made/check.json", "--json")
    result = json.loads(out)
    assert code == 0 and result == json.loads((folder / "made/check.json").read_text())
    assert set(result["emotions"]) == set(EMOTIONS) and result["test"]["n_groups"] == 6
    kept = (
        "emosteer calibrate --model ./tiny --circuit made/circuit.safetensors --out made/check.json --check --groups 6 --max-new-tokens 6"
    )
    assert result["command"] == kept
    code, out, _ = call("calibrate", *FAST, "--circuit", "made/circuit.safetensors", "--check", "--out", "made/check.json")
    assert code == 0 and "on 6 prompts (sev-vivid 2, question 2, chat 2)" in out and "steps with their standard errors" in out

    made = Circuit.load(folder / "made/circuit.safetensors")
    text = ("generate", "the train was late", "-m", "./tiny", "--circuit", "made/circuit.safetensors", "--max-new-tokens", "6", "--json")
    for intensity in (0, 60, 100):
        rows = [json.loads(line) for line in call(*text, "-e", "all", "--intensity", str(intensity))[1].splitlines()]
        assert [row["strength"] for row in rows] == [made.strength_at(e, intensity) for e in EMOTIONS]
        same = json.loads(call(*text, "-e", "anger", "--strength", str(rows[0]["strength"]))[1])
        assert same["text"] == rows[0]["text"]
    default = [json.loads(line)["strength"] for line in call(*text, "-e", "all")[1].splitlines()]
    assert default == pytest.approx([made.strength_at(e, 75) for e in EMOTIONS], rel=1e-6)
    code, out, _ = call("calibrate", *FAST, *where, "--points", "5", "--most-good")
    made = Circuit.load(folder / "made/circuit.safetensors")
    curves = made.metrics["calibration"]["emotions"]
    assert code == 0 and "default strengths are where most replies are good" in out
    assert made.strength.tolist() == pytest.approx([most_good(curves[e]["strength"], curves[e]["good"]) for e in EMOTIONS], rel=1e-6)


def test_the_prompts_are_of_all_kinds_and_the_check_takes_others(call: Callable[..., Any], folder: Path) -> None:
    """Eight of each set that commands read: what was written to is what the log and the table hold."""
    made = call("calibrate", *FAST, "--circuit", "c", "--out", "kinds/c", "--points", "2", "--refine", "0", "--json")
    found = json.loads(made[1])["calibration"]
    assert found["groups"] == 6 and {*found["data"]} == {"sev/train.jsonl", "prompts/dev.jsonl"}
    written = [json.loads(line) for line in (folder / "kinds/c.calibration.jsonl").read_text().splitlines()]
    assert any("answers" in line for line in written)
    check = ("calibrate", *FAST, "--circuit", "kinds/c", "--check", "--out", "kinds/check.json", "--json")
    test = json.loads(call(*check)[1])["test"]
    assert test["n_groups"] == 6 and test["kinds"] == {"sev-vivid": 2, "question": 2, "chat": 2}
    assert {*test["files"]} == {"sev/test.jsonl", "prompts/test.jsonl"}
    assert json.loads(call(*check, "--kinds=-sev-vivid")[1])["test"]["kinds"] == {"question": 3, "chat": 3}
    only = json.loads(call(*check, "--kinds", "chat", "--skip", "1")[1])["test"]
    assert only["kinds"] == {"chat": 5} and [*only["files"]] == ["prompts/test.jsonl"]
    found = json.loads(call("calibrate", *FAST, "--circuit", "c", "--out", "chats/c", "--points", "2", "--kinds", "chat", "--json")[1])
    assert found["calibration"]["groups"] == 6 and [*found["calibration"]["data"]] == ["prompts/dev.jsonl"]


def test_the_dial_of_another_instruction(call: Callable[..., Any], folder: Path) -> None:
    """Prompts end with it, the circuit carries it, and the check writes with it."""
    asked = ("calibrate", *FAST, "--points", "3", "--refine", "0", "--json")
    own, other = (
        call(*asked, "--circuit", "c", "--out", "own/c"),
        call(*asked, "--circuit", "c", "--out", "other/c", "--instruction", "no ."),
    )
    assert own[0] == other[0] == 0 and Circuit.load(folder / "own/c").instruction == Circuit.load(folder / "c").instruction != "no ."
    made = Circuit.load(folder / "other/c")
    assert made.instruction == "no ." and torch.equal(made.z_delta, Circuit.load(folder / "c").z_delta)
    texts = [
        {json.loads(line).get("text") for line in (folder / f"{name}/c.calibration.jsonl").read_text().splitlines()}
        for name in ("own", "other")
    ]
    assert texts[0] != texts[1]
    again = call(*asked, "--circuit", "other/c", "--out", "again/c")
    assert json.loads(again[1])["calibration"]["emotions"] == json.loads(other[1])["calibration"]["emotions"], "its own from then on"

    text = ("generate", "the train was late", "-m", "./tiny", "-e", "all", "--strength", "4", "--max-new-tokens", "6", "--json")
    written = [call(*text, "--circuit", *which)[1] for which in (("other/c",), ("c", "--instruction", "no ."), ("c",))]
    said = [[json.loads(line)["text"] for line in lines.splitlines()] for lines in written]
    assert said[0] == said[1] != said[2], "what writes with it goes by its instruction"


def test_a_dial_may_go_on_where_good_replies_get_fewer(call: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges may be wrong about what is good; here they find less and less of it from the first strength on. The other bounds stay."""
    monkeypatch.setitem(calibrate.__globals__, "_good_bound", lambda held: held[0].good + 1e-9 if len(held) > 1 else -1.0)
    monkeypatch.setitem(
        calibrate.__globals__, "worthwhile", lambda climbs: {e: Climb(c.held[:2], (*c.held[2:], *c.broke)) for e, c in climbs.items()}
    )
    asked = ("calibrate", *FAST, "--points", "4", "--refine", "0", "--json", "--circuit", "c")
    usual, whole = (
        json.loads(call(*asked, "--out", name, *more)[1])["calibration"] for name, more in (("u/c", ()), ("w/c", ("--no-good-cap",)))
    )
    sizes = [{emotion: len(curve["strength"]) for emotion, curve in made["emotions"].items()} for made in (usual, whole)]
    assert all(size <= 2 for size in sizes[0].values()) and any(size > 2 for size in sizes[1].values())
    assert "left out" in usual["rule"] and "left out" not in whole["rule"]


def test_with_examples_two_weak_strengths_are_tried_first() -> None:
    """What the examples do alone, but for next to nothing, and half of the first step; an even grid without them."""
    settings = CalibrateSettings(points=5)
    assert grid(settings, False) == [0.25, 0.5, 0.75, 1.0]
    assert grid(settings, True) == [FLOOR, 0.125, 0.25, 0.5, 0.75, 1.0] and 0 < FLOOR < 0.01


def test_the_dial_of_other_examples(call: Callable[..., Any], folder: Path) -> None:
    """They stand before every steered prompt while the dial is fitted, and the circuit carries them from then on."""
    (folder / "own.jsonl").write_text(json.dumps({"prompt": "why", "replies": {"anger": "slam the door", "fear": "never home"}}) + "\n")
    asked = ("calibrate", *FAST, "--points", "3", "--refine", "0", "--json", "--circuit")
    bare, other = call(*asked, "c", "--out", "bare/c"), call(*asked, "c", "--out", "shown/c", "--examples", "own.jsonl")
    assert bare[0] == other[0] == 0 and Circuit.load(folder / "bare/c").examples == {}
    assert Circuit.load(folder / "shown/c").examples == {"anger": (Exchange("why", "slam the door"),)}, "of the emotions that it knows"
    kept = [
        {
            json.loads(line)["text"]
            for line in (folder / f"{name}/c.calibration.jsonl").read_text().splitlines()
            if '"anger"' in line and '"text"' in line
        }
        for name in ("bare", "shown")
    ]
    assert kept[0] != kept[1]
    again, none = call(*asked, "shown/c", "--out", "again/c"), call(*asked, "shown/c", "--out", "none/c", "--examples", "none")
    dials = [json.loads(out)["calibration"]["emotions"] for _, out, _ in (bare, other, again, none)]
    assert dials[1] == dials[2] and dials[0] == dials[3]
    alone = call(
        "calibrate", *FAST, "--points", "3", "--refine", "0", "--json", "--circuit", "bare/c", "--out", "both/c", "--examples", "own.jsonl"
    )
    both, first = Circuit.load(folder / "both/c"), Circuit.load(folder / "bare/c")
    assert json.loads(alone[1])["calibration"]["emotions"] == dials[1]
    assert torch.allclose(both.without_examples().strength, first.strength)
    assert both.without_examples().metrics["calibration"] == first.metrics["calibration"], "its dial without them is kept"
    assert call(*asked, "both/c", "--out", "both/c")[0] == 0 and Circuit.load(folder / "both/c").metrics["alone"] == both.metrics["alone"]
    assert call(*asked, "both/c", "--out", "back/c", "--examples", "none")[0] == 0
    assert "alone" not in Circuit.load(folder / "back/c").metrics
    text = ("generate", "the train was late", "-m", "./tiny", "-e", "anger", "--strength", "4", "--max-new-tokens", "6", "--json")
    written = [call(*text, "--circuit", *which)[1] for which in (("shown/c",), ("shown/c", "--no-examples"), ("none/c",))]
    said = [json.loads(line)["text"] for line in written]
    assert said[0] != said[1] == said[2]


BAD = [
    (["calibrate", "--check", "--examples", "none"], 2, "expected no --examples beside it"),
    (["calibrate", "-m", "./tiny", "--circuit", "c", "--examples", "nowhere.jsonl"], 1, "nowhere.jsonl"),
    (["generate", "x", "-e", "anger", "--method", "prompt", "--no-examples"], 2, "--no-examples has no meaning with --method prompt"),
    (["calibrate", "--check", "--instruction", "no ."], 2, "expected no --instruction beside it"),
    (["calibrate", "--check", "--ratio", "1.3", "--sound", "0.6"], 2, "--ratio, --sound would shape a dial, and --check only tries"),
    (["calibrate", "--check", "--most-good"], 2, "--most-good would shape a dial"),
    (["calibrate", "--most-good", "--default-intensity", "60"], 2, "expected --most-good or --default-intensity, found both"),
    (["generate", "x", "-e", "anger", "--intensity", "50", "--strength", "2"], 2, "found both"),
    (["generate", "x", "-e", "anger", "--intensity", "101"], 2, "between -100 and 100, found 101"),
    (["generate", "x", "-e", "anger", "--intensity", "-101"], 2, "between -100 and 100"),
    (["generate", "x", "-e", "anger", "--intensity", "nan"], 2, "expected --intensity to be a finite number"),
    (["generate", "x", "-e", "anger", "--intensity", "50", "--method", "residual"], 2, "--method circuit"),
    (
        ["generate", "x", "-e", "anger", "--intensity", "50", "-m", "./tiny", "--circuit", "c"],
        1,
        "`emosteer calibrate --model ./tiny --circ",
    ),
    (["calibrate", "--check", "-m", "./tiny", "--circuit", "c"], 1, "is not calibrated"),
    (["calibrate", "--check", "-m", "./tiny", "--circuit", "c", "--out", "x.safetensors"], 2, "FILE.json"),
    (["calibrate", "--default-intensity", "120"], 2, "--default-intensity between 0 and 100"),
    (["calibrate", "--top", "0"], 2, "--top"),
    (["calibrate", "--top", "nan"], 2, "--top"),
    (["calibrate", "--ratio", "0.9"], 2, "--ratio must be at least 1"),
    (["calibrate", "--each-ratio", "0.9"], 2, "--each-ratio must be at least 1"),
    (["calibrate", "--skip", "3"], 2, "--skip has a meaning with --check only"),
    (["calibrate", "--check", "--skip", "100000"], 2, "leaves nothing"),
    (["calibrate", "--kinds", "chatt"], 2, "unknown kind 'chatt' (did you mean 'chat'?)"),
    (["calibrate", "--kinds", "request"], 1, "has no prompt of the kinds request; choose others with --kinds"),
    (["calibrate", "--sound", "95"], 2, "--sound must lie between 0 and 1"),
    (["calibrate", "--names", "nan"], 2, "expected --names to be a finite number, found nan"),
    (["calibrate", "--groups", "0"], 2, "--groups"),
    (["calibrate", "--points", "1"], 2, "--points"),
    (["calibrate", "-m", "./tiny", "--scenarios", "nowhere.jsonl"], 1, "does not exist"),
    (["calibrate", "-m", "./tiny"], 1, "there is no circuit"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD, ids=[" ".join(a)[:60] for a, _, _ in BAD])
def test_bad_input_is_one_clear_line(call: Callable[..., Any], arguments: list[str], code: int, message: str) -> None:
    found, out, err = call(*arguments)
    assert (found, out) == (code, "") and err.count("\n") == 1 and err.startswith("emosteer: "), err
    assert message in err
