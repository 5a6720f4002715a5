"""`emosteer cache` and `cache clean`: what lies in the cache folder, and what can go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from emosteer.cli.checked import CheckedCommand
from emosteer.cli.options import JsonOption

if TYPE_CHECKING:
    from emosteer.api.caching import Entry

cache = typer.Typer(help="See and clean the cache folder: models, judges, compiled code.")


@cache.callback(invoke_without_command=True)
def show(context: typer.Context) -> None:
    """See and clean the cache folder: models, judges, compiled code. Without a command, lists it."""
    if context.invoked_subcommand is None:
        list_cache()


@cache.command("list", cls=CheckedCommand)
def list_cache(as_json: JsonOption = False) -> None:
    """List what lies in the cache folder, with sizes, what nobody needs, and what is in use."""
    from emosteer.api.caching import entries
    from emosteer.base.cache_folder import cache_dir

    found = entries()
    if as_json:
        typer.echo(json.dumps({"folder": str(cache_dir()), "entries": [entry.as_json() for entry in found]}, indent=2))
        return
    _print(found)
    typer.echo(f"{_size(sum(entry.size for entry in found))} in {cache_dir()} (EMOSTEER_CACHE chooses another folder)")
    if waste := [entry for entry in found if entry.waste and not entry.used]:
        typer.echo(f"{_size(sum(entry.size for entry in waste))} of it can go: `emosteer cache clean --yes`")


@cache.command("clean", cls=CheckedCommand)
def clean_cache(
    names: Annotated[
        list[str] | None, typer.Argument(help="What else is to go, as `cache list` names it.", metavar="[NAME]...", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of it, models too; they are fetched again when they are needed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove it; without this, only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what nobody needs from the cache: leftovers of killed processes, downloads that are converted, old compiled code.

    Says what would go unless --yes is given. What a running process uses stays.
    """
    from emosteer.api.caching import chosen, entries, forget_hashes, remove

    wanted = chosen(entries(), names or [], everything)
    gone = [entry for entry in wanted if not entry.used and (not yes or remove(entry))]
    kept = [entry for entry in wanted if entry not in gone]
    if yes:
        forget_hashes()
    freed = sum(entry.size for entry in gone)
    if as_json:
        lists = {"gone": [entry.as_json() for entry in gone], "in_use": [entry.as_json() for entry in kept]}
        typer.echo(json.dumps({"removed": yes, "bytes": freed, **lists}, indent=2))
        return
    _print(wanted)
    for entry in kept:
        typer.echo(f"{entry.name} stays: it is in use ({entry.used or 'since a moment ago'})")
    if not gone:
        typer.echo("nothing to remove")
    else:
        typer.echo(f"removed {_size(freed)}" if yes else f"{_size(freed)} would go; add --yes to remove it")


def _print(found: Sequence[Entry]) -> None:
    from emosteer.base.tables import print_table

    rows = [(e.kind, e.name, _size(e.size), f"in use: {e.used}" if e.used else e.waste or "needed", e.path) for e in found]
    if rows:
        print_table(("kind", "name", "size", "state", "path"), rows)


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
