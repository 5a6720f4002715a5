"""A default stands once: what a command shows is what its settings class holds, and what the stages take when nobody says anything."""

from __future__ import annotations

from typing import Any

import pytest
from typer.main import get_command

from emosteer.attribution.settings import AblateSettings, CurveSettings
from emosteer.calibration.settings import CalibrateSettings, Guard
from emosteer.circuits.heads.settings import HeadSettings
from emosteer.circuits.places import ARTIFACTS
from emosteer.circuits.settings import CircuitSettings, GainSettings
from emosteer.circuits.validation.settings import ValidateSettings
from emosteer.cli.main import app
from emosteer.directions.settings import Settings
from emosteer.evaluation.settings import Budget, EvaluationSettings
from emosteer.generation.decoding import GUIDANCE, Decoding
from emosteer.judges.registry import EMBEDDED, KEY_ENV, PANEL, PARALLEL
from emosteer.probing.settings import ProbeSettings
from emosteer.scenarios.prompt_sets import KINDS, parse_kinds
from emosteer.serving.settings import ServeSettings
from emosteer.side_effects.settings import EffectsSettings, Limits
from emosteer.writing.settings import BATCH_SIZE, CONTEST_BATCH_SIZE

DECODING = {name: vars(Decoding())[name] for name in ("max_new_tokens", "temperature", "top_p", "repetition_penalty", "best_of")}
GUIDED = {**DECODING, "guidance": GUIDANCE}
JUDGE = {"judge": PANEL, "key_env": KEY_ENV, "parallel": PARALLEL}
EXTRACT, ABLATE, CURVES, CIRCUIT, GAINS = Settings(()), AblateSettings(), CurveSettings(), CircuitSettings(), GainSettings()
CALIBRATE, GUARD = CalibrateSettings(), CalibrateSettings().guard
PROBE, VALIDATE = vars(ProbeSettings()), vars(ValidateSettings())
EFFECTS = vars(EffectsSettings())

#: Command -> option -> the field that it sets, of an instance made with defaults.
FIELDS: dict[str, dict[str, Any]] = {
    "extract": {name: vars(EXTRACT)[name] for name in ("elicitation", "instruction", "holdout", "packed", "seed")},
    "ablate": {
        "shares": ",".join(map(str, CURVES.shares)),
        "neuron_shares": ",".join(map(str, CURVES.neuron_shares)),
        "kinds": ",".join(CURVES.kinds),
        "randoms": CURVES.n_random,
        "prompts": CURVES.n_prompts,
        "strength": CURVES.strength,
        **{name: vars(ABLATE)[name] for name in ("patch_groups", "true_units", "verify_prompts", "verify_neurons", "seed")},
    },
    "circuit": {
        **{name: vars(CIRCUIT)[name] for name in ("preset", "ranking", "share", "seed")},
        **{
            "heads": CIRCUIT.head_share,
            "neurons": CIRCUIT.neuron_share,
            "gain_steps": GAINS.steps,
            "keep": GAINS.keep,
            "content": GAINS.content,
            "learn": GAINS.learn,
            **{name: vars(GAINS)[name] for name in ("budget", "units", "select")},
        },
        "learn_residual": None,  # where gains are learned
    },
    "calibrate": {
        **{name: vars(CALIBRATE)[name] for name in ("top", "points", "refine", "ratio", "good_cap", "default_intensity")},
        **{"each_ratio": GUARD.ratio, "sound": GUARD.sound, "names": GUARD.names},
        **{"max_new_tokens": Decoding().max_new_tokens, "guidance": GUIDANCE, "batch_size": BATCH_SIZE, **JUDGE},
    },
    "evaluate": {**GUIDED, **JUDGE, "budget": Budget().ratio, "seed": EvaluationSettings().seed, "batch_size": CONTEST_BATCH_SIZE},
    "generate": {**DECODING, "seed": Decoding().seed, "instruction": None},
    "chat": {**GUIDED, "seed": Decoding().seed, "instruction": None, "judge": EMBEDDED},
    "serve": {name: value for name, value in vars(ServeSettings()).items() if name != "cors"},
    "probe": {
        **{name: value for name, value in PROBE.items() if name not in ("kinds", "decays", "distances", "batch_tokens")},
        "sites": ",".join(PROBE["kinds"]),
        **{name: ",".join(f"{value:g}" for value in PROBE[name]) for name in ("decays", "distances")},
    },
    "heads": dict(vars(HeadSettings())),
    "effects": {
        **{name: EFFECTS[name] for name in ("per_prompt", "item_tokens", "reply_tokens", "followed_intensity", "guidance", "seed")},
        **{"distances": ",".join(f"{value:g}" for value in EFFECTS["distances"]), "max_harm": Limits().text},
        **{"judge": EMBEDDED, "key_env": KEY_ENV, "batch_size": BATCH_SIZE},
    },
    "validate": {
        **{name: value for name, value in VALIDATE.items() if not isinstance(value, tuple)},
        **{"judge": PANEL, "key_env": KEY_ENV, "parallel": PARALLEL},
        **{name: ",".join(VALIDATE[name]) for name in ("kinds", "held", "elicitations", "parts")},
        **{name: ",".join(f"{value:g}" for value in VALIDATE[name]) for name in ("sizes", "doses")},
    },
    "judge": {"spec": PANEL, "key_env": KEY_ENV, "parallel": PARALLEL},
}
#: Options that no settings class holds: where things are, and what a command alone decides.
ALONE = {
    *("model", "device", "dtype", "emotions", "curves", "tune"),
    *("ablate.top", "calibrate.groups", "calibrate.kinds", "evaluate.kinds", "generate.method", "generate.engine", "judge.field"),
    *("chat.system", "serve.engine"),
}


def options(command: str) -> dict[str, Any]:
    """Option -> default, of one command."""
    return {str(parameter.name): parameter.default for parameter in get_command(app).commands[command].params}  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", FIELDS)
def test_an_option_shows_what_its_settings_hold(command: str) -> None:
    shown = options(command)
    assert {name: shown[name] for name in FIELDS[command]} == FIELDS[command]
    assert shown.get("root", ARTIFACTS) == ARTIFACTS


@pytest.mark.parametrize("command", FIELDS)
def test_no_option_with_a_default_is_left_out_of_the_table(command: str) -> None:
    """So that a new one gets its settings field and its row, instead of a number of its own."""
    known = {*FIELDS[command], "root", *ALONE, *(name.partition(".")[2] for name in ALONE if name.startswith(f"{command}."))}
    numbers = {name for name, default in options(command).items() if default not in (None, False, 0)}
    assert numbers <= known, numbers - known


def test_the_contest_tries_the_doses_of_its_settings_all_kinds_are_written_to_and_the_guard_is_that_of_calibrate() -> None:
    from emosteer.cli.evaluate import DOSES

    for command in ("calibrate", "evaluate"):
        assert parse_kinds(options(command)["kinds"]) == KINDS
    assert tuple(map(float, DOSES.split(","))) == EvaluationSettings().doses and Guard() == GUARD
