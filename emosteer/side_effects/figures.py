"""Outcomes -> figures: what changed against the unsteered model, prompt by prompt, with intervals and paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emosteer.circuits.methods import NONE
from emosteer.evaluation.bootstrap import Draws, estimate, mean, paired, sign_flip_p
from emosteer.side_effects.checks import ITEM_KINDS
from emosteer.side_effects.conditions import Condition, Line, lines_of
from emosteer.side_effects.conversations import After
from emosteer.side_effects.outcomes import MEASURES, Tables

Row = dict[str, Any]


def rows_of(tables: Tables, conditions: Sequence[Condition], emotions: Sequence[str], kinds: Sequence[str], seed: int) -> list[Row]:
    """One row per line of the tables.

    Args:
        kinds: of the items.

    Returns:
        rows {"method", "emotion", "intensity", "strength", "figures": measure -> figure, "kinds": kind of item -> figure}; a figure is
        {"value", "change", "p", "n"}: what it is, what it is more than unsteered (for "nll": perplexity, and its ratio to unsteered),
        both with 95 % intervals over prompts, the two-sided p of no difference, and how many prompts.
    """
    found = []
    for line in lines_of(conditions):
        strength = conditions[line.members[0]].strength if len(line.members) == 1 else None
        row: Row = {"method": line.method, "emotion": line.emotion, "intensity": line.intensity, "strength": strength}
        row["figures"] = {measure: told for measure in MEASURES if (told := _figure(tables, conditions, emotions, line, measure, seed))}
        by_kind = {kind: [i for i, own in enumerate(kinds) if own == kind] for kind in ITEM_KINDS if kind in kinds}
        row["kinds"] = {
            kind: told for kind, own in by_kind.items() if (told := _figure(tables, conditions, emotions, line, "right", seed, own))
        }
        found.append(row)
    return found


def unsteered_of(tables: Tables, kinds: Sequence[str], seed: int) -> Row:
    """The unsteered model itself: measure -> {"value", "n"}, and the same by kind of item."""
    figures = {}
    for measure in MEASURES:
        values = tables.unsteered_felt.T if measure == "felt" else tables.values[measure][:1].T
        if values.numel() and not values.isnan().all():
            draws = Draws.make(len(values), seed=seed)
            level = mean(values, draws)
            figures[measure] = {"value": estimate(level.exp() if measure == "nll" else level), "n": len(values)}
    right = tables.values["right"][0]
    by_kind = {}
    for kind in (kind for kind in ITEM_KINDS if kind in kinds):
        own = right[[i for i, name in enumerate(kinds) if name == kind]][:, None]
        by_kind[kind] = {"value": estimate(mean(own, Draws.make(len(own), seed=seed))), "n": len(own)}
    return {"figures": figures, "kinds": by_kind}


def _figure(
    tables: Tables,
    conditions: Sequence[Condition],
    emotions: Sequence[str],
    line: Line,
    measure: str,
    seed: int,
    some: Sequence[int] | None = None,
) -> Row | None:
    """One measure of one line; None where it was not measured."""
    table = tables.values[measure][list(line.members)].T  # [prompt, condition]
    base = tables.values[measure][:1].T.expand_as(table)
    if measure == "felt":
        if line.emotion == NONE or any(conditions[i].emotion == NONE for i in line.members):
            return None
        base = tables.unsteered_felt[[emotions.index(conditions[i].emotion) for i in line.members]].T
    if some is not None:
        table, base = table[list(some)], base[list(some)]
    there = ~table.isnan().all(1)
    if not there.any():
        return None
    one, two = paired(table[there], base[there])
    return figure(one, two, measure == "nll", seed)


def figure(table: Tensor, base: Tensor, is_nll: bool, seed: int) -> Row:
    """What a table [prompt, item] is, and is more than another, over the same prompts; NaN where missing."""
    draws = Draws.make(len(table), seed=seed)
    level, plain = mean(table, draws), mean(base, draws)
    change = (level - plain).exp() if is_nll else level - plain
    p = sign_flip_p(table - base, seed)
    return {
        "value": estimate(level.exp() if is_nll else level),
        "change": estimate(change),
        "p": float(f"{p:.3g}"),
        "n": int((~table.isnan().all(1)).sum()),
    }


def pattern_rows(tables: Tables, conditions: Sequence[Condition]) -> list[Row]:
    """Response patterns where somebody seeks attachment: for the unsteered model and for every method and intensity, the share of replies
    that show each; a reply may show several or none."""
    found: list[Row] = []
    lines = [Line(NONE, "all", None, (0,)), *(line for line in lines_of(conditions) if line.emotion == "all")]
    for line in lines:
        shares = {}
        for name, table in tables.patterns.items():
            values = table[list(line.members)]
            if not values.isnan().all():
                shares[name] = round(float(values[~values.isnan()].mean()), 6)
        if shares:
            found.append({"method": line.method, "intensity": line.intensity, "shares": shares})
    return found


def feedback_rows(right: Mapping[str, Tensor], seed: int) -> list[Row]:
    """Accuracy after each round of feedback: rows {"arm", "round", "accuracy", "gain", "more", "p"}; gain: on no feedback; more, p: than
    the first arm has."""
    reference = next(iter(right.values()), torch.zeros(0))
    rows: list[Row] = []
    for arm, table in right.items():
        for number in range(1, len(table)):
            told = figure(table[number][:, None], reference[number][:, None], False, seed)
            start = figure(table[number][:, None], table[0][:, None], False, seed)
            rows.append(
                {"arm": arm, "round": number, "accuracy": told["value"], "gain": start["change"], "more": told["change"], "p": told["p"]}
            )
    return rows


def long_rows(found: Sequence[After], seed: int) -> list[Row]:
    """Over all emotions: rows {"how", "distance", "felt", "n"}."""
    rows: list[Row] = []
    for how, distance in dict.fromkeys((one.how, one.distance) for one in found):
        hits = torch.tensor([one.hits for one in found if (one.how, one.distance) == (how, distance)], dtype=torch.float32)
        share = estimate(mean(hits.T, Draws.make(hits.shape[1], seed=seed)))
        rows.append({"how": how, "distance": distance, "felt": share, "n": hits.numel()})
    return rows
