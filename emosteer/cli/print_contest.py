"""The contest's tables for a terminal. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emosteer.base.tables import print_table

Fields = Mapping[str, Any]
EXPLANATION = (
    "shares in %, 95% bootstrap intervals over prompts. good: the panel reads the wanted emotion (neutral allowed), and the reply is "
    "sound, answers its prompt and does not name the emotion; six-way leaves neutral out; ratio: perplexity to the unsteered replies"
)
#: Ratios further apart than this are said to differ.
NEAR = 0.02


def print_evaluation(found: Fields, file: str) -> None:
    """The tables of `evaluate`. file: where the evaluation is."""
    test, dev = found["test"], found["dev"]
    kinds = ", ".join(f"{kind} {n}" for kind, n in test["kinds"].items())
    written = f"{test['n_groups']} prompts ({kinds}), each for every emotion"
    print(f"{found['model']}, judged by {found['judge']['name']}: {written} -> {file}")
    print(EXPLANATION)
    _print_results(found["results"])
    _print_parts(found)
    _print_judges(found)
    print(f"settings, chosen on {dev['n_groups']} other prompts: {_rule(found['budget'])}")
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
        f"the most good replies with ratio up to {budget['ratio']:g}, naming up to {budget['names']:.0%} (or the least) "
        f"and {budget['sound']:.0%} sound, all emotions together, and {budget['each_sound']:.0%} sound for each"
    )


def _print_results(results: Sequence[Fields]) -> None:
    plain = ("sound", "answers", "names", "probability", "accuracy", "unfinished")
    rows = []
    for r in results:
        ratio, worst = r["ratio"], r["worst_kind"]
        rows.append(
            (
                r["method"],
                _share(r["good"], interval=True),
                f"{_share(r['by_kind'][worst]['good'])} {worst}" if worst else "-",
                _share(r["emotion"], interval=True),
                *(_share(r[name]) for name in plain),
                f"{_number(ratio['value'])} [{_number(ratio['low'])}, {_number(ratio['high'])}]",
                _number(r["kept"]["value"]),
                r["n"],
                r["missing"],
            )
        )
    headings = ("method", "good", "worst kind", "emotion", "sound", "answers", "names", "P(target)", "six-way", "unfinished")
    print_table((*headings, "ratio", "kept", "n", "missing"), rows)


def _print_parts(found: Fields) -> None:
    """Good, emotion and answers by kind of prompt, worst first, and by emotion."""
    results = found["results"]
    kinds = list(results[0]["by_kind"])
    best = max(results, key=lambda r: r["good"]["value"] or 0.0)
    kinds.sort(key=lambda kind: best["by_kind"][kind]["good"]["value"] or 0.0)
    for name, parts in (("by_kind", kinds), ("by_emotion", found["emotions"])):
        rows = [
            (r["method"], *(" / ".join(_share(r[name][part][figure]) for figure in ("good", "emotion", "answers")) for part in parts))
            for r in results
        ]
        print_table(("good / emotion / answers", *parts), rows)


def _print_judges(found: Fields) -> None:
    """Each judge alone, how far they agree, and how far the words of the subject give the emotion away."""
    agreement, names = found["agreement"], found["agreement"]["judges"]
    rows = [(r["method"], _share(r["emotion"]), *(_share({"value": r["judges"].get(name)}) for name in names)) for r in found["results"]]
    print_table(("emotion read by", "the panel", *names), rows)
    alpha = "-" if agreement["alpha"] is None else f"{agreement['alpha']:.2f}"
    pairs = ", ".join(f"{pair} {share:.0%}" for pair, share in agreement["pairs"].items())
    undecided = f"without a majority: {agreement['undecided']:.0%}"
    print(f"Krippendorff's alpha {alpha} over {agreement['n']} replies; equal labels: {pairs or '-'}; {undecided}")
    rows = [
        (r["method"], *(f"{100 * c[name]:.1f}" for name in ("accuracy", "subject", "chance")), f"{100 * max(c['phrases'].values()):.1f}")
        for r in found["results"]
        if (c := r.get("contamination")) is not None
    ]
    if rows:
        print("topic contamination: how often content words (no emotion words), or subject words alone, name held-out replies' emotion")
        print_table(("method", "content words", "subject words", "chance", "most shared phrases"), rows)


def _print_comparisons(comparisons: Sequence[Fields]) -> None:
    pairs = dict.fromkeys((row["a"], row["b"]) for row in comparisons)
    known = {(row["a"], row["b"], row["metric"]): row for row in comparisons}
    rows = []
    for a, b in pairs:
        good, emotion, answers, ratio = (known[a, b, metric] for metric in ("good", "emotion", "answers", "ratio"))
        rows.append((f"{a} - {b}", *(_points(row) for row in (good, emotion, answers)), _plain(ratio), good["n"]))
    if rows:
        print("paired differences: points (for ratio: plain) with interval; p by sign flips of whole prompts")
        print_table(("difference", "good", "emotion", "answers", "ratio", "n"), rows)


def equal_sentence(line: Fields) -> str:
    """One comparison at equal perplexity ratio, in words."""
    apart = abs(line["ratio_a"] - line["ratio_b"]) > NEAR
    near = "no dose comes nearer" if apart else "equal"
    own = f"{line['a']} at {line['setting']:g} times its default has {line['ratio_a']:.3f}, {near}"
    against = " against ".join(_share(line[name], interval=True) for name in ("good_a", "good_b"))
    return (
        f"at the ratio of {line['b']} ({line['ratio_b']:.3f}; {own}): good {against}, "
        f"difference {_difference(line)} (development split, which chose the strengths of {line['b']}; {line['n']} replies each)"
    )


def _share(value: Fields, interval: bool = False) -> str:
    if value["value"] is None:
        return "-"
    text = f"{100 * value['value']:.1f}"
    return text + (f" [{100 * value['low']:.1f}, {100 * value['high']:.1f}]" if interval and value["low"] is not None else "")


def _points(row: Fields) -> str:
    found = _difference(row)
    return found if found == "-" else f"{found} p {row['p']:.2g}"


def _difference(row: Fields) -> str:
    d = row["difference"]
    if d["value"] is None or d["low"] is None:
        return "-"
    return f"{100 * d['value']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"


def _plain(row: Fields) -> str:
    d = row["difference"]
    if d["value"] is None or d["low"] is None:
        return "-"
    return f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
