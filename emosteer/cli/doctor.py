"""`emosteer doctor`: what this machine has, what is missing, and the command that fixes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from emosteer.cli.options import JsonOption

if TYPE_CHECKING:
    from emosteer.api.diagnosis import Finding

#: How a state is marked.
MARKS = {"fine": "ok", "lacking": "!", "broken": "BROKEN"}


def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has and lacks: versions, devices, cache, compiler, models; and the command that fixes what is missing.

    Loads no model and fetches nothing. Exits with 1 if something is broken, so that commands cannot work.
    """
    from emosteer.api import diagnosis

    findings = diagnosis.diagnosed()
    if as_json:
        typer.echo(json.dumps(diagnosis.as_json(findings), indent=2))
    else:
        _print(findings)
    if any(finding.state == diagnosis.BROKEN for finding in findings):
        raise typer.Exit(1)


def _print(findings: Sequence[Finding]) -> None:
    from emosteer.api.diagnosis import BROKEN, LACKING
    from emosteer.base.tables import print_table

    print_table(("", "what", "found"), [(MARKS[finding.state], finding.about, finding.found) for finding in findings])
    for state, title in ((BROKEN, "broken; commands fail until this is mended:"), (LACKING, "missing; commands work without:")):
        if some := [finding for finding in findings if finding.state == state]:
            typer.echo(f"\n{title}")
            for finding in some:
                typer.echo(f"  {finding.about}: {finding.mend}" if finding.mend else f"  {finding.about}: {finding.found}")
    if not any(finding.state in (BROKEN, LACKING) for finding in findings):
        typer.echo("\nnothing is missing")
