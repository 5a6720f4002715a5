"""Every option of every command, given values that make no sense: `python tests/fuzz_options.py [--seeds 0:1000]`.

A case is a short command on a tiny model with one option set to a strange value, or to a sensible one. It may run or be refused in one
line; a traceback, an "unexpected" error, another exit code than 0, 1 or 2, or more than `PATIENCE` seconds is a fault. `calibrate` and
`evaluate` go as far as the judges, which are left out. Ends with the counts; exit status 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import typing
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

from typer.main import get_command

from emosteer.base.errors import EmosteerError
from emosteer.cli import main as cli
from emosteer.judges import jury
from tests.helpers.tiny_project import write_tiny_project

PATIENCE = 60
_DATA = "--model ./tiny --scenarios sev.jsonl --replies bank.jsonl"
#: Command lines that end within a second or two.
LINES = {
    "build": "build sev.jsonl",
    "build --author": "build --author --domain work --out authored.jsonl --model ./tiny -n 1 --attempts 1",
    "extract": f"extract {_DATA} --emotions anger,sadness,fear --fresh",
    "ablate": f"ablate {_DATA} --no-curves --patch-groups 1 --true-units 2 --verify-neurons 2",
    "circuit": f"circuit {_DATA} --gain-steps 1 --no-tune --no-learn-residual",
    "generate": "generate it --model ./tiny --emotion anger --max-new-tokens 3",
    "calibrate": "calibrate --model ./tiny --groups 2",
    "evaluate": "evaluate --model ./tiny --groups 2 --dev-groups 2",
    "judge": "judge texts.jsonl --judge linear --out judged.jsonl",
    "probe": f"probe {_DATA} --per-label 12 --folds 2 --epochs 1 --hidden 0 --sites resid_post --followed 3 --prompted 3 --moved 3",
    "effects": "effects --model ./tiny --quick --items 2 --requests 1 --attachments 1 --everyday 1 --texts 2",
    "validate": f"validate {_DATA} --prompts 2 --randoms 2 --sizes 0.1 --doses 0.5 --references 2 --bank-groups 6 --bootstraps 3",
    "inspect": "inspect artifacts/tiny/circuit.safetensors",
    "geometry": "geometry artifacts/tiny/directions.safetensors",
    "report": "report --model ./tiny --out report.html",
    "export": "export --model ./tiny --emotion anger --out exported --force",
    "models list": "models list",
}
NUMBERS = ("0", "-1", "1", "2", "3", "0.5", "-0.5", "5 ", " 5", "1e3", "1e30", "1e999", "nan", "inf", "-inf", "0x10", "1_0", "\u0663",
           "", " ", "1.5", "true", "--", str(10**9), str(2**63), str(10**30), "9" * 400, "9" * 5000, "-" + "9" * 30, "1,2",
           "one")  # fmt: skip
TEXTS = ("", " ", ",", "a,b", "all", "anger", "anger,anger", "\x1b[2J", "\udcff", "\U0001f4a5", "x" * 5000, "nan", "0", "-1", "../..",
         "auto", "a=b", "=", "0.5", "0.1," * 300, "1e30", "hf:", "lm:", "openai:", "self", "cuda:99", "float64", "none", "'; rm -rf x",
         "%s%n{}")  # fmt: skip
PATHS = ("", ".", "none-such", "/dev/null", "/proc/self/status", "tiny", "tiny/config.json", "sev.jsonl", "bank.jsonl", "x" * 300,
         "no/such/folder/file", "\udcff", "tiny/model.safetensors", "artifacts/tiny/directions.safetensors")  # fmt: skip


def options() -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Command line -> its options that take a value, and the values to try."""
    root: Any = get_command(cli.app)
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for line in LINES:
        command = root
        for word in line.split():
            command = command.commands[word] if word in getattr(command, "commands", {}) else command
        hints = typing.get_type_hints(command.callback)
        rows = []
        for option in command.params:
            hint = str(hints.get(option.name))
            if not option.opts[0].startswith("-") or "bool" in hint:
                continue
            values = NUMBERS if "int" in hint or "float" in hint else PATHS if "Path" in hint else TEXTS
            rows.append((max(option.opts, key=len), values))
        found[line] = rows
    return found


class Hang(BaseException):
    """A command took longer than it may."""


def run(arguments: list[str]) -> tuple[int | str, str]:
    """Exit code and stderr of a command line, run here."""
    out, err = io.StringIO(), io.StringIO()
    code: int | str = "none"
    signal.alarm(PATIENCE)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else str(ended.code)
    except Hang:
        code = "hang"
    except BaseException as error:
        code = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    return code, err.getvalue()


def prepare() -> None:
    """The tiny project in this folder, and its artefacts."""
    write_tiny_project(Path())
    Path("texts.jsonl").write_text('{"text": "stop it"}\n{"text": "hide now"}\n')

    def no_judges(*_: Any, **__: Any) -> Any:
        raise EmosteerError("the judges are left out")

    jury.make_jury = no_judges
    for line in ("extract", "ablate", "circuit"):
        code, err = run(LINES[line].split())
        assert code == 0, err


def main() -> int:
    """Runs the cases of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0:1000", help="first:end")
    first, end = map(int, parser.parse_args().seeds.split(":"))

    def ring(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    known, counts, faults, slowest = options(), Counter[str](), 0, 0.0
    with tempfile.TemporaryDirectory() as room, contextlib.chdir(room):
        os.environ["EMOSTEER_CACHE"] = str(Path(room) / "cache")
        prepare()
        shutil.copytree("artifacts", "kept")
        for seed in range(first, end):
            draw = random.Random(seed)
            line = draw.choice([name for name, rows in known.items() if rows])
            option, values = draw.choice(known[line])
            value = draw.choice(values)
            start = time.monotonic()
            asked = [f"{option}={value}"] if option.startswith("--") and draw.random() < 0.5 else [option, value]
            code, err = run([*LINES[line].split(), *asked])
            slowest = max(slowest, time.monotonic() - start)
            bad = "Traceback" in err or "unexpected" in err or code not in (0, 1, 2)
            counts[f"{line}: {'fault' if bad else 'ran' if code == 0 else 'refused'}"] += 1
            if bad:
                faults += 1
                print(f"seed {seed}: {line} {option} {value[:60]!r}: {code}, {err.strip().splitlines()[-1:]}", flush=True)
            shutil.rmtree("artifacts", ignore_errors=True)
            shutil.copytree("kept", "artifacts")
    for what, count in sorted(counts.items()):
        print(f"{what:30} {count}")
    print(f"{sum(counts.values())} option values, {faults} faults, slowest command {slowest:.1f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
