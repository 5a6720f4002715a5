"""One small artefact of every kind that holds everything a real one does, for tests of what is taken and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from emosteer.attribution.scores import Scores
from emosteer.attribution.unit_scores import UnitScores
from emosteer.base.artifacts import Provenance
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.heads.heads import HeadStudy
from emosteer.directions.directions import Directions, Evidence, UnitStats
from emosteer.judges.adapters import Adapter
from emosteer.judges.embedded import LinearHead
from emosteer.judges.storage import save_judges
from emosteer.models.sites import residual_sites
from tests.helpers.heads_setup import head_study

EMOTIONS = ("anger", "sadness", "fear")
LAYERS, HEADS, D_HEAD, D, D_MLP = 3, 4, 8, 32, 48
SOURCE = Provenance(
    "tiny", "a" * 64, "b" * 64, "test", params={"holdout": 0.1}, data={"train.jsonl": "c" * 64}, command="emosteer extract --model tiny"
)


def dial(emotions: Sequence[str], strength: Sequence[float] = (0.0, 1.0, 2.0), fitted: Sequence[float] = (0.0, 0.5, 1.0)) -> dict[str, Any]:
    """A calibration as `calibrate` stores it: every emotion the same rising curve, and one strength that broke the text."""

    def points(at: Sequence[float], judged: Sequence[float]) -> dict[str, Any]:
        same = {"n": 8, "error": 0.05, "ratio": 1.1, "ratio_error": 0.1, "sound": 1.0, "names": 0.0, "answers": 0.5, "good": 0.5}
        return {"strength": list(at), "judged": list(judged), **{name: [value] * len(at) for name, value in same.items()}}

    curve = {**points(strength, fitted), "fitted": list(fitted), "broke": {**points([3.0], [0.9]), "why": [["ratio"]]}}
    facts = {"judge": "planted", "groups": 8, "rule": "a rule", "default_intensity": 75.0, "before": dict.fromkeys(emotions, 1.0)}
    return {**facts, "cap": {"ratio": 3.0}, "joint_ratio": 1.2, "emotions": dict.fromkeys(emotions, curve)}


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def circuit() -> Circuit:
    """Half of the heads, two neurons, learned residual vectors and a dial."""
    heads = torch.zeros(len(EMOTIONS), LAYERS, HEADS, dtype=torch.bool)
    heads[:, :, ::2] = True
    names = ("heads", "neurons", "faithfulness", "left", "without_weakest", "random_mean", "random_max")
    learned = {"margin": [0.1, 0.5], "curve": [3.0, 2.0]}
    return Circuit(
        emotions=EMOTIONS,
        heads=heads,
        z_delta=_draw(len(EMOTIONS), LAYERS, HEADS * D_HEAD) * heads.repeat_interleave(D_HEAD, -1),
        neuron_index=torch.tensor([[0, 1, 7], [2, 2, 40]]),
        neuron_delta=_draw(2),
        strength=torch.ones(len(EMOTIONS)),
        importance=_draw(len(EMOTIONS), LAYERS, 2),
        vectors=normalize(_draw(len(EMOTIONS), LAYERS, D), dim=-1),
        rms=torch.ones(LAYERS),
        residual_layers=(1, 2),
        residual_strength=0.5,
        d_mlp=D_MLP,
        preset="auto",
        instruction="Keep it short.",
        metrics={
            "band": [1, 2],
            "emotions": {e: dict.fromkeys(names, 1) for e in EMOTIONS},
            "overlap": {a: {b: float(a == b) for b in EMOTIONS} for a in EMOTIONS},
            "tuning": {"rule": "a rule", "residual": {"0.0": 2.5}},
            "gains": {"learn": "outputs", "keep": 0.5, **learned},
            "learned_residual": learned,
            "calibration": dial(EMOTIONS),
        },
        provenance=SOURCE,
        learned_residual=_draw(len(EMOTIONS), 2, D),
    )


def directions() -> Directions:
    """Directions with evidence."""
    e, sites = len(EMOTIONS), residual_sites(LAYERS)
    n = len(sites)
    evidence = Evidence(torch.ones(n, e), torch.ones(n, e) / e, *(torch.ones(e, n) for _ in range(4)))
    stats = [UnitStats(_draw(e, LAYERS, width), torch.ones(e, LAYERS, width), _draw(LAYERS, width)) for width in (HEADS * D_HEAD, D_MLP)]
    vectors, base, variance = normalize(_draw(e, n, D), dim=-1), _draw(n, D), torch.ones(e, n, D)
    told = {"elicitation": "reply", "instruction": "", "n_groups": 12, "n_heldout": 2, "dropped": {"too long": 1}, "provenance": SOURCE}
    return Directions(EMOTIONS, sites, vectors, torch.ones(e, n), torch.ones(n), base, variance, *stats, evidence, **told)  # type: ignore[arg-type]


def scores() -> Scores:
    """Scores in two forms, with checks and a curve."""
    e = len(EMOTIONS)
    forms = {name: UnitScores(_draw(e, LAYERS, HEADS), _draw(e, LAYERS, D_MLP)) for name in ("contrast", "effect")}
    errors = dict.fromkeys(("median_relative_error", "max_relative_error", "max_error_to_largest"), 1e-6)
    checked = {"units": 12, "share_within_1e-4": 1.0, **errors}
    patched = {"emotion": "fear", "units": ["L1H0"], "estimate": [1.0], "truth": [1.0], "correlation": 0.9, "correlation_random": 0.8}
    rows = [
        {"kind": "zero", "unit": "heads", "share": 0.1, "who": who, "emotion": emotion, "score": 0.5, "n": 2}
        for who in ("top", "random:0")
        for emotion in EMOTIONS
    ]
    verified = {"prompts": 1, "heads": checked, "neurons": checked}
    return Scores(EMOTIONS, forms, _draw(e, LAYERS, 2), (1, 2), verified, patched, rows, SOURCE)


def heads() -> HeadStudy:
    """Two heads of each emotion, with edges and texts."""
    return head_study(SOURCE, EMOTIONS, LAYERS, HEADS)


def write_judges(path: Path) -> None:
    """A judges' file with two heads and an adapter."""
    labels = ("anger", "fear", "neutral")
    heads = {name: LinearHead(labels, _draw(6), torch.ones(6), _draw(3, 6), _draw(3)) for name in ("emotion", "soundness")}
    place = "encoder.layer.5.output.dense"
    save_judges(path, heads, {"embedded": Adapter(labels, {place: _draw(2, 5)}, {place: _draw(4, 2)}, _draw(3, 8), _draw(3))}, {}, SOURCE)
