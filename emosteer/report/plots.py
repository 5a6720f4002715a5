"""Plots: Vega-Lite charts made static SVG, whose every colour is a CSS variable, so that light, dark and print share one drawing.

Nothing here knows what is plotted. A panel is `PANEL` pixels wide, which a phone shows unscaled; panels flow in a grid. A chart is a
Vega-Lite specification (plain dictionaries), drawn by vl-convert, which brings Vega-Lite along and needs no browser and no network.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import vl_convert

from emosteer.report.figures import Key

PANEL, WIDE = 340, 760
Datum = Mapping[str, Any]
Spec = dict[str, Any]
#: Descriptions that start with this sign become tooltips; Vega's own descriptions do not.
_TIP = "\u00a7"


@dataclass(frozen=True)
class Style:
    """How a series looks. Shape and dash distinguish it without its colour, too."""

    paint: str
    shape: str = "circle"
    dash: tuple[int, ...] = (1, 0)


def var(name: str) -> str:
    """A CSS variable as a colour."""
    return f"var(--{name})"


def tip(text: str) -> str:
    """A mark's description that becomes its tooltip."""
    return f"{_TIP}{text}"


# ---- colour steps ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """A colour scale of a few steps, as readable as the key beside it.

    edges: between steps, rising; paints: one more than edges; strong: steps on which text needs the contrast colour.
    """

    edges: tuple[float, ...]
    paints: tuple[str, ...]
    strong: frozenset[int]

    @classmethod
    def sequential(cls, top: float, n: int = 8) -> Steps:
        """Equal steps from 0 to `top`."""
        return cls(tuple(top * i / n for i in range(1, n)), tuple(f"seq-{i}" for i in range(n)), frozenset(range(5, n)))

    @classmethod
    def diverging(cls, top: float) -> Steps:
        """Nine steps around zero, finer near it, as scores have long tails."""
        parts = [top * share for share in (0.05, 0.15, 0.35, 0.65)]
        return cls((*(-p for p in reversed(parts)), *parts), tuple(f"div-{i}" for i in range(9)), frozenset((0, 1, 7, 8)))

    def step(self, value: float) -> int:
        """Index of a value's step."""
        return sum(value >= edge for edge in self.edges)

    def key(self, form: str = ".2f") -> list[Key]:
        """The key: the range of each step."""
        text = [format(edge, form).replace("-", "\u2212") for edge in self.edges]
        between = [f"{a} to {b}" for a, b in zip(text, text[1:], strict=False)]
        ranges = [f"below {text[0]}", *between, f"{text[-1]} or more"]
        return [Key(paint, words) for paint, words in zip(self.paints, ranges, strict=True)]


# ---- parts of a chart --------------------------------------------------------------------------------------------------


def mark(kind: str, encoding: Spec, rows: Sequence[Datum] | None = None, **look: Any) -> Spec:
    """One layer. rows: its own data, else the chart's."""
    data = {} if rows is None else {"data": {"values": [dict(row) for row in rows]}}
    return {"mark": {"type": kind, **look}, "encoding": encoding, **data}


def chart(rows: Sequence[Datum], layers: Sequence[Spec], height: int, width: int = PANEL) -> Spec:
    """Layers over the same data. The width is that of the whole drawing, axes included."""
    fit = {"type": "fit", "contains": "padding"}
    return {"data": {"values": [dict(row) for row in rows]}, "layer": list(layers), "width": width, "height": height, "autosize": fit}


def quantity(field: str, title: str | None = None, *, domain: Sequence[float] | None = None, log: bool = False, **axis: Any) -> Spec:
    """A position on a scale of numbers. axis: Vega-Lite's options of the axis, "percent" and "hidden" beside them."""
    if axis.pop("percent", False):
        axis["format"] = ".0%"
    if axis.pop("hidden", False):
        axis |= {"labels": False, "ticks": False}
    if "values" not in axis:  # Vega thins out given values to the count as well
        axis = {"tickCount": 5, **axis}
    scale: Spec = {
        "zero": False,
        "nice": domain is None,
        **({"type": "log"} if log else {}),
        **({"domain": list(domain)} if domain else {}),
    }
    return {"field": field, "type": "quantitative", "title": title, "axis": axis, "scale": scale}


