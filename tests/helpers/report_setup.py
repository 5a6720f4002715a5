"""Small artefacts of the real classes with invented values, and an invented evaluation, for the report's tests."""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import random
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.attribution.scores import Scores
from emosteer.attribution.unit_scores import UnitScores
from emosteer.base.artifacts import Provenance
from emosteer.base.files import sha256_file, write_text
from emosteer.base.jsonl import KeyedLog
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.places import Places
from emosteer.directions.directions import Directions, Evidence, UnitStats
from emosteer.judges.jury import Jury
from emosteer.models.sites import RESID_MID, RESID_POST, Site
from emosteer.report.page import Built, build_report
from emosteer.scenarios.scenarios import EMOTIONS, VALENCES

MODEL, LAYERS, HEADS, D_HEAD, D_MLP, D = "toy/model-1", 4, 3, 2, 10, 6
INSTRUCTION = "Reply to me as a friend would, in at most two sentences."
#: method -> share of good replies, perplexity ratio, naming: what the invented evaluation says.
TRUTH = {
    "none": (0.02, 1.0, 0.001),
    "prompt-system": (0.41, 1.04, 0.11),
    "prompt-tone": (0.55, 1.05, 0.16),
    "prompt-stimulus": (0.38, 1.02, 0.02),
    "residual": (0.81, 1.08, 0.012),
    "learned-residual": (0.79, 1.07, 0.01),
    "circuit": (0.83, 1.06, 0.008),
    "random-heads": (0.31, 1.05, 0.004),
    "random-circuit": (0.03, 1.03, 0.001),
    "random-direction": (0.02, 1.07, 0.002),
}
JUDGED = (*EMOTIONS, "neutral")
JUDGES = ("alpha-judge", "beta-judge", "gamma-judge")
#: Kinds of prompt of the invented contest, and how far each is from a method's share of good replies.
KIND_SHIFTS = {"sev-vivid": 0.06, "sev-plain": 0.02, "question": -0.3, "small-talk": -0.1}
THEMES = ("work", "travel", "housing", "health")
#: Methods without a strength.
UNSTEERED = ("none", "prompt-system", "prompt-tone", "prompt-stimulus")


# ---- artefacts of the stages -----------------------------------------------------------------------------------------


def provenance(method: str, parents: dict[str, str] | None = None, **params: Any) -> Provenance:
    """Of the toy model."""
    return Provenance(MODEL, "a" * 64, "b" * 64, method, params, 0, {"train.jsonl": "c" * 64}, parents or {}, {"emosteer": "0.0"})


def directions(seed: int = 0) -> Directions:
    """Directions with evidence."""
    make = torch.Generator().manual_seed(seed)
    sites = tuple(Site(layer, kind) for layer in range(LAYERS) for kind in (RESID_MID, RESID_POST))
    e, s = len(EMOTIONS), len(sites)
    vectors = torch.randn(e, 1, D, generator=make) + 0.2 * torch.randn(e, s, D, generator=make)

    def stats(width: int) -> UnitStats:
        return UnitStats(torch.randn(e, LAYERS, width, generator=make), torch.ones(e, LAYERS, width), torch.zeros(LAYERS, width))

    def share(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=make)

    return Directions(
        emotions=EMOTIONS,
        sites=sites,
        vectors=vectors / vectors.norm(dim=-1, keepdim=True),
        norms=torch.ones(e, s),
        rms=torch.ones(s),
        base=torch.zeros(s, D),
        variance=torch.ones(e, s, D),
        z=stats(HEADS * D_HEAD),
        mlp=stats(D_MLP),
        evidence=Evidence(share(s, e), 0.3 * share(s, e), share(e, s), 0.1 * share(e, s), share(e, s), share(e, s)),
        elicitation="reply",
        instruction=INSTRUCTION,
        n_groups=480,
        n_heldout=48,
        dropped={},
        provenance=provenance("difference of means"),
    )


