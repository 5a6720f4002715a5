"""What `validate` found about a circuit: drops and shares beside random sets, swaps, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emosteer.circuits.validation.findings import ALL
from emosteer.circuits.validation.settings import ENOUGH, RATIO, SPECIFIC
from emosteer.circuits.validation.validation import Validation
from emosteer.report.figures import CellValue, FigureTable
from emosteer.report.wording import Interval, number, number_range, p_value, percent, plural, words

Row = Mapping[str, Any]
KINDS = {"mean": "neutral mean", "resample": "another emotion's prompt", "neutral": "a neutral prompt"}
#: What is measured while an emotion is followed.
FIGURES = {"margin": "nats per token by which the wanted reply is cheaper", "projection": "of the stream on the emotion's directions"}


def tables(found: Validation) -> list[FigureTable]:
    """All that there is to show."""
    made = [
        *(
            _points(found.tables[name], f"{told} ({FIGURES[figure]})", figure)
            for name, told in (
                ("necessary", "Necessary: what is lost when the units are replaced"),
                ("sufficient", "Sufficient: what comes through the units when all others are held"),
            )
            for figure in FIGURES
        ),
        _swaps(found.tables["swaps"]),
        _written(found.tables["written"]),
        _claims(found.tables["claims"]),
    ]
    return [table for table in made if table is not None]


def _range(ends: Sequence[float]) -> str:
    return number_range(Interval(*ends))


def _points(rows: Sequence[Row], caption: str, figure: str) -> FigureTable | None:
    """The mean over emotions at every point."""
    cells: list[list[CellValue]] = []
    for row in (row for row in rows if row["emotion"] == ALL and row["dose"] == 1 and row["figure"] == figure):
        random = [_range(row["random"]), number(row.get("ratio"), 1), p_value(row["p"])] if "random" in row else ["", "", ""]
        others = _range(row["others"]) if "others" in row else ""
        place = f"{row['size']}, by {KINDS.get(row['kind'], row['kind'])} ({row['elicitation']})"
        cells.append([place, _range(row["moved"]), percent(row["share"][0], 0), *random, others])
    head = ("Units", "Circuit", "Share", "Random sets", "Ratio", "p", "Other emotions")
    return FigureTable(caption, head, cells) if cells else None


def _swaps(rows: Sequence[Row]) -> FigureTable | None:
    if len(rows) < 2:
        return None
    names = [row["emotion"] for row in rows]
    cells = [
        [row["emotion"], *(_range(row["own"] if name == row["emotion"] else row["lent"][name]) for name in names), _range(row["random"])]
        for row in rows
    ]
    caption = "Swaps: margin that an emotion's contrasts bring when the heads of the emotion in the column add them, at equal length"
    return FigureTable(caption, ("Contrasts", *names, "random heads"), cells)


def _written(rows: Sequence[Row]) -> FigureTable | None:
    if not rows:
        return None
    cells = [
        [
            f"{row['who']}{'' if row['who'] == 'clean' else ', ' + row['size']}",
            *(_range(row[name]) for name in ("emotion", "answers", "sound")),
        ]
        for row in rows
    ]
    caption = f"{plural(rows[0]['replies'], 'reply', 'replies')} written to prompts that ask for the emotion, read by the judges (shares)"
    return FigureTable(caption, ("Ablated", "Read as what was asked", "Answers", "Sound"), cells)


def _claims(rows: Sequence[Row]) -> FigureTable | None:
    cells = [
        [
            f"{row['figure']}: {row['size']}, by {KINDS.get(row['kind'], row['kind'])} ({row['elicitation']})",
            *(words(row[name]) or "none" for name in ("larger", "apart", "specific")),
            "yes" if row["holds"] else "no",
        ]
        for row in rows
    ]
    caption = f"Is it a circuit? It is where at least {ENOUGH} emotions show all three"
    head = ("Units", f"At least {RATIO:g} times the random sets", "Intervals apart", f"Others below {SPECIFIC:g} of its own", "Holds")
    return FigureTable(caption, head, cells) if cells else None
