"""What commands say that they will cost, beside what they then took: the table of docs/SPEED.md, "How far the estimates hold".

    OMP_NUM_THREADS=1 python -m bench.estimates [--only heads,validate] [--room DIR]

Every command is one of the embedded model, small enough to take about a minute, in a process of its own. Trial and work are both timed by
the processor time of one thread, so that other work on the machine counts for nothing. A room that is there is used again: what its
commands left is then made anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from emosteer.api.costs.cost import Cost, amount
from emosteer.api.costs.memory import peak

ROOT = Path(__file__).parents[1]
#: The commands, in an order in which each finds what it needs; {root} is the repository.
COMMANDS = """
extract --limit 96 --fresh
generate --input prompts.jsonl --emotion anger --out replies.jsonl --fresh
judge texts.jsonl --out judged.jsonl --fresh
heads --groups 24
validate --quick --prompts 2 --randoms 2 --parts necessary --bank-groups 8 --references 4 --bootstraps 10
effects --quick --items 12 --requests 4 --attachments 4 --everyday 4 --texts 12 --fresh
probe --per-label 40 --hidden 0 --epochs 40 --followed 14 --prompted 14 --moved 14 --fresh
ablate --shares 0.1 --prompts 4 --randoms 1 --kinds zero --fresh
circuit --gain-steps 4 --no-learn-residual --no-tune --out learned.safetensors
calibrate --circuit circuit.safetensors --groups 8 --points 3 --refine 1 --fresh
"""
#: Prompts that replies are written to, and texts that are judged.
PROMPTS, TEXTS = 64, 300
#: Set for the process that runs one command: where it writes what it found.
FOUND = "EMOSTEER_BENCH_FOUND"


def main() -> None:
    """Runs the commands and prints the table; or one command, in the process that measures it."""
    if target := os.environ.get(FOUND):
        return measured(Path(target), sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="some commands, with commas")
    parser.add_argument("--room", type=Path, help="folder to work in; a temporary one if not given")
    options = parser.parse_args()
    room = options.room or Path(tempfile.mkdtemp(prefix="emosteer-estimates-"))
    furnish(room)
    print("| command | said | took | memory said | most memory |\n|---|---|---|---|---|")
    for line in COMMANDS.strip().splitlines():
        if not options.only or line.split()[0] in options.only.split(","):
            print(row(line, room), flush=True)
    if options.room is None:
        shutil.rmtree(room, ignore_errors=True)


def furnish(room: Path) -> None:
    """Puts what the commands read into the room."""
    room.mkdir(parents=True, exist_ok=True)
    for name, source, count in (("prompts", "prompts/dev", PROMPTS), ("texts", "replies/plain", TEXTS)):
        lines = (ROOT / "data" / f"{source}.jsonl").read_text("utf-8").splitlines(keepends=True)[:count]
        (room / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    shutil.copy(ROOT / "emosteer/assets/smollm2-135m.circuit.safetensors", room / "circuit.safetensors")


def row(line: str, room: Path) -> str:
    """One command's row of the table."""
    target = room / "found.json"
    environment = {**os.environ, FOUND: str(target), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(room / "log.txt", "ab") as log:
        subprocess.run(
            [sys.executable, "-m", "bench.estimates", *shlex.split(line)], cwd=room, env=environment, stdout=log, stderr=log, check=True
        )
    found = json.loads(target.read_text("utf-8"))
    said = f"{'up to ' * found['at_most']}{found['said']:.0f} s"
    return f"| `{line}` | {said} | {found['took']:.0f} s | {amount(found['memory'])} | {amount(found['peak'])} |"


def measured(target: Path, words: list[str]) -> None:
    """Runs a command with its clocks changed for processor time, and writes what it said and what it took."""
    from emosteer.api.costs import trials
    from emosteer.cli import announce
    from emosteer.cli import main as cli

    trials.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    real = announce.told

    @contextlib.contextmanager
    def told(cost: Cost) -> Iterator[None]:
        begin = time.process_time()
        with real(cost):
            yield
        at_most = any(part.at_most and part.count for part in cost.parts)
        found = {"said": cost.seconds, "at_most": at_most, "took": time.process_time() - begin, "memory": cost.memory, "peak": peak()}
        target.write_text(json.dumps(found), "utf-8")

    announce.told = told
    cli.main(words)


if __name__ == "__main__":
    main()
