"""docs/COMMANDS.md, made from the commands: `make commands`, or `python -m tests.commands`.

`tests/test_docs.py` fails while the page is not what this makes.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.main import get_command

from emosteer.base.files import write_text
from emosteer.cli.main import app

PAGE = Path(__file__).parents[1] / "docs" / "COMMANDS.md"
HEAD = """# Commands

Made from the commands by `make commands`; `emosteer COMMAND --help` says the same. `--debug`, anywhere on the line, shows the traceback of
an error, and `emosteer --version` prints the version. `emosteer --install-completion` teaches your shell (bash, zsh, fish, PowerShell) to
complete commands, options, models and emotions; `--show-completion` prints what that would add.
"""


def page() -> str:
    """The whole page: a list of all commands, then each with its arguments and options."""
    commands = list(_commands("emosteer", get_command(app)))
    listed: dict[str, list[str]] = defaultdict(list)
    for name, command in commands:
        listed[panel_of(name)].append(f"- [`{name}`](#{name.replace(' ', '-')}): {_first(command)}")
    contents = [line for panel, lines in listed.items() for line in (f"**{panel}**", "", *lines, "")]
    return "\n".join([HEAD, *contents, *(_section(name, command) for name, command in commands)])


def panel_of(name: str) -> str:
    """The panel of `emosteer --help` that a command stands in; a command of a group in the group's."""
    return str(getattr(get_command(app).commands[name.split()[1]], "rich_help_panel", None))  # type: ignore[attr-defined]


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command below one, with its whole name, in the order of `--help`."""
    for child, found in command.commands.items():
        if hasattr(found, "commands"):
            yield from _commands(f"{name} {child}", found)
        elif not found.hidden:
            yield f"{name} {child}", found


def _section(name: str, command: Any) -> str:
    types = get_type_hints(inspect.unwrap(command.callback))
    panels: dict[str, list[str]] = defaultdict(list)
    for parameter in command.params:
        if parameter.name != "help" and not getattr(parameter, "hidden", False):
            panels[getattr(parameter, "rich_help_panel", None) or ""].append(_row(parameter, types[parameter.name]))
    usage = " ".join([name, "[OPTIONS]", *(_value(p) for p in command.params if p.param_type_name == "argument")])
    paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    lines = [f"## {name}", "", "```", usage, "```", "", "\n\n".join(map(_text, paragraphs)), ""]
    for panel in sorted(panels, key=bool):
        lines += [f"**{panel}**\n"] * bool(panel) + ["| option | what it does | default |", "|---|---|---|", *panels[panel], ""]
    return "\n".join(lines)


def _row(parameter: Any, annotation: Any) -> str:
    """An argument or option. Long names stand before short ones, and what turns a switch off after what turns it on."""
    if parameter.param_type_name == "argument":
        names = _code(_value(parameter))
    else:
        value = "" if parameter.is_flag else f" {_value(parameter, annotation)}"
        names = ", ".join(_code(name + value) for name in [*sorted(parameter.opts, key=len, reverse=True), *parameter.secondary_opts])
    return " ".join(f"| {names} | {_text(parameter.help or '')} | {_default(parameter)} |".split("\n"))


def _default(parameter: Any) -> str:
    """What `--help` shows; of a switch that cannot be turned off, nothing."""
    value = parameter.default
    if parameter.required or parameter.show_default is False or value is None or value == "":
        return ""
    if isinstance(value, bool):
        return ("`on`" if value else "`off`") if value or getattr(parameter, "secondary_opts", ()) else ""
    return _code(str(value))


def _value(parameter: Any, annotation: Any = str) -> str:
    """What stands for a parameter's value."""
    if parameter.metavar or parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    kinds = {int: "INTEGER", float: "NUMBER", Path: "PATH"}
    return next((kinds[kind] for kind in (annotation, *get_args(annotation)) if kind in kinds), "TEXT")


def _first(command: Any) -> str:
    return _text(" ".join((command.help or "").split("\n\n")[0].split()))


def _code(text: str) -> str:
    """Code in a table's cell; GitHub and the site agree on how an upright bar is written in it only where it is HTML."""
    return f"<code>{text.replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def _text(text: str) -> str:
    """Text of a table's cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    write_text(PAGE, page())
    print(f"wrote {PAGE}")
