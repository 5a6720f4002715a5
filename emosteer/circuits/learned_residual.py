"""Residual steering with everything that the circuit's gains have: vectors learned on the same data, by the same loop (`learning.py`).

Residual steering adds the plain directions, while the circuit's gains are learned. A difference between the two could come from the
learning alone. Here one free vector per emotion and layer of residual steering's band is learned, from the directions on, with the same
scenario-events in the same order, the same objective and as many steps, so that the circuit against this compares places. It has more
free numbers than the circuit (d_model per layer against one per head), and none is dropped.

Names are spared as the circuit spares them (`name_sparing.without_names`): whatever the values are, what they add is orthogonal to the
direction that lifts the emotion's own name in the logits, while they are learned as well as afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.circuits.learning import Learned, learn
from emosteer.circuits.name_sparing import name_directions
from emosteer.circuits.settings import GainSettings, VectorSettings
from emosteer.directions.directions import Directions
from emosteer.models.model import Model
from emosteer.models.sites import RESID_POST, Site
from emosteer.scenarios.scenarios import Bank, Group


@dataclass(frozen=True, eq=False)
class FreeVectors:
    """One vector per emotion and layer of a band, in units of the layer's rms: lengths are strengths of residual steering.

    first: [emotion, layer of the band, d_model], where learning starts; rms: [layer of the band]; layers: the band; names: [emotion,
    d_model], unit length, along which nothing is added, zero where there is no name to spare; step: how far one step of Adam moves a
    vector, about.
    """

    first: Tensor
    rms: Tensor
    layers: tuple[int, ...]
    names: Tensor
    step: float
    label: str = "residual vectors"

    @property
    def rate(self) -> float:
        """Adam moves every coordinate by about its rate; d_model of them make a length."""
        return self.step / float(self.first.shape[-1] ** 0.5)

    def start(self) -> Tensor:
        """The directions."""
        return self.first.clone()

    def kept(self, values: Tensor, share: float) -> Tensor:
        """All of them: there are no units to drop."""
        return torch.ones_like(values)

    def vectors(self, values: Tensor) -> Tensor:
        """What values add, names spared. Shape [emotion, layer of the band, d_model]."""
        along = (values * self.names[:, None]).sum(-1, keepdim=True)
        return (values - along * self.names[:, None]) * self.rms[:, None]

    def added(self, values: Tensor) -> Mapping[Site, Tensor]:
        """The same by site."""
        vectors = self.vectors(values)
        return {Site(layer, RESID_POST): vectors[:, place] for place, layer in enumerate(self.layers)}


def free_vectors(
    model: Model, directions: Directions, layers: Sequence[int], strength: float, spare: bool, settings: VectorSettings
) -> FreeVectors:
    """The parametrisation that starts at residual steering.

    Args:
        layers: its band; strength: its default, in rms; spare: keep off the emotions' own names.
    """
    post = [directions.sites.index(Site(layer, RESID_POST)) for layer in layers]
    first = directions.vectors[:, post].to(model.device).float() * strength
    names = name_directions(model, directions.emotions) if spare else torch.zeros_like(first[:, 0])
    return FreeVectors(first, directions.rms[post].to(model.device).float(), tuple(layers), names.to(first), settings.rate)


def learn_residual(
    model: Model, free: FreeVectors, groups: Sequence[Group], bank: Bank, directions: Directions, settings: GainSettings
) -> tuple[Tensor, Learned]:
    """Fits the vectors; everything but `free` is as for `gains.learn_gains`.

    Returns:
        ([emotion, layer of the band, d_model], what is added at strength 1; how learning went).

    Raises:
        DataError: as `learning.learn`.
    """
    learned = learn(model, free, groups, bank, directions.emotions, directions.instruction, settings)
    return free.vectors(learned.values.to(free.first)).cpu(), learned
