"""Figures of the contest: the frontier, the test results, differences, good replies by emotion, kind of prompt and valence, confusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emosteer.circuits.methods import METHODS, STEERED
from emosteer.report import plots
from emosteer.report.contest_tables import equal_table, extra_table, frontier_table, pair, results_table, strength_table
from emosteer.report.figures import Figure, FigureTable, Key, Panel
from emosteer.report.measured import Measured
from emosteer.report.plots import PANEL, WIDE, Spec, Steps, Style
from emosteer.report.wording import (
    Interval,
    finite,
    in_sentence,
    kind_label,
    label,
    measure,
    number,
    number_range,
    ordered,
    percent,
    percent_range,
    place,
    plural,
    points_range,
    shortened,
    words,
)

__all__ = ["by_kind", "by_part", "confusion", "differences", "equal_table", "frontier", "outcome", "results_table", "strength_table"]

SOURCES = ("evaluation",)


def style(method: str) -> Style:
    """A method's look; one that is not in the table has a shape of its own."""
    return Style(**vars(METHODS[method].look)) if method in METHODS else Style("m-none", "wedge")


# ---- frontier --------------------------------------------------------------------------------------------------------

#: Perplexity ratios beyond this are in the table alone: text that far gone would flatten the rest of the plot.
RATIO_SHOWN = 3.0


def frontier(contest: Measured) -> Figure:
    """Good replies against perplexity ratio, every method over its strength, on the development split."""
    rows = sorted(contest.frontier(), key=lambda row: (place(row["method"]), finite(row.get("setting")) or 0.0))
    shown = [_point(row) for row in rows if row["ratio"] <= RATIO_SHOWN]
    alt_text = _frontier_words(contest, rows)
    drawings = [plots.svg(_frontier_chart(contest, shown, *size), alt_text) for size in ((WIDE, 430), (PANEL, 470))]
    budget, beyond = contest.budget("ratio"), len(rows) - len(shown)
    caption = (
        "Each line follows one method from weak to strong. Higher is more good replies, further left is more ordinary text: the better "
        f"method lies above and to the left. {f'Dashed: the budget, a ratio of {number(budget)}. ' if budget else ''}"
        f"Development split, {contest.size('dev') or '?'} prompts."
    )
    if beyond:
        caption += f" {plural(beyond, 'point')} beyond a ratio of {number(RATIO_SHOWN, 0)} in the table only."
    panel = Panel("", drawings[0], alt_text, drawings[1])
    return Figure("frontier", "Good replies against the cost to the text", caption, [panel], [frontier_table(rows)], SOURCES)


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    dose = finite(row.get("setting"))
    strength = f", dose {number(dose)}" if dose is not None else ""
    tip = f"{label(row['method'])}{strength}: {percent(row['good'])} good at ratio {number(row['ratio'])}"
    name = label(row["method"])
    return {"method": name, "ratio": row["ratio"], "good": row["good"], "order": dose or 0.0, "tip": plots.tip(tip)}


def _frontier_chart(contest: Measured, points: Sequence[Mapping[str, Any]], width: int, height: int) -> Spec:
    there = {point["method"] for point in points}
    styles = {label(m): style(m) for m in ordered({row["method"] for row in contest.frontier()}) if label(m) in there}
    budget = contest.budget("ratio")
    ratios = [point["ratio"] for point in points] + [budget or 1.0, 1.0]
    x = plots.quantity(
        "ratio",
        "Perplexity ratio (unsteered text = 1)",
        domain=(min(ratios) * 0.98, max(ratios) * 1.03),
        log=True,
        format=".2~f",
        tickCount=9 if width == WIDE else 5,
    )
    y = plots.quantity("good", "Share of good replies", domain=(0, 1), percent=True, tickCount=6)
    legend = {
        "title": None,
        "orient": "top",
        "columns": 5 if width == WIDE else 2,
        "symbolSize": 80,
        "symbolStrokeWidth": 0,
        "columnPadding": 34,
    }
    color, shape = (plots.named("method", styles, look, legend) for look in ("paint", "shape"))
    dash = plots.named("method", styles, "dash")
    line = {"x": x, "y": y, "color": color, "strokeDash": dash, "order": {"field": "order", "type": "quantitative"}}
    point = {"x": x, "y": y, "color": color, "shape": shape, "description": plots.told()}
    layers = [plots.rule("x", budget, (5, 4))] if budget else []
    layers += [plots.mark("line", line, strokeWidth=2), plots.mark("point", point, size=64, filled=True, opacity=1)]
    return plots.chart(points, layers, height, width)


