"""What the trials say: drops and shares with intervals, beside those of matched random sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from emosteer.circuits.validation.bench import FOLLOWED, READ
from emosteer.circuits.validation.intervals import Resampled, chance, effect_size, estimate, quotient, share
from emosteer.circuits.validation.settings import ENOUGH, MEAN, RATIO, SPECIFIC
from emosteer.circuits.validation.trials import (
    ABLATE,
    ADD,
    CLEAN,
    KEEP,
    NEUTRAL_ASKED,
    NOTHING,
    OWN,
    READING,
    SWAPPED,
    WHOLE,
    Sets,
    Trial,
)

#: The row that stands for the mean over emotions.
ALL = "all"
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Figures:
    """What was measured. values: trial -> [figure, prompt] (`bench.FOLLOWED` or `bench.READ`)."""

    values: Mapping[Trial, Tensor]
    draws: Resampled

    def of(self, trial: Trial, figure: str) -> Tensor:
        """One figure of a trial, by prompt."""
        return self.values[trial][(READ if trial.elicitation == READING else FOLLOWED).index(figure)]

    def sets(self, trial: Trial, who: str, figure: str) -> Tensor:
        """The same of the random sets beside a circuit's trial. who: "random" or "sized". [set, prompt], none where there are none."""
        found: list[Tensor] = []
        while (other := replace(trial, who=f"{who}:{len(found)}")) in self.values:
            found.append(self.of(other, figure))
        return torch.stack(found) if found else torch.zeros(0)

    def clean(self, trial: Trial, who: str = CLEAN) -> Trial:
        """The baseline of a trial: the same prompt, nothing done."""
        return Trial(trial.emotion, trial.asked, trial.elicitation, who=who)


def findings(values: Mapping[Trial, Tensor], sets: Sequence[Sets], halves: Sequence[int], seed: int) -> dict[str, list[Row]]:
    """All tables. values: trial -> [figure, prompt]; sets: by emotion; halves: which half each prompt belongs to."""
    n = next(iter(values.values())).shape[-1]
    figures = Figures(values, Resampled.of(n, seed))
    by_emotion = {one.emotion: one for one in sets}
    necessary = _grouped(figures, by_emotion, halves, ABLATE)
    return {
        "necessary": necessary,
        "sufficient": _grouped(figures, by_emotion, halves, KEEP),
        "reading": _reading(figures),
        "swaps": _swaps(figures),
        "claims": _claims(necessary, len(sets)),
    }


def _points(figures: Figures, action: str) -> dict[tuple[str, str, str, float], list[Trial]]:
    """The circuits' own trials under a prompt that asks for their emotion: (elicitation, size, kind, dose) -> by emotion."""
    found: dict[tuple[str, str, str, float], list[Trial]] = {}
    for trial in figures.values:
        if trial.who == OWN and trial.action == action and trial.asked == trial.emotion and trial.elicitation != READING:
            found.setdefault((trial.elicitation, trial.size, trial.kind, trial.dose), []).append(trial)
    return found


def _grouped(figures: Figures, sets: Mapping[str, Sets], halves: Sequence[int], action: str) -> list[Row]:
    rows: list[Row] = []
    for (elicitation, size, kind, dose), trials in _points(figures, action).items():
        for figure in FOLLOWED:
            told = {"figure": figure, "elicitation": elicitation, "size": size, "kind": kind, "dose": dose}
            measured = [_measured(figures, trial, figure) for trial in trials]
            for trial, one in zip(trials, measured, strict=True):
                rows.append({"emotion": trial.emotion, **told, **one.row(), **_taken(figures, sets[trial.emotion], halves, trial)})
            if len(trials) > 1:
                rows.append({"emotion": ALL, **told, **_Measured.mean(measured).row()})
    return rows


@dataclass(frozen=True, eq=False)
class _Measured:
    """Draws of one point. whole: what there is to lose or to carry; own: of it, by the circuit; random, sized: by random sets; sets: their
    means by set; others: of other emotions, by the circuit."""

    whole: Tensor
    own: Tensor
    random: Tensor | None
    sets: Tensor
    sized: Tensor | None
    others: Tensor | None

    def row(self) -> Row:
        row: Row = {
            "whole": estimate(self.whole).record(),
            "moved": estimate(self.own).record(),
            "share": estimate(share(self.own, self.whole)).record(),
        }
        if self.random is not None:
            own = self.own[0].item()
            row["random"] = estimate(self.random).record()
            row["random_share"] = estimate(share(self.random, self.whole)).record()
            if (ratio := quotient(own, self.random[0].item())) is not None:
                row["ratio"] = ratio
            row["above"] = estimate(self.own - self.random).record()
            row["effect_size"], row["p"] = effect_size(own, self.sets), chance(own, self.sets)
        if self.sized is not None:
            row["sized"] = estimate(self.sized).record()
        if self.others is not None:
            row["others"] = estimate(self.others).record()
        return row

    @classmethod
    def mean(cls, several: Sequence[_Measured]) -> _Measured:
        """Over emotions, draw by draw."""

        def over(name: str) -> Tensor | None:
            values = [getattr(one, name) for one in several]
            return None if any(value is None for value in values) else torch.stack(values).mean(0)

        short = min(len(one.sets) for one in several)
        sets = torch.stack([one.sets[:short] for one in several]).mean(0)
        whole, own = (torch.stack([getattr(one, name) for one in several]).mean(0) for name in ("whole", "own"))
        return cls(whole, own, over("random"), sets, over("sized"), over("others"))


