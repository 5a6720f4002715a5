"""A validation -> a plain summary (JSON) and the tables of `validate` and `inspect`. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emosteer.base.tables import print_table
from emosteer.circuits.validation.findings import ALL
from emosteer.circuits.validation.settings import ENOUGH, RATIO, SPECIFIC
from emosteer.circuits.validation.validation import Validation

Summary = dict[str, Any]
Row = Mapping[str, Any]


def validation_summary(found: Validation) -> Summary:
    """Every table, and how much was tried."""
    return {
        "model": found.provenance.model,
        "emotions": list(found.emotions),
        "prompts": list(found.prompts),
        "trials": len(found.followed) + len(found.read),
        "randoms": found.provenance.params.get("randoms"),
        **{name: [dict(row) for row in rows] for name, rows in found.tables.items()},
        "notes": list(found.notes),
    }


def print_validation(summary: Summary) -> None:
    """The tables of `validate`."""
    print(
        f"{summary['model']}: {summary['trials']} interventions on {len(summary['prompts'])} prompts, {summary['randoms']} random sets "
        f"beside each -> {summary['file']}"
    )
    print(
        "margin: nats per token by which the wanted reply is cheaper than others; projection: of the stream on the emotion's directions\n"
        "while the replies are read. Intervals (95 %) are over prompts and random sets.\n"
        "random sets: as many units in every layer; sized: those of them that take away as much; others: what the circuit's ablation does\n"
        "to other emotions; taken: length of what the ablation of heads takes out of the stream. `--json` has every point of every emotion."
    )
    _print_points(summary["necessary"], "necessary: ablated, so much is lost (share: of what asking for the emotion brings)")
    _print_points(summary["sufficient"], "sufficient: all others held, so much comes through (share: of what holding everything costs)")
    _print_reading(summary["reading"])
    _print_swaps(summary["swaps"])
    _print_shared(summary["overlaps"], summary["shared"])
    _print_stable(summary["stable"])
    _print_written(summary["written"])
    _print_claims(summary["claims"])
    for note in summary["notes"]:
        print(f"note: {note}")


def _print_points(rows: Sequence[Row], title: str) -> None:
    """One line for the mean over emotions at every point, and one for every emotion where the table ends in a verdict."""
    table: list[list[object]] = []
    for row in rows:
        if row["emotion"] != ALL and "others" not in row and len({one["emotion"] for one in rows}) > 1:
            continue
        place = f"{row['figure']}, {row['elicitation']} {row['size']} {row['kind']}" + (f" x{row['dose']:g}" if row["dose"] != 1 else "")
        ratio = f"{row['ratio']:.1f}" if "ratio" in row else "-"  # random sets do nothing, or the opposite
        matched = [_interval(row["random"]), ratio, f"{row['p']:.3f}"] if "random" in row else ["", "", ""]
        extra = [f"{row[name][0]:.2f}" if name in row else "" for name in ("sized", "others")]
        size = f"{row['taken']:.1f} / {row['random_taken']:.1f}" if "random_taken" in row else ""
        share = f"{100 * row['share'][0]:.0f} %"
        table.append([place, row["emotion"], row.get("units", ""), _interval(row["moved"]), share, *matched, *extra, size])
    if table:
        head = ("tried", "emotion", "units", "circuit", "share", "random sets", "ratio", "p", "sized", "others", "taken / random")
        print_table(head, table, title)


def _print_reading(rows: Sequence[Row]) -> None:
    if not rows:
        return
    names = {"reading": "emotion read", "other reading": "other emotion read", "cost": "neutral text", "answer": "answering"}
    table = []
    for row in rows:
        cells = []
        for name in names:
            unit = row[name]["moved"] if name == "cost" else row[name]["share"]
            cells.append(f"{_interval(unit)} (random {row[name]['random'][0] / _of(row[name], name):.3f})")
        table.append([row["size"], row["emotion"], *cells])
    title = "reading: what is lost when the circuit is ablated, as shares; neutral text: nats per token that it becomes dearer"
    print_table(("size", "emotion", *names.values()), table, title)


def _of(figure: Row, name: str) -> float:
    return 1.0 if name == "cost" or not figure["clean"] else float(figure["clean"])


def _print_swaps(rows: Sequence[Row]) -> None:
    if not rows:
        return
    names = [row["emotion"] for row in rows]
    table = []
    for row in rows:
        lent = [_interval(row["own"]) if name == row["emotion"] else _interval(row["lent"][name]) for name in names]
        table.append([row["emotion"], *lent, _interval(row["random"])])
    title = (
        f"swaps ({rows[0]['size']}): margin that an emotion's contrasts bring (rows) when another's heads add them (columns), equally long"
    )
    print_table(("contrasts", *names, "random heads"), table, title)


def _print_shared(pairs: Sequence[Row], shared: Sequence[Row]) -> None:
    rows = [[r["size"], f"{r['first']}, {r['second']}", r["common"], r["expected"], r["p"], r["jaccard"]] for r in pairs]
    print_table(("size", "emotions", "common heads", "by chance", "p", "Jaccard"), rows, "one emotion's or all emotions'?")
    rows = [[r["size"], r["at_least"], r["heads"], r["expected"], " ".join(r["names"][:12])] for r in shared]
    print_table(("size", "emotions at least", "heads", "by chance", "which"), rows, "heads that several emotions share")


def _print_stable(rows: Sequence[Row]) -> None:
    table = [
        [
            row["emotion"],
            row["heads"],
            row["always"],
            f"{row['held']} of {row['circuit']}",
            "" if row["halves"] is None else f"{row['halves']:.3f} ({row['halves_expected']:.1f} common by chance)",
            " ".join(row["names"][:12]),
        ]
        for row in rows
    ]
    head = ("emotion", "heads of the ranking", "in 90 % of bootstraps", "of the circuit's heads", "halves of kinds: Jaccard", "which")
    print_table(head, table, "stable: rankings by contrast of the bank")


def _print_written(rows: Sequence[Row]) -> None:
    if not rows:
        return
    table = [
        [
            row["who"] + ("" if row["who"] == "clean" else f" {row['size']}"),
            *(_interval(row[name]) for name in ("emotion", "answers", "sound")),
        ]
        + [f"{share:.2f}" for share in row["by_emotion"].values()]
        for row in rows
    ]
    head = ("ablated", "read as what was asked", "answers", "sound", *rows[0]["by_emotion"])
    print_table(head, table, f"{rows[0]['replies']} replies written to prompts that ask for the emotion, read by the judges")


def _print_claims(rows: Sequence[Row]) -> None:
    table = [
        [
            f"{row['figure']}, {row['elicitation']} {row['size']} {row['kind']}",
            *(f"{len(row[name])} of {row['emotions']}: {', '.join(row[name])}" for name in ("larger", "apart", "specific")),
            "yes" if row["holds"] else "no",
        ]
        for row in rows
    ]
    head = ("tried", f"at least {RATIO:g} x random", "intervals apart", f"others below {SPECIFIC:g} x own", "holds")
    print_table(head, table, f"is it a circuit? It is if at least {ENOUGH} emotions show all three")


def _interval(found: Sequence[float]) -> str:
    return f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"
