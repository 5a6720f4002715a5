"""The cache folder: where it is, a lock for one worker at a time, nothing half done left in it, and the remembered sha256 of big files."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emosteer.base import files, stopping
from emosteer.base.errors import EmosteerError, ModelError
from emosteer.base.files import claim, sha256_file, write_error, write_text
from emosteer.base.ownership import stranger
from emosteer.base.strict_json import loads

if TYPE_CHECKING:
    from filelock import BaseFileLock

#: What a file system answers that has no locks (some network mounts).
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_LONG_HASH = 2**30  # bytes; reading more than this takes long enough to be worth a word
Say = Callable[[str], None]


def cache_dir() -> Path:
    """$EMOSTEER_CACHE, or `emosteer` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    if chosen := os.environ.get("EMOSTEER_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "emosteer"


def make_folder(path: Path) -> Path:
    """Makes a folder of the cache, and those above it that are missing; others may read but not write, whatever the umask says."""
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            folder.mkdir(mode=0o755, exist_ok=True)
    return path


def stranger_in_cache(path: Path) -> str | None:
    """Why what lies at a path of the cache cannot be believed: somebody else could have put it there (`ownership.stranger`). Whoever
    names a cache folder with $EMOSTEER_CACHE trusts its owner."""
    folder, chosen = cache_dir(), None
    if os.environ.get("EMOSTEER_CACHE"):
        with contextlib.suppress(OSError):
            chosen = folder.stat().st_uid
    return stranger(path, chosen)


def require_trusted(path: Path) -> None:
    """Refuses weights in the cache that somebody else could have exchanged.

    Raises:
        ModelError: naming the place and what to do.
    """
    if why := stranger_in_cache(path):
        raise ModelError(
            f"the cache cannot be trusted: {why}, so that the weights could be exchanged; run `chmod go-w` there, or set EMOSTEER_CACHE to "
            "a folder of your own"
        )


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A temporary sibling of `folder`, gone when the block ends (unless renamed). Those of killed processes are cleared first."""
    _clear_abandoned(folder)
    path = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        with stopping.temporary(path), _held(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Locks a folder while the block runs; False where somebody else has it, or folders cannot be locked."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield claim(handle)
    finally:
        os.close(handle)


def _clear_abandoned(folder: Path) -> None:
    """Removes what killed processes left of `scratch`: whoever is alive holds a lock on its own."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.{'?' * 8}.part"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > files.FRESH:
                with _held(left) as abandoned:
                    shutil.rmtree(left, ignore_errors=True) if abandoned else None


@contextlib.contextmanager
def locked(folder: Path, say: Say) -> Iterator[None]:
    """One process or thread at a time works on `folder`. The kernel drops the lock of a killed process; what it left is swept."""
    from filelock import FileLock

    make_folder(folder.parent)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    if _acquired(lock, say):
        _sweep(folder)
    try:
        yield
    finally:
        lock.release()


def _sweep(folder: Path) -> None:
    """Removes what killed processes left beside the folder: of its own, whose lock is held, and of others that nobody works on."""
    from filelock import FileLock, Timeout

    for left in folder.parent.glob(".*.part"):
        name = left.name[1:].rsplit(".", 2)[0]
        if name == folder.name:
            shutil.rmtree(left, ignore_errors=True)
            continue
        with contextlib.suppress(Timeout, OSError), FileLock(folder.parent / f".{name}.lock", timeout=0):
            shutil.rmtree(left, ignore_errors=True)


def _acquired(lock: BaseFileLock, say: Say) -> bool:
    """Takes the lock, waiting as long as it takes; False on file systems that have none: there two conversions at once waste work,
    and the rename still keeps the result whole."""
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("waiting for another process that prepares the same model")
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns trouble with writing the cache into one line."""
    try:
        yield
    except (OSError, EmosteerError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(error, ModelError) or not isinstance(cause, OSError):
            raise
        if cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            where = cause.filename or folder
            raise ModelError(f"cannot write {where}: no permission; set EMOSTEER_CACHE to a folder that can be written") from error
        raise ModelError(f"{write_error(folder, cause)} (EMOSTEER_CACHE chooses another place)") from error


def remembered_sha256(path: Path, say: Say) -> str:
    """SHA-256 of a file, remembered in the cache by its path, size and modification time. A cache that cannot be written is no error, and
    one that others can write to is not asked, since what it remembers decides what is trusted."""
    path = path.resolve()
    stat = path.stat()
    memory = cache_dir() / "hashes.json"
    entry = _believed(memory).get(str(path))
    if isinstance(entry, list) and entry[:2] == [stat.st_size, stat.st_mtime_ns] and isinstance(entry[-1], str):
        return entry[-1]
    if stat.st_size > _LONG_HASH:
        say(f"taking the sha256 of {path.name} ({megabytes(stat.st_size)}, once)")
    sha256 = sha256_file(path)
    with contextlib.suppress(EmosteerError, OSError):  # an entry lost to another writer costs one more reading, nothing else
        make_folder(memory.parent)
        write_text(memory, json.dumps({**_believed(memory), str(path): [stat.st_size, stat.st_mtime_ns, sha256]}, indent=1))
    return sha256


def _believed(memory: Path) -> dict[str, Any]:
    """What is remembered, unless others can write it: that is neither used nor handed on."""
    if stranger_in_cache(memory):
        return {}
    with contextlib.suppress(OSError, ValueError):
        entries = loads(memory.read_text("utf-8"))
        return entries if isinstance(entries, dict) else {}
    return {}


def silent(_: str) -> None:
    """Discards progress that nobody asked for."""


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
