"""What is written in batches can be killed at any moment and goes on: the core of the contest's writer and of files of replies.

The last bits of a float depend on a row's neighbours in a batch: a batch is therefore written whole or again, never in part, and what of
it is there already is kept. That is why a killed run ends in the same bytes as one that was not, and several processes in the same as one,
on the same machine, torch and number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from emosteer.base.jsonl import whole_rows
from emosteer.base.processes import Crew, parts
from emosteer.base.progress import Advance, note
from emosteer.models.memory import halve_on_oom

Row = dict[str, Any]
#: Writes a batch (indices of what is wanted); yields what is done, with its index, as soon as it is there.
WriteBatch = Callable[[list[int]], Iterator[list[tuple[int, Row]]]]


class Kept(Protocol):
    """Where rows are kept, each on disk before `add` returns; rows whose key is there already stay as they are. rows: by key."""

    @property
    def rows(self) -> Mapping[str, Row]: ...

    def add(self, rows: Mapping[str, Row]) -> None: ...


def halving(compute: Callable[[list[int]], list[tuple[int, Any]]]) -> Callable[[list[int]], Iterator[list[tuple[int, Any]]]]:
    """How a batch is written that a function computes at once: its halves, where it does not fit in memory."""
    return lambda batch: halve_on_oom(batch, compute, note, "replies")


def missing(order: Iterable[list[int]], keys: Sequence[str], there: Container[str]) -> list[list[int]]:
    """The batches of which anything is not there yet, in their order."""
    return [batch for batch in order if any(keys[i] not in there for i in batch)]


def write_batches(
    wanted: Sequence[list[int]], keys: Sequence[str], write: WriteBatch, kept: Kept, crew: Crew, advance: Advance = lambda rows: None
) -> None:
    """Writes batches, each by the process that claims it, and returns once all are written. All processes call it with the same batches.

    Args:
        keys: by index; kept: this process's own; advance: told how many rows are done.
    """
    for batch in crew.claim(wanted):
        if all(keys[i] in kept.rows for i in batch):  # the same row was wanted twice
            advance(len(batch))
            continue
        for done in write(batch):
            kept.add({keys[i]: row for i, row in done})
            advance(len(done))
    crew.meet()


def rows_of_parts(path: Path, key: Callable[[Row], str]) -> dict[str, Row]:
    """What processes keep or left in the parts of a file, by key; a line that is not whole does not count."""
    return {key(row): row for part in parts(path).values() for row in whole_rows(part)}


def remove_parts(path: Path) -> None:
    """Removes the parts of a file."""
    for part in parts(path).values():
        part.unlink(missing_ok=True)