def _floor(figures: Figures, trial: Trial) -> Trial:
    """What would be left if nothing of the emotion were: all heads replaced, which for values from another prompt is that prompt's run.
    With their means in all of them a model says nothing sensible: ablation by means is held against the prompt for neutrality."""
    if trial.action == ABLATE and trial.kind == MEAN:
        return figures.clean(trial, NEUTRAL_ASKED)
    return replace(trial, size=WHOLE, who=NOTHING, action=KEEP, dose=1.0)


def _measured(figures: Figures, trial: Trial, figure: str) -> _Measured:
    draws, clean, floor = figures.draws, figures.of(figures.clean(trial), figure), figures.of(_floor(figures, trial), figure)

    def moved(values: Tensor) -> Tensor:
        """By how much the figure fell, or by how much it came through."""
        return values - floor if trial.action == KEEP else clean - values

    random, sized = (moved(values) if len(values) else None for values in (figures.sets(trial, who, figure) for who in ("random", "sized")))
    others = [
        figures.of(figures.clean(other), figure) - figures.of(other, figure)
        for other in figures.values
        if other == replace(trial, asked=other.asked) and other.asked != trial.emotion
    ]
    return _Measured(
        draws.means(clean - floor),
        draws.means(moved(figures.of(trial, figure))),
        draws.set_means(random) if random is not None else None,
        random.mean(1) if random is not None else torch.zeros(0),
        draws.set_means(sized) if sized is not None else None,
        draws.means(torch.stack(others)).mean(1) if others else None,
    )


def _taken(figures: Figures, sets: Sets, halves: Sequence[int], trial: Trial) -> Row:
    """What the set and its random ones take out of the stream, in the stream's units."""
    n = len(figures.sets(trial, "random", "margin"))
    own = sets.taken(trial.size, OWN, halves)
    row: Row = {"units": sets.count(trial.size), "taken": own}
    return {**row, "random_taken": sum(sets.taken(trial.size, f"random:{i}", halves) for i in range(n)) / n} if n else row


def _reading(figures: Figures) -> list[Row]:
    """How much less of the emotion is read from its text, of another emotion from its, and what happens to neutral text."""
    rows = []
    for trial in (one for one in figures.values if one.elicitation == READING and one.who == OWN):
        clean, draws = figures.clean(trial), figures.draws
        row: Row = {"emotion": trial.emotion, "size": trial.size}
        for figure in READ:
            sign = -1.0 if figure == "cost" else 1.0
            before, after = figures.of(clean, figure), figures.of(trial, figure)
            random = figures.sets(trial, "random", figure)
            row[figure] = {
                "clean": before.mean().item(),
                "moved": estimate(sign * draws.means(before - after)).record(),
                "share": estimate(share(sign * draws.means(before - after), draws.means(before))).record(),
                "random": estimate(sign * draws.set_means(before - random)).record(),
                "p": chance((sign * (before - after)).mean().item(), (sign * (before - random)).mean(1)),
            }
        rows.append(row)
    return rows


def _swaps(figures: Figures) -> list[Row]:
    """What an emotion's contrasts do when its own heads, those of another emotion or random ones add them, at equal length."""
    rows = []
    for trial in (one for one in figures.values if one.elicitation == SWAPPED and one.who == OWN and one.action == ADD):
        clean = figures.of(figures.clean(trial), "margin")
        lent = {
            other.who.removeprefix("heads of "): estimate(figures.draws.means(figures.of(other, "margin") - clean)).record()
            for other in figures.values
            if other == replace(trial, who=other.who) and other.who.startswith("heads of ")
        }
        random = figures.sets(trial, "random", "margin")
        rows.append(
            {
                "emotion": trial.emotion,
                "size": trial.size,
                "own": estimate(figures.draws.means(figures.of(trial, "margin") - clean)).record(),
                "lent": lent,
                "random": estimate(figures.draws.set_means(random - clean)).record(),
            }
        )
    return rows


def _claims(necessary: Sequence[Row], n_emotions: int) -> list[Row]:
    """Whether the drop is what the claim asks for, by emotion, at every point that has what is needed to say so.

    Args:
        n_emotions: of the circuit; a point may have fewer, where circuits are of different sizes.
    """
    enough = min(ENOUGH, n_emotions)
    rows: list[Row] = []
    points: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in necessary:
        if row["emotion"] != ALL and row["dose"] == 1 and "random" in row and "others" in row:
            points.setdefault((row["figure"], row["elicitation"], row["size"], row["kind"]), []).append(row)
    for (figure, elicitation, size, kind), found in points.items():
        larger = [row["emotion"] for row in found if 0 < row["moved"][0] >= RATIO * row["random"][0]]
        apart = [row["emotion"] for row in found if row["moved"][1] > row["random"][2]]
        specific = [row["emotion"] for row in found if row["moved"][0] > 0 and row["others"][0] < SPECIFIC * row["moved"][0]]
        told = {
            "figure": figure,
            "elicitation": elicitation,
            "size": size,
            "kind": kind,
            "larger": larger,
            "apart": apart,
            "specific": specific,
        }
        both = [emotion for emotion in larger if emotion in apart]
        holds = len([emotion for emotion in both if emotion in specific]) >= enough
        rows.append({**told, "emotions": len(found), "holds": holds})
    return rows
