"""Every stage, ended at random moments and run again: `python tests/kills.py [--kills 200] [--seed 0]`.

Each case runs a command on a tiny model in a process of its own (two for those that torchrun would split), ends it after a random share of
the time that it takes, by SIGKILL, SIGTERM or Ctrl-C, and runs the same command again to its end. What it wrote must equal what the
uninterrupted command wrote; nothing half written may be left, no lock held, and SIGTERM and Ctrl-C must end in one line with their exit
code within `QUICK` seconds. Processes are forked from this one, which has imported everything, so that the moments fall into the work
itself. Prints the counts; exit status 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
import torch.distributed
from filelock import FileLock, Timeout

from emosteer.base import files, stopping
from emosteer.base.files import sha256_file, sha256_text
from emosteer.cli import main as cli
from emosteer.judges.embedded import shared_encoder
from tests.helpers.tiny_project import write_tiny_project
from tests.models.test_weights import write_gguf
from tests.scenarios.test_authoring import item

QUICK = 2.5
_DATA = "--model ./tiny --scenarios sev.jsonl --replies bank.jsonl"
_WRITE = "--max-new-tokens 4 --judge linear --guidance 1"


@dataclass(frozen=True)
class Stage:
    """A command, what it writes, and by how many processes it is run. sorted: lines may come in any order."""

    command: str
    made: str
    processes: int = 1
    unordered: bool = False


STAGES = {
    "extract": Stage(f"extract {_DATA} --emotions anger,sadness,fear --batch-tokens 60 --out out/d", "out/d"),
    "extract, 2 processes": Stage(f"extract {_DATA} --emotions anger,sadness,fear --batch-tokens 60 --out out/d", "out/d", 2),
    "ablate": Stage(f"ablate {_DATA} --randoms 1 --prompts 1 --true-units 8 --verify-neurons 8 --out out/s", "out/s"),
    "circuit": Stage(f"circuit {_DATA} --gain-steps 6 --no-tune --out out/c", "out/c"),
    "calibrate": Stage(f"calibrate --model ./tiny --groups 2 --points 3 --refine 1 {_WRITE} --out out/k", "out/k"),
    "generate": Stage("generate --model ./tiny -e all --input sev.jsonl --batch-size 4 --max-new-tokens 12 --out out/g", "out/g", 1, True),
    "generate, 2 processes": Stage(
        "generate --model ./tiny -e all --input sev.jsonl --batch-size 4 --max-new-tokens 12 --out out/g", "out/g", 2, True
    ),
    "evaluate": Stage(
        f"evaluate --model ./tiny --groups 2 --dev-groups 2 --doses 1 --methods none,prompt-tone,circuit {_WRITE} --out out/v", "out/v"
    ),
    "judge": Stage("judge texts.jsonl --judge linear --out out/j", "out/j", 1, True),
    "probe": Stage(f"probe {_DATA} --folds 2 --epochs 5 --hidden 2 --followed 6 --prompted 6 --moved 3 --out out/p", "out/p"),
    "validate": Stage(
        f"validate {_DATA} --prompts 2 --randoms 2 --sizes 0.1 --doses 0.5 --references 2 --bank-groups 6 --bootstraps 3 --out out/x",
        "out/x",
    ),
    "convert": Stage("models pull ./tiny.gguf", "cache"),
    "export": Stage("export --model ./tiny --emotion anger --out out/e --force", "out/e"),
    "author": Stage("build --author --domain nursing --count 40 --base-url URL --model tiny --out out/a", "out/a"),
}


def answer_of(body: dict[str, Any]) -> str:
    """What the author of scenarios answers, by the request alone: a rerun that asks for anything else gets other scenarios. Every fifth
    one is written at the second attempt, since the first answer is no JSON."""
    number = int(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:8], 16)
    first = len(body["messages"]) == 2
    return "Let me think." if first and not number % 5 else json.dumps(item(number))


@contextlib.contextmanager
def author() -> Iterator[str]:
    """The address of an OpenAI-compatible endpoint, in a process of its own: those that are ended are forked from this one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            message = {"role": "assistant", "content": answer_of(body)}
            data = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
            time.sleep(0.01)
            with contextlib.suppress(OSError):  # it was killed meanwhile
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one of the terminal is for this process's parent
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        server.serve_forever()
    server.server_close()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


_stores: list[torch.distributed.TCPStore] = []


