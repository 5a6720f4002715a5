"""Sets of heads and neurons: a circuit's largest units, and random sets that match them in layer and number, or in size as well."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.circuits.circuit import Circuit
from emosteer.models.model import Model
from emosteer.scenarios.splits import stable_share

#: Draws from which a set is chosen that takes away as much as the circuit does.
DRAWS = 64


@dataclass(frozen=True, eq=False)
class UnitSet:
    """Some units. heads: [layer, head], bool; neurons: [layer, neuron], bool, of width 0 where no neuron is meant."""

    heads: Tensor
    neurons: Tensor

    def __len__(self) -> int:
        return int(self.heads.sum() + self.neurons.sum())

    def both(self, other: UnitSet) -> UnitSet:
        """The units of both sets."""
        return UnitSet(self.heads & other.heads, self.neurons & other.neurons)

    def without(self, other: UnitSet) -> UnitSet:
        """The units of this set that are not in the other."""
        return UnitSet(self.heads & ~other.heads, self.neurons & ~other.neurons)

    def outside(self, hold_neurons: bool) -> UnitSet:
        """All other heads, and all other neurons if they are held; MLPs are left free otherwise, since what they do follows from what the
        heads write."""
        return UnitSet(~self.heads, ~self.neurons if hold_neurons else torch.zeros_like(self.neurons))


def circuit_sets(circuit: Circuit, emotion: int) -> UnitSet:
    """All units of an emotion's circuit."""
    mine = circuit.neuron_index[circuit.neuron_index[:, 0] == emotion]
    width = circuit.d_mlp if len(circuit.neuron_index) else 0
    neurons = torch.zeros(circuit.heads.shape[1], width, dtype=torch.bool)
    neurons[mine[:, 1], mine[:, 2]] = True
    return UnitSet(circuit.heads[emotion], neurons)


def lengths(model: Model, circuit: Circuit, emotion: int) -> tuple[Tensor, Tensor]:
    """How long the vector is that each unit of a circuit adds to the residual stream at strength 1: heads [layer, head] and neurons
    [layer, neuron], 0 outside the circuit."""
    deltas = circuit.z_delta[emotion].unflatten(-1, (model.shape.n_heads, model.shape.d_head)).float()
    heads = torch.stack([written_lengths(model, layer, delta) for layer, delta in enumerate(deltas)])
    whole = circuit_sets(circuit, emotion)
    if not whole.neurons.shape[1]:
        return heads, torch.zeros(whole.neurons.shape)
    delta = circuit.mlp_delta()[emotion].abs()
    return heads, torch.stack([delta[layer] * model.w_down(layer).float().norm(dim=-1).cpu() for layer in range(len(delta))])


def written_lengths(model: Model, layer: int, z: Tensor) -> Tensor:
    """Lengths of what heads write into the stream for their outputs `z` [..., head, d_head]. Shape [..., head]."""
    w_o = model.w_o(layer).float().cpu()
    return torch.einsum("...hd,hdm->...hm", z.float().cpu(), w_o).norm(dim=-1)


def largest(whole: UnitSet, sizes: tuple[Tensor, Tensor], share: float) -> UnitSet:
    """The largest units of a set: a share of all heads of the model, and its neurons in the proportion in which its heads are taken.

    Args:
        sizes: of heads and neurons, as `lengths` gives them.
    """
    members = int(whole.heads.sum())
    count = min(members, max(1, round(share * whole.heads.numel())))
    n_neurons = int(whole.neurons.sum())
    kept = round(n_neurons * (count / members if members else share))
    return UnitSet(_top(whole.heads, sizes[0], count), _top(whole.neurons, sizes[1], kept))


def _top(members: Tensor, sizes: Tensor, count: int) -> Tensor:
    chosen = torch.zeros(members.numel(), dtype=torch.bool)
    if members.any() and count:
        chosen[sizes.masked_fill(~members, -1.0).flatten().topk(min(count, int(members.sum()))).indices] = True
    return chosen.view(members.shape)


def matched(units: UnitSet, seed: str) -> UnitSet:
    """A random set with as many heads and neurons in every layer. Any unit of the layer can be drawn, the set's own too: what is asked is
    whether the set is another than chance would choose."""
    draw = torch.Generator().manual_seed(_number(seed))
    return UnitSet(_shuffled(units.heads, draw), _shuffled(units.neurons, draw))


def _shuffled(members: Tensor, draw: torch.Generator) -> Tensor:
    if not members.any():
        return members
    order = torch.rand(members.shape, generator=draw).argsort(-1).argsort(-1)
    return order < members.sum(-1, keepdim=True)


def matched_in_size(units: UnitSet, sizes: Tensor, seed: str) -> UnitSet:
    """Of `DRAWS` matched sets, the set itself apart, the one whose heads take away most nearly as much (root of summed squares).

    Args:
        sizes: [layer, head], how long what each head's ablation takes away is.
    """
    wanted, drawn = taken(units, sizes), [matched(units, f"{seed}/{index}") for index in range(DRAWS)]
    rivals = [one for one in drawn if not torch.equal(one.heads, units.heads)] or drawn
    return min(rivals, key=lambda one: abs(taken(one, sizes) - wanted))


def taken(units: UnitSet, sizes: Tensor) -> float:
    """How much the ablation of a set's heads takes away: the root of the summed squares of the heads' sizes [layer, head]."""
    return sizes[units.heads].square().sum().sqrt().item()


def _number(seed: str) -> int:
    return int(stable_share(seed, 0) * 2**53)
