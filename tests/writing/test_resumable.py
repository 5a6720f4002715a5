"""The core of what goes on after a kill: which batches are written, by whom, and what is kept of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emosteer.base.errors import OutOfMemory
from emosteer.base.jsonl import KeyedLog
from emosteer.base.processes import ALONE, part
from emosteer.writing.resumable import Row, halving, missing, remove_parts, rows_of_parts, write_batches
from tests.test_workers import together

KEYS = list("abcdefg")
ORDER = [[2, 0], [1, 3], [4, 5, 6]]


def row(index: int) -> Row:
    return {"text": KEYS[index] * 3}


def test_a_batch_of_which_anything_is_missing_is_wanted_whole() -> None:
    assert missing(ORDER, KEYS, {}) == ORDER
    assert missing(ORDER, KEYS, {"a", "c", "e", "f"}) == [[1, 3], [4, 5, 6]]
    assert missing(ORDER, KEYS, set(KEYS)) == []


def test_what_is_done_is_kept_at_once_and_what_is_there_stays(tmp_path: Path) -> None:
    kept, written, told = KeyedLog(tmp_path / "log"), list[list[int]](), list[int]()
    kept.add({"d": {"text": "first"}})

    def compute(batch: list[int]) -> list[tuple[int, Row]]:
        assert len(KeyedLog(tmp_path / "log").rows) == 1 + sum(map(len, written)) - any(3 in done for done in written)
        written.append(batch)
        return [(i, row(i)) for i in batch]

    twice = [*ORDER, [0, 2]]
    write_batches(twice, KEYS, halving(compute), kept, ALONE, told.append)
    assert written == ORDER and sum(told) == 9, "the last batch holds nothing new"
    assert {key: found["text"] for key, found in kept.rows.items()} == {key: "first" if key == "d" else key * 3 for key in KEYS}
    assert [*kept.rows] == ["d", "c", "a", "b", "e", "f", "g"]


def test_what_does_not_fit_is_halved_and_a_kill_between_the_halves_loses_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = KeyedLog(tmp_path / "log")

    def compute(batch: list[int]) -> list[tuple[int, Row]]:
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        if batch == [5, 6]:
            raise KeyboardInterrupt
        return [(i, row(i)) for i in batch]

    with pytest.raises(KeyboardInterrupt):
        write_batches(ORDER, KEYS, halving(compute), kept, ALONE)
    assert [*KeyedLog(tmp_path / "log").rows] == ["c", "a", "b", "d", "e"]
    assert "out of memory: the batch of 3 replies is halved" in capsys.readouterr().err

    def nothing_fits(batch: list[int]) -> list[tuple[int, Row]]:
        raise torch.OutOfMemoryError

    with pytest.raises(OutOfMemory, match="a single item"):
        write_batches([[0]], KEYS, halving(nothing_fits), KeyedLog(tmp_path / "other"), ALONE)


def test_processes_write_every_batch_once_and_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "log"

    def work(crew: object) -> list[list[int]]:
        mine: list[list[int]] = []
        kept = KeyedLog(part(path, crew.rank))  # type: ignore[attr-defined]
        compute = halving(lambda batch: (mine.append(batch), [(i, row(i)) for i in batch])[1])
        write_batches(ORDER, KEYS, compute, kept, crew)  # type: ignore[arg-type]
        assert rows_of_parts(path, lambda found: str(found["key"])).keys() == set(KEYS), "nobody goes on before all is there"
        return mine

    found = together(3, work)
    assert sorted(batch for mine in found for batch in mine) == sorted(ORDER)
    remove_parts(path)
    assert not list(tmp_path.iterdir())
