"""The wheel alone, in a fresh environment and an empty folder: the README's commands in order, then every other command once.

`make from-wheel`, or `python tests/from_wheel.py [--keep]`. Builds the wheel and the source distribution, has twine check them, installs
the wheel, and copies the commands out of README.md; what needs the repository (`git`, `make`) or a model from the
hub is named and left out.
Exit status 1 at the first command that fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers.tiny_project import write_tiny_project  # noqa: E402

#: What README.md shows and cannot be run from the wheel alone, by how it begins, and why.
LEFT_OUT = {
    "git clone": "the repository",
    "make ": "the repository",
    "python3 ": "the repository",
}
#: A model of the hub, which this check does not fetch.
FROM_THE_HUB = re.compile(r"--model \w+/")
#: Every command once, as small as it can be; {package} is where the wheel was installed. The stages read a tiny model, so that all takes
#: minutes; the README's commands, `extract` and `models check` the real one.
DATA = "--model ./tiny --scenarios sev.jsonl --replies bank.jsonl"
EVERY = """
emosteer --version
emosteer doctor
emosteer models list
emosteer models path smollm2-135m
emosteer models check smollm2-135m --json
emosteer cache list
emosteer cache clean
emosteer inspect {package}/assets/smollm2-135m.circuit.safetensors
emosteer geometry {package}/assets/smollm2-135m.circuit.safetensors
emosteer build {package}/data/sev/test.jsonl
emosteer extract --limit 6
emosteer extract {data} --emotions anger,sadness,fear --dry-run --json
emosteer extract {data} --emotions anger,sadness,fear
emosteer ablate {data} --no-curves --patch-groups 1 --true-units 2 --verify-neurons 2
emosteer circuit {data} --gain-steps 2 --no-tune --no-learn-residual
emosteer calibrate --model ./tiny --groups 2 --points 3 --refine 1 --max-new-tokens 4 --judge linear --guidance 1 --sound 0 --names 1
emosteer evaluate --model ./tiny --groups 2 --dev-groups 2 --doses 1 --methods none,circuit --max-new-tokens 4
emosteer probe {data} --per-label 12 --folds 2 --epochs 1 --hidden 0 --sites resid_post --followed 3 --prompted 3 --moved 3
emosteer heads {data} --groups 8 --checked 4
emosteer validate {data} --prompts 2 --randoms 2 --sizes 0.1 --doses 0.5 --references 2 --bank-groups 6 --bootstraps 3
emosteer effects --model ./tiny --quick --items 2 --requests 1 --attachments 1 --everyday 1 --texts 2
emosteer report --model ./tiny --out report.html
emosteer generate --input prompts.jsonl --method none --max-new-tokens 8 --out replies.jsonl
emosteer judge replies.jsonl --judge linear --out judged.jsonl
emosteer export --emotion anger --to gguf --out anger.gguf
emosteer chat --emotion anger --max-new-tokens 4
emosteer serve --help
"""
#: What a command reads from its standard input.
SAID = {"chat": "Good morning.\n/quit\n"}


def readme_blocks() -> list[tuple[str, str]]:
    """The README's code blocks, in order: their language, and what they hold."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)


def readme_steps() -> list[str]:
    """Its commands in order, without comments and without the folder that they are in, and its Python as one step each."""
    steps = []
    for language, text in readme_blocks():
        if language == "python":
            steps.append(shlex.join(["python", "-c", text]))
        elif not language:
            parts = (part for line in text.splitlines() for part in re.sub(r"\s+#.*", "", line).split(" && "))
            steps += [part.strip().removeprefix(".venv/bin/") for part in parts if part.strip()]
    return steps


def why_left_out(step: str) -> str | None:
    """Why a step cannot be run here; None where it can."""
    if FROM_THE_HUB.search(step):
        return "a model from the hub"
    return next((why for start, why in LEFT_OUT.items() if step.startswith(start)), "the repository" if step.startswith("cd ") else None)


def run(words: list[str], **more: object) -> None:
    """Runs a command; ends with what it said where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False, **more)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{shlex.join(words)}\nended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def distributions(python: Path, folder: Path) -> Path:
    """Builds both distributions and has them checked; returns the wheel."""
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "build", "twine"])
    run([str(python), "-m", "build", "--outdir", str(folder), str(ROOT)])
    files = sorted(map(str, folder.iterdir()))
    assert len(files) == 2, files
    run([str(python), "-m", "twine", "check", "--strict", *files])
    return next(folder.glob("*.whl"))


def environment(folder: Path) -> Path:
    """A fresh environment; returns its Python."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def main() -> None:
    """Builds, installs and runs everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the folder and the environment there")
    parser.add_argument("--torch", default="", help="the requirement of torch to install first")
    options = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="emosteer-wheel-"))
    try:
        check(room, options.torch)
    finally:
        if not options.keep:
            shutil.rmtree(room, ignore_errors=True)


def check(room: Path, torch: str) -> None:
    """Everything, in a room of its own."""
    wheel = distributions(environment(room / "tools"), room / "dist")
    python = environment(room / "environment")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if torch:
        run([*pip, torch])
    run([*pip, f"{wheel}[serve,chat]"])
    empty = room / "empty"
    empty.mkdir()
    inside = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONSAFEPATH": "1"}
    inside.pop("PYTHONPATH", None)
    found = subprocess.run(
        [str(python), "-c", "import emosteer; print(emosteer.__file__)"], cwd=empty, env=inside, capture_output=True, text=True, check=True
    )
    package = Path(found.stdout.strip()).parent
    assert package.is_relative_to(room), f"expected the wheel's package, found {package}"
    prompts = (package / "data" / "prompts" / "dev.jsonl").read_text("utf-8").splitlines(keepends=True)[:4]
    (empty / "prompts.jsonl").write_text("".join(prompts), "utf-8")
    write_tiny_project(empty)
    steps = readme_steps() + EVERY.format(package=package, data=DATA).strip().splitlines()
    done = 0
    for step in steps:
        words = shlex.split(step)
        if why := why_left_out(step):
            print(f"left out ({why}): {step}", flush=True)
            continue
        begin = time.monotonic()
        said = SAID.get(words[1] if len(words) > 1 else "")
        run(words, cwd=empty, env=inside, **({"input": said} if said else {"stdin": subprocess.DEVNULL}))
        done += 1
        print(f"{time.monotonic() - begin:5.1f} s  {step.splitlines()[0][:120]}", flush=True)
    print(f"{done} commands ran from the wheel alone")


if __name__ == "__main__":
    main()
