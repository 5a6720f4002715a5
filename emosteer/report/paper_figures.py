"""The paper's tables and figures, one by one: what it reports, what was measured here, and the control that it lacks. No torch of its own.

Only figures of arXiv 2510.11328 that docs/METHOD.md (section 8) gives are quoted; where it shows a plot without a figure of that kind, the
cell says so and names the plot on this page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from emosteer.attribution.scores import Scores
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import CIRCUIT
from emosteer.directions.directions import Directions, stable_band
from emosteer.models.sites import RESID_POST
from emosteer.report.figures import CellValue, FigureTable, Section
from emosteer.report.inputs import Inputs
from emosteer.report.measured import Measured
from emosteer.report.score_figures import form_of
from emosteer.report.wording import DASH, in_sentence, number, percent, plural, share_range, words

#: The model of the paper, whose figures alone stand beside ours like to like.
MODEL = "llama-3.2-3b-instruct"
PLOT, NOTHING = "a plot", DASH
#: Method here -> share of 2,880 replies that the paper's judge, told the emotion, calls a match; and share that names it.
MATCHES = {"prompt": "98.96 %", "residual": "91.22 %", CIRCUIT: "99.65 %"}
NAMED = {"prompt": "4.3 %", CIRCUIT: "29.8 % (steered)"}
HEAD = ("In the paper", "Its figure", "Here", "Control that it lacks", "On this page")


def section(inputs: Inputs) -> Section:
    """One table; what its missing rows need is named."""
    same = MODEL in inputs.model.lower().replace("_", "-")
    rows = [*_directions(inputs.directions), *_units(inputs.scores, inputs.circuit), *_curves(inputs.scores), *_circuit(inputs.circuit)]
    rows += _methods(inputs.contest)
    who = "its own model" if same else f"another model, {inputs.model}"
    intro = (
        f"What the paper (arXiv 2510.11328) reports of Llama-3.2-3B-Instruct, and the same of {who}. Its judge was told the emotion and "
        "asked whether a reply expresses it; the panel here is told nothing and may say neutral. So the shares of replies do not compare "
        "even where the model is the same; what is on each side of a row is the same experiment."
    )
    lacking = [item.what for name in ("directions", "scores", "curves", "circuit", "evaluation") for item in inputs.lacks(name)]
    notes = [f"Its rows need what is not on this page: {words(lacking)}."] if lacking else []
    return Section("paper", "The paper's figures", intro, tables=[FigureTable("One by one", HEAD, rows)] if rows else [], notes=notes)


def _directions(directions: Directions | None) -> list[list[CellValue]]:
    if directions is None:
        return []
    band, vectors = stable_band(directions), directions.at(RESID_POST)
    cosines = [
        float((vectors[a, list(band)] * vectors[b, list(band)]).sum(-1).mean()) for a, b in combinations(range(len(directions.emotions)), 2)
    ]
    beside = float((vectors[:, 1:] * vectors[:, :-1]).sum(-1).mean())
    here = (
        f"emotions {number(min(cosines))} to {number(max(cosines))} in layers {band[0]} to {band[-1]}; neighbouring layers {number(beside)}"
    )
    control = NOTHING
    if (e := directions.evidence) is not None:
        control = f"halves of the data {number(e.halves.mean().item())}, labels shuffled {number(e.halves_shuffled.mean().item())}"
    return [["Direction similarity (cosine)", PLOT, here, control, "The directions"]]


def _units(scores: Scores | None, circuit: Circuit | None) -> list[list[CellValue]]:
    if scores is None:
        return []
    found = scores.forms[form_of(scores, circuit)]
    rows: list[list[CellValue]] = []
    patched = scores.patches.get("correlation_random")
    control = f"true patches of random units, correlation {number(patched)}" if isinstance(patched, float) else NOTHING
    for name, table in (("Head", found.heads), ("Neuron", found.neurons)):
        if not table.numel():
            continue
        flat = table.float().flatten(1).clamp_min(0)
        top = max(1, flat.shape[1] // 100)
        share = (flat.topk(top).values.sum(-1) / flat.sum(-1).clamp_min(1e-30)).mean().item()
        here = f"the best 1 % ({plural(top, name.lower())}) write {percent(share, 0)} of what all write towards an emotion"
        rows.append([f"{name} importance", PLOT, here, control, "Heads, neurons and sublayers"])
    peaks = scores.importance.float().mean(0).argmax(0).tolist()
    here = f"highest at layer {peaks[0]} (attention) and {peaks[1]} (MLP), mean over emotions"
    return [
        *rows,
        ["Sublayer importance", PLOT, here, "gradients, held against true injections by the tests", "Heads, neurons and sublayers"],
    ]


def _curves(scores: Scores | None) -> list[list[CellValue]]:
    if scores is None or not scores.curves:
        return []
    rows: list[list[CellValue]] = []
    for kind, name in (("zero", "Ablation curves"), ("enhance", "Enhancement curves")):
        points = [row for row in scores.curves if row["kind"] == kind and row["unit"] == "heads"]
        if not points:
            continue
        share = max(row["share"] for row in points)
        told = [_mean(points, share, test) for test in (lambda who: who == "top", lambda who: who.startswith("random"))]
        start = _mean(scores.curves, 0.0, lambda who, kind=kind: who == ("asked" if kind == "zero" else "plain"))  # type: ignore[misc]
        here = f"score {number(start)} to {number(told[0])} with the best {percent(share, 0)} of the heads"
        rows.append([name, PLOT, here, f"random heads: {number(told[1])}", "Ablation and enhancement"])
    return rows


def _mean(points: Sequence[Mapping[str, Any]], share: float, wanted: Callable[[str], bool]) -> float | None:
    found = [float(row["score"]) for row in points if row["share"] == share and wanted(str(row["who"]))]
    return sum(found) / len(found) if found else None


def _circuit(circuit: Circuit | None) -> list[list[CellValue]]:
    if circuit is None:
        return []
    n, heads = len(circuit.emotions), circuit.heads.float().sum((1, 2))
    neurons = len(circuit.neuron_index) / n
    all_neurons = circuit.d_mlp * circuit.heads.shape[1]
    here = f"{number(heads.mean().item(), 0)} heads ({percent(heads.mean().item() / circuit.heads[0].numel(), 0)})"
    here += f" and {number(neurons, 0)} neurons ({percent(neurons / max(1, all_neurons), 2)}) for each emotion"
    measured = circuit.metrics.get("emotions") or {}
    shares = {name: [row[name] for row in measured.values() if isinstance(row, dict) and name in row] for name in ("faithfulness", "random_mean")}  # fmt: skip # noqa: E501
    told = {name: percent(sum(values) / len(values), 0) for name, values in shares.items() if values}
    control = f"effect kept {told['faithfulness']}, random circuits {told['random_mean']}" if len(told) == 2 else NOTHING
    layers = circuit.residual_layers
    where = f"layers {layers[0]} to {layers[-1]}, {number(circuit.residual_strength, 2)} x rms" if layers else NOTHING
    return [
        ["Circuit composition", "392 neurons (0.17 %) and 168 heads (25 %)", here, control, "The circuit"],
        ["Residual steering", "layers 11 to 20, 8 x rms", where, "the same vectors learned; random directions", "The contest"],
    ]


def _methods(contest: Measured | None) -> list[list[CellValue]]:
    if contest is None:
        return []
    rows: list[list[CellValue]] = []
    methods = {"prompt": contest.best_prompt or "prompt-tone", "residual": "residual", CIRCUIT: CIRCUIT}
    control = {"prompt": "none", "residual": "random-direction", CIRCUIT: "random-circuit"}
    for name, method in methods.items():
        if method not in contest.results:
            continue
        of = f"{in_sentence(method)}: six-way {_of(contest, method, 'accuracy')}, emotion {_of(contest, method, 'emotion')}"
        of += f", good {_of(contest, method, 'good')}"
        beside = control[name]
        against = f"{in_sentence(beside)}: emotion {_of(contest, beside, 'emotion')}, good {_of(contest, beside, 'good')}"
        title = {"prompt": "Prompting", "residual": "Residual steering", CIRCUIT: "Circuit"}[name]
        rows.append(
            [f"{title}: replies that express it", MATCHES[name], of, against if beside in contest.results else NOTHING, "The contest"]
        )
    for name, figure in NAMED.items():
        if methods[name] in contest.results:
            here = f"{in_sentence(methods[name])}: {_of(contest, methods[name], 'names')}"
            rows.append(["Replies that name the emotion", figure, here, "a reply that names it is not good", "The contest"])
    return rows


def _of(contest: Measured, method: str, metric: str) -> str:
    """`41.0 [38.2, 44.1] %`."""
    return f"{share_range(contest.metric(method, metric))} %"
