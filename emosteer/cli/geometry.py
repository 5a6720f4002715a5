"""`emosteer geometry`: what directions know of valence, arousal and dominance, and of parents and children."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emosteer.base.errors import UsageError
from emosteer.cli.options import JsonOption, SeedOption

if TYPE_CHECKING:
    from emosteer.directions.geometry import Geometry, Tested


def geometry(
    file: Annotated[Path, typer.Argument(help="What `extract` or `circuit` wrote.", metavar="FILE")],
    layers: Annotated[
        str | None, typer.Option(help="Layers with commas that are averaged over; the stable band if not given.", show_default=False)
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Say whether directions know valence, arousal and dominance, and whether parents lie among their children, each beside its null."""
    wanted = _layers(layers)
    from emosteer.base import artifacts
    from emosteer.circuits import circuit as circuits
    from emosteer.directions.directions import Directions
    from emosteer.directions.geometry import geometry as measure
    from emosteer.directions.geometry import geometry_of

    artifact = artifacts.load(file)
    if artifact.kind == circuits.KIND:
        circuit = circuits.Circuit.from_artifact(artifact)
        found = geometry_of(circuit.vectors, circuit.emotions, wanted or circuit.residual_layers, seed=seed)
    else:
        found = measure(Directions.load(file), wanted, seed=seed)  # says what it is where it is none
    model = artifact.provenance.model
    if as_json:
        typer.echo(json.dumps({"file": str(file), "model": model, **asdict(found)}, indent=2))
    else:
        _print(file, model, found)


def _layers(text: str | None) -> list[int] | None:
    """Raises a UsageError for what is no list of layers."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"expected --layers to be numbers with commas, such as 12,13,14, found '{text[:60]}'") from None


def _print(file: Path, model: str, found: Geometry) -> None:
    from emosteer.base.tables import print_table

    typer.echo(f"{model}: directions of layers {', '.join(map(str, found.layers))} of {file}")
    plane, error, tree = found.circumplex, found.error, found.tree
    if plane is None or error is None:
        typer.echo("fewer than five emotions with a known valence, arousal and dominance: no map")
    else:
        typer.echo(
            f"{len(plane.emotions)} emotions; the first two components hold {', '.join(f'{share:.0%}' for share in plane.explained)}"
        )
        head = ("", "component 1", "component 2", "larger, signs apart", "places dealt at random", "p")
        rows = [[axis, *(f"{r:+.2f}" for r in plane.correlations[axis]), *_cells(tested)] for axis, tested in plane.axes.items()]
        print_table(head, rows, "correlation of the components with the places")
        print_table(
            ("", "found", "places dealt at random", "p"),
            [
                ["distances (rank correlation with those in valence and arousal)", *_cells(plane.distances)],
                *([f"error of a linear map, left out: {axis}", *_cells(tested)] for axis, tested in error.items()),
            ],
            "the directions against the places",
        )
    if tree is not None:
        rows = [[family.parent, ", ".join(family.children), *_cells(family.cosine)] for family in tree.families]
        rows += [["all", "mean cosine", *_cells(tree.cosine)], ["all", "children nearest to their own parent", *_cells(tree.named)]]
        print_table(("parent", "children", "cosine", "random children", "p"), rows, "parents against the mean of their children")


def _cells(tested: Tested) -> list[str]:
    return [f"{tested.value:.2f}", f"{tested.null:.2f}", f"{tested.p:.4f}"]
