"""One process or thread at a time in a folder of the cache; a killed one frees it; what it left is swept; no lock is no error."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pytest

from emosteer.base.cache_folder import locked, writing
from emosteer.base.errors import ModelError

ROOT = Path(__file__).parents[2]
WAITING = "waiting for another process that prepares the same model"


def _holder(folder: Path) -> subprocess.Popen[str]:
    """A process that has the lock, has left half a result, and keeps the lock until its standard input ends."""
    code = (
        "import sys; from pathlib import Path; from emosteer.base.cache_folder import locked\n"
        f"folder = Path({str(folder)!r})\n"
        "with locked(folder, print):\n"
        "    (folder.parent / '.made.0.part').mkdir(); print('locked', flush=True); sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


@pytest.mark.parametrize("end", ["done", "killed"])
def test_the_second_process_says_that_it_waits_and_gets_the_lock_when_the_first_is_done_or_dead(tmp_path: Path, end: str) -> None:
    process, messages, entered = _holder(tmp_path / "made"), [], threading.Event()
    waits = threading.Event()

    def work() -> None:
        with locked(tmp_path / "made", lambda message: (messages.append(message), waits.set())):
            entered.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert waits.wait(60) and messages == [WAITING]
    assert not entered.wait(0.3) and (tmp_path / ".made.0.part").exists()
    if end == "done":
        process.communicate("")
    else:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    thread.join(60)
    assert entered.is_set() and messages == [WAITING]
    assert not (tmp_path / ".made.0.part").exists()


def test_a_free_lock_is_taken_in_silence_and_given_back_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"), locked(tmp_path / "made", lambda message: pytest.fail(message)):
            raise RuntimeError("broken")


def test_another_folder_has_another_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "one", pytest.fail), locked(tmp_path / "two", pytest.fail):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_worked_on_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(self: filelock.BaseFileLock, **_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    (tmp_path / ".made.0.part").mkdir()
    with locked(tmp_path / "made", pytest.fail):
        assert (tmp_path / ".made.0.part").exists()  # perhaps another's that is at work


def test_a_cache_that_cannot_be_written_is_told_and_not_taken_for_one_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: filelock.BaseFileLock, **_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / ".made.lock"))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with (
        pytest.raises(ModelError, match="made.lock: no permission"),
        writing(tmp_path),
        locked(tmp_path / "made", pytest.fail),
    ):
        pytest.fail("entered without the lock")
