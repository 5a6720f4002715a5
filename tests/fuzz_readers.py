"""Everything that is read from a file, given files that were broken on purpose.

`python tests/fuzz_readers.py [--seeds 0:10000] [--only NAME]`, or `make fuzz`.

A case is a whole file of one kind with one to three changes of its values, text or bytes. A reader may take it or refuse it by an
`EmosteerError` of one line; anything else that leaves it, more than `PATIENCE` seconds, or an artefact that is taken and then holds a
number that is not finite or cannot be used, is a fault. Faults are printed with their seed, which makes the same case again. Ends with the
counts and the peak of memory; exit status 1 if there was a fault. The suite runs a small number of these cases (`test_fuzz.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from emosteer.attribution.scores import Scores
from emosteer.base import artifacts
from emosteer.base.cache_folder import silent
from emosteer.base.errors import EmosteerError
from emosteer.base.jsonl import JsonlLog, KeyedLog, whole_rows
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.heads.graph import graph
from emosteer.circuits.heads.heads import HeadStudy, overview
from emosteer.circuits.methods import Part
from emosteer.circuits.places import Places
from emosteer.cli import print_artifacts
from emosteer.cli.generate_inputs import inputs_of
from emosteer.directions.directions import Directions, reference_directions, stable_band
from emosteer.export.tensors import stored_tensors
from emosteer.judges.by_hand import read_labels, sheet_of
from emosteer.judges.sources import read_labelled
from emosteer.judges.storage import load_adapter, load_heads
from emosteer.models.model import Model
from emosteer.models.weights.gguf import read_manifest
from emosteer.models.weights.model_folder import gap
from emosteer.models.weights.resolve import resolve
from emosteer.models.weights.whole import packed_by
from emosteer.report import head_pages
from emosteer.report.inputs import read_inputs
from emosteer.report.page import drawn
from emosteer.scenarios.prompt_sets import read_events, read_groups
from emosteer.scenarios.scenarios import read_bank, read_scenarios
from tests.helpers import report_setup, whole_artefacts
from tests.helpers.tiny_project import write_tiny_project

PATIENCE = 30
#: Values that no field expects.
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 99, 2**31, 2**63, 10**30, 10**299, -(10**18), 0.5, -0.5, 1e30, 1e-300, -1e308, "", " ", "text", "NaN",
    "../../etc/passwd", "\x1b[2J", "\u202e", "\ud800", "x" * 5000, [], {}, [[]], [None], {"": None}, [1, 2, 3], ["anger", "anger"],
    {"a": {"b": {"c": []}}},
)  # fmt: skip
#: Texts that stand for a value in JSON and are none that a reader may take.
FORBIDDEN = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "[" * 100_000, '{"a":' * 100_000, '"\\ud800"', "", "nul", "'x'")


@dataclass(frozen=True)
class Kind:
    """A kind of file. make: writes a whole one at a path; change: breaks it; read: what reads it, and uses what was read. cost: how many
    cheap cases one of it counts for, when kinds are drawn."""

    make: Callable[[Path], None]
    change: Callable[[Path, random.Random], None]
    read: Callable[[Path], object]
    cost: int = 1


# ---- changes ---------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in plain values, however deep."""
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(part, (*path, key))


def broken_value(value: Any, draw: random.Random) -> Any:
    """Plain values with one change: another value, a part less, a part more."""
    value = copy.deepcopy(value)
    path = draw.choice(list(places(value))[1:] or [()])
    if not path:
        return draw.choice(STRANGE)
    holder = value
    for step in path[:-1]:
        holder = holder[step]
    kind = draw.random()
    if kind < 0.15:
        del holder[path[-1]]
    elif kind < 0.25 and isinstance(holder, list):
        holder.insert(draw.randrange(len(holder) + 1), holder[path[-1]])
    elif kind < 0.3 and isinstance(holder, dict):
        holder[draw.choice(("", "more", "schema", "x" * 300))] = draw.choice(STRANGE)
    else:
        holder[path[-1]] = draw.choice(STRANGE)
    return value


def broken_text(text: str, draw: random.Random) -> str:
    """JSON with one change that only text can have: a forbidden value, a key twice, a part repeated or cut off."""
    kind = draw.random()
    marks = [i for i, letter in enumerate(text) if letter in ",:[{"] or [0]
    at = draw.choice(marks) + 1
    if kind < 0.4:
        end = next((i for i in range(at, len(text)) if text[i] in ",]}\n"), len(text))
        return text[:at] + draw.choice(FORBIDDEN) + text[end:]
    if kind < 0.6 and (braces := [i for i, letter in enumerate(text) if letter == "{"]):
        at, end = draw.choice(braces) + 1, len(text)
        return text[:at] + text[at : min(end, text.find(",", at) + 1 or at)] + text[at:]
    if kind < 0.8:
        return text[: draw.randrange(len(text) + 1)]
    other = draw.randrange(len(text) + 1)
    return text[:at] + text[other : other + draw.randrange(200)] + text[at:]