def category(field: str, title: str | None = None, **axis: Any) -> Spec:
    """A position by name, in the order of the data. axis: options; "room_for" names the labels that must fit beside a plot, whatever the
    reader's font, since Vega measures them in its own."""
    if labels := axis.pop("room_for", None):
        # beside a point that stands at zero, the label ends before its mark
        axis |= {"minExtent": round(6.7 * max(map(len, labels))) + 10, "labelLimit": 0, "labelPadding": 8}
    plain = {"labelAngle": 0, "ticks": False, "domain": False, "grid": False}
    return {"field": field, "type": "ordinal", "title": title, "sort": None, "axis": {**plain, **axis}}


def named(field: str, styles: Mapping[str, Style], look: str = "paint", legend: Spec | None = None) -> Spec:
    """A series' colour ("paint"), shape or dash."""
    values = [var(s.paint) if look == "paint" else s.shape if look == "shape" else list(s.dash) for s in styles.values()]
    return {"field": field, "type": "nominal", "scale": {"domain": list(styles), "range": values}, "legend": legend}


def told(field: str = "tip") -> Spec:
    """A mark's description."""
    return {"field": field, "type": "nominal"}


def rule(axis: str, at: float, dash: Sequence[int] = (3, 3)) -> Spec:
    """A reference line: "x" for an upright one."""
    return mark(
        "rule", {axis: {"field": "at", "type": "quantitative"}}, [{"at": at}], strokeDash=list(dash), color=var("muted"), strokeWidth=1.2
    )


# ---- charts --------------------------------------------------------------------------------------------------------------


def dots(
    rows: Sequence[Datum],
    styles: Mapping[str, Style],
    *,
    percent: bool = True,
    at: float | None = None,
    domain: tuple[float, float] | None = None,
    apart: bool = False,
) -> Spec:
    """One line per label: points and their intervals.

    Args:
        rows: label, series, value, low, high, tip. at: a reference line; apart: the series of one label stand below each other.
    """
    form = {"percent": True} if percent else {"format": ".2~f"}
    x = quantity("value", domain=domain, **form)
    y = category("label", room_for=[row["label"] for row in rows])
    color = named("series", styles)
    across = {"y": y, "yOffset": {"field": "series", "sort": list(styles)}} if apart else {"y": y}
    spread = mark("rule", {"x": {**x, "field": "low"}, "x2": {"field": "high"}, **across, "color": color}, strokeWidth=2)
    shape = named("series", styles, "shape")
    point = mark("point", {"x": x, **across, "color": color, "shape": shape, "description": told()}, size=62, filled=True, opacity=1)
    lines_each = len(styles) if apart else 1
    height = (22 if lines_each == 1 else 8 + 12 * lines_each) * len({row["label"] for row in rows}) + 30
    return chart(rows, [*([rule("x", at)] if at is not None else []), spread, point], height)


