"""The tables of `emosteer judge --by-hand`: judges, or another reader, beside the person. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emosteer.base.tables import print_table

Fields = Mapping[str, Any]


def print_scores(result: Fields) -> None:
    """What `score` and `compare` found, as far as they were asked."""
    if "judges" in result:
        _print_person(result)
        _print_judges(result)
        _print_emotions(result["judges"])
        many = len(result["judges"]) > 1
        _print_confusion(result["panel"]["confusion"], f"person \\ {'panel' if many else next(iter(result['judges']))}", many)
        _print_targets(result["targets"])
    if "against" in result:
        _print_readers(result["against"])


def _print_person(result: Fields) -> None:
    given = ", ".join(f"{label} {count}" for label, count in result["labels"].items() if count)
    print(f"{result['labelled']} of {result['texts']} texts are labelled by hand -> {result['labels_file']}")
    print(f"labels: {given}")
    answers, sound = result["answers"], result["soundness"]
    if answers["asked"]:
        print(f"answers its prompt: {_percent(answers['yes'] / answers['asked'])} of {answers['asked']}")
    print(
        f"soundness check: {sound['unsound_of_not_text']} of the {sound['not_text']} that are not text are unsound, "
        f"{sound['sound_of_text']} of the other {sound['text']} are sound"
    )


def _print_judges(result: Fields) -> None:
    rows = [
        (name, one["n"], one["missing"], _percent(one["agreement"]), _percent(one["six_way"]), one["n_emotional"], _number(one["alpha"]))
        for name, one in result["judges"].items()
    ]
    if len(rows) > 1:
        rows.append(("panel", "", "", _percent(result["panel"]["agreement"]), "", "", ""))
    print("\nagreement with the person on what is text; six-way: neutral left out")
    print_table(("judge", "texts", "missing", "agreement", "six-way", "emotional", "alpha"), rows)


def _print_emotions(judges: Fields) -> None:
    """Recall and precision of every label that anybody gave."""
    print("\nagainst the person, per emotion")
    columns = ["", "judge", "person", "judged", "recall", "precision"]
    rows = [
        (label, name, figures["person"], figures["judge"], _percent(figures["recall"]), _percent(figures["precision"]))
        for label in next(iter(judges.values()))["emotions"]
        for name, one in judges.items()
        if (figures := one["emotions"][label])["person"] or figures["judge"]
    ]
    print_table(columns, rows)


def _print_confusion(confusion: Mapping[str, Mapping[str, int]], corner: str, all_columns: bool = True) -> None:
    columns = [name for name in next(iter(confusion.values()), {}) if all_columns or name != "undecided"]
    if columns:
        print()
        print_table((corner, *columns), [(label, *(row[name] for name in columns)) for label, row in confusion.items()])


def _print_targets(targets: list[Fields]) -> None:
    if not targets:
        return
    print("\nread as the target (points: judge minus person)")
    judges = list(targets[0]["judges"])
    rows = []
    for line in targets:
        cells = [cell for name in judges for cell in (_percent(line["judges"][name]["share"]), _points(line["judges"][name]["difference"]))]
        rows.append((line["method"] or "all", line["n"], _percent(line["person"]), *cells))
    print_table(("method", "lines", "person", *(column for name in judges for column in (name, "points"))), rows)


def _print_readers(found: Fields) -> None:
    """Two people beside each other."""
    print(
        f"\nagreement with {found['file']}: {_percent(found['agreement'])} of {found['n']} texts that both labelled, "
        f"alpha {_number(found['alpha'])}; {found['only_first']} labelled here alone, {found['only_second']} there alone"
    )
    if found["answers"]["n"]:
        print(f"whether a reply answers its prompt: {_percent(found['answers']['agreement'])} of {found['answers']['n']}")
    _print_confusion(found["confusion"], "here \\ there")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _points(difference: float | None) -> str:
    return "-" if difference is None else f"{100 * difference:+.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
