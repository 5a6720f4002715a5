"""Figures of the intensity dial: strength against judged intensity and cost where it was fitted, and the dial on other prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emosteer.circuits.circuit import Circuit
from emosteer.report import plots
from emosteer.report.figures import CellValue, Figure, FigureTable, Key, Panel
from emosteer.report.plots import Spec, Style, var
from emosteer.report.wording import finite, number, percent

#: An interval of 95 % in standard errors.
_Z = 1.96
#: How wide and high the two halves of a panel are, without their axes.
_WIDTH, _UPPER, _LOWER = 278, 130, 70


@dataclass(frozen=True)
class Spot:
    """One strength (or intensity) of one emotion. broke: the text did not bear it."""

    at: float
    judged: float | None
    error: float | None
    fitted: float | None
    ratio: float | None
    sound: float | None
    names: float | None
    broke: bool = False


def spots(row: Mapping[str, Any], axis: str = "strength", broke: bool = False) -> list[Spot]:
    """The measured points of one emotion, in rising order."""

    def value(name: str, index: int) -> float | None:
        values = row.get(name) or ()
        return finite(values[index]) if index < len(values) else None

    names = ("judged", "error", "fitted", "ratio", "sound", "names")
    measured = [
        Spot(at=finite(at) or 0.0, broke=broke, **{name: value(name, i) for name in names}) for i, at in enumerate(row.get(axis) or ())
    ]
    return sorted(measured, key=lambda spot: spot.at)


def calibration(circuit: Circuit) -> Figure | None:
    """Judged intensity and cost over strength, one panel per emotion; None where the circuit has no calibration."""
    calibrated = circuit.metrics.get("calibration") or {}
    rows = {emotion: (calibrated.get("emotions") or {}).get(emotion) or {} for emotion in circuit.emotions}
    curves = {emotion: spots(row) + spots(row.get("broke") or {}, broke=True) for emotion, row in rows.items() if row.get("strength")}
    if not curves:
        return None
    limit = finite((calibrated.get("cap") or {}).get("ratio"))
    panels = [_panel(emotion, curve, limit, _highest(curves, limit)) for emotion, curve in curves.items()]
    caption = (
        "Above: the judge's mean probability of the emotion over strength, with 95 % intervals, and the rising curve fitted to it, which "
        "turns --intensity into a strength. Below: the perplexity ratio, its limit dashed. Crosses: strengths that the text did not bear, "
        "or that were given up so that all emotions together keep to the perplexity budget."
    )
    caption += f" Rule: {calibrated['rule']}." if calibrated.get("rule") else ""
    keys = [Key("series-1", "judged", "dot"), Key("series-2", "fitted", "dash"), Key("series-3", "perplexity ratio", "line")]
    return Figure("calibration", "Strength, judged intensity and cost", caption, panels, [_table(curves)], ("circuit",), keys)


def _highest(curves: Mapping[str, Sequence[Spot]], limit: float | None) -> float:
    """The end of the ratio axis: broken text may lie beyond, far enough to flatten everything else."""
    shown = 1.5 * (limit or 2.0)
    return max([1.05, limit or 1.0, *(min(spot.ratio or 1.0, shown) for curve in curves.values() for spot in curve)])


def _table(curves: Mapping[str, Sequence[Spot]]) -> FigureTable:
    rows: list[list[CellValue]] = []
    for emotion, curve in curves.items():
        for s in curve:
            numbers = [number(s.judged), number(s.fitted), number(s.ratio), percent(s.sound), percent(s.names)]
            rows.append([f"{emotion} {number(s.at, 2)}", "broke" if s.broke else "held", *numbers])
    head = ("Emotion and strength", "The text", "Judged P(target)", "Fitted", "Perplexity ratio", "Sound", "Names")
    return FigureTable("Calibration points", head, rows)


def _panel(emotion: str, curve: Sequence[Spot], limit: float | None, top: float) -> Panel:
    held = [spot for spot in curve if not spot.broke]
    first, last = held[0], held[-1]
    alt_text = (
        f"{emotion}: judged probability {number(first.judged)} at strength {number(first.at, 1)} and {number(last.judged)} at "
        f"{number(last.at, 1)}, the strongest that the text bears; the perplexity ratio there is {number(last.ratio)}."
    )
    ends = (0.0, max(spot.at for spot in curve) * 1.03 or 1.0)
    judged, cost = [_row(s, s.judged, "judged") for s in curve], [_row(s, s.ratio, "ratio") for s in curve]
    x = plots.quantity("at", domain=ends, hidden=True, tickCount=6)
    y = plots.quantity("y", "Judged", domain=(0, 1), tickCount=4, minExtent=34)
    fitted = [{"at": s.at, "y": s.fitted} for s in held if s.fitted is not None]
    line = plots.mark("line", {"x": x, "y": y}, fitted, strokeWidth=2, strokeDash=[5, 3], color=var("series-2"))
    upper = plots.chart([], [line, *_marks(judged, x, y, "series-1")], _UPPER, _WIDTH)
    x = plots.quantity("at", "Strength", domain=ends, tickCount=6)
    y = plots.quantity("y", "Ratio", domain=(0.97, top + 0.03), tickCount=2, minExtent=34, format=".2~f")
    y["scale"]["clamp"] = True
    line = plots.mark("line", {"x": x, "y": y}, [row for row in cost if row["y"] is not None], strokeWidth=2, color=var("series-3"))
    layers = [*([plots.rule("y", limit)] if limit is not None else []), line, *_marks(cost, x, y, "series-3")]
    lower = plots.chart([], layers, _LOWER, _WIDTH)
    for half in (upper, lower):
        del half["autosize"]
    return Panel(emotion.capitalize(), plots.svg({"vconcat": [upper, lower], "spacing": 8}, alt_text), alt_text)


def _row(spot: Spot, y: float | None, name: str) -> dict[str, Any]:
    tip = plots.tip(f"strength {number(spot.at, 2)}: {name} {number(y)}{', the text broke' if spot.broke else ''}")
    return {"at": spot.at, "y": y, "broke": spot.broke, "tip": tip, **(_spread(y, spot.error) if name == "judged" else {})}


def _spread(value: float | None, error: float | None) -> dict[str, float]:
    """The ends of a probability's interval, where its error is known."""
    return {} if value is None or error is None else {"low": max(0.0, value - _Z * error), "high": min(1.0, value + _Z * error)}


