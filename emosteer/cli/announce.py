"""What a long command says before it begins, and after; with --dry-run, the first of it alone."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Annotated, NoReturn

import typer

from emosteer.api.costs.cost import Cost, amount, spoken
from emosteer.api.costs.memory import peak
from emosteer.base.processes import rank, world
from emosteer.base.progress import note

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what it would do and how long that takes here.")]


@contextlib.contextmanager
def announced(estimate: Callable[[], Cost], dry_run: bool, as_json: bool = False) -> Iterator[None]:
    """A block of work, with its cost on stderr before it and what it took after it. With `dry_run` the cost goes to stdout, and the command
    ends. Of several processes only the first measures and speaks.

    Args:
        estimate: measures; it takes a share of the time that it speaks of.
    """
    if rank():
        if dry_run:
            raise typer.Exit
        yield
        return
    cost = estimate()
    if dry_run:
        tell(cost, as_json)
    with told(cost):
        yield


@contextlib.contextmanager
def told(cost: Cost) -> Iterator[None]:
    """A block of work between what it will cost and what it took."""
    note(cost.line + (f"; shared by {world()} processes" if world() > 1 else ""))
    begin = time.monotonic()
    yield
    note(f"{cost.command} took {spoken(time.monotonic() - begin)}{_peak()}")


def tell(cost: Cost, as_json: bool) -> NoReturn:
    """All that a dry run says."""
    typer.echo(json.dumps(cost.as_json(), indent=2) if as_json else cost.line)
    raise typer.Exit


def _peak() -> str:
    """The most memory that this process had."""
    size = peak()
    return f" and {amount(size)} of memory at most" if size else ""
