"""`emosteer circuit`: assemble the circuits and measure how faithful they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emosteer.base.errors import UsageError
from emosteer.circuits.places import ARTIFACTS
from emosteer.circuits.settings import CircuitSettings, GainSettings
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
    RepliesOption,
    RootOption,
    ScenariosOption,
    SeedOption,
    finite,
)

if TYPE_CHECKING:
    from emosteer.circuits.circuit import Circuit


def circuit(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    directions: DirectionsOption = None,
    scenarios: ScenariosOption = None,
    preset: Annotated[
        str, typer.Option(help="auto (smallest head circuit that keeps --share of the effect) or paper.")
    ] = CircuitSettings.preset,
    ranking: Annotated[str, typer.Option(help="contrast, raw or effect.")] = CircuitSettings.ranking,
    heads: Annotated[float | None, typer.Option(help="Share of heads; the preset decides if not given.", show_default=False)] = None,
    neurons: Annotated[float | None, typer.Option(help="Share of neurons; the preset decides if not given.", show_default=False)] = None,
    share: Annotated[float, typer.Option(help="Share of the effect of all heads that 'auto' keeps.")] = CircuitSettings.share,
    replies: RepliesOption = None,
    gain_steps: Annotated[
        int, typer.Option(min=0, help="Steps of learning how much each head adds, on the reply bank; 0 ranks heads instead.")
    ] = GainSettings.steps,
    keep: Annotated[float, typer.Option(help="Share of heads that learning keeps.")] = GainSettings.keep,
    strength: Annotated[
        str | None, typer.Option(help="Default strength: a number, or anger=6,fear=5,...; tuned if not given.", show_default=False)
    ] = None,
    tune: Annotated[bool, typer.Option(help="Tune the default strength on training prompts.")] = True,
    out: OutOption = None,
    seed: SeedOption = CircuitSettings.seed,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Assemble the circuits and measure how faithful they are."""
    from emosteer.circuits.assemble import assemble

    settings = CircuitSettings(preset, ranking, finite(heads, "--heads"), finite(neurons, "--neurons"), share, seed=seed)
    wanted = _strengths(strength)
    from emosteer.base.files import sha256_file
    from emosteer.calibration.default_strength import tune_strength
    from emosteer.calibration.settings import TuneSettings
    from emosteer.circuits.places import Places, own_bank_of, require_directions
    from emosteer.cli.print_artifacts import circuit_summary, print_circuit
    from emosteer.models.model import Model
    from emosteer.scenarios.shipped import read_data, without_development

    gains = GainSettings(gain_steps, keep=finite(keep, "--keep") or 0.0, seed=seed)
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    places = Places.of(loaded.name, root)
    found, path = require_directions(loaded, directions, places)
    bank = Path(replies) if replies is not None else own_bank_of(found, path)
    # a ranking, a budget or a preset that is asked for is meant: gains are learned for the default circuit of `reply` directions
    learns = found.elicitation == "reply" and preset == "auto" and heads is None and neurons is None and gain_steps > 0
    data = read_data(scenarios, bank, "reply" if learns else "self")
    made = assemble(
        loaded,
        found,
        without_development(data.groups, scenarios) if learns else data.groups,
        settings,
        data={**found.provenance.data, **data.hashes},
        parents={"directions": sha256_file(path)},
        bank=data.bank,
        gain_settings=gains if learns else None,
    )
    named = set(wanted or {})
    if tune and "" not in named and not named >= set(made.emotions):
        made = tune_strength(loaded, made, data.groups, TuneSettings(seed=seed))
    if wanted is not None:
        made = made.with_strength(_per_emotion(wanted, made))
    target = out or places.circuit
    made = with_command(made, command_line(context))
    made.save(target)
    summary = {"file": str(target), **circuit_summary(made)}
    typer.echo(json.dumps(summary, indent=2)) if as_json else print_circuit(summary)


def _strengths(text: str | None) -> dict[str, float] | None:
    """Reads "3" (under the empty name: every emotion) or "anger=6,fear=5".

    Raises:
        UsageError: if it is neither.
    """
    if text is None:
        return None
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError as error:
            raise UsageError(f"expected --strength to be a number or anger=6,fear=5,..., found '{text}'") from error
        finite(value, "--strength")
        found[name.strip()] = value
    return found


def _per_emotion(wanted: dict[str, float], made: Circuit) -> list[float]:
    """Default strengths in the circuit's order: as wanted, else as they were.

    Raises:
        UsageError: if a name is not an emotion of the circuit.
    """
    for name in wanted:
        if name:
            made.index(name)
    return [wanted.get(emotion, wanted.get("", made.strength[i].item())) for i, emotion in enumerate(made.emotions)]
