"""How long one waits: for `--help`, and for the first token of `generate` in a new process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

from bench.results import Bar, Row
from bench.timing import interleaved, median
from bench.workload import Workbench
from emosteer.base.errors import EmosteerError

FAMILY = "startup"
TEXT = "My landlord came by this morning about the lease. He said the new tenant moves in on the first."


def finish(*arguments: str) -> None:
    """Runs a Python process to its end.

    Raises:
        EmosteerError: if it fails.
    """
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise EmosteerError(f"`{' '.join(arguments)}` failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def first_token() -> float:
    """Seconds from the start of a `generate` process to the first character of its reply.

    Raises:
        EmosteerError: if none comes.
    """
    command = [sys.executable, "-m", "emosteer", "generate", TEXT, "--emotion", "anger", "--max-new-tokens", "8"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        spent = time.perf_counter() - start
        _, error = process.communicate()
    if not first or process.returncode:
        raise EmosteerError(f"generate failed: {(error.decode(errors='replace').strip().splitlines() or ['no message'])[-1]}")
    return spent


def run(bench: Workbench) -> Iterator[Row]:
    """The rows of this family."""
    if bench.wants(f"{FAMILY}.help"):
        work = {"help": lambda: finish("-m", "emosteer", "--help"), "python": lambda: finish("-c", "pass")}
        seconds = interleaved(work, bench.pick(15, 3))
        times = seconds["help"]
        note = f"median of {len(times)}; an empty Python process takes {median(seconds['python']):.3f} s"
        spread = f"{min(times):.3f} to {max(times):.3f}"
        yield Row.of(
            f"{FAMILY}.help", "`emosteer --help`, process start to end", median(times), Bar(0.35, "s", False), spread=spread, note=note
        )
    if bench.wants(f"{FAMILY}.first_token"):
        first_token()  # warm: files in memory, bytecode compiled
        times = tuple(first_token() for _ in range(bench.pick(5, 1)))
        yield Row.of(
            f"{FAMILY}.first_token",
            "warm `emosteer generate`, process start to first token",
            median(times),
            Bar(5, "s", False),
            spread=f"{min(times):.2f} to {max(times):.2f}",
            note=f"median of {len(times)}",
        )
