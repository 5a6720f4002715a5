"""`make reproduce`: the stages one after the other, each once, with what each took and the most memory that it had.

A stage that is finished is not run again as long as its command, those before it, the code and the data are the same; one that was stopped
goes on where its own progress is. What was done stands in `artifacts/reproduce-MODEL.json`; without that file everything is done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emosteer.base.errors import EmosteerError
from emosteer.base.files import sha256_file, sha256_text, slug, write_text
from emosteer.base.progress import note
from emosteer.base.strict_json import loads
from emosteer.base.tables import print_table

ROOT = Path(__file__).resolve().parents[1]
#: What a stage's result depends on beside its command.
SOURCES = ("emosteer/**/*.py", "emosteer/**/*.cpp", "emosteer/report/*", "emosteer/assets/*.safetensors", "data/**/*.json*")


def commands(model: str, each: Sequence[str], dial: Sequence[str], check: Sequence[str], contest: Sequence[str]) -> list[list[str]]:
    """The stages in their order, as one would type them behind `emosteer`. each: options of all that load the model."""
    stages = (
        ("extract",),
        ("ablate",),
        ("circuit",),
        ("calibrate", *dial),
        ("heads",),
        ("calibrate", "--check", *check),
        ("evaluate", *contest),
    )
    return [*([*stage, "--model", model, *each] for stage in stages), ["report", "--model", model]]


def fingerprint(root: Path = ROOT) -> str:
    """A hash of the code and the data."""
    files = sorted({file for pattern in SOURCES for file in root.glob(pattern) if file.is_file()})
    return sha256_text(json.dumps([(str(file.relative_to(root)), sha256_file(file)) for file in files]))


def keys_of(stages: Sequence[Sequence[str]], code: str) -> list[str]:
    """What the result of each stage depends on: the code, its command, and those before it."""
    return [sha256_text(json.dumps([code, [list(stage) for stage in stages[: index + 1]]])) for index in range(len(stages))]


def read(file: Path) -> dict[str, dict[str, Any]]:
    """Stages that are finished, by their keys; none where the file is missing or is no such file."""
    try:
        rows = loads(file.read_text("utf-8"))
        return {row["key"]: row for row in rows}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def run(stages: Sequence[Sequence[str]], file: Path, code: str, program: Sequence[str]) -> list[dict[str, Any]]:
    """Runs what is not finished. program: what is called with each stage's command.

    Returns:
        One row per stage: stage, command, key, seconds, peak_bytes, and whether it was done before.

    Raises:
        EmosteerError: if a stage ends with another code than 0; those before it are kept.
    """
    done, rows = read(file), list[dict[str, Any]]()
    for stage, key in zip(stages, keys_of(stages, code), strict=True):
        name = " ".join(part for part in stage[:2] if part == stage[0] or part == "--check")
        if key in done:
            note(f"{name}: done before, in {done[key]['seconds'] / 60:.1f} minutes")
            rows.append({**done[key], "before": True})
            continue
        note(f"emosteer {shlex.join(stage)}")
        begin = time.monotonic()
        process = subprocess.Popen([*program, *stage])
        status, usage = _waited(process)
        if status:
            raise EmosteerError(f"{name} ended with {status}; what is finished is kept: run the same command again")
        unit = 1 if sys.platform == "darwin" else 1024
        found = {"stage": name, "command": shlex.join(stage), "key": key}
        rows.append({**found, "seconds": round(time.monotonic() - begin, 1), "peak_bytes": usage.ru_maxrss * unit, "before": False})
        write_text(file, json.dumps([{name: value for name, value in row.items() if name != "before"} for row in rows], indent=1))
    return rows


def _waited(process: subprocess.Popen[bytes]) -> tuple[int, Any]:
    """Exit code and resources of a process, which gets Ctrl-C itself and is waited for."""
    while True:
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            continue
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, usage


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Each stage and all together."""
    lines = [
        (row["stage"], f"{row['seconds'] / 60:.1f}", f"{row['peak_bytes'] / 2**30:.1f}", "before" if row["before"] else "now")
        for row in rows
    ]
    total = (f"{sum(row['seconds'] for row in rows) / 60:.1f}", f"{max(row['peak_bytes'] for row in rows) / 2**30:.1f}")
    print_table(("stage", "minutes", "GiB at most", "run"), [*lines, ("all", *total, "")])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.reproduce", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    for name in ("each", "dial", "check", "contest"):
        parser.add_argument(f"--{name}", default="", type=shlex.split, metavar="OPTIONS")
    given = parser.parse_args(arguments)
    stages = commands(given.model, given.each, given.dial, given.check, given.contest)
    file = Path("artifacts") / f"reproduce-{slug(given.model)}.json"
    try:
        show(run(stages, file, fingerprint(), [sys.executable, "-m", "emosteer"]))
    except EmosteerError as error:
        sys.exit(f"reproduce: {error}")


if __name__ == "__main__":
    main()