def _frontier_words(contest: Measured, rows: Sequence[Mapping[str, Any]]) -> str:
    limit = contest.budget("ratio")
    best_points = []
    for method in ordered({row["method"] for row in rows}):
        within = [row for row in rows if row["method"] == method and (limit is None or row["ratio"] <= limit)]
        best = max(within, key=lambda row: row["good"], default=None)
        best_points.append(
            f"{label(method)} {percent(best['good'])} good at ratio {number(best['ratio'])}" if best else f"{label(method)} never"
        )
    bound = f" within the budget of {number(limit)}" if limit else ""
    return f"Line chart of the share of good replies against perplexity ratio. Best point of each method{bound}: {'; '.join(best_points)}."


# ---- results on the test split -----------------------------------------------------------------------------------------

METRICS = (
    ("good", "Good replies", True),
    ("emotion", "The emotion is read", True),
    ("sound", "Sound text", True),
    ("answers", "Answers its prompt", True),
    ("names", "Names the emotion", True),
    ("probability", "P(target), mean of the judges", False),
    ("ratio", "Perplexity ratio", False),
    ("accuracy", "Six-way, without neutral: the count of before", True),
)
#: Panels whose axis is the whole of 0 to 1, so that they can be compared.
WHOLE = ("good", "emotion", "answers", "probability", "accuracy")


def outcome(contest: Measured) -> Figure:
    """The chosen settings on the test split: good replies, what they are made of, and cost, with intervals."""
    at = {"accuracy": contest.chance, **{name: contest.budget(name) for name in ("ratio", "names", "sound")}}
    panels = [
        interval_panel(
            title,
            {method: contest.metric(method, metric) for method in contest.results},
            share,
            at.get(metric),
            (0.0, 1.0) if metric in WHOLE else None,
        )
        for metric, title, share in METRICS
    ]
    caption = (
        "Every method at the setting chosen for it on the development split, on test prompts that were read once. Points with 95 % "
        "intervals. A good reply has the emotion, is sound, answers its prompt and does not name the emotion; these parts stand beside it. "
        "Dashed: the limits that settings had to keep on the development split, and chance for six-way, which is how replies were counted "
        "before there was a panel."
    )
    return Figure("outcome", "Results on the test split", caption, panels, [extra_table(contest)], SOURCES)


def interval_panel(
    title: str, intervals: Mapping[str, Interval], share: bool, at: float | None, domain: tuple[float, float] | None = None
) -> Panel:
    """Methods below each other, each a point with its interval. share: percentages; at: a reference line."""
    form = percent_range if share else number_range
    rows = [interval_row(label(m), m, i, f"{label(m)}: {form(i)}") for m, i in intervals.items() if i.value is not None]
    alt_text = f"{title}. " + ("; ".join(row["tip"][1:] for row in rows) or "Nothing was measured") + "."
    if not rows:
        return Panel(title, "", alt_text)
    chart = plots.dots(rows, {m: style(m) for m in intervals}, percent=share, at=at, domain=domain)
    return Panel(title, plots.svg(chart, alt_text), alt_text)


def interval_row(name: str, series: str, interval: Interval, tip: str) -> dict[str, Any]:
    """A row of `plots.dots`; without an interval, its ends are the value."""
    low, high = (interval.value if end is None else end for end in (interval.low, interval.high))
    return {"label": name, "series": series, "value": interval.value, "low": low, "high": high, "tip": plots.tip(tip)}


