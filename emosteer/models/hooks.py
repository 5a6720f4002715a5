"""Hooks on module trees, made from edits: functions of one activation that know nothing of modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from emosteer.base.errors import ModelError
from emosteer.models.architecture import Family, tap
from emosteer.models.sites import MLP_POST, RESID_MID, Site

#: An edit receives the activation [batch, pos, width] (heads of `z` side by side) and returns its replacement, or None
#: to leave it as it is.
Edit = Callable[[Tensor], Tensor | None]


def flat(edit: Edit) -> Callable[..., Tensor | None]:
    """Gives a bridge hook the flat view of `z` and takes its replacement back in the bridge's shape."""

    def hook(activation: Tensor, hook: Any) -> Tensor | None:
        new = edit(activation.flatten(2) if activation.dim() == 4 else activation)
        return None if new is None else new.reshape(activation.shape)

    return hook


def at_home(edit: Edit, home: torch.device) -> Edit:
    """An edit that sees activations on one device, wherever the layer is; what it returns goes back to the layer's."""

    def moved(activation: Tensor) -> Tensor | None:
        new = edit(activation.to(home))
        return None if new is None else new.to(activation.device)

    return moved


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


@contextlib.contextmanager
def hooked(layer: nn.Module, kind: str, edit: Edit, family: Family) -> Iterator[None]:
    """Hooks one edit into one plain decoder layer for the length of the block."""
    module, is_input = tap(layer, kind, family)
    with contextlib.ExitStack() as stack:
        if kind == MLP_POST and not family.has_neurons:
            edit = _nothing(edit)
        elif kind == RESID_MID and family.parallel:
            stream: list[Tensor] = []
            stack.callback(layer.register_forward_pre_hook(before(_keeping(stream)), with_kwargs=True).remove)
            edit = _summed(edit, stream)
        hook = before(edit) if is_input else after(edit)
        handle = module.register_forward_pre_hook(hook, with_kwargs=True) if is_input else module.register_forward_hook(hook)
        stack.callback(handle.remove)
        yield


def _nothing(edit: Edit) -> Edit:
    """An edit that sees the neurons of a layer that has none."""

    def look(activation: Tensor) -> None:
        edit(activation[..., :0])

    return look


def _keeping(stream: list[Tensor]) -> Edit:
    """An edit that keeps what a layer reads."""

    def keep(activation: Tensor) -> None:
        stream[:] = [activation]

    return keep


def _summed(edit: Edit, stream: list[Tensor]) -> Edit:
    """An edit that sees the stream behind the attention of a parallel block, which nothing in the model reads."""

    def look(written: Tensor) -> None:
        if edit(stream[0] + written) is not None:
            raise ModelError("the MLP of a parallel block reads the stream before attention: resid_mid can be read there, not changed")

    return look
