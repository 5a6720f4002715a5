"""`emosteer calibrate`: the intensity dial of a circuit, and the check of it on other prompts."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from emosteer.base.errors import ArtifactError, UsageError
from emosteer.calibration.settings import GROUPS, MAX_HALVINGS, MAX_POINTS, CalibrateSettings, Guard
from emosteer.circuits.dial import check_intensity
from emosteer.circuits.places import ARTIFACTS
from emosteer.cli.announce import DryRunOption, announced
from emosteer.cli.command_line import command_line, followed_by, typed, with_command
from emosteer.cli.options import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    ExamplesOption,
    GuidanceOption,
    JsonOption,
    KindsOption,
    ModelOption,
    PanelOption,
    PenalisePromptOption,
    RootOption,
)
from emosteer.generation.decoding import GUIDANCE, MAX_TOKENS, Decoding
from emosteer.judges.registry import KEY_ENV, PANEL, PARALLEL
from emosteer.scenarios.prompt_sets import parse_kinds
from emosteer.scenarios.shipped import PromptSet, development_groups, unseen_groups
from emosteer.writing.settings import BATCH_SIZE

if TYPE_CHECKING:
    from emosteer.calibration.trials import Trials


#: Options that shape the dial, which `--check` takes as it is.
FITTING = ("top", "points", "refine", "ratio", "each_ratio", "sound", "names", "good_cap", "default_intensity", "most_good")


def calibrate(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    circuit: Annotated[Path | None, typer.Option(help="Circuit file; else artifacts/, else the shipped one.", metavar="FILE")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where the calibrated circuit goes; --circuit, else artifacts/MODEL/.", metavar="FILE"),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Write at 0, 25, 50, 75 and 100 to other prompts, and measure.")] = False,
    scenarios: Annotated[
        Path | None,
        typer.Option(
            help="Prompt file; the shipped development prompts, or for --check the test sets.", metavar="FILE", show_default=False
        ),
    ] = None,
    groups: Annotated[int, typer.Option(min=1, max=1_000_000, help="Prompts to write to, evenly of all kinds.")] = GROUPS,
    skip: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="With --check: leave out as many test prompts of each kind, those read before.")
    ] = 0,
    kinds: KindsOption = "all",
    judge: PanelOption = PANEL,
    base_url: Annotated[
        str | None, typer.Option(help="Of an OpenAI-compatible endpoint, e.g. http://127.0.0.1:8000/v1.", show_default=False)
    ] = None,
    key_env: Annotated[str, typer.Option(help="The environment variable that holds its key.")] = KEY_ENV,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Requests to it at a time.")] = PARALLEL,
    top: Annotated[float, typer.Option(max=100, help="Strongest tried, in default strengths of the circuit.")] = CalibrateSettings.top,
    points: Annotated[int, typer.Option(min=2, max=MAX_POINTS, help="Strengths tried up to there, 0 included.")] = CalibrateSettings.points,
    refine: Annotated[
        int, typer.Option(min=0, max=MAX_HALVINGS, help="Halvings to find the cap between two of them.")
    ] = CalibrateSettings.refine,
    ratio: Annotated[
        float, typer.Option(max=1000, help="Highest perplexity ratio at 100 against unsteered replies, all emotions together.")
    ] = CalibrateSettings.ratio,
    each_ratio: Annotated[float, typer.Option(max=1000, help="Cap: highest perplexity ratio of one emotion.")] = Guard.ratio,
    sound: Annotated[float, typer.Option(help="Cap: lowest share of sound replies.")] = Guard.sound,
    names: Annotated[float, typer.Option(help="Cap: highest share of replies that name the emotion.")] = Guard.names,
    good_cap: Annotated[
        bool, typer.Option("--good-cap/--no-good-cap", help="Leave out strengths beyond which good replies, by the judges, get fewer.")
    ] = CalibrateSettings.good_cap,
    default_intensity: Annotated[float, typer.Option(help="What the default strengths are set to.")] = cast(
        float, CalibrateSettings.default_intensity
    ),
    most_good: Annotated[bool, typer.Option("--most-good", help="Set them to where most replies are good instead.")] = False,
    max_new_tokens: Annotated[int, typer.Option(max=MAX_TOKENS, help="Longest reply, in tokens.")] = Decoding.max_new_tokens,
    guidance: GuidanceOption = GUIDANCE,
    instruction: Annotated[
        str | None,
        typer.Option(help="Appended to every prompt, and kept with the circuit; its own if not given.", show_default=False),
    ] = None,
    penalise_prompt: PenalisePromptOption = False,
    examples: ExamplesOption = None,
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Replies written at once.")] = BATCH_SIZE,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    root: RootOption = ARTIFACTS,
    dry_run: DryRunOption = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Write every reply again instead of going on.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fit the strength that gives `generate --intensity` 0 to 100, capped where the text would break; kept with the circuit."""
    check_intensity(default_intensity, "--default-intensity")
    if skip and not check:
        raise UsageError("--skip has a meaning with --check only; calibration itself writes to the development split")
    fitting = typed(context, FITTING)
    if most_good and "--default-intensity" in fitting:
        raise UsageError("expected --most-good or --default-intensity, found both")
    if check:
        _check_alone(fitting, {"instruction": instruction, "examples": examples}, out)
    wanted = parse_kinds(kinds)
    prompts = unseen_groups(groups, skip, scenarios, wanted) if check else development_groups(groups, scenarios, wanted)
    settings = CalibrateSettings(
        top, points, refine, None if most_good else default_intensity, Guard(each_ratio, sound, names), ratio, good_cap
    )
    decoding = Decoding.usual(max_new_tokens=max_new_tokens, guidance=guidance, penalise_prompt=penalise_prompt)
    from emosteer.judges.jury import make_jury

    jury = make_jury(judge, base_url=base_url, key_env=key_env, parallel=parallel, device=device)
    from emosteer.api.inputs import dialled_with
    from emosteer.base.jsonl import KeyedLog
    from emosteer.calibration.trials import Trials
    from emosteer.circuits.places import require_circuit
    from emosteer.judges.huggingface import refuse_same_weights
    from emosteer.models.model import Model

    loaded = Model.load(model, device=device, dtype=dtype)
    found, path = require_circuit(loaded, circuit, root)
    if check and not found.calibrated:
        raise ArtifactError(f"the circuit {path} is not calibrated; run `emosteer calibrate` without --check first")
    found = dialled_with(found, instruction, examples)
    target = out or _target(loaded.name, root, circuit, check)
    log = target.with_suffix(".replies.jsonl" if check else ".calibration.jsonl")
    if fresh and not dry_run:
        log.unlink(missing_ok=True)
    stack = contextlib.ExitStack()
    # a dry run with --fresh leaves the file as it is, and counts nothing in it as kept
    kept = KeyedLog(Path(stack.enter_context(tempfile.TemporaryDirectory())) / log.name if fresh and dry_run else log)
    readers = jury(kept)
    refuse_same_weights(readers.judges, loaded.sha256)
    from emosteer.api.costs.stages import of_calibrate

    try:
        with announced(
            lambda: of_calibrate(loaded, found, readers, prompts.groups, settings, decoding, batch_size, check), dry_run, as_json
        ):
            trials = Trials(loaded, found, readers, prompts.groups, kept, decoding, batch_size)
            if check:
                _check(trials, path, prompts, target, command_line(context), as_json)
            else:
                _fit(trials, settings, path, prompts, target, command_line(context), as_json)
    finally:
        kept.close()
        stack.close()


