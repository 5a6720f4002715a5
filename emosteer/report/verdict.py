"""The verdict in plain words, computed from the evaluation: does it work, what does it cost, is it better than the alternatives?

Every sentence follows from the numbers by the rules below; nothing is written by hand. An answer is "good" only where the whole
95 % interval says so, "mixed" where the value does and the interval does not (or nothing was shown either way), "bad" otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import CIRCUIT, CONTROLS, LEARNED_RESIDUAL, METHODS, NONE, RESIDUAL
from emosteer.report.dial_figures import spots
from emosteer.report.measured import Measured
from emosteer.report.wording import (
    MINUS,
    Interval,
    asked_by,
    finite,
    in_sentence,
    kind_label,
    number,
    number_range,
    percent,
    percent_range,
    plural,
    points_range,
    words,
)

GOOD, MIXED, BAD, UNKNOWN = "good", "mixed", "bad", "unknown"
AHEAD, BEHIND, LEVEL, UNCLEAR = "ahead", "behind", "level", "unclear"
TONES = {AHEAD: GOOD, BEHIND: BAD, LEVEL: MIXED, UNCLEAR: UNKNOWN}
#: Controls may stray this far from the unsteered model before they are said to do something.
NEAR = 0.05
#: From this share of good replies on, more replies are good than not.
HALF = 0.5
#: Krippendorff's alpha from which labels are reliable, and from which conclusions from them are tentative.
RELIABLE, TENTATIVE = 0.8, 0.667


@dataclass(frozen=True)
class Finding:
    """One question with its answer. tone: good, mixed, bad or unknown; detail: the numbers behind it."""

    question: str
    answer: str
    detail: str
    tone: str


@dataclass(frozen=True)
class Verdict:
    """headline: one sentence; lead: the one below it with the numbers; findings: question by question."""

    headline: str
    lead: str
    findings: Sequence[Finding]


def verdict(contest: Measured | None, circuit: Circuit | None, check: Mapping[str, Any] | None, model: str) -> Verdict:
    """The verdict on a model's circuit."""
    dial = _dial(circuit, check)
    if contest is None:
        lead = f"There is no evaluation of {model} here, so nothing is known about what its circuit does to replies."
        return Verdict("Not evaluated yet", lead, dial)
    if CIRCUIT not in contest.results:
        return Verdict("The circuit was not evaluated", "The evaluation holds other methods only; run it again with the circuit.", dial)
    works, cost = _works(contest), _cost(contest)
    findings = [works, *_emotions(contest), *_kinds(contest), cost, _prompting(contest), _residual(contest), *_learned(contest)]
    findings += [*_content(contest), _controls(contest), *_agreement(contest)]
    return Verdict(_headline(works.tone, cost.tone), _lead(contest, model), [*findings, *dial, *_missing(contest)])


def _headline(works: str, cost: str) -> str:
    if works == BAD:
        return "The circuit does not steer this model"
    if works == UNKNOWN:
        return "The evaluation says nothing about good replies"
    start = "The circuit works" if works == GOOD else "The circuit works in part"
    return start + {GOOD: ", and the text holds", MIXED: ", and the text nearly holds", BAD: ", but the text pays for it"}.get(cost, "")


def _lead(contest: Measured, model: str) -> str:
    good, emotion, ratio = (contest.metric(CIRCUIT, name) for name in ("good", "emotion", "ratio"))
    n, worst = contest.results[CIRCUIT].get("n"), contest.worst_kind(CIRCUIT)
    replies = f"{n:,} test replies" if isinstance(n, int) else "its test replies"
    cost = f", at {number(ratio.value)} times the perplexity of unsteered text" if ratio.value is not None else ""
    fewest = contest.part(CIRCUIT, "by_kind", worst, "good") if worst is not None else Interval(None)
    where = f" Worst kind of prompt: {kind_label(worst)}, {percent(fewest.value)}." if worst is not None else ""
    return (
        f"With the circuit set to an emotion, {percent_range(good)} of {replies} of {model} are good: a blind panel reads that emotion "
        f"(it does in {percent(emotion.value)}), and the reply is sound, answers its prompt and does not name the emotion{cost}.{where}"
    )


