"""Figures of how the directions lie to each other: the map of their first two components, and parents among their children."""

from __future__ import annotations

from collections.abc import Mapping

from emosteer.directions.directions import Directions
from emosteer.directions.geometry import Circumplex, Tested, Tree, geometry
from emosteer.report import plots
from emosteer.report.figures import CellValue, Figure, FigureTable, Panel
from emosteer.report.panels import keys
from emosteer.report.plots import PANEL, WIDE, Style
from emosteer.report.wording import number, percent

SOURCES = ("directions",)
#: Below this p, found by chance in one of twenty random deals, the page says that something is there.
LEVEL = 0.05
OWN, RANDOM = "own children", "random children"
FAMILIES = {OWN: Style("series-1"), RANDOM: Style("m-control", "square")}


def figures(directions: Directions) -> list[Figure]:
    """The map and the tree; nothing where too few emotions have a place, or none is another's parent."""
    found = geometry(directions)
    drawn = []
    if found.circumplex is not None and found.error is not None:
        drawn.append(_map(found.circumplex, found.error))
    if found.tree is not None:
        drawn.append(_tree(found.tree))
    return drawn


def _map(plane: Circumplex, error: Mapping[str, Tested]) -> Figure:
    rows = [
        {
            "x": point[0],
            "y": point[1],
            "text": emotion,
            "tip": plots.tip(f"{emotion}: {number(point[0])}, {number(point[1])}"),
        }
        for emotion, point in zip(plane.emotions, plane.points, strict=True)
    ]
    told = "; ".join(f"{axis} {number(t.value)} against {number(t.null)} at random, {_p(t)}" for axis, t in plane.axes.items())
    alt_text = f"Map of {len(plane.emotions)} emotions. Largest correlation of a component with {told}."
    drawings = [plots.svg(_scatter(rows, plane, width), alt_text) for width in (WIDE, PANEL)]
    panel = Panel("The directions on their first two components", drawings[0], alt_text, drawings[1])
    return Figure("map", "Does the model know the circumplex?", _map_words(plane), [panel], [_points(plane), _nulls(plane, error)], SOURCES)


def _scatter(rows: list[dict[str, object]], plane: Circumplex, width: int) -> plots.Spec:
    """Points with their names; room is left for the names of the outermost."""
    ends = [[min(point[axis] for point in plane.points), max(point[axis] for point in plane.points)] for axis in range(2)]
    room = [0.25 * (high - low) or 1.0 for low, high in ends]
    x, y = (
        plots.quantity(
            field,
            f"Component {axis + 1} ({percent(plane.explained[axis], 0)} of the variance)",
            domain=(ends[axis][0] - room[axis], ends[axis][1] + room[axis]),
        )
        for axis, field in enumerate("xy")
    )
    place = {"x": x, "y": y}
    layers = [
        plots.mark("point", {**place, "description": plots.told()}, size=50, filled=True, opacity=1, color=plots.var("series-1")),
        plots.mark("text", {**place, "text": {"field": "text"}}, dy=-9, fontSize=11 if len(rows) < 12 else 10),
    ]
    return plots.chart(rows, layers, 300 + 10 * len(rows), width)


def _map_words(plane: Circumplex) -> str:
    valence, arousal = plane.axes["valence"], plane.axes["arousal"]
    there = [axis for axis in ("valence", "arousal") if plane.axes[axis].p <= LEVEL]
    verdict = {
        2: "Both are above chance here",
        1: f"Only {there[0] if there else ''} is above chance here",
        0: "Neither is above what places dealt at random give, so that this map shows no circumplex",
    }[len(there)]
    few = " With so few emotions only a large effect could be told from chance." if len(plane.emotions) < 10 else ""
    return (
        f"A model that knew the circumplex would have valence and arousal on the first two components. A component correlates with "
        f"valence by {_with_p(valence)} and with arousal by {_with_p(arousal)}, signs apart. {verdict}; p counts random deals of the "
        f"emotions' places that do as well.{few}"
    )


def _with_p(tested: Tested) -> str:
    return f"{number(tested.value)} ({_p(tested)})"


def _p(tested: Tested) -> str:
    return f"p = {number(tested.p, 3)}" if tested.p >= 0.001 else "p < 0.001"


def _points(plane: Circumplex) -> FigureTable:
    rows: list[list[CellValue]] = [
        [emotion, *(number(value, 3) for value in point)] for emotion, point in zip(plane.emotions, plane.points, strict=True)
    ]
    return FigureTable("Directions on their first two components", ("Emotion", "Component 1", "Component 2"), rows)


def _nulls(plane: Circumplex, error: Mapping[str, Tested]) -> FigureTable:
    axes = plane.axes.items()
    rows: list[list[CellValue]] = [[f"Larger correlation of a component with {axis}", *_cells(tested)] for axis, tested in axes]
    rows.append(["Rank correlation of distances with those in valence and arousal", *_cells(plane.distances)])
    rows += [[f"Error of a linear map to places, left out: {axis}", *_cells(tested)] for axis, tested in error.items()]
    return FigureTable("Directions against places, and places dealt at random", ("Measure", "Found", "Dealt at random", "p"), rows)


def _tree(tree: Tree) -> Figure:
    rows = [
        {
            "label": family.parent,
            "series": series,
            "value": value,
            "low": value,
            "high": value,
            "tip": plots.tip(f"{family.parent}, {series}: {number(value)}"),
        }
        for family in tree.families
        for series, value in ((OWN, family.cosine.value), (RANDOM, family.cosine.null))
    ]
    alt_text = (
        f"Cosine of a parent's direction with the mean of its children's: {number(tree.cosine.value)} in the mean, "
        f"{number(tree.cosine.null)} for random children."
    )
    low = -0.05 + min(0.0, *(min(family.cosine.value, family.cosine.null) for family in tree.families))
    panel = Panel(
        "Cosine with the mean of the children",
        plots.svg(plots.dots(rows, FAMILIES, percent=False, at=0.0, domain=(low, 1.0)), alt_text),
        alt_text,
    )
    cells: list[list[CellValue]] = [[f.parent, ", ".join(f.children), *_cells(f.cosine)] for f in tree.families]
    cells += [["All", "mean cosine", *_cells(tree.cosine)], ["All", "children nearest to their own parent", *_cells(tree.named)]]
    caption = (
        f"A parent's own direction beside the mean of its children's, and beside the mean of as many random children "
        f"({_p(tree.cosine)}). The reverse: {percent(tree.named.value)} of the children are nearest to their own parent, "
        f"{percent(tree.named.null)} where parents are dealt at random ({_p(tree.named)})."
    )
    table = FigureTable("Parents and children", ("Parent", "Children", "Cosine", "Random children", "p"), cells)
    return Figure("tree", "Do parents lie among their children?", caption, [panel], [table], SOURCES, keys(FAMILIES))


def _cells(tested: Tested) -> list[CellValue]:
    return [number(tested.value), number(tested.null), number(tested.p, 4)]
