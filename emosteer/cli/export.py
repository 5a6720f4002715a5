"""`emosteer export`: a circuit at one strength, for other engines."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emosteer.base.errors import UsageError, suggest
from emosteer.circuits.dial import MAX_STRENGTH
from emosteer.circuits.places import ARTIFACTS
from emosteer.cli.command_line import command_line
from emosteer.cli.options import DEFAULT_MODEL, JsonOption, ModelOption, RootOption, one_of
from emosteer.scenarios.scenarios import parse_emotions

if TYPE_CHECKING:
    from emosteer.export.vectors import ExportRequest

FORMATS = ("checkpoint", "gguf", "gguf-model")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export(
    context: typer.Context,
    emotion: Annotated[str, typer.Option("--emotion", "-e", help="One emotion.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="New folder; for GGUF a folder or FILE.gguf.", metavar="DIR", show_default=False)
    ],
    to: Annotated[str, typer.Option("--to", help="checkpoint, gguf (llama.cpp control vector) or gguf-model.")] = "checkpoint",
    model: ModelOption = DEFAULT_MODEL,
    intensity: Annotated[
        float | None, typer.Option(help="0 (unsteered) to 100 (as strong as the text bears); needs `calibrate`.", show_default=False)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(min=-MAX_STRENGTH, max=MAX_STRENGTH, help="Multiplier; the circuit's own default if not given.", show_default=False),
    ] = None,
    circuit: Annotated[Path | None, typer.Option(help="Circuit file; else artifacts/, else the shipped one.", metavar="FILE")] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of a checkpoint: auto (as the model has it), float32, bfloat16 or float16.")
    ] = "auto",
    shard_size: Annotated[str, typer.Option(help="Largest weights file of a checkpoint, such as 500MB.")] = "2GB",
    root: RootOption = ARTIFACTS,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model with an emotion built in, for vLLM, transformers or llama.cpp."""
    if to not in FORMATS:
        raise UsageError(f"unknown format '{to}'{suggest(to, FORMATS)}; expected {', '.join(FORMATS)}")
    if dtype not in PRECISIONS:
        raise UsageError(f"unknown dtype '{dtype}'{suggest(dtype, PRECISIONS)}; expected {', '.join(PRECISIONS)}")
    if to != "checkpoint" and dtype != "auto":
        raise UsageError(f"--dtype has no meaning with --to {to}; it belongs to --to checkpoint")
    one_of(intensity, strength)
    limit = parse_size(shard_size)
    steering = _steering(model, emotion, intensity, strength, circuit, root, command_line(context))
    facts = _write(to, steering, out, dtype, limit, force)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for line in _lines(facts):
        typer.echo(line)


def parse_size(text: str) -> int:
    """Bytes of a size such as 2GB, 500MB or 512MiB.

    Raises:
        UsageError: for anything else, or nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if size < 1:
        raise UsageError(f"expected --shard-size such as 500MB or 2GB, found '{text}'")
    return size


def _steering(
    model: str, emotion: str, intensity: float | None, strength: float | None, circuit: Path | None, root: Path, command: str
) -> ExportRequest:
    """Finds model, circuit and strength as `generate` does; no weights are loaded."""
    from emosteer.base.progress import note
    from emosteer.circuits.places import require_circuit, require_dial
    from emosteer.export.vectors import ExportRequest
    from emosteer.models.weights.resolve import resolve

    found = resolve(model, progress=note)
    made, path = require_circuit(found, circuit, root)
    made = made.without_examples()  # nothing stands before the prompts of an exported model
    wanted = parse_emotions(emotion, made.emotions)
    if len(wanted) != 1:
        raise UsageError(f"expected one emotion, found {len(wanted)}; an export carries one (make one folder for each)")
    if intensity is not None:
        require_dial(found, (made, path), circuit)
        strength = made.strength_at(wanted[0], intensity)
    strength = made.default_strength(wanted[0]) if strength is None else strength
    return ExportRequest(found, made, path, wanted[0], strength, intensity, command)


def _write(to: str, steering: ExportRequest, out: Path, dtype: str, limit: int, force: bool) -> dict[str, Any]:
    if to == "checkpoint":
        from emosteer.export.checkpoint import export_checkpoint

        return export_checkpoint(steering, out, precision=dtype, shard_size=limit, force=force)
    from emosteer.export.llamacpp import export_control_vector, export_gguf_model

    return (export_control_vector if to == "gguf" else export_gguf_model)(steering, out, force=force)


def _lines(facts: dict[str, Any]) -> list[str]:
    """What a person is told."""
    dial = f" (intensity {facts['intensity']:g})" if facts["intensity"] is not None else ""
    first = f"{facts['model']}, {facts['emotion']} at strength {facts['strength']:g}{dial} -> {facts['out']}"
    where = shlex.quote(facts["out"])
    if facts["kind"] == "checkpoint":
        rounding = f"biases in {facts['dtype']}, rounded by at most {facts['bias_rounding']:.1e} of the largest"
        lines = [f"{facts['shards']} weights file(s), {facts['bytes'] / 1e6:,.0f} MB, {rounding}", f"serve it: vllm serve {where}"]
    elif facts["kind"] == "gguf":
        first_layer, last = facts["layers"]
        lines = [
            f"layers {first_layer} to {last}; an approximation: a layer's MLP does not see what its attention adds (docs/EXPORT.md)",
            f"use it: llama-cli -m MODEL.gguf --control-vector {where}",
        ]
    else:
        lines = [f"{facts['biases']} biases, {facts['bytes'] / 1e6:,.0f} MB, tensors as they were", f"serve it: llama-server -m {where}"]
    return [first, *lines, "a bias or a control vector acts on the prompt's tokens too; `generate` steers where the reply is written"]
