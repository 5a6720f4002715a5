"""How much each head should add: gains learned on the reply bank (`learning.py`), by their effect on the final score.

A circuit adds `gain[e, h] * delta_bar[e, h]` at each head. The mean contrast `delta_bar` says in which direction a head tells emotions
apart; it does not say how much of it the rest of the model turns into emotional *text*, and for some heads it is the wrong way round.
The gains are found by gradient descent on what is wanted in the end. Nothing but one number per head and emotion is free; the model's
weights, and the directions, stay as they are. Then the weakest heads are dropped and the rest is fitted on. docs/CIRCUITS.md says what
it gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.circuits.learning import Learned, learn
from emosteer.circuits.settings import GainSettings
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, Site
from emosteer.scenarios.scenarios import Bank, Group


@dataclass(frozen=True, eq=False)
class HeadGains:
    """One gain per emotion, layer and head. written: [emotion, layer, n_heads, d_model], what each head writes at gain 1."""

    written: Tensor
    settings: GainSettings
    label: str = "gains"

    @property
    def rate(self) -> float:
        """In units of strength."""
        return self.settings.rate

    def start(self) -> Tensor:
        """The same gain for all. Shape [emotion, layer, n_heads]."""
        return torch.full(self.written.shape[:3], self.settings.start, device=self.written.device)

    def kept(self, values: Tensor, share: float) -> Tensor:
        """The heads that write most."""
        return strongest_mask(values, self.written, share)

    def added(self, values: Tensor) -> Mapping[Site, Tensor]:
        """What the heads of a layer write together, at its attention output."""
        return at_attention(torch.einsum("elh,elhm->elm", values, self.written))


def learn_gains(
    model: Model, z_delta: Tensor, groups: Sequence[Group], bank: Bank, emotions: Sequence[str], instruction: str, settings: GainSettings
) -> Learned:
    """Fits one gain per head and emotion.

    Args:
        z_delta: [emotion, layer, n_heads * d_head], the contrast that a gain of 1 adds.
        groups: scenario-events of train; those with replies in two emotions or more are learned from.

    Returns:
        Values [emotion, layer, n_heads], 0 for heads that are left out.

    Raises:
        DataError: if an emotion has no reply beside one in another, or a prompt and its reply exceed the model's sliding window.
    """
    return learn(model, HeadGains(head_outputs(model, z_delta), settings), groups, bank, emotions, instruction, settings)


def at_attention(together: Tensor) -> Mapping[Site, Tensor]:
    """What the heads of every layer write together [emotion, layer, d_model], by site."""
    return {Site(layer, ATTN_OUT): together[:, layer] for layer in range(together.shape[1])}


def strongest_mask(gains: Tensor, written: Tensor, keep: float) -> Tensor:
    """Ones for the share of heads, per emotion, that write most: |gain| times the length of what gain 1 writes."""
    size = (gains.abs() * written.norm(dim=-1)).flatten(1)
    index = size.topk(max(1, round(size.shape[1] * keep)), dim=1).indices
    return torch.zeros_like(size).scatter_(1, index, 1.0).view_as(gains)


def head_outputs(model: Model, z_delta: Tensor) -> Tensor:
    """What each head writes at gain 1. Shape [emotion, layer, n_heads, d_model], float32, on the model's device."""
    heads = z_delta.to(model.device).float().unflatten(-1, (model.shape.n_heads, model.shape.d_head))
    return torch.stack([torch.einsum("ehd,hdm->ehm", heads[:, i], model.w_o(i).float()) for i in range(model.shape.n_layers)], 1)
