"""Figures of the scores: the head map, the neuron map and sublayer importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from emosteer.attribution.scores import Scores
from emosteer.circuits.circuit import Circuit
from emosteer.report import plots
from emosteer.report.figures import CellValue, Figure, FigureTable, Key, Panel
from emosteer.report.panels import keys
from emosteer.report.plots import Steps, Style
from emosteer.report.wording import finite, number, percent, plural, words

SOURCES = ("scores",)
#: Cells of all head maps together; beyond that one map shows the largest score of any emotion, so that the page stays light.
MAX_CELLS = 9000
#: Neurons drawn per emotion, best first.
DRAWN_NEURONS = 150
FORM_NAMES = {
    "contrast": "mean contrastive contribution to the emotion's direction at the unit's own layer",
    "raw": "raw contribution to the emotion's direction at the unit's own layer",
    "effect": "first-order effect of injecting the unit's contrast on the final score",
    "patch": "attribution patching: fall of the final score when the unit is patched from other emotions",
}


def form_of(scores: Scores, circuit: Circuit | None) -> str:
    """The form of scores that the circuit was ranked by, else the first there is."""
    ranked = circuit.provenance.params.get("ranking") if circuit is not None else None
    return next(str(form) for form in (ranked, "contrast", *scores.forms) if form in scores.forms)


def _matching(scores: Scores, circuit: Circuit | None) -> Circuit | None:
    """The circuit, if it is of the same shape as the scores."""
    heads = next(iter(scores.forms.values())).heads
    return circuit if circuit is not None and circuit.heads.shape == heads.shape and circuit.emotions == scores.emotions else None


def _sources(circuit: Circuit | None) -> tuple[str, ...]:
    return SOURCES if circuit is None else (*SOURCES, "circuit")


# ---- heads -------------------------------------------------------------------------------------------------------------


def head_map(scores: Scores, circuit: Circuit | None) -> Figure:
    """Layer by head, one panel per emotion, the circuit's heads outlined."""
    form, circuit = form_of(scores, circuit), _matching(scores, circuit)
    table = scores.forms[form].heads.float()
    steps = Steps.diverging(_top(table))
    if table.numel() <= MAX_CELLS:
        inside = circuit.heads if circuit is not None else torch.zeros_like(table, dtype=torch.bool)
        panels = [_head_panel(table[e], inside[e], emotion, steps) for e, emotion in enumerate(scores.emotions)]
    else:
        anywhere = circuit.heads.any(0) if circuit is not None else torch.zeros_like(table[0], dtype=torch.bool)
        panels = [_head_panel(table.amax(0), anywhere, "largest score of any emotion", steps)]
    caption = f"Score: {FORM_NAMES.get(form, form)}.{' Outlined heads are in the circuit.' if circuit is not None else ''}"
    tables = _head_tables(table, scores.emotions)
    return Figure("heads", "Which heads write the emotion", caption, panels, tables, _sources(circuit), steps.key(), "Score")


def _top(table: Tensor) -> float:
    """A colour scale's end that single outliers do not stretch."""
    flat = table.abs().flatten().sort().values
    return max(flat[min(len(flat) - 1, int(0.998 * len(flat)))].item(), 1e-9)


