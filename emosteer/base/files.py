"""Files written whole or not at all, and JSON lines read with the line number in every complaint. No torch here."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emosteer.base import stopping
from emosteer.base.errors import DataError, EmosteerError
from emosteer.base.strict_json import Malformed, loads

#: Seconds during which a temporary file counts as somebody's, locked or not.
FRESH = 60.0
#: Bytes that a text file may have: more would not fit into memory a few times over.
MAX_TEXT = 2**30


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` and renames it into place when the block ends without an exception.

    Raises:
        EmosteerError: if the directory cannot be written or the disk is full; what was at `path` stays as it was.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary = Path(name)
        with os.fdopen(handle, "rb"), stopping.temporary(temporary):
            claim(handle)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            temporary = None
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def claim(handle: int) -> bool:
    """Locks an open file or folder as long as it stays open; False where somebody else has it, or there are no locks."""
    try:
        import fcntl  # not on every system

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def kept_progress(folder: Path) -> Iterator[None]:
    """Makes the folder in which a command keeps its progress, and keeps it to one process or thread while the block runs. The kernel drops
    the lock of a killed process; where a file system has no locks, nobody is kept out.

    Raises:
        EmosteerError: if somebody else is at work in it, or it cannot be made.
    """
    handle = _locked_folder(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if there was nothing to keep
        os.close(handle)


def _locked_folder(folder: Path) -> int:
    """An open folder that nobody else has locked."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise write_error(folder, error) from error
        try:
            import fcntl  # not on every system

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise EmosteerError(f"{folder} is kept by another run that is at work in it; wait for its end, or use another --out") from None
        except FileNotFoundError:
            pass
        except (ImportError, OSError):
            return handle
        os.close(handle)  # it was removed, by the run whose progress it was, before it could be locked


def _sweep(path: Path) -> None:
    """Removes what killed processes left of earlier writings of the same file: whoever is alive holds a lock on its own."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}.part"):  # as tempfile names them
        with contextlib.suppress(OSError), left.open("rb") as file:
            # one that was made a moment ago may not be locked yet
            if time.time() - os.fstat(file.fileno()).st_mtime > FRESH and claim(file.fileno()):
                left.unlink()


def write_error(path: Path, error: OSError) -> EmosteerError:
    """Turns an OSError met while writing `path` into one line that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EmosteerError(f"cannot write {path}: the disk is full; free some space and run the command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return EmosteerError(f"cannot write {path}: no permission; choose another place with --out")
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return EmosteerError(f"cannot write {path}: a part of its path is a file, not a directory")
    if isinstance(error, IsADirectoryError):
        return EmosteerError(f"cannot write {path}: it is a directory; name a file")
    return EmosteerError(f"cannot write {path}: {error.strerror or error}")


def write_text(path: Path, text: str) -> None:
    """Writes text atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_text(path: Path, what: str = "file") -> str:
    """Reads a UTF-8 text file.

    Raises:
        DataError: if it is missing, a directory, unreadable or not UTF-8.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{what} {path} does not exist; check the path")
    if path.is_dir():
        raise DataError(f"expected a {what}, found the directory {path}; name the file inside it")
    try:
        with path.open("rb") as file:  # a pipe is welcome; its end is not in sight
            data = file.read(MAX_TEXT + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > MAX_TEXT:
        raise DataError(f"expected {what} {path} to be at most {MAX_TEXT // 2**20} MiB, found more; split it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: expected UTF-8 text, found byte 0x{data[error.start]:02x}; save it as UTF-8") from error


def read_jsonl(path: Path, what: str = "file", *, may_be_empty: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) for every non-empty line.

    Args:
        may_be_empty: accept a file without any line.

    Raises:
        DataError: naming file and line, if a line is not a JSON object or the file holds no line at all.
    """
    seen = False
    for numbered in parse_jsonl(read_text(path, what), str(path)):
        seen = True
        yield numbered
    if not seen and not may_be_empty:
        raise DataError(f"{what} {path} is empty; expected one JSON object a line")


def parse_jsonl(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) for every non-empty line of a text. name: where it is from, for messages.

    Raises:
        DataError: naming the line, if one is not a JSON object.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = loads(line)
        except Malformed as error:
            raise DataError(f"{name}:{number}: expected a JSON object, found malformed JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{name}:{number}: expected a JSON object, found a {type(row).__name__}")
        yield number, row


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, as hex."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def slug(name: str) -> str:
    """A file-system name for a model: `meta-llama/Llama-3.2-3B` -> `meta-llama--Llama-3.2-3B`."""
    return Path(name.replace("/", "--")).name
