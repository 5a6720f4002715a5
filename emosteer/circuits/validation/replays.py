"""Replies read again under interventions on units: what they cost, and where they leave the stream.

One row holds the prompt once and behind it, for every intervention, every reply as a segment of its own, which sees the prompt and itself.
Interventions act where reply tokens are written: at the prompt's last position (each segment has its own) and at every later one. The
prompt stays as it was, so that its keys and values are shared.

A unit can be given its value from the run of the same replies behind another prompt: their tokens are the same, hence each position has
its counterpart. With every head replaced, all that the replies' positions know of the prompt is the other prompt's, and the run *is* the
other run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from emosteer.base.errors import DataError
from emosteer.circuits.validation.unit_sets import UnitSet
from emosteer.directions.activations import TokenRow, make_batch
from emosteer.models.hooks import Edit
from emosteer.models.model import Model
from emosteer.models.sites import MLP_POST, RESID_POST, Site, Z

#: Positions that are unembedded at once: the logits of a whole row would leave the processor's caches.
UNEMBEDDED = 128


@dataclass(frozen=True)
class Passage:
    """A prompt, up to where the reply begins, and replies to it, as token ids."""

    prompt: tuple[int, ...]
    replies: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Positions that write the replies."""
        return sum(map(len, self.replies))


@dataclass(frozen=True, eq=False)
class Intervention:
    """What is done to a set of units. dose: 1 puts the source's value in their place, 0 leaves them; parts of it are mixtures."""

    units: UnitSet
    dose: float = 1.0


@dataclass(frozen=True, eq=False)
class Readout:
    """Directions to project on. layers: of the stream that is read; vectors: [emotion, layer, d_model]."""

    layers: tuple[int, ...]
    vectors: Tensor


@dataclass(frozen=True, eq=False)
class Replayed:
    """costs: [intervention, reply], mean nats per token; projections: [intervention, reply, emotion], mean over positions and layers."""

    costs: Tensor
    projections: Tensor


#: site -> values in the units' place: [width], or [position, width] from the same replies behind another prompt.
Source = Mapping[Site, Tensor]


def sites_of(model: Model, neurons: bool) -> list[Site]:
    """The sites of all heads, and of all neurons if they are wanted."""
    return [Site(layer, kind) for layer in range(model.shape.n_layers) for kind in ((Z, MLP_POST) if neurons else (Z,))]


