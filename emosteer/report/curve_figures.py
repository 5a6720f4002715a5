"""The figure of ablation and enhancement: do the units cause the emotion? The best units beside random sets of equal size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from emosteer.report import plots
from emosteer.report.figures import CellValue, Figure, FigureTable, Panel
from emosteer.report.panels import keys
from emosteer.report.plots import Style
from emosteer.report.wording import finite, number, plural

CurvePoint = Mapping[str, Any]
BEST, RANDOM = "highest-scored units", "random units, range over sets"
CURVES = {BEST: Style("series-1"), RANDOM: Style("m-control", "square", (4, 4))}
KINDS = {"zero": "set to zero", "mean": "set to their mean", "resample": "resampled", "enhance": "enhanced"}


def curves(rows: Sequence[CurvePoint]) -> Figure:
    """One panel per kind of intervention and of unit.

    Args:
        rows: `Scores.curves`.
    """
    groups: dict[tuple[str, str], list[CurvePoint]] = defaultdict(list)
    for row in rows:
        if row["kind"] != "none":
            groups[row["unit"], row["kind"]].append(row)
    baseline = {kind: _baseline(rows, "plain" if kind == "enhance" else "asked") for kind in KINDS}
    points = {key: _points(group) for key, group in groups.items()}
    ends = [p[name] for curve in points.values() for p in curve for name in ("y", "low", "high")] + list(baseline.values())
    known = [end for end in ends if end is not None]
    domain = (min([0.0, *known]) - 0.05, max([1.0, *known]) + 0.05)
    panels = [_panel(unit, kind, curve, baseline.get(kind), domain) for (unit, kind), curve in points.items()]
    caption = (
        "Ablation: the model is asked for the emotion while units are taken out, so a causal set falls below the dashed line (nothing "
        "taken out). Enhancement: it is asked for nothing and the units' contrast is added, so a causal set rises above it. The score is 1 "
        "for texts of the reply bank and about 0 for texts without emotion; it is read off the intact model, so it is no independent judge."
    )
    emotions = list(dict.fromkeys(row["emotion"] for row in rows))
    return Figure("curves", "Do the units cause the emotion?", caption, panels, [_table(rows, emotions)], ("scores",), keys(CURVES))


def _baseline(rows: Sequence[CurvePoint], who: str) -> float | None:
    scores = [row["score"] for row in rows if row["kind"] == "none" and row["who"] == who]
    return sum(scores) / len(scores) if scores else None


def _panel(unit: str, kind: str, points: Sequence[CurvePoint], baseline: float | None, domain: tuple[float, float]) -> Panel:
    title = f"{unit.capitalize()} {KINDS.get(kind, kind)}"
    last = points[-1]["x"] if points else ""
    ends = ", ".join(f"{p['series'].partition(',')[0]} {number(p['y'])}" for p in points if p["x"] == last)
    alt_text = f"{title}: emotion score at a share of {last}: {ends}" + (
        f"; with nothing done {number(baseline)}." if baseline is not None else "."
    )
    x = plots.category("x", f"Share of the {unit}", domain=True)
    y = plots.quantity("y", "Emotion score", domain=domain)
    chart = plots.lines(points, CURVES, x, y, rules=[] if baseline is None else [baseline], marks=True, height=210)
    return Panel(title, plots.svg(chart, alt_text), alt_text)


def _points(rows: Sequence[CurvePoint]) -> list[dict[str, Any]]:
    """Means over emotions: the best units, and random sets with their range, per share."""
    scores: dict[float, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        scores[row["share"]][row["who"]].append(row["score"])
    points: list[dict[str, Any]] = []
    for share in sorted(scores):
        means = {who: sum(values) / len(values) for who, values in scores[share].items()}
        random = [value for who, value in means.items() if who.startswith("random")]
        x = f"{100 * share:g} %"
        if "top" in means:
            tip = plots.tip(f"best {x}: {number(means['top'])}")
            points.append({"x": x, "y": means["top"], "series": BEST, "low": None, "high": None, "tip": tip})
        if random:
            mean, low, high = sum(random) / len(random), min(random), max(random)
            tip = plots.tip(f"{plural(len(random), 'random set')} of {x}: {number(mean)} ({number(low)} to {number(high)})")
            points.append({"x": x, "y": mean, "series": RANDOM, "low": low, "high": high, "tip": tip})
    return points


def _table(rows: Sequence[CurvePoint], emotions: Sequence[str]) -> FigureTable:
    by_condition: dict[tuple[str, str, float, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        by_condition[row["unit"], row["kind"], row["share"], row["who"]][row["emotion"]] = row["score"]
    cells: list[list[CellValue]] = []
    for (unit, kind, share, who), scores in by_condition.items():
        name = f"{unit} {KINDS.get(kind, kind)}"
        chosen = "best" if who == "top" else who.replace(":", " ")
        if kind == "none":
            name, chosen = f"nothing done, {'asked for it' if who == 'asked' else 'not asked'}", ""
        mean = sum(scores.values()) / len(scores)
        cells.append(
            [name, f"{100 * share:g} %" if share else "", chosen, number(mean), *(number(finite(scores.get(e))) for e in emotions)]
        )
    return FigureTable(
        "Emotion score of every point", ("Intervention", "Share", "Units", "Mean", *(e.capitalize() for e in emotions)), cells
    )
