"""Progress on stderr with time left; plain notes where there is no terminal. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from emosteer.base.processes import rank

#: Advances the bar by a number of steps.
Advance = Callable[[float], None]
_console: Console | None = None


def console() -> Console:
    """The console on stderr; stdout is for results. Of several processes only the first says how far it is."""
    global _console
    if _console is None or _console.file is not sys.stderr:
        _console = Console(file=sys.stderr, highlight=False, soft_wrap=True, quiet=rank() > 0)
    return _console


def note(message: str) -> None:
    """One line for the person who waits."""
    console().print(message, style="dim", markup=False)


@contextmanager
def bar(description: str, total: float, done: int = 0) -> Iterator[Advance]:
    """A progress bar with elapsed time and time left; shown only on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), transient=True, disable=not console().is_terminal) as progress:
        task = progress.add_task(description, total=total, completed=done)
        yield lambda steps: progress.advance(task, steps)
