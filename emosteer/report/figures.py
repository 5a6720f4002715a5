"""What a section of the page is made of: figures with panels, a table behind each, and the artefacts they come from. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

CellValue = str | int | float | None


@dataclass(frozen=True)
class FigureTable:
    """A data table. rows: the first cell heads the row; cells are written as they are, floats with three digits."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[CellValue]]


@dataclass(frozen=True)
class Panel:
    """One plot. svg: the drawing; narrow: another one for small screens, where a wide drawing would be illegible; alt: what it shows,
    in words, for those who cannot see it."""

    title: str
    svg: str
    alt: str
    narrow: str | None = None


@dataclass(frozen=True)
class Key:
    """One entry of a colour key. paint: the name of a CSS colour variable; kind: "box", "line", "dash", "ring" or "dot"."""

    paint: str
    text: str
    kind: str = "box"


@dataclass(frozen=True)
class Figure:
    """A numbered figure. sources: names of the artefacts it was drawn from; more: panels behind a fold."""

    id: str
    title: str
    caption: str
    panels: Sequence[Panel]
    tables: Sequence[FigureTable]
    sources: Sequence[str]
    keys: Sequence[Key] = ()
    key_title: str = ""
    more: Sequence[Panel] = ()
    more_title: str = ""


@dataclass(frozen=True)
class Absent:
    """Something that could not be shown, and the command that makes it."""

    what: str
    command: str
    why: str = "not found"


@dataclass(frozen=True)
class Section:
    """One section of the page. absent: what is missing here; notes: plain paragraphs; tables, after: open tables before and after the
    figures."""

    id: str
    title: str
    intro: str = ""
    figures: Sequence[Figure] = field(default_factory=tuple)
    tables: Sequence[FigureTable] = field(default_factory=tuple)
    after: Sequence[FigureTable] = field(default_factory=tuple)
    absent: Sequence[Absent] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)
