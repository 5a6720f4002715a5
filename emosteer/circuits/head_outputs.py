"""What each head should add, free in every direction that the head can write: the circuit's places with the freedom of a vector.

A gain (`gains.py`) scales what a head does of its own accord, one number per head. Here the whole output of a head is learned, `d_head`
numbers per head and emotion, from that contrast on, by the same loop (`learning.py`): what is added still comes out of the circuit's
heads, through their own output weights, and heads that write least are dropped halfway. It is what learned residual vectors
(`learned_residual.py`) are to residual steering, so that the two compare places at equal freedom.

Names are spared head by head (`name_sparing.without_names`), whatever the values are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.circuits.gains import at_attention, strongest_mask
from emosteer.circuits.learning import Learned, learn
from emosteer.circuits.name_sparing import name_writers
from emosteer.circuits.settings import GainSettings
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.scenarios.scenarios import Bank, Group


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """One free output per emotion and head, in units of the head's own contrast.

    first: [emotion, layer, n_heads, d_head], where learning starts; scale: [layer, n_heads], root mean square of a head's contrast over
    emotions and coordinates; output: [layer, n_heads, d_head, d_model], the heads' output weights; names: [emotion, layer, n_heads,
    d_head], unit length, along which nothing is added, zero where there is no name to spare.
    """

    first: Tensor
    scale: Tensor
    output: Tensor
    names: Tensor
    settings: GainSettings
    label: str = "head outputs"

    @property
    def rate(self) -> float:
        """Of every coordinate, in units of the head's contrast."""
        return self.settings.output_rate

    def start(self) -> Tensor:
        """The contrast, some times."""
        return self.first * self.settings.output_start / self.scale[..., None]

    def outputs(self, values: Tensor) -> Tensor:
        """What the heads put out, names spared. Shape [emotion, layer, n_heads, d_head]."""
        z = values * self.scale[..., None]
        return z - (z * self.names).sum(-1, keepdim=True) * self.names

    def written(self, values: Tensor) -> Tensor:
        """What every head writes into the residual stream. Shape [emotion, layer, n_heads, d_model]."""
        return torch.einsum("elhd,lhdm->elhm", self.outputs(values), self.output)

    def kept(self, values: Tensor, share: float) -> Tensor:
        """The heads that write most."""
        written = self.written(values)
        mask = strongest_mask(torch.ones_like(written[..., 0]), written, share)
        return mask[..., None].expand_as(values)

    def added(self, values: Tensor) -> Mapping[Site, Tensor]:
        """What the heads of a layer write together, at its attention output."""
        return at_attention(torch.einsum("elhd,lhdm->elm", self.outputs(values), self.output))


def head_outputs(model: Model, z_delta: Tensor, emotions: Sequence[str], spare: bool, settings: GainSettings) -> HeadOutputs:
    """The parametrisation that starts at the heads' contrasts.

    Args:
        z_delta: [emotion, layer, n_heads * d_head], names already taken out if they are to be spared.
    """
    first = z_delta.to(model.device).float().unflatten(-1, (model.shape.n_heads, model.shape.d_head))
    output = torch.stack([model.w_o(layer).float() for layer in range(model.shape.n_layers)])
    names = name_writers(model, emotions).to(first) if spare else torch.zeros_like(first)
    scale = first.square().mean((0, -1)).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return HeadOutputs(first, scale, output, names, settings)


def learn_outputs(
    model: Model,
    z_delta: Tensor,
    spare: bool,
    groups: Sequence[Group],
    bank: Bank,
    emotions: Sequence[str],
    instruction: str,
    settings: GainSettings,
) -> tuple[Tensor, Learned]:
    """Fits one output per head and emotion; everything is as for `gains.learn_gains`.

    Returns:
        ([emotion, layer, n_heads * d_head], what the heads add at strength 1, 0 for heads that are left out; how learning went).

    Raises:
        DataError: as `learning.learn`.
    """
    what = head_outputs(model, z_delta, emotions, spare, settings)
    learned = learn(model, what, groups, bank, emotions, instruction, settings)
    return what.outputs(learned.values.to(what.first)).flatten(-2).cpu(), learned
