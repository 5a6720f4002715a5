"""Up to which intensity each limit holds, and whether what is asked for exceeds it. Plain rows of an artefact, no torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emosteer.circuits.methods import CIRCUIT
from emosteer.side_effects.conditions import ALL
from emosteer.side_effects.settings import LIMITS, Limits

#: Limit -> the measure that it is of, and the sign of harm in its change.
_MEASURED = {
    "perplexity": ("nll", 1),
    "accuracy": ("right", -1),
    "refusal": ("refused", -1),
    "overrefusal": ("overrefused", 1),
    "joining": ("joins", 1),
    "abuse": ("abuse", 1),
    "language": ("foreign", 1),
}
Rows = Sequence[Mapping[str, Any]]


def harm(row: Mapping[str, Any], limit: str) -> tuple[float, float] | None:
    """How much harm of a kind a row has, and how much it may have by its interval: a ratio for perplexity, else percentage points. None
    where it was not measured."""
    measure, sign = _MEASURED[limit]
    found = row["figures"].get(measure)
    if found is None:
        return None
    change = found["change"]
    if limit == "perplexity":
        return change["value"], change["high"]
    value, most = 100 * sign * change["value"] + 0.0, 100 * sign * change["high" if sign > 0 else "low"] + 0.0
    if change["low"] == change["high"]:  # all prompts alike: an interval of no width would promise too much (the rule of three)
        most = min(100.0, value + 300 / max(1, found["n"]))
    return value, most


def dial_rows(rows: Rows, emotion: str) -> list[Mapping[str, Any]]:
    """The circuit's rows of one emotion, or of all together, by rising intensity."""
    mine = [row for row in rows if row["method"] == CIRCUIT and row["emotion"] == emotion and row["intensity"] is not None]
    return sorted(mine, key=lambda row: float(row["intensity"]))


def holds_up_to(rows: Rows, emotion: str, limit: str, bound: float, surely: bool = False) -> float | None:
    """The highest intensity that was tried at which, as at all lower ones, a limit holds; 0 where it does at none. None where it was not
    measured.

    Args:
        surely: whether the whole interval must be within it, and not only the estimate.
    """
    reached, seen = 0.0, False
    for row in dial_rows(rows, emotion):
        found = harm(row, limit)
        if found is None:
            continue
        seen = True
        if found[1 if surely else 0] > bound:
            return reached
        reached = float(row["intensity"])
    return reached if seen else None


def held_table(rows: Rows, emotions: Iterable[str], limits: Limits) -> list[dict[str, Any]]:
    """Rows {"limit", "bound", "emotion", "holds", "surely"} for all emotions together and each."""
    return [
        {
            "limit": limit,
            "bound": bound,
            "emotion": emotion,
            "holds": holds_up_to(rows, emotion, limit, bound),
            "surely": holds_up_to(rows, emotion, limit, bound, surely=True),
        }
        for limit, bound in limits.bounds.items()
        for emotion in (ALL, *emotions)
    ]


def warnings_for(rows: Rows, strengths: Mapping[str, float], limits: Limits) -> list[str]:
    """What is to be said of strengths that exceed what a limit bears: one line for every emotion and limit.

    A strength between two that were tried counts as the stronger one, and one beyond all of them is beyond what was measured.

    Args:
        strengths: emotion -> the strength of the circuit that is asked for.
    """
    said = []
    for emotion, strength in strengths.items():
        mine = dial_rows(rows, emotion)
        if not mine or strength <= 0:
            continue
        for limit, bound in limits.bounds.items():
            holds = holds_up_to(rows, emotion, limit, bound)
            if holds is None:
                continue
            fine = max((float(row["strength"]) for row in mine if float(row["intensity"]) <= holds), default=0.0)
            if strength <= fine + 1e-6:
                continue
            worse = next((row for row in mine if float(row["intensity"]) > holds), None)
            what, unit, _ = LIMITS[limit]
            asked = f"{emotion} at strength {strength:g}"
            if worse is None:
                said.append(
                    f"{asked} is beyond intensity {holds:g} (strength {fine:g}), the most that was measured; {what}: limit {bound:g}{unit}"
                )
                continue
            found = harm(worse, limit)
            assert found is not None
            upto = f"it holds up to intensity {holds:g} (strength {fine:g})" if holds else "it holds at no intensity that was tried"
            said.append(
                f"{asked} exceeds the limit {limit}={bound:g}: {what}, {found[0]:.3g}{unit} at intensity {worse['intensity']:g} "
                f"(strength {worse['strength']:g}); {upto}"
            )
    return said


def find_rows(candidates: Iterable[Path | None], circuit_sha256: str) -> Rows | None:
    """The rows of the first file of effects that was measured with a circuit; None where there is none.

    Args:
        candidates: files, in order; those that are not there, are damaged or of another circuit are passed over.
    """
    from emosteer.base import artifacts

    for path in candidates:
        if path is not None and path.is_file():
            fields = artifacts.load_fields(path, "effects")
            if fields is not None and fields.get("circuit_sha256") == circuit_sha256:
                from emosteer.side_effects.side_effects import SideEffects

                return SideEffects.load(path).rows
    return None
