"""Compiles `step.cpp` once for this machine and loads it. Where that cannot be done, the step in torch is used and nothing breaks."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from emosteer.base.cache_folder import cache_dir, make_folder
from emosteer.base.errors import EmosteerError
from emosteer.base.files import sha256_file, write_text
from emosteer.base.ownership import stranger
from emosteer.base.progress import note

SOURCE = Path(__file__).with_name("step.cpp")
#: -fopenmp: the threads are torch's own, which this build of the library finds loaded under the same name.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno")
#: Seconds that the compiler may take; it needs about two.
PATIENCE = 120
#: Set to 0 to do without.
SWITCH = "EMOSTEER_NATIVE"
#: Why there is none on a machine that could have one.
NO_COMPILER = "no C++ compiler"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step; None where it is switched off, the machine is none of those it is written for, or nothing can compile it."""
    found = place()
    return None if isinstance(found, str) else _load(*found)


def place() -> tuple[Path, str] | str:
    """Where this machine's library lies, or would, and the compiler that makes it; else why there is none, in a few words."""
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"written for Linux on x86-64, found {platform.system()} on {platform.machine()}"
    compiler, processor = _compiler(), _processor()
    if not {"avx2", "fma"} <= set(processor.split()):
        return "written for processors with AVX2 and FMA"
    if compiler is None:
        return NO_COMPILER
    parts = [SOURCE.read_text(encoding="utf-8"), *FLAGS, compiler, processor]
    name = f"step-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}"
    return cache_dir() / "native" / f"{name}.so", compiler


def _load(path: Path, compiler: str) -> ctypes.CDLL | None:
    """What failed once is not tried again for the same source, compiler and processor: a note stays beside where the library would be.

    A library is code, so it is loaded only from a folder that nobody but the user (and root) can write to, and only if its bytes are those
    that were compiled: others are compiled again.
    """
    if why := stranger(path):
        note(f"the compiled writing step is left out: {why}; torch's own is slower. Set EMOSTEER_CACHE to a folder that is yours alone")
        return None
    failed = path.with_suffix(".failed")
    if failed.exists():
        return None
    try:
        if not _is_whole(path):
            note("compiling the writing step for this processor (once)")
            build(path, compiler)
        return ctypes.CDLL(str(path))
    except (OSError, EmosteerError, subprocess.SubprocessError) as error:
        reason = _reason(error)
        note(f"the writing step cannot be compiled ({reason}); torch's own is used, which is slower. {SWITCH}=0 says so without trying")
        with contextlib.suppress(OSError):
            failed.write_text(f"{reason}\ndelete this file to try again\n", encoding="utf-8")
        return None


def _is_whole(path: Path) -> bool:
    """Whether the library is there, as it was compiled."""
    with contextlib.suppress(OSError):
        return path.with_suffix(".sha256").read_text(encoding="ascii", errors="replace").strip() == sha256_file(path)
    return False


def build(path: Path, compiler: str, more: tuple[str, ...] = ()) -> None:
    """Compiles to `path`, whole or not at all: of two processes that compile at once, the last one's file stays.

    Raises:
        OSError, EmosteerError, subprocess.SubprocessError: if that cannot be done.
    """
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, *more, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
        made.chmod(0o755)  # whatever the umask lets others do
        path.unlink(missing_ok=True)
        write_text(path.with_suffix(".sha256"), sha256_file(made) + "\n")
        made.replace(path)


def _processor() -> str:
    """What the processor can do, as Linux lists it: a cache shared by machines must not mix their programs."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return line.partition(":")[2].strip()
    return ""


def _compiler() -> str | None:
    """The C++ compiler that the environment names, or the first of the usual ones."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((found for found in map(shutil.which, names) if found), None)


def _reason(error: Exception) -> str:
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
    telling = [line for line in lines if "error" in line] or lines or [type(error).__name__]
    return telling[0][:200]
