"""Lints of scenarios and reply banks: lengths, emotion words, near-duplicates, balance. No torch here."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emosteer.scenarios.contamination import Contamination
from emosteer.scenarios.scenarios import EMOTIONS, VALENCES, Bank, Group, Scenario
from emosteer.scenarios.scripts import word_count, words
from emosteer.scenarios.words import feeling_pattern, name_pattern


@dataclass(frozen=True)
class Problem:
    """One thing that a lint found. where: an id or file:line; rule: a short name; message: what was found."""

    where: str
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}: {self.message}"


@dataclass(frozen=True)
class Limits:
    """Bounds that the lints hold a dataset to; words are counted as `scripts.word_count` does."""

    scenario_words: tuple[int, int] = (8, 60)
    event_words: tuple[int, int] = (6, 60)
    reply_words: tuple[int, int] = (5, 60)
    overlap: float = 0.5
    reply_overlap: float = 0.35


def lint_scenario(scenario: Scenario, limits: Limits | None = None) -> list[Problem]:
    """Length and emotion words of one scenario and its events."""
    limits, problems = limits or Limits(), []
    parts = [("scenario", scenario.text, limits.scenario_words)]
    parts += [(f"event.{valence}", scenario.events[valence], limits.event_words) for valence in VALENCES]
    for name, text, (low, high) in parts:
        count = word_count(text)
        if not low <= count <= high:
            problems.append(Problem(scenario.id, "length", f"{name} has {count} words, expected {low} to {high}"))
        if emotion_words := feeling_pattern().findall(text):
            problems.append(Problem(scenario.id, "emotion word", f"{name} holds {', '.join(sorted(set(emotion_words)))}"))
    return problems


def lint_scenarios(scenarios: Sequence[Scenario], limits: Limits | None = None) -> list[Problem]:
    """Every lint of a scenario set: each item's own, duplicates and near-duplicates, balance of the themes."""
    limits = limits or Limits()
    problems = [problem for scenario in scenarios for problem in lint_scenario(scenario, limits)]
    whole = near_duplicates({s.id: " ".join([s.text, *s.events.values()]) for s in scenarios}, limits.overlap)
    # the same situation may be told with other events
    problems += once(whole, near_duplicates({s.id: s.text for s in scenarios}, limits.overlap))
    for scenario in scenarios:
        if len({scenario.text, *scenario.events.values()}) < 4:
            problems.append(Problem(scenario.id, "duplicate", "two of its texts are the same"))
    counts = Counter(s.theme for s in scenarios)
    most, least = max(counts.values(), default=0), min(counts.values(), default=0)
    if most > 2 * least:
        problems.append(Problem("themes", "balance", f"the largest has {most} scenarios, the smallest {least}"))
    return problems


def lint_prompts(prompts: Sequence[Group]) -> list[Problem]:
    """Lints of prompts that are no scenario-events: emotion words in what is said, and the same conversation twice. They may be as short as
    people are, and alike where one event only is changed."""
    problems = []
    for prompt in prompts:
        if emotion_words := feeling_pattern().findall(prompt.said):
            problems.append(Problem(str(prompt.key), "emotion word", f"the prompt holds {', '.join(sorted(set(emotion_words)))}"))
    first: dict[str, str] = {}
    for prompt in prompts:
        name = first.setdefault(prompt.said, str(prompt.key))
        if name != str(prompt.key):
            problems.append(Problem(str(prompt.key), "duplicate", f"says the same as {name}"))
    return problems


def lint_contamination(measured: Contamination | None, most: float) -> list[Problem]:
    """Whether the subject of replies gives their emotion away too often.

    Args:
        measured: None where there were too few replies to measure; most: highest accuracy of subject words on held-out replies.
    """
    if measured is None:
        return [Problem("replies", "contamination", "too few replies to measure it; expected two emotions and five prompts or scenarios")]
    if measured.subject <= most:
        return []
    words = [f"{emotion} {', '.join(row.word for row in rows[:3])}" for emotion, rows in measured.overused.items() if rows]
    message = f"subject words alone name the emotion of {measured.subject:.1%} of held-out replies (chance {measured.chance:.1%}), "
    message += f"expected at most {most:.1%}; let all emotions answer with the same content"
    return [Problem("replies", "contamination", message + (f" (over-used: {'; '.join(words)})" if words else ""))]


