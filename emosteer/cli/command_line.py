"""The command that an artefact keeps: what makes it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import typer

if TYPE_CHECKING:
    from emosteer.attribution.scores import Scores
    from emosteer.circuits.circuit import Circuit
    from emosteer.circuits.heads.heads import HeadStudy
    from emosteer.circuits.validation.validation import Validation
    from emosteer.directions.directions import Directions
    from emosteer.probing.probes import Probes
    from emosteer.side_effects.side_effects import SideEffects

Made = TypeVar("Made", "Directions", "Scores", "Circuit", "Probes", "HeadStudy", "SideEffects", "Validation")

#: Options that say how a result is printed, or what becomes of an earlier one; the result is the same with and without them.
NOT_KEPT = ("as_json", "fresh", "force")
_THEN = "&&"


def command_line(context: typer.Context) -> str:
    """The command line as far as it differs from the defaults, quoted for a shell. Paths stay as they were typed; how many processes
    share the work does not count."""
    parts = ["emosteer", str(context.command.name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        value, source = context.params.get(name), context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in NOT_KEPT or value == parameter.default:
            continue
        if parameter.param_type_name == "argument":
            parts.append(str(value))
        elif isinstance(value, bool):
            parts.append(max(parameter.opts if value else parameter.secondary_opts, key=len))
        else:
            parts += [max(parameter.opts, key=len), str(value)]
    return shlex.join(parts)


def typed(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of some parameters that were given on the command line, as they are typed there: with dashes."""
    given = [name for name in names if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"]
    return [f"--{name.replace('_', '-')}" for name in given]


def with_command(made: Made, command: str) -> Made:
    """The artefact, knowing the command that makes it."""
    return replace(made, provenance=replace(made.provenance, command=command))


def followed_by(earlier: str | None, command: str) -> str:
    """Both commands, as a shell takes them: what made an artefact and what then changed it. An earlier run of the same stage goes, since
    the later one starts from what was there before it."""
    steps: list[list[str]] = [[]]
    for word in shlex.split(earlier or ""):
        if word == _THEN:
            steps.append([])
        else:
            steps[-1].append(word)
    stage = shlex.split(command)[:2]
    kept = [shlex.join(step) for step in steps if step and step[:2] != stage]
    return f" {_THEN} ".join([*kept, command])
