"""Figures of the probes: where an emotion can be read, how well, how long after its passage, and what moves the reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emosteer.probing.probes import LINEAR, NONLINEAR, Probes
from emosteer.probing.settings import HEADS
from emosteer.report import plots
from emosteer.report.figures import CellValue, Figure, FigureTable, Panel
from emosteer.report.panels import keys
from emosteer.report.plots import PANEL, WIDE, Steps, Style
from emosteer.report.wording import Interval, number, percent, percent_range, plural, points_range, shortened

SOURCES = ("probes",)
SHUFFLED = "labels shuffled"
KINDS = {"resid_post": "residual stream after the MLP", "resid_mid": "residual stream after attention", "mlp_out": "what the MLP writes"}
READ = {LINEAR: Style("series-1"), NONLINEAR: Style("series-2", "square", (6, 3)), SHUFFLED: Style("m-control", "square", (4, 4))}
LASTING = {
    "fitted": ("probe fitted there", Style("series-1")),
    "transferred": ("probe fitted at the passage", Style("series-2", "square", (6, 3))),
    "lexical": ("words in the window", Style("series-3", "diamond", (2, 2))),
    "shuffled": (SHUFFLED, Style("m-control", "square", (4, 4))),
}
MOVES = {
    "system line": Style("series-1"),
    "circuit": Style("series-2", "square"),
    "random vectors": Style("m-control", "diamond"),
}


def figures(probes: Probes) -> list[Figure]:
    """All that there is to draw."""
    drawn = [_curve(probes)] if set(probes.best) - {HEADS} else []
    drawn += [_heads(probes)] if HEADS in probes.best else []
    drawn.append(_confusion(probes))
    drawn += [_lasting(probes)] if probes.persistence else []
    return drawn + ([_moved(probes)] if probes.malleability else [])


def prompting_table(probes: Probes) -> FigureTable | None:
    """The model asked, beside the probe on the same texts."""
    found = probes.prompting
    if not found:
        return None
    rows: list[list[CellValue]] = [["Probe", percent_range(Interval.of(found["probe"])), "", "", ""]]
    for name, row in found["asked"].items():
        less = points_range(Interval.of(row["probe_less"]))
        rows.append([name.capitalize(), percent_range(Interval.of(row["accuracy"])), number(row["f1"]), number(row["calibration"]), less])
    head = ("Read by", "Accuracy", "Macro-F1", "Calibration error", "Probe less this")
    return FigureTable(f"The same model asked about {plural(found['texts'], 'test text')}", head, rows)


def _curve(probes: Probes) -> Figure:
    panels, tables = [], []
    for kind in (kind for kind in probes.best if kind != HEADS):
        rows = {form: [row for row in probes.points if (row["kind"], row["form"]) == (kind, form)] for form in (LINEAR, NONLINEAR)}
        panels.append(_curve_panel(probes, kind, rows))
        tables.append(_curve_table(kind, rows))
    best = {kind: probes.best[kind]["layer"] for kind in probes.best if kind != HEADS}
    caption = (
        f"{plural(probes.texts['test'], 'text')} that nothing was fitted to or chosen on; bands are 95\u202f% intervals over texts. The "
        f"dashed level line is what words alone name (naive Bayes), {percent(probes.lexical['value'])}; one label for all would be right "
        f"in about {percent(1 / len(probes.labels))}. The best layer in cross-validation: "
        f"{', '.join(f'{layer} ({KINDS[kind]})' for kind, layer in best.items())}."
    )
    return Figure("probe-layers", "Where can the emotion be read?", caption, panels, tables, SOURCES, keys(READ))


def _curve_panel(probes: Probes, kind: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Panel:
    data = [
        {"x": row["layer"], "y": row["accuracy"]["value"], "low": row["accuracy"]["low"], "high": row["accuracy"]["high"], "series": form}
        for form in rows
        for row in rows[form]
    ]
    data += [{"x": r["layer"], "y": r["shuffled"], "low": r["shuffled"], "high": r["shuffled"], "series": SHUFFLED} for r in rows[LINEAR]]
    best, last = probes.point(kind), max(1, len(rows[LINEAR]) - 1)
    alt_text = (
        f"Lines over layers, {KINDS[kind]}: accuracy {percent(rows[LINEAR][0]['accuracy']['value'])} at layer 0, "
        f"{percent(best['accuracy']['value'])} at layer {best['layer']}, {percent(rows[LINEAR][-1]['accuracy']['value'])} at the last; "
        f"with shuffled labels {percent(best['shuffled'])}."
    )
    x = plots.quantity("x", "Layer", domain=(0, last), format="d", grid=False)
    y = plots.quantity("y", "Accuracy", domain=(0, 1), percent=True)
    rules = [probes.lexical["value"]]
    drawings = [plots.svg(plots.lines(data, READ, x, y, rules=rules, height=250, width=width), alt_text) for width in (WIDE, PANEL)]
    return Panel(KINDS[kind].capitalize(), drawings[0], alt_text, drawings[1])


def _curve_table(kind: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> FigureTable:
    curved = {row["layer"]: row for row in rows[NONLINEAR]}
    cells: list[list[CellValue]] = []
    for row in rows[LINEAR]:
        other = curved.get(row["layer"])
        told = [percent_range(Interval.of(row["accuracy"])), number(row["f1"]), number(row["calibration"]), percent(row["shuffled"])]
        cells.append([row["layer"], *told, number(row["selectivity"]), percent_range(Interval.of(other["accuracy"])) if other else None])
    head = ("Layer", "Accuracy", "Macro-F1", "Calibration error", "Labels shuffled", "Selectivity", "Non-linear")
    return FigureTable(f"Probes of the {KINDS[kind]}", head, cells)


def _heads(probes: Probes) -> Figure:
    points = [row for row in probes.points if row["kind"] == HEADS]
    accuracy = {(row["layer"], row["unit"]): row["accuracy"]["value"] for row in points}
    best = (probes.best[HEADS]["layer"], probes.best[HEADS]["unit"])
    n_layers, n_heads = (1 + max(place[axis] for place in accuracy) for axis in (0, 1))
    steps = Steps.sequential(max(0.1, max(accuracy.values())))
    rows = [
        {
            "x": layer,
            "y": head,
            "value": accuracy[layer, head],
            "tip": plots.tip(f"L{layer}H{head}: {percent(accuracy[layer, head])}"),
            "marked": (layer, head) == best,
        }
        for head in range(n_heads)
        for layer in range(n_layers)
    ]
    alt_text = (
        f"Map of {n_layers} layers by {n_heads} heads. The best in cross-validation, L{best[0]}H{best[1]}: {percent(accuracy[best])}."
    )
    x = plots.category("x", "Layer", values=plots.every(range(n_layers), 12))
    y = plots.category("y", "Head", values=plots.every(range(n_heads), 12))
    panel = Panel("Accuracy of a probe of one head", plots.svg(plots.heat(rows, steps, x, y, height=40 + 18 * n_heads), alt_text), alt_text)
    cells: list[list[CellValue]] = [[layer, *(percent(accuracy[layer, head]) for head in range(n_heads))] for layer in range(n_layers)]
    table = FigureTable("Accuracy by head", ("Layer", *map(str, range(n_heads))), cells)
    caption = "Test texts; outlined is the head with the least loss in cross-validation. A head's output is its z before W_O."
    return Figure("probe-heads", "Which heads can it be read from?", caption, [panel], [table], SOURCES, steps.key(".2f"), "Accuracy")


def _confusion(probes: Probes) -> Figure:
    counts = probes.confusion.tolist()
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    steps, columns = Steps.sequential(1.0), shortened(probes.labels)
    rows = [
        {
            "x": columns[b],
            "y": a,
            "value": shares[i][j],
            "text": str(counts[i][j]),
            "tip": plots.tip(f"{a} read as {b}: {counts[i][j]} of {sum(counts[i])}"),
        }
        for i, a in enumerate(probes.labels)
        for j, b in enumerate(probes.labels)
    ]
    apart = [(shares[i][j], a, b) for i, a in enumerate(probes.labels) for j, b in enumerate(probes.labels) if i != j]
    share, a, b = max(apart)
    alt_text = f"Labels by what they are read as. Most often confused: {a} read as {b}, {percent(share)} of its texts."
    x, y = plots.category("x", "Read as", orient="top"), plots.category("y", room_for=probes.labels)
    chart = plots.heat(rows, steps, x, y, height=36 * len(probes.labels) + 50, numbers=True)
    panel = Panel("Test texts by label and reading", plots.svg(chart, alt_text), alt_text)
    table = FigureTable("Test texts", ("Label", *probes.labels), [[a, *row] for a, row in zip(probes.labels, counts, strict=True)])
    point = probes.point(probes.chosen)
    where = HEADS if probes.chosen == HEADS else KINDS[probes.chosen]
    caption = (
        f"The linear probe of layer {point['layer']} ({where}), the best in cross-validation. Numbers are texts, shades shares of a row."
    )
    return Figure("probe-confusion", "What is it taken for?", caption, [panel], [table], SOURCES, steps.key(".2f"), "Share of the label")


def _lasting(probes: Probes) -> Figure:
    found = probes.persistence
    rows = [
        {"x": str(point["distance"]), "y": point[name]["value"], "low": point[name]["low"], "high": point[name]["high"], "series": label}
        for name, (label, _) in LASTING.items()
        for point in found["points"]
    ]
    styles = dict(LASTING.values())
    last = found["points"][-1]
    ends = ", ".join(f"{label} {percent(last[name]['value'])}" for name, (label, _) in LASTING.items())
    alt_text = f"Lines over distance. After {last['distance']} neutral tokens: {ends}."
    x = plots.category("x", "Neutral tokens after the passage", domain=True)
    y = plots.quantity("y", "Accuracy", domain=(0, 1), percent=True)
    panel = Panel("Accuracy by distance", plots.svg(plots.lines(rows, styles, x, y, marks=True, height=230), alt_text), alt_text)
    cells: list[list[CellValue]] = [
        [point["distance"], *(percent_range(Interval.of(point[name])) for name in LASTING)] for point in found["points"]
    ]
    head = ("Tokens", *(label.capitalize() for label, _ in LASTING.values()))
    caption = (
        f"{plural(found['texts'], 'text')} with neutral text behind them, read at {found['site']} over the last {found['window']} "
        "positions by probes fitted to other texts. Words in the window are at chance once the window holds only neutral text."
    )
    table = FigureTable("Accuracy by distance", head, cells)
    return Figure("probe-lasting", "How long can it be read?", caption, [panel], [table], SOURCES, keys(styles))


def _moved(probes: Probes) -> Figure:
    found = probes.malleability
    strongest = {row["how"]: max((r["dose"] or 0 for r in found["rows"] if r["how"] == row["how"]), default=0) for row in found["rows"]}
    drawn = [row for row in found["rows"] if (row["dose"] or 0) == strongest[row["how"]]]
    rows = [
        {
            "label": row["label"],
            "series": row["how"],
            **row["rise"],
            "tip": plots.tip(f"{row['label']}, {row['how']}: {points_range(Interval.of(row['rise']))}"),
        }
        for row in drawn
    ]
    styles = {how: style for how, style in MOVES.items() if how in strongest}
    means = {how: [row["rise"]["value"] for row in drawn if row["how"] == how] for how in styles}
    told = ", ".join(f"{how} {number(100 * sum(rises) / len(rises), 1, signed=True)}" for how, rises in means.items())
    alt_text = f"Rise of the probe's probability of a label, mean over labels in points: {told}."
    chart = plots.dots(rows, styles, at=0.0, apart=True)
    panel = Panel("Rise of the probability read for the label", plots.svg(chart, alt_text), alt_text)
    cells: list[list[CellValue]] = [
        [
            row["label"],
            f"{row['how']}{'' if row['dose'] is None else ' x {:g}'.format(row['dose'])}",
            number(row["before"]),
            number(row["after"]),
            points_range(Interval.of(row["rise"])),
            number(100 * row["rise_shuffled"], 1, signed=True),
            percent(row["read_before"]),
            percent(row["read_after"]),
        ]
        for row in found["rows"]
    ]
    head = ("Label", "Moved by", "Before", "After", "Rise", "Shuffled probe, points", "Read as it before", "After")
    caption = (
        f"{plural(found['texts'], 'test text')}, those of the label itself left out, read at {found['site']}: with a system line that "
        "names the emotion, with the circuit at its default strength, and with random vectors as long as the circuit's at the same places."
    )
    table = FigureTable("What the probe reads before and after", head, cells)
    return Figure("probe-moved", "What moves the reading?", caption, [panel], [table], SOURCES, keys(styles))