# ---- does it work, and at what cost? -----------------------------------------------------------------------------------


def _works(contest: Measured) -> Finding:
    question = "Does it work?"
    mine, none = contest.metric(CIRCUIT, "good"), contest.metric(NONE, "good")
    if mine.value is None:
        return Finding(question, "Not measured", "The evaluation has no share of good replies of the circuit.", UNKNOWN)
    low = mine.low if mine.low is not None else mine.value
    tone = BAD if low <= _reach(none) else GOOD if low >= HALF else MIXED
    detail = f"Good replies: {percent_range(mine)}{f', unsteered {percent_range(none)}' if none.value is not None else ''}."
    parts = (("emotion", "the emotion is read in"), ("sound", "sound"), ("answers", "answers its prompt"), ("names", "names the emotion"))
    shares = [f"{what} {percent(share.value)}" for name, what in parts if (share := contest.metric(CIRCUIT, name)).value is not None]
    detail += f" Of its parts: {', '.join(shares)}." if shares else ""
    if (six := contest.metric(CIRCUIT, "accuracy")).value is not None:
        detail += f" As counted before there was a panel, among {len(contest.emotions)} emotions without neutral: {percent_range(six)}"
        detail += f", chance {percent(contest.chance)}."
    return Finding(question, {GOOD: "Yes", MIXED: "In part", BAD: "No"}[tone], detail, tone)


def _reach(unsteered: Interval) -> float:
    """What unsteered replies reach, with their interval: no more than that is nothing that was shown."""
    return unsteered.high or unsteered.value or 0.0


def _emotions(contest: Measured) -> list[Finding]:
    question = "For every emotion?"
    known = _known_parts(contest, "by_emotion", contest.emotions)
    if not known:
        return []
    worst, best = (pick(known, key=lambda emotion: known[emotion].value or 0.0) for pick in (min, max))
    detail = f"Most good replies: {best}, {percent_range(known[best])}. Fewest: {worst}, {percent_range(known[worst])}."
    return [_everywhere(contest, question, "by_emotion", known, detail, str)]


def _kinds(contest: Measured) -> list[Finding]:
    question = "For every kind of prompt?"
    worst = contest.worst_kind(CIRCUIT)
    known = _known_parts(contest, "by_kind", contest.parts("by_kind"))
    if worst is None or worst not in known:
        return []
    emotion, answers = (contest.part(CIRCUIT, "by_kind", worst, name).value for name in ("emotion", "answers"))
    detail = f"Worst: {kind_label(worst)}, {percent_range(known[worst])} good, emotion {percent(emotion)}, answers {percent(answers)}."
    return [_everywhere(contest, question, "by_kind", known, detail, kind_label)]


def _known_parts(contest: Measured, by: str, names: Sequence[str]) -> dict[str, Interval]:
    """The circuit's shares of good replies, where they were measured."""
    shares = {name: contest.part(CIRCUIT, by, name, "good") for name in names}
    return {name: share for name, share in shares.items() if share.value is not None}


def _everywhere(
    contest: Measured, question: str, by: str, known: Mapping[str, Interval], detail: str, named: Callable[[str], str]
) -> Finding:
    """Whether the circuit does better than unsteered replies in every part, and more good than not."""
    lows = {name: share.value if share.low is None else share.low for name, share in known.items()}
    weak = [named(name) for name, low in lows.items() if (low or 0.0) <= _reach(contest.part(NONE, by, name, "good"))]
    half = [named(name) for name, share in known.items() if (share.value or 0.0) < HALF]
    if weak:
        return Finding(question, f"Not shown for {words(weak)}", f"{detail} The interval reaches down to the unsteered replies.", BAD)
    if half:
        return Finding(question, f"Above the unsteered model for all, but below one half for {words(half)}", detail, MIXED)
    return Finding(question, "Yes", detail, GOOD)


