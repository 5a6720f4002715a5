"""A small number of the cases of `fuzz_readers.py`: whatever is read is taken or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import fuzz_readers

#: Those that take hundredths of a second; `make fuzz` has them all.
QUICK = [name for name, kind in fuzz_readers.KINDS.items() if kind.cost == 1]


def test_files_that_were_broken_on_purpose_are_taken_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOSTEER_CACHE", str(tmp_path / "cache"))
    counts, faults = fuzz_readers.fuzz(range(20_000, 20_250), QUICK)
    assert not faults
    ends = {end: sum(count for what, count in counts.items() if what.endswith(end)) for end in ("taken", "refused")}
    assert sum(ends.values()) == 250 and min(ends.values()) > 20, "changes that break nothing, or everything, test little"


def test_a_reader_that_lets_something_through_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search itself: a reader with Python's own JSON has faults."""
    import json

    kind = fuzz_readers.KINDS["bank"]
    naive = fuzz_readers.Kind(kind.make, kind.change, lambda path: [json.loads(line)["text"] for line in path.read_text().splitlines()])
    monkeypatch.setitem(fuzz_readers.KINDS, "bank", naive)
    assert len(fuzz_readers.fuzz(range(30), ["bank"])[1]) > 15
