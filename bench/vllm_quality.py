"""Does vLLM write as well as the built-in engine at the same positions, and what do those positions change?

    EMOSTEER_VLLM_PYTHON=VLLM_ENV/bin/python VLLM_CPU_KVCACHE_SPACE=2 python bench/vllm_quality.py --room quality/

`emosteer generate --engine vllm` answers the test scenario-events in six emotions; the built-in engine answers them from the same
checkpoints (all positions), and once more steered in the reply alone, as `generate` does it by default. The embedded judge reads all three,
blind. Prints, of each, six-way accuracy, perplexity ratio to unsteered replies and the share that names its emotion; and, in points with
the standard error over events, vLLM minus built-in and all positions minus the reply's. What is written is kept: a rerun goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_serve import builtin, test_groups

from emosteer.base.files import read_jsonl, write_jsonl
from emosteer.base.progress import note
from emosteer.circuits.places import require_circuit
from emosteer.evaluation.metrics import measure
from emosteer.generation.decoding import Decoding
from emosteer.generation.fluency import reply_nll
from emosteer.generation.generate import Request
from emosteer.judges.protocol import EmotionJudge
from emosteer.judges.registry import PANEL, judge_of, make_judges
from emosteer.models.model import Model
from emosteer.models.weights import resolve as weights
from emosteer.scenarios.prompts import INSTRUCTION
from emosteer.scenarios.scenarios import Group, parse_emotions
from emosteer.serving.vllm_writer import Served, VllmWriter
from emosteer.writing.jobs import Job, request_of, row_of

Rows = dict[tuple[str, str], dict[str, Any]]
Cells = Mapping[tuple[str, str], Mapping[str, float]]


def keyed(rows: Iterable[dict[str, Any]]) -> Rows:
    """Rows by event and emotion."""
    return {(row["id"].rsplit("/", 1)[0], row["emotion"]): row for row in rows}


def by_command(options: argparse.Namespace, groups: Sequence[Group], emotions: Sequence[str], out: Path, more: Sequence[str]) -> Rows:
    """What `emosteer generate` writes, as a user would run it."""
    lines = options.room / "events.jsonl"
    write_jsonl(lines, [{"id": str(group.key), "text": group.text} for group in groups])
    command = [sys.executable, "-m", "emosteer", "generate", "-m", options.model, "-i", str(lines), "-o", str(out), *more]
    command += ["-e", ",".join(emotions), "--dtype", options.dtype, "--max-new-tokens", str(options.max_new_tokens)]
    command += [] if options.circuit is None else ["--circuit", str(options.circuit)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return keyed(row for _, row in read_jsonl(out))


def by_builtin(folder: Path, jobs: Sequence[Job], requests: Sequence[Request], options: argparse.Namespace, out: Path) -> Rows:
    """The built-in engine's replies from a folder, kept in a file when all are there."""
    if not out.exists():
        note(f"built-in engine: {out.stem}")
        replies, _ = builtin(folder, options.dtype, requests, Decoding(options.max_new_tokens), options.batch_size)
        write_jsonl(out, [row_of(job, reply, "builtin") for job, reply in zip(jobs, replies, strict=True)])
    rows = [row for _, row in read_jsonl(out)]
    if [row["id"] for row in rows] != [job.id for job in jobs]:
        raise SystemExit(f"{out} holds replies to other events; name another --room")
    return keyed(rows)


def measured(rows: Rows, judge: EmotionJudge, plain: Model, emotions: Sequence[str]) -> dict[tuple[str, str], dict[str, float]]:
    """(event, emotion) -> the figures of its reply."""
    texts = [row["text"] for row in rows.values()]
    opinions, costs = judge.opinions(texts), reply_nll(plain, texts)
    unread = {"sound": True, "answers": math.nan}  # neither is compared here
    return {
        key: measure(
            {
                **row,
                **unread,
                "probabilities": opinion.probabilities,
                "judged": opinion.emotion(),
                "nll": None if math.isnan(cost) else cost,
            },
            key[1],
            emotions,
        )
        for (key, row), opinion, cost in zip(rows.items(), opinions, costs, strict=True)
    }


def mean(cells: Mapping[Any, Mapping[str, float]], name: str) -> float:
    return statistics.fmean(cell[name] for cell in cells.values())


