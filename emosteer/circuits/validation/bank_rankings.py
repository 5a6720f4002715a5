"""Rankings of heads by contrast, from some prompts of a bank: by half of the prompt kinds, and by bootstraps of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.attribution.unit_scores import head_contributions
from emosteer.base.progress import bar
from emosteer.base.seeds import torch_seed
from emosteer.circuits.validation.unit_sets import UnitSet
from emosteer.directions.activations import batches_by_cost, read_states, tokenize_group
from emosteer.directions.contrast import unit_vectors
from emosteer.models.model import Model
from emosteer.models.sites import RESID_MID, Site, Z
from emosteer.scenarios.scenarios import Bank, Group
from emosteer.scenarios.splits import stable_share

#: Bootstraps whose contributions are computed at once.
AT_ONCE = 10


@dataclass(frozen=True)
class Parting:
    """Which half of the prompts each one belongs to: whole kinds of prompts, whole themes where there is one kind, drawn where there is
    one of both. Made once from all prompts that can be used, so that a kind is in the same half wherever some of them are looked at.

    by: "kind", "theme", or "" where all are drawn; names: of kinds or themes, which belong to the two halves by turns.
    """

    by: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Parting:
        """groups: all that can be used."""
        for by in ("kind", "theme"):
            names = sorted({getattr(group, by) for group in groups})
            if len(names) > 1:
                return cls(by, tuple(names))
        return cls("", ())

    def half(self, group: Group) -> int:
        """0 or 1. A prompt whose kind or theme was not among those of all prompts is drawn."""
        name = getattr(group, self.by) if self.by else None
        if name in self.names:
            return self.names.index(name) % 2
        return int(stable_share(f"half/{group.key}", 0) < 0.5)


@dataclass(frozen=True, eq=False)
class BankContrasts:
    """Contrasts of single prompts. z: [group, emotion, layer, n_heads * d_head]; mid: [group, emotion, layer, d_model], of the stream
    behind attention; halves: [group], 0 or 1, as `parting` has it."""

    z: Tensor
    mid: Tensor
    halves: Tensor
    parting: Parting

    def scores(self, model: Model, weights: Tensor) -> Tensor:
        """Mean contrastive contribution of every head to the direction of its layer, both from the weighted prompts.

        Args:
            weights: [draw, group], how often each prompt counts.

        Returns:
            [draw, emotion, layer, head].
        """
        shares = weights / weights.sum(1, keepdim=True)
        z = torch.einsum("bg,gelw->belw", shares, self.z)
        mid = torch.einsum("bg,gelw->belw", shares, self.mid)
        return head_contributions(model, z.to(model.device), unit_vectors(mid).to(model.device)).float().cpu()


def read_contrasts(
    model: Model,
    groups: Sequence[Group],
    bank: Bank,
    emotions: Sequence[str],
    instruction: str,
    batch_tokens: int,
    parting: Parting | None = None,
) -> BankContrasts:
    """Reads prompts that have a reply in every emotion, as `extract` does (the `reply` elicitation).

    Args:
        parting: of all prompts that can be used, where these are not all.
    """
    parting = parting or Parting.of(groups)
    samples = {
        index: tokenize_group(model, group, "reply", emotions, {e: bank[group.key][e] for e in emotions}, instruction)
        for index, group in enumerate(groups)
    }
    order = {id(sample): index for index, sample in samples.items()}
    layers = range(model.shape.n_layers)
    z = torch.zeros(len(groups), len(emotions), len(layers), model.width(Z))
    mid = torch.zeros(len(groups), len(emotions), len(layers), model.shape.d_model)
    sites = [Site(layer, kind) for layer in layers for kind in (Z, RESID_MID)]
    with bar("contrasts of the bank (prompts)", len(groups)) as advance:
        for batch in batches_by_cost(list(samples.values()), batch_tokens):
            states = read_states(model, batch, sites)
            places = [order[id(sample)] for sample in batch]
            for layer in layers:
                for into, kind in ((z, Z), (mid, RESID_MID)):
                    state = states[Site(layer, kind)].float()
                    into[places, :, layer] = (state - state.mean(1, keepdim=True)).cpu()
            advance(len(batch))
    return BankContrasts(z, mid, torch.tensor([parting.half(group) for group in groups]), parting)


def best(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """The heads with the largest scores. scores: [..., emotion, layer, head]; counts: by emotion. Returns bools of the same shape."""
    flat = scores.flatten(-2)
    ranks = flat.argsort(-1, descending=True).argsort(-1)
    return (ranks < torch.tensor(list(counts))[:, None]).view(scores.shape)


def half_rankings(model: Model, contrasts: BankContrasts, counts: Sequence[int], no_neurons: Tensor) -> list[list[UnitSet]]:
    """The best heads by the prompts of each half alone, by emotion; no ranking where a half is empty.

    Args:
        no_neurons: as wide as those of the sets that these stand beside.
    """
    weights = torch.stack([(contrasts.halves == half).float() for half in (0, 1)])
    if not weights.sum(1).all():
        return []
    chosen = best(contrasts.scores(model, weights), counts)
    return [[UnitSet(heads, no_neurons) for heads in half] for half in chosen]


def inclusion(model: Model, contrasts: BankContrasts, counts: Sequence[int], bootstraps: int, seed: int) -> Tensor:
    """In which share of bootstraps of the prompts each head is among the best. Shape [emotion, layer, head]."""
    draw = torch.Generator().manual_seed(torch_seed(seed))
    n = len(contrasts.z)
    total = torch.zeros(contrasts.z.shape[1], contrasts.z.shape[2], model.shape.n_heads)
    with bar("bootstraps of the bank", bootstraps) as advance:
        for start in range(0, bootstraps, AT_ONCE):
            count = min(AT_ONCE, bootstraps - start)
            drawn = torch.randint(n, (count, n), generator=draw)
            weights = torch.zeros(count, n).scatter_add_(1, drawn, torch.ones(count, n))
            total += best(contrasts.scores(model, weights), counts).float().sum(0)
            advance(count)
    return total / bootstraps
