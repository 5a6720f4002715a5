"""`emosteer inspect`: print what an artefact holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from emosteer.cli.options import JsonOption


def inspect(
    file: Annotated[Path, typer.Argument(help="Any artefact.", metavar="FILE")],
    as_json: JsonOption = False,
) -> None:
    """Print what an artefact holds and where it came from."""
    from emosteer.base import artifacts
    from emosteer.cli.print_artifacts import artifact_summary, print_artifact

    summary = artifact_summary(artifacts.load(file))
    typer.echo(json.dumps(summary, indent=2)) if as_json else print_artifact(summary)
