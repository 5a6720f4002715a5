"""One vLLM process: started with the Python that has vLLM, read to its end, gone when the block ends, its failures one line each."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from emosteer.base import stopping
from emosteer.base.cache_folder import cache_dir, make_folder, writing
from emosteer.base.errors import EmosteerError, UsageError
from emosteer.base.progress import note
from emosteer.base.strict_json import loads

#: Names the Python that has vLLM, where it is not this one.
PYTHON = "EMOSTEER_VLLM_PYTHON"
WORKER = Path(__file__).with_name("vllm_worker.py")
#: Seconds that a process has to end by itself.
PATIENCE = 20


@dataclass(frozen=True)
class Task:
    """What one vLLM process is asked. engine: of `EngineArgs`; sampling: of `SamplingParams`; requests: ids and seed of each."""

    engine: dict[str, Any]
    sampling: dict[str, Any]
    requests: list[dict[str, Any]]


def find_python() -> str:
    """The Python that has vLLM: the one that $EMOSTEER_VLLM_PYTHON names, else this one.

    Raises:
        UsageError: if the named one is not there. EmosteerError: if there is none.
    """
    if named := os.environ.get(PYTHON):
        path = shutil.which(Path(named).expanduser())
        if path is None:
            raise UsageError(f"{PYTHON} names {named}, which is no program; set it to the python of the environment that has vLLM")
        return path
    if importlib.util.find_spec("vllm") is None:
        raise _missing(sys.executable)
    return sys.executable


def _missing(python: str) -> EmosteerError:
    return EmosteerError(
        f"--engine vllm needs vLLM, which {python} does not have; run `pip install 'emosteer[vllm]'`, or set {PYTHON} to the python of "
        "another environment that has it (docs/VLLM.md says how to make one, also without a GPU)"
    )


def run(python: str, task: Task, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs one vLLM process to its end and yields (index of the request, reply) as replies end.

    Args:
        what: for messages.

    Raises:
        EmosteerError: if it fails, naming the log; what was yielded before stands.
    """
    room = cache_dir() / "vllm"
    with writing(room):
        make_folder(room)
        handle, name = tempfile.mkstemp(dir=room, prefix=time.strftime("%Y%m%d-%H%M%S-"), suffix=".log")
    log = Path(name)
    note(f"starting vLLM ({what}, {len(task.requests)} replies); its log: {log}")
    written = 0
    with os.fdopen(handle, "wb") as sink, _started(python, sink) as process:
        _send(process, task)
        for line in process.stdout or ():
            answer = loads(line)
            if "index" in answer:
                if answer["finish_reason"] not in ("stop", "length"):
                    raise _failed(what, f"a reply ended as '{answer['finish_reason']}'", log)
                written += len(answer["ids"])
                yield answer["index"], answer
            elif "ready" in answer:
                note(f"vLLM is up after {answer['ready']:.0f} s")
            elif "done" in answer:
                note(f"{what}: {written} tokens in {answer['done']:.1f} s ({written / max(answer['done'], 0.01):,.0f} a second)")
                log.unlink(missing_ok=True)
                return
            elif answer["missing"]:
                log.unlink(missing_ok=True)
                raise _missing(python)
            else:
                raise _failed(what, answer["error"], log)
        code = process.wait()
    raise _failed(what, _ending(code), log)


def _failed(what: str, why: str, log: Path) -> EmosteerError:
    return EmosteerError(f"vLLM failed ({what}): {why}; replies that were written are kept; its log: {log}")


def _ending(code: int) -> str:
    """What an exit code of a process that said nothing means."""
    if code == -signal.SIGKILL:
        return "it was killed, perhaps because memory ran out (with little of it: --dtype bfloat16, smaller --batch-size)"
    return f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended early with exit code {code}"


def _send(process: subprocess.Popen[str], task: Task) -> None:
    """Hands the task over; a process that is gone already is met when its answers are read."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        json.dump(vars(task), stdin)


@contextlib.contextmanager
def _started(python: str, log: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """The worker, in a session of its own. Whatever happens in the block, neither it nor a process that it started is left at the end."""
    local = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    process = subprocess.Popen(
        [python, str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        encoding="utf-8",
        env={**local, **os.environ},
        start_new_session=True,
    )

    def sweep() -> None:
        process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):  # its children would keep the pipe open
            os.killpg(process.pid, signal.SIGKILL)

    watcher = threading.Thread(target=sweep, daemon=True)
    watcher.start()
    stopping.groups.add(process.pid)
    try:
        yield process
    except BaseException:
        process.terminate()
        raise
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        if process.poll() is None:
            process.kill()
        stopping.groups.discard(process.pid)
        watcher.join(PATIENCE)
        if process.stdout:
            process.stdout.close()
