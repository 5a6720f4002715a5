"""Figures of the circuit: what each head and neuron adds, how emotions share them, and how faithful it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from emosteer.circuits.circuit import Circuit, overlap
from emosteer.directions.directions import Directions
from emosteer.report import plots
from emosteer.report.direction_figures import emotion_similarity
from emosteer.report.figures import CellValue, Figure, FigureTable, Key, Panel
from emosteer.report.panels import square
from emosteer.report.plots import Spec, Steps, Style
from emosteer.report.wording import finite, number, percent, plural, words

SOURCES = ("circuit",)
#: Units listed per emotion in the table behind the drawing, strongest first.
LISTED = 80
UNITS = {"head": Style("series-1"), "neurons": Style("series-2")}


# ---- the circuit drawn -------------------------------------------------------------------------------------------------


def head_norms(circuit: Circuit) -> Tensor:
    """Length of what each head adds at strength 1. Shape [emotion, layer, head]; zero outside the circuit."""
    return circuit.z_delta.float().unflatten(-1, (circuit.heads.shape[2], -1)).norm(dim=-1) * circuit.heads


def mlp_norms(circuit: Circuit) -> Tensor:
    """Length of what the neurons of a layer add together, in neuron activations. Shape [emotion, layer]."""
    return circuit.mlp_delta().float().norm(dim=-1)


def drawn(circuit: Circuit) -> Figure:
    """Layers by heads, one panel per emotion; the area of a dot is what the unit adds."""
    heads, neurons = head_norms(circuit), mlp_norms(circuit)
    tops = max(heads.max().item(), 1e-9), max(neurons.max().item(), 1e-9)
    panels = [_drawn_panel(circuit, e, heads[e], neurons[e], tops) for e in range(len(circuit.emotions))]
    caption = "A dot is a head of the circuit; its area is the length of the vector that the head adds to its output at strength 1."
    colours = [Key("series-1", "attention head", "dot")]
    if len(circuit.neuron_index):
        caption += " The lane at the top holds the neurons, one dot per layer, on a scale of its own."
        colours.append(Key("series-2", "neurons of a layer, together", "dot"))
    else:
        caption += " It has no neurons."
    return Figure("drawn", "The circuit drawn", caption, panels, [_unit_table(circuit, heads)], SOURCES, colours)


def _drawn_panel(circuit: Circuit, e: int, heads: Tensor, neurons: Tensor, tops: tuple[float, float]) -> Panel:
    lane = heads.shape[1] + 0.5
    counts = Counter(layer for who, layer, _ in circuit.neuron_index.tolist() if who == e)
    rows: list[dict[str, Any]] = []
    for layer, head in circuit.heads[e].nonzero().tolist():
        size = heads[layer, head].item()
        tip = plots.tip(f"L{layer}H{head} adds {number(size, 3)}")
        rows.append({"layer": layer, "lane": head, "kind": "head", "size": size / tops[0], "tip": tip})
    for layer, count in sorted(counts.items()):
        size = neurons[layer].item()
        tip = plots.tip(f"layer {layer}: {plural(count, 'neuron')}, together {number(size, 3)}")
        rows.append({"layer": layer, "lane": lane, "kind": "neurons", "size": size / tops[1], "tip": tip})
    alt_text = _drawn_words(circuit, e, heads, counts)
    title = f"{circuit.emotions[e].capitalize()}: {plural(int(circuit.heads[e].sum()), 'head')}"
    title += f", {plural(sum(counts.values()), 'neuron')}" if counts else ""
    chart = _drawn_chart(rows, heads.shape[0], heads.shape[1], bool(len(circuit.neuron_index)))
    return Panel(title, plots.svg(chart, alt_text), alt_text)


def _drawn_chart(rows: list[dict[str, Any]], n_layers: int, n_heads: int, lane: bool) -> Spec:
    step = max(6.0, min(20.0, 230 / (n_heads + 2)))
    top = n_heads + (1.2 if lane else -0.3)
    x = plots.quantity("layer", "Layer", domain=(-0.7, n_layers - 0.3), values=plots.every(range(n_layers), 7), format="d")
    y = plots.quantity("lane", "Head", domain=(-0.7, top), values=plots.every(range(n_heads), 9), format="d")
    area = {"domain": [0, 1], "range": [5, min(170.0, (1.15 * step) ** 2)]}
    encoding = {
        "x": x,
        "y": y,
        "size": {"field": "size", "type": "quantitative", "scale": area, "legend": None},
        "color": plots.named("kind", UNITS),
        "description": plots.told(),
    }
    return plots.chart(rows, [plots.mark("circle", encoding, opacity=0.85)], round(step * (n_heads + 2)) + 40)


def _drawn_words(circuit: Circuit, e: int, heads: Tensor, counts: Mapping[int, int]) -> str:
    n_heads, flat = heads.shape[1], heads.flatten()
    strongest = [i for i in flat.argsort(descending=True).tolist()[:3] if flat[i] > 0]
    layers = circuit.heads[e].any(1).nonzero().flatten().tolist()
    sentence = f"The circuit of {circuit.emotions[e]}: {plural(int(circuit.heads[e].sum()), 'head')}"
    sentence += f" in layers {layers[0]} to {layers[-1]}" if layers else ""
    sentence += f" and {plural(sum(counts.values()), 'neuron')} in {plural(len(counts), 'layer')}" if counts else ""
    return sentence + (f"; the strongest are {words([f'L{i // n_heads}H{i % n_heads}' for i in strongest])}." if strongest else ".")


def _unit_table(circuit: Circuit, heads: Tensor) -> FigureTable:
    rows: list[list[CellValue]] = []
    left = 0
    neurons = list(zip(circuit.neuron_index.tolist(), circuit.neuron_delta.tolist(), strict=True))
    for e, emotion in enumerate(circuit.emotions):
        total = heads[e].square().sum().item() or 1.0
        units = [("head", heads[e, layer, head].item(), f"L{layer}H{head}") for layer, head in circuit.heads[e].nonzero().tolist()]
        units += [("neuron", abs(delta), f"L{layer}N{index}") for (who, layer, index), delta in neurons if who == e]
        units.sort(key=lambda unit: (unit[0], -unit[1], unit[2]))
        left += max(0, len(units) - LISTED)
        for kind, size, name in units[:LISTED]:
            rows.append([name, emotion, kind, number(size, 3), percent(size**2 / total) if kind == "head" else None])
    more = f"; {left:,} weaker units are left out" if left else ""
    return FigureTable(
        f"What each unit adds at strength 1{more}", ("Unit", "Emotion", "Kind", "Length", "Share of all heads' square"), rows
    )


# ---- faithfulness and overlap --------------------------------------------------------------------------------------------


def faithfulness(circuit: Circuit) -> FigureTable | None:
    """Size, strength and faithfulness of the circuit; None where that was not measured."""
    measured = circuit.metrics.get("emotions")
    if not isinstance(measured, Mapping):
        return None
    total = circuit.heads[0].numel()
    rows: list[list[CellValue]] = []
    for e, emotion in enumerate(circuit.emotions):
        row = measured.get(emotion, {})
        n_heads, n_neurons = int(circuit.heads[e].sum()), int((circuit.neuron_index[:, 0] == e).sum())
        shares = [percent(finite(row.get(name)), 0) for name in ("faithfulness", "left", "random_mean", "random_max")]
        size = f"{n_heads} ({percent(n_heads / total, 0)})"
        rows.append([emotion.capitalize(), size, n_neurons, number(circuit.strength[e].item(), 2), *shares])
    head = ("Emotion", "Heads", "Neurons", "Default strength", "Effect kept", "Effect of the rest", "Random circuits", "Best random")
    return FigureTable("Effect on the final score, as shares of what injecting every unit does", head, rows)


def shared(circuit: Circuit, directions: Directions | None) -> Figure:
    """Units that emotions have in common, beside how alike their directions are."""
    jaccard = overlap(circuit)
    values = [[jaccard[a][b] for b in circuit.emotions] for a in circuit.emotions]
    panel, table = square(circuit.emotions, values, Steps.sequential(1.0), "Units in common (Jaccard)")
    panels, tables = [panel], [table]
    sources: tuple[str, ...] = SOURCES
    caption = (
        "Two emotions may use the same units and still push them in different directions: units in common over all units of either, and, "
        "beside it, the cosine of their directions."
    )
    if directions is not None and tuple(directions.emotions) == tuple(circuit.emotions):
        n = directions.n_layers
        band = [layer for layer in circuit.metrics.get("band", []) if isinstance(layer, int) and layer < n] or list(range(n // 2, n))
        other, other_table = emotion_similarity(directions, band)
        panels, tables, sources = [panel, other], [table, other_table], ("circuit", "directions")
        caption += f" Cosines: mean over layers {band[0]} to {band[-1]}."
    return Figure("shared", "What emotions share", caption, panels, tables, sources)
