"""`emosteer circuit`: assemble the circuits and measure how faithful they are."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from emosteer.base.errors import UsageError
from emosteer.circuits.dial import MAX_STRENGTH
from emosteer.circuits.places import ARTIFACTS
from emosteer.circuits.settings import MAX_STEPS, CircuitSettings, GainSettings
from emosteer.cli.announce import DryRunOption, announced
from emosteer.cli.command_line import command_line, with_command
from emosteer.cli.options import (
    DEFAULT_MODEL,
    DeviceMapOption,
    DeviceOption,
    DirectionsOption,
    DtypeOption,
    ExamplesOption,
    JsonOption,
    ModelOption,
    OutOption,
    RepliesOption,
    RootOption,
    ScenariosOption,
    SeedOption,
)
from emosteer.scenarios.emotions import emotion_key
from emosteer.scenarios.examples import NO_EXAMPLES, read_examples


def circuit(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    directions: DirectionsOption = None,
    scenarios: ScenariosOption = None,
    preset: Annotated[
        str,
        typer.Option(help="paper, or auto: learned heads, and with --gain-steps 0 the fewest ranked ones that keep --share of the effect."),
    ] = CircuitSettings.preset,
    ranking: Annotated[str, typer.Option(help="Of heads that are not learned: contrast, raw or effect.")] = CircuitSettings.ranking,
    heads: Annotated[float | None, typer.Option(help="Share of heads; the preset decides if not given.", show_default=False)] = None,
    neurons: Annotated[float | None, typer.Option(help="Share of neurons; the preset decides if not given.", show_default=False)] = None,
    share: Annotated[
        float, typer.Option(help="With --gain-steps 0: share of the effect of all heads that 'auto' keeps.")
    ] = CircuitSettings.share,
    replies: RepliesOption = None,
    learn: Annotated[
        str, typer.Option(help="What is learned of each head on the reply bank: its outputs, or gains that scale its contrast.")
    ] = GainSettings.learn,
    gain_steps: Annotated[
        int, typer.Option(min=0, max=MAX_STEPS, help="Steps of learning what each head adds, on the reply bank; 0 ranks heads instead.")
    ] = GainSettings.steps,
    keep: Annotated[float, typer.Option(help="Share of heads that learning keeps.")] = GainSettings.keep,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Share of the heads, and of the neurons, that the circuit may have, such as 0.05; --keep of the heads if not given.",
            show_default=False,
        ),
    ] = GainSettings.budget,
    units: Annotated[str, typer.Option(help="What a circuit with a budget is made of: both, heads or neurons.")] = GainSettings.units,
    select: Annotated[
        str,
        typer.Option(help="By what a circuit with a budget chooses: gradual (pruned while learning), gates, contrast, patch, integrated."),
    ] = GainSettings.select,
    content: Annotated[
        float, typer.Option(max=1000, help="Weight of keeping to the prompt while learning; half as long again where it is not 0.")
    ] = GainSettings.content,
    learn_residual: Annotated[
        bool | None,
        typer.Option(
            "--learn-residual/--no-learn-residual",
            help="Learn residual vectors in the same way, for the contest; doubles the time of learning. On where gains are learned.",
            show_default=False,
        ),
    ] = None,
    examples: ExamplesOption = None,
    strength: Annotated[
        str | None,
        typer.Option(
            help="Default strength: a number, or anger=6,fear=5,...; if not given, 0.7 for learned outputs, else tuned.", show_default=False
        ),
    ] = None,
    tune: Annotated[bool, typer.Option(help="Tune the default strength on training prompts.")] = True,
    out: OutOption = None,
    seed: SeedOption = CircuitSettings.seed,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = ARTIFACTS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Assemble the circuits and measure how faithful they are."""
    settings = CircuitSettings(preset, ranking, heads, neurons, share, seed=seed)
    wanted = _strengths(strength)
    from emosteer.api.stages import assemble
    from emosteer.circuits.places import Places
    from emosteer.cli.print_artifacts import circuit_summary, print_circuit
    from emosteer.models.model import Model

    within = {"budget": budget, "units": units, "select": select}
    # what is wrong with them is said before loading
    gains = GainSettings(gain_steps, keep=keep, content=content, seed=seed, learn=learn, **within)  # type: ignore[arg-type]
    if examples is not None and examples != NO_EXAMPLES:
        read_examples(examples)
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    given: Any = {
        **{"scenarios": scenarios, "replies": replies, "artifacts": root, "tune": tune, "strength": wanted},
        **{"learn": gains.learn, "gain_steps": gains.steps, "keep": gains.keep, "content": gains.content},
        **{"budget": gains.budget, "units": gains.units, "select": gains.select},
        **{"learn_residual": learn_residual, **vars(settings)},
    }
    target = out or Places.of(loaded.name, root).circuit
    from emosteer.api.estimates import assemble as estimate

    with announced(lambda: estimate(loaded, directions, **given), dry_run, as_json):
        made = assemble(loaded, directions, examples=examples, **given)
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
        if not abs(value) <= MAX_STRENGTH:
            raise UsageError(f"expected --strength between -{MAX_STRENGTH:g} and {MAX_STRENGTH:g}, found {number.strip()}")
        if (key := emotion_key(name)) in found:
            raise UsageError(f"--strength gives {key or 'all emotions'} two strengths: '{text}'")
        found[key] = value
    return found
