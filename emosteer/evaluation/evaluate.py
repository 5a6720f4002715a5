"""The contest's figures: which strength each method is given (development split), and how it does with it (test split, read once)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from emosteer.base.errors import UsageError
from emosteer.circuits.methods import CONTROLS, METHODS, NONE, PROMPTS, STEERED, source_of
from emosteer.evaluation.bootstrap import Draws, estimate, mean, median, paired, sign_flip_p
from emosteer.evaluation.doses import DosePoint, best_prompt, choose
from emosteer.evaluation.metrics import Table, agreement_of, confusion, contamination_of, judge_shares, judged_rows, kept_tables, table_of
from emosteer.evaluation.settings import EvaluationSettings
from emosteer.judges.jury import Jury
from emosteer.judges.protocol import LABELS
from emosteer.scenarios.scenarios import NEUTRAL, VALENCES, Group
from emosteer.writing.contest_writer import Cell, ContestWriter, cells_of
from emosteer.writing.resumable import Row

#: Shares and means that are reported with an interval, beside the perplexity ratio and its median form.
METRICS = (
    *("good", "emotion", "sound", "answers", "names", "synonyms"),
    *("probability", "accuracy", "repetition", "unfinished", "kept"),
)
#: What two methods are compared by.
COMPARED = ("good", "emotion", "probability", "accuracy", "ratio", "names", "sound", "answers", "unfinished", "kept")
#: What is given of every part: of an emotion, a kind of prompt, a valence.
PARTS = ("good", "emotion", "sound", "answers", "names", "accuracy")


Strengths = Mapping[str, float | None]
#: What was tried on the development split: (method, dose) -> table; the dose is None where there is nothing to choose.
DoseTables = dict[tuple[str, float | None], Table]


# ---- the development split -------------------------------------------------------------------------------------------


def develop(
    contest: ContestWriter, jury: Jury, groups: Sequence[Group], defaults: Mapping[str, Strengths], settings: EvaluationSettings
) -> DoseTables:
    """Writes and judges every method at every setting, random controls on fewer scenario-events."""
    wanted: dict[tuple[str, float | None], list[Cell]] = {}
    for method in settings.methods:
        own = groups[: settings.control_groups] if METHODS[method].controls else groups
        if method not in defaults:
            wanted[method, None] = cells_of(method, own, dict.fromkeys(contest.emotions))
        else:
            for dose in settings.doses:
                wanted[method, dose] = cells_of(method, own, {e: absolute_strength(dose, s) for e, s in defaults[method].items()})
    cells = [cell for some in wanted.values() for cell in some]
    rows = iter(judged_rows(cells, contest.write(cells, "development split"), jury, "development split"))
    found = {setting: [next(rows) for _ in some] for setting, some in wanted.items()}
    return {s: table_of(some, groups_of_cells(wanted[s]), contest.emotions) for s, some in found.items()}


def absolute_strength(dose: float, strength: float | None) -> float:
    """An absolute strength, rounded so that it reads well and is the same in every run."""
    return round(dose * (strength or 0.0), 6)


def groups_of_cells(cells: Sequence[Cell]) -> list[Group]:
    """The scenario-events of some cells, each once, in order."""
    return list(dict.fromkeys(cell.group for cell in cells))


@dataclass(frozen=True)
class Chosen:
    """doses: method -> emotion -> dose, None where there is nothing to choose; unfit: method -> what no allocation of doses kept to:
    "budget" (ratio and soundness of all replies together), or an emotion that no dose left sound enough."""

    doses: dict[str, dict[str, float | None]]
    unfit: dict[str, list[str]]


def chosen_doses(trials: DoseTables, emotions: Sequence[str], settings: EvaluationSettings) -> Chosen:
    """The rule, for every method. A control takes the doses of what it controls."""
    base = trials[NONE, None]
    plain = {emotion: DosePoint.of(base, base, e) for e, emotion in enumerate(emotions)}
    found = Chosen({}, {})
    for method in settings.methods:
        found.doses[method] = dict.fromkeys(emotions)
        source = source_of(method)
        if not METHODS[source].steers:
            continue
        points = {e: {dose: DosePoint.of(trials[source, dose], base, i) for dose in settings.doses} for i, e in enumerate(emotions)}
        choice = choose(points, plain, settings.budget)
        found.doses[method] = dict(choice.doses)
        if method == source and not choice.fits:
            found.unfit[method] = list(choice.unsound) or ["budget"]
    return found


def frontier(trials: DoseTables, emotions: Sequence[str]) -> list[Row]:
    """Good replies against perplexity ratio: one line per method, dose and target, which is an emotion or "all"."""
    lines = []
    for (method, dose), table in trials.items():
        for index, target in ((None, "all"), *enumerate(emotions)):
            # not "emotion": that is the share of replies in which the target is read
            lines.append({"method": method, "setting": dose, "target": target, **vars(DosePoint.of(table, trials[NONE, None], index))})
    return lines


def equal_ratio(
    trials: DoseTables, doses: Mapping[str, Mapping[str, float | None]], rivals: Sequence[tuple[str, str]], settings: EvaluationSettings
) -> list[Row]:
    """Two methods at the same fluency: `b` as chosen, `a` at the dose whose perplexity ratio is nearest to it. Development split.

    The ratios can stay apart, because no dose comes near: they are given beside the difference. `b`'s strengths were chosen on these very
    prompts, which flatters it: there is an interval of the difference, and no p.
    """
    base, found = trials[NONE, None], []
    for a, b in rivals:
        table = as_chosen(trials, b, doses[b])
        target = DosePoint.of(table, base)
        dose = min(settings.doses, key=lambda d: abs(math.log(DosePoint.of(trials[a, d], base).ratio / target.ratio)))
        own, draws = trials[a, dose], Draws.make(len(table["nll"]), seed=settings.seed)
        compared = compare(own, table, base, "good", draws, settings.seed)
        found.append(
            {
                "a": a,
                "b": b,
                "setting": dose,
                "ratio_a": DosePoint.of(own, base).ratio,
                "ratio_b": target.ratio,
                "good_a": estimate(mean(own["good"], draws)),
                "good_b": estimate(mean(table["good"], draws)),
                **{name: compared[name] for name in ("difference", "n")},
            }
        )
    return found


def as_chosen(trials: DoseTables, method: str, doses: Strengths) -> Table:
    """A method's development table with each emotion at its chosen dose."""
    parts = [trials[method, dose] for dose in doses.values()]
    return {name: torch.stack([part[name][:, e] for e, part in enumerate(parts)], 1) for name in parts[0]}


