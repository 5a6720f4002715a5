"""Direct paths between heads: what of a head's contribution comes straight from what another head has written.

Head B puts out `z_B[i] = sum_j A_B[i, j] W_V N(x[j])`: its pattern `A_B`, the values of the stream `x` behind the norm `N`. With the
pattern and the norm's scale `s[j]` held where they are, this is linear in the stream, and the stream is a sum: the embeddings, what every
head wrote, what every MLP wrote. What head A of an earlier layer wrote at j, `w_A[j]`, is therefore in B's contribution
`c_B = z_B W_O . v_mid` (docs/METHOD.md section 4) with exactly

    edge(A -> B) = mean over the read positions i of sum_j A_B[i, j] s[j] (w_A[j] . q_B)       q_B = N' W_V' W_O v_mid

and these terms, with those of embeddings, MLPs and biases, add up to c_B. It is the direct path through B's values alone: what A does to
where B looks (its queries and keys), to the norm's scale, or through a third unit is not in it. `true_edges` patches that path for real,
pattern and scale computed again, and so says how much is missing.

Edges are contrasts like everything here: the mean over an emotion's replies less that over all emotions' replies to the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.attribution.unit_scores import written_direction
from emosteer.directions.activations import Batch
from emosteer.directions.directions import Directions
from emosteer.models.architecture import before_norm, part
from emosteer.models.attention import Seen, behind_norm, frozen_scale, value_weights
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, RESID_MID, Head, Site, Z

#: Where what reaches a head comes from: the token's own embedding, the heads of earlier layers, their MLPs with all biases.
SOURCES = ("embeddings", "heads", "MLPs")


@dataclass(frozen=True, eq=False)
class Targets:
    """Heads that edges lead to. reads: [target, emotion, d_model], `q_B`: what of the stream each carries along each direction."""

    heads: tuple[Head, ...]
    reads: Tensor


def targets_of(model: Model, directions: Directions, heads: Sequence[Head], seen: Seen) -> Targets:
    """What the heads read.

    Args:
        seen: any pass with `z` of all layers, on which the value maps are proved.

    Raises:
        ModelError: if a head's output is not its values weighed by its pattern.
    """
    v_mid = directions.at(RESID_MID).to(model.device).float()
    values = {layer: value_weights(model, layer, seen) for layer in sorted({head.layer for head in heads})}
    rows = []
    for head in heads:
        along = written_direction(model, head.layer, RESID_MID, v_mid[:, head.layer]).float()
        output = along @ model.w_o(head.layer)[head.index].float().T
        rows.append(read_before(model, head.layer, output @ values[head.layer][head.index]))
    return Targets(tuple(heads), torch.stack(rows))


def read_before(model: Model, layer: int, vectors: Tensor) -> Tensor:
    """Directions of what attention reads, as directions of the stream before its norm, the norm's scale apart. Shape [..., d_model]."""
    path = model.family.attn_norm
    return vectors if path is None else before_norm(model.family, part(model.layers[layer], path), vectors)


@dataclass(frozen=True, eq=False)
class Arrived:
    """What arrives at each target in each state that is read, weighed by pattern, norm and read positions: contracted with what a target
    reads, it is the part of its contribution. z: [state, target, layer, n_heads * d_head], outputs of the heads of earlier layers; stream:
    [state, target, source, d_model], sums of what each kind of source has written."""

    z: Tensor
    stream: Tensor


@torch.no_grad()
def followed(model: Model, seen: Seen, batch: Batch, targets: Targets) -> Arrived:
    """Weighs the stream's parts as each target does."""
    n_layers = model.shape.n_layers
    rows, size = batch.ids.shape
    z = torch.stack([seen.values[Site(layer, Z)].float() for layer in range(n_layers)], dim=2)
    written, held = zip(*(_written(model, seen, layer) for layer in range(n_layers)), strict=True)
    z = z * torch.stack(held, dim=2)[..., None]
    states = batch.weights.shape[1]
    arrived_z = torch.zeros(rows * states, len(targets.heads), *z.shape[2:], device=z.device)
    stream = torch.zeros(rows * states, len(targets.heads), len(SOURCES), model.shape.d_model, device=z.device)
    for layer in sorted({head.layer for head in targets.heads}):
        mine = [i for i, head in enumerate(targets.heads) if head.layer == layer]
        weight = weights_of(model, seen, batch, layer, [targets.heads[i].index for i in mine])

        def weighed(values: Tensor, weight: Tensor = weight) -> Tensor:
            """[row, pos, width] -> [state, target, width]."""
            return (weight.flatten(1, 2) @ values).unflatten(1, weight.shape[1:3]).flatten(0, 1)

        if layer:
            arrived_z[:, mine, :layer] = weighed(z[:, :, :layer].flatten(2)).unflatten(-1, (layer, -1))
        heads = sum(written[:layer], torch.zeros(rows, size, model.shape.d_model, device=z.device))
        parts = (seen.stream[0].float(), heads, seen.stream[layer].float() - seen.stream[0].float() - heads)
        stream[:, mine] = torch.stack([weighed(source) for source in parts], dim=2)
    return Arrived(arrived_z, stream)


