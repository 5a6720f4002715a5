"""Tables of the contest. No torch and no drawing here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emosteer.report.figures import CellValue, FigureTable
from emosteer.report.measured import Measured
from emosteer.report.wording import (
    MINUS,
    Interval,
    finite,
    label,
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
    """The table that everybody looks for."""
    rows: list[list[CellValue]] = []
    for method, row in contest.results.items():
        cells: list[CellValue] = [share_range(contest.metric(method, name)) for name in ("accuracy", "match", "names", "sound")]
        cells.insert(2, number_range(contest.metric(method, "ratio")))
        rows.append([label(method), *cells, row.get("missing")])
    sizes = sorted({row["n"] for row in contest.results.values() if isinstance(row.get("n"), int)})
    replies = f" and {' or '.join(f'{n:,}' for n in sizes)} replies per method" if sizes else ""
    head = ("Method", "Accuracy, %", "Match, %", "Perplexity ratio", "Names it, %", "Sound, %", "Not judged")
    return FigureTable(f"Test split, {contest.size('test') or '?'} scenario-events{replies}; 95 % intervals in brackets", head, rows)


def extra_table(contest: Measured) -> FigureTable:
    """Everything else that was measured."""
    rows: list[list[CellValue]] = []
    for method, row in contest.results.items():
        cells = [number_range(contest.metric(method, name)) for name in ("probability", "median_ratio", "kept")]
        cells += [percent_range(contest.metric(method, name)) for name in ("synonyms", "repetition", "unfinished", "on_topic")]
        rows.append([label(method), *cells, number(finite(row.get("n_tokens")), 1)])
    head = ("Method", "P(target)", "Median ratio", "Content kept", "Names or synonyms", "Repetition", "Unfinished", "On topic", "Tokens")
    return FigureTable("Further measures, with 95 % intervals where they were computed", head, rows)


def frontier_table(rows: Sequence[Mapping[str, Any]]) -> FigureTable:
    """Every point of the frontier."""
    cells: list[list[CellValue]] = []
    for row in rows:
        get = {name: finite(row.get(name)) for name in ("setting", "accuracy", "ratio", "probability", "names", "sound")}
        numbers = [
            percent(get["accuracy"]),
            number(get["ratio"], 3),
            number(get["probability"]),
            percent(get["names"]),
            percent(get["sound"]),
        ]
        cells.append([label(row["method"]), number(get["setting"]), *numbers, row.get("n")])
    head = ("Method", "Dose", "Accuracy", "Perplexity ratio", "P(target)", "Names the emotion", "Sound", "Replies")
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
        shares = [percent_range(Interval.of(row.get(name))) for name in ("accuracy_a", "accuracy_b")]
        name = f"{label(row['a'])} against {label(row['b'])}"
        rows.append([name, ratios, *shares, points_range(Interval.of(row.get("difference"))), p_value(finite(row.get("p")))])
    head = ("Pair", "Ratios", "Accuracy", "of the other", "Difference", "p")
    return FigureTable("At the nearest perplexity ratios that the doses allow; development split", head, rows) if rows else None


def pair(row: Mapping[str, Any]) -> list[CellValue]:
    """A line of the table of differences."""
    difference, metric = Interval.of(row["difference"]), str(row.get("metric"))
    text = number_range(difference, 3) if metric in PLAIN else points_range(difference)
    return [f"{label(row['a'])} {MINUS} {label(row['b'])}", metric, text, p_value(finite(row.get("p"))), row.get("n")]