# ---- the test split --------------------------------------------------------------------------------------------------


def read_test(contest: ContestWriter, jury: Jury, groups: Sequence[Group], chosen: Mapping[str, Strengths]) -> dict[str, list[Row]]:
    """Method -> its judged replies to the test split at the chosen strengths."""
    cells = [cell for method, strengths in chosen.items() for cell in cells_of(method, groups, strengths)]
    rows = judged_rows(cells, contest.write(cells, "test split"), jury, "test split")
    return {method: [row for row in rows if row["method"] == method] for method in chosen}


def ratio_of(table: Table, base: Table, draws: Draws) -> Tensor:
    """Perplexity ratio to the unsteered replies. Shape [1 + draw]."""
    return (mean(table["nll"], draws) - mean(base["nll"], draws)).exp()


def compare(a: Table, b: Table, base: Table, metric: str, draws: Draws, seed: int) -> Row:
    """a - b over the replies that both have: difference with interval, p, n. The ratio's p is that of the nats per token behind it."""
    one, two = paired(*(table["nll" if metric == "ratio" else metric] for table in (a, b)))
    values = [ratio_of(t, base, draws) for t in (a, b)] if metric == "ratio" else [mean(t, draws) for t in (one, two)]
    p = sign_flip_p(one - two, seed)
    return {"difference": estimate(values[0] - values[1]), "p": float(f"{p:.3g}"), "n": int((~one.isnan()).sum())}