def lint_bank(bank: Bank, emotions: Sequence[str] = EMOTIONS, limits: Limits | None = None) -> list[Problem]:
    """Lints of a reply bank: every group complete, length, emotion names, near-duplicates, equal length over emotions."""
    limits, problems = limits or Limits(), []
    low, high = limits.reply_words
    lengths: dict[str, list[int]] = defaultdict(list)
    for key, replies in bank.items():
        missing = [emotion for emotion in emotions if emotion not in replies]
        if missing:
            problems.append(Problem(str(key), "balance", f"no reply for {', '.join(missing)}"))
        for emotion, text in replies.items():
            count = word_count(text)
            lengths[emotion].append(count)
            if not low <= count <= high:
                problems.append(Problem(f"{key}/{emotion}", "length", f"{count} words, expected {low} to {high}"))
            if names := sorted({*name_pattern().findall(text), *name_pattern(emotion).findall(text)}):
                problems.append(Problem(f"{key}/{emotion}", "emotion word", f"names a feeling: {', '.join(names)}"))
    texts = {f"{key}/{emotion}": text for key, replies in bank.items() for emotion, text in replies.items()}
    problems += near_duplicates(texts, limits.reply_overlap, size=4)
    means = {emotion: sum(counts) / len(counts) for emotion, counts in lengths.items()}
    if means and max(means.values()) > 1.5 * min(means.values()):
        longest, shortest = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        problems.append(Problem("replies", "balance", f"{longest} averages {means[longest]:.1f} words, {shortest} {means[shortest]:.1f}"))
    return problems


def _shingles(text: str, size: int) -> set[tuple[str, ...]]:
    said = words(text)
    return {tuple(said[i : i + size]) for i in range(len(said) - size + 1)} or {tuple(said)}


def near_duplicates(texts: Mapping[str, str], overlap: float, size: int = 3) -> list[Problem]:
    """Pairs of texts that share more than `overlap` of the shorter one's word n-grams. Linear in the number of shared n-grams."""
    shingles = {key: _shingles(text, size) for key, text in texts.items()}
    where: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key, grams in shingles.items():
        for gram in grams:
            where[gram].append(key)
    shared: Counter[tuple[str, str]] = Counter()
    for keys in where.values():
        for i, first in enumerate(keys[:200]):  # an n-gram in hundreds of texts is a commonplace, and would cost its square
            for second in keys[i + 1 : 200]:
                shared[first, second] += 1
    problems = []
    for (first, second), count in shared.items():
        share = count / min(len(shingles[first]), len(shingles[second]))
        if share > overlap:
            rule = "duplicate" if share == 1 else "near-duplicate"
            problems.append(Problem(second, rule, f"shares {share:.0%} of its word {size}-grams with {first}"))
    return problems


def overlap_between(first: Sequence[Scenario], second: Sequence[Scenario], limits: Limits | None = None) -> list[Problem]:
    """Scenarios of `second` that also occur in `first`, by id or by text: train and test must be disjoint."""
    one, two = ({s.id: " ".join([s.text, *s.events.values()]) for s in scenarios} for scenarios in (first, second))
    return once(overlap_of_texts(one, two, limits), overlap_of_situations(first, second, limits))


def overlap_of_situations(first: Sequence[Scenario], second: Sequence[Scenario], limits: Limits | None = None) -> list[Problem]:
    """The same of what the scenarios tell before their events, which may differ."""
    return overlap_of_texts({s.id: s.text for s in first}, {s.id: s.text for s in second}, limits)


def once(problems: Sequence[Problem], more: Sequence[Problem]) -> list[Problem]:
    """Problems, and those of the others whose place has none yet."""
    known = {problem.where for problem in problems}
    return [*problems, *(problem for problem in more if problem.where not in known)]


def overlap_of_texts(first: Mapping[str, str], second: Mapping[str, str], limits: Limits | None = None) -> list[Problem]:
    """The same of texts by their ids."""
    limits = limits or Limits()
    problems = [Problem(name, "not disjoint", "the same id is in both files") for name in second if name in first]
    texts = {f"first:{name}": text for name, text in first.items()} | {f"second:{name}": text for name, text in second.items()}
    for problem in near_duplicates(texts, limits.overlap):
        if problem.where.startswith("second:") and "first:" in problem.message:
            problems.append(Problem(problem.where.removeprefix("second:"), "not disjoint", problem.message.replace("first:", "")))
    return problems
