"""What each head and each neuron should add, within a budget: outputs of heads and values of neurons, learned together.

Heads are as in `head_outputs.py`: `d_head` numbers per emotion and head, from the head's mean contrast on. A neuron has one number per
emotion. It starts at nothing: a neuron's mean contrast is measured downstream of the heads that cause it, so that adding it beside theirs
would count it twice. Learning decides which neurons add anything, and how much.

A neuron writes one direction, so that the emotion's name cannot be spared neuron by neuron as it is head by head. What the neurons of a
layer write together is kept orthogonal to the name instead, by the smallest change of the neurons that add anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.attribution.unit_scores import UnitScores
from emosteer.circuits.head_outputs import HeadOutputs, head_outputs
from emosteer.circuits.name_sparing import neurons_of_name
from emosteer.circuits.settings import GainSettings
from emosteer.models.model import Model
from emosteer.models.sites import MLP_OUT, Site


@dataclass(frozen=True, eq=False)
class NeuronValues:
    """One free value per emotion and neuron, in units of the neuron's own contrast.

    contrast: [emotion, layer, d_mlp], the neurons' mean contrasts; scale: [layer, d_mlp], their root mean square over emotions; down: by
    layer [d_mlp, d_model], what a neuron of activation 1 writes; names: [emotion, layer, d_mlp], how much of the emotion's name it lifts.
    """

    contrast: Tensor
    scale: Tensor
    down: Sequence[Tensor]
    names: Tensor

    def outputs(self, values: Tensor) -> Tensor:
        """What is added to the neurons' activations, names spared; neurons whose value is 0 stay there. [emotion, layer, d_mlp]."""
        added = values * self.scale
        names = torch.where(values.detach() != 0, self.names, 0.0)
        size = names.square().sum(-1, keepdim=True).clamp_min(torch.finfo(names.dtype).tiny)
        return added - names * ((added * names).sum(-1, keepdim=True) / size)

    def added(self, values: Tensor) -> Mapping[Site, Tensor]:
        """What the neurons of a layer write together, at its MLP's output."""
        outputs = self.outputs(values)
        return {Site(layer, MLP_OUT): outputs[:, layer] @ down.float() for layer, down in enumerate(self.down)}