def started(stage: Stage, log: Path) -> list[int]:
    """The processes of a stage; what they print goes to the log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(stage.processes):
        signal.pthread_sigmask(signal.SIG_BLOCK, stopping.CODES)  # until the process has taken them over
        pid = os.fork()
        if not pid:
            sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            if stage.processes > 1:
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": stage.processes, "LOCAL_WORLD_SIZE": stage.processes}
                os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
                os.environ |= {name: str(value) for name, value in (places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items()}
            code = 70
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                stopping.install()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.CODES)
                cli.main(stage.command.split())
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 71
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.CODES)
        pids.append(pid)
    if stage.processes > 1:  # torchrun itself keeps the store, and outlives its processes
        _stores[:] = [torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)]
    return pids


def waited(pids: Sequence[int], limit: float) -> list[int]:
    """Exit codes, a signal as its negative number; what does not end in time is killed and counts as 99."""
    codes, end = [], time.monotonic() + limit
    for pid in pids:
        while not (found := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                found = (pid, 99 << 8)
                break
            time.sleep(0.005)
        codes.append(os.waitstatus_to_exitcode(found[1]))
    return codes


def content(path: Path, unordered: bool) -> str:
    """A hash of what a command wrote: a file, or the files of a folder that are no bookkeeping."""
    if path.is_dir() and not list(path.rglob("*.safetensors")):  # of a contest
        return sha256_text(
            "".join(sha256_text("\n".join(sorted(file.read_text("utf-8").splitlines()))) for file in sorted(path.rglob("*.jsonl")))
        )
    if path.is_dir():
        return sha256_text("".join(sha256_file(file) for file in sorted(path.rglob("*.safetensors"))))
    if unordered:
        return sha256_text("\n".join(sorted(path.read_text("utf-8").splitlines())))
    return sha256_file(path) if path.is_file() else "missing"


def left_over() -> list[str]:
    """What should not be there once a command has ended well: parts of files and folders, kept progress, held locks."""
    found = [str(path) for root in ("out", "cache", "artifacts") for path in Path(root).rglob("*") if path.name.endswith(".part")]
    found += [str(path) for path in Path("out").rglob("*") if ".partial" in path.name or ".rank" in path.name]
    for lock in Path("cache").rglob(".*.lock"):
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            found.append(f"{lock} is held")
    return found


def clear() -> None:
    """Nothing is there yet."""
    for name in ("out", "cache"):
        shutil.rmtree(name, ignore_errors=True)
    Path("out").mkdir()


def whole(stage: Stage, log: Path) -> tuple[str, float]:
    """What the uninterrupted command writes, and the seconds it takes."""
    clear()
    log.unlink(missing_ok=True)
    start = time.monotonic()
    codes = waited(started(stage, log), 300)
    print(f"{stage.command}: {time.monotonic() - start:.1f} s", flush=True)
    assert not any(codes), (stage.command, codes, log.read_text()[-2000:])
    assert Path(stage.made).exists(), f"{stage.command} wrote nothing"
    return content(Path(stage.made), stage.unordered), time.monotonic() - start


def case(stage: Stage, expected: str, seconds: float, draw: random.Random, log: Path) -> tuple[str, int, list[str]]:
    """Ends a command once to three times, lets it end, and says how and how often it was ended and what is wrong."""
    clear()
    faults, how = [], draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    times = draw.choice((1, 1, 2, 3))
    for _ in range(times):
        log.unlink(missing_ok=True)
        pids = started(stage, log)
        time.sleep(draw.uniform(0, seconds))
        victim = draw.choice(pids)
        for pid in pids if how is signal.SIGINT else [victim]:
            os.kill(pid, how)
        if how is not signal.SIGINT:  # torchrun ends the others so
            for pid in pids:
                if pid != victim:
                    os.kill(pid, signal.SIGTERM)
        start = time.monotonic()
        codes = waited(pids, 30)
        if time.monotonic() - start > QUICK:
            faults.append(f"took {time.monotonic() - start:.1f} s to end after {how.name}")
        said = log.read_text() if log.exists() else ""
        allowed = {0, 1, -how, stopping.CODES.get(how, -9), 143} if stage.processes > 1 else {0, -how, stopping.CODES.get(how, -9)}
        if not set(codes) <= allowed:
            faults.append(f"exit codes {codes} after {how.name}")
        if "Traceback" in said or "unexpected" in said:
            faults.append(f"said {said.strip()[-300:]!r}")
    log.unlink(missing_ok=True)
    time.sleep(files.FRESH)
    codes = waited(started(stage, log), 300)
    if any(codes):
        faults.append(f"the rerun ended with {codes}: {log.read_text()[-300:]!r}")
    elif content(Path(stage.made), stage.unordered) != expected:
        faults.append("the rerun wrote something else")
    return how.name, times, faults + [f"left over: {name}" for name in left_over()]


def prepare(made: Callable[[str], None]) -> None:
    """The tiny project, and what later stages start from."""
    write_tiny_project(Path())
    write_gguf(Path("tiny.gguf"))
    Path("texts.jsonl").write_text("".join(f'{{"text": "stop it {i}"}}\n' for i in range(150)))
    for command in (f"extract {_DATA} --emotions anger,sadness,fear", f"circuit {_DATA} --gain-steps 2 --no-tune"):
        made(command)


def main() -> int:
    """Runs the cases of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a stage")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files.FRESH = 0.5  # seconds, not a minute: what a killed process left is to be cleared by the next run
    shared_encoder()
    counts, faults, start = Counter[str](), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as room, author() as url:
        stages = {name: replace(stage, command=stage.command.replace("URL", url)) for name, stage in STAGES.items()}
        os.chdir(room)
        os.environ["EMOSTEER_CACHE"] = str(Path(room) / "cache")
        log = Path(room) / "log"
        prepare(lambda command: waited(started(Stage(command, ""), log), 300) and None)
        expected = {name: whole(stage, log) for name, stage in stages.items() if options.only in ("", name)}
        for name, (_, seconds) in expected.items():
            print(f"{name}: {seconds:.1f} s", flush=True)
        draw = random.Random(options.seed)
        number = 0
        stopped = lambda *_: setattr(options, "kills", 0)  # noqa: E731  # what was counted so far is printed
        for signal_number in stopping.CODES:
            signal.signal(signal_number, stopped)
        while counts.total() < options.kills:
            name = list(expected)[number % len(expected)]
            how, times, wrong = case(stages[name], *expected[name], draw, log)
            counts[f"{name}, {how}"] += times
            number += 1
            faults += bool(wrong)
            for told in wrong:
                print(f"{number}, {name}: {told}", flush=True)
            if not number % 20:
                print(f"{counts.total()} kills in {time.monotonic() - start:.0f} s, {faults} faults", flush=True)
        os.chdir("/")
    for what, count in sorted(counts.items()):
        print(f"{what:34} {count}")
    print(f"{number} commands ended {counts.total()} times and run again in {time.monotonic() - start:.0f} s, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
