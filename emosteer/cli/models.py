"""`emosteer models list|pull|path`: where weights are."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from emosteer.cli.options import JsonOption

models = typer.Typer(help="List, fetch and locate model weights.", no_args_is_help=True)
Reference = Annotated[str, typer.Argument(help="Packaged name, hub id, local folder or GGUF file.", metavar="REF")]


@models.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """List the packaged models, converted GGUF files and hub models that are at hand."""
    from emosteer.models.weights.resolve import known

    rows = known()
    if as_json:
        plain = [
            {"name": r.name, "source": r.source, "path": str(r.path) if r.path else None, "ready": r.ready, "size": r.size} for r in rows
        ]
        typer.echo(json.dumps(plain, indent=2))
        return
    from emosteer.base.tables import print_table

    size = lambda n: f"{n / 2**20:,.0f} MiB" if n else ""  # noqa: E731
    print_table(
        ("model", "source", "ready", "size", "path"),
        [(r.name, r.source, "yes" if r.ready else "no", size(r.size), r.path or "") for r in rows],
    )


@models.command()
def pull(reference: Reference) -> None:
    """Fetch and convert a model now, so that later commands start at once; prints its folder."""
    from emosteer.base.progress import note
    from emosteer.models.weights.resolve import pull

    typer.echo(pull(reference, progress=note).path)


@models.command()
def path(reference: Reference) -> None:
    """Print the folder that holds a model's weights (fetching it if needed)."""
    from emosteer.base.progress import note
    from emosteer.models.weights.resolve import resolve

    typer.echo(resolve(reference, progress=note).path)
