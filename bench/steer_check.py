"""Does steering work, and is the text still good? Judged blind, at identical decoding, against controls.

For each method: six-way accuracy of a blind judge, perplexity ratio to the unsteered replies (mean nats per token of the reply alone
under the plain model, exponentiated difference), the share of replies that name the emotion, and the share cut off. Reads the test
split by default; --split dev reads a fifth of the training scenarios instead, for choices.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from emosteer.circuit import Circuit
from emosteer.fluency import reply_nll
from emosteer.generation import Decoding
from emosteer.judging import Judge
from emosteer.model import Model
from emosteer.pipeline import require_circuit
from emosteer.progress import note
from emosteer.scenarios import Group, data_path, groups_of, name_pattern, read_scenarios, split, stable_share, stem_pattern
from emosteer.tables import print_table
from emosteer.writing import Job, Writer, write_file


def main() -> None:
    """Parses the command line, writes the replies (resumable) and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--circuit", type=Path)
    parser.add_argument("--split", choices=("test", "dev"), default="test")
    parser.add_argument("--scenarios", type=Path, help="another SEV file instead of a shipped split")
    parser.add_argument("--groups", type=int, default=40, help="scenario-events, evenly drawn; 0 is all")
    parser.add_argument("--methods", default="none,prompt,circuit,residual")
    parser.add_argument("--strength", type=float, help="overrides the circuit's default")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("artifacts/steer-check"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    groups = chosen_groups(options.scenarios, options.split, options.groups)
    model = Model.load(options.model, dtype=options.dtype)
    circuit, path = require_circuit(model, options.circuit)
    judge = Judge.train()
    note(f"judge: {judge.held_out_accuracy:.1%} of its own held-out sentences; circuit: {path}")
    decoding = Decoding(max_new_tokens=options.max_new_tokens)
    table, base = [], None
    others = [method for method in options.methods.split(",") if method != "none"]
    for method in ("none", *others):  # first, because every ratio refers to it
        rows = replies(model, circuit, groups, method, options, decoding)
        measured = measure(model, judge, rows, circuit.emotions)
        base = measured["nll"] if base is None else base
        table.append(
            {"method": method, "strength": options.strength, **measured, "ratio": float(torch.tensor(measured["nll"] - base).exp())}
        )
    if options.json:
        print(json.dumps(table, indent=2))
        return
    names = ("method", "accuracy", "neutral", "nll", "median_nll", "ratio", "names", "synonyms", "cut_off", "n")
    print_table((*names, *circuit.emotions), [(*(row[n] for n in names), *row["by_emotion"].values()) for row in table])


def chosen_groups(scenarios: Path | None, which: str, count: int) -> list[Group]:
    """The scenario-events to answer."""
    found = read_scenarios(scenarios or data_path("sev/test.jsonl" if which == "test" else "sev/train.jsonl"))
    if scenarios is None and which == "dev":
        found = split(found, 0.2, 0)[1]
    groups = sorted(groups_of(found), key=lambda group: stable_share(str(group.key), 1))
    return groups[:count] if count else groups


def replies(
    model: Model, circuit: Circuit, groups: Sequence[Group], method: str, options: argparse.Namespace, decoding: Decoding
) -> list[dict]:
    """One reply per scenario-event and emotion; unsteered ones are written once and count for every emotion."""
    if method == "none":
        written = _file(model, circuit, [Job.of(g, "none", method, None) for g in groups], method, options, decoding)
        return [{**row, "emotion": emotion} for row in written for emotion in circuit.emotions]
    jobs = []
    for group in groups:
        for index, emotion in enumerate(circuit.emotions):
            default = {"circuit": circuit.strength[index].item(), "residual": circuit.residual_strength}.get(method)
            strength = default if default is None or options.strength is None else options.strength
            jobs.append(Job.of(group, emotion, method, strength))
    return _file(model, circuit, jobs, method, options, decoding)


def _file(model: Model, circuit: Circuit, jobs: list[Job], method: str, options: argparse.Namespace, decoding: Decoding) -> list[dict]:
    steered = circuit if method in ("circuit", "residual") else None
    writer = Writer(model, steered, decoding, circuit.instruction, method, batch_size=64)
    key = writer.run_key(circuit_key(circuit) if steered else "")
    return write_file(writer, jobs, options.out / f"{model.name}-{method}-{key}.jsonl", key)


def circuit_key(circuit: Circuit) -> str:
    """A hash of everything that the circuit adds."""
    parts = [circuit.z_delta, circuit.neuron_delta, circuit.neuron_index, circuit.vectors, circuit.rms]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def measure(model: Model, judge: Judge, rows: Sequence[dict], emotions: Sequence[str]) -> dict:
    """The figures of one method."""
    texts = [row["text"] for row in rows]
    named = judge.names(texts, emotions)
    right = torch.tensor([float(name == row["emotion"]) for name, row in zip(named, rows, strict=True)])
    neutral = judge.probabilities(texts)[:, judge.labels.index("neutral")].mean().item()
    nll = torch.tensor(reply_nll(model, texts)).nan_to_num(10.0)  # an empty reply is a broken one
    naming = [bool(stem_pattern(r["emotion"]).search(r["text"])) for r in rows]
    synonyms = [bool(name_pattern(r["emotion"]).search(r["text"])) for r in rows]
    by = {e: right[[i for i, r in enumerate(rows) if r["emotion"] == e]].mean().item() for e in emotions}
    return {
        "accuracy": right.mean().item(),
        "neutral": neutral,
        "nll": nll.mean().item(),
        "median_nll": nll.median().item(),
        "names": sum(naming) / len(rows),
        "synonyms": sum(synonyms) / len(rows),
        "cut_off": sum(r["finish_reason"] == "length" for r in rows) / len(rows),
        "n": len(rows),
        "by_emotion": by,
    }


if __name__ == "__main__":
    main()
