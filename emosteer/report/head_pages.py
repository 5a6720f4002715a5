"""What the heads do: tables for everybody, and the data of the graph that can be clicked. No torch here but what the study holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emosteer.circuits.heads.graph import graph
from emosteer.circuits.heads.heads import HeadStudy, overview
from emosteer.circuits.heads.reading import CLASSES
from emosteer.report.figures import CellValue, FigureTable, Section
from emosteer.report.wording import number, percent, plural

#: What the classes of tokens are called on the page.
NAMES = {
    "start": "first token of all",
    "template": "chat template",
    "prompt": "prompt",
    "instruction": "instruction",
    "reply": "reply so far",
    "itself": "the token just read",
}
#: Tokens of a head in the tables.
LISTED = 6


@dataclass(frozen=True)
class HeadPages:
    """What the page embeds: plain JSON for the script."""

    data: dict[str, Any]


def section(study: HeadStudy) -> Section:
    """The tables, before the graph and after it."""
    intro = (
        f"The {plural(max(len(study.of(e)) for e in study.emotions), 'head')} of each emotion that the circuit adds most to, measured in "
        f"the residual stream, while the model reads {plural(study.n_groups, 'prompt')} of the bank with all their replies. Nothing is "
        "steered here: where a head looks, what it fires on and whom it reads is what it does of its own accord. What the circuit adds to "
        "it is told beside that."
    )
    notes = [
        "Words: how far the emotion's names and synonyms are raised in the logits, directly, in standard deviations over all tokens; bank: "
        "the same of the tokens that this emotion's replies use more than the others'. Random is the mean over random outputs of the same "
        "heads. Told apart is the share of the other replies to the same prompt in which a head writes less along the direction than in "
        "the emotion's own; 50 % is chance, and the directions were made from this bank.",
        *(f"Left out: {note}." for note in study.notes),
    ]
    if checks := study.checks:
        notes.append(
            f"Edges are direct paths through values, patterns and norms held. {checks['n']} of them patched for real, patterns and norms "
            f"computed again: correlation {number(checks['correlation'])} with the estimate ({number(checks['correlation_random'])} for "
            f"edges between random heads); {percent(checks['same_sign'], 0)} of the larger half have the same sign."
        )
    return Section(
        "head-pages", "What the heads do", intro, tables=[_overview(study), _looking(study)], after=[_listed(study)], notes=notes
    )


def _overview(study: HeadStudy) -> FigureTable:
    rows: list[list[CellValue]] = []
    for row in overview(study):
        cells = [number(row[name], 2, signed=True) for name in ("words_added", "words_own", "words_random", "bank_added", "bank_own", "bank_random")]  # fmt: skip # noqa: E501
        rows.append([row["emotion"].capitalize(), percent(row["told"], 0), percent(row["told_all"], 0), number(row["cosine"]), *cells])
    head = ("Emotion", "Told apart", "All heads", "Added like own", "Words, added", "Own", "Random", "Bank, added", "Own", "Random")
    return FigureTable("The described heads, means", head, rows)


def _looking(study: HeadStudy) -> FigureTable:
    rows: list[list[CellValue]] = [
        [row["emotion"].capitalize(), *(percent(share, 0) for share in row["attention"])] for row in overview(study)
    ]
    everything = study.attention[: len(study.emotions)].mean((0, 1, 2)).tolist()
    rows.append(["All heads of the model", *(percent(share, 0) for share in everything)])
    rows.append(["If all tokens were alike", *(percent(share, 0) for share in study.even.tolist())])
    return FigureTable(
        "Where the described heads look while a reply is written", ("Emotion", *(NAMES[name].capitalize() for name in CLASSES)), rows
    )


def _listed(study: HeadStudy) -> FigureTable:
    rows: list[list[CellValue]] = []
    for page in study.pages:
        what = [_words(page[which]["promoted"]) for which in ("added", "own")]
        told = [percent(page["told"], 0), number(page["cosine"])]
        rows.append([f"L{page['layer']}H{page['head']}", page["emotion"], number(page["length"], 1), *told, *what])
    head = ("Head", "Emotion", "Added length", "Told apart", "Added like own", "What is added promotes", "The head itself promotes")
    return FigureTable("The described heads, each emotion's strongest first", head, rows)


def _words(rows: Sequence[Sequence[Any]]) -> str:
    return ", ".join(f"{text}{' (name)' if is_name else ''}" for text, _, is_name in rows[:LISTED])


def data(study: HeadStudy) -> HeadPages:
    """Everything that the script draws."""
    drawn = graph(study)["emotions"]
    places = {(page["emotion"], page["layer"], page["head"]): i for i, page in enumerate(study.pages)}
    graphs = []
    for emotion in study.emotions:
        nodes = drawn[emotion]["nodes"]
        index = {node["id"]: i for i, node in enumerate(nodes)}
        graphs.append(
            {
                "nodes": [
                    [n["layer"], n["head"], places.get((emotion, n["layer"], n["head"]), -1), n["length"], n["contribution"], n["told"]]
                    for n in nodes
                ],
                "edges": [[index[edge["source"]], index[edge["target"]], edge["weight"]] for edge in drawn[emotion]["edges"]],
            }
        )
    pages = []
    for page in study.pages:
        e = study.index(page["emotion"])
        looks = (study.attention[e, page["layer"], page["head"]], study.at_start[page["layer"], page["head"]])
        kept = (
            "rank",
            "length",
            "contribution",
            "told",
            "cosine",
            "along",
            "added",
            "own",
            "words",
            "bank",
            "looks",
            "fires",
            "sources",
            "reads",
        )
        pages.append({**{name: page[name] for name in kept}, "emotion": e, "attention": [_short(shares.tolist()) for shares in looks]})
    return HeadPages(
        {
            "emotions": list(study.emotions),
            "classes": [NAMES[name] for name in CLASSES],
            "layers": study.length.shape[1],
            "heads": study.length.shape[2],
            "even": [_short(shares.tolist()) for shares in (study.even, study.even_at_start)],
            "graphs": graphs,
            "pages": pages,
            "texts": [[text["label"], text["prompt"], text["tokens"]] for text in study.texts],
        }
    )


def _short(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]
