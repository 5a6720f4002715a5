"""`emosteer heads`: what the strongest heads of a circuit do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from emosteer.circuits.heads.settings import HeadSettings
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
)


def heads(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    circuit: Annotated[
        Path | None,
        typer.Option(help="The circuit; the model's own if not given, else the shipped one.", metavar="FILE", show_default=False),
    ] = None,
    directions: DirectionsOption = None,
    scenarios: ScenariosOption = None,
    replies: Annotated[
        Path | None, typer.Option(help="Bank whose replies are read; that of the directions if not given.", metavar="FILE")
    ] = None,
    out: OutOption = None,
    graph: Annotated[
        Path | None,
        typer.Option(help="Where the graph goes as JSON; beside the artefact if not given.", metavar="FILE", show_default=False),
    ] = None,
    described: Annotated[
        int, typer.Option(min=1, max=100, help="Heads of each emotion that get a page, the strongest.")
    ] = HeadSettings.described,
    nodes: Annotated[
        int, typer.Option(min=0, max=2000, help="Strongest heads that the graph is drawn between; 0 for no graph.")
    ] = HeadSettings.nodes,
    edges: Annotated[int, typer.Option(min=0, max=100_000, help="Edges of each emotion that are kept, at most.")] = HeadSettings.edges,
    groups: Annotated[int, typer.Option(min=2, max=1_000_000, help="Prompts of the bank to read, evenly drawn.")] = HeadSettings.groups,
    texts: Annotated[int, typer.Option(min=1, max=50, help="Texts shown at each end of what a head fires on.")] = HeadSettings.texts,
    tokens: Annotated[int, typer.Option(min=1, max=200, help="Tokens shown at each end of what a head writes.")] = HeadSettings.tokens,
    checked: Annotated[int, typer.Option(min=0, max=10_000, help="Edges that are patched for real as well.")] = HeadSettings.checked,
    random: Annotated[int, typer.Option(min=2, max=10_000, help="Random outputs of each head to compare with.")] = HeadSettings.random,
    seed: SeedOption = HeadSettings.seed,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    root: RootOption = ARTIFACTS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what the strongest heads of each emotion's circuit do: where they look, what they write, what they fire on, whom they read."""
    settings = HeadSettings(described, nodes, edges, groups, texts, tokens, checked, random, seed)
    from emosteer.api.describing import describe_heads
    from emosteer.api.estimates import heads as estimate
    from emosteer.base.files import write_text
    from emosteer.circuits.heads.graph import graph as graph_of
    from emosteer.circuits.places import Places
    from emosteer.cli.print_heads import heads_summary, print_heads
    from emosteer.models.memory import bound_kernel_caches
    from emosteer.models.model import Model

    bound_kernel_caches()
    loaded = Model.load(model, device=device, dtype=dtype, device_map=device_map)
    given: Any = {"scenarios": scenarios, "replies": replies, "artifacts": root, **vars(settings)}
    places = Places.of(loaded.name, root)
    target = out or places.heads
    drawn = graph or (places.heads_graph if out is None else target.with_name(f"{target.stem}-graph.json"))
    with announced(lambda: estimate(loaded, circuit, directions, **given), dry_run, as_json):
        found = describe_heads(loaded, circuit, directions, **given)
        found = with_command(found, command_line(context))
        found.save(target)
        write_text(drawn, json.dumps(graph_of(found), indent=1, ensure_ascii=False) + "\n")
    summary = {"file": str(target), "graph": str(drawn), **heads_summary(found)}
    typer.echo(json.dumps(summary, indent=2)) if as_json else print_heads(summary)
