"""`emosteer ablate`: score every head and neuron, and check the scores by intervening."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from emosteer.attribution.settings import ABLATIONS, ENHANCE, AblateSettings, CurveSettings
from emosteer.base.errors import UsageError
from emosteer.circuits.dial import MAX_STRENGTH
from emosteer.circuits.places import ARTIFACTS
from emosteer.cli.announce import DryRunOption, announced
from emosteer.cli.command_line import command_line, with_command
from emosteer.cli.options import (
    DEFAULT_MODEL,
    DeviceMapOption,
    DeviceOption,
    DirectionsOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OutOption,
    RootOption,
    ScenariosOption,
    SeedOption,
    listed,
    numbers,
    words,
)

#: Points of a curve.
MAX_SHARES = 100


def ablate(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    directions: DirectionsOption = None,
    scenarios: ScenariosOption = None,
    replies: Annotated[Path | None, typer.Option(help="The bank that the directions were made with.", metavar="FILE")] = None,
    out: OutOption = None,
    curves: Annotated[bool, typer.Option(help="Measure ablation and enhancement curves.")] = True,
    shares: Annotated[str, typer.Option(help="Shares of heads on the curves, at most 100.")] = listed(CurveSettings.shares),
    kinds: Annotated[str, typer.Option(help="zero, mean, resample, enhance.")] = listed(CurveSettings.kinds),
    randoms: Annotated[int, typer.Option(min=0, max=1000, help="Random sets of equal size per point.")] = CurveSettings.n_random,
    prompts: Annotated[int, typer.Option(min=1, max=10_000, help="Prompts per point and emotion.")] = CurveSettings.n_prompts,
    strength: Annotated[
        float, typer.Option(min=-MAX_STRENGTH, max=MAX_STRENGTH, help="Multiplier of the enhancement curves.")
    ] = CurveSettings.strength,
    neuron_shares: Annotated[str, typer.Option(help="Shares of neurons on the curves; '' for none.")] = listed(CurveSettings.neuron_shares),
    patch_groups: Annotated[int, typer.Option(min=0, max=100_000, help="Groups for attribution patching.")] = AblateSettings.patch_groups,
    true_units: Annotated[
        int, typer.Option(min=0, max=10_000, help="Units patched for real, half of them random.")
    ] = AblateSettings.true_units,
    verify_prompts: Annotated[
        int, typer.Option(min=0, max=1000, help="Prompts for the check of contributions against real ablation.")
    ] = AblateSettings.verify_prompts,
    verify_neurons: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Random neurons in that check (every head is in it).")
    ] = AblateSettings.verify_neurons,
    top: Annotated[int, typer.Option(min=1, max=10_000, help="Units to print per emotion.")] = 5,
    seed: SeedOption = AblateSettings.seed,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = ARTIFACTS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score every head and neuron, check the scores by intervening, and draw ablation and enhancement curves."""
    chosen = words(kinds)
    for name in chosen:
        if name not in (*ABLATIONS, ENHANCE):
            raise UsageError(f"unknown kind '{name}'; expected {', '.join((*ABLATIONS, ENHANCE))}")
    settings = CurveSettings(
        _shares(shares, "--shares"), _shares(neuron_shares, "--neuron-shares"), chosen, randoms, prompts, strength, seed=seed
    )
    from emosteer.api.stages import ablate as run
    from emosteer.attribution.ablate import pieces_of
    from emosteer.base.pieces import clear
    from emosteer.base.processes import join, parts
    from emosteer.circuits.places import Places
    from emosteer.models.model import Model

    crew = join()
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    target = out or Places.of(loaded.name, root).scores
    wanted = AblateSettings(
        patch_groups,
        true_units=true_units,
        verify_prompts=verify_prompts,
        verify_neurons=verify_neurons,
        seed=seed,
        curves=settings if curves else None,
    )
    partial = target.with_name(target.name + ".partial.jsonl")
    from emosteer.api.estimates import ablate as estimate

    inputs: Any = {"scenarios": scenarios, "replies": replies, "partial": partial, "artifacts": root}
    with announced(lambda: estimate(loaded, directions, settings=wanted, **inputs), dry_run, as_json):
        scores = run(loaded, directions, crew=crew, **inputs, **vars(wanted))
        scores = with_command(scores, command_line(context))
        scores.save(target)
    for file in (partial, *parts(partial).values()):
        file.unlink(missing_ok=True)
    clear(pieces_of(partial))
    from emosteer.cli.print_artifacts import print_scores, scores_summary

    summary = {"file": str(target), **scores_summary(scores, top)}
    typer.echo(json.dumps(summary, indent=2)) if as_json else print_scores(summary)


def _shares(text: str, name: str) -> tuple[float, ...]:
    found = numbers(text, name, float)
    if len(found) > MAX_SHARES:
        raise UsageError(f"expected at most {MAX_SHARES} numbers in {name}, found {len(found)}")
    if any(not 0 < share <= 1 for share in found):
        raise UsageError(f"expected {name} to lie above 0 and up to 1, found '{text}'")
    return found