def differences(contest: Measured) -> Figure | None:
    """Paired differences of good replies; None if there are none."""
    known = [row for row in contest.raw["comparisons"] if Interval.of(row.get("difference")).value is not None]
    shown = [row for row in known if row.get("metric") == "good"]
    if not shown:
        return None
    sides = {a: [row for row in shown if row["a"] == a] for a in ordered({row["a"] for row in shown})}
    panels = [_difference_panel(label(a), rows) for a, rows in sides.items()]
    table = FigureTable("Paired differences, by measure", ("Pair", "Measure", "Difference", "p", "Pairs"), [pair(row) for row in known])
    caption = (
        "Both methods answer the same prompts, so their difference is taken prompt by prompt, with its 95 % interval. An interval that "
        "misses zero, the dashed line, is a difference that was shown."
    )
    return Figure("differences", "Differences of good replies between methods", caption, panels, [table], SOURCES)


def _difference_panel(name: str, rows: Sequence[Mapping[str, Any]]) -> Panel:
    pairs = [(row["b"], Interval.of(row["difference"])) for row in rows]
    drawn = [interval_row(label(b), b, i, f"{name} minus {label(b)}: {points_range(i)}") for b, i in pairs]
    alt_text = f"Differences of good replies. {'; '.join(row['tip'][1:] for row in drawn)}."
    chart = plots.dots(drawn, {b: style(b) for b, _ in pairs}, at=0.0)
    return Panel(f"{name} minus \u2026", plots.svg(chart, alt_text), alt_text)


# ---- by emotion, kind of prompt and valence -----------------------------------------------------------------------------------------


def by_part(contest: Measured, by: str, title: str) -> Figure:
    """Good replies in each emotion or valence, all methods; by: "by_emotion" or "by_valence"."""
    names, methods = contest.parts(by), list(contest.results)
    panels = [
        interval_panel(name.capitalize(), {m: contest.part(m, by, name, "good") for m in methods}, True, None, (0.0, 1.0)) for name in names
    ]
    tables = [_part_table(contest, by, title, names, metric) for metric in ("good", "emotion", "answers", "names", "ratio", "accuracy")]
    what = "the emotion asked for" if by == "by_emotion" else "how the prompt's event turned out, for vivid events, which say how"
    caption = f"Share of good replies to the test prompts, split by {what}, with 95 % intervals."
    return Figure(by.replace("_", "-"), f"Good replies by {title}", caption, panels, tables, SOURCES)


def _part_table(contest: Measured, by: str, title: str, names: Sequence[str], metric: str) -> FigureTable:
    """One measure: methods below each other, parts beside each other."""
    form = number_range if metric == "ratio" else percent_range
    rows = [[label(m), *(form(contest.part(m, by, name, metric)) for name in names)] for m in contest.results]
    return FigureTable(f"{measure(metric)}, by {title}", ("Method", *(kind_label(name).capitalize() for name in names)), rows)


#: What is drawn of each kind of prompt, and how.
KIND_STYLES = {"good": Style("series-1"), "emotion": Style("series-2", "square"), "answers": Style("series-3", "triangle-up")}


def by_kind(contest: Measured) -> Figure:
    """Good replies, emotion and answers for each kind of prompt, the worst above; the main methods open, the others behind a fold."""
    kinds, title = contest.parts("by_kind"), "kind of prompt"
    panels = {method: _kind_panel(contest, method, kinds) for method in contest.results}
    first = main_methods(contest)
    caption = (
        "Each method's replies to every kind of prompt, with 95 % intervals. The kinds stand in one order everywhere: worst first, by the "
        f"good replies of {in_sentence(contest.leading)}. A method that works on scenario-events alone fails here."
    )
    tables = [_part_table(contest, "by_kind", title, kinds, metric) for metric in KIND_STYLES]
    keys = [Key(style.paint, measure(metric), "dot") for metric, style in KIND_STYLES.items()]
    others = [panel for method, panel in panels.items() if method not in first]
    shown = [panels[method] for method in first]
    folded = f"The other methods ({len(others)})"
    return Figure("by-kind", f"Good replies by {title}", caption, shown, tables, SOURCES, keys, more=others, more_title=folded)


