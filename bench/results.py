"""Rows of results: kept one by one as JSON, shown as a table, written as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from emosteer.base.errors import EmosteerError
from emosteer.base.files import read_text, write_text


@dataclass(frozen=True)
class Bar:
    """What a figure must reach: at least, or at most, a limit in a unit ("x", "s", "")."""

    limit: float
    unit: str = "x"
    at_least: bool = True

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g} {self.unit}".strip()

    def met(self, value: float) -> bool:
        """Whether a figure reaches it; a figure that is not a number does not."""
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Row:
    """One measured figure. id: "family.name"; value: None where it could not be measured, `note` says why; spread: over the rounds."""

    id: str
    what: str
    value: float | None
    unit: str = "x"
    bar: str = ""
    met: bool | None = None
    spread: str = ""
    note: str = ""
    command: str = ""
    machine: str = ""
    date: str = ""
    quick: bool = False

    @classmethod
    def of(
        cls, id: str, what: str, value: float | None, bar: Bar | None = None, *, unit: str = "x", spread: object = "", note: str = ""
    ) -> Row:
        """A row judged by its bar; where nothing was measured, a bar is not met."""
        met = None if bar is None else value is not None and bar.met(value)
        return cls(id, what, value, bar.unit if bar else unit, str(bar or ""), met, str(spread), note)

    @property
    def family(self) -> str:
        """The part of the benchmark it belongs to."""
        return self.id.split(".")[0]

    @property
    def figure(self) -> str:
        """The value as it is read."""
        if self.value is None:
            return "not measured"
        size = abs(self.value)
        form = ".1e" if 0 < size < 1e-3 else ".3f" if size < 10 else ".0f" if size < 1000 else ",.0f"
        text = format(self.value, form)
        return f"{text} {self.unit}".strip()

    @property
    def verdict(self) -> str:
        """ "met", "not met", or nothing where there is no bar."""
        return "" if self.met is None else "met" if self.met else "not met"


class Results:
    """All rows so far, in the order of the families; every `put` is on disk at once."""

    def __init__(self, folder: Path, families: Sequence[str]) -> None:
        """Reads what earlier runs left in the folder.

        Raises:
            EmosteerError: if the file is there but is none of ours.
        """
        self.folder, self.families = folder, list(families)
        self.rows: dict[str, Row] = {}
        self.machines: dict[str, dict[str, Any]] = {}
        if self.json_file.exists():
            self._read()

    @property
    def json_file(self) -> Path:
        """Where the rows are kept."""
        return self.folder / "results.json"

    @property
    def markdown_file(self) -> Path:
        """Where the table is."""
        return self.folder / "RESULTS.md"

    def _read(self) -> None:
        known = {field.name for field in fields(Row)}
        try:
            found = json.loads(read_text(self.json_file))
            self.rows = {row["id"]: Row(**{k: v for k, v in row.items() if k in known}) for row in found["rows"]}
            self.machines = dict(found["machines"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EmosteerError(f"{self.json_file} is not a file of results; remove it and run the benchmark again") from error

    def put(self, row: Row, machine: dict[str, Any]) -> None:
        """Adds or replaces a row and writes both files."""
        self.rows[row.id] = row
        self.machines[row.machine] = machine
        self.write()

    def drop_stale(self, family: str, written: Iterable[str]) -> None:
        """Removes rows of a family that its last whole run did not write."""
        written = set(written)
        self.rows = {name: row for name, row in self.rows.items() if row.family != family or name in written}
        self.write()

    def ordered(self) -> list[Row]:
        """Rows by family, in the order in which they were measured."""
        rank = {name: index for index, name in enumerate(self.families)}
        return sorted(self.rows.values(), key=lambda row: rank.get(row.family, len(rank)))

    def write(self) -> None:
        """Writes both files, each whole or not at all."""
        rows = self.ordered()
        used = {row.machine for row in rows}
        self.machines = {name: facts for name, facts in self.machines.items() if name in used}
        kept = {"rows": [asdict(row) for row in rows], "machines": self.machines}
        write_text(self.json_file, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        write_text(self.markdown_file, markdown(rows, self.machines))


def markdown(rows: Sequence[Row], machines: dict[str, dict[str, Any]]) -> str:
    """The page: machines, then one table."""
    judged = [row for row in rows if row.met is not None]
    lines = ["# Benchmark results", "", "Written by `make bench`; how it is measured: [docs/SPEED.md](../docs/SPEED.md).", ""]
    lines += [f"{sum(bool(row.met) for row in judged)} of {len(judged)} bars met.", ""]
    for name, facts in machines.items():
        lines += [f"Machine {name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()) + ".", ""]
    lines += ["| what | figure | range of rounds | bar | met | note | again with |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        note = "; ".join(part for part in (row.note, "quick run" if row.quick else "", f"machine {row.machine}, {row.date}") if part)
        cells = [row.what, f"**{row.figure}**", row.spread, row.bar, row.verdict, note, f"`{row.command}`"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def show(rows: Sequence[Row], console: Console | None = None) -> None:
    """Prints the table on stdout; where that is no terminal, wide enough for every cell."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=220)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("row", "what", "figure", "range", "bar", "met", "note"):
        table.add_column(name, overflow="fold")
    for row in rows:
        style = {True: "green", False: "red"}.get(row.met, "") if row.met is not None else ""
        note = f"{row.note} (quick run)".strip() if row.quick else row.note
        table.add_row(row.id, row.what, row.figure, row.spread, row.bar, f"[{style}]{row.verdict}[/]" if style else row.verdict, note)
    console.print(table)
