"""`emosteer probe`: what of an emotion can be read from the model's states, for how long, and what moves it."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from emosteer.base.errors import EmosteerError, UsageError
from emosteer.base.files import kept_progress
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
    ScenariosOption,
    SeedOption,
    listed,
    numbers,
    words,
)
from emosteer.directions.settings import GPU_TOKENS
from emosteer.probing.settings import KINDS, MAX_DISTANCE, READS, ProbeSettings


def probe(
    context: typer.Context,
    texts: Annotated[
        Path | None,
        typer.Argument(help='Lines of {"text", "label"}; the replies of the bank if not given.', metavar="[FILE]", show_default=False),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    circuit: Annotated[
        Path | None,
        typer.Option(help="What steers for the malleability; the model's own if not given.", metavar="FILE", show_default=False),
    ] = None,
    scenarios: ScenariosOption = None,
    replies: Annotated[Path | None, typer.Option(help="Bank to probe where no texts are given.", metavar="FILE")] = None,
    out: OutOption = None,
    sites: Annotated[str, typer.Option(help=f"What is probed, some of {', '.join(KINDS)}.", metavar="A,B,...")] = listed(
        ProbeSettings.kinds
    ),
    read: Annotated[str, typer.Option(help=f"Positions of a text that are read: {' or '.join(READS)}.")] = ProbeSettings.read,
    per_label: Annotated[int, typer.Option(min=4, max=1_000_000, help="Texts of each label, at most.")] = ProbeSettings.per_label,
    test_share: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of texts to test on.")] = ProbeSettings.test_share,
    folds: Annotated[int, typer.Option(min=2, max=20, help="Folds of the cross-validation.")] = ProbeSettings.folds,
    decays: Annotated[str, typer.Option(help="Penalties that it chooses from.", metavar="X,Y,...")] = listed(ProbeSettings.decays),
    hidden: Annotated[int, typer.Option(min=0, max=1024, help="Width of the non-linear probes; 0 for none.")] = ProbeSettings.hidden,
    shuffles: Annotated[int, typer.Option(min=1, max=100, help="Probes fitted to shuffled labels.")] = ProbeSettings.shuffles,
    epochs: Annotated[int, typer.Option(min=1, max=10_000, help="Passes over the states.")] = ProbeSettings.epochs,
    longest: Annotated[int, typer.Option(min=1, max=100_000, help="Tokens of a text that are read.")] = ProbeSettings.longest,
    distances: Annotated[
        str, typer.Option(help=f"Neutral tokens after a text at which to read again, up to {MAX_DISTANCE}.", metavar="N,M,...")
    ] = listed(ProbeSettings.distances),
    followed: Annotated[int, typer.Option(min=0, max=100_000, help="Texts to do that with; 0 for none.")] = ProbeSettings.followed,
    prompted: Annotated[int, typer.Option(min=0, max=100_000, help="Test texts to ask the model about; 0 for none.")] = (
        ProbeSettings.prompted
    ),
    shots: Annotated[int, typer.Option(min=0, max=16, help="Examples of each label when asking; 0 for none.")] = ProbeSettings.shots,
    moved: Annotated[
        int, typer.Option(min=0, max=100_000, help="Texts to read under system lines and steering; 0 for none.")
    ] = ProbeSettings.moved,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000_000,
            help=f"Tokens per forward pass; {ProbeSettings.batch_tokens} on a CPU, {GPU_TOKENS} on a GPU.",
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
    seed: SeedOption = ProbeSettings.seed,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = ARTIFACTS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Probe the model's states for the emotions of labelled texts: where they are, for how long, and what moves them."""
    counts = {"folds": folds, "hidden": hidden, "shuffles": shuffles, "epochs": epochs, "longest": longest, "per_label": per_label}
    counts |= {"followed": followed, "prompted": prompted, "shots": shots, "moved": moved}
    settings = ProbeSettings(
        kinds=words(sites),
        read=read,
        test_share=test_share,
        decays=numbers(decays, "--decays", float),
        distances=numbers(distances, "--distances", int),
        seed=seed,
        **counts,
    )
    if texts is not None and (scenarios or replies):
        raise UsageError("expected a file of labelled texts, or --scenarios and --replies of a bank, found both")
    from emosteer.api.probing import probe as run
    from emosteer.circuits.places import Places
    from emosteer.directions.extract import batch_tokens_for
    from emosteer.models.memory import bound_kernel_caches
    from emosteer.models.model import Model

    bound_kernel_caches()
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    target = out or Places.of(loaded.name, root).probes
    partial = target.with_name(target.name + ".partial")
    given: Any = {**vars(settings), "batch_tokens": batch_tokens or batch_tokens_for(loaded)}
    from emosteer.api.estimates import probe as estimate

    inputs: Any = {"circuit": circuit, "scenarios": scenarios, "replies": replies, "artifacts": root}
    with announced(lambda: estimate(loaded, texts, **inputs, **given), dry_run, as_json):
        found = run(loaded, texts, partial=partial, fresh=fresh, **inputs, **given)
        found = with_command(found, command_line(context))
        found.save(target)
    with contextlib.suppress(EmosteerError), kept_progress(partial):  # whoever has begun in it meanwhile will remove it
        shutil.rmtree(partial, ignore_errors=True)
    from emosteer.cli.print_probes import print_probes, probes_summary

    summary = {"file": str(target), **probes_summary(found)}
    typer.echo(json.dumps(summary, indent=2)) if as_json else print_probes(summary)
