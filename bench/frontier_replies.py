"""What the circuits of `bench.frontier` write, as the panel reads it, and the tables of both."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from bench.showcase import standalone
from emosteer.base.errors import UsageError
from emosteer.base.files import slug, write_text
from emosteer.base.jsonl import KeyedLog, whole_rows
from emosteer.base.progress import note
from emosteer.calibration.trials import circuit_key
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import CIRCUIT, NONE
from emosteer.evaluation.bootstrap import Draws, estimate, mean
from emosteer.evaluation.metrics import Table, judged_rows, table_of
from emosteer.generation.decoding import Decoding
from emosteer.judges.jury import Jury, make_jury
from emosteer.judges.registry import PANEL
from emosteer.models.model import Model
from emosteer.report import plots
from emosteer.scenarios.scenarios import Group
from emosteer.scenarios.shipped import development_groups
from emosteer.writing.contest_writer import ContestWriter, cells_of

DECODING = Decoding.usual(max_new_tokens=48)
SHOWN = ("good", "emotion", "answers", "sound")


def read(options: argparse.Namespace, selections: Sequence[str]) -> None:
    """Writes with every circuit of the wanted selections and sizes, and with further ones; keeps what the panel says of it.

    Raises:
        UsageError: if there is no circuit to read.
    """
    sizes = [float(size) for size in options.sizes.split(",")]
    files = {
        f"{name} {size:g}": options.out / f"{slug(name.replace(':', '/'))}_{size:g}.safetensors" for name in selections for size in sizes
    }
    files = {key: path for key, path in files.items() if path.exists()} | {path.stem: path for path in options.circuits}
    if not files:
        raise UsageError(f"expected circuits in {options.out}; make them with `python -m bench.frontier learn`")
    model = Model.load(options.model, dtype=options.dtype)
    groups = development_groups(options.prompts + options.choose).groups
    halves = groups[: options.choose], groups[options.choose : options.choose + options.prompts]
    strengths = [float(strength) for strength in options.strengths.split(",")]
    done, replies = KeyedLog(options.out / "readings.jsonl"), KeyedLog(options.out / "replies.jsonl")
    jury = make_jury(PANEL)(KeyedLog(options.out / "opinions.jsonl"))
    for key, path in files.items():
        row_key = json.dumps([key, circuit_key(Circuit.load(path)), options.strengths, options.choose, options.prompts])
        if row_key in done.rows:
            continue
        row = one(model, Circuit.load(path, model), jury, replies, halves, strengths)
        done.add({row_key: {"circuit": key, **row}})
        note(f"frontier: {key}: strength {row['strength']:g}, good {row['figures']['good']['value']:.3f}")


def one(
    model: Model,
    circuit: Circuit,
    jury: Jury,
    replies: KeyedLog,
    halves: tuple[Sequence[Group], Sequence[Group]],
    strengths: Sequence[float],
) -> dict[str, Any]:
    """The strength with the most good replies to the first half of the prompts, and what it gives on the second."""
    vectors, added = {CIRCUIT: circuit.steering(model)}, {CIRCUIT: circuit_key(circuit)}
    writer = ContestWriter(model, circuit.emotions, vectors, added, DECODING, circuit.instruction, replies)

    def table(groups: Sequence[Group], strength: float) -> tuple[Table, list[dict[str, Any]]]:
        cells = cells_of(CIRCUIT, groups, dict.fromkeys(circuit.emotions, strength)) if strength else cells_of(NONE, groups, {})
        rows = judged_rows(cells, writer.write(cells, f"strength {strength:g}"), jury, "reading")
        return table_of(rows, groups, circuit.emotions), rows

    tables = {strength: table(halves[0], strength)[0] for strength in strengths}
    tried = {strength: {name: round(some[name].mean().item(), 4) for name in SHOWN} for strength, some in tables.items()}
    best = max(tried, key=lambda strength: tried[strength]["good"])
    found, rows = table(halves[1], best)
    kept = ("id", "emotion", "prompt", "text", "judged", "answers", "sound")
    return {
        "strength": best,
        "tried": tried,
        "figures": {name: estimate(mean(found[name], Draws.make(len(halves[1])))) for name in SHOWN},
        "by_emotion": dict(zip(circuit.emotions, found["good"].mean(0).tolist(), strict=True)),
        "good": found["good"].tolist(),
        "replies": [{name: row[name] for name in kept} for row in rows],
    }


def show(folder: Path) -> str:
    """The tables of margins, scores and readings as Markdown; also written, with everything else that is known, to `frontier.json`.

    Raises:
        UsageError: if nothing was learned there.
    """
    margins = [row for path in sorted((folder / "margins").glob("*.jsonl")) for row in whole_rows(path)]
    if not margins:
        raise UsageError(f"expected margins in {folder}/margins; make them with `python -m bench.frontier learn`")
    readings = whole_rows(folder / "readings.jsonl") if (folder / "readings.jsonl").exists() else []
    settings = json.loads((folder / "settings.json").read_text()) if (folder / "settings.json").exists() else {}
    kept = {"settings": settings, "margins": margins, "readings": readings}
    write_text(folder / "frontier.json", json.dumps(kept, indent=1) + "\n")
    sizes = sorted({row["size"] for row in margins}, reverse=True)
    parts = []
    for title, name in (("Margin, nats per token", "margin"), ("Final score, share of all heads' at equal length", "score")):
        parts += [f"{title}:", "", _line(["", *(f"{size:.1%}" for size in sizes)]), _line(["---"] * (len(sizes) + 1))]
        parts += [
            _line([selection, *(_mean_of(margins, selection, size, name) for size in sizes)])
            for selection in dict.fromkeys(row["selection"] for row in margins)
        ]
        parts.append("")
    if readings:
        parts += [_line(["circuit", "strength", *SHOWN]), _line(["---"] * (2 + len(SHOWN)))]
        parts += [_line([row["circuit"], f"{row['strength']:g}", *(_share(row["figures"][name]) for name in SHOWN)]) for row in readings]
    return "\n".join(parts)


def places(folder: Path, sizes: Sequence[float]) -> str:
    """Where the circuits of some sizes lie, as Markdown: heads and neurons by third of the layers, all emotions together, and how much of
    them two emotions share (Jaccard overlap, the mean over pairs)."""
    lines = [_line(["circuit", "heads by third", "neurons by third", "heads shared", "neurons shared"]), _line(["---"] * 5)]
    for path in sorted(path for size in sizes for path in folder.glob(f"*_{size:g}.safetensors")):
        circuit = Circuit.load(path)
        neurons = circuit.mlp_delta() != 0
        thirds = [[str(int(part.sum())) for part in units.float().tensor_split(3, 1)] for units in (circuit.heads, neurons)]
        shared = [f"{_shared(units.flatten(1).float()):.2f}" for units in (circuit.heads, neurons)]
        lines.append(_line([path.stem, *(", ".join(some) for some in thirds), *shared]))
    return "\n".join(lines)


def _shared(units: Tensor) -> float:
    """Mean Jaccard overlap of the rows of ones and zeros."""
    both = units @ units.T
    either = units.sum(1)[:, None] + units.sum(1) - both
    pairs = ~torch.eye(len(units), dtype=torch.bool)
    return (both / either.clamp_min(1))[pairs].mean().item()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean_of(rows: Sequence[Mapping[str, Any]], selection: str, size: float, name: str) -> str:
    found = [fmean(row[name].values()) for row in rows if name in row and (row["selection"], row["size"]) == (selection, size)]
    return f"{found[0]:.2f}" if found else ""


def _share(figure: Mapping[str, float]) -> str:
    return f"{100 * figure['value']:.0f} [{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]"


def figure(folder: Path) -> str:
    """Margin against size, one line per selection, as SVG for light and dark pages.

    Raises:
        EmosteerError: as `show`.
    """
    show(folder)
    rows = [row for row in json.loads((folder / "frontier.json").read_text())["margins"] if "margin" in row and "+" not in row["selection"]]
    points = [{"x": 100 * row["size"], "y": fmean(row["margin"].values()), "series": row["selection"]} for row in rows]
    points = [{**point, "tip": plots.tip(f"{point['series']}, {point['x']:g} %: {point['y']:.2f}")} for point in points]
    shapes = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
    selections = list(dict.fromkeys(point["series"] for point in points))
    styles = {series: _style(series, shapes[number % len(shapes)]) for number, series in enumerate(selections)}
    x = plots.quantity(
        "x",
        "size: share of the heads and of the neurons, %",
        domain=(0.8 * min(point["x"] for point in points), 1.2 * max(point["x"] for point in points)),
        log=True,
        values=[100 * size for size in (0.005, 0.02, 0.1, 0.5)],
    )
    y = plots.quantity("y", "margin on held-out prompts, nats per token")
    legend = {"title": None, "orient": "top", "columns": 6, "columnPadding": 34}  # room for fonts wider than those it is laid out with
    color, shape = (plots.named("series", styles, look, legend) for look in ("paint", "shape"))
    dash = plots.named("series", styles, "dash")
    layers = [
        plots.mark("line", {"x": x, "y": y, "color": color, "strokeDash": dash}, strokeWidth=2),
        plots.mark("point", {"x": x, "y": y, "color": color, "shape": shape, "description": plots.told()}, size=60, filled=True, opacity=1),
    ]
    alt_text = "Margin by size. " + "; ".join(f"{p['series']} at {p['x']:g} %: {p['y']:.2f}" for p in points)
    return standalone(plots.svg(plots.chart(points, layers, 340, plots.WIDE), alt_text))


def _style(selection: str, shape: str) -> plots.Style:
    """Learned selections in one colour, rankings in another, random ones grey."""
    if selection.startswith("random"):
        return plots.Style("m-control", shape, (2, 3))
    return plots.Style(
        "series-1" if selection.startswith(("gradual", "gates")) else "series-2", shape, (6, 3) if ":" in selection else (1, 0)
    )