def result_of(
    method: str, table: Table, base: Table, rows: Sequence[Row], groups: Sequence[Group], draws: Draws, emotions: Sequence[str]
) -> Row:
    """Everything reported of one method."""

    def some(values: Table, unsteered: Table, drawn: Draws) -> Row:
        shares = {name: estimate(mean(values[name], drawn)) for name in PARTS}
        return {**shares, "ratio": estimate(ratio_of(values, unsteered, drawn)), "n": values["nll"].numel()}

    def part(columns: slice, lines: Sequence[int]) -> Row:
        cut = [{name: values[list(lines)][:, columns] for name, values in source.items()} for source in (table, base)]
        return some(cut[0], cut[1], draws.of(lines))

    everything = list(range(len(groups)))
    valences = {v: [g for g, group in enumerate(groups) if group.key.valence == v] for v in VALENCES}
    kinds = {kind: [g for g, group in enumerate(groups) if group.kind == kind] for kind in dict.fromkeys(g.kind for g in groups)}
    by_kind = {kind: part(slice(None), lines) for kind, lines in kinds.items()}
    judged = {kind: value for kind, found in by_kind.items() if (value := found["good"]["value"]) is not None}
    return {
        "method": method,
        "n": table["nll"].numel(),
        "missing": int(table["good"].isnan().sum()),
        **{name: estimate(mean(table[name], draws)) for name in METRICS},
        "ratio": estimate(ratio_of(table, base, draws)),
        "median_ratio": estimate((median(table["nll"], draws) - median(base["nll"], draws)).exp()),
        "n_tokens": round(table["n_tokens"].mean().item(), 6),
        "confusion": confusion(rows, emotions),
        "judges": judge_shares(rows, emotions),
        "contamination": contamination_of(rows),
        "worst_kind": min(judged, key=lambda kind: float(judged[kind]), default=None),
        "by_kind": by_kind,
        "by_emotion": {emotion: part(slice(e, e + 1), everything) for e, emotion in enumerate(emotions)},
        "by_valence": {valence: part(slice(None), lines) for valence, lines in valences.items() if lines},
    }


def rivals_of(methods: Sequence[str], prompt: str | None) -> list[tuple[str, str]]:
    """Who is compared with whom: all steerings with each other, with the best prompt, with none and with their controls."""
    pairs: list[tuple[str, str | None]] = list(combinations(STEERED, 2))
    pairs += [(method, rival) for rival in (prompt, NONE) for method in STEERED]
    pairs += [(source_of(control), control) for control in CONTROLS]
    return [(a, b) for a, b in pairs if a in methods and b in methods and b is not None]


def evaluate(
    contest: ContestWriter,
    jury: Jury,
    dev: Sequence[Group],
    test: Sequence[Group],
    defaults: Mapping[str, Strengths],
    settings: EvaluationSettings,
) -> tuple[Row, list[Row]]:
    """Holds the contest.

    Args:
        defaults: method -> emotion -> default strength, for every method that has strengths to choose.

    Returns:
        The evaluation (without provenance), and the judged test replies.

    Raises:
        UsageError: if no judge knows an emotion of the circuit.
    """
    emotions = contest.emotions
    if unknown := [emotion for emotion in emotions if emotion not in LABELS or emotion == NEUTRAL]:
        raise UsageError(f"no judge knows the emotion '{unknown[0]}'; judges tell {', '.join(LABELS)} apart")
    trials = develop(contest, jury, dev, defaults, settings)
    choice = chosen_doses(trials, emotions, settings)
    doses = choice.doses
    prompts = {name: DosePoint.of(trials[name, None], trials[NONE, None]) for name in PROMPTS if name in settings.methods}
    prompt = best_prompt(prompts, settings.budget) if prompts else None
    chosen = {m: {e: None if d is None else absolute_strength(d, defaults[m][e]) for e, d in own.items()} for m, own in doses.items()}
    by_method = read_test(contest, jury, test, chosen)
    kept = kept_tables(by_method, test, emotions, jury.encoder)
    tables = {method: {**table_of(some, test, emotions), "kept": kept[method]} for method, some in by_method.items()}
    draws, rivals = Draws.make(len(test), seed=settings.seed), rivals_of(settings.methods, prompt)
    body: Row = {
        "budget": vars(settings.budget),
        "defaults": {method: dict(own) for method, own in defaults.items()},
        "chosen": chosen,
        "unfit": choice.unfit,
        "best_prompt": prompt,
        "frontier": frontier(trials, emotions),
        "equal_ratio": equal_ratio(trials, doses, [(a, b) for a, b in rivals if b in (prompt, *STEERED)], settings),
        "agreement": agreement_of([row for lines in by_method.values() for row in lines]),
        "results": [result_of(m, table, tables[NONE], by_method[m], test, draws, emotions) for m, table in tables.items()],
        "comparisons": [
            {"a": a, "b": b, "metric": metric, **compare(tables[a], tables[b], tables[NONE], metric, draws, settings.seed)}
            for a, b in rivals
            for metric in COMPARED
        ],
    }
    return body, [row for some in by_method.values() for row in some]