@dataclass(frozen=True, eq=False)
class UnitOutputs:
    """Free outputs of heads and values of neurons as one row per emotion: the heads' [layer, n_heads, d_head], then the neurons' [layer,
    d_mlp], flattened. Units stand in the same order, a head being one. neurons: None where heads alone may be in the circuit; with_heads:
    whether they may; d_mlp: neurons of a layer; begin: values [emotion, value] to go on
    from."""

    heads: HeadOutputs
    neurons: NeuronValues | None
    d_mlp: int
    with_heads: bool = True
    label: str = "unit outputs"
    begin: Tensor | None = None

    @property
    def rate(self) -> float:
        """Of every coordinate, in units of the unit's contrast; that of neurons is in their scale."""
        return self.heads.rate

    @property
    def n_heads(self) -> int:
        """Heads of the whole model that may be in the circuit: the first so many units."""
        return self.heads.scale.numel() if self.with_heads else 0

    @property
    def d_head(self) -> int:
        """Values of a head."""
        return int(self.heads.first.shape[-1])

    @property
    def n_units(self) -> int:
        """Units of the whole model that may be in the circuit."""
        return self.n_heads + (0 if self.neurons is None else self.neurons.scale.numel())

    def start(self) -> Tensor:
        """The heads' contrast, and nothing of neurons, or where learning goes on from. Shape [emotion, value]."""
        if self.begin is not None:
            return self.begin.to(self.heads.first, copy=True)
        heads = self.heads.start().flatten(1)[:, : self.n_heads * self.d_head]
        return heads if self.neurons is None else torch.cat([heads, torch.zeros_like(self.neurons.contrast).flatten(1)], 1)

    def contrasts(self) -> Tensor:
        """The values at which every unit adds its mean contrast. Shape [emotion, value]."""
        heads = (self.heads.first / self.heads.scale[..., None]).flatten(1)[:, : self.n_heads * self.d_head]
        return heads if self.neurons is None else torch.cat([heads, (self.neurons.contrast / self.neurons.scale).flatten(1)], 1)

    def parts(self, values: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The heads' values [emotion, layer, n_heads, d_head] and the neurons' [emotion, layer, d_mlp]."""
        size = self.n_heads * self.d_head
        heads = values[:, :size].view_as(self.heads.first) if size else None
        return heads, None if self.neurons is None else values[:, size:].view_as(self.neurons.contrast)

    def added(self, values: Tensor) -> Mapping[Site, Tensor]:
        """What the units of a layer write together, at its attention's and its MLP's output."""
        heads, neurons = self.parts(values)
        of_heads = {} if heads is None else self.heads.added(heads)
        return {**of_heads, **({} if neurons is None or self.neurons is None else self.neurons.added(neurons))}

    def outputs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to `z` [emotion, layer, n_heads * d_head] and to the neurons [emotion, layer, d_mlp], names spared."""
        heads, neurons = self.parts(values.to(self.heads.first))
        z = torch.zeros_like(self.heads.first) if heads is None else self.heads.outputs(heads)
        if neurons is None or self.neurons is None:
            return z.flatten(-2).cpu(), torch.zeros(len(z), z.shape[1], self.d_mlp)
        return z.flatten(-2).cpu(), self.neurons.outputs(neurons).cpu()

    # ---- units -------------------------------------------------------------------------------------------------------

    def by_unit(self, values: Tensor) -> Tensor:
        """Sums over the values of every unit. Shape [emotion, unit]."""
        size = self.n_heads * self.d_head
        return torch.cat([values[:, :size].unflatten(1, (self.n_heads, self.d_head)).sum(-1), values[:, size:]], 1)

    def by_value(self, units: Tensor) -> Tensor:
        """One entry per unit [emotion, unit], repeated for every value of the unit. Shape [emotion, value]."""
        return torch.cat([units[:, : self.n_heads].repeat_interleave(self.d_head, 1), units[:, self.n_heads :]], 1)

    def best(self, scores: Tensor, share: float) -> Tensor:
        """Ones for the share of the heads, and of the neurons, that score best; one of each kind at least. scores: [emotion, unit]."""
        kinds = [part for part in scores.split([self.n_heads, scores.shape[1] - self.n_heads], 1) if part.shape[1]]
        picked = [part.topk(max(1, round(part.shape[1] * share)), dim=1).indices for part in kinds]
        return torch.cat([torch.zeros_like(part).scatter_(1, index, 1.0) for part, index in zip(kinds, picked, strict=True)], 1)

    def kept(self, values: Tensor, share: float) -> Tensor:
        """The units that write most."""
        return self.by_value(self.best(self.lengths(values), share))

    def lengths(self, values: Tensor) -> Tensor:
        """How much every unit writes into the residual stream. Shape [emotion, unit]."""
        heads, neurons = self.parts(values)
        found = [] if heads is None else [self.heads.written(heads).norm(dim=-1).flatten(1)]
        if neurons is not None and self.neurons is not None:
            sizes = torch.stack([down.float().norm(dim=-1) for down in self.neurons.down])
            found.append((self.neurons.outputs(neurons).abs() * sizes).flatten(1))
        return torch.cat(found, 1)

    def table(self, units: Tensor) -> UnitScores:
        """One entry per unit [emotion, unit] as tables of heads and neurons; those of a kind that the circuit may not have are 0."""
        n, layers, heads = len(units), *self.heads.scale.shape
        of_heads = units[:, : self.n_heads].unflatten(1, (layers, heads)) if self.n_heads else torch.zeros(n, layers, heads)
        of_neurons = torch.zeros(n, layers, self.d_mlp) if self.neurons is None else units[:, self.n_heads :].view_as(self.neurons.contrast)
        return UnitScores(of_heads.cpu(), of_neurons.cpu())

    def row(self, scores: UnitScores) -> Tensor:
        """The other way round. Shape [emotion, unit], on the device of the values."""
        parts = [scores.heads.flatten(1)] * self.with_heads + ([] if self.neurons is None else [scores.neurons.flatten(1)])
        return torch.cat(parts, 1).to(self.heads.first)


def unit_outputs(
    model: Model, z_delta: Tensor, mlp_delta: Tensor, emotions: Sequence[str], spare: bool, settings: GainSettings
) -> UnitOutputs:
    """The parametrisation that starts at the heads' contrasts.

    Args:
        z_delta: [emotion, layer, n_heads * d_head], names already taken out if they are to be spared; mlp_delta: [emotion, layer, d_mlp].

    Raises:
        UsageError: if neurons are wanted of a model that has none.
    """
    heads = head_outputs(model, z_delta, emotions, spare, settings)
    if settings.units == "heads":
        return UnitOutputs(heads, None, model.shape.d_mlp)
    model.refuse_neurons("--budget")
    contrast = mlp_delta.to(heads.first)
    scale = contrast.square().mean(0).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    names = neurons_of_name(model, emotions).to(contrast) if spare else torch.zeros_like(contrast)
    down = [model.w_down(layer) for layer in range(model.shape.n_layers)]
    faster = settings.neuron_rate / settings.output_rate  # the optimiser's rate is that of heads
    neurons = NeuronValues(contrast, scale * faster, down, names)
    return UnitOutputs(heads, neurons, model.shape.d_mlp, with_heads=settings.units == "both")
