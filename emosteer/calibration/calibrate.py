"""The intensity dial of a circuit: which strength makes a reply sound how intense, and how strong the text bears.

On development prompts the circuit writes at rising strengths. A blind judge gives the intensity (mean probability of the target), the
unsteered model the perplexity ratio, and two more checks the share of sound replies and of replies that name the emotion. Each emotion is
capped at the largest strength that holds the guard while no weaker one breaks it by more than chance, found to a fraction of a step by
halving. How predictable text is differs between emotions at any strength (angry replies are less so than the bland ones of an assistant),
hence the perplexity ratio proper is that of all emotions together: the caps of those furthest above it are lowered until it holds.
Below the cap the judged intensity is made monotone (`dial`) and turned round, so that it rises evenly with `--intensity`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from emosteer.base.errors import UsageError
from emosteer.base.progress import note
from emosteer.calibration.settings import CalibrateSettings, Guard
from emosteer.calibration.trials import StrengthPoint, Trials
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.dial import flattened, isotonic

#: What `check` writes at.
INTENSITIES = (0.0, 25.0, 50.0, 75.0, 100.0)


#: A strength that adds next to nothing to the examples, as a share of the strongest.
FLOOR = 0.005


@dataclass(frozen=True)
class Climb:
    """One emotion's points. held: up to the cap, rising, unsteered first; broke: stronger ones, rising."""

    held: tuple[StrengthPoint, ...]
    broke: tuple[StrengthPoint, ...] = ()


def uncalibrated(circuit: Circuit) -> Circuit:
    """The circuit as it was before any calibration: calibrating again starts from the same strengths."""
    if not circuit.calibrated:
        return circuit
    before = circuit.metrics["calibration"]["before"]
    metrics = {name: value for name, value in circuit.metrics.items() if name not in ("calibration", "alone")}
    return replace(circuit.with_strength([before[emotion] for emotion in circuit.emotions]), metrics=metrics)


def grid(settings: CalibrateSettings, shows: bool) -> list[float]:
    """The strengths that are tried first, 0 left out, as shares of the strongest.

    Args:
        shows: whether examples stand before what is steered. They carry some of the emotion at any strength, so that the curve rises at
            once, and further before the first step of an even grid than after it: two more strengths tell how.
    """
    steps = settings.points - 1
    return [*((FLOOR, 0.5 / steps) if shows else ()), *(step / steps for step in range(1, settings.points))]


def climb(trials: Trials, tops: Mapping[str, float], settings: CalibrateSettings, shows: bool = False) -> dict[str, Climb]:
    """Raises every emotion's strength step by step until the guard breaks or the top is reached, then halves the step to find the cap.

    All emotions are written in the same batches; one whose text broke by more than chance is not tried any stronger.

    Args:
        tops: emotion -> strongest strength; shows: whether examples stand before what is steered.
    """
    guard, emotions = settings.guard, list(tops)
    tried = {point.emotion: [point] for point in trials.at([(emotion, 0.0) for emotion in emotions], "unsteered")}
    shares = grid(settings, shows)
    for step, share in enumerate(shares, 1):
        alive = [e for e in emotions if not guard.faults(tried[e][-1], tried[e][0], slack=1)]
        if not alive:
            break
        wanted = [(e, round(tops[e] * share, 6)) for e in alive]
        for point in trials.at(wanted, f"strength {step} of {len(shares)}"):
            tried[point.emotion].append(point)
        note(f"strength {step} of {len(shares)}: written for {', '.join(alive)}")
    found = {emotion: _capped(points, guard) for emotion, points in tried.items()}
    for step in range(settings.refine):
        middles = [(e, round((c.held[-1].strength + c.broke[0].strength) / 2, 6)) for e, c in found.items() if c.broke]
        if not middles:
            break
        for point in trials.at(middles, f"cap {step + 1} of {settings.refine}"):
            so_far = found[point.emotion]
            if guard.faults(point, so_far.held[0]):
                found[point.emotion] = Climb(so_far.held, (point, *so_far.broke))
            else:
                found[point.emotion] = Climb((*so_far.held, point), so_far.broke)
        note(f"cap {step + 1} of {settings.refine}: " + ", ".join(f"{e} {c.held[-1].strength:g}" for e, c in found.items()))
    return found


def _capped(points: Sequence[StrengthPoint], guard: Guard) -> Climb:
    """The points up to the strongest that holds every bound itself, and those beyond."""
    size = 1 + max(i for i, point in enumerate(points) if i == 0 or not guard.faults(point, points[0]))
    return Climb(tuple(points[:size]), tuple(points[size:]))


