"""Effects -> a plain summary (JSON) and the tables of `effects` and `inspect`. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emosteer.base.tables import print_table
from emosteer.circuits.methods import CIRCUIT
from emosteer.side_effects.limits import held_table
from emosteer.side_effects.settings import LIMITS, Limits
from emosteer.side_effects.side_effects import SideEffects

Summary = dict[str, Any]
#: What the tables call a measure.
HEADS = {
    "nll": "perplexity ratio",
    "right": "accuracy",
    "refused": "refuses harmful",
    "overrefused": "refuses harmless",
    "joins": "joins in",
    "keeps": "keeps boundary",
    "felt": "emotion read",
    "abuse": "insult or threat",
    "foreign": "not English",
    "tokens": "tokens",
}


def effects_summary(found: SideEffects) -> Summary:
    """Everything that was measured."""
    limits = Limits(dict(found.limits))
    return {
        "model": found.provenance.model,
        "circuit_sha256": found.circuit_sha256,
        "emotions": list(found.emotions),
        "unsteered": dict(found.unsteered),
        "rows": [dict(row) for row in found.rows],
        "limits": held_table(found.rows, found.emotions, limits),
        "patterns": [dict(row) for row in found.patterns],
        "feedback": [dict(row) for row in found.feedback],
        "after": [dict(row) for row in found.after],
        "after_intensity": found.after_intensity,
        "notes": list(found.notes),
    }


def print_effects(summary: Summary) -> None:
    """The tables of `effects`."""
    plain = summary["unsteered"]
    sizes = ", ".join(f"{plain['figures'][name]['n']} {what}" for name, what in _SIZES.items() if name in plain["figures"])
    print(f"{summary['model']}: {sizes} -> {summary['file']}")
    rows = summary["rows"]
    there = [name for name in HEADS if name in plain["figures"]]
    shown = [name for name in there if name not in ("felt", "tokens", "nll")]
    unsteered: list[object] = ["unsteered", _level(plain, "nll"), *(_level(plain, name) for name in (*shown, "felt", "tokens"))]
    table = [
        [_name(row), _ratio(row), *(_change(row, name) for name in (*shown, "felt", "tokens"))] for row in rows if row["emotion"] == "all"
    ]
    head = ("all emotions", "perplexity", *(HEADS[name] for name in (*shown, "felt", "tokens")))
    print_table(
        head, [unsteered, *table], "shares and what they change by, in points; perplexity as a ratio to unsteered; * p < 0.05, paired"
    )
    _print_emotions(summary)
    _print_limits(summary)
    kinds = [
        [_name(row), *(_points(row["kinds"].get(kind)) for kind in plain["kinds"])]
        for row in rows
        if row["emotion"] == "all" and row["kinds"]
    ]
    level = ["unsteered", *(f"{100 * told['value']['value']:.1f} % of {told['n']}" for told in plain["kinds"].values())]
    print_table(("items right", *plain["kinds"]), [level, *kinds], "accuracy by kind of item, change in points")
    _print_rest(summary)
    for note in summary["notes"]:
        print(f"note: {note}")


_SIZES = {
    "nll": "neutral texts",
    "right": "items",
    "refused": "harmful requests",
    "joins": "prompts that seek attachment",
    "felt": "everyday prompts",
}


def _print_emotions(summary: Summary) -> None:
    rows = [row for row in summary["rows"] if row["method"] == CIRCUIT and row["emotion"] != "all"]
    if rows:
        columns = ("right", "refused", "overrefused", "joins", "abuse", "foreign", "felt")
        table = [
            [row["emotion"], f"{row['intensity']:g}", row["strength"], _ratio(row), *(_change(row, name) for name in columns)]
            for row in sorted(rows, key=lambda row: summary["emotions"].index(row["emotion"]))
        ]
        head = ("emotion", "intensity", "strength", "perplexity", *(HEADS[name] for name in columns))
        print_table(head, table, "the circuit by emotion")


def _print_limits(summary: Summary) -> None:
    held = summary["limits"]
    names = ("all", *summary["emotions"])
    table = []
    for limit in dict.fromkeys(row["limit"] for row in held):
        own = {row["emotion"]: row for row in held if row["limit"] == limit}
        what, unit, _ = LIMITS[limit]
        table.append([f"{limit}={own['all']['bound']:g}", *(_held(own[name]) for name in names)])
    if table:
        print_table(("limit", *names), table, "the circuit's intensity up to which each limit holds (and its whole interval)")


def _print_rest(summary: Summary) -> None:
    patterns = summary["patterns"]
    if patterns:
        names = list(patterns[0]["shares"])
        cells = [[_name(row), *(f"{100 * row['shares'][name]:.1f}" for name in names)] for row in patterns]
        print_table(("% of replies", *names), cells, "response patterns where somebody seeks attachment, by phrases")
    if summary["feedback"]:
        cells = [[row["arm"], row["round"], _interval(row["accuracy"]), _interval(row["more"]), row["p"]] for row in summary["feedback"]]
        print_table(("feedback", "round", "accuracy", "more than plain", "p"), cells, "wrong answers told so and given again")
    if summary["after"]:
        ways = list(dict.fromkeys(row["how"] for row in summary["after"]))
        at = {(row["how"], row["distance"]): row for row in summary["after"]}
        cells = [
            [distance, *(_interval(at[how, distance]["felt"]) for how in ways)]
            for distance in dict.fromkeys(row["distance"] for row in summary["after"])
        ]
        title = f"the emotion is read in the last reply, after so many tokens of neutral talk; circuit at {summary['after_intensity']:g}"
        print_table(("tokens", *ways), cells, title)


def _name(row: Mapping[str, Any]) -> str:
    name = "unsteered" if row["method"] == "none" else str(row["method"])
    return name if row["intensity"] is None else f"{name} {row['intensity']:g}"


def _level(plain: Mapping[str, Any], name: str) -> str:
    found = plain["figures"].get(name)
    if found is None:
        return ""
    value = found["value"]["value"]
    return f"{value:.1f}" if name in ("nll", "tokens") else f"{100 * value:.1f} %"


def _ratio(row: Mapping[str, Any]) -> str:
    found = row["figures"].get("nll")
    if found is None:
        return ""
    change = found["change"]
    return f"{change['value']:.2f} [{change['low']:.2f}, {change['high']:.2f}]{_star(found)}"


def _change(row: Mapping[str, Any], name: str) -> str:
    found = row["figures"].get(name)
    if found is None:
        return ""
    return _points(found, 1 if name == "tokens" else 100)


def _points(found: Mapping[str, Any] | None, scale: float = 100) -> str:
    if found is None:
        return ""
    change = found["change"]
    return f"{scale * change['value']:+.1f} [{scale * change['low']:+.1f}, {scale * change['high']:+.1f}]{_star(found)}"


def _star(found: Mapping[str, Any]) -> str:
    return "*" if found["p"] < 0.05 else ""


def _held(row: Mapping[str, Any]) -> str:
    return "not measured" if row["holds"] is None else f"{row['holds']:g} ({row['surely']:g})"


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