def _head_panel(table: Tensor, inside: Tensor, title: str, steps: Steps) -> Panel:
    n_layers, n_heads = table.shape
    values, marked = table.tolist(), inside.tolist()
    rows = []
    for head in reversed(range(n_heads)):
        for layer in range(n_layers):
            value = values[layer][head]
            tip = plots.tip(f"L{layer}H{head}: {number(value)}")
            rows.append({"x": layer, "y": head, "value": value, "marked": marked[layer][head], "tip": tip})
    best = table.flatten().topk(min(3, table.numel())).indices.tolist()
    named = words([f"L{i // n_heads}H{i % n_heads} {number(values[i // n_heads][i % n_heads])}" for i in best])
    late = table[n_layers // 2 :].clamp_min(0).sum() / table.clamp_min(0).sum().clamp_min(1e-9)
    alt_text = (
        f"Head map, {title}: highest scores {named}; {percent(late.item(), 0)} of all positive score lies in the later half of the layers."
    )
    cell = min(18.0, max(5.0, 260 / n_heads))
    x = plots.category("x", "Layer", values=plots.every(range(n_layers), 7))
    y = plots.category("y", "Head", values=plots.every(range(n_heads), 9))
    chart = plots.heat(rows, steps, x, y, height=round(cell * n_heads) + 40)
    return Panel(title.capitalize(), plots.svg(chart, alt_text), alt_text)


def _head_tables(table: Tensor, emotions: Sequence[str]) -> list[FigureTable]:
    """Every score, or the best hundred of each emotion where that would be too much for a page."""
    n_heads = table.shape[2]
    if table.numel() > MAX_CELLS:
        best = [(e, i) for e in range(len(emotions)) for i in table[e].flatten().topk(100).indices.tolist()]
        rows: list[list[CellValue]] = [
            [f"L{i // n_heads}H{i % n_heads}", emotions[e], number(table[e].flatten()[i].item(), 3)] for e, i in best
        ]
        return [FigureTable("The hundred best heads of each emotion", ("Head", "Emotion", "Score"), rows)]
    head = ("Layer", *(f"H{h}" for h in range(n_heads)))
    return [
        FigureTable(f"Head scores, {emotion}", head, [[f"L{layer}", *map(number, row)] for layer, row in enumerate(table[e].tolist())])
        for e, emotion in enumerate(emotions)
    ]


# ---- neurons -------------------------------------------------------------------------------------------------------------

NEURONS = {"other": Style("series-2"), "circuit": Style("series-1")}


def neuron_map(scores: Scores, circuit: Circuit | None) -> Figure:
    """Where the best neurons lie, by layer."""
    form, circuit = form_of(scores, circuit), _matching(scores, circuit)
    table = scores.forms[form].neurons.float()
    chosen: list[set[tuple[int, int]]] = [set() for _ in scores.emotions]
    for e, layer, index in circuit.neuron_index.tolist() if circuit is not None else ():
        chosen[e].add((layer, index))
    panels = [_neuron_panel(table[e], emotion, chosen[e]) for e, emotion in enumerate(scores.emotions)]
    colours = [Key("series-2", "neuron", "dot"), Key("series-1", "neuron of the circuit", "dot")] if any(chosen) else []
    shown = min(DRAWN_NEURONS, table[0].numel())
    caption = f"The {shown} neurons with the highest scores of each emotion. Score: {FORM_NAMES.get(form, form)}."
    tables = [_neuron_table(table, scores.emotions)]
    return Figure("neurons", "Which neurons write the emotion", caption, panels, tables, _sources(circuit), colours)


def _neuron_table(table: Tensor, emotions: Sequence[str]) -> FigureTable:
    share = max(1, round(0.01 * table[0].numel()))
    n_layers, width = table.shape[1:]
    rows: list[list[CellValue]] = []
    for e, emotion in enumerate(emotions):
        best = torch.bincount(table[e].flatten().topk(share).indices // width, minlength=n_layers).tolist()
        strongest = table[e].max(1)
        for layer, (index, score) in enumerate(zip(strongest.indices.tolist(), strongest.values.tolist(), strict=True)):
            rows.append([f"L{layer}", emotion, best[layer], f"N{index}", number(score, 3)])
    return FigureTable("Neurons by layer", ("Layer", "Emotion", f"Of the best {share:,} (1 %)", "Strongest neuron", "Its score"), rows)


def _neuron_panel(table: Tensor, emotion: str, chosen: set[tuple[int, int]]) -> Panel:
    n_layers, width = table.shape
    best = table.flatten().topk(min(DRAWN_NEURONS, table.numel()))
    rows = []
    for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        layer, index = divmod(i, width)
        kind = "circuit" if (layer, index) in chosen else "other"
        rows.append(
            {
                "layer": layer,
                "score": score,
                "kind": kind,
                "name": f"L{layer}N{index}",
                "tip": plots.tip(f"L{layer}N{index}: {number(score, 3)}"),
            }
        )
    layers = [row["layer"] for row in rows]
    common = max(set(layers), key=lambda layer: (layers.count(layer), layer))
    alt_text = (
        f"Best neurons of {emotion} by layer: {layers.count(common)} of {len(rows)} lie in layer {common}; the highest score is "
        f"{number(rows[0]['score'], 3)} at {rows[0]['name']}."
    )
    x = plots.quantity("layer", "Layer", domain=(-0.7, n_layers - 0.3), values=plots.every(range(n_layers), 7), format="d", grid=False)
    encoding = {"x": x, "y": plots.quantity("score", "Score"), "color": plots.named("kind", NEURONS), "description": plots.told()}
    chart = plots.chart(rows, [plots.mark("circle", encoding, size=30, opacity=0.7)], 190)
    return Panel(emotion.capitalize(), plots.svg(chart, alt_text), alt_text)


# ---- sublayer importance -------------------------------------------------------------------------------------------------

SUBLAYERS = {"attention": Style("series-1"), "MLP": Style("series-2", "square", (6, 3))}


def importance(values: Tensor, emotions: Sequence[str], source: str) -> Figure:
    """What a push along the direction at a sublayer's output does to the final score. values: [emotion, layer, 2]."""
    values = values.float()
    n_layers = values.shape[1]
    panels: list[Panel] = []
    rows: list[list[CellValue]] = []
    x = plots.quantity("x", "Layer", domain=(0, max(1, n_layers - 1)), format="d", grid=False)
    for e, emotion in enumerate(emotions):
        series = {name: values[e, :, i].tolist() for i, name in enumerate(SUBLAYERS)}
        points = [{"x": layer, "y": value, "series": name} for name, of in series.items() for layer, value in enumerate(of)]
        peaks = [f"{name} at layer {max(range(n_layers), key=of.__getitem__)} ({number(max(of))})" for name, of in series.items()]
        alt_text = f"Importance over layers, {emotion}: highest for {words(peaks)}."
        chart = plots.lines(points, SUBLAYERS, x, plots.quantity("y", "Effect per dose"), rules=[0.0], height=190)
        panels.append(Panel(emotion.capitalize(), plots.svg(chart, alt_text), alt_text))
        rows += [[f"L{layer}", emotion, *(number(of[layer], 3) for of in series.values())] for layer in range(n_layers)]
    caption = (
        "Change of the final score per unit of dose along the emotion's direction at the output of the attention or the MLP of a layer."
    )
    table = FigureTable("Sublayer importance", ("Layer", "Emotion", "Attention", "MLP"), rows)
    return Figure("importance", "Which sublayers matter", caption, panels, [table], (source,), keys(SUBLAYERS))


# ---- checks ----------------------------------------------------------------------------------------------------------------


def checks(scores: Scores) -> FigureTable | None:
    """What was checked by really intervening."""
    rows: list[list[CellValue]] = []
    for kind in ("heads", "neurons"):
        check = scores.verification.get(kind)
        if isinstance(check, Mapping):
            middle, near = finite(check.get("median_relative_error")), finite(check.get("share_within_1e-4"))
            error = f"relative error {middle:.1e} (median)" if middle is not None else "not kept in this version's form"
            error += f", {percent(near)} within 1e-4" if near is not None else ""
            rows.append([f"One-pass contribution against real ablation, {kind}", plural(check.get("units", 0), kind[:-1]), error])
    if scores.patches:
        both, random = (number(finite(scores.patches.get(name))) for name in ("correlation", "correlation_random"))
        title = f"Attribution patching against true patches ({scores.patches.get('emotion')})"
        size = plural(len(scores.patches.get("units", ())), "unit")
        rows.append([title, size, f"correlation {both}, on random units alone {random}"])
    return FigureTable("Scores checked by intervening", ("Check", "On", "Found"), rows) if rows else None
