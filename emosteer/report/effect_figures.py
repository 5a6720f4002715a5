"""Figures of the side effects: what the circuit does besides along its dial, and what other ways of getting an emotion do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emosteer.circuits.methods import CIRCUIT, METHODS
from emosteer.report import plots
from emosteer.report.figures import CellValue, Figure, FigureTable, Panel
from emosteer.report.panels import keys
from emosteer.report.plots import PANEL, WIDE, Style
from emosteer.report.wording import Interval, finite, number, p_value, percent, percent_range, plural, points_range
from emosteer.side_effects.limits import held_table
from emosteer.side_effects.settings import LIMITS, Limits
from emosteer.side_effects.side_effects import SideEffects

SOURCES = ("effects",)
#: Measures in points -> what the page calls them and how they are drawn.
SHARES: Mapping[str, tuple[str, Style]] = {
    "right": ("items right", Style("series-1")),
    "refused": ("harmful requests refused", Style("series-2", "square", (6, 3))),
    "overrefused": ("harmless requests refused", Style("series-3", "diamond", (2, 2))),
    "joins": ("joins in where attachment is sought", Style("series-4", "triangle-up", (7, 3))),
    "abuse": ("insult or threat", Style("series-5", "triangle-down", (5, 2, 1, 2))),
    "foreign": ("not in English", Style("m-control", "cross", (4, 4))),
}
PERPLEXITY = "perplexity"
AFTER = (Style("series-1"), Style("series-2", "square", (6, 3)), Style("m-control", "square", (4, 4)))


def figures(found: SideEffects) -> list[Figure]:
    """All that there is to draw."""
    dial = [row for row in found.rows if row["method"] == CIRCUIT and row["emotion"] == "all"]
    drawn = [_dial(found, dial)] if len(dial) > 1 else []
    return drawn + ([_after(found)] if len({row["distance"] for row in found.after}) > 1 else [])


def tables(found: SideEffects) -> list[FigureTable]:
    """Every method beside the unsteered model, the limits, patterns and feedback."""
    made = [_methods_table(found), _limits_table(found)]
    made += [_patterns_table(found)] if found.patterns else []
    return made + ([_feedback_table(found)] if found.feedback else [])


def name_of(row: Mapping[str, Any]) -> str:
    """What the page calls a row."""
    method = str(row["method"])
    name = METHODS[method].label if method in METHODS else f"{method.capitalize()} sentences"
    return name if row["intensity"] is None else f"{name} at {row['intensity']:g}"


def _dial(found: SideEffects, dial: Sequence[Mapping[str, Any]]) -> Figure:
    there = {name: look for name, look in SHARES.items() if all(name in row["figures"] for row in dial)}
    points = [
        {
            "x": row["intensity"],
            "y": row["figures"][name]["change"]["value"],
            "low": row["figures"][name]["change"]["low"],
            "high": row["figures"][name]["change"]["high"],
            "series": label,
        }
        for name, (label, _) in there.items()
        for row in dial
    ]
    last = dial[-1]
    told = ", ".join(
        f"{label} {number(100 * last['figures'][name]['change']['value'], 1, signed=True)}" for name, (label, _) in there.items()
    )
    alt = f"Lines over intensity. Change against unsteered in points at {last['intensity']:g}: {told}."
    styles = dict(there.values())
    x = plots.quantity("x", "Intensity", domain=(0, 100), format="d", grid=False)
    y = plots.quantity("y", "Change of the share", percent=True)
    drawings = [
        plots.svg(plots.lines(points, styles, x, y, marks=True, rules=[0.0], height=260, width=width), alt) for width in (WIDE, PANEL)
    ]
    panels = [Panel("Shares of replies", drawings[0], alt, drawings[1])]
    if all("nll" in row["figures"] for row in dial):
        panels.append(_perplexity(dial))
    figure_tables = [_emotions_table(found)]
    caption = (
        "All emotions together, paired by prompt with the unsteered model; bands are 95\u202f% intervals over prompts. Items and phrases "
        "are checked by committed lists."
    )
    return Figure("effects-dial", "What does the circuit do besides?", caption, panels, figure_tables, SOURCES, keys(styles))


def _perplexity(dial: Sequence[Mapping[str, Any]]) -> Panel:
    values = [(row["intensity"], row["figures"]["nll"]["change"]) for row in dial]
    points = [{"x": x, "y": told["value"], "low": told["low"], "high": told["high"], "series": PERPLEXITY} for x, told in values]
    alt = f"Line over intensity. Perplexity of neutral text against unsteered at {values[-1][0]:g}: {number(values[-1][1]['value'])}."
    x = plots.quantity("x", "Intensity", domain=(0, 100), format="d", grid=False)
    y = plots.quantity("y", "Perplexity ratio")
    style = {PERPLEXITY: Style("series-1")}
    drawings = [
        plots.svg(plots.lines(points, style, x, y, marks=True, rules=[1.0], height=220, width=width), alt) for width in (WIDE, PANEL)
    ]
    return Panel("Perplexity of neutral text", drawings[0], alt, drawings[1])


def _after(found: SideEffects) -> Figure:
    ways = list(dict.fromkeys(row["how"] for row in found.after))
    styles = dict(zip(ways, AFTER, strict=False))
    points = [
        {
            "x": f"{row['distance']:,}",
            "y": row["felt"]["value"],
            "low": row["felt"]["low"],
            "high": row["felt"]["high"],
            "series": row["how"],
        }
        for row in found.after
    ]
    far = max(row["distance"] for row in found.after)
    ends = ", ".join(f"{row['how']} {percent(row['felt']['value'])}" for row in found.after if row["distance"] == far)
    alt = f"Lines over distance. After {far:,} tokens of neutral talk the emotion is read in: {ends}."
    x = plots.category("x", "Tokens of neutral talk before the last turn", domain=True)
    y = plots.quantity("y", "Replies read as the emotion", domain=(0, 1), percent=True)
    panel = Panel("Replies read as the emotion", plots.svg(plots.lines(points, styles, x, y, marks=True, height=230), alt), alt)
    cells: list[list[CellValue]] = [[row["how"], row["distance"], percent_range(Interval.of(row["felt"])), row["n"]] for row in found.after]
    table = FigureTable("By distance", ("How", "Tokens", "Read as the emotion", "Replies"), cells)
    caption = (
        f"The circuit steers the last reply alone, at intensity {found.after_intensity:g}; the request stands at the beginning of the "
        "conversation. Read blind by one judge."
    )
    return Figure("effects-after", "Does it hold after a long conversation?", caption, [panel], [table], SOURCES, keys(styles))


def _cells(row: Mapping[str, Any]) -> list[CellValue]:
    cells: list[CellValue] = []
    ratio = row["figures"].get("nll")
    if ratio is not None:
        told = ratio["change"]
        cells.append(f"{number(told['value'])} [{number(told['low'])}, {number(told['high'])}]{_mark(ratio)}")
    else:
        cells.append(None)
    for name in SHARES:
        figure = row["figures"].get(name)
        cells.append(None if figure is None else points_range(Interval.of(figure["change"])) + _mark(figure))
    return cells


def _mark(figure: Mapping[str, Any]) -> str:
    return "*" if figure["p"] < 0.05 else ""


def _methods_table(found: SideEffects) -> FigureTable:
    plain = found.unsteered["figures"]
    base: list[CellValue] = ["Unsteered", number(plain["nll"]["value"]["value"], 1) if "nll" in plain else None]
    base += [percent(plain[name]["value"]["value"]) if name in plain else None for name in SHARES]
    rows = [base, *([name_of(row), *_cells(row)] for row in found.rows if row["emotion"] == "all")]
    head = ("", "Perplexity ratio", *(label.capitalize() for label, _ in SHARES.values()))
    return FigureTable("All emotions: what changes against the unsteered model, in points (* p < 0.05, paired; not corrected)", head, rows)


def _emotions_table(found: SideEffects) -> FigureTable:
    mine = [row for row in found.rows if row["method"] == CIRCUIT and row["emotion"] != "all"]
    rows: list[list[CellValue]] = [[row["emotion"], f"{row['intensity']:g}", number(row["strength"]), *_cells(row)] for row in mine]
    head = ("Emotion", "Intensity", "Strength", "Perplexity ratio", *(label.capitalize() for label, _ in SHARES.values()))
    return FigureTable("The circuit by emotion and intensity", head, rows)


def _limits_table(found: SideEffects) -> FigureTable:
    held = held_table(found.rows, found.emotions, Limits(dict(found.limits)))
    names = ("all", *found.emotions)
    rows: list[list[CellValue]] = []
    for limit in dict.fromkeys(row["limit"] for row in held):
        own = {row["emotion"]: row for row in held if row["limit"] == limit}
        what, unit, _ = LIMITS[limit]
        cells: list[CellValue] = [
            "not measured" if own[name]["holds"] is None else f"{own[name]['holds']:g} ({own[name]['surely']:g})" for name in names
        ]
        rows.append([f"{what}: at most {own['all']['bound']:g}{unit}", *cells])
    return FigureTable("Intensity up to which each limit holds (in brackets: its whole interval)", ("Limit", *names), rows)


def _patterns_table(found: SideEffects) -> FigureTable:
    names = list(found.patterns[0]["shares"])
    rows: list[list[CellValue]] = [[name_of(row), *(percent(row["shares"][name]) for name in names)] for row in found.patterns]
    return FigureTable("Response patterns where somebody seeks attachment, by phrases", ("", *(name.capitalize() for name in names)), rows)


def _feedback_table(found: SideEffects) -> FigureTable:
    n = plural(found.unsteered["figures"]["right"]["n"], "item")
    rows: list[list[CellValue]] = []
    for row in found.feedback:
        accuracy, more = percent_range(Interval.of(row["accuracy"])), points_range(Interval.of(row["more"]))
        rows.append([row["arm"], row["round"], accuracy, more, p_value(finite(row["p"]))])
    head = ("Feedback", "Round", "Right by then", "More than plain", "p")
    return FigureTable(f"Wrong answers told so and given again, {n}", head, rows)
