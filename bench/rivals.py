"""Steered generation against what one would pick instead: repeng and steering-vectors, each in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bench.huggingface import BATCH, NEW_TOKENS
from bench.results import Bar, Row
from bench.timing import interleaved, median, ratio
from bench.workload import Workbench, decoding, endless
from emosteer.base.errors import EmosteerError
from emosteer.base.progress import note
from emosteer.generation.generate import generate
from emosteer.models.weights import resolve as weights

FAMILY = "rivals"
#: Where the environments go; they are made once.
ENVIRONMENTS = Path(__file__).parent / ".envs"


@dataclass(frozen=True)
class Rival:
    """A tool with the versions it is measured in."""

    name: str
    requirements: tuple[str, ...]

    @property
    def driver(self) -> Path:
        """The script that runs it."""
        return Path(__file__).parent / "drivers" / f"{self.name.replace('-', '_')}_driver.py"


RIVALS = (
    Rival("repeng", ("repeng==0.4.0", "transformers==5.23.0", "numpy==1.26.4")),
    Rival("steering-vectors", ("steering-vectors==0.12.2", "transformers==4.57.6")),
)


def environment(rival: Rival) -> Path:
    """The Python of the rival's environment, made on first use: torch first, in our version, so that nothing replaces it.

    Raises:
        EmosteerError: saying what failed, if it cannot be made.
    """
    folder = ENVIRONMENTS / rival.name
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    torch_pin = f"torch=={torch.__version__.split('+')[0]}"
    wanted = json.dumps([torch_pin, *rival.requirements])
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    note(f"making an environment for {rival.name} (once)")
    venv.create(folder, clear=True, with_pip=True)
    for packages in ((torch_pin,), (*rival.requirements, torch_pin)):
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
            raise EmosteerError(f"cannot install {', '.join(packages)}: {lines[0] if lines else 'pip failed'}")
    stamp.write_text(wanted, encoding="utf-8")
    return python


class Driver:
    """A rival's process: loads the model once, then writes the same batch whenever it is told to."""

    def __init__(self, python: Path, script: Path, task: Path) -> None:
        """Starts it and waits until the model is loaded.

        Raises:
            EmosteerError: with its last line, if it ends instead.
        """
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in __exit__
        environ = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [str(python), str(script), str(task)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environ)
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def go(self) -> dict[str, Any]:
        """Has the batch written once; returns what the driver says of it."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        self.process.wait()
        self.log.seek(0)
        lines = self.log.read().strip().splitlines() or ["no message"]
        raise EmosteerError(f"the process ended ({lines[-1].strip()})")

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def run(bench: Workbench) -> Iterator[Row]:
    """One row per rival."""
    for rival in RIVALS:
        if bench.wants(f"{FAMILY}.{rival.name}"):
            yield _row(bench, rival)


def _row(bench: Workbench, rival: Rival) -> Row:
    size, tokens = bench.pick(BATCH, 4), bench.pick(NEW_TOKENS, 6)
    what = f"steered generation, batch {size}, {tokens} new tokens, float32: tokens/s of {rival.name}"
    try:
        return _measure(bench, rival, size, tokens, what)
    except (EmosteerError, OSError, subprocess.SubprocessError) as error:
        return Row.of(f"{FAMILY}.{rival.name}", what, None, Bar(2), note=f"{' '.join(rival.requirements)} would not run here: {error}")


def _measure(bench: Workbench, rival: Rival, size: int, tokens: int, what: str) -> Row:
    model, requests = bench.model(), bench.requests(size)
    python = environment(rival)
    # their way of steering: one vector per layer, the same for the whole batch
    vectors = {site.layer: (bench.circuit.residual_strength * value[0]).tolist() for site, value in bench.circuit.residual().items()}
    task = {
        "model": str(Path(weights.resolve(bench.reference).path).resolve()),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "prompts": [list(request.ids) for request in requests],
        "pad": model.pad_id,
        "new_tokens": tokens,
        "vectors": vectors,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.json"
        file.write_text(json.dumps(task), encoding="utf-8")
        with Driver(python, rival.driver, file) as driver, endless(model):
            plan = bench.plan([0] * size)
            work = {"theirs": driver.go, "ours": lambda: generate(model, requests, plan, decoding(tokens))}
            seconds = interleaved(work, bench.pick(3, 1), warmup=1)
            said = driver.go()
    if said["tokens"] != size * tokens:
        raise EmosteerError(f"it wrote {said['tokens']} tokens instead of {size * tokens}")
    found = ratio(seconds["theirs"], seconds["ours"])
    rate = {name: size * tokens / median(times) for name, times in seconds.items()}
    moved = f"; {said['changed']} of {size} of its replies differ from unsteered ones" if "changed" in said else ""
    return Row.of(
        f"{FAMILY}.{rival.name}",
        what,
        found.value,
        Bar(2),
        spread=found,
        note=f"ours {rate['ours']:.0f} tokens/s, theirs {rate['theirs']:.0f}; {', '.join(rival.requirements)}{moved}",
    )
