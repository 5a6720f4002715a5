"""The commands that make artefacts: for what is missing, and for what is there, as it keeps them or its record tells. No torch here."""

from __future__ import annotations

import shlex
from typing import Any

from emosteer.attribution.settings import AblateSettings, CurveSettings
from emosteer.circuits.places import OWN_BANK
from emosteer.circuits.settings import CircuitSettings, GainSettings, learned_of
from emosteer.directions.settings import Settings
from emosteer.scenarios.scenarios import EMOTIONS

_STAGES = {
    "directions": "extract",
    "scores": "ablate",
    "curves": "ablate",
    "circuit": "circuit",
    "calibration": "calibrate",
    "check": "calibrate",
    "evaluation": "evaluate",
    "replies": "evaluate",
    "probes": "probe",
    "heads": "heads",
    "effects": "effects",
    "validation": "validate",
}


def maker(kind: str, reference: str) -> str:
    """The command that makes an artefact with default settings."""
    return f"emosteer {_STAGES[kind]} --model {shlex.quote(reference)}" + " --check" * (kind == "check")


def first_steps(reference: str) -> str:
    """What to run where nothing is there yet."""
    return ", then ".join(f"`{maker(kind, reference)}`" for kind in ("directions", "scores", "circuit", "evaluation"))


def made_by(kind: str, item: Any, reference: str) -> str:
    """The command that makes an artefact again: the one that it keeps, else rebuilt from its record."""
    kept = item.provenance.command
    if kept is None:
        then = f" && {maker('calibration', reference)}" if kind == "circuit" and item.metrics.get("calibration") else ""
        return rebuilt(kind, item, reference) + then
    # a circuit of a version that kept no command, calibrated since
    return f"{rebuilt(kind, item, reference)} && {kept}" if kind == "circuit" and kept.startswith("emosteer calibrate") else kept


def rebuilt(kind: str, item: Any, reference: str) -> str:
    """A command from an artefact's record: every option that is known to differ from the default."""
    provenance = item.provenance
    params = dict(provenance.params)
    curves = params.get("curves") or {}
    options: list[tuple[str, Any, Any]] = [("--seed", provenance.seed, Settings.seed)]
    if kind == "directions":
        options += [
            ("--elicitation", item.elicitation, Settings.elicitation),
            ("--emotions", ",".join(item.emotions), ",".join(EMOTIONS)),
            ("--instruction", item.instruction, Settings.instruction),
            ("--holdout", params.get("holdout", Settings.holdout), Settings.holdout),
            ("--replies", "self" if f"replies/{OWN_BANK}" in provenance.data else None, None),
        ]
    elif kind == "scores":
        options += [
            ("--shares", _listed(curves.get("shares")), _listed(CurveSettings.shares)),
            ("--neuron-shares", _listed(curves.get("neuron_shares")), _listed(CurveSettings.neuron_shares)),
            ("--kinds", ",".join(curves.get("kinds", ())), ",".join(CurveSettings.kinds)),
            ("--randoms", curves.get("n_random"), CurveSettings.n_random),
            ("--prompts", curves.get("n_prompts"), CurveSettings.n_prompts),
            ("--strength", curves.get("strength"), CurveSettings.strength),
        ] * bool(curves)
        counts = ("patch_groups", "true_units", "verify_prompts", "verify_neurons")
        usual_counts = {name: getattr(AblateSettings, name) for name in counts}
        options += [(f"--{name.replace('_', '-')}", params.get(name, usual), usual) for name, usual in usual_counts.items()]
    elif kind == "circuit":
        gains = item.metrics.get("gains") or {}
        chosen = [params.get(name, getattr(CircuitSettings, name)) for name in ("preset", "head_share", "neuron_share")]
        learns = (params.get("extract") or {}).get("elicitation") == "reply" and chosen == [CircuitSettings.preset, None, None]
        within = {name: getattr(GainSettings, name) for name in ("budget", "units", "select")}
        unlearned = 0 if learns else GainSettings.steps  # where the command would learn gains, their absence was asked for
        options += [
            ("--preset", params.get("preset", CircuitSettings.preset), CircuitSettings.preset),
            ("--ranking", params.get("ranking", CircuitSettings.ranking), CircuitSettings.ranking),
            ("--heads", params.get("head_share"), None),
            ("--neurons", params.get("neuron_share"), None),
            ("--share", params.get("share", CircuitSettings.share), CircuitSettings.share),
            ("--learn", learned_of(item.metrics), GainSettings.learn),
            ("--gain-steps", gains.get("steps", unlearned), GainSettings.steps),
            ("--keep", gains.get("keep", GainSettings.keep), GainSettings.keep),
            *((f"--{name}", gains.get(name, default), default) for name, default in within.items()),
        ]
    written = [f"{name} {shlex.quote(str(value))}" for name, value, usual in options if value != usual and value is not None]
    bare = " --no-curves" if kind == "scores" and not curves else ""
    if kind == "circuit" and item.metrics.get("gains") and item.learned_residual is None:
        bare = " --no-learn-residual"
    return " ".join([maker(kind, reference), *written]) + bare


def _listed(values: Any) -> str:
    return ",".join(f"{value:g}" for value in values or ())
