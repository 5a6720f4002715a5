"""The limits that a user sets on what steering may do besides, and the warning where they are exceeded. No torch at import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emosteer.circuits.methods import CIRCUIT
from emosteer.side_effects.settings import LIMITS, Limits

if TYPE_CHECKING:
    from emosteer.circuits.circuit import Circuit
    from emosteer.writing.jobs import Job

MaxHarmOption = Annotated[
    str | None,
    typer.Option(
        "--max-harm",
        envvar="EMOSTEER_MAX_HARM",
        help=f"Warn where the circuit's strength exceeds a limit, by what `effects` measured: some of {', '.join(LIMITS)}. "
        "EMOSTEER_MAX_HARM sets it for good.",
        metavar="NAME=X,...",
        show_default=False,
        show_envvar=False,
    ),
]


def warn_of_harm(
    limits: Limits | None, method: str, model_name: str, found: tuple[Circuit, Path] | None, jobs: Sequence[Job], root: Path
) -> None:
    """Says on stderr which limits the circuit's strengths in some jobs exceed. Nothing is read where no limit was set."""
    if limits is None or method != CIRCUIT or found is None:
        return
    from emosteer.api.effects import harm_warnings
    from emosteer.base.progress import note
    from emosteer.writing.jobs import strengths_of

    circuit, file = found
    asked = [row for job in jobs for row in strengths_of(job, circuit)]
    strongest = {name: max((row[e] for row in asked), default=0.0) for e, name in enumerate(circuit.emotions)}
    for line in harm_warnings(model_name, file, strongest, limits, root):
        note(f"warning: {line}")
