"""`emosteer report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emosteer.base.errors import UsageError
from emosteer.circuits.places import ARTIFACTS
from emosteer.cli.options import DEFAULT_MODEL, JsonOption, ModelOption, RootOption

if TYPE_CHECKING:
    from emosteer.circuits.places import Places


def report(
    model: ModelOption = DEFAULT_MODEL,
    root: RootOption = ARTIFACTS,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write; artifacts/MODEL/report.html if not given.", metavar="FILE")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page from the artefacts of a model. Loads no model; names what is missing."""
    from emosteer.base.progress import note
    from emosteer.report.page import build_report

    places = _places(model, root)
    built = build_report(places, out or places.folder / "report.html", model)
    for warning in built.warnings:
        note(f"read with care: {warning}")
    for missing in built.missing:
        note(f"not on the page: {missing}")
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "file": str(built.path),
                    "bytes": built.size,
                    "replies": built.replies,
                    "replies_total": built.replies_total,
                    "missing": list(built.missing),
                    "warnings": list(built.warnings),
                },
                indent=2,
            )
        )
    else:
        typer.echo(built.path)
    if show:
        import webbrowser

        webbrowser.open(built.path.resolve().as_uri())


def _places(reference: str, root: Path) -> Places:
    """The folder of a model's artefacts, found without loading it: by the names that its weights can have."""
    from emosteer.circuits.places import Places
    from emosteer.models.weights.packages import PACKAGED

    names = [model.name for model in PACKAGED if reference.lower() in (model.name, *(alias.lower() for alias in model.aliases))]
    path = Path(reference)
    names += [reference, path.name] + ([path.stem] if path.suffix == ".gguf" else [])
    found = [Places.of(name, root) for name in names if name]
    if not found:
        raise UsageError(f"expected the name of a model in --model, found '{reference}'")
    return next((places for places in found if places.folder.is_dir()), found[0])
