"""Peak memory of `extract` and `generate` as the work grows, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.results import Bar, Row
from bench.workload import Workbench
from emosteer.errors import EmosteerError

FAMILY = "memory"
DTYPE = "bfloat16"


def peak(what: str, size: int, dtype: str = DTYPE) -> dict[str, int]:
    """Peak resident bytes of a process that extracts from `size` scenario-events or writes `size` replies: "whole", and "working", from
    the loaded model on.

    Raises:
        EmosteerError: with its last line, if it fails.
    """
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "bench.drivers.peak", what, str(size), dtype], capture_output=True, text=True, env=environ)
    if done.returncode:
        raise EmosteerError(f"{what} of {size} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run(bench: Workbench) -> Iterator[Row]:
    """The rows of this family."""
    tasks = (
        ("extract", "scenario-events", bench.pick(48, 6), bench.pick(480, 24), Bar(1.05, at_least=False)),
        ("generate", "replies", bench.pick(32, 8), bench.pick(192, 16), None),
    )
    for what, unit, small, large, bar in tasks:
        if not bench.wants(f"{FAMILY}.{what}"):
            continue
        few, many = peak(what, small), peak(what, large)
        mib = {name: f"{few[name] / 2**20:,.0f} and {many[name] / 2**20:,.0f} MiB" for name in few}
        yield Row.of(
            f"{FAMILY}.{what}",
            f"peak memory of `{what}` once the model is loaded: {large} {unit} against {small}",
            many["working"] / few["working"],
            bar,
            note=f"resident {mib['working']}, all included; with loading {mib['whole']}; {DTYPE} (small weights hide less)",
        )
