"""`emosteer models list|pull|path|check`: where weights are, and what can be done with a model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from emosteer.cli.options import DeviceOption, DtypeOption, JsonOption

if TYPE_CHECKING:
    from emosteer.api.checking import Checked

models = typer.Typer(help="List, fetch, locate and check models.", no_args_is_help=True)
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


@models.command()
def check(reference: Reference, device: DeviceOption = "auto", dtype: DtypeOption = "auto", as_json: JsonOption = False) -> None:
    """Load a model, run the proofs, and say what each stage can do with it, in one screen."""
    from emosteer.api.checking import checked
    from emosteer.models.model import Model

    found = checked(Model.load(reference, device=device, dtype=dtype))
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        _print_checked(found)


def _print_checked(found: Checked) -> None:
    from emosteer.base.tables import print_table

    sizes, template = found.sizes, found.template
    heads = f"{sizes['n_heads']} heads of {sizes['d_head']} ({sizes['n_kv_heads']} for keys and values)"
    neurons = f"{sizes['d_mlp']} neurons" if sizes["d_mlp"] else "experts instead of neurons"
    thinking = {"none": "opens no thinking block", "switched off": "thinking is switched off", "closed": "its thinking block is closed"}
    said = {
        "none": "none: turns become paragraphs",
        "one": f"system line {template.system}",
    }.get(template.kind, f"{template.kind}; system line {template.system}")
    rows = [
        ("family", f"{found.architecture}, row {found.family} of docs/FAMILIES.md"),
        ("weights", f"{found.parameters / 1e6:,.1f} million in {found.tensors} tensors, {found.precision} on {found.device}"),
        ("layers", f"{sizes['n_layers']} of {heads}, {neurons}, width {sizes['d_model']}"),
        ("tokens", f"{sizes['d_vocab']:,} in the vocabulary, context of {sizes['context']:,}"),
        ("template", said),
    ]
    if template.kind != "none":
        rows += [
            ("", f"{'takes' if template.turns else 'does not take'} earlier turns; {thinking[template.thinking]}"),
            ("", "prints a date, which is fixed" if template.dated else "prints no date"),
        ]
    rows += [("proved" if index == 0 else "", proof) for index, proof in enumerate(found.proofs)]
    rows += [("memory" if index == 0 else "", f"{what}: {n / 2**30:,.2f} GiB") for index, (what, n) in enumerate(found.memory.items())]
    print_table(("model", f"{found.name}, sha256 {found.sha256[:16]}"), rows)
    print_table(("stage", "works", "notes"), [(stage, "yes" if s.works else "no", "; ".join(s.notes)) for stage, s in found.stages.items()])