def _check_alone(fitting: Sequence[str], kept: Mapping[str, str | None], out: Path | None) -> None:
    """What --check refuses beside it.

    Args:
        fitting: the options of fitting that were typed; kept: those that a dial is fitted with, as given.
    """
    if fitting:
        raise UsageError(f"{', '.join(fitting)} would shape a dial, and --check only tries the one that is there; leave out either")
    for name, given in kept.items():
        if given is not None:
            raise UsageError(f"--check writes with the {name} that the dial was fitted with; expected no --{name} beside it")
    if out is not None and out.suffix == ".safetensors":
        raise UsageError(f"--check writes its figures as JSON, not a circuit; expected --out FILE.json, found {out}")


def _target(name: str, root: Path, circuit: Path | None, check: bool) -> Path:
    """Where the result goes: a circuit file that was named is calibrated in place, so that it overwrites no other."""
    from emosteer.circuits.places import Places

    places = Places.of(name, root)
    return places.folder / "calibration-check.json" if check else circuit or places.circuit


def _fit(trials: Trials, settings: CalibrateSettings, path: Path, prompts: PromptSet, target: Path, command: str, as_json: bool) -> None:
    from emosteer.base.files import sha256_file
    from emosteer.calibration.calibrate import calibrate as run
    from emosteer.cli.print_artifacts import print_calibration

    made = run(trials, settings, prompts.hashes, {"circuit": sha256_file(path)})
    made = with_command(made, followed_by(made.provenance.command, command))
    made.save(target)
    table = made.metrics["calibration"]
    if as_json:
        strength = {emotion: round(s, 6) for emotion, s in zip(made.emotions, made.strength.tolist(), strict=True)}
        typer.echo(json.dumps({"file": str(target), "strength": strength, "calibration": table}, indent=2))
        return
    print(f"{trials.model.name}: calibrated circuit -> {target}")
    print_calibration(table)


def _check(trials: Trials, path: Path, prompts: PromptSet, target: Path, command: str, as_json: bool) -> None:
    from emosteer.base.files import sha256_file, write_text
    from emosteer.calibration.calibrate import check
    from emosteer.cli.print_artifacts import print_calibration_check

    result = {
        "schema": 1,
        "kind": "calibration-check",
        "file": str(target),
        "model": trials.model.name,
        "circuit": str(path),
        "circuit_sha256": sha256_file(path),
        "command": command,
        "judge": {"name": trials.jury.name, "key": trials.jury.key},
        "test": prompts.described(),
        **check(trials),
    }
    text = json.dumps(result, indent=2, ensure_ascii=False)
    write_text(target, text + "\n")
    typer.echo(text) if as_json else print_calibration_check(result)
