"""Ctrl-C and SIGTERM: one line, the right exit code, nothing left behind, whatever the process is doing at that moment."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
START = "from emosteer.base import stopping\nstopping.GRACE = 0.3\nstopping.install()\nimport sys, time\n"
#: A command line's way of running: what it raises is told in one line.
GUARDED = (
    START + "from emosteer.cli.main import guarded\nstopping.promise('all is kept')\ndef run():\n{}\nguarded(run)\nstopping.finished()\n"
)
SLEEP = "    print('in', flush=True)\n    time.sleep(30)"
Stop = Callable[..., tuple[int, str, float]]


@pytest.fixture
def stop(tmp_path: Path) -> Stop:
    """Runs a program, sends it signals once it says that it is there, and returns its exit code, stderr and the seconds it took to end."""

    def run(program: str, *numbers: signal.Signals) -> tuple[int, str, float]:
        # started from a background job, a process ignores SIGINT and so would its children: here it must not
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert process.stdout is not None and process.stdout.readline() == "in\n", process.communicate()[1]
        start = time.monotonic()
        for number in numbers:
            process.send_signal(number)
        _, said = process.communicate(timeout=20)
        return process.returncode, said, time.monotonic() - start

    return run


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped")])
def test_work_is_told_and_unwinds(stop: Stop, number: signal.Signals, code: int, word: str) -> None:
    program = GUARDED.format("    try:\n    " + SLEEP.replace("\n", "\n    ") + "\n    finally:\n        print('unwound', file=sys.stderr)")
    ended, said, _ = stop(program, number)
    assert (ended, said) == (code, f"unwound\nemosteer: {word}; all is kept\n")


def test_an_import_in_progress_ends_at_once(stop: Stop, tmp_path: Path) -> None:
    """Libraries catch the exception and import what was half imported again; here they get no occasion to."""
    (tmp_path / "slow.py").write_text("import time\ntry:\n" + SLEEP + "\nexcept BaseException:\n    time.sleep(30)\n")
    ended, said, seconds = stop(GUARDED.format("    import slow"), signal.SIGINT)
    assert (ended, said) == (130, "emosteer: interrupted; all is kept\n") and seconds < 5


def test_an_error_that_a_signal_led_to_is_told_as_the_signal(stop: Stop) -> None:
    """Code outside Python makes errors of its own of what is raised in its callbacks."""
    program = (
        "    try:\n    "
        + SLEEP.replace("\n", "\n    ")
        + "\n    except BaseException:\n        raise ValueError('of the shape of something')"
    )
    assert stop(GUARDED.format(program), signal.SIGTERM)[:2] == (143, "emosteer: stopped; all is kept\n")


def test_a_signal_that_is_forgiven_ends_nothing_and_the_next_one_does(stop: Stop) -> None:
    """Also where it is swallowed: the command is still watched."""
    program = (
        "    import signal\n    for _ in range(2):\n        try:\n            signal.raise_signal(signal.SIGINT)\n"
        "        except KeyboardInterrupt:\n            stopping.forgiven()\n        time.sleep(0.5)\n"
        "    try:\n    " + SLEEP.replace("\n", "\n    ") + "\n    except BaseException:\n        time.sleep(30)"
    )
    ended, said, seconds = stop(GUARDED.format(program), signal.SIGTERM)
    assert (ended, said) == (143, "emosteer: stopped; all is kept\n") and seconds < 5


def test_ctrl_c_ends_a_reply_of_the_chat_and_no_more(tmp_path: Path) -> None:
    """In a terminal, where the prompt takes the wake-up of signals for itself between two replies: a reply that swallows its end is ended
    all the same."""
    pytest.importorskip("prompt_toolkit", reason="prompt-toolkit is not installed; it comes with emosteer[chat]")
    program = GUARDED.format(
        "    from types import SimpleNamespace\n    from emosteer.cli import chat\n"
        "    def swallowing():\n        try:\n            time.sleep(30)\n        except BaseException:\n            time.sleep(30)\n"
        "    def reply(text):\n        for number in range(50):\n            yield f'<{text} {number}>'\n"
        "            if text == 'stuck' and number == 1:\n                swallowing()\n            time.sleep(0.1)\n"
        "    talk = SimpleNamespace(turns=[], label='neutral', model=SimpleNamespace(emotions=()), reply=reply)\n"
        "    reader = chat._Reader(chat.NOBODY)\n    chat._talk(talk, reader, chat._typed(talk, reader), True)"
    )
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": f"{ROOT}", "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(theirs)
    shown = b""
    try:
        for text in ("one", "two", "stuck"):
            os.write(ours, f"{text}\r".encode())
            while f"<{text} 1>".encode() not in shown:
                assert select.select([ours], [], [], 20)[0], shown
                shown += os.read(ours, 4096)
            if text == "stuck":
                break
            process.send_signal(signal.SIGINT)
            time.sleep(0.8)  # longer than the time after which an end is forced
            assert process.poll() is None, shown
        process.terminate()
        assert process.wait(10) == 143, shown
    finally:
        process.kill()
        os.close(ours)


def test_before_and_after_the_command_it_ends_at_once(stop: Stop) -> None:
    assert stop(START + SLEEP.replace("    ", ""), signal.SIGINT)[:2] == (130, "emosteer: interrupted; nothing was begun\n")
    after = START + "stopping.finished()\n" + SLEEP.replace("    ", "")
    assert stop(after, signal.SIGINT)[:2] == (-signal.SIGINT, ""), "as any process that holds nothing"


def test_until_the_signals_are_taken_over_it_ends_without_a_traceback(stop: Stop, tmp_path: Path) -> None:
    (tmp_path / "signal.py").write_text("import time\nprint('in', flush=True)\ntime.sleep(30)\n")
    assert stop("import emosteer.cli.start", signal.SIGINT)[:2] == (-signal.SIGINT, "")
    (tmp_path / "signal.py").unlink()
    ignored = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nimport emosteer.cli.start\nprint('in', flush=True)\n"
    assert stop(ignored + "signal.raise_signal(signal.SIGINT)", signal.SIGINT)[:2] == (0, "")


@pytest.mark.parametrize(
    "stuck",
    [
        "    import ctypes\n    print('in', flush=True)\n    ctypes.CDLL(None).sleep(30)",
        "    try:\n    " + SLEEP.replace("\n", "\n    ") + "\n    except BaseException:\n        time.sleep(30)",
    ],
    ids=["outside Python", "swallowed"],
)
def test_what_does_not_end_by_itself_is_ended_and_leaves_nothing(stop: Stop, tmp_path: Path, stuck: str) -> None:
    program = (
        "    from pathlib import Path\n    from emosteer.base.cache_folder import scratch\n"
        "    from emosteer.base.files import atomic_path\n"
        f"    with scratch(Path({str(tmp_path / 'folder')!r})) as room, atomic_path(Path({str(tmp_path / 'file')!r})):\n"
        "        (room / 'half').write_text('x')\n" + "    " + stuck.replace("\n", "\n    ")
    )
    ended, said, seconds = stop(GUARDED.format(program), signal.SIGTERM)
    assert (ended, said) == (143, "emosteer: stopped; all is kept\n") and seconds < 5
    assert not list(tmp_path.iterdir())


def test_a_command_that_was_started_with_signals_ignored_ignores_them(tmp_path: Path) -> None:
    """As `nohup` and background jobs of scripts start it."""
    program = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + START + "import os\nos.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_killed_process_left_is_cleared_by_the_next_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emosteer.base import files

    killed = (
        "import os, sys\nfrom pathlib import Path\nfrom emosteer.base.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as part:\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", killed, str(tmp_path / "file")], cwd=ROOT)
    assert len(list(tmp_path.glob(".file.*.part"))) == 1
    monkeypatch.setattr(files, "FRESH", -1.0)
    with files.atomic_path(tmp_path / "file") as alive:
        (left,) = tmp_path.glob(".file.*.part")
        assert left == alive
        files.write_text(tmp_path / "file", "x")
        assert alive.exists(), "the temporary file of a writer who is alive stays"
        alive.write_text("y")
    assert (tmp_path / "file").read_text() == "y" and not list(tmp_path.glob(".*"))


def test_folders_that_killed_processes_left_are_swept_but_not_those_being_worked_on(tmp_path: Path) -> None:
    from emosteer.base.cache_folder import locked, scratch, silent

    for name in (".mine.x.part", ".other.x.part", ".busy.x.part"):
        (tmp_path / name).mkdir()
    with locked(tmp_path / "another", silent), scratch(tmp_path / "another"):
        pass
    (tmp_path / ".busy.x.part").mkdir()
    held = (
        "import sys\nfrom pathlib import Path\nfrom emosteer.base.cache_folder import locked, silent\n"
        "with locked(Path(sys.argv[1]), silent):\n    print('in', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", held, str(tmp_path / "busy")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None and process.stdout.readline() == "in\n"
        (tmp_path / ".busy.y.part").mkdir()
        (tmp_path / ".mine.y.part").mkdir()
        with locked(tmp_path / "mine", silent):
            assert {path.name for path in tmp_path.glob(".*.part")} == {".busy.y.part"}
        process.stdin.close()
