"""A JSON-lines file that grows line by line and survives being killed at any moment. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emosteer.base.errors import DataError, EmosteerError, UsageError
from emosteer.base.files import parse_jsonl, read_jsonl, write_error
from emosteer.base.strict_json import loads


class JsonlLog:
    """Appends JSON objects, each on disk before `append` returns. Opening it again cuts off a line that a kill left torn.

    rows: what the file held when it was opened.
    """

    def __init__(self, path: Path, *, first_key: str | None = None) -> None:
        """Opens or creates the file.

        Args:
            first_key: the key that every line starts with. A torn line that starts otherwise is then not ours: the file is refused
                as one of another kind, and stays as it is.

        Raises:
            EmosteerError: if it cannot be written. UsageError: if the path is none of a file. DataError: if it holds something
                other than JSON lines; it stays as it is.
        """
        self.path = Path(path)
        try:
            self._created = not self.path.exists()
            if not self._created and not self.path.is_file():
                raise UsageError(f"expected --out to name a file, found {self.path}, which is none")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("ab").close()  # no permission? say so before anything is computed or paid for
            _mend(self.path, b"{" if first_key is None else b"{" + json.dumps(first_key, ensure_ascii=False).encode())
        except OSError as error:
            raise write_error(self.path, error) from error
        self.rows: list[dict[str, Any]] = [row for _, row in read_jsonl(self.path, "output file", may_be_empty=True)]
        self._size = self.path.stat().st_size

    def append(self, *rows: dict[str, Any]) -> None:
        """Adds objects; several at once cost as much as one.

        Raises:
            EmosteerError: if the disk is full or somebody else wrote to the file; what was accepted before stays.
        """
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if not self.path.exists() or self.path.stat().st_size != self._size:
            raise EmosteerError(f"{self.path} was changed by somebody else while it was being written; run one command per file")
        try:
            with self.path.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._size)  # what fitted of them; failing that, the next run cuts it off
            raise write_error(self.path, error) from error
        self._size += len(lines)

    def close(self) -> None:
        """Removes the file if it was created here and nothing was added, by whomever: several commands may keep to one file."""
        with contextlib.suppress(OSError):
            if self._created and self.path.stat().st_size == 0:
                self.path.unlink()


class KeyedLog:
    """A log whose rows are looked up by their "key"; the first of a key counts. Safe to add to from several threads.

    rows: key -> row, those added since included.
    """

    def __init__(self, path: Path) -> None:
        """Opens or creates the file.

        Raises:
            DataError: if it holds rows without a key. Otherwise as `JsonlLog`.
        """
        self.path = Path(path)
        self._log, self._lock = JsonlLog(path, first_key="key"), threading.Lock()
        self.rows: dict[str, dict[str, Any]] = {}
        for row in self._log.rows:
            if not isinstance(row.get("key"), str):
                raise DataError(f"expected every line of {path} to have a 'key', found {json.dumps(row)[:60]}; move the file away")
            self.rows.setdefault(row["key"], row)

    def close(self) -> None:
        """Removes the file if it was created here and nothing was added."""
        self._log.close()

    def add(self, rows: Mapping[str, dict[str, Any]]) -> None:
        """Keeps rows by key, except those whose key is there already."""
        with self._lock:
            new = {key: {"key": key, **row} for key, row in rows.items() if key not in self.rows}
            if new:
                self._log.append(*new.values())
                self.rows |= new


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a log that another process writes or wrote: an incomplete last line is ignored, and the file is not changed.

    Raises:
        DataError: if it holds something other than JSON lines.
    """
    try:
        text = path.read_bytes().rpartition(b"\n")[0].decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; move the file away") from error
    return [row for _, row in parse_jsonl(text, str(path))]


def _mend(path: Path, start: bytes) -> None:
    """Cuts off a torn last line that begins like ours; ends a whole one that lacks its line break. The tear may split a character; where
    the power failed, the file may have grown already, with nothing in its new part."""
    data = path.read_bytes()
    at = data.rfind(b"\n") + 1
    tail = data[at:]
    if not tail.strip() or not _only_rows(data[:at]):  # a file that is not ours is left alone; reading it reports the line
        return
    try:
        whole = isinstance(loads(tail), dict)
    except ValueError:
        if not tail.strip(b"\0 \t\r") or tail.startswith(start) or start.startswith(tail):
            os.truncate(path, at)
        return
    if whole:
        with path.open("ab") as file:
            file.write(b"\n")


def _only_rows(data: bytes) -> bool:
    """Whether every line is a JSON object."""
    try:
        return all(isinstance(loads(line), dict) for line in data.split(b"\n") if line.strip())
    except ValueError:
        return False