def curve_rows() -> list[dict[str, Any]]:
    """Three kinds of points at two shares, the best units and three random sets."""
    rows = []

    def add(kind: str, unit: str, share: float, who: str, score: float) -> None:
        point = {"kind": kind, "unit": unit, "share": share, "who": who, "n": 4}
        rows.extend({**point, "emotion": emotion, "score": score + 0.01 * n} for n, emotion in enumerate(EMOTIONS))

    add("none", "heads", 0.0, "asked", 0.8)
    add("none", "heads", 0.0, "plain", 0.05)
    for kind, unit in (("zero", "heads"), ("enhance", "heads"), ("enhance", "neurons")):
        start, slope = (0.8, -0.3) if kind == "zero" else (0.1, 0.3)
        for i, share in enumerate((0.05, 0.25)):
            add(kind, unit, share, "top", start + slope * (i + 1))
            for k in range(3):
                add(kind, unit, share, f"random:{k}", start + 0.03 * k)
    return rows


def scores(parent: str, seed: int = 1) -> Scores:
    """Scores in two forms, checks and curves."""
    make = torch.Generator().manual_seed(seed)

    def form() -> UnitScores:
        return UnitScores(torch.randn(6, LAYERS, HEADS, generator=make), torch.randn(6, LAYERS, D_MLP, generator=make))

    errors = {"median_relative_error": 1e-6, "max_relative_error": 1e-5, "max_error_to_largest": 1e-6}
    check = {"units": 12, "share_within_1e-4": 1.0, **errors}
    patches = {"emotion": "fear", "units": ["L1H0"], "estimate": [1.0], "truth": [1.0], "correlation": 0.9, "correlation_random": 0.8}
    return Scores(
        emotions=EMOTIONS,
        forms={"contrast": form(), "effect": form()},
        importance=torch.randn(6, LAYERS, 2, generator=make),
        band=(2, 3),
        verification={"prompts": 1, "heads": check, "neurons": check},
        patches={**patches, "groups": 2},
        curves=curve_rows(),
        provenance=provenance("one-pass contributions", {"directions": parent}, curves=None),
    )


def dial_points(strength: list[float], judged: list[float], ratio: list[float]) -> dict[str, Any]:
    """One emotion's points as `calibrate` keeps them."""
    same = {"n": 24, "error": 0.04, "sound": 0.98, "names": 0.01}
    return {"strength": strength, "judged": judged, "ratio": ratio, **{name: [value] * len(strength) for name, value in same.items()}}


def calibration() -> dict[str, Any]:
    """A rising dial, and two strengths that broke the text."""
    curves = {}
    for n, emotion in enumerate(EMOTIONS):
        judged = [0.1, 0.2 + 0.02 * n, 0.45, 0.7, 0.82]
        held = dial_points([0.0, 1.5, 3.0, 4.5, 6.0], judged, [1.0, 1.01, 1.04, 1.1, 1.18])
        curves[emotion] = {**held, "fitted": judged, "broke": dial_points([9.0, 7.5], [0.7, 0.8], [1.9, 1.31])}
        curves[emotion]["broke"]["why"] = [["ratio"], ["sound"]]
    cap = {"ratio": 1.2, "sound": 0.95, "names": 0.05}
    facts = {"judge": "toy judge", "groups": 24, "rule": "an invented rule", "cap": cap, "default_intensity": 75.0}
    return {**facts, "before": dict.fromkeys(EMOTIONS, 3.0), "emotions": curves}


def dial_check() -> dict[str, Any]:
    """calibration-check.json."""
    row = {**dial_points([0, 2, 3, 4, 6], [0.1, 0.3, 0.5, 0.65, 0.8], [1.0, 1.0, 1.03, 1.08, 1.15]), "intensity": [0, 25, 50, 75, 100]}
    made = {"schema": 1, "kind": "calibration-check", "judge": {"name": "toy judge", "key": "d"}, "without_dial": []}
    return {**made, "test": {"n_groups": 24, "file": "test.jsonl", "sha256": "f"}, "emotions": dict.fromkeys(EMOTIONS, row)}


