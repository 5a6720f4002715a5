"""`python -m bench`: every figure of docs/SPEED.md again, side by side on this machine.

    python -m bench                          everything (minutes)
    python -m bench --only startup           one family
    python -m bench --only steering.batch8   one row; the others stay as they are
    python -m bench --quick                  small work, one round: does everything run?

Rows are kept as they are measured (results.json beside RESULTS.md), so that an interrupted run loses one row at most.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from bench.results import Results, Row, show
from emosteer.base.errors import EmosteerError, UsageError, suggest
from emosteer.base.progress import note

#: Family -> module, in the order they run: those that need a quiet start come first.
FAMILIES = {
    "startup": "bench.startup",
    "attribution": "bench.attribution",
    "extract": "bench.extraction",
    "steering": "bench.steering",
    "huggingface": "bench.huggingface",
    "rivals": "bench.rivals",
    "memory": "bench.memory",
}
HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code (a bar that is not met is a result, not a failure)."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help=f"a family ({', '.join(FAMILIES)}) or a row; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="small work and one round; written to artifacts/bench unless --out is given")
    parser.add_argument("--out", type=Path, help="folder for RESULTS.md and results.json; bench/ if not given", metavar="DIR")
    parser.add_argument("--threads", type=int, help="threads of torch; as many as there are cores if not given", metavar="N")
    parser.add_argument("--show", action="store_true", help="print the table of the last run and measure nothing")
    chosen = parser.parse_args(arguments)
    folder = chosen.out or (Path("artifacts/bench") if chosen.quick else HERE)
    try:
        results = Results(folder, list(FAMILIES))
        if not chosen.show:
            _check(chosen.only)
            _measure(results, chosen.only, chosen.quick, chosen.threads)
    except EmosteerError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("bench: interrupted; the rows so far are kept", file=sys.stderr)
        show(results.ordered())
        return 130
    show(results.ordered())
    return 0


def _check(names: Sequence[str]) -> None:
    for name in names:
        if name.split(".")[0] not in FAMILIES:
            raise UsageError(
                f"unknown row '{name}'{suggest(name, tuple(FAMILIES))}; expected one of {', '.join(FAMILIES)}, or a row of one"
            )


def wants(only: Sequence[str], row: str) -> bool:
    """Whether a row is asked for: nothing named asks for all, a family or any prefix in front of a dot for what is below it."""
    return not only or any(row == name or row.startswith(f"{name}.") for name in only)


def _measure(results: Results, only: Sequence[str], quick: bool, threads: int | None) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that are started
    import torch

    from bench.machine import describe, name_of
    from bench.workload import Workbench

    torch.set_num_threads(threads or torch.get_num_threads())
    machine = describe(torch.get_num_threads())
    note("bench: " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    if machine.get("load at the start", 0) > 0.5:
        note("bench: other work is running here; ratios bear some of it, figures in seconds do not")
    bench = Workbench(quick, lambda row: wants(only, row))
    for family, module in FAMILIES.items():
        if only and not any(name.split(".")[0] == family for name in only):
            continue
        start, written = time.monotonic(), set()
        for row in _rows(module, family, bench):
            if not wants(only, row.id):
                continue
            command = f"python -m bench --only {row.id}{' --quick' if quick else ''}"
            results.put(_signed(row, command, machine, name_of(machine), quick), machine)
            written.add(row.id)
            note(f"bench: {row.id} {row.figure} {row.verdict}")
        if not only or family in only:
            results.drop_stale(family, written)
        note(f"bench: {family} took {time.monotonic() - start:.0f} s")
        bench.forget()


def _signed(row: Row, command: str, machine: dict[str, Any], name: str, quick: bool) -> Row:
    return replace(row, command=command, machine=name, date=date.today().isoformat(), quick=quick)


def _rows(module: str, family: str, bench: Any) -> Any:
    """The rows of a family; what stops it becomes a row that says so, and the other families go on."""
    try:
        yield from importlib.import_module(module).run(bench)
    except (EmosteerError, RuntimeError, OSError) as error:
        text = (str(error).strip().splitlines() or ["no message"])[0]
        yield Row.of(f"{family}.failed", f"{family}: stopped", None, note=f"{type(error).__name__}: {text}")


if __name__ == "__main__":
    sys.exit(main())