def joint_ratio(points: Sequence[StrengthPoint]) -> float:
    """The perplexity ratio of several emotions' replies to the same prompts together."""
    return math.exp(fmean(math.log(point.ratio) for point in points))


def lowered(climbs: Mapping[str, Climb], bound: float) -> dict[str, Climb]:
    """The climbs with caps lowered, the highest ratio first, until the ratio at the caps holds the bound for all emotions together."""
    found = dict(climbs)
    while joint_ratio([climb.held[-1] for climb in found.values()]) > bound:
        above = {emotion: climb.held[-1].ratio for emotion, climb in found.items() if len(climb.held) > 1 and climb.held[-1].ratio > bound}
        if not above:
            break
        worst = max(above, key=lambda emotion: above[emotion])
        held = found[worst].held
        found[worst] = Climb(held[:-1], (held[-1], *found[worst].broke))
    return found


def worthwhile(climbs: Mapping[str, Climb]) -> dict[str, Climb]:
    """The climbs up to the last strength whose share of good replies is within two standard errors of the best one's: what is stronger
    pays for more emotion with replies that are worse in all."""
    found = {}
    for emotion, climb in climbs.items():
        bound = _good_bound(climb.held)
        size = 1 + max(i for i, point in enumerate(climb.held) if point.good >= bound)
        found[emotion] = Climb(climb.held[:size], (*climb.held[size:], *climb.broke))
    return found


def _good_bound(held: Sequence[StrengthPoint]) -> float:
    """Two standard errors below the best share of good replies. The error is that of a share one good and one bad reply nearer to a half
    (Agresti and Coull): where all are good, one that is not may still be chance."""
    best = max(held, key=lambda point: point.good)
    n = len(best.known)
    share = (best.good * n + 1) / (n + 2)
    return best.good - 2 * math.sqrt(share * (1 - share) / (n + 2))


def calibrate(trials: Trials, settings: CalibrateSettings, data: Mapping[str, str], parents: Mapping[str, str]) -> Circuit:
    """The circuit of the trials with its dial in metrics["calibration"] and default strengths as the settings say.

    Args:
        data: the scenario file's name -> sha256; parents: artefact kind -> sha256 of what was calibrated, kept if it was calibrated
            before.

    Raises:
        UsageError: if a default strength, which the strengths tried are multiples of, is not above 0.
    """
    base = uncalibrated(trials.circuit)
    before = {emotion: round(float(s), 6) for emotion, s in zip(base.emotions, base.strength.tolist(), strict=True)}
    for emotion, strength in before.items():
        if strength <= 0:
            raise UsageError(f"the default strength for {emotion} is {strength:g}; make the circuit with one above 0 to calibrate it")
    reached = climb(trials, {emotion: settings.top * strength for emotion, strength in before.items()}, settings, bool(base.examples))
    held = lowered(reached, settings.ratio)
    climbs = worthwhile(held) if settings.good_cap else held
    table = {
        "judge": trials.jury.name,
        "judge_key": trials.jury.key,
        "groups": len(trials.groups),
        "data": dict(data),
        "decoding": asdict(trials.decoding),
        "dtype": trials.model.precision.removeprefix("torch."),
        "rule": settings.rule,
        "cap": {**asdict(settings.guard), "joint_ratio": settings.ratio},
        "joint_ratio": round(joint_ratio([climb.held[-1] for climb in climbs.values()]), 6),
        "examples": {emotion: len(own) for emotion, own in base.examples.items()},
        "default_intensity": settings.default_intensity,
        "before": before,
        "emotions": {emotion: _curve(climbs[emotion], settings.guard) for emotion in base.emotions},
    }
    kept = trials.circuit.provenance.parents if trials.circuit.calibrated else {**base.provenance.parents, **parents}
    alone = _alone(trials.circuit)
    metrics = {**base.metrics, "calibration": table, **({"alone": alone} if alone else {})}
    made = replace(base, metrics=metrics, provenance=replace(base.provenance, parents=dict(kept)))
    return made.with_strength([_default(made, emotion, before[emotion], settings) for emotion in made.emotions])


def _alone(circuit: Circuit) -> dict[str, Any] | None:
    """The dial and the strengths that a circuit with examples had before it had any, kept for whatever shows none (exports, the plain
    model, `--no-examples`); None where there were none, or where there are no examples."""
    dial = circuit.metrics.get("calibration")
    if not circuit.examples or dial is None:
        return None
    if dial.get("examples"):
        kept: dict[str, Any] | None = circuit.metrics.get("alone")
        return kept
    strengths = zip(circuit.emotions, circuit.strength.tolist(), strict=True)
    return {"strength": {emotion: round(strength, 6) for emotion, strength in strengths}, "calibration": dict(dial)}


