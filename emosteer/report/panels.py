"""Panels that several figures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emosteer.report import plots
from emosteer.report.figures import FigureTable, Key, Panel
from emosteer.report.plots import Steps, Style
from emosteer.report.wording import number, shortened


def keys(styles: Mapping[str, Style]) -> list[Key]:
    """The key of a line chart."""
    return [Key(style.paint, name, "line" if style.dash == (1, 0) else "dash") for name, style in styles.items()]


def square(names: Sequence[str], values: Sequence[Sequence[float]], steps: Steps, title: str) -> tuple[Panel, FigureTable]:
    """Emotions against emotions, with the numbers in the cells."""
    rows, apart, columns = [], [], shortened(names)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            value = values[i][j]
            tip = plots.tip(f"{a} and {b}: {number(value)}")
            rows.append({"x": columns[b], "y": a, "value": value, "text": number(value), "tip": tip})
            apart += [(value, f"{a} and {b}")] if j < i else []
    extremes = (
        f" Highest for {max(apart)[1]} ({number(max(apart)[0])}), lowest for {min(apart)[1]} ({number(min(apart)[0])})." if apart else ""
    )
    alt_text = f"{title}.{extremes}"
    chart = plots.heat(
        rows, steps, plots.category("x", orient="top"), plots.category("y", room_for=names), height=36 * len(names) + 30, numbers=True
    )
    table = FigureTable(title, ("", *names), [[a, *(number(v, 3) for v in row)] for a, row in zip(names, values, strict=True)])
    return Panel(title, plots.svg(chart, alt_text), alt_text), table