def circuit(parent: str, seed: int = 2, *, neurons: bool = True, calibrated: bool = True) -> Circuit:
    """About half of the heads, two neurons per emotion."""
    make = torch.Generator().manual_seed(seed)
    heads = torch.rand(6, LAYERS, HEADS, generator=make) > 0.5
    heads[:, 0, 0] = True
    index = [[e, layer, 3 + e] for e in range(6) for layer in (1, 3)] if neurons else []
    row = {
        "heads": 9,
        "neurons": 2,
        "faithfulness": 1.02,
        "left": -0.1,
        "random_mean": 0.2,
        "random_max": 0.3,
        "without_weakest": 0.9,
        "whole_effect": 12.0,
    }
    metrics: dict[str, Any] = {"band": [2, 3], "emotions": dict.fromkeys(EMOTIONS, row)}
    return Circuit(
        emotions=EMOTIONS,
        heads=heads,
        z_delta=torch.randn(6, LAYERS, HEADS * D_HEAD, generator=make) * heads.repeat_interleave(D_HEAD, dim=-1),
        neuron_index=torch.tensor(index, dtype=torch.int64).view(-1, 3),
        neuron_delta=torch.randn(len(index), generator=make),
        strength=torch.full((6,), 3.0),
        importance=torch.randn(6, LAYERS, 2, generator=make),
        vectors=torch.randn(6, LAYERS, D, generator=make),
        rms=torch.ones(LAYERS),
        residual_layers=(2, 3),
        residual_strength=1.0,
        d_mlp=D_MLP,
        preset="auto",
        instruction=INSTRUCTION,
        metrics={**metrics, "calibration": calibration()} if calibrated else metrics,
        provenance=provenance("auto circuit by contrast rank", {"directions": parent}, ranking="contrast", preset="auto"),
    )


# ---- the evaluation --------------------------------------------------------------------------------------------------


def around(value: float, width: float = 0.02) -> dict[str, float]:
    """A value with an interval."""
    return {"value": value, "low": max(0.0, value - width), "high": value + width}


def confusion(share: float) -> dict[str, dict[str, float]]:
    """The diagonal gets the share, the rest is shared out; "undecided" is a column of its own."""
    columns = (*JUDGED, "undecided")
    rest = (1 - share) / (len(columns) - 1)
    return {target: {seen: share if seen == target else rest for seen in columns} for target in EMOTIONS}


def contamination(method: str) -> dict[str, Any] | None:
    """What the subject of a method's replies gives away; unsteered replies have no emotion."""
    if method == "none":
        return None
    good = TRUTH[method][0]
    words = {"anger": [("refund", 5.25, 0.3, 0.01), ("manager", 3.5, 0.2, 0.05)], "fear": [("dark", 4.125, 0.25, 0.02)]}
    row = ("word", "z", "share", "elsewhere")
    return {
        "accuracy": 0.2 + 0.5 * good,
        "subject": 0.18 + 0.25 * good,
        "chance": 0.166667,
        "by_emotion": {emotion: 0.2 + 0.01 * i for i, emotion in enumerate(EMOTIONS)},
        "overused": {emotion: [dict(zip(row, word, strict=True)) for word in words.get(emotion, [])] for emotion in EMOTIONS},
        "phrases": {emotion: 0.02 * i for i, emotion in enumerate(EMOTIONS)},
        "n": 960,
    }


def agreement() -> dict[str, Any]:
    """How far the invented judges agree."""
    pairs = {f"{a} - {b}": 0.8 - 0.05 * i for i, (a, b) in enumerate(itertools.combinations(JUDGES, 2))}
    return {"judges": list(JUDGES), "alpha": 0.7123, "pairs": pairs, "undecided": 0.0456, "n": 5123}