def weights_of(model: Model, seen: Seen, batch: Batch, layer: int, heads: Sequence[int]) -> Tensor:
    """How much of a position's stream reaches a head's output, mean over a state's positions. Shape [row, state of it, head, key pos]."""
    scale = frozen_scale(model, model.family.attn_norm, layer, seen.stream[layer])
    pattern = seen.patterns[layer][:, list(heads)].float()
    return torch.einsum("rsq,rhqk->rshk", batch.weights.to(pattern), pattern) * scale[:, None, None]


def _written(model: Model, seen: Seen, layer: int) -> tuple[Tensor, Tensor]:
    """What the heads of a layer wrote together [row, pos, d_model], and the scale of the norm behind them [row, pos] (ones if none)."""
    out = seen.values[Site(layer, ATTN_OUT)]
    scale = frozen_scale(model, model.family.attn_post_norm, layer, out)
    z, weight = seen.values[Site(layer, Z)].float(), model.w_o(layer).flatten(0, 1).float()
    written = behind_norm(model, model.family.attn_post_norm, layer, z @ weight, scale)
    return model.residual_factor * written, scale


@dataclass(eq=False)
class Paths:
    """Means over prompts of what arrives, by the label of the reply, and the same with the emotions' labels shuffled inside each prompt.

    z, shuffled: [emotion, target, layer, n_heads * d_head]; stream: [emotion, target, source, d_model].
    """

    z: Tensor
    shuffled: Tensor
    stream: Tensor

    @classmethod
    def empty(cls, model: Model, targets: Targets, emotions: int) -> Paths:
        """Nothing read yet."""
        shape = (emotions, len(targets.heads), model.shape.n_layers, model.shape.n_heads * model.shape.d_head)
        stream = torch.zeros(emotions, len(targets.heads), len(SOURCES), model.shape.d_model)
        return cls(torch.zeros(shape), torch.zeros(shape), stream)

    def add(self, arrived: Arrived, order: Sequence[int]) -> None:
        """Adds the replies of one prompt, those of the emotions first. order: which emotion each counts as when shuffled."""
        n = len(self.z)
        z = arrived.z[:n].cpu()
        self.z += z
        self.shuffled += z[list(order)]
        self.stream += arrived.stream[:n].cpu()

    def divide(self, groups: int) -> None:
        """Sums to means."""
        for total in (self.z, self.shuffled, self.stream):
            total /= groups


def edges_into(model: Model, targets: Targets, arrived: Tensor) -> Tensor:
    """Edges from every head to every target along every direction.

    Args:
        arrived: [state, target, layer, n_heads * d_head].

    Returns:
        [state, target, emotion, layer, n_heads]; zero from heads that are not in an earlier layer than the target.
    """
    shape = model.shape
    out = torch.zeros(*arrived.shape[:2], targets.reads.shape[1], shape.n_layers, shape.n_heads)
    for layer in range(shape.n_layers):
        weight = model.w_o(layer).float()
        reads = written_direction(model, layer, RESID_MID, targets.reads).float()
        heads = arrived[:, :, layer].unflatten(-1, (shape.n_heads, shape.d_head)).to(weight)
        out[:, :, :, layer] = torch.einsum("rthd,hdm,tem->rteh", heads, weight, reads).cpu()
    return out


def contrast(by_emotion: Tensor) -> Tensor:
    """Each emotion's mean less that of all. The emotions come first."""
    return by_emotion - by_emotion.mean(0, keepdim=True)