def error_of(one: Mapping[Any, Any], two: Mapping[Any, Any], name: str) -> float:
    """Standard error of the mean difference, events being independent and the emotions of an event not."""
    differences: dict[str, list[float]] = {}
    for key in one:
        differences.setdefault(key[0], []).append(one[key][name] - two[key][name])
    means = [statistics.fmean(values) for values in differences.values()]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else float("nan")


def difference(one: Cells, two: Cells, means: Mapping[str, float], others: Mapping[str, float], name: str) -> dict[str, float]:
    """In points; the error of a ratio is that of its logarithm times the ratio."""
    error = error_of(one, two, "nll") * others["ratio"] if name == "ratio" else error_of(one, two, name)
    return {"difference": round(100 * (means[name] - others[name]), 2), "standard_error": round(100 * error, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--circuit", type=Path)
    parser.add_argument("--emotions", default="all")
    parser.add_argument("--events", type=int, default=480)
    parser.add_argument("--dtype", default="bfloat16", help="of both engines")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64, help="of the built-in engine")
    parser.add_argument("--engine-option", action="append", default=[], help="of vLLM, NAME=VALUE")
    parser.add_argument("--room", type=Path, default=Path("vllm-quality"))
    options = parser.parse_args()
    options.room.mkdir(parents=True, exist_ok=True)
    found = weights.resolve(options.model, progress=note)
    circuit, path = require_circuit(found, options.circuit)
    emotions, groups = parse_emotions(options.emotions, circuit.emotions), test_groups(options.events)
    judge = judge_of(make_judges(PANEL))
    vllm = ["--engine", "vllm", *(part for option in options.engine_option for part in ("--engine-option", option))]
    theirs = by_command(options, groups, emotions, options.room / "vllm.jsonl", vllm)
    builtin_options = ["--engine", "builtin", "--positions", "reply", "--batch-size", str(options.batch_size)]
    reply = by_command(options, groups, emotions, options.room / "reply.jsonl", builtin_options)
    served = Served.of(found, options.dtype)
    writer = VllmWriter(served, (circuit, path), Decoding(options.max_new_tokens), INSTRUCTION, "circuit")

    def answered(emotion: str) -> Rows:
        steered = emotion in emotions
        strength = circuit.default_strength(emotion) if steered else None
        folder = writer.checkpoint(emotion, strength) if strength is not None else found.path
        jobs = [Job.of(group, emotion, "circuit" if steered else "none", strength) for group in groups]
        return by_builtin(folder, jobs, [request_of(served, job, INSTRUCTION) for job in jobs], options, options.room / f"{emotion}.jsonl")

    ours: Rows = {}
    for emotion in emotions:
        ours |= answered(emotion)
    unsteered = answered("none")
    written = {"vllm": theirs, "builtin": ours, "builtin, reply only": reply}
    written = {name: {key: rows[key] for key in ours} for name, rows in written.items()}
    plain = Model.load(options.model, device="cpu", dtype="float32")
    costs = [10.0 if math.isnan(cost) else cost for cost in reply_nll(plain, [row["text"] for row in unsteered.values()])]
    base = statistics.fmean(costs)
    cells = {name: measured(rows, judge, plain, emotions) for name, rows in written.items()}
    engines = {
        engine: {
            "accuracy": mean(some, "accuracy"),
            "ratio": math.exp(mean(some, "nll") - base),
            "names": mean(some, "names"),
            "n_tokens": mean(some, "n_tokens"),
            "unfinished": mean(some, "unfinished"),
        }
        for engine, some in cells.items()
    }
    points = {
        f"{one} minus {two}": {
            name: difference(cells[one], cells[two], engines[one], engines[two], name) for name in ("accuracy", "ratio", "names")
        }
        for one, two in (("vllm", "builtin"), ("builtin", "builtin, reply only"))
    }
    result = {
        "model": found.name,
        "dtype": options.dtype,
        "events": len(groups),
        "emotions": list(emotions),
        "identical_replies": statistics.fmean(float(written["vllm"][key]["text"] == ours[key]["text"]) for key in ours),
        "engines": {engine: {name: round(value, 4) for name, value in some.items()} for engine, some in engines.items()},
        "points": points,
        "within_3_points": all(abs(point["difference"]) <= 3 for point in points["vllm minus builtin"].values()),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
