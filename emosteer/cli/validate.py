"""`emosteer validate`: try to refute that a circuit was discovered."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from emosteer.base.errors import UsageError
from emosteer.circuits.places import ARTIFACTS
from emosteer.circuits.validation.settings import ASKING, KINDS, PARTS, QUICK, ValidateSettings
from emosteer.cli.announce import DryRunOption, announced
from emosteer.cli.command_line import command_line, typed, with_command
from emosteer.cli.options import (
    DEFAULT_MODEL,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OutOption,
    PanelOption,
    RootOption,
    ScenariosOption,
    SeedOption,
    listed,
    numbers,
    words,
)
from emosteer.judges.registry import KEY_ENV, PANEL, PARALLEL, close_judges, make_judges, require_judges


def validate(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    circuit: Annotated[
        Path | None, typer.Option(help="What is tried; the model's own if not given.", metavar="FILE", show_default=False)
    ] = None,
    scenarios: ScenariosOption = None,
    replies: Annotated[Path | None, typer.Option(help="Bank whose replies are read.", metavar="FILE")] = None,
    out: OutOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One size, one way of asking, fewer prompts; options that are given stay.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=2, max=10_000, help="Prompts, each asked in every emotion.")] = ValidateSettings.prompts,
    randoms: Annotated[int, typer.Option(min=2, max=1000, help="Random sets beside every point.")] = ValidateSettings.randoms,
    sizes: Annotated[str, typer.Option(help="Of the circuit's largest units, as shares of all heads.")] = listed(ValidateSettings.sizes),
    focus: Annotated[float, typer.Option(min=0.001, max=1, help="The size at which everything is measured.")] = ValidateSettings.focus,
    doses: Annotated[str, typer.Option(help="Of the ablation, beside 0 and 1; '' for none.")] = listed(ValidateSettings.doses),
    kinds: Annotated[
        str, typer.Option(help=f"What takes the place of ablated units, some of {', '.join(KINDS)}.", metavar="A,B,...")
    ] = listed(ValidateSettings.kinds),
    held: Annotated[
        str, typer.Option(help="The same for what is outside the circuit while it alone carries the emotion.", metavar="A,B,...")
    ] = listed(ValidateSettings.held),
    elicitations: Annotated[str, typer.Option(help=f"How the emotion is asked for, some of {', '.join(ASKING)}.", metavar="A,B")] = listed(
        ValidateSettings.elicitations
    ),
    others: Annotated[
        int, typer.Option(min=1, max=255, help="Replies in other emotions that the wanted one is compared with.")
    ] = ValidateSettings.others,
    reply_tokens: Annotated[
        int, typer.Option(min=1, max=10_000, help="Tokens of each reply that are read.")
    ] = ValidateSettings.reply_tokens,
    references: Annotated[
        int, typer.Option(min=1, max=10_000, help="Prompts that neutral means are taken from.")
    ] = ValidateSettings.references,
    bank_groups: Annotated[
        int, typer.Option(min=2, max=100_000, help="Prompts of the bank that rankings are made from.")
    ] = ValidateSettings.bank_groups,
    bootstraps: Annotated[int, typer.Option(min=1, max=10_000, help="Bootstraps of these rankings.")] = ValidateSettings.bootstraps,
    written: Annotated[
        int,
        typer.Option(
            min=0, max=1000, help="Of the prompts, to which replies are written under ablation and read by the judges; 0 for none."
        ),
    ] = ValidateSettings.written,
    judge: PanelOption = PANEL,
    base_url: Annotated[str | None, typer.Option(help="Of an OpenAI-compatible judge.", show_default=False)] = None,
    key_env: Annotated[str, typer.Option(help="The environment variable that holds its key.")] = KEY_ENV,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Requests to it at a time.")] = PARALLEL,
    row_tokens: Annotated[int, typer.Option(min=1, max=10_000_000, help="Tokens that are computed at once.")] = ValidateSettings.row_tokens,
    parts: Annotated[str, typer.Option(help=f"What is measured, some of {', '.join(PARTS)}.", metavar="A,B,...")] = listed(PARTS),
    seed: SeedOption = ValidateSettings.seed,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = ARTIFACTS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Try a circuit: is it necessary, sufficient, specific, its emotion's own and stable, where random sets are not?"""
    settings = ValidateSettings(
        prompts,
        randoms,
        numbers(sizes, "--sizes", float),
        focus,
        numbers(doses, "--doses", float),
        words(kinds),
        words(held),
        words(elicitations),
        others,
        reply_tokens,
        references,
        bank_groups,
        bootstraps,
        written,
        row_tokens,
        seed,
        words(parts),
    )
    if quick:
        settings = replace(settings, **_not_given(context, QUICK))
    if not settings.written and (idle := typed(context, ("judge", "base_url", "key_env", "parallel"))):
        raise UsageError(f"{', '.join(idle)}: the judges read replies that are written under ablation; add --written N, or leave it out")
    require_judges(judge, base_url=base_url, key_env=key_env)
    from emosteer.api.estimates import validate as estimate
    from emosteer.api.validating import kept_beside
    from emosteer.api.validating import validate as run
    from emosteer.circuits.places import Places
    from emosteer.models.memory import bound_kernel_caches
    from emosteer.models.model import Model

    bound_kernel_caches()
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    target = out or Places.of(loaded.name, root).validation
    partial = target.with_name(target.name + ".partial.jsonl")
    given: Any = {"scenarios": scenarios, "replies": replies, "partial": partial, "artifacts": root, **vars(settings)}
    with announced(lambda: estimate(loaded, circuit, **given), dry_run, as_json), contextlib.ExitStack() as stack:
        judges: Any = PANEL
        if settings.written:
            judges = make_judges(judge, base_url=base_url, key_env=key_env, parallel=parallel, device=device)
            stack.callback(close_judges, judges)
        found = run(loaded, circuit, judge=judges, **given)
        found = with_command(found, command_line(context))
        found.save(target)
    for file in kept_beside(partial):
        file.unlink(missing_ok=True)
    from emosteer.cli.print_validation import print_validation, validation_summary

    summary = {"file": str(target), **validation_summary(found)}
    typer.echo(json.dumps(summary, indent=2)) if as_json else print_validation(summary)


def _not_given(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values whose option was left at its default."""
    return {name: value for name, value in values.items() if not typed(context, [name])}