def result(method: str, n: int = 960) -> dict[str, Any]:
    """One line of the evaluation's results."""
    good, ratio, names = TRUTH[method]
    shares = {"emotion": good + 0.05, "answers": 0.92, "accuracy": good + 0.09, "probability": 0.85 * good, "sound": 0.975}
    shares |= {"synonyms": 2 * names, "repetition": 0.03, "unfinished": 0.1, "kept": 0.6}

    def part(shift: float) -> dict[str, Any]:
        shifted = min(1.0, max(0.0, good + shift))
        near = {"good": shifted, "emotion": min(1.0, shifted + 0.04), "answers": 0.92 + shift / 10, "accuracy": min(1.0, shifted + 0.08)}
        row = {name: around(value, 0.05) for name, value in near.items()}
        return {**row, "sound": around(0.97), "ratio": around(ratio), "names": around(names, 0.005), "n": n // 6}

    by_kind = {kind: part(shift) for kind, shift in KIND_SHIFTS.items()}

    return {
        "method": method,
        "n": n,
        "missing": 3 if method == "residual" else 0,
        "good": around(good),
        "ratio": around(ratio, 0.015),
        "median_ratio": around(ratio, 0.015),
        "names": around(names, 0.004),
        **{name: around(value) for name, value in shares.items()},
        "n_tokens": 31.4,
        "confusion": confusion(good + 0.05),
        "judges": {judge: max(0.0, good + 0.05 + 0.03 * (1 - i)) for i, judge in enumerate(JUDGES)},
        "contamination": contamination(method),
        "worst_kind": min(by_kind, key=lambda kind: by_kind[kind]["good"]["value"]),
        "by_kind": by_kind,
        "by_emotion": {emotion: part(0.02 * (3 - i)) for i, emotion in enumerate(EMOTIONS)},
        "by_valence": {valence: part(0.03 * (1 - i)) for i, valence in enumerate(VALENCES)},
    }


def frontier(method: str) -> list[dict[str, Any]]:
    """Rising with the dose; a prompt has one point; the strongest random direction breaks the text."""
    good, ratio, names = TRUTH[method]
    rows = []
    for dose in (None,) if method in UNSTEERED else (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        reached = good * min(1.0, dose or 1.0) ** 0.8
        cost = 4.0 if dose == 1.75 and method == "random-direction" else ratio ** ((dose or 1.0) ** 2)
        point = {"method": method, "setting": dose, "good": reached, "emotion": reached + 0.03, "accuracy": reached + 0.06, "ratio": cost}
        point |= {"probability": 0.9 * reached, "answers": 0.93}
        rows += [{**point, "target": target, "names": names, "sound": 0.98, "n": 96} for target in ("all", EMOTIONS[0])]
    return rows


def compared(a: str, b: str, metric: str = "good", by: float | None = None, width: float = 0.025) -> dict[str, Any]:
    """One paired difference."""
    value = TRUTH[a][0] - TRUTH[b][0] if by is None else by
    return {
        "a": a,
        "b": b,
        "metric": metric,
        "difference": {"value": value, "low": value - width, "high": value + width},
        "p": 2e-4,
        "n": 960,
    }


def evaluation(circuit_sha256: str = "", methods: Sequence[str] = tuple(TRUTH), **changes: Any) -> dict[str, Any]:
    """A whole evaluation.json. changes: parts that are otherwise."""
    others = [m for m in ("residual", "learned-residual", "prompt-tone", "none", "random-heads", "random-circuit") if m in methods]
    equal = {"setting": 0.75, "ratio_a": 1.05, "ratio_b": 1.05, "good_a": around(0.79), "good_b": around(0.55)}
    body = {
        "schema": 2,
        "kind": "evaluation",
        "model": MODEL,
        "model_sha256": "a" * 64,
        "circuit_sha256": circuit_sha256,
        "command": f"emosteer evaluate --model {MODEL}",
        "emosteer": "0.0",
        "judge": {"name": ", ".join(JUDGES), "key": "d" * 64, "soundness": "s" * 64, "answers": "w" * 64},
        "decoding": {"max_new_tokens": 64, "temperature": 0.0},
        "instruction": INSTRUCTION,
        "dtype": "float32",
        "emotions": list(EMOTIONS),
        "seed": 0,
        "budget": {"ratio": 1.1, "names": 0.02, "sound": 0.95},
        "dev": {"n_groups": 16, "kinds": dict.fromkeys(KIND_SHIFTS, 4), "files": {"sev/train.jsonl": "e" * 64}},
        "test": {
            "n_groups": 160,
            "kinds": dict.fromkeys(KIND_SHIFTS, 40),
            "files": {"sev/test.jsonl": "f" * 64, "prompts/test.jsonl": "9" * 64},
        },
        "chosen": {m: dict.fromkeys(EMOTIONS, None if m in UNSTEERED else 3.0) for m in methods},
        "best_prompt": "prompt-tone",
        "frontier": [row for m in methods for row in frontier(m)],
        "equal_ratio": [{**compared("circuit", "prompt-tone", by=0.24), **equal}],
        "agreement": agreement(),
        "results": [result(m) for m in methods],
        "comparisons": [compared("circuit", other, metric) for other in others for metric in ("good", "accuracy")],
    }
    return {**body, **changes}


def reply_rows(groups: int = 6, methods: Sequence[str] = tuple(TRUTH), seed: int = 0) -> list[dict[str, Any]]:
    """Test replies: every method to every prompt and emotion, the unsteered ones once per prompt. One has no opinion; in some of them the
    last judge disagrees, in some all three do, and some do not answer."""
    draw, rows = random.Random(seed), []
    for g in range(groups):
        valence, theme = VALENCES[g % 3], THEMES[g % len(THEMES)]
        kind = "sev-vivid" if g % 4 else "sev-plain"
        for method in methods:
            for emotion in ("none",) if method == "none" else EMOTIONS:
                seen = emotion if emotion in EMOTIONS and draw.random() < TRUTH[method][0] else draw.choice(JUDGED)
                heard = [seen, *((seen, seen) if (g + len(rows)) % 5 else draw.sample(JUDGED, 2))]
                voices = [{label: 0.88 - 0.02 * i if label == heard[i] else 0.02 + 0.02 * i / 6 for label in JUDGED} for i in range(3)]
                shares = {label: sum(voice[label] for voice in voices) / 3 for label in JUDGED}
                panel = max(shares, key=lambda label: shares[label])
                missing, sound = (method, g, emotion) == ("residual", 0, "fear"), draw.random() < 0.95
                wish = EMOTIONS.index(emotion) if emotion in EMOTIONS else len(EMOTIONS)
                named = f" {emotion.capitalize()}!" if len(rows) % 13 == 0 else ""
                row = {
                    "id": f"{theme}-{g:03d}/{valence}/{emotion}",
                    "skeleton_id": f"{theme}-{g:03d}",
                    "valence": valence,
                    "theme": theme,
                    "kind": kind,
                    "emotion": emotion,
                    "method": method,
                    "strength": None if method in UNSTEERED else 3.0,
                    "prompt": f"I waited nine weeks for the permit of number {g}. The office called and said no.",
                    "text": f"Reply {g} by {method} to wish {wish}: I can hardly believe that this is what it came to.{named}",
                    "finish_reason": "stop",
                    "n_tokens": 17,
                    "nll": 2.5,
                    "probabilities": None if missing else shares,
                    "opinions": {judge: None if missing else voice for judge, voice in zip(JUDGES, voices, strict=True)},
                    "judged": None if missing else panel,
                    "answers": 0.31 if (g + len(rows)) % 11 == 0 else 0.93,
                    "sound": sound,
                    "reasons": [] if sound else ["repetition"],
                }
                rows.append(row)
    return rows


@dataclass
class Talk:
    """Takes what repeats its prompt's first word, or is long, for an answer. key: as a judge's."""

    key: str = "talk-1"

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Per (prompt, reply)."""
        return [0.9 if len(reply.split()) > 2 else 0.2 for _, reply in pairs]


def panel_of_words(folder: Path) -> Jury:
    """Three judges who know the planted words, the last one less than the others, with what they say in a folder."""
    from tests.helpers.contest_setup import BagEncoder, WordCheck, WordJudge

    judges = tuple(WordJudge(name=f"words-{i}", key=f"words-{i}", fails=lambda text, i=i: i == 2 and "the" in text) for i in range(3))
    return Jury(judges, WordCheck(), Talk(), BagEncoder(), KeyedLog(folder / "opinions.jsonl"))


# ---- on disk ---------------------------------------------------------------------------------------------------------

PARTS = ("directions", "scores", "circuit", "check", "evaluation", "replies")


def write_all(
    root: Path,
    parts: Sequence[str] = PARTS,
    *,
    replies: Sequence[dict[str, Any]] | None = None,
    made: Circuit | None = None,
    **changes: Any,
) -> Places:
    """Writes some of the artefacts, as the stages would. made: another circuit; changes: to the evaluation."""
    places = Places.of(MODEL, root)
    directions().save(places.directions)
    parent = sha256_file(places.directions)
    if "scores" in parts:
        scores(parent).save(places.scores)
    (made or circuit(parent)).save(places.circuit)
    sha256 = sha256_file(places.circuit)
    if "check" in parts:
        write_text(places.folder / "calibration-check.json", json.dumps({**dial_check(), "circuit_sha256": sha256}))
    if "evaluation" in parts:
        write_text(places.folder / "evaluation" / "evaluation.json", json.dumps({**evaluation(sha256), **changes}))
    if "replies" in parts:
        rows = reply_rows() if replies is None else replies
        write_text(places.folder / "evaluation" / "test-replies.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for name, path in (("circuit", places.circuit), ("directions", places.directions)):
        if name not in parts:
            path.unlink()
    return places


#: Text that would run if a page took it for markup, and characters that JSON or HTML stumble over.
HOSTILE = (
    '</script><script>window.hacked = 1</script><!-- <img src="https://example.invalid/x.png" onerror="window.hacked = 2">'
    " {{ 7 * 7 }} & ' \" \u2028 \u202e \ud800 end"
)
HOSTILE_THEME = 'work"><script>window.hacked = 3</script>'


def undefined_colours(page: str) -> set[str]:
    """CSS variables that a page uses and that its style defines not in both themes, and nowhere else either."""
    style = page.partition("<style>")[2].partition("</style>")[0]
    themes = [set(re.findall(r"--([\w-]+):", theme)) for theme in re.findall(r":root \{(.*?)\}", style, re.DOTALL)]
    assert len(themes) == 2
    elsewhere = set(re.findall(r"--([\w-]+):", re.sub(r":root \{.*?\}", "", page, flags=re.DOTALL)))
    by_script = set(re.findall(r'setProperty\("--([\w-]+)"', page))
    return set(re.findall(r"var\(--([\w-]+)\)", page)) - (themes[0] & themes[1]) - elsewhere - by_script


@functools.cache
def whole_page() -> tuple[Places, Built]:
    """A page of everything, with hostile replies among the others; built once for all tests."""
    folder = Path(tempfile.mkdtemp(prefix="emosteer-report-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rows = reply_rows()
    for row in rows:
        if row["skeleton_id"] == "work-000":
            row["theme"] = HOSTILE_THEME
            if (row["method"], row["emotion"]) == ("circuit", "anger"):
                row["text"] = HOSTILE
    places = write_all(folder, replies=rows)
    return places, build_report(places, folder / "report.html", MODEL)
