"""Figures of the directions: do they carry the emotion, and do they hold across layers, themes, valences and halves of the data?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from emosteer.directions.directions import Directions
from emosteer.models.sites import RESID_POST
from emosteer.report import plots
from emosteer.report.figures import CellValue, Figure, FigureTable, Panel
from emosteer.report.panels import keys, square
from emosteer.report.plots import PANEL, WIDE, Steps, Style
from emosteer.report.wording import number, percent, words

SOURCES = ("directions",)
SHUFFLED = "labels shuffled"
NAMING = {"held-out": Style("series-1"), SHUFFLED: Style("m-control", "square", (4, 4))}
HOLDING = {
    "halves of the data": Style("series-1"),
    "valences": Style("series-2", "square", (6, 3)),
    "themes": Style("series-3", "diamond", (2, 2)),
    SHUFFLED: Style("m-control", "square", (4, 4)),
}
Series = Mapping[str, Sequence[float]]


def evidence(directions: Directions) -> list[Figure]:
    """Naming on held-out groups, and stability; nothing where no evidence was measured."""
    if directions.evidence is None:
        return []
    post = [i for i, site in enumerate(directions.sites) if site.kind == RESID_POST]
    e = directions.evidence
    naming = {"held-out": e.accuracy[post].mean(1).tolist(), SHUFFLED: e.accuracy_shuffled[post].mean(1).tolist()}
    parts = {"halves of the data": e.halves, **e.across, SHUFFLED: e.halves_shuffled}
    return [
        _naming(directions, naming, e.accuracy[post]),
        _holding({name: values[:, post].mean(0).tolist() for name, values in parts.items()}),
    ]


def _panel(title: str, series: Series, styles: Mapping[str, Style], alt_text: str, y: plots.Spec, rules: Sequence[float] = ()) -> Panel:
    """Lines over layers, drawn for a wide and for a narrow screen."""
    rows = [{"x": layer, "y": value, "series": name} for name, values in series.items() for layer, value in enumerate(values)]
    last = max(len(values) for values in series.values()) - 1
    x = plots.quantity("x", "Layer", domain=(0, max(1, last)), format="d", grid=False)
    drawings = [plots.svg(plots.lines(rows, styles, x, y, rules=rules, height=250, width=w), alt_text) for w in (WIDE, PANEL)]
    return Panel(title, drawings[0], alt_text, drawings[1])


def _naming(directions: Directions, series: Series, by_emotion: Tensor) -> Figure:
    held, shuffled = series["held-out"], series[SHUFFLED]
    best = max(range(len(held)), key=held.__getitem__)
    chance = 1 / len(directions.emotions)
    alt_text = (
        f"Lines over layers. The emotion of held-out groups is named right in {percent(held[0])} of cases at layer 0, at most "
        f"{percent(held[best])} at layer {best}, {percent(held[-1])} at the last; with shuffled labels at most {percent(max(shuffled))}."
    )
    y = plots.quantity("y", "Accuracy", domain=(0, 1), percent=True)
    panel = _panel("Naming the emotion of held-out replies", series, NAMING, alt_text, y, [chance])
    rows: list[list[CellValue]] = [
        [layer, percent(held[layer]), percent(shuffled[layer]), *(percent(share) for share in by_emotion[layer].tolist())]
        for layer in range(len(held))
    ]
    head = ("Layer", "Mean", "Labels shuffled", *(emotion.capitalize() for emotion in directions.emotions))
    caption = (
        f"{directions.n_heldout} scenario-events that the directions did not see; the emotion with the largest projection is taken. The "
        f"dashed level line is chance, {percent(chance)}."
    )
    table = FigureTable("Held-out naming per layer, mean and by emotion", head, rows)
    return Figure("naming", "Do the directions carry the emotion?", caption, [panel], [table], SOURCES, keys(NAMING))


def _holding(series: Series) -> Figure:
    means = {name: sum(values) / len(values) for name, values in series.items()}
    cosines = ", ".join(f"{number(mean)} ({name})" for name, mean in means.items())
    alt_text = f"Lines over layers. Mean cosine between directions of parts of the data: {cosines}."
    y = plots.quantity("y", "Cosine", domain=(min(0.0, *map(min, series.values())), 1.0))
    panel = _panel("Cosine between directions of parts of the data", series, HOLDING, alt_text, y)
    n_layers = len(next(iter(series.values())))
    rows: list[list[CellValue]] = [[layer, *(number(values[layer], 3) for values in series.values())] for layer in range(n_layers)]
    table = FigureTable("Cosines per layer, mean over emotions", ("Layer", *(name.capitalize() for name in series)), rows)
    over = [name for name in ("themes", "valences") if name in series]
    caption = (
        "A direction that carries the emotion and not the context stays the same when it is taken from other "
        f"{words(['prompts', *over], 'or')}. With shuffled labels nothing is left to agree on."
    )
    title = f"Do they hold across {words(over or ['halves of the data'])}?"
    return Figure("holding", title, caption, [panel], [table], SOURCES, keys({name: HOLDING[name] for name in series}))


def layer_similarity(directions: Directions) -> Figure:
    """Cosine of a direction between every pair of layers, mean over emotions."""
    vectors = directions.at(RESID_POST).float()
    cosines = (vectors @ vectors.transpose(1, 2)).mean(0).tolist()
    n = len(cosines)
    steps = Steps.sequential(1.0)
    rows = [
        {"x": a, "y": b, "value": cosines[a][b], "tip": plots.tip(f"layers {a} and {b}: {number(cosines[a][b])}")}
        for b in reversed(range(n))
        for a in range(n)
    ]
    near = [cosines[i][i + 1] for i in range(n - 1)] or [1.0]
    alt_text = (
        f"Map of layer by layer. Adjacent layers agree with a mean cosine of {number(sum(near) / len(near))}; the first and the last layer "
        f"with {number(cosines[0][-1])}."
    )
    written = plots.every(range(n), 7)
    x, y = plots.category("x", "Layer", values=written), plots.category("y", "Layer", values=written)
    panel = Panel("Cosine between the layers' directions", plots.svg(plots.heat(rows, steps, x, y, height=PANEL), alt_text), alt_text)
    table = FigureTable(
        "Mean cosine between layers", ("Layer", *map(str, range(n))), [[a, *map(number, row)] for a, row in enumerate(cosines)]
    )
    caption = "Mean over emotions. A block of high cosines means that the model keeps one direction through those layers."
    return Figure("layers", "Do they hold across layers?", caption, [panel], [table], SOURCES, steps.key(".2f"), "Cosine")


def emotion_similarity(directions: Directions, band: Sequence[int]) -> tuple[Panel, FigureTable]:
    """Cosine between the directions of two emotions, mean over a band of layers."""
    vectors = directions.at(RESID_POST)[:, list(band)].float()
    cosines = (vectors[:, None] * vectors[None]).sum(-1).mean(-1)
    return square(directions.emotions, cosines.tolist(), Steps.diverging(1.0), "Cosine between directions")