def _cost(contest: Measured) -> Finding:
    question = "What does it cost the text?"
    ratio, names, sound = (contest.metric(CIRCUIT, name) for name in ("ratio", "names", "sound"))
    limit, name_limit, plain = contest.budget("ratio"), contest.budget("names"), contest.metric(NONE, "sound")
    if ratio.value is None:
        return Finding(question, "Not measured", "The evaluation has no perplexity ratio of the circuit.", UNKNOWN)
    tones = {"perplexity": _within(ratio, limit), "naming": _within(names, name_limit), "soundness": _sound(sound, plain, contest)}
    broken = [what for what, tone in tones.items() if tone == BAD]
    tone = BAD if broken else MIXED if MIXED in tones.values() else GOOD if limit is not None else UNKNOWN
    answer = {
        GOOD: "Little: within the budget",
        MIXED: "Little: within the budget, but the interval crosses it",
        BAD: f"Too much: {words(broken)} outside the budget",
        UNKNOWN: "No budget was set",
    }[tone]
    parts = [f"Perplexity ratio {number_range(ratio)}{f', limit {number(limit)}' if limit else ''}"]
    if names.value is not None:
        parts.append(f"names its emotion in {percent_range(names)} of replies{f', limit {percent(name_limit)}' if name_limit else ''}")
    if sound.value is not None:
        parts.append(f"sound text in {percent_range(sound)}{f', unsteered {percent(plain.value)}' if plain.value is not None else ''}")
    return Finding(question, answer, "; ".join(parts) + ".", tone)


def _within(interval: Interval, limit: float | None) -> str | None:
    if limit is None or interval.value is None:
        return None
    if interval.value > limit:
        return BAD
    return GOOD if interval.high is None or interval.high <= limit else MIXED


def _sound(sound: Interval, plain: Interval, contest: Measured) -> str | None:
    """Soundness is never asked to be above that of unsteered replies."""
    limit = contest.budget("sound")
    if limit is None or sound.value is None:
        return None
    bound = limit if plain.value is None else min(limit, plain.value)
    return BAD if sound.value < bound else GOOD if sound.low is None or sound.low >= bound else MIXED


# ---- is it better? -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Against:
    """The circuit against another method. side: ahead, behind, level (no difference shown) or unclear; margin: in points, or empty."""

    side: str
    detail: str
    margin: str


def against(contest: Measured, other: str) -> Against:
    """Compares shares of good replies: by the paired difference, or else by whether the intervals are apart."""
    mine, theirs = contest.metric(CIRCUIT, "good"), contest.metric(other, "good")
    ratios = [contest.metric(method, "ratio").value for method in (CIRCUIT, other)]
    costs = f" at perplexity ratios {number(ratios[0])} and {number(ratios[1])}" if None not in ratios else ""
    values = f"{percent(mine.value)} against {percent(theirs.value)}{costs}"
    difference, p = contest.difference(CIRCUIT, other)
    if difference.value is not None and difference.low is not None and difference.high is not None:
        side = AHEAD if difference.low > 0 else BEHIND if difference.high < 0 else LEVEL
        sign = f", p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}" if p is not None else ""
        return Against(side, f"{values}: {points_range(difference)}{sign}.", points_range(Interval(difference.value)))
    if mine.low is None or mine.high is None or theirs.low is None or theirs.high is None:
        return Against(UNCLEAR, f"{values}; no interval was computed.", "")
    side = AHEAD if mine.low > theirs.high else BEHIND if mine.high < theirs.low else LEVEL
    return Against(side, f"{values}; {'intervals overlap' if side == LEVEL else 'intervals apart'}, no paired test.", "")


