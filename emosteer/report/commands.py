"""The commands that make artefacts: for what is missing, and as far as an artefact's own record tells how it was made. No torch here."""

from __future__ import annotations

import shlex
from typing import Any

from emosteer.circuits.places import OWN_BANK
from emosteer.scenarios.prompts import INSTRUCTION
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
}


def maker(kind: str, reference: str) -> str:
    """The command that makes an artefact with default settings."""
    return f"emosteer {_STAGES[kind]} --model {shlex.quote(reference)}" + " --check" * (kind == "check")


def first_steps(reference: str) -> str:
    """What to run where nothing is there yet."""
    return ", then ".join(f"`{maker(kind, reference)}`" for kind in ("directions", "scores", "circuit", "evaluation"))


def made_by(kind: str, item: Any, reference: str) -> str:
    """The command behind an artefact, rebuilt from its record: every option that is known to differ from the default."""
    provenance = item.provenance
    params = dict(provenance.params)
    curves = params.get("curves") or {}
    options: list[tuple[str, Any, Any]] = [("--seed", provenance.seed, 0)]
    if kind == "directions":
        options += [
            ("--elicitation", item.elicitation, "reply"),
            ("--emotions", ",".join(item.emotions), ",".join(EMOTIONS)),
            ("--instruction", item.instruction, INSTRUCTION),
            ("--holdout", params.get("holdout", 0.1), 0.1),
            ("--replies", "self" if f"replies/{OWN_BANK}" in provenance.data else None, None),
        ]
    elif kind == "scores":
        options += [
            ("--shares", _listed(curves.get("shares")), "0.02,0.05,0.1,0.25"),
            ("--neuron-shares", _listed(curves.get("neuron_shares")), "0.01"),
            ("--kinds", ",".join(curves.get("kinds", ())), "zero,mean,resample,enhance"),
            ("--randoms", curves.get("n_random"), 3),
            ("--prompts", curves.get("n_prompts"), 4),
            ("--strength", curves.get("strength"), 2.0),
        ] * bool(curves)
        usual_counts = {"patch_groups": 6, "true_units": 32, "verify_prompts": 1, "verify_neurons": 100}
        options += [(f"--{name.replace('_', '-')}", params.get(name, usual), usual) for name, usual in usual_counts.items()]
    elif kind == "circuit":
        options += [
            ("--preset", params.get("preset", "auto"), "auto"),
            ("--ranking", params.get("ranking", "contrast"), "contrast"),
            ("--heads", params.get("head_share"), None),
            ("--neurons", params.get("neuron_share"), None),
            ("--share", params.get("share", 0.95), 0.95),
        ]
    written = [f"{name} {shlex.quote(str(value))}" for name, value, usual in options if value != usual and value is not None]
    bare = " --no-curves" if kind == "scores" and not curves else ""
    then = f" && {maker('calibration', reference)}" if kind == "circuit" and item.metrics.get("calibration") else ""
    return " ".join([maker(kind, reference), *written]) + bare + then


def _listed(values: Any) -> str:
    return ",".join(f"{value:g}" for value in values or ())