@torch.no_grad()
def capture(model: Model, passage: Passage, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Activations where the replies are written: site -> [position, width]."""
    row = _Row(model, passage, 1)
    store: dict[Site, Tensor] = {}

    def keeping(site: Site) -> Edit:
        def keep(activation: Tensor) -> None:
            store[site] = activation[0, row.start :].clone()

        return keep

    row.run({site: keeping(site) for site in sites})
    return store


@torch.no_grad()
def replay(
    model: Model,
    passage: Passage,
    interventions: Sequence[Intervention | None],
    source: Source,
    readout: Readout,
    *,
    adding: bool = False,
    row_tokens: int = 640,
) -> Replayed:
    """Reads the replies under each intervention; None leaves the model as it is.

    Args:
        source: what takes the units' place, or, with `adding`, what is added to it; it may lack sites that no set touches.

    Raises:
        DataError: if the row exceeds the model's sliding window.
    """
    each = max(1, row_tokens // max(1, passage.size))
    costs, projections = [], []
    for start in range(0, len(interventions), each):
        part = interventions[start : start + each]
        row = _Row(model, passage, len(part))
        edits = {} if all(one is None for one in part) else _edits(row, part, source, adding)
        seen = torch.zeros(len(part) * passage.size, len(readout.vectors), device=model.device)
        for place, layer in enumerate(readout.layers):
            edits[Site(layer, RESID_POST)] = _projecting(row, seen, readout.vectors[:, place] / len(readout.layers))
        hidden = row.run(edits)
        costs.append(row.by_reply(row.costs(hidden)[:, None])[..., 0])
        projections.append(row.by_reply(seen))
    return Replayed(torch.cat(costs).cpu(), torch.cat(projections).cpu())


class _Row:
    """The prompt without its last token, then for every intervention every reply: [last token of the prompt, reply without its last]."""

    def __init__(self, model: Model, passage: Passage, n: int) -> None:
        self.model, self.passage, self.n, self.start = model, passage, n, len(passage.prompt) - 1
        ids, positions, owner = list(passage.prompt[:-1]), list(range(self.start)), [0] * self.start
        segments = [reply for _ in range(n) for reply in passage.replies]
        for number, reply in enumerate(segments, start=1):
            ids += [passage.prompt[-1], *reply[:-1]]
            positions += range(self.start, self.start + len(reply))
            owner += [number] * len(reply)
        self.targets = [token for reply in segments for token in reply]
        window, longest = model.window, 1 + max(positions)
        if window is not None and longest > window:  # the mask is taken as it is: a reply would see further back than it does alone
            raise DataError(f"{longest} tokens do not fit the sliding window of {model.name} ({window}); choose shorter prompts")
        self.batch = make_batch(model, [TokenRow(tuple(ids), tuple(positions), tuple(owner), ((self.start,),))])

    def run(self, edits: Mapping[Site, Edit]) -> Tensor:
        """Hidden states where replies are written [intervention * position, d_model], final-normed."""
        batch = self.batch
        hidden = self.model.run(batch.ids, edits, attention_mask=batch.mask, position_ids=batch.positions, bridge=False)
        return hidden[0, self.start :]

    def costs(self, hidden: Tensor) -> Tensor:
        """Nats of every token of the replies. Shape [intervention * position]."""
        target = torch.tensor(self.targets, device=hidden.device)
        parts = zip(hidden.split(UNEMBEDDED), target.split(UNEMBEDDED), strict=True)
        return torch.cat([cross_entropy(self.model.logits(h).float(), t, reduction="none") for h, t in parts])

    def by_reply(self, values: Tensor) -> Tensor:
        """Means over the positions of each reply. [intervention * position, ...] -> [intervention, reply, ...]."""
        per_set = values.view(self.n, self.passage.size, -1)
        return torch.stack([part.mean(1) for part in per_set.split([len(reply) for reply in self.passage.replies], dim=1)], dim=1)


def _projecting(row: _Row, seen: Tensor, vectors: Tensor) -> Edit:
    def project(activation: Tensor) -> None:
        seen.add_(activation[0, row.start :].float() @ vectors.T.to(seen))

    return project


def _edits(row: _Row, interventions: Sequence[Intervention | None], source: Source, adding: bool) -> dict[Site, Edit]:
    model, edits = row.model, dict[Site, Edit]()
    doses = torch.tensor([one.dose if one else 0.0 for one in interventions], device=model.device)[:, None, None]
    first = next(one.units for one in interventions if one is not None)
    for kind, whole in ((Z, first.heads), (MLP_POST, first.neurons)):
        if not whole.shape[1]:
            continue
        none = torch.zeros_like(whole)
        members = torch.stack([(one.units.heads if kind == Z else one.units.neurons) if one else none for one in interventions])
        for layer in members.any(-1).any(0).nonzero().flatten().tolist():
            mask = members[:, layer].repeat_interleave(model.shape.d_head if kind == Z else 1, dim=-1)[:, None]
            site = Site(layer, kind)
            edits[site] = _editing(row, mask.to(model.device), source[site].to(model.device), doses, adding)
    return edits


def _editing(row: _Row, mask: Tensor, value: Tensor, doses: Tensor, adding: bool) -> Edit:
    """mask: [intervention, 1, width]; value: [width] or [position, width]; doses: [intervention, 1, 1]."""

    def edit(activation: Tensor) -> Tensor:
        part = activation[0, row.start :].view(row.n, row.passage.size, -1)
        wanted, share = value.to(part), doses.to(part)
        changed = part + share * wanted if adding else torch.lerp(part, wanted.expand_as(part), share.expand_as(part))
        new = activation.clone()
        new[0, row.start :] = torch.where(mask, changed, part).flatten(0, 1)
        return new

    return edit