def _prompting(contest: Measured) -> Finding:
    question, best = "Better than asking for it in the prompt?", contest.best_prompt
    if best is None or best not in contest.results:
        return Finding(question, "Not compared", "The evaluation holds no prompting method.", UNKNOWN)
    return _comparison(contest, question, best, f"the best prompt ({asked_by(best)})")


def _residual(contest: Measured) -> Finding:
    question = "Better than residual steering?"
    if RESIDUAL not in contest.results:
        return Finding(question, "Not compared", "The evaluation holds no residual steering.", UNKNOWN)
    return _comparison(contest, question, RESIDUAL, "residual steering along the same directions")


def _learned(contest: Measured) -> list[Finding]:
    """Whether the place makes the difference, or only the learning; nothing where no residual vectors were learned."""
    if LEARNED_RESIDUAL not in contest.results:
        return []
    question, name = (
        "Better than residual steering that is learned in the same way?",
        "residual vectors learned as the circuit's gains were",
    )
    return [_comparison(contest, question, LEARNED_RESIDUAL, name)]


def _comparison(contest: Measured, question: str, other: str, name: str) -> Finding:
    compared = against(contest, other)
    by = f", by {compared.margin.lstrip(f'+{MINUS}')}" if compared.margin else ""
    answer = {AHEAD: f"Yes{by}", BEHIND: f"No, it is behind{by}", LEVEL: "No difference was shown", UNCLEAR: "Not decided"}[compared.side]
    return Finding(question, answer, f"Against {name}: {compared.detail}{_at_equal_ratio(contest, other)}", TONES[compared.side])


def _at_equal_ratio(contest: Measured, other: str) -> str:
    """The same comparison where both cost the text the same, as far as the circuit's doses allow."""
    row = contest.equal_ratio(CIRCUIT, other)
    if row is None:
        return ""
    ratios = f"{number(finite(row.get('ratio_a')))} and {number(finite(row.get('ratio_b')))}"
    found = points_range(Interval.of(row.get("difference")))
    return f" At the nearest perplexity ratios ({ratios}; development split, which chose the other's strengths and so favours it): {found}."


def _content(contest: Measured) -> list[Finding]:
    """Selectivity: how much of the unsteered reply is kept, against residual steering."""
    mine, theirs = contest.metric(CIRCUIT, "kept"), contest.metric(RESIDUAL, "kept")
    difference, _ = contest.difference(CIRCUIT, RESIDUAL, "kept")
    if mine.value is None or theirs.value is None or difference.low is None or difference.high is None:
        return []
    side = AHEAD if difference.low > 0 else BEHIND if difference.high < 0 else LEVEL
    answer = {AHEAD: "Yes", BEHIND: "No, it keeps less", LEVEL: "No difference was shown"}[side]
    detail = (
        f"Similarity to the unsteered reply {number_range(mine)} against {number_range(theirs)}, difference {number_range(difference, 3)}."
    )
    answers, plain = contest.metric(CIRCUIT, "answers"), contest.metric(NONE, "answers")
    if answers.value is not None and plain.value is not None:
        detail += f" Answers its prompt: {percent_range(answers)}, unsteered {percent(plain.value)}."
    return [Finding("Does it keep more of the content than residual steering?", answer, detail, TONES[side])]


def _controls(contest: Measured) -> Finding:
    question, controls = "Better than random interventions of the same size?", [c for c in CONTROLS if c in contest.results]
    if not controls:
        return Finding(question, "Not compared", "The evaluation holds no random control.", UNKNOWN)
    good = {control: contest.metric(control, "good") for control in controls}
    behind = [in_sentence(control) for control in controls if against(contest, control).side != AHEAD]
    floor = (contest.metric(NONE, "good").value or 0.0) + NEAR
    moved = [control for control in controls if (good[control].value or 0.0) > floor]
    shares = "; ".join(f"{in_sentence(control)} {percent_range(interval)}" for control, interval in good.items())
    detail = f"Good replies: {shares}."
    if behind:
        return Finding(question, f"Not shown against {words(behind, 'or')}", detail, BAD)
    if moved:
        do = "does" if len(moved) == 1 and METHODS[moved[0]].singular else "do"
        return Finding(question, f"Yes, though {words([in_sentence(control) for control in moved])} also {do} something", detail, MIXED)
    return Finding(question, "Yes; the controls stay near the unsteered model", detail, GOOD)


