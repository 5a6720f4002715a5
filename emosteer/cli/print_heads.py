"""What heads do -> a plain summary (JSON) and the tables of `heads` and `inspect`. Loads no model."""

from __future__ import annotations

from typing import Any

from emosteer.base.tables import print_table
from emosteer.circuits.heads.heads import HeadStudy, overview
from emosteer.circuits.heads.reading import CLASSES

Summary = dict[str, Any]
#: Heads of an emotion, and tokens of a head, that are printed.
SHOWN, TOKENS = 5, 6


def heads_summary(found: HeadStudy) -> Summary:
    """What was measured; the texts that heads fire on are in the file alone."""
    return {
        "model": found.provenance.model,
        "emotions": list(found.emotions),
        "labels": list(found.labels),
        "prompts": found.n_groups,
        "overview": overview(found),
        "even": dict(zip(CLASSES, _rounded(found.even.tolist()), strict=True)),
        "edges": {emotion: int((found.edge_index[:, 0] == e).sum()) for e, emotion in enumerate(found.emotions)},
        "edge_floor": dict(found.edge_floor),
        "checks": dict(found.checks),
        "heads": [{name: value for name, value in page.items() if name != "fires"} for page in found.pages],
        "notes": list(found.notes),
    }


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def print_heads(summary: Summary) -> None:
    """The tables of `heads`."""
    print(f"{summary['model']}: the strongest heads of {len(summary['emotions'])} emotions -> {summary['file']}", end="")
    print(f", graph -> {summary['graph']}" if summary.get("graph") else "")
    print_table(
        (
            "emotion",
            "told apart",
            "(all heads)",
            "added like own",
            "words added",
            "words own",
            "random",
            "bank added",
            "bank own",
            "random",
        ),
        [
            [
                *(row[name] for name in ("emotion", "told", "told_all", "cosine", "words_added", "words_own", "words_random")),
                *(row[name] for name in ("bank_added", "bank_own", "bank_random")),
            ]
            for row in summary["overview"]
        ],
        f"{summary['prompts']} prompts with their replies; words and bank: how far the emotion's words, and the tokens of its replies in "
        "the bank, are raised in the logits, in standard deviations over tokens",
    )
    print_table(
        ("emotion", *CLASSES),
        [[row["emotion"], *(f"{share:.3f}" for share in row["attention"])] for row in summary["overview"]]
        + [["a head that looks everywhere alike", *(f"{share:.3f}" for share in summary["even"].values())]],
        "where the heads look while a reply is written",
    )
    for emotion in summary["emotions"]:
        pages = [page for page in summary["heads"] if page["emotion"] == emotion]
        rows = [
            [
                f"L{page['layer']}H{page['head']}",
                page["length"],
                page["told"],
                page["cosine"],
                _tokens(page["added"]["promoted"]),
                _tokens(page["own"]["promoted"]),
            ]
            for page in pages[:SHOWN]
        ]
        head = ("head", "added length", "told apart", "like own", "what is added promotes", "the head itself promotes")
        print_table(head, rows, f"{emotion}: {summary['edges'][emotion]} edges between its heads")
    if checks := summary["checks"]:
        print(
            f"{checks['n']} edges patched for real: correlation {checks['correlation']:.3f} ({checks['correlation_kept']:.3f} of kept "
            f"ones, {checks['correlation_random']:.3f} of random ones), truth {checks['slope']:.2f} of the estimate"
        )
    for note in summary["notes"]:
        print(f"note: {note}")


def _tokens(rows: list[list[Any]]) -> str:
    return " ".join(f"{text}{'*' if is_name else ''}" for text, _, is_name in rows[:TOKENS])