def lines(
    rows: Sequence[Datum],
    styles: Mapping[str, Style],
    x: Spec,
    y: Spec,
    *,
    rules: Sequence[float] = (),
    marks: bool = False,
    height: int = 200,
    width: int = PANEL,
) -> Spec:
    """Lines over x, one per series, with a band where rows give one.

    Args:
        rows: x, y, series and perhaps low, high, tip. marks: draw the points as well.
    """
    color = named("series", styles)
    layers = [rule("y", at) for at in rules]
    if any(row.get("low") is not None for row in rows):
        layers.append(mark("area", {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": color}, opacity=0.18))
    layers.append(mark("line", {"x": x, "y": y, "color": color, "strokeDash": named("series", styles, "dash")}, strokeWidth=2))
    if marks:
        shape = named("series", styles, "shape")
        points = {"x": x, "y": y, "color": color, "shape": shape, "description": told()}
        layers.append(mark("point", points, size=46, filled=True, opacity=1))
    return chart(rows, layers, height, width)


def heat(rows: Sequence[Datum], steps: Steps, x: Spec, y: Spec, *, height: int, numbers: bool = False) -> Spec:
    """Cells coloured by step.

    Args:
        rows: x, y, value, tip and perhaps text, marked (outlined).
    """
    cells = [{**row, "step": (step := steps.step(row["value"])), "strong": step in steps.strong} for row in rows]
    paints = {"domain": list(range(len(steps.paints))), "range": [var(paint) for paint in steps.paints]}
    color = {"field": "step", "type": "ordinal", "scale": paints, "legend": None}
    place = {"x": x, "y": y}
    gap = 0.6 if len({row["x"] for row in rows}) <= 80 else 0
    layers = [mark("rect", {**place, "color": color, "description": told()}, stroke=var("paper"), strokeWidth=gap)]
    if numbers:
        ink = {"condition": {"test": "datum.strong", "value": var("on-strong")}, "value": var("ink")}
        layers.append(mark("text", {**place, "text": {"field": "text", "type": "nominal"}, "color": ink}, fontSize=10.5))
    if any(row.get("marked") for row in rows):
        outline = mark("rect", place, fill=None, filled=False, stroke=var("ink"), strokeWidth=1.3)
        layers.append({**outline, "transform": [{"filter": "datum.marked"}]})
    return chart(cells, layers, height)


def every(values: Sequence[Any], about: int) -> list[Any]:
    """Evenly spaced values to write on an axis, about so many."""
    return list(values[:: max(1, -(-len(values) // about))])


# ---- SVG -----------------------------------------------------------------------------------------------------------------

_CONFIG: Spec = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "padding": 2,
    "view": {"stroke": None},
    "text": {"color": var("ink")},
    "legend": {"labelColor": var("ink"), "labelFontSize": 11.5},
    "axis": {
        "labelColor": var("muted"),
        "titleColor": var("ink"),
        "titleFontWeight": 500,
        "titleFontSize": 11.5,
        "labelFontSize": 11,
        "gridColor": var("grid"),
        "domainColor": var("axis"),
        "tickColor": var("axis"),
        "tickSize": 4,
        "labelPadding": 4,
        "labelFlush": False,
        "labelSeparation": 6,
        "labelOverlap": True,
        "titlePadding": 7,
    },
}


def svg(spec: Spec, alt_text: str) -> str:
    """Draws a chart: a slim inline SVG with a text alternative."""
    return slim(vl_convert.vegalite_to_svg({**spec, "config": _CONFIG}), alt_text)


_LONG = re.compile(r"-?\d+\.\d{3,}")
_TAGS = ("g", "path", "line", "rect", "circle", "text")
_KEPT = {"d", "fill", "stroke", "stroke-width", "stroke-dasharray", "fill-opacity", "stroke-opacity", "transform", "text-anchor"}
_KEPT |= {"font-size", "font-weight", "x", "y", "x1", "x2", "y1", "y2", "dx", "dy", "cx", "cy", "r", "width", "height", "opacity"}


def slim(text: str, alt_text: str) -> str:
    """Rewrites Vega's SVG for inlining: only drawing attributes survive (no ids, links, roles), descriptions become tooltips."""
    root = ElementTree.fromstring(text)
    width, height = (round(float(root.get(side, "0"))) for side in ("width", "height"))
    frame = {"viewBox": root.get("viewBox", ""), "width": str(width), "height": str(height), "style": f"max-width:{round(1.25 * width)}px"}
    drawn = ElementTree.Element("svg", {"class": "plot", "role": "img", "aria-label": alt_text, **frame})
    drawn.extend(kept for kept in map(_copy, root) if kept is not None)
    return ElementTree.tostring(drawn, encoding="unicode")


def _copy(element: ElementTree.Element) -> ElementTree.Element | None:
    """A drawing element with its children, or None if it draws nothing."""
    tag = element.tag.rpartition("}")[2]
    if tag not in _TAGS or element.get("display") == "none" or (tag == "path" and _is_empty(element)):
        return None
    copy = ElementTree.Element(tag)
    for name, value in element.items():
        if name in _KEPT and not (name == "opacity" and value == "1"):
            copy.set(name, _LONG.sub(_shorter, value))
    children = [kept for kept in map(_copy, element) if kept is not None]
    if tag == "g" and not children:
        return None
    spoken = element.get("aria-label", "")
    if spoken.startswith(_TIP):
        ElementTree.SubElement(copy, "title").text = spoken.removeprefix(_TIP)
    copy.extend(children)
    copy.text = element.text if tag == "text" else copy.text
    return copy


def _is_empty(path: ElementTree.Element) -> bool:
    """Vega draws frames around everything, most of them without a size, a line or a filling."""
    unseen = path.get("class") == "background" and not path.get("stroke") and not path.get("fill")
    return unseen or path.get("d", "") in ("", "M0,0h0v0h0Z")


def _shorter(number: re.Match[str]) -> str:
    return f"{float(number.group()):.2f}".rstrip("0").rstrip(".")