def _curve(found: Climb, guard: Guard) -> dict[str, Any]:
    """The part of one emotion: what held, its monotone fit, and what broke, why."""
    held = _rows(found.held)
    fitted = [round(value, 6) for value in flattened(isotonic(held["judged"], held["n"]))]
    bound = _good_bound(found.held)
    why = [guard.faults(point, found.held[0]) or ["good" if point.good < bound else "joint ratio"] for point in found.broke]
    return {**held, "fitted": fitted, "broke": {**_rows(found.broke), "why": why}}


def _rows(points: Sequence[StrengthPoint]) -> dict[str, Any]:
    return {
        "strength": [p.strength for p in points],
        "judged": [round(p.mean, 6) for p in points],
        "n": [len(p.known) for p in points],
        "error": [None if p.error is None else round(p.error, 6) for p in points],
        "ratio": [round(p.ratio, 6) for p in points],
        "ratio_error": [None if p.ratio_error is None else round(p.ratio_error, 6) for p in points],
        "sound": [round(p.sound, 6) for p in points],
        "names": [round(p.names, 6) for p in points],
        "answers": [round(p.answers, 6) for p in points],
        "good": [round(p.good, 6) for p in points],
    }


def _default(circuit: Circuit, emotion: str, before: float, settings: CalibrateSettings) -> float:
    """The default strength; as it was where no strength held, and said so."""
    curve = circuit.metrics["calibration"]["emotions"][emotion]
    if len(curve["strength"]) < 2:
        why = ", ".join(curve["broke"]["why"][0] if curve["broke"]["why"] else ())
        note(f"{emotion}: the text broke at every strength tried ({why}); its default strength stays {before:g} and it has no intensity")
        return before
    if curve["fitted"][0] == curve["fitted"][-1]:
        note(f"{emotion}: judged intensity does not rise with strength; its dial is a straight line up to the cap")
    if not curve["broke"]["strength"]:
        note(f"{emotion}: the text held at every strength tried; a higher --top could reach further")
    if settings.default_intensity is None:
        return most_good(curve["strength"], curve["good"])
    return circuit.strength_at(emotion, settings.default_intensity)


def most_good(strengths: Sequence[float], good: Sequence[float]) -> float:
    """The strength above 0 around which most replies are good: the mean with the strengths next to it, so that one lucky point does not
    decide; of equal ones the weakest.

    Args:
        strengths: rising, 0 first; good: shares.
    """
    around = [round(fmean(good[max(1, i - 1) : i + 2]), 9) for i in range(1, len(strengths))]
    return strengths[1 + around.index(max(around))]


def check(trials: Trials, intensities: Sequence[float] = INTENSITIES) -> dict[str, Any]:
    """What the dial gives on other prompts: per emotion and intensity the judged intensity, ratio, sound and naming, and whether it
    rises at every step (with the step's standard error over prompts). "all" is the mean over emotions."""
    circuit = trials.circuit
    emotions = [e for e in circuit.emotions if len(circuit.metrics["calibration"]["emotions"][e]["strength"]) > 1]
    wanted = [(emotion, circuit.strength_at(emotion, i)) for emotion in emotions for i in intensities]
    points = trials.at(wanted, "check")
    size = len(intensities)
    found = {emotion: _checked(points[k * size : (k + 1) * size], intensities) for k, emotion in enumerate(emotions)}
    return {
        "emotions": found,
        "without_dial": [emotion for emotion in circuit.emotions if emotion not in emotions],
        "monotone": all(row["monotone"] for row in found.values()),
        "joint_ratio": [
            round(joint_ratio([points[k * size + i] for k in range(len(emotions))]), 6) if emotions else None for i in range(size)
        ],
        "highest_ratio": max((max(row["ratio"]) for row in found.values()), default=None),
    }


def _checked(points: Sequence[StrengthPoint], intensities: Sequence[float]) -> dict[str, Any]:
    rises = [a.rise_to(b) for a, b in zip(points, points[1:], strict=False)]
    return {
        "intensity": list(intensities),
        **_rows(points),
        "rise": [round(rise, 6) for rise, _ in rises],
        "rise_error": [None if error is None else round(error, 6) for _, error in rises],
        "monotone": all(rise > 0 for rise, _ in rises),
    }
