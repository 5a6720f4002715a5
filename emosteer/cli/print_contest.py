"""The contest's tables for a terminal. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emosteer.base.tables import print_table

Fields = Mapping[str, Any]
#: Ratios further apart than this are said to differ.
NEAR = 0.02


def print_evaluation(found: Fields, file: str) -> None:
    """The tables of `evaluate`. file: where the evaluation is."""
    test, dev = found["test"], found["dev"]
    written = f"{test['n_groups']} scenario-events of {test['file']}, each for every emotion"
    print(f"{found['model']}, judged by {found['judge']['name']}: {written} -> {file}")
    print("shares in %, 95% bootstrap intervals over scenario-events; perplexity ratio to the unsteered replies, 1 = as likely")
    _print_results(found["results"])
    _print_emotions(found)
    print(f"settings, chosen on {dev['n_groups']} other scenario-events of {dev['file']}: {_rule(found['budget'])}")
    rows = [(method, *(f"{own[e]:g}" for e in found["emotions"])) for method, own in found["chosen"].items() if any(own.values())]
    print_table(("strength", *found["emotions"]), rows)
    for method, what in found["unfit"].items():
        print(f"{method}: no strengths kept to the budget ({', '.join(what)}); the nearest to it were taken")
    if found["best_prompt"]:
        print(f"best prompt: {found['best_prompt']}")
    _print_comparisons(found["comparisons"])
    for line in found["equal_ratio"]:
        print(equal_sentence(line))


def _rule(budget: Fields) -> str:
    return (
        f"the highest mean P(target) with ratio up to {budget['ratio']:g}, naming up to {budget['names']:.0%} (or the least) "
        f"and {budget['sound']:.0%} sound, all emotions together, and {budget['each_sound']:.0%} sound for each"
    )


def _print_results(results: Sequence[Fields]) -> None:
    shares = ("accuracy", "match")
    plain = ("names", "sound", "repetition", "unfinished", "on_topic")
    rows = []
    for r in results:
        ratio = r["ratio"]
        rows.append(
            (
                r["method"],
                *(_share(r[name], interval=True) for name in shares),
                f"{_number(ratio['value'])} [{_number(ratio['low'])}, {_number(ratio['high'])}]",
                _number(r["median_ratio"]["value"]),
                *(_share(r[name]) for name in plain),
                _number(r["kept"]["value"]),
                r["n"],
                r["missing"],
            )
        )
    print_table(("method", *shares, "ratio", "median", *plain, "kept", "n", "missing"), rows)


def _print_emotions(found: Fields) -> None:
    for name, kinds in (("by_emotion", found["emotions"]), ("by_valence", list(found["results"][0]["by_valence"]))):
        rows = [
            (r["method"], *(f"{_share(r[name][k]['accuracy'])} @{_number(r[name][k]['ratio']['value'])}" for k in kinds))
            for r in found["results"]
        ]
        print_table(("accuracy @ratio", *kinds), rows)


def _print_comparisons(comparisons: Sequence[Fields]) -> None:
    pairs = dict.fromkeys((row["a"], row["b"]) for row in comparisons)
    known = {(row["a"], row["b"], row["metric"]): row for row in comparisons}
    rows = []
    for a, b in pairs:
        accuracy, match, ratio, kept = (known[a, b, metric] for metric in ("accuracy", "match", "ratio", "kept"))
        rows.append((f"{a} - {b}", *(_points(row) for row in (accuracy, match)), _plain(ratio), _plain(kept), accuracy["n"]))
    if rows:
        print("paired differences: points (for ratio and kept: plain) with interval; p by sign flips of whole scenario-events")
        print_table(("difference", "accuracy", "match", "ratio", "kept", "n"), rows)


def equal_sentence(line: Fields) -> str:
    """One comparison at equal perplexity ratio, in words."""
    apart = abs(line["ratio_a"] - line["ratio_b"]) > NEAR
    near = "no dose comes nearer" if apart else "equal"
    own = f"{line['a']} at {line['setting']:g} times its default has {line['ratio_a']:.3f}, {near}"
    against = " against ".join(_share(line[name], interval=True) for name in ("accuracy_a", "accuracy_b"))
    return (
        f"at the ratio of {line['b']} ({line['ratio_b']:.3f}; {own}): accuracy {against}, "
        f"difference {_points(line)} (development split, {line['n']} replies each)"
    )


def _share(value: Fields, interval: bool = False) -> str:
    if value["value"] is None:
        return "-"
    text = f"{100 * value['value']:.1f}"
    return text + (f" [{100 * value['low']:.1f}, {100 * value['high']:.1f}]" if interval and value["low"] is not None else "")


def _points(row: Fields) -> str:
    d = row["difference"]
    if d["value"] is None or d["low"] is None:
        return "-"
    return f"{100 * d['value']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}] p {row['p']:.2g}"


def _plain(row: Fields) -> str:
    d = row["difference"]
    if d["value"] is None or d["low"] is None:
        return "-"
    return f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
