"""Tables on stdout. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """Prints a table; numbers are aligned to the right. Where stdout is no terminal it is never cut to a terminal's width."""
    plain: dict[str, Any] = {"file": sys.stdout, "highlight": False, "markup": False, "emoji": False}  # cells are texts, such as replies
    console = Console(**plain)
    if not console.is_terminal:
        console = Console(**plain, width=200)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(show(value) for value in row))
    console.print(table)


def show(value: object) -> str:
    """A cell: floats with three digits after the point (small ones in scientific form)."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if value != 0 and abs(value) < 5e-3 else f"{value:.3f}"
