"""`emosteer extract`, `ablate`, `circuit` and `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emosteer.base.errors import UsageError
from emosteer.circuits.places import ARTIFACTS
from emosteer.cli.announce import DryRunOption, announced
from emosteer.cli.command_line import command_line, with_command
from emosteer.cli.options import (
    DEFAULT_MODEL,
    SETS,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelOption,
    OutOption,
    RepliesOption,
    RootOption,
    ScenariosOption,
    SeedOption,
)
from emosteer.directions.settings import GPU_TOKENS, Settings
from emosteer.scenarios.prompts import ELICITATIONS
from emosteer.scenarios.scenarios import EMOTIONS, parse_emotions

if TYPE_CHECKING:
    from emosteer.base.processes import Crew
    from emosteer.models.model import Model
    from emosteer.scenarios.scenarios import Bank
    from emosteer.scenarios.shipped import Data

#: Tokens per forward pass on a GPU.


def extract(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    scenarios: ScenariosOption = None,
    replies: RepliesOption = None,
    elicitation: Annotated[
        str, typer.Option(help="reply (states of the reply), tone, system or stimulus (state before it).")
    ] = Settings.elicitation,
    emotions: Annotated[str, typer.Option(help=f"Names with commas, any set; 'all' is the six; or {SETS}.")] = "all",
    out: OutOption = None,
    instruction: Annotated[str, typer.Option(help="Appended to every prompt.")] = Settings.instruction,
    holdout: Annotated[float, typer.Option(min=0, max=0.9, help="Share of scenarios that evidence is measured on.")] = Settings.holdout,
    limit: LimitOption = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000_000,
            help=f"Tokens per forward pass; {Settings.batch_tokens} on a CPU, {GPU_TOKENS} on a GPU.",
            show_default=False,
        ),
    ] = None,
    packed: Annotated[bool, typer.Option(help="Compute each group's shared prompt once.")] = Settings.packed,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
    seed: SeedOption = Settings.seed,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = ARTIFACTS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Extract context-agnostic emotion directions, and contrast statistics of every head and neuron."""
    from emosteer.circuits.places import Places
    from emosteer.scenarios.shipped import read_data

    wanted = parse_emotions(emotions, EMOTIONS, closed=False)
    if len(wanted) < 2:
        raise UsageError(f"expected at least two emotions to tell apart, found '{emotions}'")
    if elicitation not in ELICITATIONS:
        raise UsageError(f"unknown elicitation '{elicitation}'; expected {', '.join(ELICITATIONS)}")
    own = replies == "self"
    if own and elicitation != "reply":
        raise UsageError("--replies self belongs to --elicitation reply")
    data = read_data(scenarios, Path(replies) if replies and not own else None, "self" if own else elicitation, limit, wanted)
    from emosteer.base.processes import join
    from emosteer.directions.extract import batch_tokens_for, finish_checkpoint
    from emosteer.directions.extract import extract as run
    from emosteer.models.memory import bound_kernel_caches
    from emosteer.models.model import Model

    crew = join()
    if not own:  # writing replies meets the same shapes again
        bound_kernel_caches()
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    places = Places.of(loaded.name, root)
    target = out or places.directions
    settings = Settings(wanted, elicitation, instruction, holdout, seed, batch_tokens or batch_tokens_for(loaded), packed)
    if own and dry_run:
        raise UsageError("--dry-run cannot count replies that are not written yet; leave out --replies self")
    bank = _own_bank(loaded, data, wanted, target, settings, fresh, crew) if own else data.bank
    checkpoint = target.with_name(target.name + ".partial")
    from emosteer.api.costs.stages import of_extract

    with announced(lambda: of_extract(loaded, data.groups, settings, bank, None if fresh else checkpoint), dry_run, as_json):
        found = run(loaded, data.groups, settings, bank=bank, data=data.hashes, checkpoint=checkpoint, fresh=fresh, crew=crew)
        found = with_command(found, command_line(context))
        found.save(target)
    finish_checkpoint(checkpoint)
    from emosteer.cli.print_artifacts import directions_summary, print_directions

    summary = {"file": str(target), **directions_summary(found)}
    typer.echo(json.dumps(summary, indent=2)) if as_json else print_directions(summary)


def _own_bank(model: Model, data: Data, emotions: tuple[str, ...], target: Path, settings: Settings, fresh: bool, crew: Crew) -> Bank:
    """The model's own replies, written beside the directions (`own-replies.jsonl`), and those that pass the filter
    (`own-bank.jsonl`, which `ablate --replies` takes)."""
    from emosteer.base.files import sha256_file, write_jsonl
    from emosteer.base.progress import note
    from emosteer.circuits.places import OWN_BANK
    from emosteer.writing.own_replies import own_bank

    file, kept = target.with_name("own-replies.jsonl"), target.with_name(OWN_BANK)
    bank, reasons = own_bank(model, data.groups, emotions, file, settings.instruction, seed=settings.seed, fresh=fresh, crew=crew)
    rows = [
        {"skeleton_id": key.scenario, "valence": key.valence, "emotion": emotion, "text": text}
        for key, replies in bank.items()
        for emotion, text in replies.items()
    ]
    write_jsonl(kept, rows)
    data.hashes[f"replies/{kept.name}"] = sha256_file(kept)
    note(f"own replies: {len(rows)} kept, {sum(reasons.values())} left out ({', '.join(f'{n} {why}' for why, n in reasons.most_common())})")
    return bank
