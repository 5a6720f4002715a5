"""Hooks on module trees, made from edits: functions of one activation that know nothing of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from emosteer.sites import Site

#: An edit receives the activation [batch, pos, width] (heads of `z` side by side) and returns its replacement, or None
#: to leave it as it is.
Edit = Callable[[Tensor], Tensor | None]


def flat(edit: Edit) -> Callable[..., Tensor | None]:
    """Gives a bridge hook the flat view of `z` and takes its replacement back in the bridge's shape."""

    def hook(activation: Tensor, hook: Any) -> Tensor | None:
        new = edit(activation.flatten(2) if activation.dim() == 4 else activation)
        return None if new is None else new.reshape(activation.shape)

    return hook


def before(edit: Edit) -> Callable[..., Any]:
    """A forward pre-hook (with keyword arguments) that edits a module's input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = edit(args[0])
        return None if new is None else ((new, *args[1:]), kwargs)

    return hook


def after(edit: Edit) -> Callable[..., Any]:
    """A forward hook that edits a module's output."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):  # decoder layers of some families return (hidden, ...)
            new = edit(output[0])
            return None if new is None else (new, *output[1:])
        return edit(output)

    return hook


def reading(store: dict[Site, Tensor], site: Site, edit: Edit | None) -> Edit:
    """An edit that stores what `edit` leaves at the site."""

    def read(activation: Tensor) -> Tensor | None:
        new = edit(activation) if edit else None
        store[site] = activation if new is None else new
        return new

    return read
