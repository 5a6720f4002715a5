"""The class of every command: what options cannot refuse by themselves is refused here, before the command runs. No torch here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

#: Digits of the longest integer that is taken; more than any count, size or seed needs, and what files can hold (`base.strict_json`).
MAX_DIGITS = 300


def _is_unicode(value: Any) -> bool:
    """Whether a text, a path or all of a list can be written as UTF-8."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_unicode, value))
    if isinstance(value, (str, Path)):
        try:
            str(value).encode("utf-8")
        except UnicodeEncodeError:
            return False
    return True


class CheckedCommand(TyperCommand):
    """A command whose numbers are finite and short enough to be written down: Python reads nan and inf as numbers, which pass any bound."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses as always, then checks."""
        rest = super().parse_args(ctx, args)
        options = {parameter.name: max(parameter.opts, key=len) for parameter in self.params}
        for name, value in ctx.params.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"expected {options[name]} to be a finite number, found {value}", ctx=ctx)
            if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
                raise typer.BadParameter(f"expected {options[name]} to have at most {MAX_DIGITS} digits, found more", ctx=ctx)
            if not _is_unicode(value):  # bytes of the shell that are no UTF-8: safetensors opens no such file
                raise typer.BadParameter(f"expected {options[name]} to be UTF-8 text, found other bytes", ctx=ctx)
        return rest
