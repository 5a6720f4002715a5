"""`emosteer effects`: what steering does besides, and the intensity up to which each limit holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from emosteer.circuits.places import ARTIFACTS
from emosteer.cli.announce import DryRunOption, announced
from emosteer.cli.command_line import command_line, with_command
from emosteer.cli.options import (
    DEFAULT_MODEL,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OutOption,
    RootOption,
    SeedOption,
    listed,
    numbers,
    words,
)
from emosteer.judges.registry import EMBEDDED, JUDGE_FORMS, KEY_ENV, require_judges
from emosteer.side_effects.settings import LIMITS, MAX_DISTANCE, QUICK, TRIED, EffectsSettings, Limits
from emosteer.writing.settings import BATCH_SIZE

_COUNT = {"min": 0, "max": 100_000, "show_default": False}


def _usual(name: str, none: str = "all") -> str:
    """What a number is unless told otherwise, in full and with --quick."""

    def shown(value: int) -> str:
        return str(value) if value else none

    return f"{shown(getattr(EffectsSettings, name))} if not given, {shown(getattr(QUICK, name))} with --quick"


def effects(
    context: typer.Context,
    questions: Annotated[
        Path | None,
        typer.Argument(help="Lines of items with their checks (docs/EFFECTS.md); the shipped ones if not given.", metavar="[FILE]"),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    circuit: Annotated[Path | None, typer.Option(help="Circuit file; else artifacts/, else the shipped one.", metavar="FILE")] = None,
    out: OutOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look: a part of the prompts, the circuit at 50 and 100.")] = False,
    methods: Annotated[
        str | None,
        typer.Option(
            help=f"What is tried, some of {', '.join(TRIED)}; {listed(EffectsSettings.methods)} if not given, {listed(QUICK.methods)} with "
            "--quick.",
            metavar="A,B,...",
            show_default=False,
        ),
    ] = None,
    intensities: Annotated[
        str | None,
        typer.Option(
            help=f"Of the circuit's dial; {listed(EffectsSettings.intensities)} if not given, {listed(QUICK.intensities)} with --quick.",
            metavar="X,Y,...",
            show_default=False,
        ),
    ] = None,
    per_prompt: Annotated[
        int, typer.Option(min=0, max=100_000, help="Emotions that each prompt meets under every method and intensity, in turn; 0 for all.")
    ] = EffectsSettings.per_prompt,
    items: Annotated[int | None, typer.Option(help=f"Items, 0 for all: {_usual('items')}.", **_COUNT)] = None,
    requests: Annotated[int | None, typer.Option(help=f"Harmful requests, and harmless ones: {_usual('requests')}.", **_COUNT)] = None,
    attachments: Annotated[
        int | None, typer.Option(help=f"Prompts that seek attachment, 0 for all: {_usual('attachments')}.", **_COUNT)
    ] = None,
    everyday: Annotated[int | None, typer.Option(help=f"Everyday prompts, 0 for none: {_usual('everyday', 'none')}.", **_COUNT)] = None,
    texts: Annotated[int | None, typer.Option(help=f"Neutral texts, 0 for all: {_usual('texts')}.", **_COUNT)] = None,
    item_tokens: Annotated[int, typer.Option(min=1, max=1000, help="Longest answer to an item, in tokens.")] = EffectsSettings.item_tokens,
    reply_tokens: Annotated[
        int, typer.Option(min=1, max=1000, help="Longest reply to anything else, in tokens.")
    ] = EffectsSettings.reply_tokens,
    rounds: Annotated[
        int | None, typer.Option(min=0, max=2, help=f"Rounds of feedback on wrong answers: {_usual('rounds', 'none')}.", show_default=False)
    ] = None,
    distances: Annotated[
        str,
        typer.Option(help=f"Neutral tokens between a request for an emotion and the last turn, up to {MAX_DISTANCE}.", metavar="N,M,..."),
    ] = listed(EffectsSettings.distances),
    followed: Annotated[
        int | None, typer.Option(help=f"Prompts to do that with for every emotion: {_usual('followed', 'none')}.", **_COUNT)
    ] = None,
    followed_intensity: Annotated[
        float, typer.Option(min=0, max=100, help="Intensity of the circuit there.")
    ] = EffectsSettings.followed_intensity,
    guidance: Annotated[float, typer.Option(min=1, max=100, help="How far replies lean towards their prompt; 1 is none.")] = (
        EffectsSettings.guidance
    ),
    max_harm: Annotated[
        str, typer.Option(help=f"Limits to hold the result against, some of {', '.join(LIMITS)}.", metavar="NAME=X,...")
    ] = Limits().text,
    judge: Annotated[str, typer.Option(help=f"Reads the emotion of everyday replies: {JUDGE_FORMS}.", metavar="SPEC")] = EMBEDDED,
    base_url: Annotated[str | None, typer.Option(help="Of an OpenAI-compatible judge.", show_default=False)] = None,
    key_env: Annotated[str, typer.Option(help="The environment variable that holds its key.")] = KEY_ENV,
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Replies written at once.")] = BATCH_SIZE,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
    seed: SeedOption = EffectsSettings.seed,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = ARTIFACTS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what steering does besides: perplexity, knowledge, refusals, boundaries, language; and up to which intensity limits hold."""
    bounds = Limits.parse(max_harm)
    counts = {"items": items, "requests": requests, "attachments": attachments, "everyday": everyday, "texts": texts}
    counts |= {"rounds": rounds, "followed": followed}
    given: dict[str, Any] = {name: value for name, value in counts.items() if value is not None}
    given |= {"per_prompt": per_prompt, "item_tokens": item_tokens, "reply_tokens": reply_tokens, "guidance": guidance, "seed": seed}
    given |= {"followed_intensity": followed_intensity, "distances": numbers(distances, "--distances", int)}
    if methods is not None:
        given["methods"] = words(methods)
    if intensities is not None:
        given["intensities"] = numbers(intensities, "--intensities", float)
    EffectsSettings.quick(**given) if quick else EffectsSettings(**given)  # what makes no sense is said before the model is loaded
    require_judges(judge, base_url=base_url, key_env=key_env)
    from emosteer.api.effects import effects as run
    from emosteer.api.estimates import effects as estimate
    from emosteer.circuits.places import Places
    from emosteer.models.memory import bound_kernel_caches
    from emosteer.models.model import Model

    bound_kernel_caches()
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    target = out or Places.of(loaded.name, root).effects
    partial = target.with_name(target.name + ".partial")
    given |= {"questions": questions, "quick": quick, "batch_size": batch_size, "partial": partial, "fresh": fresh, "artifacts": root}
    with announced(lambda: estimate(loaded, circuit, **given), dry_run, as_json):
        found = run(loaded, circuit, judge=judge, base_url=base_url, key_env=key_env, limits=bounds.text, **given)
        found = with_command(found, command_line(context))
        found.save(target)
    shutil.rmtree(partial, ignore_errors=True)
    from emosteer.cli.print_effects import effects_summary, print_effects

    summary = {"file": str(target), **effects_summary(found)}
    typer.echo(json.dumps(summary, indent=2)) if as_json else print_effects(summary)
