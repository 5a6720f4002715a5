"""What lies in the cache folder, who needs it, and what can go. No torch at import."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emosteer.base.cache_folder import cache_dir
from emosteer.base.errors import EmosteerError, UsageError, suggest
from emosteer.base.files import FRESH, claim, write_text
from emosteer.base.strict_json import loads

#: How a leftover of a killed process ends.
PART = ".part"


@dataclass(frozen=True)
class Entry:
    """A file or folder of the cache.

    kind: "model", "download", "encoder", "compiled step", "judge", "export", "leftover" or "other"; name: how a command calls it; size:
    bytes; waste: why nothing needs it, empty for what is needed; used: who has it in hand now, empty for nobody. `beside` are small files
    that go with it.
    """

    kind: str
    name: str
    path: Path
    size: int
    waste: str = ""
    used: str = ""
    beside: tuple[Path, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "path": str(self.path), "beside": [str(path) for path in self.beside]}


def entries() -> list[Entry]:
    """Everything in the cache, largest first. Small bookkeeping (locks, `hashes.json`) is left out."""
    root = cache_dir()
    held = _in_hand(root)
    found = [*_converted(root), *_downloads(root), *_encoders(root), *_native(root), *_judges(root), *_exports(root), *_leftovers(root)]
    marked = [_marked(entry, held) for entry in found]
    return sorted(marked, key=lambda entry: (-entry.size, str(entry.path)))


def chosen(found: Sequence[Entry], names: Sequence[str], everything: bool) -> list[Entry]:
    """What is to go: waste alone unless told otherwise.

    Args:
        names: of entries that go, too, as `emosteer cache` prints them; everything: all of it.

    Raises:
        UsageError: for a name that nothing has.
    """
    known = {entry.name for entry in found}
    for name in names:
        if name not in known:
            raise UsageError(f"nothing in the cache is called '{name}'{suggest(name, known)}; `emosteer cache` lists what is there")
    return [entry for entry in found if everything or entry.waste or entry.name in names]


def remove(entry: Entry) -> bool:
    """Removes an entry, whole or not at all as others see it; False where somebody has it in hand by now.

    Raises:
        EmosteerError: if it cannot be removed.
    """
    if _marked(entry, _in_hand(cache_dir())).used:
        return False
    try:
        with _locked(entry.path) as free:
            if not free:
                return False
            _take_away(entry.path)
            for file in entry.beside:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise EmosteerError(f"cannot remove {entry.path}: {error.strerror or error}; check its permissions") from error
    return True


def forget_hashes() -> int:
    """Drops remembered sha256 sums of files that are gone; returns how many."""
    memory = cache_dir() / "hashes.json"
    try:
        known = loads(memory.read_text("utf-8"))
    except (OSError, ValueError):
        return 0
    kept = {path: entry for path, entry in known.items() if Path(path).exists()} if isinstance(known, dict) else {}
    if len(kept) < len(known):
        write_text(memory, json.dumps(kept, indent=1))
    return len(known) - len(kept)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links are not followed."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


# ---- what lies where -------------------------------------------------------------------------------------------------------------


def _converted(root: Path) -> Iterator[Entry]:
    from emosteer.models.weights.gguf import read_manifest

    for folder in sorted((root / "converted").glob("[!.]*")):
        manifest = read_manifest(folder)
        name = folder.name if manifest is None else str(manifest["name"])
        waste = "a conversion that was not finished, or that this version makes again" if manifest is None else ""
        yield Entry("model", name, folder, size_of(folder), waste)


def _downloads(root: Path) -> Iterator[Entry]:
    """Fetched files; one whose conversion is there is needed only to convert it again."""
    from emosteer.models.weights.gguf import manifests
    from emosteer.models.weights.packages import PACKAGED

    done = {manifest["gguf_sha256"] for _, manifest in manifests()}
    sums = {model.file: model.sha256 for model in PACKAGED}
    for file in sorted((root / "downloads").glob("[!.]*")):
        spare = sums.get(file.name) in done
        yield Entry("download", file.name, file, size_of(file), "converted already; fetched again if it is ever needed" if spare else "")


def _encoders(root: Path) -> Iterator[Entry]:
    from emosteer.models.weights.packages import ENCODERS

    names = {encoder.sha256[:16]: encoder.name for encoder in ENCODERS}
    for folder in sorted((root / "encoders").glob("[!.]*")):
        waste = "" if folder.name in names else "an encoder of another version"
        yield Entry("encoder", names.get(folder.name, folder.name), folder, size_of(folder), waste)


def _native(root: Path) -> Iterator[Entry]:
    """Compiled steps. Those of another processor are kept where the cache is shared by machines: they are not told apart from old ones."""
    from emosteer.generation.native.build import place

    found = place()
    ours = None if isinstance(found, str) else found[0]
    for file in sorted((root / "native").glob("step-*.so")):
        waste = "" if file == ours else "of an earlier version, or of another processor that shares this cache"
        yield Entry("compiled step", file.stem, file, size_of(file), waste, beside=(file.with_suffix(".sha256"),))
    for file in sorted((root / "native").glob("step-*.failed")):
        yield Entry("compiled step", file.name, file, size_of(file), "a compilation that failed; without this note it is tried again")


def _judges(root: Path) -> Iterator[Entry]:
    """Opinions of remote judges: they have cost money."""
    for file in sorted((root / "judges").glob("[!.]*.jsonl")):
        yield Entry("judge", file.stem, file, size_of(file))


def _exports(root: Path) -> Iterator[Entry]:
    """Checkpoints for engines that steer by themselves, each as large as its model; made again when they are asked for."""
    for folder in sorted((root / "exports").glob("[!.]*")):
        yield Entry("export", folder.name, folder, size_of(folder))


def _leftovers(root: Path) -> Iterator[Entry]:
    """What killed processes left half done."""
    for path in sorted(root.rglob(f".*{PART}")) if root.exists() else ():
        if any(parent.name.endswith(PART) for parent in path.relative_to(root).parents):
            continue
        with contextlib.suppress(OSError):
            fresh = time.time() - path.lstat().st_mtime <= FRESH
            used = "begun a moment ago" if fresh else "" if _free(path) else "a process that is writing it"
            yield Entry("leftover", path.name, path, size_of(path), "half done, and nobody goes on with it", used)


# ---- who has it in hand ----------------------------------------------------------------------------------------------------------


def _marked(entry: Entry, held: dict[str, str]) -> Entry:
    """The entry, knowing who uses it."""
    place = os.path.realpath(entry.path)
    for path, who in held.items():
        if path == place or path.startswith(place + os.sep):
            return Entry(**{**vars(entry), "used": who})
    if entry.used or entry.kind == "leftover":
        return entry
    with _locked(entry.path) as free:
        return entry if free else Entry(**{**vars(entry), "used": "a process that prepares it"})


def _in_hand(root: Path) -> dict[str, str]:
    """Files of the cache that a running process has open or mapped into its memory -> that process. Asked of Linux; elsewhere nobody can
    be asked, and only locks protect what is in use."""
    found, root = dict[str, str](), root.resolve()
    for process in Path("/proc").glob("[0-9]*") if Path("/proc/self/maps").exists() else ():
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            lines = (process / "maps").read_text("utf-8", errors="replace").splitlines()
            mapped = {line[line.index("/") :] for line in lines if f" {root}{os.sep}" in line}
            opened = {link for fd in (process / "fd").iterdir() if (link := _target(fd)).startswith(f"{root}{os.sep}")}
            if mapped | opened and int(process.name) != os.getpid():
                found |= dict.fromkeys(mapped | opened, f"process {process.name}")
    return found


def _target(link: Path) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return ""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds the lock that whoever prepares this entry takes (`cache_folder.locked`); False where somebody has it."""
    from filelock import FileLock, Timeout

    file = path.parent / f".{path.name}.lock"
    if not file.exists():  # nobody prepares entries of this kind, or never has
        yield True
        return
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError) as error:
        yield not isinstance(error, Timeout)
        return
    try:
        yield True
    finally:
        lock.release()


def _free(path: Path) -> bool:
    """Whether nobody holds the lock that whoever is alive has on what it writes."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return claim(handle)
    finally:
        os.close(handle)


def _take_away(path: Path) -> None:
    """Renames, then removes: nobody ever finds half of a model where a whole one was."""
    if path.is_dir() and not path.is_symlink():
        room = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name.strip('.')}.", suffix=PART))
        os.replace(path, room / "old")
        shutil.rmtree(room)
    else:
        path.unlink()