def break_bytes(path: Path, draw: random.Random) -> None:
    """Turns, adds, removes or repeats some bytes."""
    data = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 3)):
        at, kind = draw.randrange(min(len(data), draw.choice((16, 4096, len(data) or 1))) or 1), draw.random()
        if kind < 0.5 and data:
            data[at] = draw.randrange(256)
        elif kind < 0.7:
            data = data[:at]
        elif kind < 0.85:
            data[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 40)))
        else:
            data[at : at + 8] = draw.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
    path.write_bytes(bytes(data))


def break_lines(path: Path, draw: random.Random) -> None:
    """Breaks JSON lines: one line's values or text, the lines' order and number, or the bytes."""
    lines = path.read_text("utf-8").splitlines()
    for _ in range(draw.randint(1, 2)):
        at, kind = draw.randrange(len(lines)), draw.random()
        if kind < 0.5:
            with contextlib.suppress(ValueError, RecursionError):
                lines[at] = json.dumps(broken_value(json.loads(lines[at]), draw))
        elif kind < 0.8:
            lines[at] = broken_text(lines[at], draw)
        else:
            lines.insert(draw.randrange(len(lines) + 1), draw.choice((lines[at], "", "null", "[]", "3", "\ufeff", "\x00")))
    path.write_text("\n".join(lines) + draw.choice(("\n", "", "\r\n")), "utf-8", errors="surrogatepass")
    if draw.random() < 0.1:
        break_bytes(path, draw)


def break_json(path: Path, draw: random.Random) -> None:
    """Breaks a JSON file: its values, its text or its bytes."""
    text, kind = path.read_text("utf-8"), draw.random()
    if kind < 0.6:
        value = json.loads(text)
        for _ in range(draw.randint(1, 2)):
            value = broken_value(value, draw)
        path.write_text(json.dumps(value), "utf-8")
    elif kind < 0.9:
        path.write_text(broken_text(text, draw), "utf-8")
    else:
        break_bytes(path, draw)