def _kind_panel(contest: Measured, method: str, kinds: Sequence[str]) -> Panel:
    rows = []
    for kind in kinds:
        for metric in KIND_STYLES:
            share = contest.part(method, "by_kind", kind, metric)
            if share.value is not None:
                rows.append(interval_row(kind_label(kind), metric, share, f"{kind_label(kind)}, {metric}: {percent_range(share)}"))
    worst = contest.worst_kind(method)
    end = f" Worst: {kind_label(worst)}." if worst is not None else ""
    alt_text = f"{label(method)} by kind of prompt. {'; '.join(row['tip'][1:] for row in rows) or 'Nothing was measured'}.{end}"
    if not rows:
        return Panel(label(method), "", alt_text)
    chart = plots.dots(rows, KIND_STYLES, domain=(0.0, 1.0), apart=True)
    return Panel(label(method), plots.svg(chart, alt_text), alt_text)


def main_methods(contest: Measured) -> list[str]:
    """The methods that are shown first: the steerings and the best prompt, else whichever there is."""
    main = [method for method in (*STEERED, contest.best_prompt) if method in contest.results]
    return [method for method in main if method is not None] or list(contest.results)[:1]


def confusion(contest: Measured) -> Figure:
    """What the panel read where an emotion was asked for; the main methods open, the others behind a fold."""
    steps = Steps.sequential(1.0)
    methods = [m for m, row in contest.results.items() if row.get("confusion")]
    panels = {m: _confusion_panel(contest, m, steps) for m in methods}
    first = [m for m in main_methods(contest) if m in panels] or methods[:1]
    others = [panel for m, panel in panels.items() if m not in first]
    caption = (
        "Rows: the emotion asked for; columns: what the panel, blind to it, read: neutral included, undecided where half of "
        "its judges or more said nothing. Shares of each row in percent; a perfect method fills the diagonal."
    )
    return Figure(
        "confusion",
        "What was asked for and what was seen",
        caption,
        [panels[m] for m in first],
        [_confusion_table(contest, m) for m in methods],
        SOURCES,
        steps.key(".0%"),
        "Share of the row",
        others,
        f"The other methods ({len(others)})",
    )


def _confusion_axes(contest: Measured, method: str) -> tuple[list[str], list[str]]:
    """What was asked for and what was seen, emotions first and in their order."""
    table = contest.results[method]["confusion"]
    seen = list(dict.fromkeys(name for row in table.values() for name in row))
    place = {emotion: index for index, emotion in enumerate(contest.emotions)}
    first = [sorted(names, key=lambda name: place.get(name, len(place))) for names in (table, seen)]
    return first[0], first[1]


def _confusion_panel(contest: Measured, method: str, steps: Steps) -> Panel:
    (targets, judged), table = _confusion_axes(contest, method), contest.results[method]["confusion"]
    rows, columns = [], shortened(judged)
    for target in targets:
        for seen in judged:
            share = finite(table[target].get(seen)) or 0.0
            tip = plots.tip(f"{target} asked for, {seen} seen: {percent(share)}")
            rows.append({"x": columns[seen], "y": target, "value": share, "text": f"{100 * share:.0f}", "tip": tip})
    right = words([f"{target} {percent(finite(table[target].get(target)) or 0.0, 0)}" for target in targets])
    alt_text = f"Confusion of {label(method)}. Share seen as asked for: {right}."
    chart = plots.heat(
        rows, steps, plots.category("x", orient="top"), plots.category("y", room_for=targets), height=30 * len(targets) + 30, numbers=True
    )
    return Panel(label(method), plots.svg(chart, alt_text), alt_text)


def _confusion_table(contest: Measured, method: str) -> FigureTable:
    (targets, judged), table = _confusion_axes(contest, method), contest.results[method]["confusion"]
    rows = [[target, *(percent(finite(table[target].get(seen)) or 0.0) for seen in judged)] for target in targets]
    return FigureTable(f"{label(method)}: asked for (rows), seen (columns)", ("Asked for", *(name.capitalize() for name in judged)), rows)
