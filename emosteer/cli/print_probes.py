"""Probes -> a plain summary (JSON) and the tables of `probe` and `inspect`. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emosteer.base.tables import print_table
from emosteer.probing.probes import LINEAR, NONLINEAR, Probes
from emosteer.probing.settings import HEADS

Summary = dict[str, Any]
#: Layers and heads that are printed.
SHOWN = 12


def probes_summary(found: Probes) -> Summary:
    """Everything that was measured."""
    return {
        "model": found.provenance.model,
        "labels": list(found.labels),
        "read": found.read,
        "texts": dict(found.texts),
        "left_out": dict(found.left_out),
        "chance": 1 / len(found.labels),
        "lexical": dict(found.lexical),
        "best": {kind: dict(found.point(kind)) for kind in found.best},
        "chosen": found.chosen,
        "points": [dict(row) for row in found.points],
        "confusion": found.confusion.tolist(),
        "prompting": dict(found.prompting),
        "persistence": dict(found.persistence),
        "malleability": dict(found.malleability),
        "notes": list(found.notes),
    }


def print_probes(summary: Summary) -> None:
    """The tables of `probe`."""
    n = summary["texts"]
    print(f"{summary['model']}: {n['train']} texts to fit on, {n['test']} to test on, {len(summary['labels'])} labels -> {summary['file']}")
    if summary["left_out"]:
        print("left out:", ", ".join(f"{count} ({why})" for why, count in summary["left_out"].items()))
    print(f"words alone name {_interval(summary['lexical'])} of the test texts; one label for all would be about {summary['chance']:.3f}")
    for kind in summary["best"]:
        _print_kind(summary, kind)
    best = summary["best"][summary["chosen"]]
    title = f"confusion at L{best['layer']} of {summary['chosen']} (rows: label, columns: read)"
    labels = summary["labels"]
    print_table(("", *labels), [[label, *row] for label, row in zip(labels, summary["confusion"], strict=True)], title)
    _print_prompting(summary["prompting"])
    _print_persistence(summary["persistence"])
    _print_malleability(summary["malleability"])
    for note in summary["notes"]:
        print(f"note: {note}")


def _print_kind(summary: Summary, kind: str) -> None:
    rows = [row for row in summary["points"] if row["kind"] == kind and row["form"] == LINEAR]
    curved = {row["layer"]: row for row in summary["points"] if row["kind"] == kind and row["form"] == NONLINEAR}
    best = summary["best"][kind]
    if kind == HEADS:
        shown = sorted(rows, key=lambda row: float(row["held_out_loss"]))[:SHOWN]
    else:
        step = max(1, len(rows) // SHOWN)
        shown = [row for row in rows if row["layer"] % step == 0 or row is rows[-1] or row["layer"] == best["layer"]]
    table = []
    for row in shown:
        name = f"L{row['layer']}H{row['unit']}" if kind == HEADS else f"L{row['layer']}"
        mark = " *" if (row["layer"], row["unit"]) == (best["layer"], best["unit"]) else ""
        cells: list[object] = [name + mark, _interval(row["accuracy"]), row["f1"], row["calibration"], row["shuffled"], row["selectivity"]]
        table.append([*cells, *([_interval(curved[row["layer"]]["accuracy"])] if curved else [])])
    head = ("place", "accuracy", "macro-F1", "calibration error", "shuffled", "selectivity", *(["non-linear"] if curved else []))
    print_table(head, table, f"{kind}: test texts; * has the least loss in cross-validation")


def _print_prompting(found: Mapping[str, Any]) -> None:
    if not found:
        return
    rows = [
        [name, _interval(row["accuracy"]), row["f1"], row["calibration"], _interval(row["probe_less"])]
        for name, row in found["asked"].items()
    ]
    title = f"the model asked about {found['texts']} of them; the probe reads {_interval(found['probe'])} of these"
    print_table(("asked", "accuracy", "macro-F1", "calibration error", "probe less this"), rows, title)


def _print_persistence(found: Mapping[str, Any]) -> None:
    if not found:
        return
    names = ("fitted", "transferred", "shuffled", "lexical")
    rows = [[row["distance"], *(_interval(row[name]) for name in names)] for row in found["points"]]
    title = f"after so many neutral tokens, at {found['site']}, {found['texts']} texts"
    print_table(("tokens", "probe fitted there", "probe fitted at the passage", "shuffled", "words in the window"), rows, title)


def _print_malleability(found: Mapping[str, Any]) -> None:
    if not found:
        return
    rows = [
        [
            f"{row['how']}{'' if row['dose'] is None else ' x {:g}'.format(row['dose'])}",
            row["label"],
            row["before"],
            row["after"],
            _interval(row["rise"]),
            row["rise_shuffled"],
            row["read_before"],
            row["read_after"],
        ]
        for row in found["rows"]
    ]
    head = ("moved by", "label", "before", "after", "rise", "shuffled probe", "read as it", "then")
    print_table(
        head, rows, f"the probe's probability of a label in {found['texts']} texts, those of the label left out, at {found['site']}"
    )


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