# ---- the rest --------------------------------------------------------------------------------------------------------------


def _agreement(contest: Measured) -> list[Finding]:
    """Whether several judges read the same, by Krippendorff's own bounds; one judge has nobody to agree with."""
    alpha, undecided = (finite(contest.agreement.get(name)) for name in ("alpha", "undecided"))
    if alpha is None or len(contest.judges) < 2:
        return []
    tone = GOOD if alpha >= RELIABLE else MIXED if alpha >= TENTATIVE else BAD
    answer = {GOOD: "Yes", MIXED: "Enough for tentative conclusions", BAD: "Too little to rely on the panel alone"}[tone]
    detail = f"Krippendorff's alpha {number(alpha)} (1 is perfect, 0 is chance); no majority for {percent(undecided)} of replies."
    return [Finding("Do the judges agree?", answer, detail, tone)]


def _dial(circuit: Circuit | None, check: Mapping[str, Any] | None) -> list[Finding]:
    where, rows = dial_verdict(circuit, check)
    if not rows:
        return []
    question = "Does more intensity read as more emotion?"
    falls = [emotion for emotion, rising, _ in rows if rising is False]
    undialled = [emotion for emotion, rising, _ in rows if rising is None]
    n_dials = len(rows) - len(undialled)
    ends = [ratio for _, _, ratio in rows if ratio is not None]
    detail = f"Measured {where}." + (f" The perplexity ratio is at most {number(max(ends))}." if ends else "")
    without = f"; no dial for {words(undialled)}" if undialled else ""
    if not n_dials:
        return [Finding(question, "No emotion has a dial", detail, MIXED)]
    if falls:
        return [Finding(question, f"Not at every step for {words(falls)}{without}", detail, MIXED)]
    tone = GOOD if check is not None and not undialled else MIXED
    return [Finding(question, f"Yes, at every step for {plural(n_dials, 'emotion')}{without}", detail, tone)]


def _missing(contest: Measured) -> list[Finding]:
    lost = sum(row.get("missing") or 0 for row in contest.results.values())
    if not lost:
        return []
    total = sum(row.get("n") or 0 for row in contest.results.values())
    detail = f"No judge had an opinion of {lost:,} of {total:,} replies; they count as missing, not as misses."
    return [Finding("Was everything judged?", f"{plural(lost, 'reply was', 'replies were')} not", detail, MIXED)]


def dial_verdict(circuit: Circuit | None, check: Mapping[str, Any] | None) -> tuple[str, list[tuple[str, bool | None, float | None]]]:
    """Where the dial was measured, and per emotion whether judged intensity rises throughout (None where there is no dial: no step was
    measured) and the highest perplexity ratio."""
    if check is not None:
        rows, axis, where = check["emotions"], "intensity", "on other prompts"
    elif circuit is not None:
        rows, axis = (circuit.metrics.get("calibration") or {}).get("emotions") or {}, "strength"
        where = "on the prompts that it was fitted on"
    else:
        return "", []
    dials: list[tuple[str, bool | None, float | None]] = []
    for emotion, row in rows.items():
        curve = spots(row, axis)
        judged, ratios = ([v for s in curve if (v := getattr(s, name)) is not None] for name in ("judged", "ratio"))
        steps = list(zip(judged, judged[1:], strict=False))
        dials.append((emotion, all(b > a for a, b in steps) if steps else None, max(ratios, default=None)))
    # a check lists apart what had no dial to be checked
    left_out = [] if check is None else check.get("without_dial") or []
    return where, [*dials, *((emotion, None, None) for emotion in left_out)]
