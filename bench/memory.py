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
from emosteer.base.errors import EmosteerError

FAMILY = "memory"


def peak(what: str, size: int, dtype: str) -> dict[str, int]:
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
    groups, flat = ("scenario-events", bench.pick(48, 6), bench.pick(480, 24)), Bar(1.05, at_least=False)
    tasks = (
        ("extract", "float32", *groups, flat),
        ("extract", "bfloat16", *groups, flat),
        ("generate", "bfloat16", "replies", bench.pick(32, 8), bench.pick(192, 16), None),
    )
    for what, dtype, unit, small, large, bar in tasks:
        name = f"{FAMILY}.{what}.{dtype}"
        if not bench.wants(name):
            continue
        few, many = peak(what, small, dtype), peak(what, large, dtype)
        mib = {key: f"{few[key] / 2**20:,.0f} and {many[key] / 2**20:,.0f} MiB" for key in few}
        yield Row.of(
            name,
            f"peak memory of `{what}` in {dtype} once the model is loaded: {large} {unit} against {small}",
            many["working"] / few["working"],
            bar,
            note=f"resident {mib['working']}, all included; with loading {mib['whole']} ({many['whole'] / few['whole']:.3f} x)",
        )
