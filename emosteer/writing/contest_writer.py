"""The contest's writers: every method answers the same prompts, at the same decoding and seeds.

Each reply is kept on disk as soon as it is there; a killed run goes on and ends in the same bytes (`resumable`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from emosteer.base.files import read_text, sha256_text, write_text
from emosteer.base.jsonl import KeyedLog, whole_rows
from emosteer.base.processes import ALONE, Crew, parts
from emosteer.base.progress import bar, note
from emosteer.base.strict_json import loads
from emosteer.circuits.methods import METHODS, NONE
from emosteer.generation.decoding import Decoding
from emosteer.generation.fluency import reply_nll
from emosteer.generation.generate import Reply, Request, batches
from emosteer.generation.steering import SteeringPlan
from emosteer.judges.choosing.chooser import Chooser
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.scenarios.examples import Examples, shown
from emosteer.scenarios.scenarios import Group, GroupKey, Message
from emosteer.writing.best_of import Asked, rows_of, write_batch
from emosteer.writing.jobs import asked_request
from emosteer.writing.resumable import Row, WriteBatch, halving, missing, write_batches
from emosteer.writing.settings import CONTEST_BATCH_SIZE


@dataclass(frozen=True)
class Cell:
    """One reply of the contest. emotion: "none" for the unsteered reply, which counts for every emotion; strength: None for prompts."""

    group: Group
    emotion: str
    method: str
    strength: float | None = None


def cells_of(method: str, groups: Sequence[Group], strengths: Mapping[str, float | None]) -> list[Cell]:
    """A method's replies: one per scenario-event and emotion, or one per scenario-event where nothing is steered.

    Args:
        strengths: emotion -> strength.
    """
    if method == NONE:
        return [Cell(group, NONE, NONE) for group in groups]
    return [Cell(group, emotion, method, strength) for group in groups for emotion, strength in strengths.items()]


@dataclass(frozen=True, eq=False)
class ContestWriter:
    """Who writes, and how. vectors: method -> site -> [emotion, d_model], what it adds at strength 1; added: method -> hash of that;
    crew: the processes that share the batches: process 0 holds the contest, the others `serve` it, with a file of their own each; fluent:
    whether replies are read again for their nats per token; examples: stand before the prompts of what steers, and of the prompt that shows
    them; chooser: who chooses where the decoding writes several candidates, of every method alike."""

    model: Model
    emotions: tuple[str, ...]
    vectors: Mapping[str, Mapping[Site, Tensor]]
    added: Mapping[str, str]
    decoding: Decoding
    instruction: str
    replies: KeyedLog
    batch_size: int = CONTEST_BATCH_SIZE
    crew: Crew = ALONE
    fluent: bool = True
    examples: Examples = field(default_factory=dict)
    chooser: Chooser | None = None
    _prompts: dict[tuple[str, Group], Request] = field(default_factory=dict)

    def key(self, cell: Cell) -> str:
        """A hash of everything that shapes the reply."""
        parts = [
            self.model.sha256,
            self.model.template_sha256,
            self.model.precision,
            self.added.get(cell.method, ""),
            self.decoding.shaping,
            self.instruction,
            [cell.method, cell.emotion, cell.strength, str(cell.group.key), self.request(cell).ids],
            *([self.chooser.key, cell.group.said] if self.chooser is not None else []),
        ]
        return sha256_text(json.dumps(parts, sort_keys=True))

    def request(self, cell: Cell) -> Request:
        """The prompt. The seed is drawn from the scenario-event alone, so that all methods and emotions meet the same chances."""
        elicitation = METHODS[cell.method].elicitation
        group, guides = cell.group, self.decoding.guides
        shows = self.shows(cell)
        asked = f"{cell.method}/{cell.emotion}" if elicitation else cell.emotion if shows else ""
        place = asked, group  # by its text, too: two files may hold one key
        if place not in self._prompts:  # most prompts are met many times: with every method, emotion and strength
            turns = shown(self.examples, [cell.emotion], self.instruction) if shows else ()
            self._prompts[place] = asked_request(
                self.model, str(group.key), elicitation, group.text, cell.emotion, self.instruction, group.earlier, guides, turns
            )
        return self._prompts[place]

    def shows(self, cell: Cell) -> bool:
        """Whether examples of the emotion stand before a reply's prompt."""
        method = METHODS[cell.method]
        return cell.emotion in self.examples and (method.shows or (method.steers and (cell.strength or 0.0) > 0))

    def plan(self, cells: Sequence[Cell]) -> SteeringPlan:
        """What is added per row; the methods may differ from row to row, a site that a method does not use adds zero."""
        vectors: dict[Site, Tensor] = {}
        for row, cell in enumerate(cells):
            for site, value in self.vectors.get(cell.method, {}).items():
                added = vectors.setdefault(site, torch.zeros(len(cells), value.shape[-1]))
                added[row] = value[self.emotions.index(cell.emotion)] * (cell.strength or 0.0)
        return SteeringPlan(vectors, len(cells))

    def write(self, cells: Sequence[Cell], what: str) -> list[Row]:
        """The replies to all cells, in their order, with their nats per token under the unsteered model (None for an empty one, or where
        nobody wants to know).

        Batches hold one method each: another method in the contest leaves the batches of the others, and what is kept of them, alone.

        Args:
            what: for the progress bar.
        """
        keys = [self.key(cell) for cell in cells]
        done = sum(key in self.replies.rows for key in keys)
        if 0 < done < len(keys):
            note(f"{what}: going on, {done} of {len(keys)} replies are there")
        order = list(self._batches(cells))
        with bar(f"{what} (replies)", len(cells)) as advance:
            if not self.crew.alone:
                self._share(cells, keys, missing(order, keys, self.replies.rows))
            wanted = missing(order, keys, self.replies.rows)
            advance(len(cells) - sum(map(len, wanted)))
            write_batches(wanted, keys, self._writing(cells), self.replies, ALONE, advance)
        return [self.replies.rows[key] for key in keys]

    def _batches(self, cells: Sequence[Cell]) -> Iterator[list[int]]:
        """Indices of cells, one method per batch."""
        for method in dict.fromkeys(cell.method for cell in cells):
            mine = [i for i, cell in enumerate(cells) if cell.method == method]
            for index in batches([self.request(cells[i]) for i in mine], rows_of(self.batch_size, self.decoding)):
                yield [mine[i] for i in index]

    # ---- several processes -----------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Writes its share of whatever process 0 wants written, until that says that the contest is over."""
        path = self.replies.path
        while self.crew.hear() == "write":
            cells, wanted = _read_work(self._work)
            kept = KeyedLog(path)  # opened anew: process 0 has taken over what was in it
            write_batches(wanted, [self.key(cell) for cell in cells], self._writing(cells), kept, self.crew)
        if path.is_file() and not path.stat().st_size:
            path.unlink()

    def adopt(self) -> None:
        """Takes over what other processes wrote, of this run or of one that was killed."""
        for number, path in parts(self.replies.path).items():
            if number and self.crew.lead:
                self.replies.add({row["key"]: row for row in whole_rows(path)})
                path.unlink(missing_ok=True)

    @property
    def _work(self) -> Path:
        return self.replies.path.with_name("replies-to-write.json")

    def _share(self, cells: Sequence[Cell], keys: Sequence[str], wanted: Sequence[list[int]]) -> None:
        """Has all processes write the batches that are missing, and takes over what they wrote."""
        if not wanted:
            return
        self.crew.kept = lambda: (
            f"{sum(key in self.replies.rows for key in keys)} of {len(keys)} replies and more are kept in {self.replies.path}*"
        )
        _write_work(self._work, cells, wanted)
        self.crew.tell("write")
        write_batches(wanted, keys, self._writing(cells), self.replies, self.crew)
        self._work.unlink(missing_ok=True)
        self.adopt()

    # ---- one batch -------------------------------------------------------------------------------------------------

    def _writing(self, cells: Sequence[Cell]) -> WriteBatch:
        """How batches of cells are written."""

        def compute(batch: list[int]) -> list[tuple[int, Row]]:
            members = [cells[i] for i in batch]
            requests = [self.request(cell) for cell in members]
            asked = [Asked(cell.group.said, () if cell.emotion == NONE else (cell.emotion,)) for cell in members]
            replies = write_batch(self.model, requests, self.plan(members), self.decoding, asked, self.chooser)
            costs = reply_nll(self.model, [reply.text for reply in replies]) if self.fluent else [math.nan] * len(replies)
            return [(i, _row(cells[i], reply, cost)) for i, reply, cost in zip(batch, replies, costs, strict=True)]

        return halving(compute)


def _row(cell: Cell, reply: Reply, nll: float) -> Row:
    """What is kept of a reply. nll: nats per token under the unsteered model, NaN for an empty one."""
    return {
        "method": cell.method,
        "emotion": cell.emotion,
        "strength": cell.strength,
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "n_tokens": reply.n_tokens,
        "nll": None if math.isnan(nll) else nll,
    }


def _write_work(path: Path, cells: Sequence[Cell], wanted: Sequence[list[int]]) -> None:
    """What is to be written, for the other processes. wanted: batches of indices of the cells."""
    rows = [[*astuple(cell.group), cell.emotion, cell.method, cell.strength] for cell in cells]
    write_text(path, json.dumps({"cells": rows, "batches": wanted}))


def _read_work(path: Path) -> tuple[list[Cell], list[list[int]]]:
    found = loads(read_text(path, "list of replies to write"))
    cells = [
        Cell(Group(GroupKey(*key), theme, text, kind, tuple(Message(*turn) for turn in earlier)), emotion, *how)
        for key, theme, text, kind, earlier, emotion, *how in found["cells"]
    ]
    return cells, found["batches"]
