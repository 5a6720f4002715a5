"""Ctrl-C and SIGTERM: one line and an exit code, within two seconds, from the first instant of a command to its last.

What runs is told by an exception, so that blocks end as they do after any error. Some cases end the process at once instead: a command
that has not begun, or is over; an import in progress, since libraries catch the exception there and import what was half imported a second
time; a second signal; and work that has not ended after `GRACE` seconds, because it computes outside Python or waits for a server. What is
unfinished then (temporary files and folders, processes that were started) is cleared away first. A part of a command can take the signals
for itself (`handed_over`), or end alone (`forgiven`). Imports as little as can be: before this module nothing guards the process.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # typing itself takes longer to import than everything here
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

#: Seconds from the signal to the end that is forced.
GRACE = 1.5
#: Exit codes, as shells give them.
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
#: Goes to the watcher where signals do: no signal that came before it ends the process.
_PARDON = 0
#: What a stopped command says of its work until `promise` says better.
_NOTHING = "nothing was begun"
#: Temporary files and folders that exist now, and the leaders of process groups that run for us.
unfinished: set[str] = set()
groups: set[int] = set()


class Terminated(BaseException):
    """The process was told to end (SIGTERM). Like KeyboardInterrupt it passes every handler of errors."""


class _State:
    kept = _NOTHING
    term: Callable[[], str] | None = None
    told = False
    received: int | None = None
    caught = False
    silent = False
    wakeup: int | None = None
    pardons = 0
    pardoned: threading.Condition


def install(*numbers: signal.Signals) -> None:
    """Takes signals over, both where none is named: a command line does so before anything else is imported. One that is ignored stays
    so, as `nohup` and background jobs of scripts want it."""
    import contextlib
    import threading

    for number in numbers or CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _received)
    if _State.wakeup is not None:
        return
    reading, writing = os.pipe()
    _State.wakeup, _State.pardoned = writing, threading.Condition()
    with contextlib.suppress(AttributeError, OSError):  # Windows before Python 3.12
        os.set_blocking(writing, False)
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True, name="end of the command").start()


def finished() -> None:
    """The command is over: from here a signal ends the process as it would any other."""
    for number in CODES:
        if signal.getsignal(number) is _received:
            signal.signal(number, signal.SIG_DFL)


def promise(kept: str) -> None:
    """What the one line is to say of the work that is kept."""
    _State.kept = kept


def on_term(message: Callable[[], str]) -> None:
    """What SIGTERM says, where somebody knows why it comes (torchrun, when another process died)."""
    _State.term = message


def line(number: int) -> str:
    """What is said of a signal."""
    if number == signal.SIGTERM and _State.term is not None:
        return _State.term()
    return f"{'interrupted' if number == signal.SIGINT else 'stopped'}; {_State.kept}"


def received() -> int | None:
    """The signal that came, if one did: whatever error leaves the command after that comes of it. Code outside Python makes other errors of
    what is raised in its callbacks."""
    return _State.received


def told() -> None:
    """The line stands on the screen: the end that is forced says nothing more."""
    _State.told = True


def forgiven() -> None:
    """The signal that came was meant for a part of the work, which has ended: the command goes on as if none had come."""
    if _State.wakeup is not None:
        os.write(_State.wakeup, bytes([_PARDON]))
        with _State.pardoned:
            _State.pardons += 1
            _State.pardoned.notify()
    _State.received = None  # last: until here one more signal is a second one


def quiet(silent: bool) -> None:
    """Of several processes only one says that the command was stopped."""
    _State.silent = silent


def _received(number: int, frame: FrameType | None) -> None:
    if _State.received is not None or not _State.caught or _importing(frame):
        _end(number)
    _State.received = number
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _importing(frame: FrameType | None) -> bool:
    """Whether the main thread is inside an import."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _watch(reading: int) -> None:
    """Waits for a signal, gives the main thread its time, and then ends the process. Runs while the main thread computes.

    Signals and pardons come in their order through the same pipe: where more pardons were given than came out of it so far, the next one
    lies behind the signal."""
    seen = 0
    while True:
        number = os.read(reading, 1)[0]
        if number == _PARDON:
            seen += 1
        elif number in CODES:
            with _State.pardoned:
                pardoned = _State.pardoned.wait_for(lambda: _State.pardons > seen, GRACE)  # noqa: B023
            if not pardoned:
                _end(number)


def _end(number: int) -> None:
    import contextlib

    for group in list(groups):
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    for path in list(unfinished):
        _remove(path)
    text = b"\x1b[?25h" if sys.stderr is not None and sys.stderr.isatty() else b""  # a progress bar had hidden the cursor
    text += b"" if _State.told or _State.silent else f"emosteer: {line(number)}\n".encode()
    with contextlib.suppress(OSError):
        os.write(2, text)
    os._exit(CODES[signal.Signals(number)])


def _remove(path: str) -> None:
    import contextlib
    import shutil

    with contextlib.suppress(OSError):
        shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else os.unlink(path)


class caught:
    """A block that catches what a signal raises; outside of such blocks a signal ends the process at once."""

    def __enter__(self) -> None:
        _State.caught = True

    def __exit__(self, *_: object) -> None:
        _State.caught = False


class handed_over:
    """A block in which somebody else takes the signals (a server, a prompt): none of them ends the process by force. Whatever he does with
    the wake-up of signals is undone at the end."""

    def __enter__(self) -> None:
        self._wakeup = signal.set_wakeup_fd(-1)

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)


class temporary:
    """A block during which a temporary file or folder exists: it is cleared away if the process is ended inside."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __enter__(self) -> None:
        unfinished.add(self._path)

    def __exit__(self, *_: object) -> None:
        unfinished.discard(self._path)
