"""Figures of the panel: each judge beside it, how far the judges agree, and how far the subject of replies gives their emotion away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emosteer.report.contest_figures import SOURCES, interval_panel, main_methods
from emosteer.report.figures import CellValue, Figure, FigureTable
from emosteer.report.measured import Measured
from emosteer.report.wording import Interval, finite, label, number, percent, percent_range

# ---- the judges --------------------------------------------------------------------------------------------------------

THE_PANEL = "The panel"


def judges(contest: Measured) -> Figure | None:
    """In how many replies the panel, and each judge alone, reads the emotion asked for; None where judges were not told apart."""
    if not contest.judges:
        return None
    shares = {THE_PANEL: {method: contest.metric(method, "emotion") for method in contest.results}}
    for judge in contest.judges:
        shares[judge] = {method: Interval(contest.judge_share(method, judge)) for method in contest.results}
    panels = [interval_panel(who, intervals, True, None, (0.0, 1.0)) for who, intervals in shares.items()]
    rows = [[label(method), *(percent_range(intervals[method]) for intervals in shares.values())] for method in contest.results]
    caption = (
        "Share of replies in which the emotion asked for is read, neutral allowed: by the panel (the likeliest label by the "
        "mean of the judges' probabilities; with its 95 % interval), and by each judge alone. A judge that stands apart knows something "
        "that the others do not, or takes something else for emotion."
    )
    table = FigureTable("The emotion asked for is read by", ("Method", *shares), rows)
    return Figure("judges", "Each judge beside the panel", caption, panels, [table], SOURCES)


def agreement_table(contest: Measured) -> FigureTable | None:
    """Krippendorff's alpha, how many replies have no majority, and every pair of judges; None where it was not measured."""
    found = contest.agreement
    if not found:
        return None
    rows: list[list[CellValue]] = [
        ["Krippendorff's alpha, all judges", number(finite(found.get("alpha")))],
        ["Replies without a majority", percent(finite(found.get("undecided")))],
    ]
    pairs = found.get("pairs") or {}
    rows += [[f"Same label: {pair.replace(' - ', ' and ')}", percent(finite(share))] for pair, share in pairs.items()]
    n = found.get("n")
    over = f" over {n:,} different replies" if isinstance(n, int) else ""
    return FigureTable(f"How far the judges agree{over}; alpha is 1 for perfect agreement and 0 for what chance gives", ("", "Value"), rows)


# ---- topic -------------------------------------------------------------------------------------------------------------

_BY = (("accuracy", "By content words"), ("subject", "By subject words"))


def contamination_table(contest: Measured) -> FigureTable | None:
    """Per method how often words alone name the emotion of a reply; None where it was not measured."""
    rows: list[list[CellValue]] = []
    for method in contest.results:
        if (found := contest.contamination(method)) is not None:
            shares = [percent(finite(found.get(name))) for name in ("accuracy", "subject", "chance")]
            rows.append([label(method), *shares, percent(_phrases(found)), found.get("n")])
    head = ("Method", *(title for _, title in _BY), "Chance", "Share a five-word phrase", "Replies")
    return FigureTable("How often words alone name the emotion of a reply, emotion words taken out", head, rows) if rows else None


def _phrases(found: Mapping[str, Any]) -> float | None:
    """Share of replies with a phrase of another one, all emotions together (each has as many replies)."""
    shares = [share for value in (found.get("phrases") or {}).values() if (share := finite(value)) is not None]
    return sum(shares) / len(shares) if shares else None


def contamination(contest: Measured) -> Figure | None:
    """How often content words and subject words name the emotion, beside chance; None where it was not measured."""
    known = {method: found for method in contest.results if (found := contest.contamination(method)) is not None}
    if not known:
        return None
    chances = {finite(found.get("chance")) for found in known.values()}
    chance = chances.pop() if len(chances) == 1 else None
    panels = [
        interval_panel(title, {m: Interval.of(found.get(name)) for m, found in known.items()}, True, chance, (0.0, 1.0))
        for name, title in _BY
    ]
    caption = (
        "How often a simple word counter, fitted on replies to other prompts, names the emotion of a reply from its content words, and "
        f"from those of them that say what it is about.{' Dashed: chance.' if chance is not None else ''} Far above chance, replies differ "
        "in topic and not only in emotion: the same complaint desk for anger, the same sickbed for sadness."
    )
    return Figure("contamination", "Emotion or topic?", caption, panels, [words_table(contest, list(known))], SOURCES)


def main_words_table(contest: Measured) -> FigureTable | None:
    """The over-used words of the main methods; None where they were not measured."""
    methods = [method for method in main_methods(contest) if contest.contamination(method) is not None]
    return words_table(contest, methods) if methods else None


def words_table(contest: Measured, methods: Sequence[str]) -> FigureTable:
    """Per method and emotion the words that it uses more than the other emotions, with their z."""
    rows: list[list[CellValue]] = []
    for method in methods:
        found = contest.contamination(method) or {}
        for emotion, words in (found.get("overused") or {}).items():
            listed = ", ".join(f"{word.get('word')} {number(finite(word.get('z')), 1)}" for word in words)
            shares = [percent(finite((found.get(name) or {}).get(emotion))) for name in ("by_emotion", "phrases")]
            rows.append([f"{label(method)}: {emotion}", *shares, listed or "none"])
    head = ("Method and emotion", "Named by content words", "Share a five-word phrase", "Over-used words with their z")
    return FigureTable("The words that each emotion uses more than all others; a z of 3 is rarely chance", head, rows)
