"""Which heads and neurons write the emotion: exact contributions in one pass, attribution patching, true patches as a check.

METHOD section 4. Contributions are linear in the activations, so the mean contrastive contribution of every unit follows from
the mean contrast that `extract` keeps: no forward pass per head, and none at all once the directions are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.activations import Batch, Sample, make_batch, rows_of
from emosteer.directions import Directions
from emosteer.errors import DegenerateDirection
from emosteer.interventions import replace_units, unit_slice
from emosteer.model import Model
from emosteer.sites import MLP_POST, RESID_MID, RESID_POST, Head, Neuron, Site, Unit, Z

#: Adjacent layers whose directions agree more than this are one stable band (METHOD section 5).
BAND_COSINE = 0.9


def written_direction(model: Model, layer: int, kind: str, vectors: Tensor) -> Tensor:
    """Residual directions as seen from where `W_O` (kind resid_mid) or `W_down` (resid_post) writes.

    The same vectors for Llama and Qwen. Gemma norms a sublayer's output before adding it: there the norm's gain is folded in
    and its scale left out, so scores are exact up to one positive factor per layer and position.
    """
    if not model.post_norms:
        return vectors
    block = model.layers[layer]
    norm = block.post_attention_layernorm if kind == RESID_MID else block.post_feedforward_layernorm
    return vectors * (1 + norm.weight.float()).to(vectors)


def head_contributions(model: Model, z: Tensor, v_mid: Tensor) -> Tensor:
    """`c[h] = (z[h] W_O[h]) . v_mid`: zero-ablating head h lowers the projection on v_mid at its own layer by exactly this.

    Args:
        z: [..., layer, n_heads * d_head]; v_mid: [..., layer, d_model], broadcast against z.

    Returns:
        [..., layer, head].
    """
    heads = z.unflatten(-1, (model.shape.n_heads, model.shape.d_head))
    scores = []
    for layer in range(z.shape[-2]):
        v = written_direction(model, layer, RESID_MID, v_mid[..., layer, :]).to(z)
        scores.append(torch.einsum("...hd,hdm,...m->...h", heads[..., layer, :, :], model.w_o(layer).to(z), v))
    return torch.stack(scores, dim=-2)


def neuron_contributions(model: Model, mlp_post: Tensor, v_post: Tensor) -> Tensor:
    """`c[n] = mlp_post[n] * (W_down[:, n] . v_post)`, exact like `head_contributions`.

    Args:
        mlp_post: [..., layer, d_mlp]; v_post: [..., layer, d_model].

    Returns:
        [..., layer, neuron].
    """
    scores = []
    for layer in range(mlp_post.shape[-2]):
        v = written_direction(model, layer, RESID_POST, v_post[..., layer, :]).to(mlp_post)
        scores.append(mlp_post[..., layer, :] * (v @ model.w_down(layer).T.to(mlp_post)))
    return torch.stack(scores, dim=-2)


@dataclass(frozen=True, eq=False)
class UnitScores:
    """One way of scoring every unit. heads: [emotion, layer, head]; neurons: [emotion, layer, neuron]."""

    heads: Tensor
    neurons: Tensor

    def of(self, emotion: int, unit: Unit) -> float:
        """The score of one unit."""
        table = self.heads if isinstance(unit, Head) else self.neurons
        return table[emotion, unit.layer, unit.index].item()


def contrast_scores(model: Model, directions: Directions) -> UnitScores:
    """Mean contrastive contribution of every unit over all groups (the default form)."""
    z, mlp = directions.z.mean.to(model.device), directions.mlp.mean.to(model.device)
    return _scores(model, directions, z, mlp)


def raw_scores(model: Model, directions: Directions) -> UnitScores:
    """Mean contribution of every unit in the emotional runs (the paper's form): the contrast plus what all emotions share."""
    z = (directions.z.mean + directions.z.base).to(model.device)
    mlp = (directions.mlp.mean + directions.mlp.base).to(model.device)
    return _scores(model, directions, z, mlp)


def _scores(model: Model, directions: Directions, z: Tensor, mlp: Tensor) -> UnitScores:
    v_mid, v_post = directions.at(RESID_MID).to(z), directions.at(RESID_POST).to(z)
    return UnitScores(head_contributions(model, z, v_mid).cpu(), neuron_contributions(model, mlp, v_post).cpu())


# ---- the final score -----------------------------------------------------------------------------------------------


def stable_band(directions: Directions, threshold: float = BAND_COSINE) -> tuple[int, ...]:
    """The late layers over which the directions keep still: the longest run of adjacent `resid_post` cosines above the threshold
    that ends in the last third of the model; found, not hard-coded. Falls back to the single stillest late pair.
    """
    vectors = directions.at(RESID_POST)
    n_layers = vectors.shape[1]
    cosines = (vectors[:, 1:] * vectors[:, :-1]).sum(-1).mean(0)
    best: range | None = None
    start = 0
    for layer in range(1, n_layers + 1):
        if layer < n_layers and cosines[layer - 1] > threshold:
            continue
        run = range(start, layer)
        if run.stop > 2 * n_layers // 3 and (best is None or len(run) > len(best)):
            best = run
        start = layer
    if best is None or len(best) < 2:
        late = n_layers // 2
        pair = late + int(cosines[late:].argmax()) if n_layers - 1 > late else max(n_layers - 2, 0)
        best = range(pair, min(pair + 2, n_layers))
    return tuple(best)


def reference_directions(directions: Directions, band: Sequence[int]) -> Tensor:
    """`v_ref[e]`: normalised mean of `v_post[e]` over the stable band. Shape [emotion, d_model].

    Raises:
        DegenerateDirection: if the band's directions cancel out.
    """
    mean = directions.at(RESID_POST)[:, list(band)].mean(1)
    norms = mean.norm(dim=-1, keepdim=True)
    if not (norms > 1e-3).all():
        raise DegenerateDirection(f"the directions of layers {band[0]} to {band[-1]} cancel out; choose a narrower band")
    return mean / norms


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of the final score, and the activations they belong to, at the read positions.

    grad, value: site -> [state, pos, width]; weights: [state, pos], the read positions' shares; scores: [state].
    """

    grad: Mapping[Site, Tensor]
    value: Mapping[Site, Tensor]
    weights: Tensor
    scores: Tensor


def final_score(model: Model, batch: Batch, hidden: Tensor, v_ref: Tensor) -> Tensor:
    """Mean over a state's read positions of the last raw residual's projection on its own v_ref.

    Args:
        hidden: last `resid_post` [row, pos, d_model]; v_ref: [state, d_model].
    """
    return (batch.average(hidden) * v_ref.to(hidden.device).float()).sum(-1)


def score_gradients(model: Model, batch: Batch, v_ref: Tensor, sites: Sequence[Site]) -> Gradients:
    """One forward and one backward pass: d final score / d activation at every site, for every state of an unpacked batch."""
    values: dict[Site, Tensor] = {}
    probes: dict[Site, Tensor] = {}
    last = Site(model.shape.n_layers - 1, RESID_POST)
    found: dict[Site, Tensor] = {}

    def probing(site: Site) -> Callable[[Tensor], Tensor]:
        def edit(activation: Tensor) -> Tensor:
            values[site] = activation.detach()
            probes[site] = torch.zeros_like(activation, requires_grad=True)
            return activation + probes[site]

        return edit

    def keep(activation: Tensor) -> Tensor:
        new = probing(last)(activation) if last in sites else activation
        found[last] = new
        return new

    edits = {**{site: probing(site) for site in sites if site != last}, last: keep}
    with torch.enable_grad():
        model.run(batch.ids, edits, attention_mask=batch.mask, position_ids=batch.positions)
        scores = final_score(model, batch, found[last], v_ref)
        grads = torch.autograd.grad(scores.sum(), [probes[site] for site in sites])
    return Gradients(
        {site: grad.float() for site, grad in zip(sites, grads, strict=True)},
        {site: values[site].float() for site in sites},
        batch.weights[:, 0],
        scores.detach(),
    )


# ---- patching ------------------------------------------------------------------------------------------------------


def unpacked_batch(model: Model, samples: Sequence[Sample]) -> Batch:
    """A batch with one row per emotion of every group: what a gradient or a patch of one emotion must not share."""
    return make_batch(model, [row for sample in samples for row in rows_of(sample, packed=False)])


def other_emotions_mean(states: Tensor) -> Tensor:
    """Patch source: for each emotion of a group the mean state of the group's other emotions. [group, emotion, width] -> same."""
    n = states.shape[1]
    return (states.sum(1, keepdim=True) - states) / (n - 1)


def attribution_patching(model: Model, samples: Sequence[Sample], v_ref: Tensor) -> tuple[UnitScores, Tensor]:
    """First-order estimate, for every unit at once, of how much the final score falls when the unit's activation at all read
    positions is replaced by its mean in the group's other emotions.

    Args:
        samples: groups, computed one at a time; v_ref: [emotion, d_model].

    Returns:
        Estimates averaged over groups, and the clean final scores [group, emotion].
    """
    shape, n = model.shape, len(samples[0].prompts)
    heads = torch.zeros(n, shape.n_layers, shape.n_heads)
    neurons = torch.zeros(n, shape.n_layers, shape.d_mlp)
    sites = [Site(layer, kind) for layer in range(shape.n_layers) for kind in (Z, MLP_POST)]
    clean = []
    for sample in samples:
        batch = unpacked_batch(model, [sample])
        found = score_gradients(model, batch, v_ref, sites)
        reads = (found.weights > 0).float()[:, :, None]
        for site in sites:
            state = torch.einsum("sp,spw->sw", found.weights, found.value[site])
            patch = other_emotions_mean(state[None])[0]
            effect = ((found.value[site] - patch[:, None]) * found.grad[site] * reads).sum(1).cpu()
            if site.kind == Z:
                heads[:, site.layer] += effect.unflatten(-1, (shape.n_heads, shape.d_head)).sum(-1)
            else:
                neurons[:, site.layer] += effect
        clean.append(found.scores.cpu())
    return UnitScores(heads / len(samples), neurons / len(samples)), torch.stack(clean)


@torch.no_grad()
def true_patches(model: Model, samples: Sequence[Sample], v_ref: Tensor, emotion: int, units: Sequence[Unit], rows: int = 16) -> Tensor:
    """The truth that `attribution_patching` estimates: each unit really patched, one row per unit. Shape [unit], mean over groups."""
    drops = torch.zeros(len(units))
    last = Site(model.shape.n_layers - 1, RESID_POST)
    for sample in samples:
        whole = unpacked_batch(model, [sample])
        sites = sorted({Site(u.layer, Z if isinstance(u, Head) else MLP_POST) for u in units})
        seen = model.read(whole.ids, [*sites, last], attention_mask=whole.mask, position_ids=whole.positions)
        patch = {site: other_emotions_mean(whole.average(seen[site])[None])[0][emotion] for site in sites}
        clean = whole.average(seen[last])[emotion]
        single = Sample(sample.key, sample.theme, (sample.prompts[emotion],), (sample.replies[emotion],))
        for start in range(0, len(units), rows):
            chosen = units[start : start + rows]
            batch = unpacked_batch(model, [single] * len(chosen))
            edits = replace_units(model, [[unit] for unit in chosen], patch, positions=batch.read_mask())
            out = model.read(batch.ids, [last], edits=edits, attention_mask=batch.mask, position_ids=batch.positions)[last]
            # subtracted before projecting, see `ablation_drops`
            drops[start : start + rows] += ((clean - batch.average(out)) @ v_ref[emotion].to(clean)).cpu()
    return drops / len(samples)


# ---- one-pass contributions against real ablation --------------------------------------------------------------------


@torch.no_grad()
def ablation_drops(model: Model, ids: Tensor, position: int, units: Sequence[Unit], v_mid: Tensor, v_post: Tensor) -> tuple[Tensor, Tensor]:
    """For each unit: its one-pass contribution, and the drop of the projection at its own layer when it is really zero-ablated.

    Args:
        ids: one prompt [1, pos]; position: where both are read; v_mid, v_post: [layer, d_model].

    Returns:
        (contribution [unit], drop [unit]).
    """
    shape = model.shape
    sites = [Site(layer, kind) for layer in range(shape.n_layers) for kind in (Z, MLP_POST, RESID_MID, RESID_POST)]
    base = {site: value[0, position].float() for site, value in model.read(ids, sites).items()}
    stacked = {kind: torch.stack([base[Site(layer, kind)] for layer in range(shape.n_layers)]) for kind in (Z, MLP_POST)}
    tables = UnitScores(
        head_contributions(model, stacked[Z], v_mid.to(model.device))[None],
        neuron_contributions(model, stacked[MLP_POST], v_post.to(model.device))[None],
    )
    drops = torch.zeros(len(units))
    by_site: dict[Site, list[int]] = {}
    for index, unit in enumerate(units):
        by_site.setdefault(Site(unit.layer, RESID_MID if isinstance(unit, Head) else RESID_POST), []).append(index)
    for site, members in by_site.items():
        v = (v_mid if site.kind == RESID_MID else v_post)[site.layer].to(model.device)
        for start in range(0, len(members), 32):
            some = members[start : start + 32]
            edits = replace_units(model, [[units[i]] for i in some])
            after = model.read(ids.expand(len(some), -1), [site], edits=edits)[site][:, position].float()
            # the difference is taken before projecting: the residual's massive entries would drown it otherwise
            drops[some] = ((base[site] - after) @ v).cpu()
    return torch.tensor([tables.of(0, unit) for unit in units]), drops


def top_units(table: Tensor, count: int, make: type[Head] | type[Neuron]) -> list[Unit]:
    """The units with the largest scores, best first. table: [layer, index]."""
    order = table.flatten().topk(min(count, table.numel())).indices.tolist()
    return [make(index // table.shape[1], index % table.shape[1]) for index in order]


def unit_mask(model: Model, units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
    """Units as 0/1 masks over `z` entries [layer, n_heads * d_head] and neurons [layer, d_mlp]."""
    shape = model.shape
    z, mlp = torch.zeros(shape.n_layers, shape.n_heads * shape.d_head), torch.zeros(shape.n_layers, shape.d_mlp)
    for unit in units:
        (z if isinstance(unit, Head) else mlp)[unit.layer, unit_slice(model, unit)] = 1
    return z, mlp
