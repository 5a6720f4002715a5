"""Tables of the contest. No torch and no drawing here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emosteer.report.figures import CellValue, FigureTable
from emosteer.report.measured import Measured
from emosteer.report.wording import (
    DASH,
    MEASURES,
    MINUS,
    Interval,
    finite,
    kind_label,
    label,
    measure,
    number,
    number_range,
    ordered,
    p_value,
    percent,
    percent_range,
    points_range,
    share_range,
)

#: Metrics whose differences are plain numbers, not points of a share.
PLAIN = ("ratio", "median_ratio", "probability", "kept", "n_tokens")


def results_table(contest: Measured) -> FigureTable:
    """The table that everybody looks for: good replies, the worst kind of prompt, what good is made of, and last how replies were counted
    before there was a panel."""
    rows: list[list[CellValue]] = []
    for method, row in contest.results.items():
        get = {name: contest.metric(method, name) for name in MEASURES}
        shares = [share_range(get[name]) for name in ("emotion", "sound", "answers", "names")]
        numbers = [number_range(get[name]) for name in ("probability", "ratio")]
        good, six = share_range(get["good"]), share_range(get["accuracy"])
        rows.append([label(method), good, _worst(contest, method), *shares, *numbers, row.get("missing"), six])
    sizes = sorted({row["n"] for row in contest.results.values() if isinstance(row.get("n"), int)})
    replies = f" and {' or '.join(f'{n:,}' for n in sizes)} replies per method" if sizes else ""
    shares = [f"{measure(name)}, %" for name in ("emotion", "sound", "answers", "names")]
    numbers = [measure(name) for name in ("probability", "ratio")]
    head = ("Method", "Good, %", "Worst kind of prompt, % good", *shares, *numbers, "Not judged", "Six-way, %")
    caption = (
        f"Test split, {contest.size('test') or '?'} prompts{replies}; 95 % intervals in brackets. Six-way, last, is how replies were "
        "counted before there was a panel"
    )
    return FigureTable(caption, head, rows)


def _worst(contest: Measured, method: str) -> str:
    """`question 41.0`."""
    worst = contest.worst_kind(method)
    return DASH if worst is None else f"{kind_label(worst)} {share_range(Interval(contest.part(method, 'by_kind', worst, 'good').value))}"


def extra_table(contest: Measured) -> FigureTable:
    """Everything else that was measured."""
    rows: list[list[CellValue]] = []
    for method, row in contest.results.items():
        cells = [number_range(contest.metric(method, name)) for name in ("median_ratio", "kept")]
        cells += [percent_range(contest.metric(method, name)) for name in ("synonyms", "repetition", "unfinished")]
        rows.append([label(method), *cells, number(finite(row.get("n_tokens")), 1)])
    head = ("Method", *(measure(name) for name in ("median_ratio", "kept", "synonyms", "repetition", "unfinished", "n_tokens")))
    return FigureTable("Further measures, with 95 % intervals where they were computed", head, rows)


#: Columns of the frontier's table.
_AT_A_DOSE = ("good", "ratio", "emotion", "sound", "answers", "names")


def frontier_table(rows: Sequence[Mapping[str, Any]]) -> FigureTable:
    """Every point of the frontier."""
    cells: list[list[CellValue]] = []
    for row in rows:
        get = {name: finite(row.get(name)) for name in ("setting", *_AT_A_DOSE)}
        shares = [percent(get[name]) for name in _AT_A_DOSE[2:]]
        good, six = percent(get["good"]), percent(finite(row.get("accuracy")))
        numbers = [number(get["setting"]), good, number(get["ratio"], 3), *shares, number(finite(row.get("probability"))), six]
        cells.append([label(row["method"]), *numbers, row.get("n")])
    head = ("Method", "Dose", *(measure(name) for name in (*_AT_A_DOSE, "probability", "accuracy")), "Replies")
    return FigureTable("Every point of the frontier; a dose of 1 is the method's default strength", head, cells)


def strength_table(contest: Measured) -> FigureTable | None:
    """The strengths that the development split chose; None where nothing had to be chosen."""
    chosen = contest.raw.get("chosen") or {}
    rows: list[list[CellValue]] = []
    for method in ordered(list(chosen)):
        values = [finite((chosen[method] or {}).get(emotion)) for emotion in contest.emotions]
        if any(value is not None for value in values):
            rows.append([label(method), *(number(value) for value in values)])
    head = ("Method", *(emotion.capitalize() for emotion in contest.emotions))
    return FigureTable("Strengths chosen on the development split", head, rows) if rows else None


def equal_table(contest: Measured) -> FigureTable | None:
    """Two methods at the same cost to the text, as far as the doses allow; None where that was not computed."""
    rows: list[list[CellValue]] = []
    for row in contest.raw.get("equal_ratio") or ():
        ratios = " and ".join(number(finite(row.get(name))) for name in ("ratio_a", "ratio_b"))
        shares = [percent_range(Interval.of(row.get(name))) for name in ("good_a", "good_b")]
        name = f"{label(row['a'])} against {label(row['b'])}"
        rows.append([name, ratios, *shares, points_range(Interval.of(row.get("difference")))])
    head = ("Pair", "Ratios", "Good replies", "of the other", "Difference")
    title = "At the nearest perplexity ratios that the doses allow; development split, which chose the other's strengths and so favours it"
    return FigureTable(title, head, rows) if rows else None


def pair(row: Mapping[str, Any]) -> list[CellValue]:
    """A line of the table of differences."""
    difference, metric = Interval.of(row["difference"]), str(row.get("metric", ""))
    text = number_range(difference, 3) if metric in PLAIN else points_range(difference)
    return [f"{label(row['a'])} {MINUS} {label(row['b'])}", measure(metric), text, p_value(finite(row.get("p"))), row.get("n")]