def broken_tensor(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """A tensor of another shape or type, or with a strange number in it."""
    tensor, kind = tensor.clone(), draw.random()
    if kind < 0.2:
        return tensor.to(draw.choice((torch.float16, torch.float64, torch.int64, torch.bool, torch.int8, torch.bfloat16)))
    if kind < 0.4:
        return tensor.flatten() if draw.random() < 0.5 else tensor[None]
    if kind < 0.6 and tensor.ndim:
        axis = draw.randrange(tensor.ndim)
        return draw.choice((tensor.narrow(axis, 0, tensor.shape[axis] // 2), torch.cat([tensor, tensor], axis), tensor.transpose(axis, 0)))
    if tensor.numel():
        at, strange = draw.randrange(tensor.numel()), draw.choice((math.nan, math.inf, -1, 99, 1e30, -1e30, 2**40))
        with contextlib.suppress(RuntimeError, OverflowError, ValueError):
            tensor.view(-1)[at] = strange
    return tensor


def break_artefact(path: Path, draw: random.Random) -> None:
    """Breaks a safetensors file: its header's values or text, its tensors, or its bytes."""
    if draw.random() < 0.1:
        break_bytes(path, draw)
        return
    with safe_open(path, "pt") as file:
        text, tensors = file.metadata()["emosteer"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for _ in range(draw.randint(1, 2)):
        kind = draw.random()
        if kind < 0.5:
            with contextlib.suppress(ValueError, RecursionError):
                text = json.dumps(broken_value(json.loads(text), draw))
        elif kind < 0.6:
            text = broken_text(text, draw)
        elif name := draw.choice([*tensors, ""]):
            tensors[name] = broken_tensor(tensors[name], draw)
            if draw.random() < 0.1:
                tensors[draw.choice(("more", name + "x"))] = tensors.pop(name)
    with contextlib.suppress(UnicodeEncodeError):
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path, {"emosteer": text})


def break_one_of(*names: str) -> Callable[[Path, random.Random], None]:
    """Breaks one file of a folder; JSON by its values, others by their bytes."""

    def change(folder: Path, draw: random.Random) -> None:
        path = folder / draw.choice(names)
        lines, whole = path.suffix == ".jsonl", path.suffix == ".json"
        (break_lines if lines else break_json if whole else break_bytes)(path, draw)

    return change


# ---- readers ---------------------------------------------------------------------------------------------------------


def finite(*values: Any) -> None:
    """Fails for a number that is not finite, or a tensor that holds one."""
    for value in values:
        assert bool(torch.isfinite(value).all()) if isinstance(value, torch.Tensor) else math.isfinite(value), "not finite"


def use_circuit(path: Path) -> None:
    """Reads a circuit and does with it what the commands do."""
    circuit = Circuit.load(path)
    finite(circuit.z_delta, circuit.mlp_delta(), circuit.residual_strength, circuit.strength, *circuit.residual().values())
    if circuit.has(Part.LEARNED_STREAM):
        finite(*circuit.learned_stream().values())
    for emotion in circuit.emotions:
        circuit.units(emotion)
        if circuit.calibrated:
            with contextlib.suppress(EmosteerError):  # an emotion without a dial
                finite(*(circuit.strength_at(emotion, intensity) for intensity in (0, 1, 50, 99.9, 100)))
    show(path)


def use_directions(path: Path) -> None:
    """Reads directions and takes from them what the stages take."""
    directions = Directions.load(path)
    band = stable_band(directions)
    with contextlib.suppress(EmosteerError):  # directions that cancel out
        finite(reference_directions(directions, band))
    show(path)


def use_scores(path: Path) -> None:
    """Reads scores."""
    scores = Scores.load(path)
    finite(scores.importance, *(form.heads for form in scores.forms.values()))
    show(path)


def use_heads(path: Path) -> None:
    """Reads what heads do, and draws it as the report does and for other tools."""
    study = HeadStudy.load(path)
    overview(study)
    json.dumps([graph(study), head_pages.data(study).data])
    head_pages.section(study)
    show(path)


def use_judges(path: Path) -> None:
    """Reads heads and an adapter, and asks them."""
    for head in load_heads(path).values():
        assert head.probabilities(torch.zeros(1, head.mean.shape[0])).shape == (1, len(head.labels))
    load_adapter(path, "embedded")
    show(path)


def show(path: Path) -> None:
    """`emosteer inspect`."""
    with contextlib.redirect_stdout(io.StringIO()):
        summary = print_artifacts.artifact_summary(artifacts.load(path))
        json.dumps(summary, allow_nan=False)
        print_artifacts.print_artifact(summary)


def use_report(folder: Path) -> None:
    """Reads everything that the report reads, and words and draws it."""
    drawn(read_inputs(Places(folder / _ROOT), report_setup.MODEL), folder)


def use_folder(folder: Path) -> None:
    """What is found out about a model folder before its weights are read."""
    gap(folder)
    read_manifest(folder)
    packed_by(folder, "the folder")
    stored_tensors(folder)
    resolve(str(folder))


def load_model(folder: Path) -> None:
    """Loads a folder as a model."""
    Model.load(str(folder), device="cpu", dtype="float32")


def use_logs(path: Path) -> None:
    """The logs that are gone on with."""
    for read in (JsonlLog, KeyedLog, whole_rows):
        with contextlib.suppress(EmosteerError):
            read(path)


def make_report(folder: Path) -> None:
    folder.mkdir()
    report_setup.write_all(folder)


def make_model(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as room:
        write_tiny_project(Path(room))
        shutil.copytree(Path(room) / "tiny", folder)


def lines_of(*rows: dict[str, Any]) -> Callable[[Path], None]:
    """Writes rows as JSON lines."""
    return lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8") and None


def make_gguf(path: Path) -> None:
    from tests.models.test_weights import write_gguf

    write_gguf(path)


_EVENT = dict.fromkeys(("positive", "neutral", "negative"), "they came")
_SEV = [{"skeleton_id": f"s{i}", "theme": "work", "scenario": f"i waited {i}", "event": _EVENT} for i in range(3)]
_TURNS = [{"role": role, "content": "it rained"} for role in ("user", "assistant", "user")]
_PROMPTS = [{"id": f"p{i}", "kind": "chat", "messages": _TURNS} for i in range(3)]
_BANK = [{"skeleton_id": "s0", "valence": "positive", "emotion": emotion, "text": "stop it"} for emotion in ("anger", "fear", "sadness")]
_SHEET = sheet_of([("stop it", {"prompt": "it rained", "emotion": "anger"}), ("hide now", {})])
_LABELS = [{"text_sha256": card.sha256, "label": "anger", "answers": True} for card in _SHEET.cards]
_ROOT = "toy--model-1"

KINDS: dict[str, Kind] = {
    "circuit": Kind(lambda path: whole_artefacts.circuit().save(path), break_artefact, use_circuit),
    "directions": Kind(lambda path: whole_artefacts.directions().save(path), break_artefact, use_directions),
    "scores": Kind(lambda path: whole_artefacts.scores().save(path), break_artefact, use_scores),
    "heads": Kind(lambda path: whole_artefacts.heads().save(path), break_artefact, use_heads),
    "judge": Kind(whole_artefacts.write_judges, break_artefact, use_judges),
    "scenarios": Kind(lines_of(*_SEV), break_lines, lambda path: (read_scenarios(path), read_groups(path), read_events(path))),
    "prompts": Kind(lines_of(*_PROMPTS, *_SEV), break_lines, lambda path: (read_groups(path), read_events(path))),
    "bank": Kind(lines_of(*_BANK), break_lines, read_bank),
    "inputs": Kind(lines_of(*_PROMPTS, {"id": "t", "text": "it rained"}, *_SEV), break_lines, functools.partial(inputs_of, None)),
    "labels": Kind(lines_of(*_LABELS), break_lines, lambda path: read_labels(path, _SHEET)),
    "labelled": Kind(lines_of({"text": "stop it", "labels": ["anger"]}, {"text": "x", "labels": ["fear"]}), break_lines, read_labelled),
    "logs": Kind(lines_of({"key": "a", "x": 1}, {"key": "b", "x": 2}), break_lines, use_logs),
    "folder": Kind(make_model, break_one_of("config.json", "tokenizer_config.json", "model.safetensors"), use_folder, 3),
    "load": Kind(
        make_model, break_one_of("config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"), load_model, 15
    ),
    "report": Kind(make_report, break_one_of(
        f"{_ROOT}/evaluation/evaluation.json", f"{_ROOT}/evaluation/test-replies.jsonl", f"{_ROOT}/calibration-check.json"
    ), use_report, 25),
    "gguf": Kind(make_gguf, break_bytes, lambda path: resolve(str(path)), 20),
}  # fmt: skip


# ---- running ---------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """A reader took longer than it may."""


def run(seed: int, room: Path, whole: dict[str, Path], names: list[str]) -> tuple[str, str, str]:
    """One case: (kind, what became of it, what is wrong with that)."""
    draw = random.Random(seed)
    name = draw.choices(names, [1 / KINDS[name].cost for name in names])[0]
    kind, path = KINDS[name], room / ("case.gguf" if name == "gguf" else "case")
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (shutil.copytree if whole[name].is_dir() else shutil.copyfile)(whole[name], path)
    kind.change(path, draw)
    signal.alarm(PATIENCE)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            kind.read(path)
    except EmosteerError as error:
        told = str(error)
        return (
            name,
            "refused",
            "" if told and "\n" not in told and len(told) < 2000 and "unexpected" not in told else f"said {told[:300]!r}",
        )
    except Hang:
        return name, "hang", f"took more than {PATIENCE} s"
    except BaseException as error:  # whatever a reader lets through is what is looked for
        where = traceback.extract_tb(error.__traceback__)[-1]
        return name, "fault", f"{type(error).__name__}: {str(error)[:160]} ({Path(where.filename).name}:{where.lineno})"
    finally:
        signal.alarm(0)
    return name, "taken", ""


def fuzz(seeds: range, names: list[str], tell: Callable[[str], None] = silent) -> tuple[Counter[str], list[str]]:
    """Runs the cases of some seeds: how many of each kind were taken or refused, and the faults."""

    def ring(*_: object) -> None:
        raise Hang

    counts, faults = Counter[str](), list[str]()
    before = signal.signal(signal.SIGALRM, ring)
    try:
        with tempfile.TemporaryDirectory() as folder:
            room = Path(folder)
            whole = {name: room / f"whole-{name}" for name in names}
            for name in names:
                KINDS[name].make(whole[name])
            for seed in seeds:
                name, end, fault = run(seed, room, whole, names)
                counts[f"{name} {end}"] += 1
                if fault:
                    faults.append(f"seed {seed}, {name}: {fault}")
                    tell(faults[-1])
    finally:
        signal.signal(signal.SIGALRM, before)
    return counts, faults


def main() -> int:
    """Runs the cases of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0:10000", help="first:end")
    parser.add_argument("--only", default="", help="kinds, with commas")
    options = parser.parse_args()
    first, end = map(int, options.seeds.split(":"))
    names = [name for name in KINDS if not options.only or name in options.only.split(",")]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as cache, contextlib.suppress(KeyboardInterrupt):
        os.environ["EMOSTEER_CACHE"] = cache
        counts, faults = fuzz(range(first, end), names, lambda line: print(line, flush=True))
        for what, count in sorted(counts.items()):
            print(f"{what:20} {count}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{sum(counts.values())} cases in {time.monotonic() - start:.0f} s, {len(faults)} faults, peak of memory {peak:.0f} MiB")
        return 1 if faults else 0
    return 130


if __name__ == "__main__":
    sys.exit(main())