def _marks(rows: Sequence[Mapping[str, Any]], x: Spec, y: Spec, paint: str) -> list[Spec]:
    """Points with their intervals; crosses where the text broke."""
    known = [row for row in rows if row["y"] is not None]
    layers = []
    if any("low" in row for row in known):
        spread = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}
        layers.append(plots.mark("rule", spread, known, strokeWidth=1.5, color=var(paint), opacity=0.55))
    shape = {"field": "broke", "type": "nominal", "scale": {"domain": [False, True], "range": ["circle", "cross"]}, "legend": None}
    point = {"x": x, "y": y, "shape": shape, "description": plots.told()}
    return [*layers, plots.mark("point", point, known, filled=True, opacity=1, size=44, color=var(paint))]


# ---- on other prompts --------------------------------------------------------------------------------------------------

ON_OTHERS = {"judged": Style("series-1")}


def checked(check: Mapping[str, Any]) -> Figure:
    """Judged intensity over the dial on prompts that it was not fitted on."""
    curves = {emotion: spots(row, "intensity") for emotion, row in check["emotions"].items() if isinstance(row, Mapping)}
    panels = [_checked_panel(emotion, curve) for emotion, curve in curves.items() if any(spot.judged is not None for spot in curve)]
    cells: list[list[CellValue]] = []
    for emotion, curve in curves.items():
        for s in curve:
            numbers = [number(s.judged), number(s.error, 3), number(s.ratio), percent(s.sound), percent(s.names)]
            cells.append([f"{emotion} {number(s.at, 0)}", *numbers])
    head = ("Emotion and intensity", "Judged P(target)", "Standard error", "Perplexity ratio", "Sound", "Names")
    size = (check.get("test") or {}).get("n_groups")
    caption = f"Replies to {size or '?'} other prompts at several positions of the dial, judged blind; the band is the 95 % interval."
    tables = [FigureTable("The dial on other prompts", head, cells)]
    return Figure("dial-check", "The dial on prompts that it was not fitted on", caption, panels, tables, ("check",))


def _checked_panel(emotion: str, curve: Sequence[Spot]) -> Panel:
    rows = []
    for s in curve:
        if s.judged is not None:
            tip = plots.tip(f"intensity {number(s.at, 0)}: {number(s.judged)}, ratio {number(s.ratio)}")
            rows.append({"x": s.at, "y": s.judged, "series": "judged", "tip": tip, **_spread(s.judged, s.error or 0.0)})
    values = ", ".join(f"{number(s.judged)} at {number(s.at, 0)}" for s in curve)
    ratios = [s.ratio for s in curve if s.ratio is not None]
    alt_text = f"{emotion}: judged probability {values}." + (f" The perplexity ratio is at most {number(max(ratios))}." if ratios else "")
    x, y = plots.quantity("x", "Intensity asked for", domain=(0, 100)), plots.quantity("y", "Judged", domain=(0, 1))
    return Panel(emotion.capitalize(), plots.svg(plots.lines(rows, ON_OTHERS, x, y, marks=True, height=180), alt_text), alt_text)
